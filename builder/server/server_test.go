package server_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/seal"
	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/payload"
	"handler/function/records/memory"
	"handler/function/server"
	"handler/function/signature"
	"handler/function/solve"
)

// scripted is a Solver that does what a test says. These tests run while the image is built,
// where there is no daemon. The tests module has real daemons.
type scripted struct {
	solve func(ctx context.Context, req *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error)
	find  func(pool, call string) (*solve.Past, error)
	calls atomic.Int64

	pushed  func(t *solve.Tenant, daemon, ref, image string) (string, error)
	running func(tenant string) int // nil does not count
	lone    bool                    // does not say that it counts
}

func (s *scripted) Solve(ctx context.Context, req *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error) {
	s.calls.Add(1)
	if s.solve == nil {
		return solve.Outcome{Digest: "sha256:abc"}, solve.Stats{}, nil
	}
	return s.solve(ctx, req, log)
}

func (s *scripted) Find(_ context.Context, pool, call string) (*solve.Past, error) {
	if s.find == nil {
		return nil, nil
	}
	return s.find(pool, call)
}

func (s *scripted) Pushed(_ context.Context, t *solve.Tenant, daemon, ref, image string) (string, error) {
	return s.pushed(t, daemon, ref, image)
}

func (s *scripted) Counted(pool string) bool { return s.running != nil && !s.lone }

func (s *scripted) Running(context.Context) func(tenant string) int { return s.running }

func (s *scripted) Daemons(context.Context) solve.Daemons {
	return solve.Daemons{Total: 1, Reachable: 1}
}

const secret = "the-payload-secret"

