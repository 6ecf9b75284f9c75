package registry

import (
	"context"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"handler/function/api"
)

func TestGrant(t *testing.T) {
	b := New(Config{}).Build(refs(t, "ghcr.io/acme/app:1", "acme/hub", "registry:5000/a/b"))
	for _, tt := range []struct {
		name, host string
		scopes     []string
		want       string // "" is refused
	}{
		{"pull", "ghcr.io", []string{"repository:other/base:pull"}, "repository:other/base:pull"},
		{"push to own", "ghcr.io", []string{"repository:acme/app:pull,push"}, "repository:acme/app:pull,push"},
		{"order", "ghcr.io", []string{"repository:acme/app:push,pull,push"}, "repository:acme/app:pull,push"},
		{"push elsewhere", "ghcr.io", []string{"repository:acme/other:pull,push"}, "repository:acme/other:pull"},
		{"push only elsewhere", "ghcr.io", []string{"repository:acme/other:push"}, ""},
		{"same name, other registry", "quay.io", []string{"repository:acme/app:pull,push"}, "repository:acme/app:pull"},
		{"prefix of own", "ghcr.io", []string{"repository:acme/app2:push,pull"}, "repository:acme/app2:pull"},
		{"hub on the wire", "registry-1.docker.io", []string{"repository:acme/hub:pull,push"}, "repository:acme/hub:pull,push"},
		{"hub by its domain", "docker.io", []string{"repository:acme/hub:push"}, "repository:acme/hub:push"},
		{"upper case", "GHCR.io", []string{"repository:acme/app:push"}, "repository:acme/app:push"},
		{"with a port", "registry:5000", []string{"repository:a/b:push"}, "repository:a/b:push"},
		{"without the port", "registry", []string{"repository:a/b:push"}, ""},
		{"delete", "ghcr.io", []string{"repository:acme/app:delete,pull"}, "repository:acme/app:pull"},
		{"everything", "ghcr.io", []string{"repository:acme/app:*"}, ""},
		{"catalog", "ghcr.io", []string{"registry:catalog:*"}, ""},
		{"two in one", "ghcr.io", []string{"repository:x:pull repository:acme/app:pull,push"}, "repository:acme/app:pull,push repository:x:pull"},
		{"plugin", "ghcr.io", []string{"repository(plugin):acme/app:pull,push"}, "repository(plugin):acme/app:pull,push"},
		{"mount", "ghcr.io", []string{"repository:acme/app:pull,push", "repository:acme/from:pull,push"}, "repository:acme/app:pull,push repository:acme/from:pull"},
		{"nonsense", "ghcr.io", []string{"pull", ":", "repository:pull"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := b.grant(tt.host, tt.scopes)
			if strings.Join(got, " ") != tt.want {
				t.Errorf("granted %q, want %q", got, tt.want)
			}
			if (err != nil) != (tt.want == "") {
				t.Errorf("error %v", err)
			}
		})
	}
	if got, err := b.grant("ghcr.io", nil); len(got) != 0 || err != nil {
		t.Errorf("no scopes: %q, %v", got, err)
	}
}

func TestPublic(t *testing.T) {
	for addr, want := range map[string]bool{
		"1.1.1.1": true, "8.8.8.8": true, "172.32.0.1": true, "192.169.0.1": true, "100.128.0.1": true,
		"2606:4700:4700::1111": true, "64:ff9b::808:808": true, "2002:808:808::1": true,
		"127.0.0.1": false, "127.8.8.8": false, "0.0.0.0": false, "0.1.2.3": false,
		"10.1.2.3": false, "172.16.0.1": false, "172.31.255.255": false, "192.168.1.1": false,
		"169.254.169.254": false, "100.64.0.1": false, "100.127.255.255": false,
		"224.0.0.1": false, "239.1.1.1": false, "240.0.0.1": false, "255.255.255.255": false,
		"192.0.0.1": false, "198.18.0.1": false, "198.19.255.255": false,
		"::": false, "::1": false, "fe80::1": false, "fe80::1%eth0": false, "fc00::1": false, "fd00:ec2::254": false,
		"fec0::1": false, "ff02::1": false,
		"::ffff:127.0.0.1": false, "::ffff:10.0.0.1": false, "::ffff:8.8.8.8": true, "::127.0.0.1": false,
		"64:ff9b::7f00:1": false, "64:ff9b::a9fe:a9fe": false, "64:ff9b:1::1": false,
		"2002:7f00:1::1": false, "2002:a00:1::1": false,
	} {
		if got := public(netip.MustParseAddr(addr)); got != want {
			t.Errorf("public(%s) = %v", addr, got)
		}
	}
	if public(netip.Addr{}) {
		t.Error("no address is public")
	}
}

