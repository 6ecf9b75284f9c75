package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"

	"handler/function/api"
)

const manifest = `{"schemaVersion":2}`

var manifestDigest = digest.FromString(manifest)

// fakeRegistry serves the manifest of app:1 to whom its fields let in.
type fakeRegistry struct {
	*tokenServer
	user    string                                            // who may pull, with the password pw; empty is everybody
	basic   bool                                              // asks for Basic in place of Bearer
	untold  bool                                              // does not tell digests
	noHEAD  bool                                              // answers HEAD with 405
	instead func(w http.ResponseWriter, r *http.Request) bool // may answer for it

	mu  sync.Mutex
	log []string // requests
}

func newFakeRegistry(t *testing.T, tls bool, f *fakeRegistry) *fakeRegistry {
	f.tokenServer = newTokenServer(t, tls, f.serve)
	return f
}

func (f *fakeRegistry) serve(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.log = append(f.log, r.Method+" "+r.URL.Path)
	f.mu.Unlock()
	if f.instead != nil && f.instead(w, r) {
		return
	}
	user, password, _ := r.BasicAuth()
	if r.URL.Path == "/token" {
		if r.URL.Query().Get("scope") != "repository:app:pull" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		if password != "pw" {
			user = "nobody"
		}
		json.NewEncoder(w).Encode(map[string]string{"token": user})
		return
	}
	challenge := fmt.Sprintf(`Bearer realm="%s/token",service="svc",scope="repository:app:pull"`, f.URL)
	who := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	if f.basic {
		challenge, who = `Basic realm="r"`, user
		if password != "pw" {
			who = ""
		}
	}
	switch {
	case f.user != "" && who == "", f.user != "" && f.basic && who != f.user:
		w.Header().Set("WWW-Authenticate", challenge)
		w.WriteHeader(http.StatusUnauthorized)
	case f.user != "" && who != f.user:
		w.WriteHeader(http.StatusForbidden)
	case r.URL.Path != "/v2/app/manifests/1" && r.URL.Path != "/v2/app/manifests/"+manifestDigest.String():
		w.WriteHeader(http.StatusNotFound)
	case f.noHEAD && r.Method == http.MethodHead:
		w.WriteHeader(http.StatusMethodNotAllowed)
	default:
		if !f.untold {
			w.Header().Set("Docker-Content-Digest", manifestDigest.String())
		}
		w.Write([]byte(manifest))
	}
}

// ask asks f for an image, with the given password of the user u.
func (f *fakeRegistry) ask(t *testing.T, image, password string, change func(*Config)) (digest.Digest, error) {
	t.Helper()
	cfg := Config{TokenHosts: tokenHosts(t, f.host())}
	if change != nil {
		change(&cfg)
	}
	config := `{}`
	if password != "" {
		config = `{"auths":{"` + f.host() + `":` + basicAuth("u", password) + `}}`
	}
	c, err := New(cfg).Of([]byte(config))
	if err != nil {
		t.Fatal(err)
	}
	ref, err := reference.ParseNormalizedNamed(f.host() + "/" + image)
	if err != nil {
		t.Fatal(err)
	}
	return c.Grant(nil).Ask(t.Context(), ref, true, nil)
}

// wantAsked wants the manifest's digest, or an error of a code with a text in it.
func wantAsked(t *testing.T, d digest.Digest, err error, code api.Code, text string) {
	t.Helper()
	if code == "" {
		if err != nil || d != manifestDigest {
			t.Errorf("%s, %v", d, err)
		}
		return
	}
	e, ok := errors.AsType[*api.Error](err)
	if !ok || e.Code != code || !strings.Contains(e.Msg, text) {
		t.Errorf("%s, %v, want %s: %s", d, err, code, text)
	}
	if ok && strings.Contains(err.Error(), "pw") {
		t.Errorf("the password is in %v", err)
	}
}

