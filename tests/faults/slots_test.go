package faults

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestAllSlotsTaken sends one caller of each kind to a builder whose only slot
// is taken.
func TestAllSlotsTaken(t *testing.T) {
	t.Parallel()
	_, b, f := start(t, stack.FunctionConfig{Env: map[string]string{"max_builds": "1"}})
	quick := func() []byte { return request(t, local(), "FROM busybox", "RUN : "+mark()) }
	m := mark()
	holds := background(t, f, request(t, local(), "FROM busybox", sleep(m, 5*time.Minute)), client.NDJSON)
	b.WaitStep(t, m)

	mustSend(t, f, quick(), jsonForm).WantFailed(t, "busy")

	const heldFor = 15 * time.Second // a heartbeat comes after 10 s
	type kind struct {
		name          string
		header, value string
	}
	var waits sync.WaitGroup
	for _, k := range []kind{
		{"ndjson", "Accept", client.NDJSON},
		{"sse", "Accept", client.SSE},
		{"queue worker", "User-Agent", "openfaas-ce/queue-worker"},
		{"callback", "X-Callback-Url", "http://127.0.0.1:1/"},
	} {
		req := f.MustRequest(t, testContext(t), quick(), client.Header(k.header, k.value))
		waits.Go(func() {
			a, err := f.Do(req)
			if err != nil {
				t.Errorf("%s: %v", k.name, err)
				return
			}
			if a.Status != "success" || a.Took < heldFor {
				t.Errorf("%s: want success after a wait, got %v", k.name, a)
			}
			if k.header == "Accept" && a.Heartbeats == 0 {
				t.Errorf("%s: waited %v without a heartbeat", k.name, a.Took)
			}
		})
	}
	stack.Eventually(t, patience(5*time.Second), func() error {
		if n, err := f.Metric("builder_builds_waiting"); err != nil || n != 4 {
			return fmt.Errorf("%v builds wait, want 4: %v", n, err)
		}
		return nil
	})
	time.Sleep(heldFor)
	release(t, m)
	holds().WantSuccess(t)
	waits.Wait()
	waitIdle(t, f)
}

// TestQueueWait lets those wait in vain who may wait.
func TestQueueWait(t *testing.T) {
	t.Parallel()
	_, b, f := start(t, stack.FunctionConfig{Env: map[string]string{"max_builds": "1", "queue_wait": "5s"}})
	ctx, cancel := context.WithCancel(testContext(t))
	m := mark()
	long := request(t, local(), "FROM busybox", sleep(m, 5*time.Minute))
	var holds sync.WaitGroup
	holds.Go(func() { f.Post(ctx, long, client.Accept(client.NDJSON)) })
	b.WaitStep(t, m)
	body := request(t, local(), "FROM busybox", "RUN : "+mark())
	for _, header := range [][2]string{{"Accept", client.NDJSON}, {"Accept", client.SSE}, {"X-Callback-Url", "http://127.0.0.1:1/"}} {
		a := f.MustPost(t, testContext(t), body, client.Header(header[0], header[1]))
		a.WantFailed(t, "queue_timeout")
		if a.Took < 5*time.Second || a.Took > patience(30*time.Second) {
			t.Errorf("%v waited %v, want queue_wait, 5s", header, a.Took)
		}
	}

	// One who leaves the queue takes nothing from it.
	left, leave := context.WithTimeout(testContext(t), 500*time.Millisecond)
	defer leave()
	if a, err := f.Post(left, body, client.Accept(client.NDJSON)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, %v while the slot was taken", a, err)
	}
	cancel()
	holds.Wait()
	waitIdle(t, f)
	mustSend(t, f, body, jsonForm).WantSuccess(t)
}

