package registry

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"handler/function/api"
)

// auths is a config.json in which each key's user is the key.
func auths(t *testing.T, keys ...string) string {
	t.Helper()
	m := make(map[string]any)
	for _, k := range keys {
		m[k] = map[string]string{"username": k, "password": "p"}
	}
	text, err := json.Marshal(map[string]any{"auths": m})
	if err != nil {
		t.Fatal(err)
	}
	return configFile(t, string(text))
}

func TestCredentialsByPath(t *testing.T) {
	for _, tt := range []struct {
		keys  []string
		image string
		want  string
	}{
		{[]string{"r.example", "r.example/org", "r.example/org/app"}, "r.example/org/app", "r.example/org/app"},
		{[]string{"r.example", "r.example/org", "r.example/org/app"}, "r.example/org/app2", "r.example/org"},
		{[]string{"r.example", "r.example/org"}, "r.example/organ/app", "r.example"},
		{[]string{"r.example", "r.example/org"}, "r.example/x/org", "r.example"},
		{[]string{"r.example/org-a", "r.example/org-b", "r.example/org-c"}, "r.example/org-b/app", "r.example/org-b"},
		{[]string{"r.example", "r.example/org/"}, "r.example/org/app", "r.example/org/"},
		{[]string{"https://r.example/org", "r.example"}, "r.example/org/app", "https://r.example/org"},
		{[]string{"https://r.example/v2/org", "r.example"}, "r.example/org/app", "https://r.example/v2/org"},
		{[]string{"https://r.example/v2/", "other.example/org"}, "r.example/org/app", "https://r.example/v2/"},
		{[]string{"https://r.example/v1/", "http://r.example", "r.example"}, "r.example/org/app", "r.example"},
		{[]string{"R.Example/org", "r.example"}, "r.EXAMPLE/org/app", "R.Example/org"},
		{[]string{"r.example:443/org", "r.example"}, "r.example/org/app", "r.example:443/org"},
		{[]string{"r.example:5000/org", "r.example"}, "r.example/org/app", "r.example"},
		{[]string{"r.example:5000/org", "r.example"}, "r.example:5000/org/app", "r.example:5000/org"},
		{[]string{"docker.io/acme", "https://index.docker.io/v1/"}, "acme/app", "docker.io/acme"},
		{[]string{"docker.io/acme", "https://index.docker.io/v1/"}, "alpine", "https://index.docker.io/v1/"},
		{[]string{"docker.io/library", "https://index.docker.io/v1/"}, "alpine", "docker.io/library"},
		{[]string{"index.docker.io", "docker.io", "https://index.docker.io/v1/", "registry-1.docker.io"}, "acme/app", "https://index.docker.io/v1/"},
		{[]string{"*.example", "r.example"}, "r.example/org/app", "r.example"},
		{[]string{"*.example/org", "r.example"}, "r.example/org/app", "r.example"},
		{[]string{"*.example", "*.example/org"}, "r.example/org/app", "*.example/org"},
		{[]string{"*.example", "r*.example"}, "x.r.example/org/app", ""},
		{[]string{"*.example"}, "r.example:5000/org/app", ""},
		{[]string{"*.example:5000"}, "r.example:5000/org/app", "*.example:5000"},
	} {
		c := New(Config{File: auths(t, tt.keys...), AllowBasic: true})
		host, path, _ := strings.Cut(refs(t, tt.image)[0].Name(), "/")
		for range 20 { // a map's order differs from time to time
			name, _, err := c.Grant(refs(t, tt.image)).Basic(t.Context(), serverHost(host))
			if err != nil || name != tt.want {
				t.Fatalf("%q for %s: %q, %v", tt.keys, tt.image, name, err)
			}
			if l, err := c.Login(t.Context(), host, path); err != nil || l.Username != tt.want {
				t.Fatalf("%q for %s itself: %q, %v", tt.keys, tt.image, l.Username, err)
			}
		}
	}
}

// TestCredentialsWithoutPath has the daemon ask for a host to pull from.
func TestCredentialsWithoutPath(t *testing.T) {
	for _, tt := range []struct {
		keys []string
		want string
	}{
		{[]string{"r.example/org", "r.example"}, "r.example"},
		{[]string{"r.example/org-b", "r.example/org-a", "other.example"}, "r.example/org-a"},
	} {
		c := New(Config{File: auths(t, tt.keys...), AllowBasic: true})
		for range 20 {
			if got := user(t, c, "r.example"); got != tt.want {
				t.Fatalf("%q: %q", tt.keys, got)
			}
		}
	}
}

