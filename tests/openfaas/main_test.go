// Package openfaas calls the builder as OpenFaaS does: through the Community
// Edition's gateway, its queue and its worker, all of them real.
package openfaas

import (
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

func TestMain(m *testing.M) { stack.Main(m) }

// both is the Accept header for the CE gateway. The gateway passes on each line at once
// if the header names SSE, and the function answers with NDJSON.
const both = client.SSE + ", " + client.NDJSON

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

var mark = stack.Mark

// request is a tar with one Dockerfile, to be pushed to repository.
func request(t *testing.T, s *stack.Stack, repository string, dockerfile ...string) []byte {
	t.Helper()
	return stack.Body(t, &builder.BuildConfig{Image: s.Registry.Image(repository + ":v1")},
		map[string]string{"Dockerfile": strings.Join(dockerfile, "\n") + "\n"})
}

// at sends a request to a path of the gateway, without a Content-Type.
func at(path string) client.Change {
	return func(req *http.Request) {
		req.URL.Path = path
		req.Header.Del("Content-Type")
	}
}

// post sends a signed body to a path of the gateway.
func post(t *testing.T, o *stack.OpenFaaS, path string, body []byte, changes ...client.Change) client.Answer {
	t.Helper()
	return o.MustPost(t, t.Context(), body, append([]client.Change{at(path)}, changes...)...)
}

// callbackTo has the queue worker post the answer to a call to a receiver.
func callbackTo(r *receiver) client.Change { return client.Header("X-Callback-Url", r.URL) }

// receiver takes callbacks on loopback. A queue worker posts the function's answer there,
// with its HTTP status in the header X-Function-Status.
type receiver struct {
	URL string

	mu    sync.Mutex
	got   []client.Answer
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
		c := client.Answer{Header: req.Header, Body: string(body)}
		c.StatusCode, _ = strconv.Atoi(req.Header.Get("X-Function-Status"))
		// A body that is no record leaves the zero Record, and the test fails by that.
		c.Record, _ = client.Decode(c.Body)
		r.mu.Lock()
		r.got = append(r.got, c)
		r.mu.Unlock()
		r.more <- struct{}{}
	})}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return r
}

// next waits for the first callback that it has not yet returned.
func (r *receiver) next(t *testing.T) client.Answer {
	t.Helper()
	select {
	case <-r.more:
	case <-time.After(5 * time.Minute):
		t.Fatal("no callback in five minutes")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.taken++
	return r.got[r.taken-1]
}

func (r *receiver) all() []client.Answer {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

// enqueue queues a call and returns its id.
func enqueue(t *testing.T, o *stack.OpenFaaS, body []byte, changes ...client.Change) string {
	t.Helper()
	a := post(t, o, "/async-function/builder", body, changes...)
	if a.StatusCode != http.StatusAccepted {
		t.Fatalf("queueing: %v", a)
	}
	return a.Header.Get("X-Call-Id")
}

// verdict asks the function, through the gateway.
func verdict(t *testing.T, o *stack.OpenFaaS, id string) client.Answer {
	t.Helper()
	return function(o).MustVerdict(t, t.Context(), id)
}

// function returns a client that reaches the builder's own paths through the gateway.
func function(o *stack.OpenFaaS) *client.Client {
	c := o.Client
	c.URL += "/function/builder"
	return &c
}
