package faults

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/stack"
)

// faultProxy is a reverse proxy of these tests in front of the real registry.
// It breaks the requests that its fault picks and passes on all others.
type faultProxy struct {
	addr string // host:port

	mu    sync.Mutex
	fault *fault
	met   int       // requests that were broken
	first time.Time // when the first of them came
}

// fault is what happens to which requests.
type fault struct {
	picks func(*http.Request) bool
	// breaks answers instead of next, the real registry.
	breaks func(w http.ResponseWriter, r *http.Request, next http.Handler)
}

func newFaultProxy(t *testing.T, registry string) *faultProxy {
	t.Helper()
	p := &faultProxy{}
	p.addr = stack.Front(t, registry, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if f := p.pick(r); f != nil {
			f.breaks(w, r, next)
			return
		}
		next.ServeHTTP(w, r)
	})
	return p
}

func (p *faultProxy) pick(r *http.Request) *fault {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fault == nil || !p.fault.picks(r) {
		return nil
	}
	if p.met++; p.met == 1 {
		p.first = time.Now()
	}
	return p.fault
}

// set changes the fault; nil is none.
func (p *faultProxy) set(f *fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = f
}

// broken are the number of requests that met a fault, and when the first did.
func (p *faultProxy) broken() (int, time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.met, p.first
}

// Requests of a push, as containerd's pusher makes them.

func manifestPut(r *http.Request) bool {
	return r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/")
}

// manifestHead is how a push asks whether a manifest is there.
func manifestHead(r *http.Request) bool {
	return r.Method == http.MethodHead && strings.Contains(r.URL.Path, "/manifests/")
}

func blobPost(r *http.Request) bool {
	return r.Method == http.MethodPost && strings.Contains(r.URL.Path, "/blobs/uploads/")
}

// blobBody is the upload of a layer's bytes, not of a config's.
func blobBody(r *http.Request) bool {
	return (r.Method == http.MethodPut || r.Method == http.MethodPatch) && strings.Contains(r.URL.Path, "/blobs/uploads/") &&
		(r.ContentLength < 0 || r.ContentLength > 100<<10)
}

func anyWrite(r *http.Request) bool { return manifestPut(r) || blobPost(r) || blobBody(r) }

func anything(*http.Request) bool { return true }

// refuse answers with a status and, as registries do, a code of the distribution
// specification, or with no body where that is empty.
func refuse(status int, code string, picks func(*http.Request) bool, header ...string) *fault {
	return refuseWith(status, code, "so says the fault proxy", picks, header...)
}

func refuseWith(status int, code, message string, picks func(*http.Request) bool, header ...string) *fault {
	return &fault{picks, func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		if code != "" {
			fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, code, message)
		}
	}}
}

// refuseBody answers with a body of any form.
func refuseBody(status int, body string, picks func(*http.Request) bool) *fault {
	return &fault{picks, func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		w.WriteHeader(status)
		io.WriteString(w, body)
	}}
}

// first lets a fault happen n times, and another from then on, if there is one.
func first(n int, f *fault, then ...*fault) *fault {
	current := f
	return &fault{func(r *http.Request) bool {
		if n == 0 && len(then) > 0 {
			current = then[0]
			return current.picks(r)
		}
		if n == 0 || !f.picks(r) {
			return false
		}
		n--
		return true
	}, func(w http.ResponseWriter, r *http.Request, next http.Handler) { current.breaks(w, r, next) }}
}

// during lets a fault happen for a time that begins with the first.
func during(d time.Duration, f *fault) *fault {
	var until time.Time
	return &fault{func(r *http.Request) bool {
		if !until.IsZero() && time.Now().After(until) || !f.picks(r) {
			return false
		}
		if until.IsZero() {
			until = time.Now().Add(d)
		}
		return true
	}, f.breaks}
}

// hang reads a request and never answers.
func hang(picks func(*http.Request) bool) *fault {
	return &fault{picks, func(_ http.ResponseWriter, r *http.Request, _ http.Handler) {
		io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
	}}
}