type fixture struct {
	*httptest.Server
	s      *server.Server
	solver *scripted
	log    *syncBuffer
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func start(t testing.TB, solver *scripted, change func(*server.Config)) *fixture {
	t.Helper()
	log := new(syncBuffer)
	cfg := server.Config{
		Solver:          solver,
		Records:         memory.New(memory.Default),
		PayloadSecret:   func() ([]byte, error) { return []byte(secret), nil },
		BuildSecretsKey: func() ([]byte, error) { return nil, nil },
		GitCredentials:  func() ([]byte, error) { return nil, nil },
		Limits: payload.Limits{
			Body: 1 << 20, Unpacked: 1 << 20, Entries: 100, Path: 200, Names: 1 << 16, Config: 1 << 16, Secrets: 1 << 16,
		},
		SpoolMemory: 1 << 16, TempDir: t.TempDir(), SpoolBytes: 1 << 30,
		MaxBuilds: 2, MaxUploads: 4,
		QueueWait: limit, BuildTimeout: limit, ShutdownTimeout: limit,
		UploadMinRate: 1 << 16, UploadGrace: 5 * time.Second,
		Version: "test", Log: zerolog.New(log),
	}
	if change != nil {
		change(&cfg)
	}
	f := &fixture{s: server.New(cfg), solver: solver, log: log}
	f.Server = httptest.NewServer(f.s)
	t.Cleanup(f.Close)
	return f
}

// pack makes a tar of a config, a Dockerfile, and more name, content pairs.
func pack(t testing.TB, config string, more ...string) []byte {
	t.Helper()
	return packTar(t, append([]string{"context/Dockerfile", "FROM scratch\n", api.ConfigFile, config}, more...)...)
}

// packTar makes a tar of name, content pairs.
func packTar(t testing.TB, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		if err := w.WriteHeader(&tar.Header{Name: files[i], Mode: 0o644, Size: int64(len(files[i+1]))}); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, files[i+1])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

const config = `{"image":"ghcr.io/acme/app:v1"}`

func (f *fixture) request(t testing.TB, body []byte, headers ...string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, f.URL+"/build", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set(api.SignatureHeader, signature.Sign([]byte(secret), "", body))
	for i := 0; i < len(headers); i += 2 {
		r.Header.Del(headers[i])
		if headers[i+1] != "" {
			r.Header.Set(headers[i], headers[i+1])
		}
	}
	return r
}

type answer struct {
	status int
	header http.Header
	body   string
	rec    api.Record
}

func (f *fixture) do(t testing.TB, r *http.Request) answer {
	t.Helper()
	res, err := f.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	a := answer{status: res.StatusCode, header: res.Header, body: string(body)}
	lines := strings.Split(strings.TrimSpace(a.body), "\n")
	if strings.HasPrefix(res.Header.Get("Content-Type"), api.NDJSONType) {
		body = []byte(lines[len(lines)-1])
	}
	if r.Method != http.MethodHead && strings.Contains(res.Header.Get("Content-Type"), "json") {
		if err := json.Unmarshal(body, &a.rec); err != nil {
			t.Fatalf("%v in %s", err, body)
		}
	}
	return a
}

// envelope is the text form of a body.
func envelope(sig string, body []byte) []byte {
	return fmt.Appendf(nil, `{"signature":%q,"tar":%q}`, sig, base64.StdEncoding.EncodeToString(body))
}

func TestRoutes(t *testing.T) {
	f := start(t, &scripted{}, nil)
	for _, tt := range []struct {
		method, path string
		status       int
		holds        string
	}{
		{"GET", "/", 200, `"name": "builder"`},
		{"HEAD", "/", 200, ""},
		{"GET", "/healthz", 200, "ok"},
		{"GET", "/ready", 200, "ready"},
		{"GET", "/metrics", 200, "builder_daemons_reachable 1"},
		{"GET", "/publickey", 404, `"code": "not_found"`},
		{"GET", "/build", 405, `"code": "method_not_allowed"`},
		{"PUT", "/", 405, `"status": "failed"`},
		{"POST", "/ready", 405, ""},
		{"GET", "/debug/requests", 404, `"status": "failed"`},
		{"GET", "/debug/pprof/", 404, ""},
		{"POST", "/build/", 404, ""},
		{"POST", "//build", 404, ""},
		{"POST", "/x/../build", 404, ""},
	} {
		r, err := http.NewRequestWithContext(t.Context(), tt.method, f.URL+tt.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set(api.CallIDHeader, "call-1")
		a := f.do(t, r)
		if a.status != tt.status || !strings.Contains(a.body, tt.holds) {
			t.Errorf("%s %s: %d %s, want %d with %q", tt.method, tt.path, a.status, a.body, tt.status, tt.holds)
		}
		if a.header.Get(api.CallIDHeader) != "call-1" {
			t.Errorf("%s %s: no X-Call-Id", tt.method, tt.path)
		}
	}
	if n := f.solver.calls.Load(); n != 0 {
		t.Errorf("%d solves", n)
	}
}

func TestReady(t *testing.T) {
	var content []byte
	var failure error
	f := start(t, &scripted{}, func(c *server.Config) {
		c.PayloadSecret = func() ([]byte, error) { return content, failure }
	})
	get := func() answer {
		r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, f.URL+"/ready", nil)
		return f.do(t, r)
	}
	failure = os.ErrNotExist
	if a := get(); a.status != 503 || !strings.Contains(a.body, "cannot be read") {
		t.Errorf("without a secret: %d %s", a.status, a.body)
	}
	failure, content = nil, []byte(" \n")
	if a := get(); a.status != 503 || !strings.Contains(a.body, "no key") {
		t.Errorf("with an empty secret: %d %s", a.status, a.body)
	}
	content = []byte("fifteen bytes..\n")
	if a := get(); a.status != 503 || !strings.Contains(a.body, "16 bytes") {
		t.Errorf("with a short secret: %d %s", a.status, a.body)
	}
	content = []byte("sixteen bytes...\n")
	if a := get(); a.status != 200 {
		t.Errorf("with a secret: %d %s", a.status, a.body)
	}
	f.s.Shutdown()
	if a := get(); a.status != 503 || !strings.Contains(a.body, "shutting down") {
		t.Errorf("shutting down: %d %s", a.status, a.body)
	}
}

func TestPublicKey(t *testing.T) {
	public, private, err := seal.GenerateKeyPair()
	if err != nil {
		t.Fatal(err)
	}
	f := start(t, &scripted{}, func(c *server.Config) {
		c.BuildSecretsKey = func() ([]byte, error) { return private, nil }
	})
	r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, f.URL+"/publickey", nil)
	a := f.do(t, r)
	var got struct {
		KeyID, Algorithm string
		PublicKey        string `json:"public_key"`
	}
	if err := json.Unmarshal([]byte(a.body), &got); err != nil || a.status != 200 || got.PublicKey != string(public) || got.Algorithm != "nacl/box" {
		t.Errorf("%d %s", a.status, a.body)
	}
	if strings.Contains(a.body, string(private)) {
		t.Error("the private key is in the answer")
	}
}

// TestUnreadablePublicKey: the log has the cause, because the answer refers to it.
func TestUnreadablePublicKey(t *testing.T) {
	f := start(t, &scripted{}, func(c *server.Config) {
		c.BuildSecretsKey = func() ([]byte, error) { return nil, errors.New("the disk fails") }
	})
	r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, f.URL+"/publickey", nil)
	r.Header.Set(api.CallIDHeader, "call-1")
	a := f.do(t, r)
	if a.status != 500 || a.rec.Code != api.Internal || strings.Contains(a.body, "disk") {
		t.Errorf("%d %s", a.status, a.body)
	}
	f.wantRefusal(t, "call-1", api.Internal, "error", "the disk fails")
}

// wantRefusal wants one line about a refused call in the log, and one refusal with its code in
// the metrics.
func (f *fixture) wantRefusal(t *testing.T, id string, code api.Code, level, cause string) {
	t.Helper()
	var lines []string
	for line := range strings.Lines(f.log.String()) {
		if strings.Contains(line, `"request refused"`) && strings.Contains(line, fmt.Sprintf(`"call_id":%q`, id)) {
			lines = append(lines, line)
		}
	}
	if len(lines) != 1 || !strings.Contains(lines[0], fmt.Sprintf(`"code":%q`, code)) ||
		!strings.Contains(lines[0], fmt.Sprintf(`"level":%q`, level)) || !strings.Contains(lines[0], cause) {
		t.Errorf("%s is in the log as %q, want one line with level %s, code %s and %q", id, lines, level, code, cause)
	}
	if series := fmt.Sprintf("builder_requests_refused_total{code=%q} 1\n", code); !strings.Contains(f.metrics(t), series) {
		t.Errorf("the metrics lack %q", series)
	}
}

