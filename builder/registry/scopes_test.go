package registry

import (
	"net/http"
	"strings"
	"testing"

	"handler/function/api"
)

func TestPermit(t *testing.T) {
	g := New(Config{}).Grant(refs(t, "ghcr.io/acme/app:1", "acme/hub", "registry:5000/a/b"))
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
			got, err := g.permit(tt.host, tt.scopes)
			if strings.Join(got, " ") != tt.want {
				t.Errorf("granted %q, want %q", got, tt.want)
			}
			if (err != nil) != (tt.want == "") {
				t.Errorf("error %v", err)
			}
		})
	}
	if got, err := g.permit("ghcr.io", nil); len(got) != 0 || err != nil {
		t.Errorf("no scopes: %q, %v", got, err)
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

// TestTokenPathsMeet has two repositories for which the token service has one name. The
// first one counts, which is the image's.
func TestTokenPathsMeet(t *testing.T) {
	g := New(Config{TokenPaths: tokenPaths(t, "r.example/local=", "r.example/prod=")}).
		Grant(append(refs(t, "r.example/local/app"), refs(t, "r.example/prod/app")...))
	if got := g.pushes["r.example/app"]; got != "local/app" {
		t.Errorf("it is %q", got)
	}
}

// TestTokenPathHintRefused has the token service itself refuse. The hint must be about the
// image's other name, and not about the base image, whose scope comes first.
func TestTokenPathHintRefused(t *testing.T) {
	s := newTokenServer(t, false, status(http.StatusForbidden))
	g := New(Config{TokenHosts: tokenHosts(t, "r.example="+s.host())}).Grant(refs(t, "r.example/local/app"))
	_, err := g.Token(t.Context(), TokenRequest{Host: "r.example", Realm: s.URL, Scopes: []string{"repository:base/image:pull,push", "repository:app:pull,push"}})
	if e := api.AsError(err); err == nil || e.Code != api.RegistryDenied || !strings.Contains(e.Msg, `"app" where the image is "local/app"`) || !strings.Contains(e.Msg, `token_paths needs "r.example/local="`) {
		t.Errorf("error %v", err)
	}
}