// TestUploadWait has one stranger take the only slot for bodies, with an upload that
// is not slow. A small body needs none. A larger one waits for it, and not for as
// long as queue_wait: that is for whose signature has passed, and a header is none.
func TestUploadWait(t *testing.T) {
	t.Parallel()
	_, f := stack.Test(t, stack.FunctionConfig{Env: map[string]string{
		"max_uploads": "1", "queue_wait": "2m",
	}})
	small, large := request(t, local(), "FROM busybox", "RUN : "+mark()), layered(t, local(), 2<<20)
	mustSend(t, f, small, jsonForm).WantSuccess(t)
	ways := [][2]string{{}, {"Accept", client.NDJSON}, {"Accept", client.SSE}, {"X-Callback-Url", "http://127.0.0.1:1/"}, {"User-Agent", "openfaas-ce/queue-worker"}}
	post := func(way [2]string, body []byte, signature string) (client.Answer, error) {
		var changes []client.Change
		if way[0] != "" {
			changes = append(changes, client.Header(way[0], way[1]))
		}
		if signature != "" {
			changes = append(changes, client.Signature(signature))
		}
		return f.Post(testContext(t), body, changes...)
	}
	// round returns what it has to say, while the stranger has the slot.
	round := func(leave func()) (said []string) {
		t.Helper()
		for _, way := range ways {
			a, err := post(way, small, "")
			// A slot for it would be waited for for 30 s.
			if err != nil || a.Status != "success" || a.Took > 15*time.Second {
				said = append(said, fmt.Sprintf("%v: a small body needs no slot, got %v, %v", way, a, err))
			}
		}
		// Whether the signature is right is not known yet.
		var mu sync.Mutex
		var waits sync.WaitGroup
		for _, way := range ways {
			for _, signature := range []string{"", wrongSignature} {
				waits.Go(func() {
					a, err := post(way, large, signature)
					if err != nil || a.Code != "busy" || a.StatusCode != http.StatusTooManyRequests || a.Took < 25*time.Second || a.Took > patience(40*time.Second) {
						mu.Lock()
						defer mu.Unlock()
						said = append(said, fmt.Sprintf("%v: want busy after 30s, got %v, %v", way, a, err))
					}
				})
			}
		}
		waits.Wait()

		answered := make(chan struct{})
		wait := stack.Later(t, func(ctx context.Context) (client.Answer, error) {
			defer close(answered)
			return f.Post(ctx, large, client.Accept(client.NDJSON))
		})
		select {
		case <-answered:
			said = append(said, fmt.Sprintf("built while the slot was taken: %v", wait()))
		case <-time.After(time.Second):
		}
		leave()
		wait().WantSuccess(t)
		return said
	}
	for n := 1; ; n++ {
		ctx, leave := context.WithCancel(testContext(t))
		ends := strangers(ctx, t, f, 1, 1<<20)
		said := round(leave)
		// A stranger whom the machine keeps from sending for some seconds is slow: others get
		// its slot.
		if end := <-ends; end != "held" && n < 3 {
			t.Logf("again: the stranger lost its slot, %s", end)
			continue
		} else if end != "held" {
			t.Fatalf("the stranger lost its slot three times, at last with %s", end)
		}
		for _, text := range said {
			t.Error(text)
		}
		return
	}
}

// strangers has n of them hold upload slots until ctx ends: each sends more than is
// read without a slot, and goes on at rate bytes a second. ends gets how each has ended, "held"
// if ctx ended it.
func strangers(ctx context.Context, t *testing.T, f *stack.Function, n, rate int) (ends <-chan string) {
	t.Helper()
	h := whole("", make([]byte, 150*rate)) // more than a test lasts
	h.rate = rate
	connected := make(chan net.Conn, n)
	h.connected = func(conn net.Conn) { connected <- conn }
	ended := make(chan string, n)
	for range n {
		go func() { ended <- h.sendOne(ctx, f) }()
	}
	for range n {
		waitSlot(t, <-connected)
	}
	return ended
}