func TestRealm(t *testing.T) {
	for _, tt := range []struct {
		realm string
		hosts []string
		ok    bool
	}{
		{"https://auth.example.com/token", nil, true},
		{"https://8.8.8.8/token", nil, true},
		{"http://auth.example.com/token", nil, false},
		{"http://auth.example.com/token", []string{"auth.example.com"}, true},
		{"http://AUTH.example.com/token", []string{"auth.Example.com"}, true},
		{"http://auth.example.com:81/token", []string{"auth.example.com"}, true},
		{"http://auth.example.com:81/token", []string{"auth.example.com:81"}, true},
		{"http://auth.example.com:82/token", []string{"auth.example.com:81"}, false},
		{"https://127.0.0.1/token", nil, false},
		{"https://127.0.0.1:5001/token", []string{"127.0.0.1:5001"}, true},
		{"https://[::1]/token", nil, false},
		{"https://169.254.169.254/latest", nil, false},
		{"https://user:topsecret@auth.example.com/token", []string{"auth.example.com"}, false},
		{"file:///etc/passwd", []string{""}, false},
		{"ftp://auth.example.com/", []string{"auth.example.com"}, false},
		{"/token", nil, false},
		{"", nil, false},
		{"https://", nil, false},
		{"https://a b/", nil, false},
	} {
		_, _, err := New(Config{TokenHosts: tt.hosts}).checkRealm("registry.example.com", tt.realm)
		if (err == nil) != tt.ok {
			t.Errorf("%q with %q: %v", tt.realm, tt.hosts, err)
		}
		if err != nil && strings.Contains(err.Error(), "topsecret") {
			t.Errorf("the error holds a password: %v", err)
		}
		if err != nil && api.AsError(err).Code != api.RegistryDenied {
			t.Errorf("%q: code %s", tt.realm, api.AsError(err).Code)
		}
	}
}

// tokenServer is a fake token service, with the requests it had.
type tokenServer struct {
	*httptest.Server
	requests atomic.Int32
}

func newTokenServer(t *testing.T, tls bool, h http.HandlerFunc) *tokenServer {
	t.Helper()
	s := &tokenServer{}
	count := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.requests.Add(1)
		h(w, r)
	})
	s.Server = httptest.NewUnstartedServer(count)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	if tls {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	return s
}

func (s *tokenServer) host() string { u, _ := url.Parse(s.URL); return u.Host }

// fetchFrom asks s as a registry that sends there would have it asked.
func fetchFrom(t *testing.T, s *tokenServer, auths string) (Token, error) {
	t.Helper()
	return fetchWith(t, s, Config{File: configFile(t, auths)})
}

func fetchWith(t *testing.T, s *tokenServer, cfg Config) (Token, error) {
	t.Helper()
	cfg.TokenHosts = []string{s.host()}
	c := New(cfg)
	return c.Build(refs(t, "registry.example.com/app")).Token(t.Context(), TokenRequest{
		Host: "registry.example.com", Realm: s.URL + "/token?keep=1", Service: "svc",
		Scopes: []string{"repository:app:pull,push"},
	})
}

const noAuths = `{}`

func TestTokenGET(t *testing.T) {
	s := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
		user, password, ok := r.BasicAuth()
		if r.Method != "GET" || !ok || user != "u" || password != "p:w" {
			t.Errorf("%s as %q %q", r.Method, user, password)
		}
		if got := r.URL.Query().Encode(); got != "account=u&keep=1&scope=repository%3Aapp%3Apull%2Cpush&service=svc" {
			t.Errorf("query %s", got)
		}
		fmt.Fprint(w, `{"token":"tok","expires_in":300}`)
	})
	tok, err := fetchFrom(t, s, `{"auths":{"registry.example.com":`+basicAuth("u", "p:w")+`}}`)
	if err != nil || tok.Value != "tok" || tok.Expires.Sub(tok.IssuedAt) != 300*time.Second {
		t.Errorf("%+v, %v", tok, err)
	}
}

func TestTokenAnonymous(t *testing.T) {
	s := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" || r.URL.Query().Has("account") {
			t.Errorf("credentials in %v %v", r.URL, r.Header)
		}
		fmt.Fprint(w, `{"access_token":"tok"}`)
	})
	tok, err := fetchFrom(t, s, noAuths)
	if err != nil || tok.Value != "tok" || tok.Expires.Sub(tok.IssuedAt) != 60*time.Second {
		t.Errorf("%+v, %v", tok, err)
	}
}

