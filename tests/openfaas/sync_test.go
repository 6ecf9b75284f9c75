package openfaas

import (
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestSync builds through gateway and provider, in every form and at every path.
func TestSync(t *testing.T) {
	s, f, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true})
	for name, tt := range map[string]struct{ path, accept, contentType string }{
		"JSON":            {"/function/builder/build", "", "application/json"},
		"JSON at /":       {"/function/builder", "", "application/json"},
		"JSON at //":      {"/function/builder/", "", "application/json"},
		"NDJSON":          {"/function/builder/build", client.NDJSON, client.NDJSON},
		"SSE":             {"/function/builder/build", client.SSE, client.SSE},
		"NDJSON, live":    {"/function/builder/build", both, client.NDJSON},
		"with namespace":  {"/function/builder.openfaas-fn", "", "application/json"},
		"chunked uploads": {"/function/builder/build", both, client.NDJSON},
	} {
		t.Run(name, func(t *testing.T) {
			m := mark()
			repository := strings.ToLower(m)
			a := post(t, o, tt.path, request(t, s, repository, "FROM busybox", "RUN : "+m), client.Accept(tt.accept), func(req *http.Request) {
				if name == "chunked uploads" {
					req.ContentLength = -1
				}
			})
			if a.StatusCode != http.StatusOK || a.Status != "success" || a.Digest == "" || a.Header.Get("Content-Type") != tt.contentType {
				t.Fatalf("got %v of %s", a, a.Header.Get("Content-Type"))
			}
			if a.Header.Get("X-Call-Id") == "" {
				t.Error("no X-Call-Id")
			}
			if tt.accept == "" && a.Header.Get("X-Build-Signature") != client.Sign(f.Secret, []byte(a.Body)) {
				t.Error("the answer's signature is wrong")
			}
			if n := s.Registry.Pushes(t, repository); n != 1 {
				t.Errorf("%d pushes", n)
			}
		})
	}
	t.Run("own call id", func(t *testing.T) {
		a := post(t, o, "/function/builder/build", []byte("x"), client.Header("X-Call-Id", "mine"))
		if a.Header.Get("X-Call-Id") != "mine" {
			t.Errorf("X-Call-Id %q", a.Header.Get("X-Call-Id"))
		}
	})
	t.Run("large", func(t *testing.T) {
		// This body is too large for the queue.
		m := mark()
		dir := stack.Context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY large /\n", "large": strings.Repeat(m, 1<<20)})
		body := stack.MustTar(t, dir, map[string]any{"skipPush": true})
		if a := post(t, o, "/function/builder/build", body); a.Status != "success" {
			t.Errorf("%d bytes: %v", len(body), a)
		}
	})
}

// arrivals returns when the lines of a build arrived that prints four, two seconds
// apart.
func arrivals(t *testing.T, s *stack.Stack, o *stack.OpenFaaS, accept string) []time.Duration {
	t.Helper()
	body := request(t, s, "live", "FROM busybox", "RUN for i in 1 2 3 4; do echo line-$i; sleep 2; done; : "+mark())
	var times []time.Duration
	var first time.Time
	a, err := o.PostEach(t.Context(), body, func(r client.Record) {
		for _, line := range r.Log {
			if strings.HasPrefix(line, "l: ") && strings.Contains(line, "line-") {
				if first.IsZero() {
					first = time.Now()
				}
				times = append(times, time.Since(first))
			}
		}
	}, at("/function/builder/build"), client.Accept(accept))
	if err != nil || a.Status != "success" || len(times) != 4 {
		t.Fatalf("lines at %v, got %v, %v", times, a, err)
	}
	return times
}

// printing is the time from the first of the lines of arrivals to the last.
const printing = 6 * time.Second