// TestSignedRefusals: a signed request that is refused is logged and counted. The answer that a
// build or a context is not there is no refusal.
func TestSignedRefusals(t *testing.T) {
	trouble := &api.Error{Code: api.RegistryFailed, Msg: "503"}
	solver := &scripted{find: func(_, _ string) (*solve.Past, error) { return nil, nil }}
	store := &inMemory{}
	f := start(t, solver, func(c *server.Config) { c.Contexts = store })
	ask := func(r *http.Request, id string, status int) {
		t.Helper()
		r.Header.Set(api.CallIDHeader, id)
		if a := f.do(t, r); a.status != status {
			t.Errorf("%s: %d %s, want %d", id, a.status, a.body, status)
		}
	}
	ask(f.bodiless(t, "GET", "/builds/none"), "none", 404)
	ask(f.bodiless(t, "HEAD", "/contexts/"+digestOf(nil)), "no-context", 404)
	if log := f.log.String(); strings.Contains(log, "refused") || strings.Contains(f.metrics(t), `builder_requests_refused_total{code="not_found"}`) {
		t.Errorf("what is not there is a refusal: %s", log)
	}
	solver.find = func(_, _ string) (*solve.Past, error) {
		return nil, &api.Error{Code: api.NoDaemon, Msg: "none", Err: errors.New("detail")}
	}
	ask(f.bodiless(t, "GET", "/builds/lost"), "x", 503)
	f.wantRefusal(t, "lost", api.NoDaemon, "warn", "detail")
	solver.find = func(_, _ string) (*solve.Past, error) { return nil, errors.New("a defect") }
	ask(f.bodiless(t, "GET", "/builds/defect"), "x", 500)
	f.wantRefusal(t, "defect", api.Internal, "error", "a defect")
	store.err = trouble
	ask(f.bodiless(t, "HEAD", "/contexts/"+digestOf(nil)), "registry", 503)
	f.wantRefusal(t, "registry", api.RegistryFailed, "warn", "503")
	ask(f.bodiless(t, "HEAD", "/contexts/sha256:abc"), "digest", 400)
	f.wantRefusal(t, "digest", api.BadContext, "warn", "abc")

	// What a daemon said to a client that has left is no defect.
	gone, leave := context.WithCancel(t.Context())
	leave()
	f.s.ServeHTTP(httptest.NewRecorder(), f.bodiless(t, "GET", "/builds/gone").WithContext(gone))
	f.wantRefusal(t, "gone", api.Canceled, "warn", "a defect")
}

func (f *fixture) metrics(t *testing.T) string {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, f.URL+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	return f.do(t, r).body
}

func TestBuild(t *testing.T) {
	solver := &scripted{solve: func(_ context.Context, req *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error) {
		log("v: one", "l: two")
		return solve.Outcome{Digest: "sha256:abc", Tags: []string{"x"}, Platforms: []string{"linux/amd64"}, Warnings: []string{"solver's"}}, solve.Stats{}, nil
	}}
	f := start(t, solver, nil)
	for _, path := range []string{"/", "/build", "/build?x=1"} {
		for _, accept := range []string{"", "application/x-ndjson"} {
			r := f.request(t, pack(t, `{"image":"ghcr.io/acme/app:v1","odd":1}`, "beside", "x"), "Accept", accept)
			r.URL, _ = r.URL.Parse(path)
			a := f.do(t, r)
			if a.status != 200 || a.rec.Status != api.Success || a.rec.Digest != "sha256:abc" ||
				a.rec.Image != "ghcr.io/acme/app:v1" || a.rec.ImageName != a.rec.Image || a.rec.Code != "" {
				t.Errorf("%s, %q: %d %s", path, accept, a.status, a.body)
			}
			if w := strings.Join(a.rec.Warnings, "\n"); !strings.Contains(w, "beside") || !strings.Contains(w, "odd") || !strings.Contains(w, "solver's") {
				t.Errorf("%s, %q: warnings %q", path, accept, a.rec.Warnings)
			}
			if accept == "" {
				if got, want := a.header.Get(api.SignatureHeader), signature.Sign([]byte(secret), "", []byte(a.body)); got != want {
					t.Errorf("the answer is signed %q, want %q", got, want)
				}
				if strings.Join(a.rec.Log, "|") != "v: one|l: two" {
					t.Errorf("log %q", a.rec.Log)
				}
			}
		}
	}
	for _, want := range []string{`"build started"`, `"build ended"`, `"sha256":"`, `"outcome":"success"`, `"digest":"sha256:abc"`} {
		if !strings.Contains(f.log.String(), want) {
			t.Errorf("the log lacks %s", want)
		}
	}
}