// cut passes on a part of a layer, then closes the connection.
func cut(after int64) *fault {
	return &fault{blobBody, func(_ http.ResponseWriter, r *http.Request, next http.Handler) {
		r.Body = &cutBody{r.Body, after}
		next.ServeHTTP(httptest.NewRecorder(), r)
		panic(http.ErrAbortHandler)
	}}
}

type cutBody struct {
	io.ReadCloser
	left int64
}

func (b *cutBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// layered is a request for an image of one layer that does not compress, and
// that no other image has.
func layered(t *testing.T, config *builder.BuildConfig, size int) []byte {
	t.Helper()
	noise := make([]byte, size)
	rand.Read(noise)
	body, err := stack.Tar(stack.Context(t, map[string]string{
		"Dockerfile": "FROM busybox\nCOPY noise /\n",
		"noise":      string(noise),
	}), config)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// TestRegistryFaults pushes a first version, breaks the registry, and pushes a
// second one: the verdict must be true, and until a push has succeeded as a
// whole the old tag must be what it was.
func TestRegistryFaults(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	// The pushes before and after the fault have this limit too, and are to succeed on a busy
	// machine. The retries after a 429 end after 22 s, so it is less.
	const pushTimeout = 18 * time.Second
	for name, test := range map[string]struct {
		env    map[string]string
		fault  *fault
		code   string // empty is success
		texts  []string
		within time.Duration // from the first broken request to the verdict
	}{
		"500 on the manifest": {fault: refuse(500, "", manifestPut), code: "registry_failed", texts: []string{"500"}},
		"503 on blobs":        {fault: refuse(503, "UNAVAILABLE", blobPost), code: "registry_failed", texts: []string{"unavailable"}},
		"503 and back":        {fault: during(2*time.Second, refuse(503, "UNAVAILABLE", anyWrite))},
		"429 and back":        {fault: during(3*time.Second, refuse(429, "TOOMANYREQUESTS", anyWrite, "Retry-After", "1"))},
		"429, bare, and back": {fault: during(3*time.Second, refuse(429, "", anyWrite, "Retry-After", "1"))},
		"429": {
			fault: refuse(429, "TOOMANYREQUESTS", anyWrite, "Retry-After", "1"),
			code:  "registry_failed", texts: []string{"toomanyrequests"}, within: time.Minute,
		},
		"429 past push_timeout": {
			env:   map[string]string{"push_timeout": pushTimeout.String()},
			fault: refuse(429, "TOOMANYREQUESTS", anyWrite, "Retry-After", "1"),
			code:  "registry_timeout", within: pushTimeout + 2*time.Second,
		},
		"401": {
			fault: refuse(401, "UNAUTHORIZED", anyWrite, "WWW-Authenticate", `Basic realm="test"`),
			code:  "registry_denied", texts: []string{"no credentials are configured"},
		},
		"403":                 {fault: refuse(403, "DENIED", anyWrite), code: "registry_denied", texts: []string{"denied"}},
		"403, bare":           {fault: refuse(403, "", anyWrite), code: "registry_denied", texts: []string{"403"}},
		"403 on the manifest": {fault: refuse(403, "DENIED", manifestPut), code: "registry_denied", texts: []string{"denied"}},
		"no repository": {
			fault: refuseWith(404, "NAME_UNKNOWN", "The repository with name 'x' does not exist", blobPost),
			code:  "registry_denied", texts: []string{"does not exist"},
		},
		"a tag that stays": {
			fault: refuseWith(400, "TAG_INVALID", "the tag is immutable", manifestPut),
			code:  "registry_denied", texts: []string{"immutable"},
		},
		"blobs that it has not": {
			fault: refuseWith(404, "MANIFEST_BLOB_UNKNOWN", "blob unknown to registry", manifestPut),
			code:  "registry_denied", texts: []string{"blob unknown to registry"},
		},
		"several reasons": {
			fault: refuseBody(400, `{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN","message":"blob unknown","detail":"a"},{"code":"BLOB_UNKNOWN","message":"unknown blob","detail":"b"}]}`, manifestPut),
			code:  "registry_denied", texts: []string{"blob unknown - a", "unknown blob - b"},
		},
		"a reason in the detail": {
			fault: refuseBody(400, `{"errors":[{"code":"BLOB_UPLOAD_INVALID","message":"blob upload invalid","detail":"Repository does not allow updating assets: hosted"}]}`, manifestPut),
			code:  "registry_denied", texts: []string{"does not allow updating assets"},
		},
		"a code alone":       {fault: refuseBody(409, `{"errors":[{"code":"UNAVAILABLE"}]}`, manifestPut), code: "registry_denied", texts: []string{"unavailable"}},
		"412 to a question":  {fault: refuse(412, "", manifestHead), code: "registry_denied", texts: []string{"412"}},
		"413 of a proxy":     {fault: refuseBody(413, "<html>413 Request Entity Too Large</html>", blobBody), code: "registry_denied", texts: []string{"413"}},
		"500 in words":       {fault: refuseWith(500, "UNKNOWN", "blob unknown to registry", manifestPut), code: "registry_failed", texts: []string{"blob unknown"}},
		"500 in several":     {fault: refuseBody(502, `{"errors":[{"code":"UNKNOWN","message":"one","detail":"a"},{"code":"UNKNOWN","message":"two"}]}`, manifestPut), code: "registry_failed", texts: []string{"one - a", "two"}},
		"500, then refused":  {fault: first(1, refuseWith(500, "UNKNOWN", "in trouble", manifestPut), refuseWith(400, "TAG_INVALID", "no such tag here", manifestPut)), code: "registry_denied", texts: []string{"no such tag here"}},
		"429 in other words": {fault: refuseWith(429, "TOO_MANY", "Rate limit exceeded", manifestPut), code: "registry_failed", texts: []string{"Rate limit"}},
		"405":                {fault: refuse(405, "UNSUPPORTED", manifestPut), code: "registry_denied", texts: []string{"unsupported"}},
		"cut once":           {fault: first(1, cut(500<<10))},
		"cut always":         {fault: cut(500 << 10), code: "registry_failed"},
		"silent on the manifest": {
			env: map[string]string{"push_timeout": pushTimeout.String()}, fault: hang(manifestPut),
			code: "registry_timeout", texts: []string{"push_timeout"}, within: pushTimeout + 2*time.Second,
		},
		"silent on a blob": {
			env: map[string]string{"push_timeout": pushTimeout.String()}, fault: hang(blobBody),
			code: "registry_timeout", texts: []string{"push_timeout"}, within: pushTimeout + 2*time.Second,
		},
		"silent altogether": {
			env: map[string]string{"push_timeout": pushTimeout.String()}, fault: hang(anything),
			code: "registry_timeout", texts: []string{"push_timeout"}, within: pushTimeout + 2*time.Second,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, f := stack.Test(t, stack.FunctionConfig{Env: test.env})
			proxy := newFaultProxy(t, s.Registry.Addr)
			repository := "faults/" + strings.NewReplacer(" ", "-", "_", "-", ",", "").Replace(name)
			config := &builder.BuildConfig{Image: proxy.addr + "/" + repository + ":v"}
			old := mustSend(t, f, layered(t, config, 2<<20), jsonForm)
			old.WantSuccess(t)

			proxy.set(test.fault)
			next := layered(t, config, 2<<20)
			a := mustSend(t, f, next, jsonForm)
			n, since := proxy.broken()
			took := time.Since(since)
			t.Logf("%s %s, %d requests broken, %v from the first to the verdict: %s", a.Status, a.Code, n, took, a.Error)
			if n == 0 {
				t.Error("the fault was never met")
			}
			if test.within > 0 && took > patience(test.within) {
				t.Errorf("the verdict took %v, want %v at most", took, patience(test.within))
			}
			if test.code == "" {
				a.WantSuccess(t)
				if d := digest(t, s.Registry.Image(repository+":v")); d != a.Digest {
					t.Errorf("the tag is %s, the answer %s", d, a.Digest)
				}
			} else {
				a.WantFailed(t, test.code, test.texts...)
				if d := digest(t, s.Registry.Image(repository+":v")); d != old.Digest {
					t.Errorf("the tag is %s after a failed push, and was %s", d, old.Digest)
				}
			}
			wantWhole(t, s.Registry.Image(repository))

			// Nothing of the fault stays: neither a slot nor a connection.
			waitIdle(t, f)
			proxy.set(nil)
			again := mustSend(t, f, next, jsonForm)
			again.WantSuccess(t)
			if d := digest(t, s.Registry.Image(repository+":v")); d != again.Digest || d == old.Digest {
				t.Errorf("the tag is %s after the fault, want %s", d, again.Digest)
			}
			if tags := wantWhole(t, s.Registry.Image(repository)); len(tags) != 1 {
				t.Errorf("the repository has the tags %q, want v alone", tags)
			}
		})
	}
}

// tokenService is a token server of these tests, and the fault that makes the
// registry behind a proxy want its tokens.
type tokenService struct {
	server *httptest.Server
	life   time.Duration

	mu      sync.Mutex
	issued  map[string]time.Time // until when each is valid
	fetched int
	refused int // requests that came with a token that was no longer valid
}

func newTokenService(t *testing.T, life time.Duration) *tokenService {
	s := &tokenService{life: life, issued: make(map[string]time.Time)}
	s.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "user" || password != "password" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		token := rand.Text()
		s.issued[token] = time.Now().Add(s.life)
		s.fetched++
		json.NewEncoder(w).Encode(map[string]any{
			"token": token, "expires_in": int(max(s.life.Seconds(), 1)), "issued_at": time.Now().Format(time.RFC3339Nano),
		})
	}))
	t.Cleanup(s.server.Close)
	return s
}