// TestCredentialsPushed has the first image decide, and nothing of what another
// build pushes.
func TestCredentialsPushed(t *testing.T) {
	c := New(Config{File: auths(t, "r.example/org-a", "r.example/org-b", "r.example"), AllowBasic: true})
	for image, want := range map[string]string{"org-a/app": "r.example/org-a", "org-b/app": "r.example/org-b", "org-c/app": "r.example"} {
		g := c.Grant(refs(t, "r.example/"+image, "r.example/org-a/tag", "r.example/org-b/cache"))
		if name, _, err := g.Basic(t.Context(), "R.example:443"); err != nil || name != want {
			t.Errorf("%s: %q, %v", image, name, err)
		}
	}
}

func TestHelpersByPath(t *testing.T) {
	helperDir(t, map[string]string{
		"fake-echo": `read server; echo '{"Username":"'$server'","Secret":"s"}'`,
	})
	for _, tt := range []struct{ config, image, want string }{
		{`{"credHelpers":{"r.example":"fake-echo"},"auths":{"r.example":` + basicAuth("file", "p") + `}}`, "r.example/org/app", "r.example"},
		{`{"credHelpers":{"r.example/org":"fake-echo"},"auths":{"r.example":` + basicAuth("file", "p") + `}}`, "r.example/org/app", "r.example/org"},
		{`{"credHelpers":{"r.example/org":"fake-echo"},"auths":{"r.example":` + basicAuth("file", "p") + `}}`, "r.example/other/app", "file"},
		{`{"credHelpers":{"R.Example":"fake-echo"}}`, "r.example/org/app", "r.example"},
		{`{"credHelpers":{"https://r.example":"fake-echo"}}`, "r.example/org/app", "r.example"},
		{`{"credHelpers":{"r.example":"fake-echo"},"auths":{"r.example/org":` + basicAuth("file", "p") + `}}`, "r.example/org/app", "file"},
		{`{"credHelpers":{"r.example":"fake-echo"},"auths":{"r.example/org":{}}}`, "r.example/org/app", "r.example"},
		{`{"credsStore":"fake-echo","auths":{"r.example/org":` + basicAuth("file", "p") + `}}`, "r.example/org/app", "file"},
		{`{"credsStore":"fake-echo","auths":{"r.example/org":` + basicAuth("file", "p") + `}}`, "r.example/other/app", "r.example"},
		{`{"credsStore":"fake-echo","auths":{"r.example":` + basicAuth("file", "p") + `}}`, "r.example/org/app", "r.example"},
		{`{"credHelpers":{"docker.io":"fake-echo"}}`, "acme/app", hubKey},
	} {
		c := New(Config{File: configFile(t, tt.config), AllowBasic: true})
		host, _, _ := strings.Cut(refs(t, tt.image)[0].Name(), "/")
		for range 3 {
			if name, _, err := c.Grant(refs(t, tt.image)).Basic(t.Context(), serverHost(host)); err != nil || name != tt.want {
				t.Errorf("%s for %s: %q, %v", tt.config, tt.image, name, err)
			}
		}
	}
}

func TestConfigByteOrderMark(t *testing.T) {
	c := New(Config{File: configFile(t, "\xef\xbb\xbf"+`{"auths":{"h":`+basicAuth("u", "p")+`}}`), AllowBasic: true})
	if got := user(t, c, "h"); got != "u" {
		t.Errorf("user %q", got)
	}
}

// TestTokenByPath has a token be fetched with the credentials of the repository
// that it is for.
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

