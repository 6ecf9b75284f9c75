package openfaas

import (
	"bufio"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"handler/function/tests/stack"
)

// TestSync builds through gateway and provider, in every form and at every path.
func TestSync(t *testing.T) {
	s, f, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true})
	for name, tt := range map[string]struct{ path, accept, contentType string }{
		"JSON":            {"/function/builder/build", "", "application/json"},
		"JSON at /":       {"/function/builder", "", "application/json"},
		"JSON at //":      {"/function/builder/", "", "application/json"},
		"NDJSON":          {"/function/builder/build", ndjson, ndjson},
		"SSE":             {"/function/builder/build", sse, sse},
		"NDJSON, live":    {"/function/builder/build", both, ndjson},
		"with namespace":  {"/function/builder.openfaas-fn", "", "application/json"},
		"chunked uploads": {"/function/builder/build", both, ndjson},
	} {
		t.Run(name, func(t *testing.T) {
			m := mark()
			repository := strings.ToLower(m)
			req := post(t, f, o, tt.path, request(t, s, repository, "FROM busybox", "RUN : "+m))
			if tt.accept != "" {
				req.Header.Set("Accept", tt.accept)
			}
			if name == "chunked uploads" {
				req.ContentLength = -1
			}
			a := do(t, req)
			if a.status != http.StatusOK || a.rec.Status != "success" || a.rec.Digest == "" || a.header.Get("Content-Type") != tt.contentType {
				t.Fatalf("HTTP %d %s: %s", a.status, a.header.Get("Content-Type"), a.body)
			}
			if a.header.Get("X-Call-Id") == "" {
				t.Error("no X-Call-Id")
			}
			if tt.accept == "" && a.header.Get("X-Build-Signature") != stack.Sign(f.Secret, []byte(a.body)) {
				t.Error("the answer's signature is wrong")
			}
			if n := pushes(t, s, repository); n != 1 {
				t.Errorf("%d pushes", n)
			}
		})
	}
	t.Run("own call id", func(t *testing.T) {
		a := do(t, post(t, f, o, "/function/builder/build", []byte("x"), "X-Call-Id", "mine"))
		if a.header.Get("X-Call-Id") != "mine" {
			t.Errorf("X-Call-Id %q", a.header.Get("X-Call-Id"))
		}
	})
	t.Run("large", func(t *testing.T) {
		// A sync call carries what a queued one cannot.
		m := mark()
		dir := stack.Context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY large /\n", "large": strings.Repeat(m, 1<<20)})
		body, err := stack.Tar(dir, map[string]any{"skipPush": true})
		if err != nil {
			t.Fatal(err)
		}
		if a := do(t, post(t, f, o, "/function/builder/build", body)); a.rec.Status != "success" {
			t.Errorf("%d bytes: HTTP %d: %s", len(body), a.status, a.body)
		}
	})
}

// arrivals returns when the lines of a build arrived that prints four, a second
// apart.
func arrivals(t *testing.T, s *stack.Stack, f *stack.Function, o *stack.OpenFaaS, accept string) []time.Duration {
	t.Helper()
	m := mark()
	req := post(t, f, o, "/function/builder/build", request(t, s, "live", "FROM busybox", "RUN for i in 1 2 3 4; do echo line-$i; sleep 1; done; : "+m))
	req.Header.Set("Accept", accept)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var times []time.Duration
	var first time.Time
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 64<<10)
	var last stack.Record
	for lines.Scan() {
		text := strings.TrimPrefix(lines.Text(), "data: ")
		if text == "" || text[0] == ':' {
			continue
		}
		last = stack.Record{}
		if err := json.Unmarshal([]byte(text), &last); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		for _, line := range last.Log {
			if strings.HasPrefix(line, "l: ") && strings.Contains(line, "line-") {
				if first.IsZero() {
					first = time.Now()
				}
				times = append(times, time.Since(first))
			}
		}
	}
	if last.Status != "success" || len(times) != 4 {
		t.Fatalf("%s, lines at %v, %v", last.Status, times, lines.Err())
	}
	return times
}

