package openfaas

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"handler/function/tests/stack"
)

// TestCallback queues a success and a failure, and checks what comes back.
func TestCallback(t *testing.T) {
	s, f, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true})
	r := newReceiver(t)
	for _, tt := range []struct {
		name       string
		dockerfile []string
		change     func(*http.Request)
		status     int
		code       string
	}{
		{name: "success", dockerfile: []string{"FROM busybox", "RUN echo built"}, status: 200},
		{name: "failure", dockerfile: []string{"FROM busybox", "RUN exit 7"}, status: 422, code: "build_failed"},
		{name: "bad signature", dockerfile: []string{"FROM busybox"}, status: 401, code: "unauthorized",
			change: func(req *http.Request) { req.Header.Set("X-Build-Signature", "sha256="+strings.Repeat("0", 64)) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := mark()
			body := request(t, s, strings.ToLower(m), append(tt.dockerfile, "RUN : "+m)...)
			req := post(t, f, o, "/async-function/builder", body, "X-Callback-Url", r.URL)
			if tt.change != nil {
				tt.change(req)
			}
			queued := do(t, req)
			id := queued.header.Get("X-Call-Id")
			if queued.status != http.StatusAccepted || queued.body != "" || id == "" {
				t.Fatalf("queueing: HTTP %d, %q, id %q", queued.status, queued.body, id)
			}
			c := r.next(t)
			if got := c.header.Get("X-Call-Id"); got != id {
				t.Errorf("X-Call-Id %q, want %q", got, id)
			}
			if got := c.header.Get("X-Function-Status"); got != strconv.Itoa(tt.status) {
				t.Errorf("X-Function-Status %q, want %d", got, tt.status)
			}
			if c.header.Get("Content-Type") != "application/json" || c.rec.Code != tt.code || (c.rec.Status == "success") != (tt.code == "") {
				t.Errorf("%s %s", c.header.Get("Content-Type"), c.body)
			}
			if tt.status == 401 {
				return
			}
			if c.header.Get("X-Build-Signature") != stack.Sign(f.Secret, c.body) {
				t.Error("the callback's signature is wrong")
			}
			// What a caller who waits gets has the same keys and the same verdict.
			sync := do(t, post(t, f, o, "/function/builder", body))
			if sync.status != tt.status || sync.rec.Error != c.rec.Error || sync.rec.Digest != c.rec.Digest || !slices.Equal(keysOf(sync.body), keysOf(string(c.body))) {
				t.Errorf("a sync caller got HTTP %d %s\nthe callback %s", sync.status, sync.body, c.body)
			}
			if v := verdict(t, f, o, id); v.status != http.StatusOK || v.rec.Digest != c.rec.Digest || v.rec.Code != c.rec.Code || v.rec.Error != c.rec.Error {
				t.Errorf("GET /builds: HTTP %d %s", v.status, v.body)
			}
		})
	}
}

// TestClassedForTheQueue: what the worker tells of a failure, from which a queue
// that retries decides.
func TestClassedForTheQueue(t *testing.T) {
	s, f, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true, Env: map[string]string{
		"buildkit_addr": "tcp://127.0.0.1:1", "allowed_images": stack.Shared(t).Registry.Image("allowed"), "max_config_bytes": "100",
	}})
	r := newReceiver(t)
	for _, tt := range []struct {
		name   string
		body   []byte
		status string
		code   string
	}{
		{"no tar", []byte("x"), "400", "bad_tar"},
		{"forbidden", request(t, s, "other", "FROM busybox"), "403", "image_forbidden"},
		{"over a limit", request(t, s, "allowed/"+strings.Repeat("x", 100), "FROM busybox"), "413", "too_large"},
		{"no daemon", request(t, s, "allowed/app", "FROM busybox"), "503", "no_daemon"},
	} {
		id := enqueue(t, f, o, tt.body, "X-Callback-Url", r.URL)
		c := r.next(t)
		if c.header.Get("X-Function-Status") != tt.status || c.rec.Code != tt.code || c.rec.Status != "failed" || c.rec.Error == "" {
			t.Errorf("%s: %s %s, want %s %s", tt.name, c.header.Get("X-Function-Status"), c.body, tt.status, tt.code)
		}
		if got := c.header.Get("Retry-After") != ""; got != (tt.status == "503") {
			t.Errorf("%s: Retry-After is there: %v", tt.name, got)
		}
		if c.header.Get("X-OpenFaaS-Internal") != "" {
			t.Errorf("%s: X-OpenFaaS-Internal has it tried again", tt.name)
		}
		if v := verdict(t, f, o, id); v.status != http.StatusOK || v.rec.Code != tt.code {
			t.Errorf("%s: GET /builds: HTTP %d %s", tt.name, v.status, v.body)
		}
	}
}

// keysOf are the top level's of an indented object.
func keysOf(body string) []string {
	return regexp.MustCompile(`(?m)^  "(\w+)":`).FindAllString(body, -1)
}

