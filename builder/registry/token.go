package registry

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/docker/cli/cli/config/types"

	"handler/function/api"
	"handler/function/hosts"
	"handler/function/redact"
)

const (
	tokenTimeout     = 15 * time.Second // of one fetch, its retries included
	tokenAttempts    = 3
	maxRedirects     = 5
	tokenBackoff     = 500 * time.Millisecond // doubles
	maxTokenResponse = 1 << 20                // bytes

	// defaultExpiry is what the token specification says where a response
	// has no expires_in.
	defaultExpiry = 60 * time.Second

	clientID = "openfaas-builder"
)

// TokenRequest is a registry's Bearer challenge.
type TokenRequest struct {
	Host    string   // of the registry, as it is asked
	Realm   string   // URL of the token service
	Service string   // as the challenge names it
	Scopes  []string // such as "repository:library/alpine:pull"
}

// Token is a Bearer token.
type Token struct {
	Value    string
	IssuedAt time.Time
	Expires  time.Time
}

// Basic is the user name and password for host, both empty when there are none
// that may be handed out. They are those for the first repository that this build
// pushes to there: the daemon asks by host alone, and keeps them for the build.
func (g *Grant) Basic(ctx context.Context, host string) (username, password string, err error) {
	f, err := g.auth(ctx, host, g.first[serverHost(host)])
	if err == nil {
		err = f.failed
	}
	if err != nil {
		return "", "", unreadable(host, err)
	}
	auth := f.auth
	// An identity token is for the token service alone.
	if auth.Username == "" || auth.Password == "" || auth.IdentityToken != "" {
		return "", "", nil
	}
	if !g.creds.cfg.AllowBasic {
		return "", "", &api.Error{
			Code: api.RegistryDenied,
			Msg:  fmt.Sprintf("registry %s: it asks for Basic authentication, which allow_basic=false forbids", host),
		}
	}
	return auth.Username, auth.Password, nil
}

// Token answers a challenge with a token for the scopes that this build needs:
// to push where it pushes, and to pull. Every error is an *api.Error.
//
// None is handed out twice: the daemon keeps them, and asks again when the
// registry no longer takes the last one.
func (g *Grant) Token(ctx context.Context, req TokenRequest) (Token, error) {
	scopes, err := g.permit(req.Host, req.Scopes)
	if err != nil {
		return Token{}, err
	}
	realm, trusted, err := g.creds.checkRealm(req.Host, req.Realm)
	if err != nil {
		return Token{}, err
	}
	have, err := g.auth(ctx, req.Host, g.repository(req.Host, scopes))
	if err != nil {
		return Token{}, unreadable(req.Host, err)
	}
	auth := have.auth
	if auth.RegistryToken != "" {
		// It is good for as long, and for as much, as whoever made it meant it to be.
		if !g.creds.cfg.AllowBasic {
			return Token{}, &api.Error{
				Code: api.RegistryDenied,
				Msg:  fmt.Sprintf("registry %s: its credentials are a registry token, which allow_basic=false forbids", req.Host),
			}
		}
		now := time.Now()
		return Token{Value: auth.RegistryToken, IssuedAt: now, Expires: now.Add(defaultExpiry)}, nil
	}

	ctx, cancel := context.WithTimeout(ctx, tokenTimeout)
	defer cancel()
	f := &fetch{host: req.Host, realm: realm, service: req.Service, scopes: scopes, auth: auth}
	f.client, err = g.creds.client(req.Host, realm, trusted)
	if err != nil {
		return Token{}, err
	}
	defer f.client.CloseIdleConnections()
	tok, err := f.run(ctx)
	if e, ok := errors.AsType[*api.Error](err); ok && e.Code == api.RegistryDenied {
		if have.failed != nil {
			return Token{}, unreadable(req.Host, have.failed)
		}
		e.Msg += g.hint(req.Host)
	}
	return tok, err
}

