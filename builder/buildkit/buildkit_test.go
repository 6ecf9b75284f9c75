package buildkit

import (
	"bytes"
	"crypto/sha256"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session/auth"
	"golang.org/x/crypto/nacl/sign"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"handler/function/api"
	"handler/function/buildconfig"
	"handler/function/buildkit/contextfs"
	"handler/function/payload"
	"handler/function/registry"
	"handler/function/solve"
)

// files is a context whose regular files have the given content.
type files map[string]string

func (f files) Entries() []payload.Entry {
	var list []payload.Entry
	for _, name := range slices.Sorted(maps.Keys(f)) {
		list = append(list, payload.Entry{Path: name, Mode: 0o644, Size: int64(len(f[name]))})
	}
	return list
}

func (f files) Open(e *payload.Entry) io.Reader { return strings.NewReader(f[e.Path]) }

var sample = files{"Dockerfile": "FROM scratch\n"}

func mustNew(t *testing.T, cfg Config) *Solver {
	t.Helper()
	cfg.Addrs = []string{"tcp://127.0.0.1:1"}
	if cfg.Credentials == nil {
		cfg.Credentials = registry.New(registry.Config{})
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// mustPlan is the plan of a request with the given config.
func mustPlan(t *testing.T, s *Solver, config string, src contextfs.Source) *plan {
	t.Helper()
	c, err := buildconfig.Parse([]byte(config))
	if err != nil {
		t.Fatal(err)
	}
	return s.newPlan(&solve.Request{Config: c, SharedKey: "key", Hostname: "host", CacheMountNS: "ns"}, contextfs.New(src))
}

func TestAttributes(t *testing.T) {
	// Those of every build.
	always := map[string]string{"hostname": "host", "build-arg:BUILDKIT_CACHE_MOUNT_NS": "ns", "cmdline": "dockerfile.v0"}
	for _, tt := range []struct {
		name, config       string
		cfg                Config
		frontend, exporter map[string]string
	}{
		{"nothing", `{"skipPush":true}`, Config{}, nil, nil},
		{"image", `{"image":"acme/app"}`, Config{}, nil, map[string]string{"name": "docker.io/acme/app:latest", "push": "true"}},
		{"tags", `{"image":"r:5000/app:1","tags":["r:5000/app:2","r:5000/app:1","acme/app"]}`, Config{}, nil,
			map[string]string{"name": "r:5000/app:1,r:5000/app:2,docker.io/acme/app:latest", "push": "true"}},
		{"image that is not pushed", `{"image":"acme/app","skipPush":true}`, Config{}, nil, nil},
		{"arguments", `{"skipPush":true,"buildArgs":{"A":"1","EMPTY":""}}`, Config{}, map[string]string{"build-arg:A": "1", "build-arg:EMPTY": ""}, nil},
		{"labels", `{"skipPush":true,"labels":{"a.b/c":"d"}}`, Config{}, map[string]string{"label:a.b/c": "d"}, nil},
		{"target and file", `{"skipPush":true,"target":"t","dockerfile":"./d//File"}`, Config{}, map[string]string{"target": "t", "filename": "d/File"}, nil},
		{"no cache, pull", `{"skipPush":true,"noCache":true,"pull":true}`, Config{}, map[string]string{"no-cache": "", "image-resolve-mode": "pull"}, nil},
		{"platform", `{"skipPush":true,"platforms":["linux/arm64"]}`, Config{DefaultPlatform: "linux/amd64"}, map[string]string{"platform": "linux/arm64"}, nil},
		{"default platform", `{"skipPush":true,"platforms":[""]}`, Config{DefaultPlatform: "linux/amd64"}, map[string]string{"platform": "linux/amd64"}, nil},
		{"annotations", `{"skipPush":true,"annotations":{"a.b":"c"}}`, Config{}, nil, map[string]string{"annotation.a.b": "c"}},
		{"annotations of an index", `{"skipPush":true,"annotations":{"a.b":"c"},"platforms":["linux/amd64","linux/arm64"]}`, Config{},
			map[string]string{"platform": "linux/amd64,linux/arm64"}, map[string]string{"annotation.a.b": "c", "annotation-index.a.b": "c"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := &attempt{ref: "ref", auths: newAuthServer(nil)}
			a.run = &run{Solver: mustNew(t, tt.cfg)}
			a.plan = mustPlan(t, a.Solver, tt.config, sample)
			want := maps.Clone(always)
			maps.Copy(want, tt.frontend)
			opt := a.solveOpt()
			if !maps.Equal(opt.FrontendAttrs, want) {
				t.Errorf("frontend %v, want %v", opt.FrontendAttrs, want)
			}
			if len(opt.Exports) != 1 || opt.Exports[0].Type != client.ExporterImage || !maps.Equal(opt.Exports[0].Attrs, tt.exporter) {
				t.Errorf("exports %v, want %v", opt.Exports, tt.exporter)
			}
			// No SSH agent, no secrets, nobody's cache.
			if len(opt.Session) != 1 || len(opt.CacheImports) != 0 || len(opt.CacheExports) != 0 {
				t.Errorf("session %v, imports %v, exports %v", opt.Session, opt.CacheImports, opt.CacheExports)
			}
			if opt.SharedKey != "key" || len(opt.AllowedEntitlements) != 0 || len(opt.LocalMounts) != 2 {
				t.Errorf("options %+v", opt)
			}
			if opt.Ref != "ref" || !opt.Internal {
				t.Errorf("ref %q, kept out of the history: %v", opt.Ref, opt.Internal)
			}
			a.built = true
			if _, again := a.solveOpt().FrontendAttrs["no-cache"]; again {
				t.Error("everything is built again")
			}
			a.plan.name = solve.Name{Call: "c", Body: "b"}
			if a.solveOpt().Internal {
				t.Error("a build with a name is kept out of the history")
			}
		})
	}
}

func TestCacheRepository(t *testing.T) {
	repository, err := reference.ParseNormalizedNamed("r:5000/cache")
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{CacheRepository: repository}
	for _, tt := range []struct {
		config           string
		imports, exports int
	}{
		{`{"image":"acme/app:1"}`, 1, 1},
		{`{"image":"acme/app:1","skipPush":true}`, 1, 0},
		{`{"skipPush":true}`, 0, 0}, // nothing says whose cache it would be
	} {
		p := mustPlan(t, mustNew(t, cfg), tt.config, sample)
		opt := p.solveOpt("ref", newAuthServer(nil))
		if len(opt.CacheImports) != tt.imports || len(opt.CacheExports) != tt.exports {
			t.Errorf("%s: %d imports, %d exports", tt.config, len(opt.CacheImports), len(opt.CacheExports))
		}
		for _, e := range slices.Concat(opt.CacheImports, opt.CacheExports) {
			if e.Type != "registry" || e.Attrs["ref"] != "r:5000/cache:key" {
				t.Errorf("%s: %+v", tt.config, e)
			}
		}
		for _, e := range opt.CacheExports {
			if e.Attrs["ignore-error"] != "true" || e.Attrs["mode"] != "max" {
				t.Errorf("%+v", e)
			}
		}
		for host, scope := range map[string]string{"r:5000": "repository:cache:push", "docker.io": "repository:acme/app:push"} {
			// Without a realm no token comes, but the scope is looked at first.
			_, err := p.grant().Token(t.Context(), registry.TokenRequest{Host: host, Scopes: []string{scope}})
			if may := !strings.Contains(err.Error(), "more than this build may do"); may != (tt.imports == 1) {
				t.Errorf("%s: may have %s at %s: %v", tt.config, scope, host, may)
			}
		}
		if len(p.req.Config.References) > 1 {
			t.Error("the cache is one of the image's names")
		}
	}
}

// TestCacheTag: the tags of a tenant begin with its id.
func TestCacheTag(t *testing.T) {
	repository, err := reference.ParseNormalizedNamed("r:5000/cache")
	if err != nil {
		t.Fatal(err)
	}
	c, err := buildconfig.Parse([]byte(`{"image":"acme/app:1"}`))
	if err != nil {
		t.Fatal(err)
	}
	id := strings.Repeat("i", 40) // as long as may be
	for tenant, want := range map[*solve.Tenant]string{nil: "r:5000/cache:key-linux-arm64", {ID: id}: "r:5000/cache:" + id + "-key-linux-arm64"} {
		tag := cacheTag(repository, &solve.Request{Config: c, SharedKey: "key", Tenant: tenant}, "-linux-arm64")
		if tag == nil || tag.String() != want {
			t.Errorf("%v, want %s", tag, want)
		}
	}
}

// TestSyntaxWarning: a syntax line is followed where allow_syntax is set, and by a tenant only if
// its from says which frontends there are.
func TestSyntaxWarning(t *testing.T) {
	free, bound := &solve.Tenant{}, &solve.Tenant{Sources: solve.Sources{From: []string{"docker.io/docker/*"}}}
	for _, tt := range []struct {
		allow   bool
		tenant  *solve.Tenant
		follows bool
	}{
		{false, nil, false}, {true, nil, true}, {true, free, false}, {true, bound, true}, {false, bound, false},
	} {
		s := mustNew(t, Config{AllowSyntax: tt.allow})
		p := mustPlan(t, s, `{"skipPush":true}`, files{"Dockerfile": "# syntax=e\n#\n"})
		p.allowSyntax = s.followsSyntax(&solve.Request{Tenant: tt.tenant})
		if warnings := s.warnings(p); (len(warnings) == 0) != tt.follows {
			t.Errorf("%+v: warnings %q", tt, warnings)
		}
		if _, ignored := p.frontendAttrs()["cmdline"]; ignored == tt.follows {
			t.Errorf("%+v: cmdline %v", tt, ignored)
		}
	}
}

// TestSolveRefusesOdd has the context refused before any daemon is asked.
func TestSolveRefusesOdd(t *testing.T) {
	for timeout, want := range map[time.Duration]api.Code{0: api.BadTar, time.Minute: api.BadTar} {
		s := mustNew(t, Config{BuildTimeout: timeout})
		_, _, err := s.solve(t.Context(), &solve.Request{Config: new(buildconfig.Config)}, contextfs.New(files{"\xff": ""}), func(...string) {})
		if err == nil || api.AsError(err).Code != want {
			t.Errorf("build_timeout %v: %v, want %s", timeout, err, want)
		}
	}
}

// TestPrepare has the registry asked for the repositories before a daemon is
// asked to build: for the image's if it is pushed, and for the cache's, without
// which the build goes on.
func TestPrepare(t *testing.T) {
	var asked []string
	ecr := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Header.Get("X-Amz-Target"))
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		w.WriteHeader(http.StatusBadRequest)
		io.WriteString(w, `{"__type":"AccessDeniedException"}`)
	}))
	defer ecr.Close()
	t.Setenv("AWS_ENDPOINT_URL", ecr.URL)
	t.Setenv("AWS_ACCESS_KEY_ID", "AKID")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	file := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(file, []byte(`{"credsStore":"ecr-login"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	const image = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/app"
	cache, err := reference.ParseNamed("123456789012.dkr.ecr.eu-west-1.amazonaws.com/cache")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, config string
		cache        reference.Named
		want         api.Code // of a build that no daemon takes
		asks         bool
	}{
		{"push", `{"image":"` + image + `"}`, nil, api.RegistryDenied, true},
		{"no push", `{"image":"` + image + `","skipPush":true}`, nil, "", false},
		{"cache", `{"image":"` + image + `","skipPush":true}`, cache, "", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			asked = nil
			s := mustNew(t, Config{CacheRepository: tt.cache, Credentials: registry.New(registry.Config{File: file, CreateRepositories: true})})
			p := mustPlan(t, s, tt.config, sample)
			err := s.prepare(t.Context(), p)
			if err == nil != (tt.want == "") || err != nil && api.AsError(err).Code != tt.want || len(asked) > 0 != tt.asks {
				t.Errorf("%v; asked %q", err, asked)
			}
			if err != nil {
				if _, _, err := s.build(t.Context(), p, func(...string) {}, func(string) {}); api.AsError(err).Code != tt.want {
					t.Errorf("build: %v", err)
				}
			}
		})
	}
}

func TestTokenAuthority(t *testing.T) {
	grant := registry.New(registry.Config{}).Grant(nil)
	one, two := newAuthServer(grant), newAuthServer(grant)
	public := func(s *authServer, host, salt string) *[32]byte {
		t.Helper()
		resp, err := s.GetTokenAuthority(t.Context(), &auth.GetTokenAuthorityRequest{Host: host, Salt: []byte(salt)})
		if err != nil {
			t.Fatal(err)
		}
		return (*[32]byte)(resp.PublicKey)
	}
	key := public(one, "h", "salt")
	payload := bytes.Repeat([]byte("p"), sha256.Size)
	for _, tt := range []struct {
		name       string
		s          *authServer
		host, salt string
		want       bool
	}{
		{"same", one, "h", "salt", true},
		{"another build", two, "h", "salt", false},
		{"another host", one, "i", "salt", false},
		{"another daemon", one, "h", "pepper", false},
	} {
		resp, err := tt.s.VerifyTokenAuthority(t.Context(), &auth.VerifyTokenAuthorityRequest{Host: tt.host, Salt: []byte(tt.salt), Payload: payload})
		if err != nil {
			t.Fatal(err)
		}
		signed, ok := sign.Open(nil, resp.Signed, key)
		if ok = ok && bytes.Equal(signed, payload); ok != tt.want {
			t.Errorf("%s: %v", tt.name, ok)
		}
	}
}

func TestAuthFailureKept(t *testing.T) {
	s := newAuthServer(registry.New(registry.Config{}).Grant(nil))
	_, err := s.FetchToken(t.Context(), &auth.FetchTokenRequest{Host: "r", Realm: "http://r/token"})
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "token_hosts") {
		t.Errorf("error %v", err)
	}
	if f := s.failed(); len(f) != 1 || f[0].Code != api.RegistryDenied || !strings.Contains(err.Error(), f[0].Msg) {
		t.Errorf("kept %v", f)
	}
	creds, err := s.Credentials(t.Context(), &auth.CredentialsRequest{Host: "r"})
	if err != nil || creds.Username != "" || creds.Secret != "" {
		t.Errorf("%v, %v", creds, err)
	}
}

// TestFindUnasked: a daemon that cannot be asked may know of the build.
func TestFindUnasked(t *testing.T) {
	past, err := mustNew(t, Config{}).Find(t.Context(), "", "call")
	if past != nil || err == nil || api.AsError(err).Code != api.NoDaemon {
		t.Errorf("got %+v, %v, want no_daemon", past, err)
	}
}