// TestLive: lines are seen as they are printed, where the gateway lets them
// through.
func TestLive(t *testing.T) {
	s, _, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true})
	for _, accept := range []string{both, client.SSE} {
		times := arrivals(t, s, o, accept)
		t.Logf("%s: lines at %v", accept, times)
		// A busy machine may bring one line as late as the next, and not two.
		if n := together(times); times[3] < printing/2 || n > 1 {
			t.Errorf("%s is held back: %v", accept, times)
		}
	}
	// DEPLOY.md says that the CE gateway holds back NDJSON alone. It passes 4 KiB on whenever it
	// has them. The four lines take less, so a whole 4 KiB end between two of them at most.
	times := arrivals(t, s, o, client.NDJSON)
	t.Logf("%s: lines at %v", client.NDJSON, times)
	if together(times) < 2 {
		t.Errorf("plain NDJSON is live through the gateway, and DEPLOY.md says that it is not: %v", times)
	}
}

// together counts the lines of arrivals that came with the line before.
func together(times []time.Duration) (n int) {
	for i := range times[1:] {
		if times[i+1]-times[i] < 500*time.Millisecond {
			n++
		}
	}
	return n
}

// TestTooLong has a build that takes longer than the gateway's timeout. It checks what
// the caller sees, and that the function cancels the build.
func TestTooLong(t *testing.T) {
	s, f, o := around(t, stack.OpenFaaSConfig{Timeout: 4 * time.Second}, stack.FunctionConfig{Watchdog: true})
	for _, accept := range []string{"", both} {
		m := mark()
		// The step sleeps for longer than WaitGone waits: only a cancel ends it in time.
		body := request(t, s, "long", "FROM busybox", "RUN sleep 600; : "+m)
		began := time.Now()
		a, err := o.Post(t.Context(), body, at("/function/builder/build"), client.Accept(accept))
		took := time.Since(began)
		t.Logf("Accept %q: HTTP %d with %d bytes after %v", accept, a.StatusCode, len(a.Body), took)
		if took > 30*time.Second {
			t.Errorf("cut off after %v", took)
		}
		// As DEPLOY.md says: only the missing verdict tells that a stream was cut off.
		want, wantErr := http.StatusBadGateway, error(nil)
		if accept != "" {
			want, wantErr = http.StatusOK, client.ErrNoVerdict
		}
		if a.StatusCode != want || !errors.Is(err, wantErr) {
			t.Errorf("Accept %q: got %v, %v, want HTTP %d, %v", accept, a, err, want, wantErr)
		}
		s.Buildkitd.WaitGone(t, m, time.Minute)
	}
	stack.Eventually(t, time.Minute, func() error {
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
	s, _, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true})
	m := mark()
	invoke := func(body []byte) client.Answer {
		return post(t, o, "/function/builder.openfaas-fn", body, client.Header("Content-Type", "text/plain"), client.Header("User-Agent", "faas-cli/0.18.12"))
	}
	a := invoke(request(t, s, strings.ToLower(m), "FROM busybox", "RUN : "+m))
	if a.StatusCode != http.StatusOK || a.Status != "success" || !strings.Contains(a.Body, "\n  \"status\": \"success\"") {
		t.Errorf("got %v", a)
	}
	a = invoke(request(t, s, "fails", "FROM busybox", "RUN echo about to fail", "RUN exit 7"))
	lines := strings.Split(a.Body, "\n")
	if a.StatusCode != http.StatusUnprocessableEntity || !strings.HasPrefix(a.Header.Get("Content-Type"), "text/plain") ||
		!slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, "exit code 7") }) ||
		!strings.Contains(a.Body, "RUN exit 7") {
		t.Errorf("a failure: %v of %s", a, a.Header.Get("Content-Type"))
	}
	a = post(t, o, "/function/builder.openfaas-fn", []byte("x"), client.Header("Content-Type", "text/plain"), client.Signature("sha256="+strings.Repeat("0", 64)))
	if a.StatusCode != http.StatusUnauthorized || strings.Contains(a.Body, "{") {
		t.Errorf("a wrong key: %v", a)
	}
}