func (s *tokenService) host() string { return s.server.Listener.Addr().String() }

// revoke ends the life of all tokens issued so far.
func (s *tokenService) revoke() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.issued)
}

func (s *tokenService) valid(token string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Now().Before(s.issued[token]) {
		return true
	}
	s.refused++
	return false
}

// counts are how many tokens were fetched, and how many requests came with one
// that was no longer valid.
func (s *tokenService) counts() (fetched, refused int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fetched, s.refused
}

// refuses says whether a request has no valid token; ask is the answer then.
func (s *tokenService) refuses(r *http.Request) bool {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	return !ok || !s.valid(token)
}

func (s *tokenService) ask(w http.ResponseWriter, r *http.Request, _ http.Handler) {
	repository, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/blobs/")
	repository, _, _ = strings.Cut(repository, "/manifests/")
	value := fmt.Sprintf(`Bearer realm="%s/token",service="registry",scope="repository:%s:pull,push"`, s.server.URL, repository)
	if r.Header.Get("Authorization") != "" {
		value += `,error="invalid_token"`
	}
	refuse(http.StatusUnauthorized, "UNAUTHORIZED", nil, "WWW-Authenticate", value).breaks(w, r, nil)
}

func dockerConfig(t *testing.T, config map[string]any) map[string][]byte {
	t.Helper()
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{"registry-config": text}
}