func TestTokenPOST(t *testing.T) {
	for _, status := range []int{http.StatusMethodNotAllowed, http.StatusNotFound} {
		s := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
			if r.Method == "GET" {
				w.WriteHeader(status)
				return
			}
			r.ParseForm()
			want := url.Values{
				"grant_type": {"password"}, "username": {"u"}, "password": {"p"}, "service": {"svc"},
				"scope": {"repository:app:pull,push"}, "client_id": {clientID}, "access_type": {"online"},
			}
			if got := r.PostForm.Encode(); got != want.Encode() {
				t.Errorf("form %s", got)
			}
			fmt.Fprint(w, `{"access_token":"tok","expires_in":100}`)
		})
		tok, err := fetchFrom(t, s, `{"auths":{"registry.example.com":`+basicAuth("u", "p")+`}}`)
		if err != nil || tok.Value != "tok" {
			t.Errorf("GET is %d: %+v, %v", status, tok, err)
		}
	}
}

func TestTokenIdentity(t *testing.T) {
	s := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
		r.ParseForm()
		if r.Method != "POST" || r.PostForm.Get("grant_type") != "refresh_token" || r.PostForm.Get("refresh_token") != "identity" || r.PostForm.Has("password") {
			t.Errorf("%s %v", r.Method, r.PostForm)
		}
		fmt.Fprint(w, `{"access_token":"tok","expires_in":100}`)
	})
	tok, err := fetchFrom(t, s, `{"auths":{"registry.example.com":{"auth":"`+
		base64.StdEncoding.EncodeToString([]byte("u:p"))+`","identitytoken":"identity"}}}`)
	if err != nil || tok.Value != "tok" {
		t.Errorf("%+v, %v", tok, err)
	}
}

func TestTokenStatic(t *testing.T) {
	s := newTokenServer(t, false, func(http.ResponseWriter, *http.Request) {})
	cfg := Config{File: configFile(t, `{"auths":{"registry.example.com":{"registrytoken":"static"}}}`), AllowBasic: true}
	tok, err := fetchWith(t, s, cfg)
	if err != nil || tok.Value != "static" || s.requests.Load() != 0 {
		t.Errorf("%+v, %v, %d requests", tok, err, s.requests.Load())
	}
	cfg.AllowBasic = false
	tok, err = fetchWith(t, s, cfg)
	if e, ok := errors.AsType[*api.Error](err); !ok || e.Code != api.RegistryDenied || !strings.Contains(e.Msg, "allow_basic") || tok.Value != "" {
		t.Errorf("%+v, %v", tok, err)
	}
}

func TestTokenFailures(t *testing.T) {
	const secret = "topsecret"
	for _, tt := range []struct {
		name     string
		handler  http.HandlerFunc
		code     api.Code
		text     string
		requests int32
	}{
		{"401", status(401), api.RegistryDenied, "refused the credentials", 1},
		{"403", status(403), api.RegistryDenied, "refused the credentials", 1},
		{"400", status(400), api.RegistryDenied, "status 400", 1},
		{"500", status(500), api.RegistryFailed, "status 500", 3},
		{"429", status(429), api.RegistryFailed, "status 429", 3},
		{"redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		}, api.RegistryDenied, "status 307", 1},
		{"no token", text(`{"expires_in":5}`), api.RegistryFailed, "no token", 1},
		{"no JSON", text(secret + " <html>"), api.RegistryFailed, "no token", 1},
		{"too long", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, `{"token":"x"}`, strings.Repeat(" ", maxTokenResponse))
		}, api.RegistryFailed, "no token", 1},
		{"cut", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, `{"token":"`)
		}, api.RegistryFailed, "cannot be reached", 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newTokenServer(t, false, tt.handler)
			tok, err := fetchFrom(t, s, `{"auths":{"registry.example.com":`+basicAuth("u", secret)+`}}`)
			if err == nil || tok != (Token{}) {
				t.Fatalf("%+v, %v", tok, err)
			}
			e, ok := errors.AsType[*api.Error](err)
			if !ok || e.Code != tt.code || !strings.Contains(e.Msg, tt.text) || !strings.Contains(e.Msg, "registry.example.com") {
				t.Errorf("error %#v", err)
			}
			if strings.Contains(err.Error(), secret) {
				t.Errorf("the secret is in the error: %v", err)
			}
			if n := s.requests.Load(); n != tt.requests {
				t.Errorf("%d requests, want %d", n, tt.requests)
			}
		})
	}
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		fmt.Fprint(w, "topsecret")
	}
}