// TestTooLargeForTheQueue: the gateway says so itself. API.md says what to do then.
func TestTooLargeForTheQueue(t *testing.T) {
	_, f, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true})
	a := do(t, post(t, f, o, "/async-function/builder", bytes.Repeat([]byte("x"), 256_001)))
	if a.status != http.StatusInternalServerError || !strings.Contains(a.body, "256000") {
		t.Errorf("HTTP %d: %s", a.status, a.body)
	}
}

// TestQueuedCallWaits: a build from the queue is not answered 429, which the
// worker would take for its end.
func TestQueuedCallWaits(t *testing.T) {
	s, f, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true, Env: map[string]string{"max_builds": "1"}})
	r := newReceiver(t)
	m := mark()
	long := make(chan answer, 1)
	req := post(t, f, o, "/function/builder", request(t, s, "waits", "FROM busybox", "RUN sleep 5; : "+m))
	go func() { long <- do(t, req) }()
	waitStep(t, s, m, true, time.Minute)
	enqueue(t, f, o, request(t, s, "waits", "FROM busybox", "RUN : "+mark()), "X-Callback-Url", r.URL)
	time.Sleep(time.Second)
	if a := do(t, post(t, f, o, "/function/builder", request(t, s, "waits", "FROM busybox"))); a.status != http.StatusTooManyRequests || a.header.Get("Retry-After") == "" {
		t.Errorf("a third: HTTP %d %s", a.status, a.body)
	}
	if c := r.next(t); c.header.Get("X-Function-Status") != "200" || c.rec.Status != "success" {
		t.Errorf("the queued one: %s %s", c.header.Get("X-Function-Status"), c.body)
	}
	if a := <-long; a.rec.Status != "success" {
		t.Errorf("the first: HTTP %d %s", a.status, a.body)
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

// TestDeliveredTwice has builds that outlast ack_wait, so that the queue
// delivers them again, to a second worker meanwhile and to the first afterwards.
func TestDeliveredTwice(t *testing.T) {
	s, f, o := around(t, stack.OpenFaaSConfig{AckWait: time.Second, Workers: 2}, stack.FunctionConfig{Watchdog: true})
	r := newReceiver(t)
	m := mark()
	repository := strings.ToLower(m)
	id := enqueue(t, f, o, request(t, s, repository, "FROM busybox", "RUN sleep 5; : "+m), "X-Callback-Url", r.URL)
	waitStep(t, s, m, true, time.Minute)
	if v := verdict(t, f, o, id); v.status != http.StatusAccepted || v.rec.Status != "in_progress" {
		t.Errorf("meanwhile: HTTP %d %s", v.status, v.body)
	}
	first, second := r.next(t), r.next(t)
	for _, c := range []callback{first, second} {
		if c.header.Get("X-Call-Id") != id || c.header.Get("X-Function-Status") != "200" || c.rec.Digest == "" || c.rec.Digest != first.rec.Digest {
			t.Errorf("a callback: %v %s", c.header, c.body)
		}
		if c.header.Get("X-Build-Signature") != stack.Sign(f.Secret, c.body) {
			t.Error("the callback's signature is wrong")
		}
	}
	if log := first.rec.Log; !slices.Equal(log, second.rec.Log) {
		t.Errorf("logs differ: %q and %q", log, second.rec.Log)
	}
	if n := pushes(t, s, repository); n != 1 {
		t.Errorf("%d pushes, want 1", n)
	}
	t.Logf("the call's id is %d times in the workers' logs", deliveries(t, o, id))
	if v := verdict(t, f, o, id); v.status != http.StatusOK || v.rec.Digest != first.rec.Digest {
		t.Errorf("after: HTTP %d %s", v.status, v.body)
	}
}

// TestFiftyDeliveredTwice: each of fifty messages is delivered at least twice,
// and built once.
func TestFiftyDeliveredTwice(t *testing.T) {
	const messages = 50
	// Each build sleeps for longer than ack_wait, and both workers' calls wait.
	s, f, o := around(t, stack.OpenFaaSConfig{AckWait: time.Second, Workers: 10}, stack.FunctionConfig{Watchdog: true, Env: map[string]string{"max_builds": "10"}})
	r := newReceiver(t)
	repositories, ids := map[string]string{}, []string{}
	for range messages {
		m := mark()
		id := enqueue(t, f, o, request(t, s, strings.ToLower(m), "FROM busybox", "RUN sleep 1.5; : "+m), "X-Callback-Url", r.URL)
		repositories[id] = strings.ToLower(m)
		ids = append(ids, id)
	}
	count := func() map[string][]callback {
		byID := map[string][]callback{}
		for _, c := range r.all() {
			id := c.header.Get("X-Call-Id")
			byID[id] = append(byID[id], c)
		}
		return byID
	}
	eventually(t, 3*time.Minute, func() error {
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
			if c.header.Get("X-Function-Status") != "200" || c.rec.Digest != callbacks[0].rec.Digest || c.rec.Digest == "" {
				t.Errorf("a callback: %v %s", c.header, c.body)
			}
		}
		total += pushes(t, s, repositories[id])
	}
	t.Logf("%d callbacks, %d pushes", len(r.all()), total)
	if total != messages {
		t.Errorf("%d pushes, want %d", total, messages)
	}
}