func login(user, password string) map[string]string {
	return map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte(user + ":" + password))}
}

// TestTokenExpires makes tokens end in the middle of a push, by their own time
// and before it.
func TestTokenExpires(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	for _, early := range []bool{false, true} {
		t.Run(fmt.Sprintf("early %v", early), func(t *testing.T) {
			t.Parallel()
			life := 3 * time.Second
			if early {
				life = time.Hour
			}
			tokens := newTokenService(t, life)
			proxy := newFaultProxy(t, s.Registry.Addr)
			_, f := stack.Test(t, stack.FunctionConfig{
				Env:     map[string]string{"token_hosts": proxy.addr + "=" + tokens.host()},
				Secrets: dockerConfig(t, map[string]any{"auths": map[string]any{proxy.addr: login("user", "password")}}),
			})
			var slow sync.Once
			proxy.set(&fault{anything, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if tokens.refuses(r) {
					tokens.ask(w, r, nil)
					return
				}
				if blobBody(r) {
					slow.Do(func() {
						time.Sleep(4 * time.Second)
						tokens.revoke()
					})
				}
				next.ServeHTTP(w, r)
			}})
			repository := fmt.Sprintf("token-expires-%v", early)
			a := mustSend(t, f, layered(t, &builder.BuildConfig{Image: proxy.addr + "/" + repository + ":v"}, 2<<20), jsonForm)
			fetched, refused := tokens.counts()
			t.Logf("%d tokens fetched, %d requests with an old one, %v", fetched, refused, a.Took)
			a.WantSuccess(t)
			if fetched < 2 {
				t.Errorf("%d tokens were fetched: none expired in mid-push", fetched)
			}
			if d := digest(t, s.Registry.Image(repository+":v")); d != a.Digest {
				t.Errorf("the tag is %s, the answer %s", d, a.Digest)
			}
			wantWhole(t, s.Registry.Image(repository))
		})
	}
	t.Run("never valid", func(t *testing.T) {
		t.Parallel()
		tokens := newTokenService(t, time.Hour)
		proxy := newFaultProxy(t, s.Registry.Addr)
		_, f := stack.Test(t, stack.FunctionConfig{
			Env:     map[string]string{"token_hosts": proxy.addr + "=" + tokens.host()},
			Secrets: dockerConfig(t, map[string]any{"auths": map[string]any{proxy.addr: login("user", "password")}}),
		})
		proxy.set(&fault{anything, tokens.ask})
		a := mustSend(t, f, layered(t, &builder.BuildConfig{Image: proxy.addr + "/never-valid:v"}, 1<<20), jsonForm)
		a.WantFailed(t, "registry_denied")
		if tags := wantWhole(t, s.Registry.Image("never-valid")); len(tags) != 0 {
			t.Errorf("the repository has the tags %q", tags)
		}
	})
}

