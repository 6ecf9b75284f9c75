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

	"handler/function/tests/stack"
)

// The forms of an answer, by their media types.
const (
	jsonType   = "application/json"
	ndjsonType = "application/x-ndjson"
	sseType    = "text/event-stream"
)

func TestForms(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	ref := s.Registry.Image("forms:latest")
	body := tarOf(t, config{"image": ref}, copyOnly)
	for _, test := range []struct {
		name   string
		accept []string // headers
		want   string
	}{
		{"no header", nil, jsonType},
		{"curl", []string{"*/*"}, jsonType},
		{"axios", []string{"application/json, text/plain, */*"}, jsonType},
		{"browser", []string{"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}, jsonType},
		{"other ndjson", []string{"application/ndjson"}, jsonType},
		{"faas-cli", []string{"application/x-ndjson"}, ndjsonType},
		{"any case", []string{"Application/X-NDJSON"}, ndjsonType},
		{"in a list", []string{"application/json;q=0.5, application/x-ndjson;charset=utf-8 , */*"}, ndjsonType},
		{"CE gateway", []string{"text/event-stream, application/x-ndjson"}, ndjsonType},
		{"both the other way", []string{"application/x-ndjson,text/event-stream"}, ndjsonType},
		{"two headers", []string{"text/event-stream", "application/x-ndjson"}, ndjsonType},
		{"faasd", []string{"text/event-stream"}, sseType},
		{"events in a list", []string{"text/plain, TEXT/Event-Stream;q=0.9"}, sseType},
		{"refused", []string{"application/x-ndjson;q=0, text/event-stream"}, sseType},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := post(t, ctx, f, body, func(req *http.Request) {
				req.Header["Accept"] = test.accept
				req.Header.Set("X-Call-Id", "call "+test.name)
			})
			if got.StatusCode != http.StatusOK {
				t.Fatalf("got %s: %s", got.Status, got.text)
			}
			if form := got.Header.Get("Content-Type"); form != test.want {
				t.Errorf("the answer is %s, want %s", form, test.want)
			}
			if id := got.Header.Get("X-Call-Id"); id != "call "+test.name {
				t.Errorf("X-Call-Id is %q", id)
			}
			var records []stack.Record
			switch test.want {
			case jsonType:
				if !strings.HasPrefix(got.text, "{\n  \"log\": [") || !strings.HasSuffix(got.text, "\n}\n") {
					t.Errorf("the object is not indented: %.50q", got.text)
				}
				records = append(records, record(t, got.text))
			case ndjsonType:
				records = ndjson(t, got.text)
			case sseType:
				records = events(t, got.text)
			}
			last := records[len(records)-1]
			if last.Status != "success" || last.Image != ref || last.Digest == "" || last.Duration <= 0 {
				t.Errorf("got %+v", last)
			}
			checkLog(t, lines(records))
		})
	}
}

// events reads server-sent events. Comments are between them.
func events(t *testing.T, text string) (records []stack.Record) {
	t.Helper()
	rest, ok := strings.CutSuffix(text, "\n\n")
	if !ok {
		t.Fatalf("the stream does not end with a blank line: %q", text)
	}
	for event := range strings.SplitSeq(rest, "\n\n") {
		if strings.HasPrefix(event, ":") {
			continue
		}
		data, ok := strings.CutPrefix(event, "data: ")
		if !ok || strings.Contains(data, "\n") || len(data) >= 60<<10 {
			t.Fatalf("not an event of one line of data: %.200q", event)
		}
		records = append(records, record(t, data))
	}
	verdicts(t, records)
	return records
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
	const silence = 12 * time.Second
	var streams sync.WaitGroup
	for _, form := range []string{ndjsonType, sseType} {
		streams.Go(func() {
			body := tarOf(t, config{"image": s.Registry.Image("live:latest"), "noCache": true}, map[string]string{
				"Dockerfile": fmt.Sprintf("FROM busybox\nRUN echo %s speaks; sleep %d\n", form, int(silence.Seconds())),
			})
			resp, err := f.Post(ctx, body, form)
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
				case strings.HasPrefix(line, ":"), strings.HasPrefix(line, `{"log":[],"status":"in_progress","duration":`):
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
			if spoke == 0 || ended-spoke < silence-time.Second {
				t.Errorf("%s: the step spoke after %v of %v: the line was held back", form, spoke, ended)
			}
			if between := beat - spoke; between < 9*time.Second || between > 11*time.Second {
				t.Errorf("%s: the step spoke after %v, and a heartbeat came after %v, want one 10 s later", form, spoke, beat)
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
	proxy := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(to)
		r.Out.Body = &lateEnd{r.Out.Body, r.Out.ContentLength}
	}})
	t.Cleanup(proxy.Close)
	through := *f
	through.URL = proxy.URL
	mustBuild(t, ctx, &through, tarOf(t, config{"image": s.Registry.Image("proxy:latest")}, copyOnly))
	for _, accept := range []string{ndjsonType, sseType, ""} {
		got := post(t, ctx, &through, tarOf(t, config{"image": "UPPER"}, copyOnly), func(req *http.Request) { req.Header.Set("Accept", accept) })
		if !strings.Contains(got.text, "bad_config") {
			t.Errorf("for %q: got %s: %s", accept, got.Status, got.text)
		}
		got = post(t, ctx, &through, []byte("hello"), func(req *http.Request) {
			req.Header.Set("Accept", accept)
			req.Header.Set("X-Build-Signature", stack.Sign("another key", nil))
		})
		if got.StatusCode != http.StatusUnauthorized || !strings.Contains(got.text, "unauthorized") {
			t.Errorf("for %q: got %s: %s", accept, got.Status, got.text)
		}
	}
}

// lateEnd is a body whose end is noticed late.
type lateEnd struct {
	io.ReadCloser
	left int64
}

func (b *lateEnd) Read(p []byte) (int, error) {
	if b.left == 0 {
		time.Sleep(10 * time.Millisecond)
	}
	n, err := b.ReadCloser.Read(p)
	b.left -= int64(n)
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
		return tarOf(t, config{"image": s.Registry.Image("long:" + tag), "noCache": true}, files)
	}

	stream := post(t, ctx, f, body("stream"), func(req *http.Request) { req.Header.Set("Accept", ndjsonType) })
	xs, last := 0, ""
	for _, line := range lines(ndjson(t, stream.text)) {
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

	whole := post(t, ctx, f, body("whole"), nil)
	got := record(t, whole.text)
	if got.Status != "success" || len(whole.text) > 1<<20+32<<10 || len(whole.text) < 1<<20-128<<10 {
		t.Errorf("got status %q in %d bytes, want 1 MiB", got.Status, len(whole.text))
	}
	left := regexp.MustCompile(`… (\d+) lines left out …`).FindStringSubmatch(strings.Join(got.Log, "\n"))
	if left == nil {
		t.Fatal("the log does not say what was left out")
	}
	if err := within(strings.Join(got.Log, "\n"), "l: first\n", "pushing layers"); err != nil {
		t.Errorf("the log lacks its head or its tail: %.100v", err)
	}
	omitted, err := strconv.Atoi(left[1])
	if err != nil {
		t.Fatal(err)
	}
	// What is there and what is not are all lines that the stream had, but for
	// the statuses, which are not always the same.
	if all := len(lines(ndjson(t, stream.text))); omitted+len(got.Log)-1 < numbered || omitted+len(got.Log)-1 > all+50 {
		t.Errorf("%d lines are there and %d left out, of about %d", len(got.Log)-1, omitted, all)
	}
}
