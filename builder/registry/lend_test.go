package registry

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"handler/function/api"
)

// TestOf wants nothing of the builder's own credentials in another's, and none of its helpers.
func TestOf(t *testing.T) {
	builder := New(Config{File: configFile(t, `{"auths":{"r.example":`+basicAuth("builder", "p")+`,"b.example":`+basicAuth("builder", "p")+`}}`), AllowBasic: true})
	c, err := builder.Of([]byte(`{"auths":{"r.example":` + basicAuth("tenant", "p") + `},"credsStore":"none","credHelpers":{"h.example":"none"}}`))
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]string{"r.example": "tenant", "b.example": "", "h.example": "", "x.example": ""} {
		if got := user(t, c, host); got != want {
			t.Errorf("%s: user %q, want %q", host, got, want)
		}
	}
	if got := user(t, builder, "r.example"); got != "builder" {
		t.Errorf("the builder has become %q", got)
	}
	none, err := builder.Of(nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := user(t, none, "r.example"); got != "" {
		t.Errorf("nobody is %q", got)
	}
	if _, err := builder.Of([]byte(`{"auths":{"h":{"auth":"!!!topsecret"}}}`)); err == nil || strings.Contains(err.Error(), "topsecret") {
		t.Errorf("%v", err)
	}
}

func TestServes(t *testing.T) {
	config := `{"auths":{"named.example":` + basicAuth("u", "p") + `,"*.pattern.example":` + basicAuth("u", "p") + `,"path.example/org":` + basicAuth("u", "p") + `,"empty.example":{}},
		"credHelpers":{"helper.example":"x"}}`
	mirror, err := ParseMirror("mirrored.example=m.example")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		config, host  string
		serves, named bool
	}{
		{config, "named.example", true, true},
		{config, "Named.example:443", true, true},
		{config, "path.example", true, true},
		{config, "a.pattern.example", true, false},
		{config, "helper.example", true, true},
		{config, "empty.example", false, false},
		{config, "other.example", false, false},
		{config, "mirrored.example", false, true},
		{`{"credsStore":"pass"}`, "other.example", true, false},
		{`{"credsStore":"ecr-login"}`, "other.example", false, false},
		{`{"credsStore":"ecr-login"}`, "123456789012.dkr.ecr.eu-west-1.amazonaws.com", true, false},
	} {
		c := New(Config{File: configFile(t, tt.config), Mirrors: []Mirror{mirror}})
		serves, err := c.Serves(tt.host)
		if err != nil || serves != tt.serves {
			t.Errorf("%s: serves %v, %v", tt.host, serves, err)
		}
		named, err := c.Names(tt.host)
		if err != nil || named != tt.named {
			t.Errorf("%s: named %v, %v", tt.host, named, err)
		}
	}
	broken := New(Config{File: configFile(t, `{"auths":`)})
	_, err1 := broken.Serves("h")
	_, err2 := broken.Names("h")
	for _, err := range []error{err1, err2} {
		if e := api.AsError(err); err == nil || e.Code != api.RegistryFailed {
			t.Errorf("a config that cannot be read: %v", err)
		}
	}
}

// TestLend wants each repository's token to be its owner's, and none to be for both.
func TestLend(t *testing.T) {
	var asked []string
	s := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
		who, _, _ := r.BasicAuth()
		asked = append(asked, who+" "+strings.Join(r.URL.Query()["scope"], " "))
		fmt.Fprint(w, `{"token":"t"}`)
	})
	const host = "registry.example.com"
	builder := New(Config{
		File: configFile(t, `{"auths":{"`+host+`":`+basicAuth("builder", "p")+`}}`), TokenHosts: tokenHosts(t, host+"="+s.host()), AllowBasic: true,
		TokenPaths: []TokenPath{{host: host, image: []string{"cache"}, service: []string{"prod", "cache"}}},
	})
	tenant, err := builder.Of([]byte(`{"auths":{"` + host + `":` + basicAuth("tenant", "p") + `}}`))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		scopes []string
		want   string // empty is an error
	}{
		{"its own", []string{"repository:acme/app:pull,push"}, "tenant repository:acme/app:pull,push"},
		{"a base", []string{"repository:base:pull"}, "tenant repository:base:pull"},
		{"the cache", []string{"repository:cache:pull,push"}, "builder repository:cache:pull,push"},
		{"the cache by its other name", []string{"repository:prod/cache:pull,push"}, "builder repository:prod/cache:pull,push"},
		{"a push with a mount out of the cache", []string{"repository:acme/app:pull,push", "repository:cache:pull"}, "tenant repository:acme/app:pull,push"},
		{"a push of the cache with a mount", []string{"repository:acme/app:pull", "repository:base:pull", "repository:cache:pull,push"}, "builder repository:cache:pull,push"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			asked = nil
			g := tenant.Grant(refs(t, host+"/acme/app:1"))
			g.Lend(builder, refs(t, host+"/cache:key")[0])
			_, err := g.Token(t.Context(), TokenRequest{Host: host, Realm: s.URL + "/token", Scopes: tt.scopes})
			if err != nil || !slices.Equal(asked, []string{tt.want}) {
				t.Errorf("asked %q, %v", asked, err)
			}
		})
	}
	g := tenant.Grant(refs(t, host+"/acme/app:1"))
	if _, err := g.Token(t.Context(), TokenRequest{Host: host, Realm: s.URL + "/token", Scopes: []string{"repository:cache:push"}}); err == nil {
		t.Error("what is not lent may be pushed to")
	}
}

// TestLendBasic wants no lent login where the build's own owner has one, or pushes.
func TestLendBasic(t *testing.T) {
	builder := New(Config{File: configFile(t, `{"auths":{"r.example":`+basicAuth("builder", "p")+`}}`), AllowBasic: true})
	for _, tt := range []struct {
		name, config, pushes, want string
	}{
		{"pushes elsewhere", `{}`, "x.example/app", "builder"},
		{"pushes there", `{}`, "r.example/app", ""},
		{"pushes there with a login", `{"auths":{"r.example":` + basicAuth("tenant", "p") + `}}`, "r.example/app", "tenant"},
		{"pulls there with a login", `{"auths":{"r.example":` + basicAuth("tenant", "p") + `}}`, "x.example/app", "tenant"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tenant, err := builder.Of([]byte(tt.config))
			if err != nil {
				t.Fatal(err)
			}
			g := tenant.Grant(refs(t, tt.pushes))
			g.Lend(builder, refs(t, "r.example/cache:key")[0])
			name, _, err := g.Basic(t.Context(), "r.example")
			if err != nil || name != tt.want {
				t.Errorf("user %q, %v", name, err)
			}
		})
	}
}