// canary listens and counts who comes.
type canary struct {
	addr string
	n    atomic.Int64
}

func newCanary(t *testing.T) *canary {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	c := &canary{addr: l.Addr().String()}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			c.n.Add(1)
			conn.Close()
		}
	}()
	return c
}

// TestRealmOnPrivateAddress has a registry name a token service that only the
// function can reach. It must not be asked, neither for a push nor for a pull,
// and by nobody.
func TestRealmOnPrivateAddress(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	for _, scheme := range []string{"http", "https"} {
		for _, pull := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/pull %v", scheme, pull), func(t *testing.T) {
				t.Parallel()
				c := newCanary(t)
				proxy := newFaultProxy(t, s.Registry.Addr)
				proxy.set(refuse(401, "UNAUTHORIZED", anything,
					"WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s://%s/token",service="registry",scope="repository:realm:pull,push"`, scheme, c.addr)))
				var body []byte
				if pull {
					body = request(t, local(), "FROM "+proxy.addr+"/realm:v", "RUN : "+mark())
				} else {
					body = layered(t, &builder.BuildConfig{Image: proxy.addr + "/realm:v"}, 1<<10)
				}
				secrets := dockerConfig(t, map[string]any{"auths": map[string]any{proxy.addr: login("user", "canary-password")}})
				// Listed for other registries, it is not for this one.
				others := fmt.Sprintf("%s,registry.example.com=%[1]s,127.0.0.1=%[1]s,%s", c.addr, proxy.addr)
				_, f := stack.Test(t, stack.FunctionConfig{Secrets: secrets, Env: map[string]string{"token_hosts": others}})
				a := mustSend(t, f, body, jsonForm)
				a.WantFailed(t, "registry_denied", "token_hosts", proxy.addr+"="+c.addr)
				if n, _ := proxy.broken(); n == 0 {
					t.Error("the registry was never asked")
				}
				if n := c.n.Load(); n != 0 {
					t.Errorf("the token service on %s was asked %d times", c.addr, n)
				}

				// It is the address that was refused, and the canary does sing.
				_, f = stack.Test(t, stack.FunctionConfig{Secrets: secrets, Env: map[string]string{"token_hosts": proxy.addr + "=" + c.addr}})
				mustSend(t, f, body, jsonForm).WantFailed(t, "registry_failed")
				if c.n.Load() == 0 {
					t.Error("the token service was not asked with token_hosts either: the test looks at the wrong thing")
				}
			})
		}
	}
}

// TestRealmRedirects has a token service that may be asked send the function on
// to one that may not.
func TestRealmRedirects(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	c := newCanary(t)
	service := httptest.NewServer(http.RedirectHandler("http://"+c.addr+"/token", http.StatusTemporaryRedirect))
	t.Cleanup(service.Close)
	proxy := newFaultProxy(t, s.Registry.Addr)
	proxy.set(refuse(401, "UNAUTHORIZED", anything,
		"WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="registry"`, service.URL)))
	_, f := stack.Test(t, stack.FunctionConfig{Env: map[string]string{"token_hosts": proxy.addr + "=" + service.Listener.Addr().String()}})
	a := mustSend(t, f, layered(t, &builder.BuildConfig{Image: proxy.addr + "/redirect:v"}, 1<<10), jsonForm)
	a.WantFailed(t, "registry_denied", "307")
	if n := c.n.Load(); n != 0 {
		t.Errorf("the redirect was followed %d times", n)
	}
}