func TestIsolationOfRequests(t *testing.T) {
	var reqs []*solve.Request
	solver := &scripted{solve: func(_ context.Context, req *solve.Request, _ solve.Log) (solve.Outcome, solve.Stats, error) {
		reqs = append(reqs, req)
		return solve.Outcome{}, solve.Stats{}, nil
	}}
	f := start(t, solver, nil)
	for _, c := range []string{
		`{"image":"acme/app:v1"}`, `{"image":"docker.io/acme/app:v2"}`, `{"image":"acme/api:v1"}`,
		`{"skipPush":true}`, `{"skipPush":true}`,
	} {
		if a := f.do(t, f.request(t, pack(t, c))); a.status != 200 {
			t.Fatalf("%s: %s", c, a.body)
		}
	}
	if reqs[0].SharedKey != reqs[1].SharedKey {
		t.Error("two tags of one repository have two shared keys")
	}
	for _, pair := range [][2]int{{0, 2}, {0, 3}, {3, 4}} {
		if reqs[pair[0]].SharedKey == reqs[pair[1]].SharedKey {
			t.Errorf("builds %v have one shared key", pair)
		}
	}
	if reqs[0].Hostname == "" || reqs[0].CacheMountNS == "" || reqs[0].Hostname != reqs[2].Hostname {
		t.Errorf("host names %q and %q, cache namespace %q", reqs[0].Hostname, reqs[2].Hostname, reqs[0].CacheMountNS)
	}
}

func TestSignatures(t *testing.T) {
	var mu sync.Mutex
	content := secret
	f := start(t, &scripted{}, func(c *server.Config) {
		c.PayloadSecret = func() ([]byte, error) {
			mu.Lock()
			defer mu.Unlock()
			return []byte(content), nil
		}
	})
	good := pack(t, config)
	sign := func(key string, body []byte) string { return signature.Sign([]byte(key), "", body) }
	bodies := map[string][]byte{
		"good": good, "cut": good[:len(good)-600], "not a tar": []byte("hello"), "empty": {},
		"bad config": pack(t, `{"image":1}`), "bad gzip": {0x1f, 0x8b, 1}, "gzip magic alone": {0x1f, 0x8b},
	}
	for name, body := range bodies {
		for _, tt := range []struct {
			name   string
			values []string
		}{
			{"missing", nil},
			{"wrong", []string{sign("another key", body)}},
			{"truncated", []string{sign(secret, body)[:40]}},
			{"doubled", []string{sign(secret, body), sign(secret, body)}},
			{"sha1", []string{"sha1=" + sign(secret, body)[7:47]}},
			{"of another body", []string{sign(secret, append([]byte("x"), body...))}},
			{"of the empty key", []string{sign("", body)}},
		} {
			r := f.request(t, body)
			r.Header[api.SignatureHeader] = tt.values
			if a := f.do(t, r); a.status != 401 || a.rec.Code != api.Unauthorized || a.header.Get(api.SignatureHeader) != "" {
				t.Errorf("%s, %s: %d %s", name, tt.name, a.status, a.body)
			}
			// A text envelope, beside a good header that is ignored.
			sig := ""
			if len(tt.values) == 1 {
				sig = tt.values[0]
			}
			if tt.name == "doubled" {
				continue
			}
			env := envelope(sig, body)
			if a := f.do(t, f.request(t, env)); a.status != 401 {
				t.Errorf("%s, %s, in an envelope: %d %s", name, tt.name, a.status, a.body)
			}
		}
	}
	// An envelope without a signature beside a header has a message of its own, whatever the
	// envelope and the header hold.
	for name, body := range map[string]string{
		"an envelope":          fmt.Sprintf(`{"tar":%q}`, base64.StdEncoding.EncodeToString(good)),
		"an empty signature":   `{"signature":"","tar":""}`,
		"no text":              `{"signature":1,"tar":""}`,
		"a config":             config,
		"a large one":          `{"tar":"` + strings.Repeat("AAAA", 1<<17) + `"}`,
		"no JSON":              "{",
		"a secret of its own":  `{"secret":"` + secret + `"}`,
		"a bad tar in base64":  `{"tar":"*"}`,
		"something else in it": `{"tar":"","tar":""}`,
	} {
		for what, values := range map[string][]string{
			"right": {sign(secret, []byte(body))}, "wrong": {sign("another key", []byte(body))}, "of the tar": {sign(secret, good)},
			"malformed": {"x"}, "empty": {""}, "doubled": {sign(secret, []byte(body)), sign(secret, []byte(body))},
		} {
			r := f.request(t, []byte(body))
			r.Header[api.SignatureHeader] = values
			a := f.do(t, r)
			const want = `the request is not signed with the payload secret: a body that begins with { is taken for a text envelope, ` +
				`which carries its signature inside, as "signature", and has none; a header X-Build-Signature beside it is ignored`
			if a.status != 401 || a.rec.Code != api.Unauthorized || a.rec.Error != want || a.header.Get(api.SignatureHeader) != "" {
				t.Errorf("%s, header %s: %d %s", name, what, a.status, a.body)
			}
		}
		if a := f.do(t, f.request(t, []byte(body), api.SignatureHeader, "")); a.status != 401 || a.rec.Error != "the request is not signed with the payload secret" {
			t.Errorf("%s without a header: %d %s", name, a.status, a.body)
		}
	}
	if n := f.solver.calls.Load(); n != 0 {
		t.Errorf("%d solves of unsigned bodies", n)
	}
	if a := f.do(t, f.request(t, envelope(sign(secret, good), good), api.SignatureHeader, "", "Content-Type", "text/plain")); a.status != 200 {
		t.Errorf("signed envelope: %d %s", a.status, a.body)
	}

	rotate := func(s string) { mu.Lock(); content = s; mu.Unlock() }
	for _, tt := range []struct {
		file, key string
		status    int
	}{
		{"another-payload-secret\n" + secret + "\n", "another-payload-secret", 200},
		{"another-payload-secret\n" + secret + "\n", secret, 200},
		{"another-payload-secret\n" + secret + "\n", "another-payload-secret\n" + secret, 200},
		{"another-payload-secret\n", secret, 401},
		{"", "", 401},
		{"\n", "\n", 401},
	} {
		rotate(tt.file)
		a := f.do(t, f.request(t, good, api.SignatureHeader, sign(tt.key, good)))
		if a.status != tt.status {
			t.Errorf("file %q, key %q: %d %s", tt.file, tt.key, a.status, a.body)
		}
		if tt.status == 200 && a.header.Get(api.SignatureHeader) != sign(tt.key, []byte(a.body)) {
			t.Errorf("file %q, key %q: the answer is signed with another key", tt.file, tt.key)
		}
	}
}