// TestLive: lines are seen as they are printed, where the gateway lets them
// through.
func TestLive(t *testing.T) {
	s, f, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true})
	for _, accept := range []string{both, sse} {
		times := arrivals(t, s, f, o, accept)
		t.Logf("%s: lines at %v", accept, times)
		for i := range times[1:] {
			if gap := times[i+1] - times[i]; gap < 500*time.Millisecond || gap > 1800*time.Millisecond {
				t.Errorf("%s: a gap of %v, want a second: %v", accept, gap, times)
			}
		}
	}
	// DEPLOY.md says that the CE gateway holds back NDJSON alone.
	times := arrivals(t, s, f, o, ndjson)
	t.Logf("%s: lines at %v", ndjson, times)
	if times[3] > 2500*time.Millisecond {
		t.Errorf("plain NDJSON is live through the gateway, and DEPLOY.md says that it is not: %v", times)
	}
}

// TestTooLong has a build that outlasts the gateway's timeout: what its caller
// sees, and that nobody goes on building for nobody.
func TestTooLong(t *testing.T) {
	s, f, o := around(t, stack.OpenFaaSConfig{Timeout: 4 * time.Second}, stack.FunctionConfig{Watchdog: true})
	for _, accept := range []string{"", both} {
		m := mark()
		req := post(t, f, o, "/function/builder/build", request(t, s, "long", "FROM busybox", "RUN sleep 60; : "+m))
		if accept != "" {
			req.Header.Set("Accept", accept)
		}
		began := time.Now()
		a := do(t, req)
		took := time.Since(began)
		t.Logf("Accept %q: HTTP %d with %d bytes after %v", accept, a.status, len(a.body), took)
		if took > 30*time.Second {
			t.Errorf("cut off after %v", took)
		}
		// As DEPLOY.md says: only the missing verdict tells that a stream was cut off.
		want := answer{status: http.StatusBadGateway}
		if accept != "" {
			want = answer{status: http.StatusOK, rec: stack.Record{Status: "in_progress"}}
		}
		if a.status != want.status || a.rec.Status != want.rec.Status {
			t.Errorf("Accept %q: HTTP %d, last %+v", accept, a.status, a.rec)
		}
		waitStep(t, s, m, false, 10*time.Second)
	}
	eventually(t, 10*time.Second, func() error {
		log, err := f.Log()
		if err == nil && strings.Count(log, `"code":"canceled"`) != 2 {
			err = errors.New("the log has not two builds that were canceled")
		}
		return err
	})
}

// TestInvoke replays what faas-cli invoke --sign sends, and checks what it would
// print: the body, and an exit code that follows from the status.
func TestInvoke(t *testing.T) {
	s, f, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true})
	m := mark()
	invoke := func(body []byte) answer {
		return do(t, post(t, f, o, "/function/builder.openfaas-fn", body, "Content-Type", "text/plain", "User-Agent", "faas-cli/0.18.12"))
	}
	a := invoke(request(t, s, strings.ToLower(m), "FROM busybox", "RUN : "+m))
	if a.status != http.StatusOK || a.rec.Status != "success" || !strings.Contains(a.body, "\n  \"status\": \"success\"") {
		t.Errorf("HTTP %d: %s", a.status, a.body)
	}
	a = invoke(request(t, s, "fails", "FROM busybox", "RUN echo about to fail", "RUN exit 7"))
	lines := strings.Split(a.body, "\n")
	if a.status != http.StatusUnprocessableEntity || !strings.HasPrefix(a.header.Get("Content-Type"), "text/plain") ||
		!slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, "exit code 7") }) ||
		!strings.Contains(a.body, "RUN exit 7") {
		t.Errorf("a failure: HTTP %d %s: %s", a.status, a.header.Get("Content-Type"), a.body)
	}
	req := post(t, f, o, "/function/builder.openfaas-fn", []byte("x"), "Content-Type", "text/plain", "X-Build-Signature", "sha256="+strings.Repeat("0", 64))
	if a := do(t, req); a.status != http.StatusUnauthorized || strings.Contains(a.body, "{") {
		t.Errorf("a wrong key: HTTP %d: %s", a.status, a.body)
	}
}