// repository is the one that a token for these scopes is for, since it can be had
// with one user's credentials only: the one that is pushed to, or the one that is
// new, because the daemon asks for what it has along with it.
func (g *Grant) repository(host string, scopes []string) string {
	host = serverHost(host)
	set := host + " " + strings.Join(scopes, " ")
	g.mu.Lock()
	defer g.mu.Unlock()
	if repository, ok := g.wanted[set]; ok {
		return repository
	}
	known := make(map[string]bool)
	for s, repository := range g.wanted {
		if strings.HasPrefix(s, host+" ") {
			known[repository] = true
		}
	}
	var pushed, fresh, any string
	for _, scope := range scopes {
		resource, actions, _ := cutLast(scope, ":")
		_, name, _ := strings.Cut(resource, ":")
		own, mine := g.pushes[host+"/"+name]
		if mine {
			name = own
		}
		if mine && strings.Contains(actions, "push") && pushed == "" {
			pushed = name
		}
		if !known[name] && fresh == "" {
			fresh = name
		}
		if any == "" {
			any = name
		}
	}
	repository := cmp.Or(pushed, fresh, any)
	g.wanted[set] = repository
	return repository
}

// hint says that a token service named another path than the image's, if it did.
func (g *Grant) hint(host string) string {
	host = serverHost(host)
	g.mu.Lock()
	defer g.mu.Unlock()
	name, repository := g.other[host], g.first[host]
	if name == "" || repository == "" {
		return ""
	}
	image, token := strings.Split(repository, "/"), strings.Split(name, "/")
	n := sameEnd(image, token)
	entry := strings.Join(append([]string{host}, image[:len(image)-n]...), "/") + "=" + strings.Join(token[:len(token)-n], "/")
	return fmt.Sprintf("; its token service asks for %q where the image is %q: if these are the same, token_paths needs %q", name, repository, entry)
}

// sameEnd is how many segments a and b have in common at their ends.
func sameEnd(a, b []string) int {
	n := 0
	for n < min(len(a), len(b)) && a[len(a)-1-n] == b[len(b)-1-n] {
		n++
	}
	return n
}

// Hints are what to say of a push that was denied, by the server's host.
func (g *Grant) Hints() map[string]string {
	hints := make(map[string]string)
	for host := range g.first {
		if h := g.hint(host); h != "" {
			hints[host] = h
		}
	}
	return hints
}

// permit leaves of scopes what this build may do at host.
func (g *Grant) permit(host string, scopes []string) ([]string, error) {
	var permitted []string
	for _, list := range scopes {
		for _, scope := range strings.Fields(list) {
			resource, actions, ok := cutLast(scope, ":")
			kind, name, ok2 := strings.Cut(resource, ":")
			// "repository(plugin)" is a repository as well.
			if kind, _, _ = strings.Cut(kind, "("); !ok || !ok2 || kind != "repository" {
				continue
			}
			var may []string
			for action := range strings.SplitSeq(actions, ",") {
				_, mine := g.pushes[serverHost(host)+"/"+name]
				if action == "pull" || action == "push" && mine {
					may = append(may, action)
				} else if action == "push" {
					g.elsewhere(serverHost(host), name)
				}
			}
			if len(may) > 0 {
				slices.Sort(may)
				permitted = append(permitted, resource+":"+strings.Join(slices.Compact(may), ","))
			}
		}
	}
	if len(permitted) == 0 && len(scopes) > 0 {
		return nil, &api.Error{
			Code: api.RegistryDenied,
			Msg:  fmt.Sprintf("registry %s: it asks for more than this build may do there: %q%s", host, strings.Join(scopes, " "), g.hint(host)),
		}
	}
	slices.Sort(permitted)
	return slices.Compact(permitted), nil
}

// elsewhere notes that host wants a right to push to a repository that this build
// does not push to. It may be the one of another image, which the daemon pulls: one
// whose name ends as that of the image does tells more.
func (g *Grant) elsewhere(host, name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	image := strings.Split(g.first[host], "/")
	alike := func(name string) bool { return sameEnd(image, strings.Split(name, "/")) > 0 }
	if g.other[host] == "" || alike(name) && !alike(g.other[host]) {
		g.other[host] = name
	}
}