// htpasswd configures a registry that knows one user.
func htpasswd(t *testing.T, user, password string) map[string]string {
	t.Helper()
	line, err := stack.Htpasswd(user, password)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "htpasswd")
	if err := os.WriteFile(path, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	return map[string]string{"REGISTRY_AUTH": "htpasswd", "REGISTRY_AUTH_HTPASSWD_REALM": "test", "REGISTRY_AUTH_HTPASSWD_PATH": path}
}

// TestCredentials pushes to a registry that wants a password.
func TestCredentials(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	const password = "Basic-password-4711"
	closed, err := s.NewRegistry(testContext(t), htpasswd(t, "user", password))
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		config map[string]any // of registry-config; nil is none
		env    map[string]string
		code   string
		texts  []string
	}{
		"right": {config: map[string]any{"auths": map[string]any{closed.Addr: login("user", password)}}},
		"wrong": {config: map[string]any{"auths": map[string]any{closed.Addr: login("user", "wrong-"+password)}}, code: "registry_denied"},
		"none":  {code: "registry_denied", texts: []string{"no credentials are configured for " + closed.Addr}},
		"of another registry": {
			config: map[string]any{"auths": map[string]any{"registry.example.com": login("user", password)}},
			code:   "registry_denied", texts: []string{"no credentials are configured for " + closed.Addr},
		},
		// What faas-cli registry-login --ecr writes, beside another registry.
		"credsStore of a cloud": {config: map[string]any{
			"credsStore": "ecr-login",
			"auths":      map[string]any{closed.Addr: login("user", password)},
		}},
		"credsStore is missing": {config: map[string]any{
			"credsStore": "pass",
			"auths":      map[string]any{closed.Addr: login("user", password)},
		}},
		"another's helper is missing": {config: map[string]any{
			"credHelpers": map[string]string{"registry.example.com": "pass"},
			"auths":       map[string]any{closed.Addr: login("user", password)},
		}},
		"its own helper is missing": {
			config: map[string]any{
				"credHelpers": map[string]string{closed.Addr: "pass"},
				"auths":       map[string]any{closed.Addr: login("user", password)},
			},
			code: "registry_failed", texts: []string{"credentials cannot be read"},
		},
		"its own helper is another cloud's": {
			config: map[string]any{"credHelpers": map[string]string{closed.Addr: "ecr-login"}},
			code:   "registry_failed", texts: []string{`credential helper "ecr-login" failed`, closed.Addr},
		},
		"allow_basic=false": {
			config: map[string]any{"auths": map[string]any{closed.Addr: login("user", password)}},
			env:    map[string]string{"allow_basic": "false"},
			code:   "registry_denied", texts: []string{"allow_basic"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var secrets map[string][]byte
			if test.config != nil {
				secrets = dockerConfig(t, test.config)
			}
			_, f := stack.Test(t, stack.FunctionConfig{Secrets: secrets, Env: test.env})
			repository := "credentials/" + strings.NewReplacer(" ", "-", "'", "", "_", "-", "=", "-").Replace(strings.ToLower(name))
			body := layered(t, &builder.BuildConfig{Image: closed.Image(repository + ":v")}, 100<<10)
			a := mustSend(t, f, body, jsonForm)
			if test.code == "" {
				a.WantSuccess(t)
				if d := digest(t, closed.Image(repository+":v"), basic("user", password)); d != a.Digest {
					t.Errorf("the tag is %q, the answer %q", d, a.Digest)
				}
				wantWhole(t, closed.Image(repository), basic("user", password))
			} else {
				a.WantFailed(t, test.code, test.texts...)
				if tags := wantWhole(t, closed.Image(repository), basic("user", password)); len(tags) != 0 {
					t.Errorf("the repository has the tags %q", tags)
				}
			}
			log, err := f.Log()
			if err != nil {
				t.Fatal(err)
			}
			for _, secret := range []string{password, base64.StdEncoding.EncodeToString([]byte("user:" + password))} {
				if strings.Contains(log, secret) || strings.Contains(a.String(), secret) {
					t.Error("the password is in the log or the answer")
				}
			}
		})
	}
}

