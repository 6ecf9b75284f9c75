package registry

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/docker/cli/cli/config/types"

	"handler/function/api"
	"handler/function/hosts"
	"handler/function/redact"
)

const (
	tokenTimeout     = 15 * time.Second // of one fetch with its retries
	tokenAttempts    = 3
	maxRedirects     = 5
	tokenBackoff     = 500 * time.Millisecond // before the second attempt; doubles for the next
	maxTokenResponse = 1 << 20                // bytes

	// defaultExpiry is the life of a token whose response has no expires_in,
	// according to the token specification.
	defaultExpiry = 60 * time.Second

	clientID = "openfaas-builder"
)

// fetch fetches one token from one token service.
type fetch struct {
	host    string // the registry's
	realm   *url.URL
	service string
	scopes  []string
	auth    types.AuthConfig
	client  *http.Client
}

// run tries GET, which nearly every token service has, and POST where that is not there.
// An identity token can only be sent with POST.
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

// newRequest makes a request to a URL: get or post.
type newRequest func(context.Context, *url.URL) (*http.Request, error)

// retry makes up to tokenAttempts attempts. Its error is an *api.Error.
func (f *fetch) retry(ctx context.Context, request newRequest, u *url.URL) (Token, error) {
	wait := tokenBackoff
	for attempt := 1; ; attempt++ {
		tok, err := f.attempt(ctx, request, u)
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

// transient says whether an attempt that ended with err may succeed when it is repeated.
func transient(err error) bool {
	var st *statusError
	if errors.As(err, &st) {
		return st.code >= 500 || st.code == http.StatusTooManyRequests
	}
	var cert *tls.CertificateVerificationError
	return !errors.Is(err, errAddress) && !errors.Is(err, errResponse) && !errors.Is(err, errAnswer) && !errors.As(err, &cert)
}

// attempt asks once, and again wherever a redirect leads to that may have the credentials.
func (f *fetch) attempt(ctx context.Context, request newRequest, u *url.URL) (Token, error) {
	for range maxRedirects {
		tok, next, err := f.ask(ctx, request, u)
		if next == nil {
			return tok, err
		}
		u = next
	}
	return Token{}, fmt.Errorf("%w: more than %d redirects", errResponse, maxRedirects)
}

// ask sends one request. It returns a token, or the URL to ask instead with the same
// credentials.
func (f *fetch) ask(ctx context.Context, request newRequest, u *url.URL) (tok Token, next *url.URL, err error) {
	req, err := request(ctx, u)
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

// sameService says whether credentials for the URL from may go to the URL that it
// redirects to. That is so if scheme, host and port are the same. It is also so from http
// to https on the same host, whatever the port: the certificate proves whose it is.
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

// explain makes err one for the client. Neither the client's text nor the operator's
// holds credentials.
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
		why = "has a certificate that cannot be verified (registry_ca)"
	case errors.Is(err, errResponse):
		why = "answered with something that is no token"
	case errors.Is(err, context.DeadlineExceeded):
		why = "did not answer in time"
	}
	e.Msg = fmt.Sprintf("registry %s: its token service %s %s", f.host, f.realm.Host, why)
	// The error of net/http quotes the URL, and the realm's own query may be secret.
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	e.Err = err
	return e
}

// anonymous says whether the token is asked for without credentials.
func (f *fetch) anonymous() bool { return f.auth.Username == "" && f.auth.IdentityToken == "" }

// target returns the URL for a GET: the realm with what is asked for in its query.
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

// readAnswer reads the token from a response's body.
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

var errResponse = errors.New("no token in its answer")

// readToken takes both forms of the answer: GET's has "token", POST's
// "access_token", and some services send either for both.
func readToken(body []byte, now time.Time) (Token, error) {
	var r struct {
		Token       string    `json:"token"`
		AccessToken string    `json:"access_token"`
		ExpiresIn   int64     `json:"expires_in"` // seconds
		IssuedAt    time.Time `json:"issued_at"`
	}
	// The decoder's error is dropped: it may quote the answer.
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
	// The service's clock may differ from ours. Only how much is left of the token's life
	// is taken from it, and only where something is left.
	if !r.IssuedAt.IsZero() && r.IssuedAt.Before(now) {
		if left := r.IssuedAt.Add(life).Sub(now); left > 0 {
			life = left
		}
	}
	return Token{Value: value, IssuedAt: now, Expires: now.Add(life)}, nil
}
