// Package openfaas calls the builder as OpenFaaS does: through the Community
// Edition's gateway, its queue and its worker, all of them real.
package openfaas

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/stack"
)

func TestMain(m *testing.M) { stack.Main(m) }

const (
	ndjson = "application/x-ndjson"
	sse    = "text/event-stream"
	both   = sse + ", " + ndjson
)

// around starts OpenFaaS in front of a function of the test's own.
func around(t *testing.T, c stack.OpenFaaSConfig, fc stack.FunctionConfig) (*stack.Stack, *stack.Function, *stack.OpenFaaS) {
	t.Helper()
	s, f := stack.Test(t, fc)
	o, err := s.OpenFaaS(t.Context(), f, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, path := range o.LogFiles() {
				if b, err := os.ReadFile(path); err == nil {
					t.Logf("%s:\n%s", path, b[max(0, len(b)-4<<10):])
				}
			}
		}
		o.Kill()
	})
	return s, f, o
}

// mark is a word that makes a RUN step unlike all others.
func mark() string { return "mark-" + rand.Text() }

// request is a tar with one Dockerfile, to be pushed to repository.
func request(t *testing.T, s *stack.Stack, repository string, dockerfile ...string) []byte {
	t.Helper()
	dir := stack.Context(t, map[string]string{"Dockerfile": strings.Join(dockerfile, "\n") + "\n"})
	body, err := stack.Tar(dir, &builder.BuildConfig{Image: s.Registry.Image(repository + ":v1")})
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// post is a signed request at a path of the gateway.
func post(t *testing.T, f *stack.Function, o *stack.OpenFaaS, path string, body []byte, headers ...string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, o.URL+path, strings.NewReader(string(body)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Build-Signature", stack.Sign(f.Secret, body))
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	return req
}

// answer is all that came of a request.
type answer struct {
	status int
	header http.Header
	body   string
	rec    stack.Record // the last
}

func do(t *testing.T, req *http.Request) answer {
	t.Helper()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	a := answer{status: resp.StatusCode, header: resp.Header, body: string(b)}
	if req.Method == http.MethodHead {
		return a
	}
	lines := strings.Split(strings.TrimSpace(a.body), "\n")
	switch resp.Header.Get("Content-Type") {
	case "application/json":
		err = json.Unmarshal(b, &a.rec)
	case ndjson, sse:
		err = json.Unmarshal([]byte(strings.TrimPrefix(lines[len(lines)-1], "data: ")), &a.rec)
	}
	if err != nil {
		t.Fatalf("%v: %.300s", err, b)
	}
	return a
}

// callback is what a queue worker posts.
type callback struct {
	header http.Header
	body   []byte
	rec    stack.Record
}

// receiver takes callbacks on loopback.
type receiver struct {
	URL string

	mu    sync.Mutex
	got   []callback
	taken int // how many next has returned
	more  chan struct{}
}

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &receiver{URL: "http://" + l.Addr().String() + "/callback", more: make(chan struct{}, 1000)}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(io.LimitReader(req.Body, 8<<20))
		if err != nil {
			return
		}
		c := callback{header: req.Header, body: body}
		json.Unmarshal(body, &c.rec)
		r.mu.Lock()
		r.got = append(r.got, c)
		r.mu.Unlock()
		r.more <- struct{}{}
	})}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return r
}

// next waits for the callback after the one that it returned before.
func (r *receiver) next(t *testing.T) callback {
	t.Helper()
	select {
	case <-r.more:
	case <-time.After(time.Minute):
		t.Fatal("no callback within a minute")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.taken++
	return r.got[r.taken-1]
}

func (r *receiver) all() []callback {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

// enqueue queues a call and returns its id.
func enqueue(t *testing.T, f *stack.Function, o *stack.OpenFaaS, body []byte, headers ...string) string {
	t.Helper()
	a := do(t, post(t, f, o, "/async-function/builder", body, headers...))
	if a.status != http.StatusAccepted {
		t.Fatalf("queueing: HTTP %d: %s", a.status, a.body)
	}
	if id := a.header.Get("X-Call-Id"); id != "" {
		return id
	}
	return "" // the gateway names only the ids that it makes
}

// verdict asks the function, through the gateway.
func verdict(t *testing.T, f *stack.Function, o *stack.OpenFaaS, id string) answer {
	t.Helper()
	path := "/builds/" + id
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, o.URL+"/function/builder"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Build-Signature", stack.Sign(f.Secret, []byte("GET "+path)))
	return do(t, req)
}

// pushes counts the manifests that the registry took for a repository.
func pushes(t *testing.T, s *stack.Stack, repository string) int {
	t.Helper()
	log, err := os.ReadFile(s.Registry.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(log), `"PUT /v2/`+repository+`/manifests/`)
}

// eventually polls until check is nil.
func eventually(t *testing.T, limit time.Duration, check func() error) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("still after %v: %v", limit, err)
		}
	}
}

// stepRuns says whether a RUN step with m in its command line runs.
func stepRuns(t *testing.T, s *stack.Stack, m string) bool {
	t.Helper()
	steps, err := s.Buildkitd.Steps()
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(steps, func(line string) bool { return strings.Contains(line, m) })
}

func waitStep(t *testing.T, s *stack.Stack, m string, want bool, limit time.Duration) {
	t.Helper()
	eventually(t, limit, func() error {
		if stepRuns(t, s, m) != want {
			return fmt.Errorf("the RUN step runs: %v", !want)
		}
		return nil
	})
}
