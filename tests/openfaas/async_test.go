package openfaas

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestCallback queues a success and a failure, and checks what comes back.
func TestCallback(t *testing.T) {
	s, f, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true})
	r := newReceiver(t)
	for _, tt := range []struct {
		name       string
		dockerfile []string
		change     client.Change
		status     int
		code       string
	}{
		{name: "success", dockerfile: []string{"FROM busybox", "RUN echo built"}, status: 200},
		{name: "failure", dockerfile: []string{"FROM busybox", "RUN exit 7"}, status: 422, code: "build_failed"},
		{name: "bad signature", dockerfile: []string{"FROM busybox"}, status: 401, code: "unauthorized",
			change: client.Signature("sha256=" + strings.Repeat("0", 64))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := mark()
			body := request(t, s, strings.ToLower(m), append(tt.dockerfile, "RUN : "+m)...)
			queued := post(t, o, "/async-function/builder", body, callbackTo(r), tt.change)
			id := queued.Header.Get("X-Call-Id")
			if queued.StatusCode != http.StatusAccepted || queued.Body != "" || id == "" {
				t.Fatalf("queueing: %v, id %q", queued, id)
			}
			c := r.next(t)
			if got := c.Header.Get("X-Call-Id"); got != id {
				t.Errorf("X-Call-Id %q, want %q", got, id)
			}
			if c.StatusCode != tt.status || !c.IsJSON() || c.Code != tt.code || (c.Status == "success") != (tt.code == "") {
				t.Errorf("want HTTP %d %s, got %v of %s", tt.status, tt.code, c, c.Header.Get("Content-Type"))
			}
			if tt.status == 401 {
				return
			}
			if c.Header.Get("X-Build-Signature") != client.Sign(f.Secret, []byte(c.Body)) {
				t.Error("the callback's signature is wrong")
			}
			// A caller who waits gets the same keys and the same verdict.
			sync := post(t, o, "/function/builder", body)
			if sync.StatusCode != tt.status || sync.Error != c.Error || sync.Digest != c.Digest || !slices.Equal(keysOf(sync.Body), keysOf(c.Body)) {
				t.Errorf("a sync caller got %v\nthe callback %v", sync, c)
			}
			if v := verdict(t, o, id); v.StatusCode != http.StatusOK || v.Digest != c.Digest || v.Code != c.Code || v.Error != c.Error {
				t.Errorf("GET /builds: %v", v)
			}
		})
	}
}

// TestClassedForTheQueue checks the status with which the worker reports a failure. A
// queue that sends calls again decides by this status.
func TestClassedForTheQueue(t *testing.T) {
	s, _, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true, Env: map[string]string{
		"buildkit_addr": "tcp://127.0.0.1:1", "allowed_images": stack.Shared(t).Registry.Image("allowed"), "max_config_bytes": "100",
	}})
	r := newReceiver(t)
	for _, tt := range []struct {
		name   string
		body   []byte
		status int
		code   string
	}{
		{"no tar", []byte("x"), 400, "bad_tar"},
		{"forbidden", request(t, s, "other", "FROM busybox"), 403, "image_forbidden"},
		{"over a limit", request(t, s, "allowed/"+strings.Repeat("x", 100), "FROM busybox"), 413, "too_large"},
		{"no daemon", request(t, s, "allowed/app", "FROM busybox"), 503, "no_daemon"},
	} {
		id := enqueue(t, o, tt.body, callbackTo(r))
		c := r.next(t)
		if c.StatusCode != tt.status || c.Code != tt.code || c.Status != "failed" || c.Error == "" {
			t.Errorf("%s: got %v, want HTTP %d %s", tt.name, c, tt.status, tt.code)
		}
		if got := c.Header.Get("Retry-After") != ""; got != (tt.status == 503) {
			t.Errorf("%s: Retry-After is there: %v", tt.name, got)
		}
		if c.Header.Get("X-OpenFaaS-Internal") != "" {
			t.Errorf("%s: X-OpenFaaS-Internal has it tried again", tt.name)
		}
		if v := verdict(t, o, id); v.StatusCode != http.StatusOK || v.Code != tt.code {
			t.Errorf("%s: GET /builds: %v", tt.name, v)
		}
	}
}

// keysOf returns the keys of the top level of an indented object.
func keysOf(body string) []string {
	return regexp.MustCompile(`(?m)^  "(\w+)":`).FindAllString(body, -1)
}

// TestTooLargeForTheQueue: the gateway says so itself. API.md says what to do then.
func TestTooLargeForTheQueue(t *testing.T) {
	_, _, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true})
	a := post(t, o, "/async-function/builder", bytes.Repeat([]byte("x"), 256_001))
	if a.StatusCode != http.StatusInternalServerError || !strings.Contains(a.Body, "256000") {
		t.Errorf("got %v", a)
	}
}