func TestDisableHMAC(t *testing.T) {
	f := start(t, &scripted{}, func(c *server.Config) {
		c.DisableHMAC = true
		c.FallbackSecret = []byte("x")
		c.PayloadSecret = func() ([]byte, error) { return nil, os.ErrNotExist }
	})
	if a := f.do(t, f.request(t, pack(t, config), api.SignatureHeader, "")); a.status != 200 {
		t.Errorf("%d %s", a.status, a.body)
	}
}

func TestStatusCodes(t *testing.T) {
	public, private, err := seal.GenerateKeyPair()
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := seal.Seal(public, map[string][]byte{"token": []byte("a secret value")})
	if err != nil {
		t.Fatal(err)
	}
	fails := func(code api.Code) func(context.Context, *solve.Request, solve.Log) (solve.Outcome, solve.Stats, error) {
		return func(context.Context, *solve.Request, solve.Log) (solve.Outcome, solve.Stats, error) {
			return solve.Outcome{}, solve.Stats{}, &api.Error{Code: code, Msg: "a secret value did it", Err: errors.New("cause: a secret value")}
		}
	}
	body := pack(t, config)
	for _, tt := range []struct {
		name   string
		body   []byte
		solve  func(context.Context, *solve.Request, solve.Log) (solve.Outcome, solve.Stats, error)
		status int
		code   api.Code
	}{
		{"bad tar", []byte("x"), nil, 400, api.BadTar},
		{"bad config", pack(t, "{}"), nil, 400, api.BadConfig},
		{"no context", packTar(t, api.ConfigFile, config), nil, 400, api.BadTar},
		{"context beside", packTar(t, api.ConfigFile, config, "contexts/a", ""), nil, 400, api.BadTar},
		{"two contexts", pack(t, `{"image":"ghcr.io/acme/app","context":{"digest":"sha256:`+strings.Repeat("a", 64)+`"}}`), nil, 400, api.BadConfig},
		{"no repository for contexts", packTar(t, api.ConfigFile, `{"image":"ghcr.io/acme/app","context":{"digest":"sha256:`+strings.Repeat("a", 64)+`"}}`), nil, 400, api.BadContext},
		{"bad secrets", pack(t, config, api.SecretsFile, "x"), nil, 400, api.BadSecrets},
		{"the builder's own repository", pack(t, `{"image":"ghcr.io/acme/cache:mine"}`), nil, 403, api.ImageForbidden},
		{"forbidden image", pack(t, `{"image":"ghcr.io/evil/app"}`), nil, 403, api.ImageForbidden},
		{"large body", make([]byte, 1<<20+1), nil, 413, api.TooLarge},
		{"build failed", body, fails(api.BuildFailed), 422, api.BuildFailed},
		{"registry denied", body, fails(api.RegistryDenied), 422, api.RegistryDenied},
		{"deadline", body, fails(api.Deadline), 422, api.Deadline},
		{"no daemon", body, fails(api.NoDaemon), 503, api.NoDaemon},
		{"registry timeout", body, fails(api.RegistryTimeout), 503, api.RegistryTimeout},
		{"unknown error", body, func(context.Context, *solve.Request, solve.Log) (solve.Outcome, solve.Stats, error) {
			return solve.Outcome{}, solve.Stats{}, errors.New("internal detail")
		}, 500, api.Internal},
		{"panic", body, func(context.Context, *solve.Request, solve.Log) (solve.Outcome, solve.Stats, error) {
			panic("internal detail")
		}, 500, api.Internal},
		{"masked", pack(t, config, api.SecretsFile, string(sealed)), fails(api.BuildFailed), 422, api.BuildFailed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := start(t, &scripted{solve: tt.solve}, func(c *server.Config) {
				c.AllowedImages = []string{"ghcr.io/acme"}
				c.OwnRepositories = []string{"ghcr.io/acme/cache"}
				c.BuildSecretsKey = func() ([]byte, error) { return private, nil }
			})
			a := f.do(t, f.request(t, tt.body))
			if a.status != tt.status || a.rec.Status != api.Failed || a.rec.Code != tt.code || a.rec.Error == "" {
				t.Errorf("%d %s, want %d %s", a.status, a.body, tt.status, tt.code)
			}
			if retry := a.header.Get("Retry-After"); (retry != "") != (tt.status == 503 || tt.status == 429) {
				t.Errorf("Retry-After %q", retry)
			}
			text := f.do(t, f.request(t, tt.body, "Content-Type", "text/plain; charset=utf-8"))
			if text.status != tt.status || !strings.HasPrefix(text.header.Get("Content-Type"), "text/plain") || !strings.Contains(text.body, a.rec.Error) || strings.HasPrefix(text.body, "{") {
				t.Errorf("as text: %d %s", text.status, text.body)
			}
			if strings.Contains(a.body+text.body, "internal detail") {
				t.Error("the cause reached the client")
			}
			if tt.name == "unknown error" && !strings.Contains(f.log.String(), "internal detail") {
				t.Error("the cause is not in the log")
			}
			if tt.name == "masked" && strings.Contains(a.body+text.body+f.log.String(), "a secret value") {
				t.Errorf("the secret's value is in the answer or the log")
			}
			if tt.code == api.TooLarge {
				return
			}
			stream := f.do(t, f.request(t, tt.body, "Accept", "application/x-ndjson"))
			if stream.status != 200 || stream.rec.Status != api.Failed || stream.rec.Code != tt.code {
				t.Errorf("as a stream: %d %s", stream.status, stream.body)
			}
		})
	}
}

