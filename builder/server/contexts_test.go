package server_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"handler/function/api"
	"handler/function/server"
	"handler/function/signature"
	"handler/function/solve"
)

// inMemory takes the place of a registry: these tests have no network.
type inMemory struct {
	mu   sync.Mutex
	puts int
	all  map[string][]byte
	err  error
}

func (m *inMemory) Has(_ context.Context, tenant, digest string) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.all[tenant+digest] != nil, m.err
}

func (m *inMemory) Put(_ context.Context, tenant, digest string, size int64, open func() io.Reader) error {
	b, err := io.ReadAll(open())
	if err != nil || int64(len(b)) != size {
		return fmt.Errorf("%d bytes, not %d: %w", len(b), size, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.puts++
	m.all[tenant+digest] = b
	return m.err
}

func (m *inMemory) Open(_ context.Context, tenant, digest string) (io.ReadCloser, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.all[tenant+digest] == nil {
		return nil, &api.Error{Code: api.BadContext, Msg: "not here"}
	}
	return io.NopCloser(bytes.NewReader(m.all[tenant+digest])), m.err
}

func digestOf(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

// context makes a signed request for a context.
func (f *fixture) context(t *testing.T, method, digest string, body []byte) *http.Request {
	t.Helper()
	path := "/contexts/" + digest
	r, err := http.NewRequestWithContext(t.Context(), method, f.URL+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	signed := body
	if method == http.MethodHead {
		signed = []byte(method + " " + path)
	}
	r.Header.Set(api.SignatureHeader, signature.Sign([]byte(secret), "", signed))
	return r
}

func TestContexts(t *testing.T) {
	var built [][]string
	solver := &scripted{solve: func(_ context.Context, req *solve.Request, _ solve.Log) (solve.Outcome, solve.Stats, error) {
		var files []string
		for _, e := range req.Context.Entries() {
			b, err := io.ReadAll(req.Context.Open(&e))
			files = append(files, fmt.Sprint(e.Path, " ", string(b), " ", e.ModTime, " ", err))
		}
		built = append(built, files)
		return solve.Outcome{}, solve.Stats{}, nil
	}}
	store := &inMemory{all: map[string][]byte{}}
	var dir string
	f := start(t, solver, func(c *server.Config) { c.Contexts = store; dir = c.TempDir; c.SpoolMemory = 1 << 10 })
	plain := packTar(t, "context/Dockerfile", "FROM scratch\n", "context/a/b", strings.Repeat("content", 1000), "stray", "x")
	var zipped bytes.Buffer
	zw := gzip.NewWriter(&zipped)
	zw.Write(plain)
	zw.Close()
	for form, body := range map[string][]byte{"tar": plain, "gzip": zipped.Bytes()} {
		digest := digestOf(body)
		for i, want := range []struct {
			method string
			status int
		}{{"HEAD", 404}, {"PUT", 201}, {"HEAD", 200}, {"PUT", 200}} {
			if a := f.do(t, f.context(t, want.method, digest, body)); a.status != want.status {
				t.Errorf("%s: %d, %s: %d %s, want %d", form, i, want.method, a.status, a.body, want.status)
			} else if got, told := a.header.Get(api.SignatureHeader), fmt.Sprintf("{\n  \"digest\": %q,\n  \"bytes\": %d,\n  \"id\": %q,\n  \"request\": %q\n}\n",
				digest, len(body), a.header.Get(api.CallIDHeader), strings.TrimPrefix(digest, "sha256:")); want.method == "PUT" &&
				(a.body != told || got != signature.Sign([]byte(secret), "", []byte(told))) {
				t.Errorf("%s: %d: told %s, signed %q, want %s", form, i, a.body, got, told)
			}
		}
		if !bytes.Equal(store.all[digest], body) {
			t.Errorf("%s: not stored as it was sent", form)
		}
		a := f.do(t, f.request(t, packTar(t, api.ConfigFile, `{"image":"ghcr.io/acme/app:v1","context":{"digest":"`+digest+`"}}`)))
		if a.status != http.StatusOK {
			t.Fatalf("%s: %d %s", form, a.status, a.body)
		}
		if len(a.rec.Warnings) != 1 || !strings.Contains(a.rec.Warnings[0], "stray") {
			t.Errorf("%s: warnings %q", form, a.rec.Warnings)
		}
	}
	if store.puts != 2 {
		t.Errorf("%d puts, want 2", store.puts)
	}
	// The Solver must be given the same as with the context in the body.
	if a := f.do(t, f.request(t, packTar(t, "context/Dockerfile", "FROM scratch\n", "context/a/b", strings.Repeat("content", 1000), api.ConfigFile, config))); a.status != http.StatusOK {
		t.Fatalf("%d %s", a.status, a.body)
	}
	for i, files := range built {
		if len(files) != 3 || fmt.Sprint(files) != fmt.Sprint(built[2]) {
			t.Errorf("build %d: %.300q, want %.300q", i, files, built[2])
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// TestOddContext: a context with a FIFO is stored, because .dockerignore may leave the FIFO
// out. The build decides.
func TestOddContext(t *testing.T) {
	solver := &scripted{solve: func(_ context.Context, req *solve.Request, _ solve.Log) (solve.Outcome, solve.Stats, error) {
		if e := req.Context.Find("fifo"); e == nil || e.Odd() == "" {
			t.Errorf("the build has %+v", e)
		}
		return solve.Outcome{}, solve.Stats{}, nil
	}}
	f := start(t, solver, func(c *server.Config) { c.Contexts = &inMemory{all: map[string][]byte{}} })
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: "context/", Typeflag: tar.TypeDir}, {Name: "context/fifo", Typeflag: tar.TypeFifo}, {Name: "context/caf\xe9", Format: tar.FormatGNU},
		{Name: "context/f", PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "x"}},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	digest := digestOf(b.Bytes())
	if a := f.do(t, f.context(t, "PUT", digest, b.Bytes())); a.status != http.StatusCreated {
		t.Fatalf("%d %s", a.status, a.body)
	}
	a := f.do(t, f.request(t, packTar(t, api.ConfigFile, `{"image":"ghcr.io/acme/app:v1","context":{"digest":"`+digest+`"}}`)))
	if a.status != http.StatusOK || len(a.rec.Warnings) != 1 || !strings.Contains(a.rec.Warnings[0], `capabilities are: "f"`) {
		t.Errorf("%d %s, warnings %q", a.status, a.body, a.rec.Warnings)
	}
}

// stalling is a registry that sends headers and then nothing.
type stalling struct{ inMemory }

func (*stalling) Open(ctx context.Context, _, _ string) (io.ReadCloser, error) {
	return &silence{ctx}, nil
}

type silence struct{ ctx context.Context }

func (s *silence) Read([]byte) (int, error) {
	<-s.ctx.Done()
	return 0, context.Cause(s.ctx)
}

func (*silence) Close() error { return nil }

// TestContextTimeout: a registry that stalls gives the build slot back after build_timeout.
func TestContextTimeout(t *testing.T) {
	solver := &scripted{}
	f := start(t, solver, func(c *server.Config) {
		c.Contexts, c.BuildTimeout, c.MaxBuilds = &stalling{}, 200*time.Millisecond, 1
	})
	asks := packTar(t, api.ConfigFile, `{"skipPush":true,"context":{"digest":"`+digestOf(nil)+`"}}`)
	began := time.Now()
	a := f.do(t, f.request(t, asks))
	if took := time.Since(began); a.status != 503 || a.rec.Code != api.RegistryTimeout || !strings.Contains(a.rec.Error, "build_timeout") || took < 200*time.Millisecond {
		t.Errorf("%d %s after %v", a.status, a.body, took)
	}
	if a := f.do(t, f.request(t, pack(t, config))); a.status != 200 || solver.calls.Load() != 1 {
		t.Errorf("the next: %d %s", a.status, a.body)
	}
}

func TestContextsRefused(t *testing.T) {
	body := packTar(t, "context/Dockerfile", "FROM scratch\n")
	digest := digestOf(body)
	other := digestOf(nil)
	asked := func(digest string) []byte {
		return packTar(t, api.ConfigFile, `{"skipPush":true,"context":{"digest":"`+digest+`"}}`)
	}
	for name, tt := range map[string]struct {
		request func(*fixture) *http.Request
		err     error // of the registry
		lies    bool  // it holds something else
		status  int
		code    api.Code
	}{
		"another digest":   {request: func(f *fixture) *http.Request { return f.context(t, "PUT", other, body) }, status: 400, code: api.BadContext},
		"no digest":        {request: func(f *fixture) *http.Request { return f.context(t, "PUT", "sha256:abc", body) }, status: 400, code: api.BadContext},
		"no tar":           {request: func(f *fixture) *http.Request { return f.context(t, "PUT", digestOf([]byte("x")), []byte("x")) }, status: 400, code: api.BadTar},
		"no context in it": {request: func(f *fixture) *http.Request { b := packTar(t, "a", ""); return f.context(t, "PUT", digestOf(b), b) }, status: 400, code: api.BadTar},
		"an envelope":      {request: func(f *fixture) *http.Request { b := []byte(`{"tar":""}`); return f.context(t, "PUT", digestOf(b), b) }, status: 400, code: api.BadTar},
		"too large":        {request: func(f *fixture) *http.Request { return f.context(t, "PUT", digest, make([]byte, 1<<20+1)) }, status: 413, code: api.TooLarge},
		"wrong signature": {request: func(f *fixture) *http.Request {
			r := f.context(t, "PUT", digest, body)
			r.Header.Set(api.SignatureHeader, signature.Sign([]byte("x"), "", body))
			return r
		}, status: 401, code: api.Unauthorized},
		"no signature": {request: func(f *fixture) *http.Request {
			r := f.context(t, "PUT", digest, body)
			r.Header.Del(api.SignatureHeader)
			return r
		}, status: 401, code: api.Unauthorized},
		"registry in trouble": {request: func(f *fixture) *http.Request { return f.context(t, "PUT", digest, body) }, err: &api.Error{Code: api.RegistryFailed, Msg: "503"}, status: 503, code: api.RegistryFailed},
		"never sent":          {request: func(f *fixture) *http.Request { return f.request(t, asked(digest)) }, status: 400, code: api.BadContext},
		"another content":     {request: func(f *fixture) *http.Request { return f.request(t, asked(digest)) }, lies: true, status: 400, code: api.BadContext},
	} {
		t.Run(name, func(t *testing.T) {
			store := &inMemory{all: map[string][]byte{}, err: tt.err}
			if tt.lies {
				store.all[digest] = packTar(t, "context/Dockerfile", "FROM other\n")
			}
			solver := &scripted{}
			f := start(t, solver, func(c *server.Config) { c.Contexts = store })
			a := f.do(t, tt.request(f))
			if a.status != tt.status || a.rec.Code != tt.code {
				t.Errorf("%d %s, want %d %s", a.status, a.body, tt.status, tt.code)
			}
			want := signature.Sign([]byte(secret), "", []byte(a.body))
			if a.status == http.StatusUnauthorized || a.status == http.StatusRequestEntityTooLarge {
				want = "" // no signature has passed
			}
			if got := a.header.Get(api.SignatureHeader); got != want {
				t.Errorf("the answer is signed %q, want %q", got, want)
			}
			if store.puts > 0 || solver.calls.Load() > 0 {
				t.Errorf("%d puts, %d builds", store.puts, solver.calls.Load())
			}
		})
	}
	t.Run("head", func(t *testing.T) {
		f := start(t, &scripted{}, func(c *server.Config) { c.Contexts = &inMemory{err: errors.New("internal detail")} })
		if a := f.do(t, f.context(t, "HEAD", digest, nil)); a.status != http.StatusInternalServerError {
			t.Errorf("%d", a.status)
		}
		r := f.context(t, "HEAD", digest, nil)
		r.Header.Set(api.SignatureHeader, signature.Sign([]byte(secret), "", []byte("HEAD /contexts/"+other)))
		if a := f.do(t, r); a.status != http.StatusUnauthorized {
			t.Errorf("another's signature: %d", a.status)
		}
	})
	// A path is looked at only after the signature has passed.
	t.Run("wrong signatures", func(t *testing.T) {
		for name, change := range map[string]func(*server.Config){
			"no repository": nil,
			"a repository":  func(c *server.Config) { c.Contexts = &inMemory{} },
		} {
			f := start(t, &scripted{}, change)
			for _, digest := range []string{digest, "sha256:abc"} {
				for _, sign := range [][]string{nil, {"sha256=abc"}, {signature.Sign([]byte("x"), "", body)}} {
					r := f.context(t, "PUT", digest, body)
					r.Header[api.SignatureHeader] = sign
					if a := f.do(t, r); a.status != http.StatusUnauthorized || a.header.Get(api.SignatureHeader) != "" {
						t.Errorf("%s, %s, signed %q: %d %s", name, digest, sign, a.status, a.body)
					}
				}
			}
		}
	})
	t.Run("no repository", func(t *testing.T) {
		f := start(t, &scripted{}, nil)
		if a := f.do(t, f.context(t, "PUT", digest, body)); a.status != http.StatusNotFound || !strings.Contains(a.rec.Error, "context_repository") {
			t.Errorf("%d %s", a.status, a.body)
		}
	})
}