// waitSlot returns once an upload has its slot: what has been sent is read to its end,
// and is more than is read without a slot.
func waitSlot(t *testing.T, conn net.Conn) {
	t.Helper()
	stack.Eventually(t, patience(10*time.Second), func() error {
		if n := underway(t, conn.LocalAddr(), conn.RemoteAddr()); n > 0 {
			return fmt.Errorf("an upload has no slot: %d bytes are not read", n)
		}
		return nil
	})
}

// TestSlowStrangers has strangers hold all upload slots, slowly: who needs one gets
// that of the slowest.
func TestSlowStrangers(t *testing.T) {
	t.Parallel()
	_, f := stack.Test(t, stack.FunctionConfig{Env: map[string]string{"max_uploads": "16"}})
	large := layered(t, local(), 20<<20)
	mustSend(t, f, large, jsonForm).WantSuccess(t)
	cached := mustSend(t, f, large, jsonForm)
	cached.WantSuccess(t)
	for _, form := range []string{jsonForm, client.NDJSON} {
		ctx, leave := context.WithCancel(testContext(t))
		defer leave()
		strangers(ctx, t, f, 16, 100<<10)
		a := mustSend(t, f, large, form)
		a.WantSuccess(t)
		wait := a.Took - cached.Took
		t.Logf("%q: 20 MB beside 16 slow strangers took %v, and %v without", form, a.Took.Round(time.Millisecond), cached.Took.Round(time.Millisecond))
		// A body that waits in vain for a slot waits for 30 s.
		limit := 20 * time.Second
		if *timing {
			limit = 10 * time.Second
		}
		if wait > limit {
			t.Errorf("%q: 20 MB waited %v for 16 slow strangers, want %v at most", form, wait, limit)
		}
		leave()
		waitIdle(t, f)
	}
}

// startUpload opens a connection that sends so much of a body that it needs a slot, and
// no more.
func startUpload(t *testing.T, f *stack.Function, method, path string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(f.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(testTimeout))
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: builder\r\nContent-Length: 10000000\r\nX-Build-Signature: sha256=%064d\r\n\r\n", method, path, 0)
	if _, err := conn.Write(make([]byte, 1<<20+64<<10)); err != nil {
		t.Fatal(err)
	}
	waitSlot(t, conn)
	return conn
}

// TestAbortedStreams aborts a hundred streams at their first log line: each
// needs the only slot to get one.
func TestAbortedStreams(t *testing.T) {
	t.Parallel()
	_, _, f := start(t, stack.FunctionConfig{Env: map[string]string{"max_builds": "1", "queue_wait": patience(5 * time.Second).String()}})
	c := f.Client
	c.HTTP = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	all := time.Now()
	var longest time.Duration
	for i := range 100 {
		body := request(t, local(), "FROM busybox", sleep(mark(), 5*time.Minute))
		began := time.Now()
		if err := abort(testContext(t), &c, body, []string{client.NDJSON, client.SSE}[i%2]); err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		longest = max(longest, time.Since(began))
	}
	t.Logf("100 aborted streams in %v; the longest wait for a first line was %v", time.Since(all), longest)
	idle := waitIdle(t, f)
	t.Logf("idle %v after the last", idle)
	mustSend(t, f, request(t, local(), "FROM busybox", "RUN : "+mark()), jsonForm).WantSuccess(t)
	if n, err := f.Metric("builder_builds_total", `code="canceled"`); err != nil || n != 100 {
		t.Errorf("%v builds were canceled, want 100: %v", n, err)
	}
}

// abort goes away when the first log line has come.
func abort(ctx context.Context, c *client.Client, body []byte, form string) error {
	req, err := c.Request(ctx, body, client.Accept(form))
	if err != nil {
		return err
	}
	resp, err := c.Send(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		var rec client.Record
		if json.Unmarshal(bytes.TrimPrefix(lines.Bytes(), []byte("data: ")), &rec) != nil {
			continue
		}
		if rec.Status != "in_progress" {
			return fmt.Errorf("the build ended: %+v", rec)
		}
		if len(rec.Log) > 0 {
			return nil
		}
	}
	return errors.New("the stream ended before its first line")
}

