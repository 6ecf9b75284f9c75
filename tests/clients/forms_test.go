package clients_test

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

func TestForms(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	ref := s.Registry.Image("forms:latest")
	body := stack.Body(t, config{"image": ref}, copyOnly)
	for _, test := range []struct {
		name   string
		accept []string // headers
		want   string
	}{
		{"no header", nil, client.JSON},
		{"curl", []string{"*/*"}, client.JSON},
		{"axios", []string{"application/json, text/plain, */*"}, client.JSON},
		{"browser", []string{"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}, client.JSON},
		{"other ndjson", []string{"application/ndjson"}, client.JSON},
		{"faas-cli", []string{"application/x-ndjson"}, client.NDJSON},
		{"any case", []string{"Application/X-NDJSON"}, client.NDJSON},
		{"in a list", []string{"application/json;q=0.5, application/x-ndjson;charset=utf-8 , */*"}, client.NDJSON},
		{"CE gateway", []string{"text/event-stream, application/x-ndjson"}, client.NDJSON},
		{"both the other way", []string{"application/x-ndjson,text/event-stream"}, client.NDJSON},
		{"two headers", []string{"text/event-stream", "application/x-ndjson"}, client.NDJSON},
		{"faasd", []string{"text/event-stream"}, client.SSE},
		{"events in a list", []string{"text/plain, TEXT/Event-Stream;q=0.9"}, client.SSE},
		{"refused", []string{"application/x-ndjson;q=0, text/event-stream"}, client.SSE},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := f.MustPost(t, ctx, body, func(req *http.Request) {
				req.Header["Accept"] = test.accept
				req.Header.Set("X-Call-Id", "call "+test.name)
			})
			if got.StatusCode != http.StatusOK {
				t.Fatalf("got %v", got)
			}
			if form := got.Header.Get("Content-Type"); form != test.want {
				t.Errorf("the answer is %s, want %s", form, test.want)
			}
			if id := got.Header.Get("X-Call-Id"); id != "call "+test.name {
				t.Errorf("X-Call-Id is %q", id)
			}
			if test.want == client.JSON && (!strings.HasPrefix(got.Body, "{\n  \"log\": [") || !strings.HasSuffix(got.Body, "\n}\n")) {
				t.Errorf("the object is not indented: %.50q", got.Body)
			}
			if got.Status != "success" || got.Image != ref || got.Digest == "" || got.Duration <= 0 {
				t.Errorf("got %v, image %q, digest %q, duration %v", got, got.Image, got.Digest, got.Duration)
			}
			if strings.Contains(got.Body, `"commit"`) {
				t.Errorf("a build without a git context has a commit: %s", got.Body)
			}
			checkLog(t, got.Log)
		})
	}
}

var logLine = regexp.MustCompile(`^(v: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \S.*|s: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \S.*|l: .*|w: .*)$`)

// checkLog holds what the lines of every successful push have: their prefixes,
// a step, its end, and a status.
func checkLog(t *testing.T, log []string) {
	t.Helper()
	for _, line := range log {
		if !logLine.MatchString(line) {
			t.Errorf("not a line of the contract: %q", line)
		}
	}
	for _, want := range []string{
		`^v: \S+ \[internal\] load build definition from Dockerfile$`,
		`^v: \S+ \[internal\] load build definition from Dockerfile \d+\.\d\ds$`,
		`^v: \S+ \[1/1\] COPY hello.txt /( \d+\.\d\ds| CACHED)$`,
		`^s: \S+ pushing layers$`,
		`^s: \S+ pushing layers.* \d+\.\d\ds$`,
	} {
		if !slices.ContainsFunc(log, regexp.MustCompile(want).MatchString) {
			t.Errorf("no line is like %s in\n%s", want, strings.Join(log, "\n"))
		}
	}
}

