package clients_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// scrape returns all samples of /metrics, by name with labels.
func scrape(t *testing.T, ctx context.Context, f *stack.Function) map[string]float64 {
	t.Helper()
	text, err := f.Get(ctx, "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	samples := map[string]float64{}
	for _, m := range regexp.MustCompile(`(?m)^(builder_\S+(?:\{.*\})?) (\S+)$`).FindAllStringSubmatch(text, -1) {
		v, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			t.Fatal(err)
		}
		samples[m[1]] = v
	}
	return samples
}

// slowly reads all but the last byte, waits, and reads that.
type slowly struct {
	io.Reader
	left  int
	pause time.Duration
}

func (s *slowly) Read(p []byte) (int, error) {
	if s.left == 1 {
		time.Sleep(s.pause)
	}
	n, err := s.Reader.Read(p[:min(len(p), max(1, s.left-1))])
	s.left -= n
	return n, err
}

// TestMetrics builds the same twice, the second in the queue behind the first,
// fails once, and is refused once.
func TestMetrics(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{Env: map[string]string{"max_builds": "1", "max_config_bytes": "64KiB"}})
	const size = 8 << 20
	content := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(content)
	body := stack.Body(t, config{"image": s.Registry.Image("metrics:latest")}, map[string]string{
		"Dockerfile": "FROM busybox\nCOPY content /\nRUN sleep 8\n", "content": string(content),
	})
	began := time.Now()
	before := scrape(t, ctx, f)
	for name, v := range before {
		if strings.HasSuffix(name, "_total") && v != 0 {
			t.Errorf("%s begins at %v", name, v)
		}
	}

	const pause = 700 * time.Millisecond
	first := make(chan client.Answer, 1)
	go func() {
		a, err := f.Post(ctx, body, func(req *http.Request) {
			req.Body = io.NopCloser(&slowly{bytes.NewReader(body), len(body), pause})
		})
		if err != nil {
			t.Error(err)
		}
		first <- a
	}()
	for end := time.Now().Add(time.Minute); scrape(t, ctx, f)["builder_builds_in_flight"] != 1; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no build is in flight")
		}
	}
	second := f.MustBuild(t, ctx, body)
	if a := <-first; a.Status != "success" || a.Digest != second.Digest {
		t.Fatalf("got %v, and then %+v", a, second)
	}
	fails := stack.Body(t, config{"skipPush": true}, map[string]string{"Dockerfile": "FROM busybox\nRUN exit 3\n"})
	if a := f.MustPost(t, ctx, fails); a.StatusCode != 422 {
		t.Fatalf("got %v", a)
	}
	unsigned := f.MustPost(t, ctx, fails, client.Signature(""))
	if unsigned.StatusCode != 401 {
		t.Fatalf("got %v", unsigned)
	}

	// A daemon that was slow to answer a check is away for a while.
	var m map[string]float64
	stack.Eventually(t, stack.Patience, func() error {
		m = scrape(t, ctx, f)
		if n := m["builder_daemons_reachable"]; n != 1 {
			return fmt.Errorf("%v daemons are reachable, want 1", n)
		}
		return nil
	})
	wall := time.Since(began).Seconds() // one build runs at a time, and three bodies may come at once
	for name, want := range map[string]struct{ least, most float64 }{
		`builder_builds_total{code="",status="success"}`:            {2, 2},
		`builder_builds_total{code="build_failed",status="failed"}`: {1, 1},
		`builder_requests_refused_total{code="unauthorized"}`:       {1, 1},
		`builder_builds_in_flight`:                                  {0, 0},
		`builder_builds_waiting`:                                    {0, 0},
		`builder_daemons_reachable`:                                 {1, 1},

		`builder_received_bytes_total`:  {float64(2*len(body) + len(fails)), float64(2*len(body) + len(fails))},
		`builder_receive_seconds_count`: {3, 3},
		`builder_receive_seconds_sum`:   {pause.Seconds(), 3 * wall},

		`builder_wait_seconds_count`: {3, 3},
		`builder_wait_seconds_sum`:   {1, wall}, // the second waits for most of the first's RUN step

		// What the first has sent the second need not.
		`builder_context_sent_bytes_total`: {size, 1.5 * size},
		`builder_transfer_seconds_count`:   {1, 3},
		`builder_transfer_seconds_sum`:     {0.001, wall},
		`builder_push_seconds_count`:       {2, 2},
		`builder_push_seconds_sum`:         {0.001, wall},

		`builder_steps_total{cached="false"}`:      {3, 8}, // COPY and RUN, and the RUN that fails
		`builder_steps_total{cached="true"}`:       {2, 6},
		`builder_placements_total{choice="first"}`: {3, 3},
		`builder_builds_moved_total`:               {0, 0},

		`builder_build_duration_seconds_count{status="success"}`:            {2, 2},
		`builder_build_duration_seconds_sum{status="success"}`:              {5, 2 * wall}, // a RUN step of 3 s, which both see most of
		`builder_build_duration_seconds_bucket{status="success",le="1"}`:    {0, 0},
		`builder_build_duration_seconds_bucket{status="success",le="1800"}`: {2, 2},
		`builder_build_duration_seconds_bucket{status="success",le="+Inf"}`: {2, 2},
	} {
		if got, ok := m[name]; !ok || got < want.least || got > want.most {
			t.Errorf("%s is %v, there: %v; want %v to %v", name, got, ok, want.least, want.most)
		}
	}
	if t.Failed() {
		for name, v := range m {
			if v != before[name] && !strings.Contains(name, "_bucket") {
				t.Log(fmt.Sprint(name, " ", v))
			}
		}
	}
}
