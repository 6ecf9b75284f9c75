package builds

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestStopBuilding stops from one replica what another builds.
func TestStopBuilding(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	m := mark()
	request := body(t, h.a, m, "FROM busybox", held(m))
	built := background(t, &h.a.Client, request, named(m))
	waitStep(t, m)
	begun, followed := follow(t, &h.b.Client, m, "follow=1")
	<-begun

	stop(t, &h.b.Client, m+"-other", http.StatusNotFound).WantFailed(t, "not_found")
	stop(t, &h.b.Client, m+"?attempt=2", http.StatusNotFound).WantFailed(t, "not_found")
	start := time.Now()
	var req *http.Request // that counts; it is sent again below
	told := stop(t, &h.b.Client, m, http.StatusAccepted, func(r *http.Request) { req = r })
	answered := time.Since(start)
	if told.Build.ID != m || told.StatusCode == http.StatusAccepted && told.Status != "in_progress" {
		t.Errorf("stopping: %v", told)
	}
	gone := waitGone(t, m) + answered
	t.Logf("answered after %v, the step was gone after %v", answered, gone)
	a := built()
	if a.Status != "failed" || a.Code != "canceled" {
		t.Errorf("the caller was told %v", a)
	}
	l := followed()
	wantSame(t, "the follower", l.Texts(), a.Log)
	wantStopped(t, l.Build, "default")
	wantStopped(t, record(t, &h.b.Client, m), "default")

	// It has ended.
	nextSecond()
	if a := stop(t, &h.b.Client, m, http.StatusOK); a.Code != "canceled" {
		t.Errorf("stopping it once more: %v", a)
	}
	// A later build of the same id is not stopped by the old request, at either replica.
	n := mark()
	built = background(t, &h.a.Client, body(t, h.a, n, "FROM busybox", held(n)), named(m))
	waitStep(t, n)
	waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Build.Attempt == 2 })
	for _, f := range []*stack.Function{h.a, h.b} {
		req := req.Clone(within(t))
		req.URL.Host = f.URL[len("http://"):]
		a, err := f.Tell(req)
		if err != nil {
			t.Fatal(err)
		}
		a.WantFailed(t, "unauthorized", "once")
	}
	if a := stop(t, &h.b.Client, m+"?attempt=1", http.StatusOK); a.Build.Attempt != 1 {
		t.Errorf("stopping the first attempt: %v", a)
	}
	release(t, n)
	built().WantSuccess(t)
}

// TestStopWaiting stops a build that waits for a slot: it leaves the queue, and the one that has
// the slot goes on.
func TestStopWaiting(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{Env: map[string]string{"max_builds": "1"}})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	m, n := mark(), mark()
	first := background(t, &h.a.Client, body(t, h.a, m, "FROM busybox", held(m)), delivery(m))
	waitStep(t, m)
	request := body(t, h.a, n, "FROM busybox", held(n))
	second := background(t, &h.a.Client, request, delivery(n))
	waiting := func(want float64) {
		t.Helper()
		stack.Eventually(t, patience, func() error {
			if n, err := h.a.Metric("builder_builds_waiting"); err != nil || n != want {
				return fmt.Errorf("%v builds wait, want %v: %v", n, want, err)
			}
			return nil
		})
	}
	waiting(1)
	waitRecord(t, &h.b.Client, n, func(a client.Answer) bool { return a.Build.Queued && a.Status == "in_progress" })
	stop(t, &h.b.Client, n, http.StatusAccepted)
	if a := second(); a.Status != "failed" || a.Code != "canceled" {
		t.Errorf("who waited was told %v", a)
	}
	waiting(0)
	b, _ := waitRecord(t, &h.b.Client, n, func(a client.Answer) bool { return a.Status == "failed" })
	wantStopped(t, b.Build, "default")
	// The queue delivers it again: that somebody stopped it is final.
	for _, f := range []*stack.Function{h.a, h.b} {
		if a := f.MustPost(t, within(t), request, delivery(n)); a.Code != "canceled" || a.StatusCode != http.StatusConflict {
			t.Errorf("delivered again: %v", a)
		}
	}
	release(t, m)
	first().WantSuccess(t)
}

