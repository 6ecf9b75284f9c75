package openfaas

import (
	"context"
	"errors"
	"fmt"
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

// live builds in four steps that print a line each and are then held. It counts the lines that
// arrive while their step is held, and waits for each as long as limit.
func live(t *testing.T, s *stack.Stack, o *stack.OpenFaaS, accept string, limit time.Duration) (n int) {
	t.Helper()
	marks := []string{mark(), mark(), mark(), mark()}
	dockerfile := []string{"FROM busybox"}
	for _, m := range marks {
		dockerfile = append(dockerfile, fmt.Sprintf("RUN echo line of %s; sleep 600; : %[1]s", m))
	}
	body := request(t, s, "live", dockerfile...)
	arrived := make(chan string, len(marks))
	wait := stack.Later(t, func(ctx context.Context) (client.Answer, error) {
		return o.PostEach(ctx, body, func(r client.Record) {
			for _, line := range r.Log {
				if m, ok := strings.CutPrefix(line, "l: line of "); ok {
					arrived <- m
				}
			}
		}, at("/function/builder/build"), client.Accept(accept))
	})
	for _, m := range marks {
		s.Buildkitd.WaitStep(t, m)
		if arrives(arrived, m, limit) {
			n++
		}
		stack.Release(t, m, stack.Patience)
	}
	a := wait()
	t.Logf("%s: %d lines in time, %d bytes", accept, n, len(a.Body))
	if a.Status != "success" || strings.Count(a.Body, "l: line of ") != len(marks) {
		t.Fatalf("got %v", a)
	}
	return n
}

// arrives tells whether m comes from a channel within a limit. What comes before m is late.
func arrives(from <-chan string, m string, limit time.Duration) bool {
	over := time.After(limit)
	for {
		select {
		case got := <-from:
			if got == m {
				return true
			}
		case <-over:
			return false
		}
	}
}

// TestLive: lines are seen as they are printed, where the gateway lets them
// through.
func TestLive(t *testing.T) {
	s, _, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true})
	for _, accept := range []string{both, client.SSE} {
		if n := live(t, s, o, accept, 20*time.Second); n != 4 {
			t.Errorf("%s is held back: %d lines of 4 came while their steps ran", accept, n)
		}
	}
	// DEPLOY.md says that the CE gateway holds back NDJSON alone. It passes 4 KiB on whenever it
	// has them. The answer has 10 KB: two such pieces end within it, so two lines at most come in time.
	if n := live(t, s, o, client.NDJSON, 2*time.Second); n > 2 {
		t.Errorf("plain NDJSON is live through the gateway, and DEPLOY.md says that it is not: %d lines of 4 came while their steps ran", n)
	}
}

// TestTooLong has a build that takes longer than the gateway's timeout. It checks what
// the caller sees, and that the function cancels the build.
func TestTooLong(t *testing.T) {
	// A busy machine begins an answer within the timeout.
	s, f, o := around(t, stack.OpenFaaSConfig{Timeout: 15 * time.Second}, stack.FunctionConfig{Watchdog: true})
	t.Run("calls", func(t *testing.T) {
		for _, accept := range []string{"", both} {
			t.Run(accept, func(t *testing.T) {
				t.Parallel()
				tooLong(t, s, o, accept)
			})
		}
	})
	stack.Eventually(t, time.Minute, func() error {
		log, err := f.Log()
		if err == nil && strings.Count(log, `"code":"canceled"`) != 2 {
			err = errors.New("the log has not two builds that were canceled")
		}
		return err
	})
}

// tooLong makes a call of TestTooLong.
func tooLong(t *testing.T, s *stack.Stack, o *stack.OpenFaaS, accept string) {
	m := mark()
	// The step sleeps for longer than WaitGone waits: only a cancel ends it in time.
	body := request(t, s, "long", "FROM busybox", stack.Held(m))
	began := time.Now()
	a, err := o.Post(t.Context(), body, at("/function/builder/build"), client.Accept(accept))
	took := time.Since(began)
	t.Logf("Accept %q: HTTP %d with %d bytes after %v", accept, a.StatusCode, len(a.Body), took)
	if took > time.Minute {
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