// TestSlowUploads has strangers and slow clients hold their connections open
// while others build.
func TestSlowUploads(t *testing.T) {
	t.Parallel()
	const long = 20 * time.Second
	const header = "POST /build HTTP/1.1\r\nHost: builder\r\nContent-Length: 10000000\r\n"
	signed := header + "X-Build-Signature: sha256=" + strings.Repeat("0", 64) + "\r\n\r\n"
	for name, test := range map[string]struct {
		sent string // and then a byte each 100 ms
		drip string
		code string
		// grace is upload_grace, long if zero. The strangers that wait for a slot would
		// have one ended before a long grace, and its code would be busy.
		grace time.Duration
	}{
		"unsigned, without a body": {sent: header + "\r\n", code: "unauthorized"},
		"unsigned":                 {sent: header + "\r\n", drip: "x", code: "unauthorized"},
		"unsigned, an envelope":    {sent: header + "\r\n{", drip: "x", code: "slow_upload"},
		"slow":                     {sent: signed, drip: "x", code: "slow_upload"},
		"stuck":                    {sent: signed + "x", code: "slow_upload"},
		"slow, in a slot":          {sent: signed + strings.Repeat("x", 3<<19), drip: "x", code: "slow_upload", grace: 2 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			grace := cmp.Or(test.grace, long)
			_, f := stack.Test(t, stack.FunctionConfig{Env: map[string]string{
				"max_builds": "1", "max_uploads": "2", "upload_grace": grace.String(), "upload_min_rate": "1MiB",
			}})
			body := request(t, local(), "FROM busybox", "RUN : "+mark())
			mustSend(t, f, body, jsonForm).WantSuccess(t)

			addr := strings.TrimPrefix(f.URL, "http://")
			var strangers sync.WaitGroup
			defer strangers.Wait()
			const n = 6
			var held sync.WaitGroup // until all have sent their header
			held.Add(n)
			for range n {
				strangers.Go(func() {
					conn, err := net.Dial("tcp", addr)
					if err != nil {
						held.Done()
						t.Error(err)
						return
					}
					defer conn.Close()
					conn.SetDeadline(time.Now().Add(time.Minute))
					io.WriteString(conn, test.sent)
					held.Done()
					stop := make(chan struct{})
					defer close(stop)
					go func() {
						for test.drip != "" {
							if _, err := io.WriteString(conn, test.drip); err != nil {
								return
							}
							select {
							case <-stop:
								return
							case <-time.After(100 * time.Millisecond):
							}
						}
					}()
					resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
					if err != nil {
						t.Errorf("no answer: %v", err)
						return
					}
					defer resp.Body.Close()
					a, err := client.Read(resp, nil)
					if err != nil {
						t.Error(err)
						return
					}
					if a.Code != test.code || a.StatusCode != client.HTTPStatus[test.code] {
						t.Errorf("want %s, got %v", test.code, a)
					}
				})
			}
			held.Wait()
			time.Sleep(50 * time.Millisecond)

			// No slot for builds is theirs, and the small body needs none of those for
			// bodies.
			start := time.Now()
			a := mustSend(t, f, body, jsonForm)
			a.WantSuccess(t)
			t.Logf("a build beside %d of them took %v", n, time.Since(start))
			// A build that waited for a stranger would wait for about grace.
			limit := grace - 2*time.Second
			if test.grace != 0 {
				limit = patience(2 * grace)
			}
			if a.Took > limit {
				t.Errorf("a build took %v beside %d slow uploads, want %v at most", a.Took, n, limit)
			}
			if n, err := f.Metric("builder_builds_total"); err != nil || n != 2 {
				t.Errorf("%v builds were counted, want 2: %v", n, err)
			}
		})
	}
}
