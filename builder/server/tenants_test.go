package server_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/seal"

	"handler/function/api"
	"handler/function/sealed"
	"handler/function/server"
	"handler/function/signature"
	"handler/function/solve"
	"handler/function/tenants"
)

// file is a file of tenants that a test changes.
type file struct {
	mu  sync.Mutex
	set *tenants.Set
	err error
}

func (f *file) Current() (*tenants.Set, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.set, f.err
}

// write replaces the entries of the file.
func (f *file) write(t testing.TB, entries ...string) {
	t.Helper()
	text := "version: 1\ndefaults: {from: [\"*\"]}\ntenants:\n  " + strings.Join(entries, "\n  ") + "\n"
	set, err := tenants.Read([]tenants.File{{Name: "tenants", Data: []byte(text)}}, tenants.Installation{PayloadSecret: []byte(secret)})
	if err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.set = set
}

// tenant is an entry of the file, in YAML's flow style, with an id and a key made of its name.
// more has further fields, each with a comma after it.
func tenant(name, more string) string {
	return fmt.Sprintf("%s: {id: t-%s, %s images: [ghcr.io/%s], keys: [{id: k1, secret: %q}]}", name, name, more, name, keyOf(name))
}

func keyOf(name string) string { return "the key of tenant " + name }

// many are eleven tenants: acme, globex and others.
func many(more ...string) []string {
	list := []string{tenant("acme", ""), tenant("globex", "hosts: [globex.example.com],")}
	for i := range 9 {
		list = append(list, tenant(fmt.Sprintf("other%d", i), ""))
	}
	return append(list, more...)
}

func startTenants(t testing.TB, solver *scripted, entries []string, change func(*server.Config)) (*fixture, *file) {
	t.Helper()
	all := &file{}
	all.write(t, entries...)
	f := start(t, solver, func(c *server.Config) {
		c.Tenants = all
		if change != nil {
			change(c)
		}
	})
	return f, all
}

func imageOf(name string) string { return `{"image":"ghcr.io/` + name + `/app:v1"}` }

// as signs a request with the key of a tenant.
func (f *fixture) as(t *testing.T, name string, body []byte, headers ...string) *http.Request {
	t.Helper()
	mac := signature.Sign([]byte(keyOf(name)), "", body)
	r := f.request(t, body, append([]string{api.SignatureHeader, mac}, headers...)...)
	if host := r.Header.Get("Host"); host != "" {
		r.Host = host
	}
	return r
}

// bodilessAs signs a request without a body with the key of a tenant.
func (f *fixture) bodilessAs(t *testing.T, name, method, target string, headers ...string) *http.Request {
	t.Helper()
	r := f.bodiless(t, method, target)
	r.Header.Set(api.SignatureHeader, signature.Sign([]byte(keyOf(name)), "", []byte(method+" "+target)))
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	return r
}

// varies matches what two answers to one request may differ in.
var varies = regexp.MustCompile(`"(duration|id|request)": ("[^"]*"|[0-9.e-]+)`)

func same(body string) string { return varies.ReplaceAllString(body, "$1") }