// TestCredentialsReplaced changes registry-config under a running function.
func TestCredentialsReplaced(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	closed, err := s.NewRegistry(testContext(t), htpasswd(t, "user", "password"))
	if err != nil {
		t.Fatal(err)
	}
	config := func(password string) []byte {
		return dockerConfig(t, map[string]any{"auths": map[string]any{closed.Addr: login("user", password)}})["registry-config"]
	}
	_, f := stack.Test(t, stack.FunctionConfig{Secrets: map[string][]byte{"registry-config": config("wrong")}})
	body := layered(t, &builder.BuildConfig{Image: closed.Image("replaced:v")}, 100<<10)
	for range 2 {
		mustSend(t, f, body, jsonForm).WantFailed(t, "registry_denied")
		replace(t, f, "registry-config", config("password"))
		mustSend(t, f, body, jsonForm).WantSuccess(t)
		replace(t, f, "registry-config", config("wrong again"))
	}
	mustSend(t, f, body, jsonForm).WantFailed(t, "registry_denied")
	wantWhole(t, closed.Image("replaced"), basic("user", "password"))
}

// replace writes a secret as a kubelet does: the file at once.
func replace(t *testing.T, f *stack.Function, name string, text []byte) {
	t.Helper()
	path := filepath.Join(f.SecretsDir, name)
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// TestCredentialsByPath pushes to a registry with one user for each organisation,
// for which distribution has no rules: a proxy of this test keeps the users apart.
func TestCredentialsByPath(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	proxy := newFaultProxy(t, s.Registry.Addr)
	proxy.set(&fault{
		func(r *http.Request) bool {
			user, password, _ := r.BasicAuth()
			return password != "password" || !strings.HasPrefix(r.URL.Path, "/v2/"+user+"/")
		},
		func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			if _, _, ok := r.BasicAuth(); ok {
				refuse(403, "DENIED", anything).breaks(w, r, next)
				return
			}
			refuse(401, "UNAUTHORIZED", anything, "WWW-Authenticate", `Basic realm="test"`).breaks(w, r, next)
		},
	})
	auths := make(map[string]any)
	for _, user := range []string{"org-a", "org-b", "org-c", "org"} {
		auths[proxy.addr+"/"+user] = login(user, "password")
	}
	text := append([]byte("\xef\xbb\xbf"), dockerConfig(t, map[string]any{"auths": auths})["registry-config"]...)
	_, f := stack.Test(t, stack.FunctionConfig{Secrets: map[string][]byte{"registry-config": text}})
	for i := range 6 {
		repository := []string{"org-b/app", "org-c/deep/app"}[i%2]
		a := mustSend(t, f, layered(t, &builder.BuildConfig{Image: proxy.addr + "/" + repository + ":v"}, 1<<10), jsonForm)
		a.WantSuccess(t)
		if d := digest(t, s.Registry.Image(repository+":v")); d != a.Digest {
			t.Errorf("the tag is %s, the answer %s", d, a.Digest)
		}
	}
	mustSend(t, f, layered(t, &builder.BuildConfig{Image: proxy.addr + "/org-d/app:v"}, 1<<10), jsonForm).
		WantFailed(t, "registry_denied", "no credentials are configured")
}