// TestTagged: the registry is asked for the tag once, and has to show nothing.
func TestTagged(t *testing.T) {
	f := newFakeRegistry(t, false, &fakeRegistry{user: "u"})
	c, err := New(Config{TokenHosts: tokenHosts(t, f.host())}).Of([]byte(`{"auths":{"` + f.host() + `":` + basicAuth("u", "pw") + `}}`))
	if err != nil {
		t.Fatal(err)
	}
	for image, code := range map[string]api.Code{"app:1": "", "app:2": api.RegistryDenied} {
		ref, err := reference.ParseNormalizedNamed(f.host() + "/" + image)
		if err != nil {
			t.Fatal(err)
		}
		d, err := c.Grant(nil).Tagged(t.Context(), ref.(reference.NamedTagged))
		wantAsked(t, d, err, code, "404")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, request := range f.log {
		if strings.HasPrefix(request, "GET /v2/") {
			t.Errorf("it was asked %q", request)
		}
	}
}

func TestAsk(t *testing.T) {
	other := "sha256:" + strings.Repeat("0", 64)
	status := func(code int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(code); return true }
	}
	for _, tt := range []struct {
		name     string
		registry *fakeRegistry
		image    string // app:1 if empty
		password string
		code     api.Code
		text     string
		requests int32 // zero is any number
	}{
		{name: "open", requests: 2},
		{name: "open, by digest", image: "app@" + manifestDigest.String()},
		{name: "open, by digest beside a tag", image: "app:none@" + manifestDigest.String()},
		{name: "no tag", image: "app:2", code: api.RegistryDenied, text: `has no image`, requests: 1},
		{name: "no digest", image: "app@" + other, code: api.RegistryDenied, text: "(404)"},
		{name: "token", registry: &fakeRegistry{user: "u"}, password: "pw", requests: 4},
		{name: "token, by digest", registry: &fakeRegistry{user: "u"}, password: "pw", image: "app@" + manifestDigest.String()},
		{name: "token, not his", registry: &fakeRegistry{user: "v"}, password: "pw", code: api.RegistryDenied, text: "(403)", requests: 3},
		{name: "token, nobody", registry: &fakeRegistry{user: "u"}, code: api.RegistryDenied, text: "(403)"},
		{name: "basic", registry: &fakeRegistry{user: "u", basic: true}, password: "pw", requests: 3},
		{name: "basic, wrong", registry: &fakeRegistry{user: "u", basic: true}, password: "x", code: api.RegistryDenied, text: "refused \"", requests: 2},
		{name: "basic, nobody", registry: &fakeRegistry{user: "u", basic: true}, code: api.RegistryDenied, text: "none are configured", requests: 1},
		{name: "untold", registry: &fakeRegistry{untold: true}, requests: 3},
		{name: "no HEAD", registry: &fakeRegistry{noHEAD: true, user: "u"}, password: "pw"},
		{name: "500", registry: &fakeRegistry{instead: status(500)}, code: api.RegistryFailed, text: "status 500", requests: tokenAttempts},
		{name: "429", registry: &fakeRegistry{instead: status(429)}, code: api.RegistryFailed, text: "status 429", requests: tokenAttempts},
		{name: "400", registry: &fakeRegistry{instead: status(400)}, code: api.RegistryDenied, text: "status 400", requests: 1},
		{name: "no digest at all", registry: &fakeRegistry{instead: func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Docker-Content-Digest", "latest")
			return true
		}}, code: api.RegistryFailed, text: "no answer", requests: 1},
		{name: "another digest", image: "app@" + manifestDigest.String(), registry: &fakeRegistry{instead: func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Docker-Content-Digest", other)
			return true
		}}, code: api.RegistryFailed, text: "no answer", requests: 1},
		{name: "no answer to GET", registry: &fakeRegistry{instead: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet {
				w.Write(make([]byte, maxManifest+1))
			}
			return true
		}}, code: api.RegistryFailed, text: "no answer", requests: 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFakeRegistry(t, false, cmp.Or(tt.registry, new(fakeRegistry)))
			if tt.image == "" {
				tt.image = "app:1"
			}
			d, err := f.ask(t, tt.image, tt.password, nil)
			wantAsked(t, d, err, tt.code, tt.text)
			if n := f.requests.Load(); tt.requests != 0 && n != tt.requests {
				t.Errorf("%d requests, want %d: %q", n, tt.requests, f.log)
			}
		})
	}
}

// TestAskTypes wants the media types that buildkitd asks for.
func TestAskTypes(t *testing.T) {
	f := newFakeRegistry(t, false, &fakeRegistry{instead: func(_ http.ResponseWriter, r *http.Request) bool {
		if got := strings.Join(r.Header["Accept"], " "); !strings.Contains(got, "manifest.list.v2") || !strings.Contains(got, "image.index.v1") {
			t.Errorf("accepts %s", got)
		}
		return false
	}})
	d, err := f.ask(t, "app:1", "", nil)
	wantAsked(t, d, err, "", "")
}

