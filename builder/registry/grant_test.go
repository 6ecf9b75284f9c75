package registry

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"handler/function/api"
)

func TestBasic(t *testing.T) {
	file := configFile(t, `{"auths":{"h":`+basicAuth("u", "p")+`,"token":{"auth":"`+
		base64.StdEncoding.EncodeToString([]byte("u:p"))+`","identitytoken":"idtoken"}}}`)
	user, password, err := New(Config{File: file, AllowBasic: true}).Grant(nil).Basic(t.Context(), "h")
	if user != "u" || password != "p" || err != nil {
		t.Errorf("allowed: %q %q %v", user, password, err)
	}
	user, password, err = New(Config{File: file}).Grant(nil).Basic(t.Context(), "h")
	if user != "" || password != "" || err == nil || !strings.Contains(err.Error(), "allow_basic") {
		t.Errorf("not allowed: %q %q %v", user, password, err)
	}
	user, password, err = New(Config{File: file}).Grant(nil).Basic(t.Context(), "nothing")
	if user != "" || password != "" || err != nil {
		t.Errorf("not allowed, and not configured: %q %q %v", user, password, err)
	}
	user, password, err = New(Config{File: file, AllowBasic: true}).Grant(nil).Basic(t.Context(), "token")
	if user != "" || password != "" || err != nil {
		t.Errorf("an identity token was handed out: %q %q %v", user, password, err)
	}
}

func TestAnonymous(t *testing.T) {
	g := New(Config{File: configFile(t, `{"auths":{"h":`+basicAuth("u", "p")+`}}`), AllowBasic: true}).Grant(nil)
	for _, host := range []string{"z", "h", "a"} {
		g.Basic(t.Context(), host)
	}
	if got := strings.Join(g.Anonymous(), " "); got != "a z" {
		t.Errorf("anonymous: %q", got)
	}

	// Credentials for one repository are none for another.
	g = New(Config{File: configFile(t, `{"auths":{"h/team":`+basicAuth("u", "p")+`}}`)}).Grant(nil)
	for _, repository := range []string{"public/base", "team/app"} {
		if _, err := g.auth(t.Context(), "h", repository); err != nil {
			t.Fatal(err)
		}
	}
	if got := g.Anonymous(); len(got) > 0 {
		t.Errorf("anonymous: %q", got)
	}
}

// TestCredentialsPushed checks that the first image decides whose credentials are used.
func TestCredentialsPushed(t *testing.T) {
	c := New(Config{File: auths(t, "r.example/org-a", "r.example/org-b", "r.example"), AllowBasic: true})
	for image, want := range map[string]string{"org-a/app": "r.example/org-a", "org-b/app": "r.example/org-b", "org-c/app": "r.example"} {
		g := c.Grant(refs(t, "r.example/"+image, "r.example/org-a/tag", "r.example/org-b/cache"))
		if name, _, err := g.Basic(t.Context(), "R.example:443"); err != nil || name != want {
			t.Errorf("%s: %q, %v", image, name, err)
		}
	}
}

// TestTokenByPath checks that a token is fetched with the credentials of the repository that
// it is for.
func TestTokenByPath(t *testing.T) {
	var asked string
	s := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
		asked, _, _ = r.BasicAuth()
		fmt.Fprint(w, `{"token":"tok"}`)
	})
	c := New(Config{
		File:       auths(t, "r.example/org-a", "r.example/org-b", "r.example/org-c", "r.example"),
		TokenHosts: tokenHosts(t, "r.example="+s.host()),
	})
	g := c.Grant(refs(t, "r.example/org-b/app"))
	for _, tt := range []struct{ scopes, want string }{
		{"repository:org-a/base:pull", "r.example/org-a"},
		{"repository:org-a/base:pull repository:org-c/base:pull", "r.example/org-c"},
		{"repository:org-a/base:pull repository:org-b/app:pull,push", "r.example/org-b"},
		{"repository:org-a/base:pull", "r.example/org-a"},
		{"repository:org-a/base:pull repository:org-c/base:pull", "r.example/org-c"},
		{"repository:library/base:pull", "r.example"},
		{"", "r.example"},
	} {
		_, err := g.Token(t.Context(), TokenRequest{Host: "R.Example", Realm: s.URL, Scopes: strings.Fields(tt.scopes)})
		if err != nil || asked != tt.want {
			t.Errorf("%q: asked as %q, %v", tt.scopes, asked, err)
		}
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

func TestTokenNotKept(t *testing.T) {
	var n atomic.Int32
	s := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"token":"tok%d","expires_in":300}`, n.Add(1))
	})
	g := New(Config{TokenHosts: tokenHosts(t, "h="+s.host())}).Grant(nil)
	for _, want := range []string{"tok1", "tok2"} {
		tok, err := g.Token(t.Context(), TokenRequest{Host: "h", Realm: s.URL, Scopes: []string{"repository:a:pull"}})
		if err != nil || tok.Value != want {
			t.Errorf("got %q, %v, want %q: the registry may have refused the last one", tok.Value, err, want)
		}
	}
}