func cutLast(s, sep string) (before, after string, ok bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// checkRealm says whether the token service of the registry host may be asked at
// all, and whether Config.TokenHosts has it for that registry.
func (c *Credentials) checkRealm(host, realm string) (u *url.URL, trusted bool, err error) {
	refuse := func(why string) error {
		return &api.Error{Code: api.RegistryDenied, Msg: fmt.Sprintf("registry %s: its token service %q is refused: %s", host, cutURL(realm), why)}
	}
	u, err = url.Parse(realm)
	if err != nil || u.Hostname() == "" {
		return nil, false, refuse("not a URL")
	}
	if u.User != nil {
		return nil, false, refuse("a user name in a URL")
	}
	service, err := hosts.Parse(u.Host)
	if err != nil {
		return nil, false, refuse(err.Error())
	}
	trusted = c.trusted(host, u.Scheme, service)
	switch {
	case u.Scheme == "https", u.Scheme == "http" && trusted:
	default:
		return nil, false, refuse("not https, and " + notListed(host, u))
	}
	if ip, err := netip.ParseAddr(service.Name); err == nil && !trusted && !hosts.Public(ip) {
		return nil, false, refuse("not a public address, and " + notListed(host, u))
	}
	u.Fragment = ""
	return u, trusted, nil
}

// trusted says whether the operator has listed service for the registry host. An
// entry without a port is for the scheme's own.
func (c *Credentials) trusted(host, scheme string, service hosts.Host) bool {
	registry, own := serverHost(host), hosts.DefaultPort(scheme)
	return c.tokenHosts[TokenHost{registry, service.WithPort(own)}] || c.tokenHosts[TokenHost{registry, service.Without(own)}]
}

// notListed says what token_hosts would have to have.
func notListed(host string, realm *url.URL) string {
	return fmt.Sprintf("token_hosts does not have %q", lower(host)+"="+lower(realm.Host))
}

// maxRealm is how much of a realm an error has, in bytes.
const maxRealm = 200

// cutURL is a realm without what may be secret in it.
func cutURL(s string) string {
	s = redact.URLs(s)
	return strings.ToValidUTF8(s[:min(len(s), maxRealm)], "")
}

// registryClient is for requests to the registry itself, under the same rules.
func (c *Credentials) registryClient(host string) (*http.Client, error) {
	u, trusted, err := c.checkRealm(host, "https://"+host)
	if err != nil {
		return nil, err
	}
	return c.client(host, u, trusted)
}

var errAddress = errors.New("not a public address")

// client is for one fetch: TLS and address rules differ from registry to
// registry, so nothing of a transport is shared.
func (c *Credentials) client(host string, realm *url.URL, trusted bool) (*http.Client, error) {
	roots, err := c.roots(host, realm)
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	t := &http.Transport{
		DialContext:            dialer.DialContext,
		TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    10 * time.Second,
		ResponseHeaderTimeout:  tokenTimeout,
		MaxResponseHeaderBytes: 64 << 10,
		DisableKeepAlives:      true,
		Proxy:                  http.ProxyFromEnvironment,
	}
	if !trusted {
		// Behind a proxy the address dialled is the proxy's, and whom it may
		// reach is the proxy's own rule. Without one it is the token service's,
		// after every look-up of its name.
		proxy, err := http.ProxyFromEnvironment(&http.Request{URL: realm})
		if err != nil {
			return nil, &api.Error{Code: api.RegistryFailed, Msg: fmt.Sprintf("registry %s: its token service cannot be reached", host), Err: err}
		}
		if proxy == nil {
			dialer.ControlContext = func(_ context.Context, _, address string, _ syscall.RawConn) error {
				ap, err := netip.ParseAddrPort(address)
				if err != nil || !hosts.Public(ap.Addr()) {
					return errAddress
				}
				return nil
			}
		}
	}
	return &http.Client{
		Transport:     t,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// roots are the system's CAs and those configured for the registry or for its
// token service. Nil are the system's alone.
func (c *Credentials) roots(host string, realm *url.URL) (*x509.CertPool, error) {
	var pool *x509.CertPool
	for _, h := range []string{serverHost(host), serverHost(realm.Host)} {
		name := c.caFiles[h]
		if name == "" {
			continue
		}
		pem, err := os.ReadFile(name)
		if err != nil {
			return nil, &api.Error{Code: api.RegistryFailed, Msg: fmt.Sprintf("registry %s: its CA file cannot be read", host), Err: err}
		}
		if pool == nil {
			if pool, err = x509.SystemCertPool(); err != nil {
				pool = x509.NewCertPool()
			}
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, &api.Error{Code: api.RegistryFailed, Msg: fmt.Sprintf("registry %s: its CA file holds no certificate", host), Err: fmt.Errorf("reading %q: no PEM certificate", name)}
		}
	}
	return pool, nil
}

// fetch asks one token service.
type fetch struct {
	host    string
	realm   *url.URL
	service string
	scopes  []string
	auth    types.AuthConfig
	client  *http.Client
}

// run tries GET, which every token service has, before POST, but for an
// identity token, which only POST can carry.
func (f *fetch) run(ctx context.Context) (Token, error) {
	if f.auth.IdentityToken != "" {
		return f.retry(ctx, f.post, f.realm)
	}
	tok, err := f.retry(ctx, f.get, f.target())
	var st *statusError
	if errors.As(err, &st) && (st.code == http.StatusNotFound || st.code == http.StatusMethodNotAllowed) && f.auth.Username != "" {
		return f.retry(ctx, f.post, f.realm)
	}
	return tok, err
}

// request makes one to a URL.
type request func(context.Context, *url.URL) (*http.Request, error)

func (f *fetch) retry(ctx context.Context, do request, u *url.URL) (Token, error) {
	wait := tokenBackoff
	for attempt := 1; ; attempt++ {
		tok, err := f.once(ctx, do, u)
		if err == nil {
			return tok, nil
		}
		if attempt == tokenAttempts || !transient(err) || ctx.Err() != nil {
			return Token{}, f.explain(err)
		}
		select {
		case <-ctx.Done():
			return Token{}, f.explain(err)
		case <-time.After(wait):
		}
		wait *= 2
	}
}

func transient(err error) bool {
	var st *statusError
	if errors.As(err, &st) {
		return st.code >= 500 || st.code == http.StatusTooManyRequests
	}
	var cert *tls.CertificateVerificationError
	return !errors.Is(err, errAddress) && !errors.Is(err, errResponse) && !errors.As(err, &cert)
}

// statusError is an answer other than 200.
type statusError struct {
	code     int
	location string // of a redirect that is not followed
}

func (e *statusError) Error() string {
	if e.location != "" {
		return fmt.Sprintf("status %d to %q", e.code, e.location)
	}
	return fmt.Sprintf("status %d", e.code)
}

var errResponse = errors.New("no token in its answer")

// explain makes err one for the client. Neither side's text holds what was
// sent.
func (f *fetch) explain(err error) error {
	e := &api.Error{Code: api.RegistryFailed}
	why := "cannot be reached"
	var st *statusError
	switch {
	case errors.As(err, &st):
		why = "answered with " + st.Error()
		if st.code < 500 && st.code != http.StatusTooManyRequests {
			e.Code = api.RegistryDenied
		}
		if st.code == http.StatusUnauthorized || st.code == http.StatusForbidden {
			why = fmt.Sprintf("refused the credentials (%d)", st.code)
			if f.anonymous() {
				why = fmt.Sprintf("wants credentials, and none are configured for it (%d)", st.code)
			}
		}
	case errors.Is(err, errAddress):
		e.Code = api.RegistryDenied
		why = "is refused: not a public address, and " + notListed(f.host, f.realm)
	case errors.As(err, new(*tls.CertificateVerificationError)):
		why = "has a certificate that no known CA has signed (registry_ca)"
	case errors.Is(err, errResponse):
		why = "answered with something that is no token"
	case errors.Is(err, context.DeadlineExceeded):
		why = fmt.Sprintf("did not answer within %v", tokenTimeout)
	}
	e.Msg = fmt.Sprintf("registry %s: its token service %s %s", f.host, f.realm.Host, why)
	// The URL of a GET holds the scopes and the account, which may be logged,
	// but a realm may have a query of its own.
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	e.Err = err
	return e
}

func (f *fetch) anonymous() bool { return f.auth.Username == "" && f.auth.IdentityToken == "" }

// target is the realm with what a GET says in its query.
func (f *fetch) target() *url.URL {
	u := *f.realm
	q := u.Query()
	if f.service != "" {
		q.Set("service", f.service)
	}
	for _, s := range f.scopes {
		q.Add("scope", s)
	}
	if f.auth.Username != "" {
		q.Set("account", f.auth.Username)
	}
	u.RawQuery = q.Encode()
	return &u
}

func (f *fetch) get(ctx context.Context, u *url.URL) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	if f.auth.Username != "" {
		req.SetBasicAuth(f.auth.Username, f.auth.Password)
	}
	return req, nil
}

func (f *fetch) post(ctx context.Context, u *url.URL) (*http.Request, error) {
	form := url.Values{"client_id": {clientID}, "access_type": {"online"}}
	if f.service != "" {
		form.Set("service", f.service)
	}
	if len(f.scopes) > 0 {
		form.Set("scope", strings.Join(f.scopes, " "))
	}
	if f.auth.IdentityToken != "" {
		form.Set("grant_type", "refresh_token")
		form.Set("refresh_token", f.auth.IdentityToken)
	} else {
		form.Set("grant_type", "password")
		form.Set("username", f.auth.Username)
		form.Set("password", f.auth.Password)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), strings.NewReader(form.Encode()))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	return req, nil
}

func (f *fetch) once(ctx context.Context, do request, u *url.URL) (Token, error) {
	for range maxRedirects {
		tok, next, err := f.ask(ctx, do, u)
		if next == nil {
			return tok, err
		}
		u = next
	}
	return Token{}, fmt.Errorf("%w: more than %d redirects", errResponse, maxRedirects)
}

// ask has a token, or the URL to ask instead, with the same credentials.
func (f *fetch) ask(ctx context.Context, do request, u *url.URL) (tok Token, next *url.URL, err error) {
	req, err := do(ctx, u)
	if err != nil {
		return Token{}, nil, err
	}
	req.Header.Set("User-Agent", clientID)
	req.Header.Set("Accept", "application/json")
	resp, err := f.client.Do(req)
	if err != nil {
		return Token{}, nil, err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
		tok, err := readAnswer(resp.Body)
		return tok, nil, err
	case http.StatusMovedPermanently, http.StatusFound, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		to, err := resp.Location()
		if err != nil {
			break
		}
		if !sameService(u, to) {
			return Token{}, nil, &statusError{resp.StatusCode, redact.URLs(to.String())}
		}
		return Token{}, to, nil
	}
	return Token{}, nil, &statusError{code: resp.StatusCode}
}

// sameService says whether credentials for from may go to a URL that it redirects
// to: one of the same host and port, or of the same host by https where it was
// http. The port is another one then, and the certificate says whose it is.
func sameService(from, to *url.URL) bool {
	a, err := hosts.Parse(from.Host)
	b, err2 := hosts.Parse(to.Host)
	if err != nil || err2 != nil || to.User != nil || a.Name != b.Name {
		return false
	}
	if from.Scheme == "http" && to.Scheme == "https" {
		return true
	}
	return from.Scheme == to.Scheme && a.WithPort(hosts.DefaultPort(from.Scheme)) == b.WithPort(hosts.DefaultPort(to.Scheme))
}

func readAnswer(r io.Reader) (Token, error) {
	body, err := io.ReadAll(io.LimitReader(r, maxTokenResponse+1))
	if err != nil {
		return Token{}, err
	}
	if len(body) > maxTokenResponse {
		return Token{}, fmt.Errorf("%w: more than %d bytes", errResponse, maxTokenResponse)
	}
	return readToken(body, time.Now())
}

// readToken takes both forms of the answer: GET's has "token", POST's
// "access_token", and some services send either for both.
func readToken(body []byte, now time.Time) (Token, error) {
	var r struct {
		Token       string    `json:"token"`
		AccessToken string    `json:"access_token"`
		ExpiresIn   int64     `json:"expires_in"` // seconds
		IssuedAt    time.Time `json:"issued_at"`
	}
	// The decoder's error may quote the answer.
	if err := json.Unmarshal(body, &r); err != nil {
		return Token{}, errResponse
	}
	value := r.AccessToken
	if r.Token != "" {
		value = r.Token
	}
	if value == "" {
		return Token{}, errResponse
	}
	life := defaultExpiry
	if r.ExpiresIn > 0 {
		life = time.Duration(min(r.ExpiresIn, 24*60*60)) * time.Second
	}
	// Its clock may differ from ours: what counts is how long the token lives.
	if !r.IssuedAt.IsZero() && r.IssuedAt.Before(now) {
		if left := r.IssuedAt.Add(life).Sub(now); left > 0 {
			life = left
		}
	}
	return Token{Value: value, IssuedAt: now, Expires: now.Add(life)}, nil
}

func unreadable(host string, err error) error {
	if _, ok := errors.AsType[*api.Error](err); ok {
		return err
	}
	return &api.Error{Code: api.RegistryFailed, Msg: fmt.Sprintf("registry %s: its credentials cannot be read; the builder's log has the cause", host), Err: err}
}

func lower(s string) string { return strings.ToLower(s) }