// TestAskTLS asks a registry whose CA is configured, at the place where a mirror says it is.
func TestAskTLS(t *testing.T) {
	f := newFakeRegistry(t, true, &fakeRegistry{})
	ref, err := reference.ParseNormalizedNamed("registry.internal/app:1")
	if err != nil {
		t.Fatal(err)
	}
	ca := writeFile(t, filepath.Join(t.TempDir(), "ca.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw})))
	mirror, err := ParseMirror("registry.internal=" + f.host())
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		cfg  Config
		code api.Code
		text string
	}{
		{"the registry's CA", Config{Mirrors: []Mirror{mirror}, CAFiles: map[string]string{"registry.internal": ca}}, "", ""},
		{"the mirror's CA", Config{Mirrors: []Mirror{mirror}, CAFiles: map[string]string{f.host(): ca}}, "", ""},
		{"no CA", Config{Mirrors: []Mirror{mirror}}, api.RegistryFailed, "registry_ca"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, err := New(tt.cfg).Grant(nil).Ask(t.Context(), ref, true, nil)
			wantAsked(t, d, err, tt.code, tt.text)
		})
	}
}

// TestAskAddress asks a registry with a private address, which only an operator may name.
func TestAskAddress(t *testing.T) {
	f := newFakeRegistry(t, false, &fakeRegistry{})
	ref, err := reference.ParseNormalizedNamed(f.host() + "/app:1")
	if err != nil {
		t.Fatal(err)
	}
	g := New(Config{}).Grant(nil)
	d, err := g.Ask(t.Context(), ref, true, nil)
	wantAsked(t, d, err, "", "")
	d, err = g.Ask(t.Context(), ref, false, nil)
	wantAsked(t, d, err, api.RegistryDenied, "not a public address")
	if n := f.requests.Load(); n != 2 {
		t.Errorf("%d requests", n)
	}
}

// TestAskBase wants http at loopback addresses, and where a mirror says so, and nowhere else.
func TestAskBase(t *testing.T) {
	var mirrors []Mirror
	for _, text := range []string{"plain.example=http://10.0.0.1:5000", "tls.example=10.0.0.1:5000", "docker.io=https://hub.internal"} {
		m, err := ParseMirror(text)
		if err != nil {
			t.Fatal(err)
		}
		mirrors = append(mirrors, m)
	}
	c := New(Config{Mirrors: mirrors})
	for host, want := range map[string]string{
		"ghcr.io":             "https://ghcr.io",
		"GHCR.io:443":         "https://ghcr.io",
		"ghcr.io:80":          "https://ghcr.io:80",
		"localhost:5000":      "http://localhost:5000",
		"127.0.0.1:5000":      "http://127.0.0.1:5000",
		"[::1]:5000":          "http://[::1]:5000",
		"10.0.0.1:5000":       "https://10.0.0.1:5000",
		"localhost.evil.com":  "https://localhost.evil.com",
		"plain.example":       "http://10.0.0.1:5000",
		"plain.example:443":   "http://10.0.0.1:5000",
		"tls.example":         "https://10.0.0.1:5000",
		"index.docker.io":     "https://hub.internal",
		"plain.example.com":   "https://plain.example.com",
		"other.plain.example": "https://other.plain.example",
	} {
		if got := c.base(host).String(); got != want {
			t.Errorf("%s is asked at %s, want %s", host, got, want)
		}
	}
	for _, text := range []string{"", "host", "=where", "host=", "host=ftp://x", "host=http://x/path", "a b=c", "host=user@x"} {
		if m, err := ParseMirror(text); err == nil {
			t.Errorf("%q is the mirror %v", text, m)
		}
	}
}

// TestAskRedirect follows redirects with credentials where these may go, and nowhere else.
func TestAskRedirect(t *testing.T) {
	away := newFakeRegistry(t, false, &fakeRegistry{})
	for _, tt := range []struct {
		name string
		to   string // f.URL if it begins with a slash
		code api.Code
		text string
	}{
		{"the same service", "/v2/app/manifests/" + manifestDigest.String(), "", ""},
		{"itself", "/v2/app/manifests/1", api.RegistryFailed, "no answer"},
		{"plain http elsewhere", away.URL, api.RegistryFailed, "no answer"},
		{"a private address", "https://" + strings.Replace(away.host(), "127.0.0.1", "localhost", 1), api.RegistryDenied, "not a public address"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFakeRegistry(t, false, &fakeRegistry{user: "u", basic: true})
			f.instead = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, "/1") || r.Header.Get("Authorization") == "" {
					return false
				}
				w.Header().Set("Location", tt.to)
				w.WriteHeader(http.StatusTemporaryRedirect)
				return true
			}
			d, err := f.ask(t, "app:1", "pw", nil)
			wantAsked(t, d, err, tt.code, tt.text)
		})
	}
	if n := away.requests.Load(); n != 0 {
		t.Errorf("%d requests went elsewhere", n)
	}
}

