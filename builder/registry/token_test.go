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
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"handler/function/api"
)

// tokenServer is a fake token service that counts its requests.
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

// fetchFrom asks s for a token of registry.example.com, with the given config file.
func fetchFrom(t *testing.T, s *tokenServer, auths string) (Token, error) {
	t.Helper()
	return fetchWith(t, s, Config{File: configFile(t, auths)})
}

func fetchWith(t *testing.T, s *tokenServer, cfg Config) (Token, error) {
	t.Helper()
	cfg.TokenHosts = tokenHosts(t, "registry.example.com="+s.host())
	c := New(cfg)
	return c.Grant(refs(t, "registry.example.com/app")).Token(t.Context(), TokenRequest{
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
			http.Redirect(w, r, "http://elsewhere.example.com/token?x=topsecret", http.StatusTemporaryRedirect)
		}, api.RegistryDenied, `status 307 to "http://elsewhere.example.com/token"`, 1},
		{"redirect to itself", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		}, api.RegistryFailed, "no token", maxRedirects},
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
	c := New(Config{TokenHosts: tokenHosts(t, "h="+s.host())})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := c.Grant(nil).Token(ctx, TokenRequest{Host: "h", Realm: s.URL}); err == nil {
		t.Error("no error")
	}
	if d := time.Since(start); d > tokenTimeout-time.Second {
		t.Errorf("took %v", d)
	}
}

// TestTokenRedirects checks that redirects are followed if they stay on the host.
func TestTokenRedirects(t *testing.T) {
	want := func(t *testing.T, w http.ResponseWriter, r *http.Request) {
		user, password, _ := r.BasicAuth()
		if r.Method == "POST" {
			user, password = r.FormValue("username"), r.FormValue("password")
			if r.FormValue("grant_type") == "refresh_token" {
				user, password = "u", r.FormValue("refresh_token")
			}
		}
		if user != "u" || password != "p" || r.FormValue("scope") != "repository:app:pull,push" || r.FormValue("service") != "svc" {
			t.Errorf("%s %s as %q with %q", r.Method, r.URL, user, password)
		}
		fmt.Fprint(w, `{"token":"tok"}`)
	}
	basic := `{"auths":{"registry.example.com":` + basicAuth("u", "p") + `}}`
	identity := `{"auths":{"registry.example.com":{"identitytoken":"p"}}}`
	for _, status := range []int{301, 302, 307, 308} {
		for _, config := range []string{basic, identity} {
			// The path, on one server.
			s := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/token" {
					http.Redirect(w, r, "/there?"+r.URL.RawQuery, status)
					return
				}
				want(t, w, r)
			})
			if tok, err := fetchFrom(t, s, config); err != nil || tok.Value != "tok" {
				t.Errorf("%d to a path: %+v, %v", status, tok, err)
			}

			// From http to https.
			secure := newTokenServer(t, true, func(w http.ResponseWriter, r *http.Request) { want(t, w, r) })
			ca := writeFile(t, filepath.Join(t.TempDir(), "ca.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})))
			plain := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, secure.URL+r.URL.RequestURI(), status)
			})
			tok, err := fetchWith(t, plain, Config{File: configFile(t, config), CAFiles: map[string]string{"registry.example.com": ca}})
			if err != nil || tok.Value != "tok" {
				t.Errorf("%d to https: %+v, %v", status, tok, err)
			}
			// Whose certificate has to be good.
			if tok, err := fetchFrom(t, plain, config); err == nil || !strings.Contains(err.Error(), "certificate") {
				t.Errorf("%d to https without its CA: %+v, %v", status, tok, err)
			}
		}
	}

	// To another port, another name of the host, from https to http, with a user.
	canary := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{"token":"tok"}`) })
	_, port, _ := strings.Cut(canary.host(), ":")
	for name, to := range map[string]string{
		"port": canary.URL, "name": "http://localhost:" + port, "file": "file:///etc/passwd", "none": "",
	} {
		s := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", to)
			w.WriteHeader(http.StatusTemporaryRedirect)
		})
		if tok, err := fetchFrom(t, s, basic); err == nil || api.AsError(err).Code != api.RegistryDenied || !strings.Contains(err.Error(), "307") {
			t.Errorf("%s: %+v, %v", name, tok, err)
		}
	}
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, canary.URL, http.StatusTemporaryRedirect)
	}))
	defer s.Close()
	from, _ := url.Parse(s.URL)
	for to, want := range map[string]bool{
		s.URL + "/x": true, "http://" + from.Host: false, "http://127.0.0.1:" + port: false, "https://127.0.0.1:" + port: false, "https://u:p@" + from.Host: false,
	} {
		u, _ := url.Parse(to)
		if sameService(from, u) != want {
			t.Errorf("%s to %s: %v", from, to, !want)
		}
	}
	if n := canary.requests.Load(); n != 0 {
		t.Errorf("%d requests to where credentials may not go", n)
	}
}