func text(s string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, s) }
}

func TestTokenRetried(t *testing.T) {
	var n atomic.Int32
	s := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
		if n.Add(1) == 1 {
			w.WriteHeader(503)
			return
		}
		fmt.Fprint(w, `{"token":"tok"}`)
	})
	if tok, err := fetchFrom(t, s, noAuths); err != nil || tok.Value != "tok" {
		t.Errorf("%+v, %v", tok, err)
	}
}

// A name that resolves to a private address is refused when it is dialled: what
// it resolved to before does not count.
func TestTokenPrivateAddress(t *testing.T) {
	s := newTokenServer(t, true, text(`{"token":"tok"}`))
	_, port, _ := strings.Cut(s.host(), ":")
	c := New(Config{})
	_, err := c.Build(nil).Token(t.Context(), TokenRequest{Host: "registry.example.com", Realm: "https://localhost:" + port + "/token"})
	if e := api.AsError(err); err == nil || e.Code != api.RegistryDenied || !strings.Contains(e.Msg, "not a public address") {
		t.Errorf("error %v", err)
	}
	if n := s.requests.Load(); n != 0 {
		t.Errorf("%d requests came", n)
	}
}

func TestTokenCA(t *testing.T) {
	s := newTokenServer(t, true, text(`{"token":"tok"}`))
	ca := writeFile(t, filepath.Join(t.TempDir(), "ca.pem"),
		string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	c := New(Config{TokenHosts: []string{s.host()}, CAFiles: map[string]string{"own.example.com": ca, "docker.io": ca, "broken.example.com": writeFile(t, ca+"x", "no PEM")}})
	for host, ok := range map[string]bool{
		"own.example.com": true, "registry-1.docker.io": true, "other.example.com": false, "broken.example.com": false,
	} {
		tok, err := c.Build(nil).Token(t.Context(), TokenRequest{Host: host, Realm: s.URL})
		if (err == nil) != ok {
			t.Errorf("%s: %+v, %v", host, tok, err)
		}
	}
}

func TestTokenNotKept(t *testing.T) {
	var n atomic.Int32
	s := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"token":"tok%d","expires_in":300}`, n.Add(1))
	})
	b := New(Config{TokenHosts: []string{s.host()}}).Build(nil)
	for _, want := range []string{"tok1", "tok2"} {
		tok, err := b.Token(t.Context(), TokenRequest{Host: "h", Realm: s.URL, Scopes: []string{"repository:a:pull"}})
		if err != nil || tok.Value != want {
			t.Errorf("got %q, %v, want %q: the registry may have refused the last one", tok.Value, err, want)
		}
	}
}

func TestReadToken(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for body, want := range map[string]time.Duration{
		`{"token":"t"}`:                                                           time.Minute,
		`{"token":"t","expires_in":10}`:                                           10 * time.Second,
		`{"token":"t","expires_in":0}`:                                            time.Minute,
		`{"token":"t","expires_in":-5}`:                                           time.Minute,
		`{"token":"t","expires_in":9000000000000}`:                                24 * time.Hour,
		`{"token":"t","expires_in":60,"issued_at":"2026-01-02T03:03:45Z"}`:        40 * time.Second,
		`{"token":"t","expires_in":60,"issued_at":"2026-01-02T03:14:05Z"}`:        time.Minute, // its clock is ahead
		`{"token":"t","expires_in":60,"issued_at":"2020-01-02T03:14:05Z"}`:        time.Minute, // or far behind
		`{"access_token":"t","expires_in":60,"refresh_token":"x","scope":"s"}`:    time.Minute,
		`{"token":"t","access_token":"other","expires_in":20,"unknown":["more"]}`: 20 * time.Second,
	} {
		tok, err := readToken([]byte(body), now)
		if err != nil || tok.Value != "t" || !tok.IssuedAt.Equal(now) || tok.Expires.Sub(now) != want {
			t.Errorf("%s: %+v, %v", body, tok, err)
		}
	}
}

func TestTokenCanceled(t *testing.T) {
	s := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	c := New(Config{TokenHosts: []string{s.host()}})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := c.Build(nil).Token(ctx, TokenRequest{Host: "h", Realm: s.URL}); err == nil {
		t.Error("no error")
	}
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("took %v", d)
	}
}