// blocking makes builds that run until release is closed or they are canceled.
func blocking() (solver *scripted, started chan struct{}, release chan struct{}) {
	started, release = make(chan struct{}, 100), make(chan struct{})
	return &scripted{solve: func(ctx context.Context, _ *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error) {
		log("v: begun")
		started <- struct{}{}
		select {
		case <-release:
			return solve.Outcome{Digest: "sha256:abc"}, solve.Stats{}, nil
		case <-ctx.Done():
			return solve.Outcome{}, solve.Stats{}, ctx.Err()
		}
	}}, started, release
}

func TestSlots(t *testing.T) {
	solver, started, release := blocking()
	f := start(t, solver, nil)
	body := pack(t, config)
	answers := make(chan answer, 10)
	send := func(headers ...string) { go func() { answers <- f.do(t, f.request(t, body, headers...)) }() }
	for range 2 {
		send()
		<-started
	}
	if a := f.do(t, f.request(t, body)); a.status != 429 || a.rec.Code != api.Busy || a.header.Get("Retry-After") == "" {
		t.Errorf("a third build: %d %s", a.status, a.body)
	}
	send("Accept", "text/event-stream, application/x-ndjson")
	send("X-Callback-Url", "http://127.0.0.1/callback")
	send("User-Agent", "openfaas-ce/nats-queue-worker")
	select {
	case a := <-answers:
		t.Fatalf("answered while both slots are taken: %d %s", a.status, a.body)
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	for range 5 {
		if a := <-answers; a.status != 200 || a.rec.Status != api.Success {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
}

func TestWaitEnds(t *testing.T) {
	solver, started, release := blocking()
	defer close(release)
	f := start(t, solver, func(c *server.Config) { c.MaxBuilds = 1; c.QueueWait = 50 * time.Millisecond })
	body := pack(t, config)
	go f.Client().Do(f.request(t, body))
	<-started
	if a := f.do(t, f.request(t, body, "Accept", "application/x-ndjson")); a.status != 200 || a.rec.Code != api.QueueTimeout {
		t.Errorf("a stream: %d %s", a.status, a.body)
	}
	if a := f.do(t, f.request(t, body, "X-Callback-Url", "x")); a.status != 503 || a.rec.Code != api.QueueTimeout || a.header.Get("Retry-After") == "" {
		t.Errorf("from a queue: %d %s", a.status, a.body)
	}
}

func TestAbortedStreamsFreeTheirSlot(t *testing.T) {
	solver, started, release := blocking()
	defer close(release)
	f := start(t, solver, func(c *server.Config) { c.MaxBuilds = 1 })
	body := pack(t, config)
	for i := range 100 {
		ctx, cancel := context.WithCancel(t.Context())
		res, err := f.Client().Do(f.request(t, body, "Accept", "application/x-ndjson").WithContext(ctx))
		if err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		select {
		case <-started:
		case <-time.After(limit):
			t.Fatalf("stream %d got no slot", i)
		}
		cancel()
		res.Body.Close()
	}
}

func TestSlowUploads(t *testing.T) {
	f := start(t, &scripted{}, func(c *server.Config) { c.MaxBuilds = 1; c.UploadGrace = time.Second })
	conn, err := net.Dial("tcp", f.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /build HTTP/1.1\r\nHost: x\r\nX-Build-Signature: %s\r\nContent-Length: 1000\r\n\r\nfew", signature.Sign(nil, "", nil))
	// The body trickles in, and the only build slot stays free.
	if a := f.do(t, f.request(t, pack(t, config))); a.status != 200 {
		t.Errorf("beside a slow upload: %d %s", a.status, a.body)
	}
	conn.SetReadDeadline(time.Now().Add(limit))
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	var rec api.Record
	if err := json.Unmarshal(body, &rec); err != nil || res.StatusCode != 400 || rec.Code != api.SlowUpload || rec.Duration < 1 {
		t.Errorf("the slow upload: %d %s, %v", res.StatusCode, body, err)
	}
}

// upload opens a connection, and sends the beginning of a body: enough to need a slot, and
// then nothing.
func (f *fixture) upload(t *testing.T, method, path string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", f.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(limit))
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: x\r\nX-Build-Signature: %s\r\nContent-Length: 10000000\r\n\r\n", method, path, signature.Sign(nil, "", nil))
	if _, err := conn.Write(make([]byte, 1100<<10)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// answered reads the answer on a connection.
func answered(t *testing.T, conn net.Conn) (status int, body string) {
	t.Helper()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

// receiving waits until n upload slots are taken.
func (f *fixture) receiving(t *testing.T, n int) {
	t.Helper()
	eventually(t, "every upload slot is taken", func() bool { return f.s.Uploading() == n })
}

// TestSmallBodiesNeedNoSlot: a small body is received while another has the only slot.
func TestSmallBodiesNeedNoSlot(t *testing.T) {
	f := start(t, &scripted{}, func(c *server.Config) { c.MaxUploads = 1; c.Limits.Body = 16 << 20 })
	f.upload(t, "POST", "/build")
	f.receiving(t, 1)
	for _, header := range [][2]string{{"X", "x"}, {"Accept", api.NDJSONType}, {"Accept", api.SSEType}, {"X-Callback-Url", "x"}, {"User-Agent", "openfaas-ce/nats-queue-worker"}} {
		if a := f.do(t, f.request(t, pack(t, config), header[0], header[1])); a.status != 200 {
			t.Errorf("%v: %d %s", header, a.status, a.body)
		}
	}
}

// TestUploadsWait: a large body waits for a slot, and a body that sends nothing is ended for it.
func TestUploadsWait(t *testing.T) {
	f := start(t, &scripted{}, func(c *server.Config) {
		c.MaxUploads = 1
		c.Limits.Body, c.Limits.Unpacked = 16<<20, 16<<20
	})
	conn := f.upload(t, "POST", "/build")
	f.receiving(t, 1)
	if a := f.do(t, f.request(t, pack(t, config, "context/x", strings.Repeat("x", 2<<20)))); a.status != 200 {
		t.Errorf("%d %s", a.status, a.body)
	}
	if status, body := answered(t, conn); status != 429 || !strings.Contains(body, string(api.Busy)) {
		t.Errorf("the one that had the slot: %d %s", status, body)
	}
}

func TestShutdownEndsUploads(t *testing.T) {
	const shutdown = 10 * time.Second
	f := start(t, &scripted{}, func(c *server.Config) {
		c.ShutdownTimeout = shutdown
		c.UploadGrace = time.Minute
		c.MaxUploads = 2
		c.Limits.Body = 16 << 20
		c.Contexts = &inMemory{all: map[string][]byte{}}
	})
	build := f.upload(t, "POST", "/build")
	context := f.upload(t, "PUT", "/contexts/"+digestOf(nil))
	f.receiving(t, 2)
	waits := f.deliver(t, "call", pack(t, config, "context/x", strings.Repeat("x", 2<<20)))
	time.Sleep(50 * time.Millisecond)
	began := time.Now()
	down := make(chan struct{})
	go func() { f.s.Shutdown(); close(down) }()
	if a := <-waits; a.status != 503 || a.rec.Code != api.ShuttingDown || time.Since(began) >= shutdown {
		t.Errorf("one that waits: %d %s after %v", a.status, a.body, time.Since(began))
	}
	for name, conn := range map[string]net.Conn{"a build": build, "a context": context} {
		status, body := answered(t, conn)
		if took := time.Since(began); status != 503 || !strings.Contains(body, string(api.ShuttingDown)) || took < shutdown {
			t.Errorf("%s: %d %s after %v", name, status, body, took)
		}
	}
	select {
	case <-down:
	case <-time.After(limit):
		t.Error("Shutdown does not return")
	}
}

// TestShutdownBeginsNoBuild: a body that ends during a shutdown is not built, though a slot is
// free. A context is stored: that takes no longer than its upload.
func TestShutdownBeginsNoBuild(t *testing.T) {
	f := start(t, &scripted{}, func(c *server.Config) { c.Contexts = &inMemory{all: map[string][]byte{}} })
	build, sent := pack(t, config), packTar(t, "context/x", "x")
	rest := make(chan struct{})
	finish := func(r *http.Request, body []byte) <-chan answer {
		began, answers := make(chan struct{}), make(chan answer, 1)
		r.ContentLength = int64(len(body))
		r.Body = io.NopCloser(io.MultiReader(bytes.NewReader(body[:1]), readerFunc(func([]byte) (int, error) {
			close(began)
			<-rest
			return 0, io.EOF
		}), bytes.NewReader(body[1:])))
		// Without the network: a client's transport reads a body ahead.
		go func() {
			w := httptest.NewRecorder()
			f.s.ServeHTTP(deadlines{w}, r)
			a := answer{status: w.Code, body: w.Body.String()}
			json.Unmarshal(w.Body.Bytes(), &a.rec)
			answers <- a
		}()
		<-began
		return answers
	}
	builds := finish(f.request(t, build), build)
	contexts := finish(f.context(t, "PUT", digestOf(sent), sent), sent)
	down := make(chan struct{})
	go func() { f.s.Shutdown(); close(down) }()
	eventually(t, "it shuts down", func() bool {
		r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, f.URL+"/ready", nil)
		return f.do(t, r).status == 503
	})
	close(rest)
	if a := <-builds; a.status != 503 || a.rec.Code != api.ShuttingDown {
		t.Errorf("a build: %d %s", a.status, a.body)
	}
	if a := <-contexts; a.status != http.StatusCreated {
		t.Errorf("a context: %d %s", a.status, a.body)
	}
	if n := f.solver.calls.Load(); n != 0 {
		t.Errorf("%d builds", n)
	}
	<-down
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// deadlines is a ResponseWriter that takes deadlines and does nothing with them.
type deadlines struct{ *httptest.ResponseRecorder }

func (deadlines) SetReadDeadline(time.Time) error  { return nil }
func (deadlines) SetWriteDeadline(time.Time) error { return nil }

func TestUnsignedUploadIsRefusedBeforeItsBody(t *testing.T) {
	f := start(t, &scripted{}, func(c *server.Config) { c.Contexts = &inMemory{} })
	for _, begin := range []struct{ route, body string }{
		{"POST /build", "c"},
		// On this route a body is no text envelope.
		{"PUT /contexts/sha256:" + strings.Repeat("0", 64), "{"},
	} {
		conn, err := net.Dial("tcp", f.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n%s", begin.route, begin.body)
		conn.SetReadDeadline(time.Now().Add(limit))
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%s: %v", begin.route, err)
		}
		res.Body.Close()
		if res.StatusCode != 401 {
			t.Errorf("%s: status %d", begin.route, res.StatusCode)
		}
	}
}

// TestDescription checks that GET / has these keys and no others: everybody can see it.
func TestDescription(t *testing.T) {
	f := start(t, &scripted{}, nil)
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, f.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if a := f.do(t, r); json.Unmarshal([]byte(a.body), &got) != nil {
		t.Fatal(a.body)
	}
	keys := func(v any) []string { return slices.Sorted(maps.Keys(v.(map[string]any))) }
	for _, tt := range []struct {
		of   any
		want []string
	}{
		{got, []string{"builds_in_flight", "daemons", "limits", "name", "version"}},
		{got["limits"], []string{"body_bytes", "builds", "entries", "unpacked_bytes"}},
		{got["daemons"], []string{"reachable", "total"}},
	} {
		if !slices.Equal(keys(tt.of), tt.want) {
			t.Errorf("%v has not the keys %q", tt.of, tt.want)
		}
	}
}

func TestShutdownWaitsForBuilds(t *testing.T) {
	solver, started, release := blocking()
	f := start(t, solver, nil)
	body := pack(t, config)
	running := make(chan answer)
	go func() { running <- f.do(t, f.request(t, body)) }()
	<-started
	down := make(chan struct{})
	go func() { f.s.Shutdown(); close(down) }()
	ready := func() bool {
		r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, f.URL+"/ready", nil)
		return f.do(t, r).status == 200
	}
	for deadline := time.Now().Add(limit); ready(); {
		if time.Now().After(deadline) {
			t.Fatal("still ready after Shutdown")
		}
	}
	if a := f.do(t, f.request(t, body, "Accept", "application/x-ndjson")); a.status != 503 || a.rec.Code != api.ShuttingDown {
		t.Errorf("a build after Shutdown: %d %s", a.status, a.body)
	}
	close(release)
	if a := <-running; a.status != 200 {
		t.Errorf("the running build: %d %s", a.status, a.body)
	}
	<-down
}

func TestShutdownEndsBuilds(t *testing.T) {
	solver, started, release := blocking()
	defer close(release)
	f := start(t, solver, func(c *server.Config) { c.MaxBuilds = 1; c.ShutdownTimeout = 100 * time.Millisecond })
	body := pack(t, config)
	running, waiting := make(chan answer), make(chan answer)
	go func() { running <- f.do(t, f.request(t, body, "Accept", "text/event-stream,application/x-ndjson")) }()
	<-started
	go func() { waiting <- f.do(t, f.request(t, body, "Accept", "application/x-ndjson")) }()
	time.Sleep(50 * time.Millisecond)
	f.s.Shutdown()
	for name, c := range map[string]chan answer{"running": running, "waiting": waiting} {
		if a := <-c; a.status != 200 && a.status != 503 || a.rec.Status != api.Failed || a.rec.Code != api.ShuttingDown {
			t.Errorf("the %s build: %d %s", name, a.status, a.body)
		}
	}
}
