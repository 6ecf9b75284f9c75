package buildkit

import (
	"encoding/base64"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/distribution/reference"

	"handler/function/api"
	"handler/function/buildkit/sources"
	"handler/function/registry"
	"handler/function/solve"
)

// planFor is the plan of a tenant's request, and the warning about it.
func planFor(t *testing.T, s *Solver, tenant *solve.Tenant, config string) (*plan, string) {
	t.Helper()
	p := mustPlan(t, s, config, sample)
	p.req.Tenant = tenant
	warning, err := s.forTenant(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return p, warning
}

func TestStepLimits(t *testing.T) {
	for _, tt := range []struct {
		tenant *solve.Tenant
		want   map[string]string
	}{
		{nil, nil},
		{&solve.Tenant{}, nil},
		{&solve.Tenant{Memory: 32 << 20}, map[string]string{"memory": "33554432", "memswap": "33554432"}},
		{&solve.Tenant{CPUs: 1.5}, map[string]string{"cpuperiod": "100000", "cpuquota": "150000"}},
		{&solve.Tenant{CPUs: 0.01}, map[string]string{"cpuperiod": "100000", "cpuquota": "1000"}},
		{&solve.Tenant{CPUs: 0.29}, map[string]string{"cpuperiod": "100000", "cpuquota": "29000"}},
	} {
		p, _ := planFor(t, mustNew(t, Config{}), tt.tenant, `{"skipPush":true}`)
		got := p.frontendAttrs()
		for _, name := range []string{"hostname", "build-arg:BUILDKIT_CACHE_MOUNT_NS", "cmdline"} {
			delete(got, name)
		}
		if !maps.Equal(got, tt.want) {
			t.Errorf("%+v: attributes %v, want %v", tt.tenant, got, tt.want)
		}
	}
}

func TestTenantBuildTimeout(t *testing.T) {
	for _, tt := range []struct{ ours, theirs, want time.Duration }{
		{0, 0, 0}, {time.Minute, 0, time.Minute}, {0, time.Second, time.Second},
		{time.Minute, time.Second, time.Second},
	} {
		s := mustNew(t, Config{BuildTimeout: tt.ours})
		if got := s.newLimits(&solve.Tenant{BuildTimeout: tt.theirs}).build; got != tt.want {
			t.Errorf("%v and %v: %v, want %v", tt.ours, tt.theirs, got, tt.want)
		}
		if got := s.newLimits(nil).build; got != tt.ours {
			t.Errorf("without a tenant %v, want %v", got, tt.ours)
		}
	}
}

// TestSourcePolicy wants a policy for tenants, and none for a build without one.
func TestSourcePolicy(t *testing.T) {
	s := mustNew(t, Config{})
	for _, tenant := range []*solve.Tenant{nil, {}} {
		p, _ := planFor(t, s, tenant, `{"skipPush":true}`)
		if opt := p.solveOpt("ref", newAuthServer(nil)); (opt.SourcePolicyProvider != nil) != (tenant != nil) {
			t.Errorf("%v: policy %v", tenant, opt.SourcePolicyProvider)
		}
	}
}

// TestSourcesOf wants each rule of a build from where it belongs: the tenant, the request, and the
// installation.
func TestSourcesOf(t *testing.T) {
	cache, err := reference.ParseNormalizedNamed("c.example/cache")
	if err != nil {
		t.Fatal(err)
	}
	builder := registry.New(registry.Config{File: configFile(t, auths("r.example", "builder")), AllowBasic: true})
	s := mustNew(t, Config{Credentials: builder, CacheRepository: cache, Unasked: []string{"u.example/*"}})
	rules := solve.Sources{
		Images: []string{"r.example/acme"}, Own: []string{"r.example/builder"}, From: []string{"f.example/*"}, Hosts: []string{"h.example"}, Asked: []string{"a.example"},
		Others: func(name string) bool { return name == "r.example/globex" },
	}
	tenant := &solve.Tenant{ID: "t-acme", RegistryConfig: []byte(auths("a.example", "acme")), Sources: rules}
	p, _ := planFor(t, s, tenant, `{"image":"r.example/acme/app:1","context":{"git":"https://h.example/acme/app.git#main"}}`)
	got := s.sourcesOf(p)
	if got.Others == nil || !got.Others("r.example/globex") || got.Others("r.example/acme") {
		t.Error("the images of other tenants are not the tenant's own rule")
	}
	if got.Known != builder {
		t.Error("what is known of registries is not the builder's own")
	}
	if user, _, err := got.Asker.(*registry.Grant).Basic(t.Context(), "a.example"); err != nil || user != "acme" {
		t.Errorf("a registry is asked as %q, %v, want acme", user, err)
	}
	// Funcs and credentials are not compared.
	got.Others, got.Known, got.Asker, rules.Others = nil, nil, nil, nil
	want := sources.Config{Sources: rules, Tenant: "t-acme", Git: p.req.Config.Git, Unasked: []string{"u.example/*"}, Cache: "c.example/cache"}
	if want.Git == nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func auths(host, user string) string {
	return fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, base64.StdEncoding.EncodeToString([]byte(user+":p")))
}

func configFile(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestTenantCredentials wants each tenant's own, and the builder's where a tenant has those.
func TestTenantCredentials(t *testing.T) {
	s := mustNew(t, Config{Credentials: registry.New(registry.Config{File: configFile(t, auths("r.example", "builder")), AllowBasic: true})})
	for _, tt := range []struct {
		name   string
		tenant *solve.Tenant
		want   string
	}{
		{"no file of tenants", nil, "builder"},
		{"none", &solve.Tenant{}, ""},
		{"its own", &solve.Tenant{RegistryConfig: []byte(auths("r.example", "acme"))}, "acme"},
		{"the builder's", &solve.Tenant{BuilderRegistry: true}, "builder"},
	} {
		p, _ := planFor(t, s, tt.tenant, `{"image":"r.example/app:1"}`)
		if user, _, err := p.grant().Basic(t.Context(), "r.example"); err != nil || user != tt.want {
			t.Errorf("%s: user %q, %v", tt.name, user, err)
		}
	}
	p := mustPlan(t, s, `{"skipPush":true}`, sample)
	p.req.Tenant = &solve.Tenant{RegistryConfig: []byte(`{"auths":{"h":{"auth":"!!!topsecret"}}}`)}
	_, err := s.forTenant(t.Context(), p)
	if e := api.AsError(err); err == nil || e.Code != api.Internal || strings.Contains(err.Error(), "topsecret") {
		t.Errorf("a config that cannot be read: %v", err)
	}
}

// TestSharedLogin wants no cache where the daemon could mix two users up.
func TestSharedLogin(t *testing.T) {
	challenge := ""
	r := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("WWW-Authenticate", challenge)
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer r.Close()
	host := strings.TrimPrefix(r.URL, "http://")
	cache, err := reference.ParseNormalizedNamed(host + "/cache")
	if err != nil {
		t.Fatal(err)
	}
	const basic, bearer = `Basic realm="r"`, `Bearer realm="https://t.example"`
	here, elsewhere := `{"image":"`+host+`/app:1"}`, `{"image":"r.example/app:1"}`
	for _, tt := range []struct {
		name, challenge, config string
		tenant                  *solve.Tenant
		cache                   bool
	}{
		{"pushes there", basic, here, &solve.Tenant{}, false},
		{"pushes there, tokens", bearer, here, &solve.Tenant{}, true},
		{"pushes there, the builder's credentials", basic, here, &solve.Tenant{BuilderRegistry: true}, true},
		{"pushes elsewhere", basic, elsewhere, &solve.Tenant{}, true},
		{"pushes elsewhere with credentials there", basic, elsewhere, &solve.Tenant{RegistryConfig: []byte(auths(host, "acme"))}, false},
		{"pushes elsewhere with credentials elsewhere", basic, elsewhere, &solve.Tenant{RegistryConfig: []byte(auths("r.example", "acme"))}, true},
		{"no file of tenants", basic, here, nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			challenge = tt.challenge
			s := mustNew(t, Config{CacheRepository: cache})
			p, warning := planFor(t, s, tt.tenant, tt.config)
			opt := p.solveOpt("ref", newAuthServer(nil))
			if has := len(opt.CacheExports) == 1 && len(opt.CacheImports) == 1; has != tt.cache || (warning == "") != tt.cache {
				t.Errorf("%d imports, %d exports, warning %q", len(opt.CacheImports), len(opt.CacheExports), warning)
			}
			if warning != "" && !strings.Contains(warning, host) {
				t.Errorf("warning %q", warning)
			}
		})
	}
}