// TestWhose tries each way to say whose a request is, with eleven keys. Nothing but the key
// lets anybody in, and every refusal is one answer.
func TestWhose(t *testing.T) {
	f, _ := startTenants(t, &scripted{}, many(), nil)
	acme, other := pack(t, imageOf("acme")), pack(t, imageOf("nobody"))
	var zipped bytes.Buffer
	writeGzip(t, &zipped, acme)
	in := func(key, tenant string, tar []byte) []byte {
		text := map[string]string{"signature": signature.Sign([]byte(keyOf(key)), "", tar), "tar": base64.StdEncoding.EncodeToString(tar)}
		if tenant != "" {
			text["tenant"] = tenant
		}
		b, err := json.Marshal(text)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	envelope := func(body []byte, headers ...string) *http.Request {
		return f.request(t, body, append([]string{api.SignatureHeader, ""}, headers...)...)
	}
	const name, host, forwarded = api.TenantHeader, "Host", "X-Forwarded-Host"
	var refusal string
	for _, tt := range []struct {
		what   string
		r      *http.Request
		status int
	}{
		{"the image", f.as(t, "acme", acme), 200},
		{"the image, compressed", f.as(t, "acme", zipped.Bytes()), 200},
		{"the image of another key", f.as(t, "globex", acme), 401},
		{"the image of nobody", f.as(t, "acme", other), 401},
		{"no image", f.as(t, "acme", pack(t, `{"skipPush":true}`)), 401},
		{"no config", f.as(t, "acme", packTar(t, "context/x", "")), 401},
		{"no tar", f.as(t, "acme", []byte("x")), 401},
		{"a broken archive", f.as(t, "acme", append([]byte("\x1f\x8b"), zipped.Bytes()...)), 401},
		{"the name", f.as(t, "acme", acme, name, "acme"), 200},
		{"the name, without an image", f.as(t, "acme", pack(t, `{"skipPush":true}`), name, "acme"), 200},
		{"another's name", f.as(t, "acme", acme, name, "globex"), 401},
		{"an unknown name", f.as(t, "acme", acme, name, "acmee"), 401},
		{"the id for a name", f.as(t, "acme", acme, name, "t-acme"), 401},
		{"the host", f.as(t, "globex", pack(t, `{"skipPush":true}`), host, "GLOBEX.example.com.:443"), 200},
		{"the host before the gateway", f.as(t, "globex", pack(t, `{"skipPush":true}`), forwarded, "globex.example.com, 10.0.0.1"), 200},
		{"another's host", f.as(t, "acme", acme, host, "globex.example.com"), 401},
		{"a host of nobody, and the image", f.as(t, "acme", acme, host, "acme.example.com", forwarded, "gateway.example.com"), 200},
		{"the name before the host", f.as(t, "acme", acme, name, "acme", host, "globex.example.com"), 200},
		{"the host before the image", f.as(t, "globex", acme, host, "globex.example.com"), 403},
		{"the name in an envelope", envelope(in("acme", "acme", pack(t, `{"skipPush":true}`))), 200},
		{"another's name in an envelope", envelope(in("acme", "globex", acme)), 401},
		{"an unknown name in an envelope", envelope(in("acme", "acmee", acme)), 401},
		{"the name in an envelope before the host", envelope(in("acme", "acme", acme), host, "globex.example.com"), 200},
		{"the name in the header before that in an envelope", envelope(in("acme", "globex", acme), name, "acme"), 200},
		{"another's name in the header before that in an envelope", envelope(in("acme", "acme", acme), name, "globex"), 401},
		{"the image in an envelope", envelope(in("acme", "", acme)), 200},
		{"the image in a compressed envelope", envelope(in("acme", "", zipped.Bytes())), 200},
		{"the image of another in an envelope", envelope(in("globex", "", acme)), 401},
		{"the payload secret", f.request(t, acme), 401},
		{"the payload secret with a name", f.request(t, acme, name, "acme"), 401},
		{"a malformed signature", f.as(t, "acme", acme, api.SignatureHeader, "sha256=abc"), 401},
		{"a malformed signature with an unknown name", f.as(t, "acme", acme, api.SignatureHeader, "sha256=abc", name, "acmee"), 401},

		{"no body, by name", f.bodilessAs(t, "acme", "GET", "/builds/x", name, "acme"), 404},
		{"no body, unnamed", f.bodilessAs(t, "acme", "GET", "/builds/x"), 401},
		{"no body, by another name", f.bodilessAs(t, "acme", "GET", "/builds/x", name, "globex"), 401},
		{"no body, by an unknown name", f.bodilessAs(t, "acme", "GET", "/builds/x", name, "acmee"), 401},
		{"no body, the payload secret", f.bodiless(t, "GET", "/builds/x"), 401},
	} {
		a := f.do(t, tt.r)
		if a.status != tt.status {
			t.Errorf("%s: %d %s", tt.what, a.status, a.body)
			continue
		}
		if a.status != 401 {
			continue
		}
		if refusal == "" {
			refusal = a.body
		}
		if same(a.body) != same(refusal) || a.header.Get(api.SignatureHeader) != "" || !strings.Contains(a.body, name) {
			t.Errorf("%s: %s, signed %q", tt.what, a.body, a.header.Get(api.SignatureHeader))
		}
	}
}

// TestWhoseIsLost: a body that could not be stored cannot say whose it is. That is no fault of
// its sender.
func TestWhoseIsLost(t *testing.T) {
	f, _ := startTenants(t, &scripted{}, many(), func(c *server.Config) {
		c.Limits.Body, c.Limits.Unpacked = 8<<20, 8<<20
		c.SpoolMemory, c.TempDir = 2<<20, "/nowhere"
	})
	body := pack(t, imageOf("acme"), "context/x", strings.Repeat("x", 3<<20))
	for what, r := range map[string]*http.Request{"the image": f.as(t, "acme", body), "the name": f.as(t, "acme", body, api.TenantHeader, "acme")} {
		if a := f.do(t, r); a.status != 500 || a.rec.Code != api.Internal {
			t.Errorf("%s: %d %s", what, a.status, a.body)
		}
	}
}

// TestFewKeys: with at most eight keys, no request has to say whose it is.
func TestFewKeys(t *testing.T) {
	f, _ := startTenants(t, &scripted{}, many()[:8], func(c *server.Config) { c.Contexts = &inMemory{all: map[string][]byte{}} })
	body := packTar(t, "context/x", "x")
	put := func() *http.Request {
		r := f.context(t, "PUT", digestOf(body), body)
		r.Header.Set(api.SignatureHeader, signature.Sign([]byte(keyOf("acme")), "", body))
		return r
	}
	for what, tt := range map[string]struct {
		r      *http.Request
		status int
	}{
		"a build without an image": {f.as(t, "acme", pack(t, `{"skipPush":true}`)), 200},
		"another's image":          {f.as(t, "acme", pack(t, imageOf("globex"))), 403},
		"a verdict":                {f.bodilessAs(t, "globex", "GET", "/builds/x"), 404},
		"a context":                {put(), 201},
		"an unknown name":          {f.as(t, "acme", pack(t, imageOf("acme")), api.TenantHeader, "acmee"), 401},
	} {
		if a := f.do(t, tt.r); a.status != tt.status {
			t.Errorf("%s: %d %s", what, a.status, a.body)
		}
	}
	// With more, a context has to name its tenant. It cannot do so with an image.
	f, _ = startTenants(t, &scripted{}, many(), func(c *server.Config) { c.Contexts = &inMemory{all: map[string][]byte{}} })
	body = packTar(t, "context/x", "x", api.ConfigFile, imageOf("acme"))
	r := f.context(t, "PUT", digestOf(body), body)
	r.Header.Set(api.SignatureHeader, signature.Sign([]byte(keyOf("acme")), "", body))
	if a := f.do(t, r); a.status != 401 {
		t.Errorf("an unnamed context: %d %s", a.status, a.body)
	}
}

// TestKeysEnd: a key lets nobody in once it has ended, or has been taken out of the file, even
// while a body is on its way. Its refusal is that of a wrong key.
func TestKeysEnd(t *testing.T) {
	ended := fmt.Sprintf("acme: {id: t-acme, images: [ghcr.io/acme], keys: [{id: k1, secret: %q, until: %s}, {id: k2, secret: %q}]}",
		keyOf("acme"), time.Now().Add(-time.Second).UTC().Format(time.RFC3339), keyOf("new"))
	f, _ := startTenants(t, &scripted{}, many()[1:], nil)
	wrong := f.do(t, f.as(t, "nobody", pack(t, imageOf("acme")), api.TenantHeader, "globex"))
	f, all := startTenants(t, &scripted{}, append(many()[1:], ended), nil)
	for name, status := range map[string]int{"acme": 401, "new": 200} {
		for _, r := range []*http.Request{
			f.as(t, name, pack(t, imageOf("acme"))),
			f.as(t, name, pack(t, imageOf("acme")), api.TenantHeader, "acme"),
		} {
			a := f.do(t, r)
			if a.status != status || status == 401 && same(a.body) != same(wrong.body) {
				t.Errorf("%s: %d %s", name, a.status, a.body)
			}
		}
	}

	body := pack(t, imageOf("globex"))
	r := f.as(t, "globex", body, api.TenantHeader, "globex")
	r.Body = &changing{Reader: bytes.NewReader(body), change: func() { all.write(t, many()[2:]...) }}
	if a := f.do(t, r); a.status != 401 {
		t.Errorf("revoked on the way: %d %s", a.status, a.body)
	}
}

// changing is a body that calls change before its last bytes.
type changing struct {
	*bytes.Reader
	change func()
}

func (c *changing) Read(p []byte) (int, error) {
	if c.change != nil && c.Len() < 1024 {
		time.Sleep(50 * time.Millisecond) // so that what was read before has arrived
		c.change()
		c.change = nil
	}
	return c.Reader.Read(p[:min(len(p), 512)])
}

func (c *changing) Close() error { return nil }

// TestSuspended: a suspended tenant gets 403 on each route that is signed, and strangers still
// get 401.
func TestSuspended(t *testing.T) {
	solver := &scripted{}
	f, _ := startTenants(t, solver, append(many()[1:], tenant("acme", "suspended: true,")), func(c *server.Config) { c.Contexts = &inMemory{all: map[string][]byte{}} })
	body := packTar(t, "context/x", "x")
	put := f.context(t, "PUT", digestOf(body), body)
	put.Header.Set(api.TenantHeader, "acme")
	put.Header.Set(api.SignatureHeader, signature.Sign([]byte(keyOf("acme")), "", body))
	for what, r := range map[string]*http.Request{
		"a build":           f.as(t, "acme", pack(t, imageOf("acme"))),
		"a verdict":         f.bodilessAs(t, "acme", "GET", "/builds/x", api.TenantHeader, "acme"),
		"a context":         put,
		"a look for one":    f.bodilessAs(t, "acme", "HEAD", "/contexts/"+digestOf(body), api.TenantHeader, "acme"),
		"a stream":          f.as(t, "acme", pack(t, imageOf("acme")), "Accept", api.NDJSONType),
		"a stream of lines": f.as(t, "acme", pack(t, imageOf("acme")), "Accept", api.SSEType),
	} {
		a := f.do(t, r)
		if strings.HasPrefix(what, "a stream") {
			if a.status != 200 || !strings.Contains(a.body, `"code":"suspended"`) {
				t.Errorf("%s: %d %s", what, a.status, a.body)
			}
			continue
		}
		if a.status != 403 || r.Method != http.MethodHead && (a.rec.Code != api.Suspended || a.header.Get(api.SignatureHeader) != signature.Sign([]byte(keyOf("acme")), "", []byte(a.body))) {
			t.Errorf("%s: %d %s", what, a.status, a.body)
		}
	}
	if a := f.do(t, f.as(t, "globex", pack(t, imageOf("acme")))); a.status != 401 {
		t.Errorf("a stranger: %d %s", a.status, a.body)
	}
	if n := solver.calls.Load(); n > 0 {
		t.Errorf("%d builds", n)
	}
	if n := strings.Count(f.log.String(), `"tenant":"t-acme","key":"k1"`); n != 6 {
		t.Errorf("%d lines of the log name the tenant and the key: %s", n, f.log)
	}
}

// TestTenantsBodyLimit: a tenant's own limit on bodies is told only to the tenant.
func TestTenantsBodyLimit(t *testing.T) {
	f, _ := startTenants(t, &scripted{}, append(many()[1:], tenant("acme", "max_body_bytes: 3KiB,")), nil)
	large := pack(t, imageOf("acme"), "context/x", strings.Repeat("x", 4000))
	if a := f.do(t, f.as(t, "acme", large)); a.status != 413 || !strings.Contains(a.rec.Error, "3072") {
		t.Errorf("%d %s", a.status, a.body)
	}
	if a := f.do(t, f.as(t, "globex", large, api.TenantHeader, "acme")); a.status != 401 {
		t.Errorf("a stranger: %d %s", a.status, a.body)
	}
	if a := f.do(t, f.as(t, "acme", pack(t, imageOf("acme")))); a.status != 200 {
		t.Errorf("a small one: %d %s", a.status, a.body)
	}
}

// TestTenantsMay compares a request with what its tenant may do.
func TestTenantsMay(t *testing.T) {
	var solved *solve.Request
	solver := &scripted{solve: func(_ context.Context, req *solve.Request, _ solve.Log) (solve.Outcome, solve.Stats, error) {
		solved = req
		return solve.Outcome{Digest: "sha256:abc"}, solve.Stats{}, nil
	}}
	entries := many(
		tenant("arm", "platforms: [linux/arm64, linux/amd64],"),
		tenant("riscv", "platforms: [linux/riscv64],"),
		tenant("git", `context_hosts: [git.example.com], git_credentials: ["https://me:own-token@git.example.com"],`),
		tenant("rich", `memory: 1GiB, cpus: 2, build_timeout: 5m, from: ["docker.io/library/*"], registry: {auths: {r.example.com: {username: u, password: p}}},`),
		tenant("builders", "registry: builder, build_timeout: 5h,"),
		fmt.Sprintf("wide: {id: t-wide, images: [ghcr.io/wide, quay.io/wide], keys: [{id: k1, secret: %q}]}", keyOf("wide")),
	)
	f, _ := startTenants(t, solver, entries, func(c *server.Config) {
		c.AllowedImages = []string{"ghcr.io"}
		c.OwnRepositories = []string{"ghcr.io/acme/cache"}
		c.ContextHosts, c.BuildTimeout, c.DefaultPlatform = []string{"github.com"}, 10*time.Minute, "linux/amd64"
		c.GitCredentials = func() ([]byte, error) {
			return []byte("https://me:operators-token@github.com\nhttps://me:operators-token@git.example.com\n"), nil
		}
	})
	git := func(name, url string) string {
		return `{"image":"ghcr.io/` + name + `/app","context":{"git":"https://` + url + `"}}`
	}
	for _, tt := range []struct {
		name, config string
		code         api.Code
		holds        func(*solve.Request) bool
	}{
		{"acme", imageOf("globex"), api.Unauthorized, nil},
		{"acme", `{"image":"ghcr.io/acme/app","tags":["ghcr.io/globex/app:x"]}`, api.ImageForbidden, nil},
		{"wide", `{"image":"quay.io/wide/app"}`, api.ImageForbidden, nil},
		{"acme", `{"image":"ghcr.io/acme/cache"}`, api.ImageForbidden, nil},
		{"acme", `{"image":"ghcr.io/acme/app","platforms":["linux/s390x"]}`, "", nil},
		{"arm", `{"image":"ghcr.io/arm/app","platforms":["linux/s390x"]}`, api.PlatformForbidden, nil},
		{"arm", `{"image":"ghcr.io/arm/app","platforms":["linux/arm64","linux/s390x"]}`, api.PlatformForbidden, nil},
		{"arm", `{"image":"ghcr.io/arm/app","platforms":["linux/aarch64"]}`, "", func(r *solve.Request) bool { return r.Config.Platforms[0] == "linux/arm64" }},
		{"arm", `{"image":"ghcr.io/arm/app"}`, "", func(r *solve.Request) bool { return r.Config.Platforms[0] == "linux/amd64" }},
		{"riscv", `{"image":"ghcr.io/riscv/app"}`, "", func(r *solve.Request) bool { return r.Config.Platforms[0] == "linux/riscv64" }},
		{"acme", `{"image":"ghcr.io/acme/app"}`, "", func(r *solve.Request) bool {
			return len(r.Config.Platforms) == 0 && r.Tenant.BuildTimeout == 10*time.Minute
		}},
		// The installation's credentials go to nobody.
		{"acme", git("acme", "github.com/a/b"), "", func(r *solve.Request) bool { return r.GitAuthorization == "" }},
		{"acme", git("acme", "git.example.com/a/b"), api.ContextForbidden, nil},
		{"git", git("git", "github.com/a/b"), api.ContextForbidden, nil},
		{"git", git("git", "git.example.com/a/b"), "", func(r *solve.Request) bool {
			return r.GitAuthorization == "Basic "+base64.StdEncoding.EncodeToString([]byte("me:own-token")) && r.Tenant.Sources.Hosts[0] == "git.example.com"
		}},
		{"rich", imageOf("rich"), "", func(r *solve.Request) bool {
			s := r.Tenant.Sources
			return r.Tenant.ID == "t-rich" && r.Tenant.Key != "" && r.Tenant.Memory == 1<<30 && r.Tenant.CPUs == 2 && r.Tenant.BuildTimeout == 5*time.Minute && !r.Tenant.BuilderRegistry &&
				strings.Contains(string(r.Tenant.RegistryConfig), "r.example.com") && s.Images[0] == "ghcr.io/rich" && s.Own[0] == "ghcr.io/acme/cache" &&
				s.Others("ghcr.io/acme/app") && !s.Others("ghcr.io/rich/app") && s.From[0] == "docker.io/library/*" && s.Asked[0] == "r.example.com" && s.Hosts[0] == "github.com"
		}},
		{"builders", imageOf("builders"), "", func(r *solve.Request) bool {
			return r.Tenant.BuilderRegistry && r.Tenant.RegistryConfig == nil && r.Tenant.BuildTimeout == 10*time.Minute
		}},
	} {
		solved = nil
		body := pack(t, tt.config)
		if strings.Contains(tt.config, "git\"") {
			body = packTar(t, api.ConfigFile, tt.config)
		}
		a := f.do(t, f.as(t, tt.name, body))
		if a.rec.Code != tt.code || (solved != nil) != (tt.code == "") {
			t.Errorf("%s, %s: %d %s", tt.name, tt.config, a.status, a.body)
			continue
		}
		if tt.holds != nil && !tt.holds(solved) {
			t.Errorf("%s, %s: %+v, %+v", tt.name, tt.config, solved, solved.Tenant)
		}
	}
}

// TestTenantsAreApart: everything that isolates two builds of one repository's name differs
// between two tenants, and is the same for two keys of one tenant.
func TestTenantsAreApart(t *testing.T) {
	var solved []*solve.Request
	solver := &scripted{solve: func(_ context.Context, req *solve.Request, _ solve.Log) (solve.Outcome, solve.Stats, error) {
		solved = append(solved, req)
		return solve.Outcome{Digest: "sha256:abc"}, solve.Stats{}, nil
	}}
	two := fmt.Sprintf("acme: {id: t-acme, images: [ghcr.io/acme], keys: [{id: k1, secret: %q}, {id: k2, secret: %q}]}", keyOf("acme"), keyOf("new"))
	f, _ := startTenants(t, solver, append(many()[1:], two), nil)
	body := pack(t, `{"skipPush":true,"image":"ghcr.io/acme/app"}`)
	for i, who := range [][2]string{{"acme", "acme"}, {"new", "acme"}, {"globex", "globex"}} {
		if who[1] == "globex" {
			body = pack(t, `{"skipPush":true,"image":"ghcr.io/globex/app"}`)
		}
		if a := f.do(t, f.as(t, who[0], body, api.TenantHeader, who[1], api.CallIDHeader, fmt.Sprint("call", i), "User-Agent", "queue-worker")); a.status != 200 {
			t.Fatalf("%s: %d %s", who, a.status, a.body)
		}
	}
	acme, again, globex := solved[0], solved[1], solved[2]
	if acme.Hostname != again.Hostname || acme.CacheMountNS != again.CacheMountNS || acme.SharedKey != again.SharedKey || acme.Name.Body != again.Name.Body {
		t.Error("two keys of one tenant do not share a cache")
	}
	if acme.Hostname == globex.Hostname || acme.CacheMountNS == globex.CacheMountNS || acme.SharedKey == globex.SharedKey {
		t.Error("two tenants share a salt")
	}
}

// TestTenantsDeliveries: another key of the same tenant joins a delivery, and finds its verdict.
// Another tenant does neither.
func TestTenantsDeliveries(t *testing.T) {
	var asked []string
	solver := &scripted{find: func(_, call string) (*solve.Past, error) {
		asked = append(asked, call)
		return nil, nil
	}}
	two := fmt.Sprintf("acme: {id: t-acme, images: [ghcr.io], keys: [{id: k1, secret: %q}, {id: k2, secret: %q}]}", keyOf("acme"), keyOf("new"))
	entries := []string{two, fmt.Sprintf("globex: {id: t-globex, images: [quay.io], keys: [{id: k1, secret: %q}]}", keyOf("globex"))}
	f, _ := startTenants(t, solver, entries, nil)
	body := pack(t, `{"skipPush":true}`)
	deliver := func(name string) answer {
		return f.do(t, f.as(t, name, body, api.CallIDHeader, "one", "User-Agent", "queue-worker"))
	}
	deliver("acme")
	if deliver("new"); solver.calls.Load() != 1 {
		t.Errorf("%d builds for two keys", solver.calls.Load())
	}
	if deliver("globex"); solver.calls.Load() != 2 {
		t.Errorf("%d builds for two tenants", solver.calls.Load())
	}
	for name, status := range map[string]int{"acme": 200, "new": 200, "globex": 200} {
		if a := f.do(t, f.bodilessAs(t, name, "GET", "/builds/one")); a.status != status {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
	f.do(t, f.as(t, "acme", body, api.CallIDHeader, "two", "User-Agent", "queue-worker"))
	for _, name := range []string{"globex", "globex", "acme", "new"} {
		want := 404
		if name != "globex" {
			want = 200
		}
		if a := f.do(t, f.bodilessAs(t, name, "GET", "/builds/two")); a.status != want {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
	// The daemons are asked for the tenant's name of the call.
	for _, name := range []string{"acme", "new", "globex"} {
		f.do(t, f.bodilessAs(t, name, "GET", "/builds/three"))
	}
	if n := len(asked); asked[n-3] != asked[n-2] || asked[n-2] == asked[n-1] {
		t.Errorf("asked for %q", asked[n-3:])
	}
}

// TestTenantsContexts: a context that one tenant has sent ahead is not there for another.
func TestTenantsContexts(t *testing.T) {
	f, _ := startTenants(t, &scripted{}, many()[:3], func(c *server.Config) { c.Contexts = &inMemory{all: map[string][]byte{}} })
	body := packTar(t, "context/Dockerfile", "FROM scratch\n")
	put := f.context(t, "PUT", digestOf(body), body)
	put.Header.Set(api.SignatureHeader, signature.Sign([]byte(keyOf("acme")), "", body))
	if a := f.do(t, put); a.status != 201 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	for name, want := range map[string][2]int{"acme": {200, 200}, "globex": {404, 400}} {
		if a := f.do(t, f.bodilessAs(t, name, "HEAD", "/contexts/"+digestOf(body))); a.status != want[0] {
			t.Errorf("%s: HEAD %d", name, a.status)
		}
		asks := packTar(t, api.ConfigFile, `{"skipPush":true,"context":{"digest":"`+digestOf(body)+`"}}`)
		if a := f.do(t, f.as(t, name, asks)); a.status != want[1] {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
}

// TestTenantsSecrets: an envelope of secrets that is sealed for one tenant cannot be opened in
// another's tar. A key for nobody looks like a tenant's, and stays as it is.
func TestTenantsSecrets(t *testing.T) {
	public, private, err := seal.GenerateKeyPair()
	if err != nil {
		t.Fatal(err)
	}
	f, all := startTenants(t, &scripted{}, many(), func(c *server.Config) {
		c.BuildSecretsKey = func() ([]byte, error) { return private, nil }
	})
	get := func(headers ...string) (answer, sealed.PublicKey) {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, f.URL+"/publickey", nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(headers); i += 2 {
			if r.Header.Set(headers[i], headers[i+1]); headers[i] == "Host" {
				r.Host = headers[i+1]
			}
		}
		a := f.do(t, r)
		var key sealed.PublicKey
		json.Unmarshal([]byte(a.body), &key)
		return a, key
	}
	keys := make(map[string]string)
	for what, headers := range map[string][]string{
		"acme": {api.TenantHeader, "acme"}, "globex": {"Host", "globex.example.com"}, "nobody": {api.TenantHeader, "nobody"}, "nobody else": {api.TenantHeader, "none"},
	} {
		a, key := get(headers...)
		_, again := get(headers...)
		raw, err := base64.StdEncoding.DecodeString(key.PublicKey)
		if a.status != 200 || key != again || key.Algorithm != "nacl/box" || len(raw) != 32 || err != nil || len(key.KeyID) == 0 {
			t.Errorf("%s: %d %s, then %+v", what, a.status, a.body, again)
		}
		for other, have := range keys {
			if have == key.PublicKey {
				t.Errorf("%s and %s have one key", what, other)
			}
		}
		keys[what] = key.PublicKey
	}
	if _, byName := get(api.TenantHeader, "globex"); byName.PublicKey != keys["globex"] {
		t.Error("globex has another key at its host")
	}
	if a, _ := get(); a.status != 404 || !strings.Contains(a.rec.Error, api.TenantHeader) {
		t.Errorf("unnamed: %d %s", a.status, a.body)
	}

	for what, tt := range map[string]struct {
		key string
		ok  bool
	}{"acme's": {keys["acme"], true}, "globex's": {keys["globex"], false}, "the installation's": {string(public), false}, "nobody's": {keys["nobody"], false}} {
		envelope, err := seal.Seal([]byte(tt.key), map[string][]byte{"token": []byte("value")})
		if err != nil {
			t.Fatal(err)
		}
		a := f.do(t, f.as(t, "acme", pack(t, imageOf("acme"), api.SecretsFile, string(envelope))))
		if (a.status == 200) != tt.ok || !tt.ok && a.rec.Code != api.BadSecrets {
			t.Errorf("sealed to %s key: %d %s", what, a.status, a.body)
		}
	}
	// A tenant's name can change, and its key stays.
	all.write(t, strings.Replace(many()[0], "acme:", "acme-inc:", 1))
	if a, key := get(); a.status != 200 || key.PublicKey != keys["acme"] {
		t.Errorf("the only tenant, unnamed: %d %s", a.status, a.body)
	}
	if _, key := get(api.TenantHeader, "acme"); key.PublicKey == keys["acme"] {
		t.Error("the old name still answers")
	}
}

// TestTenantsReady: without a file that can be read, or without the root of all salts, nothing
// is ready. The key of the payload secret is never a way in.
func TestTenantsReady(t *testing.T) {
	payloadSecret := secret
	f, all := startTenants(t, &scripted{}, many(), func(c *server.Config) {
		c.PayloadSecret = func() ([]byte, error) { return []byte(payloadSecret), nil }
	})
	get := func() answer {
		r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, f.URL+"/ready", nil)
		return f.do(t, r)
	}
	if a := get(); a.status != 200 {
		t.Errorf("%d %s", a.status, a.body)
	}
	all.err = &api.Error{Code: api.NotReady, Msg: "the file of tenants is wrong", Err: errors.New("line 3")}
	if a := get(); a.status != 503 || !strings.Contains(a.body, "the file of tenants is wrong") || strings.Contains(a.body, "line 3") {
		t.Errorf("without tenants: %d %s", a.status, a.body)
	}
	for what, r := range map[string]*http.Request{"a tenant": f.as(t, "acme", pack(t, imageOf("acme"))), "the payload secret": f.request(t, pack(t, config))} {
		if a := f.do(t, r); a.status != 503 || a.rec.Code != api.NotReady {
			t.Errorf("%s: %d %s", what, a.status, a.body)
		}
	}
	all.err, payloadSecret = nil, "short"
	if a := get(); a.status != 503 || !strings.Contains(a.body, "16 bytes") {
		t.Errorf("without a root: %d %s", a.status, a.body)
	}
	if a := f.do(t, f.as(t, "acme", pack(t, imageOf("acme")))); a.status != 503 {
		t.Errorf("without a root: %d %s", a.status, a.body)
	}
}

// TestWithoutFile: without a file of tenants, the hints mean nothing, and the log names nobody.
func TestWithoutFile(t *testing.T) {
	var solved *solve.Request
	solver := &scripted{solve: func(_ context.Context, req *solve.Request, _ solve.Log) (solve.Outcome, solve.Stats, error) {
		solved = req
		return solve.Outcome{Digest: "sha256:abc"}, solve.Stats{}, nil
	}}
	requests := func(f *fixture) map[string]*http.Request {
		body := pack(t, config)
		text := bytes.Replace(envelope(signature.Sign([]byte(secret), "", body), body), []byte("{"), []byte(`{"tenant":"acme",`), 1)
		return map[string]*http.Request{
			"a header": f.request(t, body, api.TenantHeader, "acme", "X-Forwarded-Host", "globex.example.com"), "an envelope": f.request(t, text, api.SignatureHeader, ""),
		}
	}
	for what, all := range map[string]server.Tenants{"nil": nil, "no file": &file{}, "one tenant": &file{set: tenants.Single([][]byte{[]byte("another key, not used")})}} {
		f := start(t, solver, func(c *server.Config) { c.Tenants = all })
		for hint, r := range requests(f) {
			if a := f.do(t, r); a.status != 200 || solved.Tenant != nil {
				t.Errorf("%s, %s: %d %s, %+v", what, hint, a.status, a.body, solved.Tenant)
			}
		}
		f.do(t, f.request(t, pack(t, "{")))
		if log := f.log.String(); strings.Contains(log, `"tenant"`) || strings.Contains(log, `"key"`) {
			t.Errorf("%s: %s", what, log)
		}
	}
}

// TestTenantsLog: every line after the signature names the tenant and the key.
func TestTenantsLog(t *testing.T) {
	f, _ := startTenants(t, &scripted{}, many(), func(c *server.Config) { c.Contexts = &inMemory{all: map[string][]byte{}} })
	body := packTar(t, "context/x", "x")
	put := f.context(t, "PUT", digestOf(body), body)
	put.Header.Set(api.TenantHeader, "acme")
	put.Header.Set(api.SignatureHeader, signature.Sign([]byte(keyOf("acme")), "", body))
	for _, r := range []*http.Request{
		f.as(t, "acme", pack(t, imageOf("acme")), api.CallIDHeader, "a", "User-Agent", "queue-worker"),
		f.as(t, "acme", pack(t, imageOf("acme")), api.CallIDHeader, "a", "User-Agent", "queue-worker"),
		f.as(t, "acme", pack(t, `{"image":"ghcr.io/acme/app","x":`)),
		put,
	} {
		f.do(t, r)
	}
	f.s.Shutdown() // so that all lines are there
	counts := make(map[string]int)
	for line := range strings.Lines(f.log.String()) {
		var l struct{ Message, Tenant, Key string }
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatal(err)
		}
		if counts[l.Message]++; l.Tenant != "t-acme" || l.Key != "k1" {
			t.Errorf("names nobody: %s", line)
		}
	}
	if want := map[string]int{"build started": 1, "usage": 2, "build ended": 2, "build joined": 1, "context received": 1}; !maps.Equal(counts, want) {
		t.Errorf("lines %v, want %v", counts, want)
	}
}