// TestMayAnswer: a challenge counts if the registry itself has made it. A test cannot have a public
// host to which a registry redirects, so the answer is made here.
func TestMayAnswer(t *testing.T) {
	q := &question{base: &url.URL{Scheme: "https", Host: "r.example"}}
	for _, tt := range []struct {
		status int
		from   string
		want   bool
	}{
		{http.StatusUnauthorized, "https://r.example/v2/app/manifests/1", true},
		{http.StatusUnauthorized, "https://r.example:443/elsewhere", true},
		{http.StatusForbidden, "https://r.example/v2/app/manifests/1", false},
		{http.StatusUnauthorized, "https://other.example/v2/app/manifests/1", false},
		{http.StatusUnauthorized, "https://r.example:444/v2/app/manifests/1", false},
		{http.StatusUnauthorized, "http://r.example/v2/app/manifests/1", false},
	} {
		from, err := url.Parse(tt.from)
		if err != nil {
			t.Fatal(err)
		}
		if got := q.mayAnswer(&http.Response{StatusCode: tt.status, Request: &http.Request{URL: from}}); got != tt.want {
			t.Errorf("%d from %s: %v", tt.status, tt.from, got)
		}
	}
}

// TestAskRealm wants the rules for token services to hold here too.
func TestAskRealm(t *testing.T) {
	f := newFakeRegistry(t, false, &fakeRegistry{user: "u"})
	d, err := f.ask(t, "app:1", "pw", func(c *Config) { c.TokenHosts = nil })
	wantAsked(t, d, err, api.RegistryDenied, "token_hosts")
	for _, line := range f.log {
		if strings.Contains(line, "/token") {
			t.Error("the token service was asked")
		}
	}
}

// TestAskEnds wants an answer when the caller's time ends.
func TestAskEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	f := newFakeRegistry(t, false, &fakeRegistry{instead: func(_ http.ResponseWriter, r *http.Request) bool {
		cancel()
		<-r.Context().Done()
		return true
	}})
	u, err := url.Parse(f.URL)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := reference.ParseNormalizedNamed(u.Host + "/app:1")
	if err != nil {
		t.Fatal(err)
	}
	d, err := New(Config{}).Grant(nil).Ask(ctx, ref, true, nil)
	wantAsked(t, d, err, api.RegistryFailed, "cannot be reached")
	if n := f.requests.Load(); n != 1 {
		t.Errorf("%d requests", n)
	}
}

func TestScheme(t *testing.T) {
	for _, tt := range []struct {
		name     string
		registry *fakeRegistry
		basic    bool
	}{
		{"open", &fakeRegistry{}, false},
		{"token", &fakeRegistry{user: "u"}, false},
		{"basic", &fakeRegistry{user: "u", basic: true}, true},
		{"both", &fakeRegistry{instead: func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Add("WWW-Authenticate", `Basic realm="r"`)
			w.Header().Add("WWW-Authenticate", `Bearer realm="https://t.example"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}}, false},
		{"in trouble", &fakeRegistry{instead: func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(502); return true }}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFakeRegistry(t, false, cmp.Or(tt.registry, new(fakeRegistry)))
			s := New(Config{}).Scheme(f.host())
			for range 3 {
				if got := s.MayBeBasic(t.Context()); got != tt.basic {
					t.Errorf("basic: %v", got)
				}
			}
			if n := f.requests.Load(); n != 1 {
				t.Errorf("%d requests", n)
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.log[0] != "GET /v2/" {
				t.Errorf("asked with %s", f.log[0])
			}
		})
	}
}

// TestSchemeCanceled wants nothing kept of a question that its caller has given up.
func TestSchemeCanceled(t *testing.T) {
	f := newFakeRegistry(t, false, &fakeRegistry{})
	s := New(Config{}).Scheme(f.host())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if !s.MayBeBasic(ctx) {
		t.Error("not known, and not Basic")
	}
	if s.MayBeBasic(t.Context()) {
		t.Error("what was not known is kept")
	}
}