// TestLive reads a line of a step while the step still runs, and is told every
// 10 s that it does.
func TestLive(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	const silence = 20 * time.Second // two heartbeats, or one where all is late
	var streams sync.WaitGroup
	for _, form := range []string{client.NDJSON, client.SSE} {
		streams.Go(func() {
			body := stack.Body(t, config{"image": s.Registry.Image("live:latest"), "noCache": true}, map[string]string{
				"Dockerfile": fmt.Sprintf("FROM busybox\nRUN echo %s speaks; sleep %d\n", form, int(silence.Seconds())),
			})
			req, err := f.Request(ctx, body, client.Accept(form))
			if err != nil {
				t.Error(err)
				return
			}
			resp, err := f.Send(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			var spoke, beat, ended time.Duration
			var last string
			began := time.Now()
			stream := bufio.NewScanner(resp.Body)
			for stream.Scan() {
				line := stream.Text()
				switch now := time.Since(began); {
				case strings.Contains(line, "l: "+form+" speaks"):
					spoke = now
				case spoke > 0 && beat == 0 && (strings.HasPrefix(line, ":") || strings.HasPrefix(line, `{"log":[],"status":"in_progress","duration":`)):
					beat = now
				}
				if line != "" {
					last = line
				}
			}
			ended = time.Since(began)
			if err := stream.Err(); err != nil {
				t.Errorf("%s: %v", form, err)
			}
			if !strings.Contains(last, `"status":"success"`) {
				t.Errorf("%s ended with %q", form, last)
			}
			if spoke == 0 || ended-spoke < silence*3/4 {
				t.Errorf("%s: the step spoke after %v of %v: the line was held back", form, spoke, ended)
			}
			if between := beat - spoke; between < 5*time.Second || between > 15*time.Second {
				t.Errorf("%s: the step spoke after %v, and a heartbeat came after %v, want one some 10 s later", form, spoke, beat)
			}
		})
	}
	streams.Wait()
}

// TestReverseProxy reads answers through what of-watchdog and the gateway are
// made of. It drops a request whose answer begins before it has seen the body's
// end, which here takes as long as on a machine that is busy.
func TestReverseProxy(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	to, err := url.Parse(f.URL)
	if err != nil {
		t.Fatal(err)
	}
	ends := make(chan time.Duration, 1)
	proxy := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(to)
		r.Out.Body = &lateEnd{ReadCloser: r.Out.Body, left: r.Out.ContentLength, ends: ends}
	}})
	t.Cleanup(proxy.Close)
	through := f.Client
	through.URL = proxy.URL
	// post repeats a request whose end this machine noticed later than the function waits for.
	post := func(body []byte, changes ...client.Change) client.Answer {
		t.Helper()
		for range 3 {
			got, err := through.Post(ctx, body, changes...)
			late := time.Minute // a proxy that drops a request may never come to the end
			select {
			case late = <-ends:
			case <-time.After(10 * time.Second):
			}
			if err == nil && got.StatusCode != http.StatusBadGateway {
				return got
			}
			if late < 15*time.Millisecond {
				t.Fatalf("got %v, %v, where the body's end was noticed after %v", got, err, late)
			}
		}
		t.Fatal("the body's end was noticed too late three times")
		return client.Answer{}
	}
	if got := post(stack.Body(t, config{"image": s.Registry.Image("proxy:latest")}, copyOnly), client.Accept(client.NDJSON)); got.Status != "success" {
		t.Errorf("a build: got %v", got)
	}
	for _, accept := range []string{client.NDJSON, client.SSE, ""} {
		got := post(stack.Body(t, config{"image": "UPPER"}, copyOnly), client.Accept(accept))
		if !strings.Contains(got.Body, "bad_config") {
			t.Errorf("for %q: got %v", accept, got)
		}
		got = post([]byte("hello"), client.Accept(accept), client.Signature(client.Sign("another key", nil)))
		if got.StatusCode != http.StatusUnauthorized || !strings.Contains(got.Body, "unauthorized") {
			t.Errorf("for %q: got %v", accept, got)
		}
	}
}

// lateEnd is a body whose end is noticed late. The function answers 20 ms after the end at
// the earliest.
type lateEnd struct {
	io.ReadCloser
	left int64
	read time.Time            // when nothing was left
	ends chan<- time.Duration // how long after that the end was noticed
}

func (b *lateEnd) Read(p []byte) (int, error) {
	if b.left > 0 {
		n, err := b.ReadCloser.Read(p)
		b.left -= int64(n)
		b.read = time.Now()
		return n, err
	}
	time.Sleep(10 * time.Millisecond)
	n, err := b.ReadCloser.Read(p)
	select {
	case b.ends <- time.Since(b.read):
	default: // a request that was given up has left its own
	}
	return n, err
}

// TestLongOutput prints a line of 300 KiB, and then more than an answer in one
// piece may hold.
func TestLongOutput(t *testing.T) {
	daemon, err := stack.Shared(t).NewBuildkitd(t.Context(), stack.BuildkitdConfig{Env: stack.WholeLogs})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(daemon.Kill)
	ctx, s, f := start(t, stack.FunctionConfig{Buildkitd: daemon})

	const longLine, numbered = 300 << 10, 40_000
	files := map[string]string{"Dockerfile": fmt.Sprintf(`FROM busybox
RUN echo first; head -c %d /dev/zero | tr '\0' x; echo; yes 'output that goes on and on' | head -n %d | cat -n
`, longLine, numbered)}
	body := func(tag string) []byte {
		return stack.Body(t, config{"image": s.Registry.Image("long:" + tag), "noCache": true}, files)
	}

	stream := f.MustPost(t, ctx, body("stream"), client.Accept(client.NDJSON))
	xs, last := 0, ""
	for _, line := range stream.Log {
		if text, ok := strings.CutPrefix(line, "l: "); ok {
			last = text
			if strings.Trim(text, "x") == "" {
				xs += len(text)
			}
		}
	}
	if xs != longLine {
		t.Errorf("%d bytes of the long line came, want %d", xs, longLine)
	}
	if !strings.Contains(last, strconv.Itoa(numbered)) {
		t.Errorf("the last line of the output is %q", last)
	}

	whole := f.MustPost(t, ctx, body("whole"))
	if whole.Status != "success" || len(whole.Body) > 1<<20+32<<10 || len(whole.Body) < 1<<20-128<<10 {
		t.Errorf("got status %q in %d bytes, want 1 MiB", whole.Status, len(whole.Body))
	}
	left := regexp.MustCompile(`… (\d+) lines left out …`).FindStringSubmatch(strings.Join(whole.Log, "\n"))
	if left == nil {
		t.Fatal("the log does not say what was left out")
	}
	if err := within(strings.Join(whole.Log, "\n"), "l: first\n", "pushing layers"); err != nil {
		t.Errorf("the log lacks its head or its tail: %.100v", err)
	}
	omitted, err := strconv.Atoi(left[1])
	if err != nil {
		t.Fatal(err)
	}
	// What is there and what is not are all lines that the stream had, but for
	// the statuses, which are not always the same.
	if all := len(stream.Log); omitted+len(whole.Log)-1 < numbered || omitted+len(whole.Log)-1 > all+50 {
		t.Errorf("%d lines are there and %d left out, of about %d", len(whole.Log)-1, omitted, all)
	}
}