// TestQueuedCallWaits: a build from the queue waits for a slot and never gets status
// 429. The worker would drop the build after a 429.
func TestQueuedCallWaits(t *testing.T) {
	s, _, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true, Env: map[string]string{"max_builds": "1"}})
	r := newReceiver(t)
	m := mark()
	long := make(chan client.Answer, 1)
	body := request(t, s, "waits", "FROM busybox", stack.Held(m))
	go func() {
		a, err := o.Post(t.Context(), body, at("/function/builder"))
		if err != nil {
			t.Error(err)
		}
		long <- a
	}()
	s.Buildkitd.WaitStep(t, m)
	enqueue(t, o, request(t, s, "waits", "FROM busybox", "RUN : "+mark()), callbackTo(r))
	time.Sleep(time.Second)
	if a := post(t, o, "/function/builder", request(t, s, "waits", "FROM busybox")); a.StatusCode != http.StatusTooManyRequests || a.Header.Get("Retry-After") == "" {
		t.Errorf("a third: %v", a)
	}
	stack.Release(t, m, stack.Patience)
	if c := r.next(t); c.StatusCode != http.StatusOK || c.Status != "success" {
		t.Errorf("the queued one: %v", c)
	}
	if a := <-long; a.Status != "success" {
		t.Errorf("the first: %v", a)
	}
}

// deliveries counts how often workers were given a call.
func deliveries(t *testing.T, o *stack.OpenFaaS, id string) int {
	t.Helper()
	n := 0
	for _, path := range o.LogFiles() {
		log, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(path, "worker-") {
			n += strings.Count(string(log), id)
		}
	}
	return n
}

// TestDeliveredTwice has a build that takes longer than ack_wait. The queue delivers it
// again: to a second worker while it runs, and to the first worker afterwards.
func TestDeliveredTwice(t *testing.T) {
	s, f, o := around(t, stack.OpenFaaSConfig{AckWait: time.Second, Workers: 2}, stack.FunctionConfig{Watchdog: true})
	r := newReceiver(t)
	m := mark()
	repository := strings.ToLower(m)
	id := enqueue(t, o, request(t, s, repository, "FROM busybox", "RUN sleep 8; : "+m), callbackTo(r))
	s.Buildkitd.WaitStep(t, m)
	if v := verdict(t, o, id); v.StatusCode != http.StatusAccepted || v.Status != "in_progress" {
		t.Errorf("meanwhile: %v", v)
	}
	first, second := r.next(t), r.next(t)
	for _, c := range []client.Answer{first, second} {
		if c.Header.Get("X-Call-Id") != id || c.StatusCode != http.StatusOK || c.Digest == "" || c.Digest != first.Digest {
			t.Errorf("a callback: %v, headers %v", c, c.Header)
		}
		if c.Header.Get("X-Build-Signature") != client.Sign(f.Secret, []byte(c.Body)) {
			t.Error("the callback's signature is wrong")
		}
	}
	if log := first.Log; !slices.Equal(log, second.Log) {
		t.Errorf("logs differ: %q and %q", log, second.Log)
	}
	if n := s.Registry.Pushes(t, repository); n != 1 {
		t.Errorf("%d pushes, want 1", n)
	}
	t.Logf("the call's id is %d times in the workers' logs", deliveries(t, o, id))
	if v := verdict(t, o, id); v.StatusCode != http.StatusOK || v.Digest != first.Digest {
		t.Errorf("after: %v", v)
	}
}

// TestFiftyDeliveredTwice: each of fifty messages is delivered at least twice,
// and built once.
func TestFiftyDeliveredTwice(t *testing.T) {
	const messages = 50
	// Each build sleeps for longer than ack_wait, and both workers' calls wait.
	s, _, o := around(t, stack.OpenFaaSConfig{AckWait: time.Second, Workers: 10}, stack.FunctionConfig{Watchdog: true, Env: map[string]string{"max_builds": "10"}})
	r := newReceiver(t)
	repositories, ids := map[string]string{}, []string{}
	for range messages {
		m := mark()
		id := enqueue(t, o, request(t, s, strings.ToLower(m), "FROM busybox", "RUN sleep 1.5; : "+m), callbackTo(r))
		repositories[id] = strings.ToLower(m)
		ids = append(ids, id)
	}
	count := func() map[string][]client.Answer {
		byID := map[string][]client.Answer{}
		for _, c := range r.all() {
			id := c.Header.Get("X-Call-Id")
			byID[id] = append(byID[id], c)
		}
		return byID
	}
	stack.Eventually(t, 10*time.Minute, func() error {
		for _, id := range ids {
			if n := len(count()[id]); n < 2 {
				return fmt.Errorf("%d callbacks of %s, %d in all", n, id, len(r.all()))
			}
		}
		return nil
	})
	total := 0
	for id, callbacks := range count() {
		for _, c := range callbacks {
			if c.StatusCode != http.StatusOK || c.Digest != callbacks[0].Digest || c.Digest == "" {
				t.Errorf("a callback: %v, headers %v", c, c.Header)
			}
		}
		total += s.Registry.Pushes(t, repositories[id])
	}
	t.Logf("%d callbacks, %d pushes", len(r.all()), total)
	if total != messages {
		t.Errorf("%d pushes, want %d", total, messages)
	}
}