// TestTokenPath pushes to a registry whose token service names repositories with
// a prefix, and grants no more than it is asked for, as distribution's own scopes
// never differ from its paths.
func TestTokenPath(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	var asked atomic.Value
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			// A redirect of the path, which has to be followed.
			http.Redirect(w, r, "/moved?"+r.URL.RawQuery, http.StatusMovedPermanently)
			return
		}
		if user, password, _ := r.BasicAuth(); user != "user" || password != "password" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		scopes := strings.Join(r.URL.Query()["scope"], " ")
		asked.Store(scopes)
		json.NewEncoder(w).Encode(map[string]any{"token": base64.RawURLEncoding.EncodeToString([]byte(scopes)), "expires_in": 300})
	}))
	t.Cleanup(service.Close)
	proxy := newFaultProxy(t, s.Registry.Addr)
	scope := func(r *http.Request) string {
		repository, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/blobs/")
		repository, _, _ = strings.Cut(repository, "/manifests/")
		return "repository:upstream/" + repository + ":pull,push"
	}
	proxy.set(&fault{
		func(r *http.Request) bool {
			token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
			granted, _ := base64.RawURLEncoding.DecodeString(token)
			return !strings.Contains(" "+string(granted)+" ", " "+scope(r)+" ")
		},
		func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
			value := fmt.Sprintf(`Bearer realm="%s/token",service="registry",scope="%s"`, service.URL, scope(r))
			if r.Header.Get("Authorization") != "" {
				value += `,error="insufficient_scope"`
			}
			refuse(http.StatusUnauthorized, "UNAUTHORIZED", nil, "WWW-Authenticate", value).breaks(w, r, nil)
		},
	})
	secrets := dockerConfig(t, map[string]any{"auths": map[string]any{proxy.addr: login("user", "password")}})
	hosts := proxy.addr + "=" + service.Listener.Addr().String()
	body := layered(t, &builder.BuildConfig{Image: proxy.addr + "/team/paths:v"}, 1<<10)

	_, f := stack.Test(t, stack.FunctionConfig{Secrets: secrets, Env: map[string]string{"token_hosts": hosts}})
	mustSend(t, f, body, jsonForm).WantFailed(t, "registry_denied", `"upstream/team/paths"`, `"team/paths"`, fmt.Sprintf("token_paths needs %q", proxy.addr+"=upstream"))
	if got, _ := asked.Load().(string); strings.Contains(got, "upstream/team/paths:pull,push") {
		t.Errorf("it asked for a right that no setting gives: %s", got)
	}

	_, f = stack.Test(t, stack.FunctionConfig{Secrets: secrets, Env: map[string]string{"token_hosts": hosts, "token_paths": proxy.addr + "=upstream"}})
	a := mustSend(t, f, body, jsonForm)
	a.WantSuccess(t)
	if d := digest(t, s.Registry.Image("team/paths:v")); d != a.Digest {
		t.Errorf("the tag is %s, the answer %s", d, a.Digest)
	}
}