// TestStopJoined stops a build that three deliveries wait for, one of them at the other replica.
func TestStopJoined(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	m := mark()
	request := body(t, h.a, m, "FROM busybox", held(m))
	deliveries := []func() client.Answer{background(t, &h.a.Client, request, delivery(m))}
	waitStep(t, m)
	waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Status == "in_progress" })
	for _, f := range []*stack.Function{h.a, h.b} {
		joined := make(chan struct{})
		begun := sync.OnceFunc(func() { close(joined) })
		deliveries = append(deliveries, stack.Later(t, func(ctx context.Context) (client.Answer, error) {
			defer begun()
			return f.PostEach(ctx, request, func(r client.Record) {
				if len(r.Log) > 0 {
					begun()
				}
			}, delivery(m), client.Accept(client.NDJSON))
		}))
		<-joined
	}
	stop(t, &h.b.Client, m, http.StatusAccepted)
	waitGone(t, m)
	for i, wait := range deliveries {
		if a := wait(); a.Status != "failed" || a.Code != "canceled" {
			t.Errorf("delivery %d was told %v", i, a)
		}
	}
	wantStopped(t, record(t, &h.a.Client, m), "default")
	if l := h.b.MustList(t, within(t), ""); len(l.Builds) != 1 {
		t.Errorf("%d records of one build: %+v", len(l.Builds), l.Builds)
	}
}

// TestStopPushing stops a build whose push has begun: the push is let finish.
func TestStopPushing(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	let := make(chan struct{})
	front := stack.Front(t, h.s.Registry.Addr, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
			select {
			case <-let:
			case <-r.Context().Done():
				return
			}
		}
		next.ServeHTTP(w, r)
	})
	m := mark()
	image := front + "/" + strings.ToLower(m) + ":v1"
	request := stack.Body(t, map[string]any{"image": image}, stack.Dockerfile("FROM busybox", "RUN : "+m))
	first := background(t, &h.a.Client, request, delivery(m))
	pushing := func(line string) bool { return strings.Contains(line, "pushing manifest") }
	stack.Eventually(t, patience, func() error {
		if l, err := h.b.ReadLog(within(t), m, "", nil); err != nil || !slices.ContainsFunc(l.Texts(), pushing) {
			return fmt.Errorf("it does not push yet: %q, %v", l.Texts(), err)
		}
		return nil
	})
	second := background(t, &h.b.Client, request, delivery(m)) // at the other replica
	begun, followed := follow(t, &h.b.Client, m, "follow=1")
	<-begun

	if a := stop(t, &h.b.Client, m, http.StatusAccepted); a.Status != "in_progress" {
		t.Errorf("stopping: %v", a)
	}
	// With another path, since two equal requests within a second have one signature.
	if a := stop(t, &h.a.Client, m+"?attempt=1", http.StatusAccepted); a.Status != "in_progress" {
		t.Errorf("stopping at its own replica: %v", a)
	}
	b, _ := waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Build.CanceledBy != "" })
	if b.Status != "in_progress" || b.Build.CanceledBy != "default" {
		t.Errorf("meanwhile: %+v", b.Build)
	}
	close(let)
	a := first()
	a.WantSuccess(t)
	if a := second(); a.Status != "success" {
		t.Errorf("the other delivery: %v", a)
	}
	l := followed()
	wantSame(t, "the follower", l.Texts(), a.Log)
	if l.Status != "success" || l.Digest != a.Digest || l.Build.CanceledBy != "default" {
		t.Errorf("the record at the end is %+v", l.Build)
	}
	if digest, err := stack.MustPull(t, within(t), image).Digest(); err != nil || digest.String() != a.Digest {
		t.Errorf("under the tag is %v, %v, want %s", digest, err, a.Digest)
	}
	nextSecond()
	if a := stop(t, &h.b.Client, m, http.StatusOK); a.Status != "success" {
		t.Errorf("stopping it once more: %v", a)
	}
}