func tokenPaths(t *testing.T, entries ...string) []TokenPath {
	t.Helper()
	var list []TokenPath
	for _, e := range entries {
		p, err := ParseTokenPath(e)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
	return list
}

// TestTokenPathsMeet: where a token service has one name for two repositories, it is that
// of the image, which comes first.
func TestTokenPathsMeet(t *testing.T) {
	g := New(Config{TokenPaths: tokenPaths(t, "r.example/local=", "r.example/prod=")}).
		Grant(append(refs(t, "r.example/local/app"), refs(t, "r.example/prod/app")...))
	if got := g.pushes["r.example/app"]; got != "local/app" {
		t.Errorf("it is %q", got)
	}
}

func TestTokenPaths(t *testing.T) {
	for _, tt := range []struct {
		entries []string
		image   string
		asked   string // to push to
		entry   string // that the error names; empty is granted
	}{
		{nil, "r.example/docker-local/team/app", "team/app", `"r.example/docker-local="`},
		{[]string{"r.example/docker-local="}, "r.example/docker-local/team/app", "team/app", ""},
		{[]string{"R.example:443/docker-local/=/"}, "r.example/docker-local/team/app", "team/app", ""},
		{[]string{"r.example/docker="}, "r.example/docker-local/team/app", "team/app", `"r.example/docker-local="`},
		{[]string{"r.example:5000/docker-local="}, "r.example/docker-local/team/app", "team/app", `"r.example/docker-local="`},
		{[]string{"other.example/docker-local="}, "r.example/docker-local/team/app", "team/app", `"r.example/docker-local="`},
		{[]string{"r.example/docker-local="}, "r.example/docker-local/team/app", "other/app", `"r.example/docker-local/team=other"`},
		{nil, "r.example/app", "prefix/app", `"r.example=prefix"`},
		{[]string{"r.example=prefix"}, "r.example/app", "prefix/app", ""},
		{[]string{"r.example=prefix", "r.example/a=b"}, "r.example/a/app", "b/app", ""},
		{[]string{"r.example=prefix", "r.example/a=b"}, "r.example/a/app", "prefix/a/app", `"r.example=prefix"`},
		{nil, "r.example/app", "whatever", `"r.example/app=whatever"`},
		{[]string{"r.example/app=whatever"}, "r.example/app", "whatever", ""},
	} {
		g := New(Config{TokenPaths: tokenPaths(t, tt.entries...)}).Grant(refs(t, tt.image))
		repository := strings.TrimPrefix(tt.image, "r.example/")
		scope := "repository:" + tt.asked + ":pull,push"
		got, err := g.permit("r.example", []string{"repository:" + repository + ":pull,push", scope})
		if err != nil || strings.Contains(strings.Join(got, " "), scope) != (tt.entry == "") {
			t.Errorf("%q, %s: granted %q, %v", tt.entries, tt.image, got, err)
		}
		hint := g.Hints()["r.example"]
		if (hint == "") != (tt.entry == "") || hint != "" &&
			(!strings.Contains(hint, "token_paths needs "+tt.entry) || !strings.Contains(hint, `"`+tt.asked+`"`) || !strings.Contains(hint, `"`+repository+`"`)) {
			t.Errorf("%q, %s: %q", tt.entries, tt.image, hint)
		}
		if _, err := g.permit("r.example", []string{"repository:" + tt.asked + ":push"}); (err == nil) != (tt.entry == "") || err != nil && !strings.Contains(err.Error(), "token_paths") {
			t.Errorf("%q, %s alone: %v", tt.entries, tt.image, err)
		}
	}
	for _, s := range []string{"", "r.example", "=a", "r.example=", "r.example/a=a", "r.example/A=b", "r.example=a:tag", "r.example:05000=a", "https://r.example=a", "r.example/a=b=c", "r.example=a b", "r.example/../a=b"} {
		if p, err := ParseTokenPath(s); err == nil {
			t.Errorf("%q: %+v", s, p)
		}
	}
}

// TestTokenPathHintRefused has a token service refuse the other path itself, and a
// base image whose scope it is be no reason.
func TestTokenPathHintRefused(t *testing.T) {
	s := newTokenServer(t, false, status(http.StatusForbidden))
	g := New(Config{TokenHosts: tokenHosts(t, "r.example="+s.host())}).Grant(refs(t, "r.example/local/app"))
	_, err := g.Token(t.Context(), TokenRequest{Host: "r.example", Realm: s.URL, Scopes: []string{"repository:base/image:pull,push", "repository:app:pull,push"}})
	if e := api.AsError(err); err == nil || e.Code != api.RegistryDenied || !strings.Contains(e.Msg, `"app" where the image is "local/app"`) || !strings.Contains(e.Msg, `token_paths needs "r.example/local="`) {
		t.Errorf("error %v", err)
	}
}
