package report

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/buildkit/client"
	digest "github.com/opencontainers/go-digest"

	"handler/function/redact"
)

var start = time.Date(2021, 10, 20, 16, 48, 34, 0, time.UTC)

func at(d time.Duration) *time.Time { t := start.Add(d); return &t }

func vtx(name string, started, completed *time.Time) *client.Vertex {
	return &client.Vertex{Digest: digest.FromString(name), Name: name, Started: started, Completed: completed}
}

func cached(v *client.Vertex) *client.Vertex { v.Cached = true; return v }

func failed(v *client.Vertex, err string) *client.Vertex { v.Error = err; return v }

func logged(name string, stream int, text string) *client.VertexLog {
	return &client.VertexLog{Vertex: digest.FromString(name), Stream: stream, Data: []byte(text)}
}

// watch notes what it is told.
type watch struct {
	listening bool
	pushing   int // messages
}

func (w *watch) Listening(yes bool) { w.listening = yes }
func (w *watch) Pushing()           { w.pushing++ }

func progressOf(messages ...*client.SolveStatus) (lines []string, p *Progress, pushing int) {
	w := &watch{}
	p = NewProgress(func(l ...string) { lines = append(lines, l...) }, redact.New(map[string][]byte{"s": []byte("verysecret")}), w)
	ch := make(chan *client.SolveStatus, len(messages))
	for _, m := range messages {
		ch <- m
	}
	close(ch)
	p.Drain(context.Background(), ch)
	return lines, p, w.pushing
}

func TestProgressLines(t *testing.T) {
	const step = "[ship 1/16] WORKDIR /home/app/"
	vertexes := func(v ...*client.Vertex) *client.SolveStatus { return &client.SolveStatus{Vertexes: v} }
	logs := func(l ...*client.VertexLog) *client.SolveStatus { return &client.SolveStatus{Logs: l} }
	status := func(id string, current, total int64, started, completed *time.Time) *client.SolveStatus {
		return &client.SolveStatus{Statuses: []*client.VertexStatus{{ID: id, Current: current, Total: total, Timestamp: start, Started: started, Completed: completed}}}
	}
	for _, tt := range []struct {
		name     string
		messages []*client.SolveStatus
		want     []string
	}{
		{"nothing", nil, nil},
		{"known, not started", []*client.SolveStatus{vertexes(vtx(step, nil, nil))}, nil},
		{"start and end", []*client.SolveStatus{
			vertexes(vtx(step, at(0), nil)),
			vertexes(vtx(step, at(0), nil)),
			vertexes(vtx(step, at(0), at(350*time.Millisecond))),
			vertexes(vtx(step, at(0), at(350*time.Millisecond))),
		}, []string{
			"v: 2021-10-20T16:48:34Z [ship 1/16] WORKDIR /home/app/",
			"v: 2021-10-20T16:48:34Z [ship 1/16] WORKDIR /home/app/ 0.35s",
		}},
		{"cached", []*client.SolveStatus{vertexes(cached(vtx(step, at(0), at(0))))}, []string{
			"v: 2021-10-20T16:48:34Z [ship 1/16] WORKDIR /home/app/ CACHED",
		}},
		{"cached after a start", []*client.SolveStatus{vertexes(vtx(step, at(0), nil)), vertexes(cached(vtx(step, at(0), at(0))))}, []string{
			"v: 2021-10-20T16:48:34Z [ship 1/16] WORKDIR /home/app/",
			"v: 2021-10-20T16:48:34Z [ship 1/16] WORKDIR /home/app/ CACHED",
		}},
		{"failed", []*client.SolveStatus{vertexes(vtx(step, at(0), nil)), vertexes(failed(vtx(step, at(0), at(2*time.Second)), "exit code: 1"))}, []string{
			"v: 2021-10-20T16:48:34Z [ship 1/16] WORKDIR /home/app/",
			"v: 2021-10-20T16:48:34Z [ship 1/16] WORKDIR /home/app/ 2.00s ERROR",
		}},
		{"canceled", []*client.SolveStatus{vertexes(failed(vtx(step, at(0), at(2*time.Second)), "process: context canceled"))}, []string{
			"v: 2021-10-20T16:48:34Z [ship 1/16] WORKDIR /home/app/",
			"v: 2021-10-20T16:48:34Z [ship 1/16] WORKDIR /home/app/ 2.00s CANCELED",
		}},
		{"at once and again, as a local source", []*client.SolveStatus{vertexes(
			vtx("[internal] load", at(0), nil), vtx("[internal] load", at(0), at(time.Millisecond)),
			vtx("[internal] load", at(time.Second), nil), vtx("[internal] load", at(time.Second), at(2*time.Second)),
		)}, []string{
			"v: 2021-10-20T16:48:34Z [internal] load",
			"v: 2021-10-20T16:48:35Z [internal] load 1.00s",
		}},
		{"twice, as an exporter", []*client.SolveStatus{vertexes(
			vtx("exporting to image", at(0), nil), vtx("exporting to image", at(0), at(time.Second)),
			vtx("exporting to image", at(time.Second), nil),
		), vertexes(vtx("exporting to image", at(time.Second), at(3*time.Second)))}, []string{
			"v: 2021-10-20T16:48:34Z exporting to image",
			"v: 2021-10-20T16:48:34Z exporting to image 1.00s",
			"v: 2021-10-20T16:48:35Z exporting to image",
			"v: 2021-10-20T16:48:35Z exporting to image 2.00s",
		}},
		{"output before the end", []*client.SolveStatus{
			vertexes(vtx(step, at(0), nil)),
			{Vertexes: []*client.Vertex{vtx(step, at(0), at(time.Second))}, Logs: []*client.VertexLog{logged(step, 1, "one\ntwo")}},
		}, []string{
			"v: 2021-10-20T16:48:34Z [ship 1/16] WORKDIR /home/app/",
			"l: one",
			"l: two",
			"v: 2021-10-20T16:48:34Z [ship 1/16] WORKDIR /home/app/ 1.00s",
		}},
		{"streams apart", []*client.SolveStatus{logs(logged(step, 1, "out"), logged(step, 2, "err\n"), logged("other", 1, "other\n"), logged(step, 1, "put\n"))}, []string{
			"l: err", "l: other", "l: output",
		}},
		{"the end of a line that has none", []*client.SolveStatus{logs(logged(step, 1, "no newline"))}, []string{"l: no newline"}},
		{"secrets and control characters", []*client.SolveStatus{
			vertexes(vtx("RUN echo verysecret\n\x1b[31mred", at(0), nil)),
			logs(logged(step, 1, "\x1b[1mvery"), logged(step, 1, "secret\r\n")),
			status("pulling verysecret", 0, 0, at(0), nil),
			{Warnings: []*client.VertexWarning{{Short: []byte("verysecret is\nbad"), URL: "https://verysecret/"}}},
		}, []string{
			"v: 2021-10-20T16:48:34Z RUN echo *** red",
			"l: ***",
			"s: 2021-10-20T16:48:34Z pulling ***",
			"w: *** is bad (https://***/)",
		}},
		{"a status, first and last", []*client.SolveStatus{
			status("transferring context:", 0, 0, at(0), nil),
			status("transferring context:", 1000, 0, at(0), nil),
			status("transferring context:", 2_500_000, 0, at(0), at(1500*time.Millisecond)),
			status("transferring context:", 2_500_000, 0, at(0), at(1500*time.Millisecond)),
		}, []string{
			"s: 2021-10-20T16:48:34Z transferring context",
			"s: 2021-10-20T16:48:34Z transferring context 2.50MB 1.50s",
		}},
		{"a status at once", []*client.SolveStatus{status("exporting layers", 0, 0, at(0), at(0))}, []string{
			"s: 2021-10-20T16:48:34Z exporting layers",
			"s: 2021-10-20T16:48:34Z exporting layers 0.00s",
		}},
		{"a status again, as for each tag", []*client.SolveStatus{
			status("pushing layers", 0, 0, at(0), at(0)),
			status("pushing layers", 0, 0, at(time.Second), nil),
			status("pushing layers", 0, 0, at(time.Second), at(time.Second)),
		}, []string{
			"s: 2021-10-20T16:48:34Z pushing layers",
			"s: 2021-10-20T16:48:34Z pushing layers 0.00s",
			"s: 2021-10-20T16:48:35Z pushing layers",
			"s: 2021-10-20T16:48:35Z pushing layers 0.00s",
		}},
		{"a status without a start", []*client.SolveStatus{status("x", 0, 7, nil, at(time.Second))}, []string{
			"s: 2021-10-20T16:48:34Z x",
			"s: 2021-10-20T16:48:34Z x 7B 1.00s",
		}},
		{"a warning", []*client.SolveStatus{{Warnings: []*client.VertexWarning{{Short: []byte("Rule: text (line 2)")}}}}, []string{
			"w: Rule: text (line 2)",
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lines, _, _ := progressOf(tt.messages...)
			if !slices.Equal(lines, tt.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(lines, "\n"), strings.Join(tt.want, "\n"))
			}
		})
	}
}

// TestStreamsEnd: nothing is kept of what a step that has ended has printed, but its last lines.
func TestStreamsEnd(t *testing.T) {
	var messages []*client.SolveStatus
	for i := range 10 {
		name := fmt.Sprintf("[%d/10] RUN x", i)
		messages = append(messages,
			&client.SolveStatus{Vertexes: []*client.Vertex{vtx(name, at(0), nil)}, Logs: []*client.VertexLog{logged(name, 1, "one\ntwo")}},
			&client.SolveStatus{Vertexes: []*client.Vertex{vtx(name, at(0), at(time.Second))}, Logs: []*client.VertexLog{logged(name, 2, "three")}},
		)
	}
	last := "[10/10] RUN x"
	messages = append(messages, &client.SolveStatus{Vertexes: []*client.Vertex{vtx(last, at(0), nil)}, Logs: []*client.VertexLog{logged(last, 1, "four")}})
	lines, p, _ := progressOf(messages...)
	if len(p.streams) != 1 {
		t.Errorf("%d streams are kept", len(p.streams))
	}
	for line, want := range map[string]int{"l: one": 10, "l: two": 10, "l: three": 10, "l: four": 1} {
		if n := len(slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return l != line })); n != want {
			t.Errorf("%q is there %d times, want %d", line, n, want)
		}
	}
}

// TestProgressDraws prints over a line and looks at what is logged, and when.
func TestProgressDraws(t *testing.T) {
	const step, other = "[1/2] RUN a", "[2/2] RUN b"
	type print struct {
		at     time.Duration
		name   string
		stream int
		text   string
	}
	ms := time.Millisecond
	every := func(d, until time.Duration, format string) (all []print) {
		for i := 0; time.Duration(i)*d < until; i++ {
			all = append(all, print{time.Duration(i) * d, step, 1, fmt.Sprintf(format, i)})
		}
		return all
	}
	for _, tt := range []struct {
		name   string
		prints []print
		end    time.Duration
		want   []string // offset in ms, and the line
	}{
		{"slowly", every(time.Second, 3*time.Second, "%d%%\r"), 3 * time.Second, []string{"0 0%", "1000 1%", "2000 2%"}},
		{"slowly, returns first", every(1500*ms, 3*time.Second, "\r%d%%"), 3 * time.Second, []string{"1000 0%", "2500 1%"}},
		{"fast", every(110*ms, time.Second, "%d%%\r"), 5 * time.Second, []string{"0 0%", "300 2%", "600 5%", "900 8%", "1200 9%"}},
		{"fast, returns first", every(110*ms, time.Second, "\r%d%%"), 5 * time.Second, []string{"110 0%", "410 2%", "710 5%", "1010 8%", "1990 9%"}},
		{"held back, and silence", []print{{0, step, 1, "1%\r"}, {10 * ms, step, 1, "2%\r3%\r"}}, 5 * time.Second, []string{"0 1%", "300 3%"}},
		{"held back, and its newline", []print{{0, step, 1, "1%\r"}, {10 * ms, step, 1, "2%\r"}, {20 * ms, step, 1, "\nover\n"}}, time.Second, []string{"0 1%", "20 2%", "20 over"}},
		{"held back at the end", []print{{0, step, 1, "1%\r"}, {10 * ms, step, 1, "2%\r"}}, 100 * ms, []string{"0 1%", "100 2%"}},
		{"lines wait for nothing", []print{{0, step, 1, "a\r\nb\r\n"}, {ms, step, 1, "c\r\nd\r\n"}}, time.Second, []string{"0 a", "0 b", "1 c", "1 d"}},
		{"both streams of a step, in turn", []print{{0, step, 1, "a1\r"}, {ms, step, 2, "b1\r"}, {2 * ms, step, 1, "a2\r"}, {3 * ms, step, 2, "b2\r"}, {4 * ms, step, 1, "a3\r"}}, 5 * time.Second, []string{"0 a1", "300 b2", "600 a3"}},
		{"both streams, returns first", []print{{0, step, 1, "\ra1\ra2"}, {ms, step, 2, "\rb1\rb2"}, {2 * ms, step, 1, "\ra3\ra4"}, {700 * ms, step, 1, "\n"}, {800 * ms, step, 2, "\n"}}, 900 * ms, []string{"0 a1", "300 b1", "600 a3", "700 a4", "800 b2"}},
		{"two steps", []print{{0, step, 1, "a\r"}, {ms, other, 1, "b\r"}}, time.Second, []string{"0 a", "1 b"}},
		{"no state", []print{{0, step, 1, "waiting..."}}, 3 * time.Second, []string{"3000 waiting..."}},
		{"a secret in parts", []print{{0, step, 1, "\rit is very"}, {3 * time.Second, step, 1, "secret\r"}}, 4 * time.Second, []string{"1000 it is ", "3000 it is ***"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				var lines []string
				w := &watch{listening: true}
				p := NewProgress(func(l ...string) {
					for _, line := range l {
						lines = append(lines, fmt.Sprintf("%d %s", time.Since(start).Milliseconds(), strings.TrimPrefix(line, "l: ")))
					}
					if w.listening {
						t.Error("a slow client would be the daemon's silence")
					}
				}, redact.New(map[string][]byte{"s": []byte("verysecret")}), w)
				ch := make(chan *client.SolveStatus)
				go func() {
					defer close(ch)
					for _, pr := range tt.prints {
						time.Sleep(pr.at - time.Since(start))
						ch <- &client.SolveStatus{Logs: []*client.VertexLog{logged(pr.name, pr.stream, pr.text)}}
					}
					time.Sleep(tt.end - time.Since(start))
				}()
				p.Drain(t.Context(), ch)
				if !slices.Equal(lines, tt.want) {
					t.Errorf("got %q, want %q", lines, tt.want)
				}
			})
		})
	}
}

func TestPrinted(t *testing.T) {
	var many []string
	for i := range 30 {
		many = append(many, strconv.Itoa(i))
	}
	long := strings.Repeat("é", 1022)
	for _, tt := range []struct {
		name, text, want string
	}{
		{"nothing", "", ""},
		{"blank", "\n\n", ""},
		{"a line", "a", "a"},
		{"blank lines around", "\na\n\nb\n\n", "a\n\nb"},
		{"the last lines", strings.Join(many, "\n"), strings.Join(many[10:], "\n")},
		{"as many bytes as can be", "a\nb " + long + "\nc " + long + "\n", "a\nb " + long + "\nc " + long},
		{"one more", "aa\nb " + long + "\nc " + long + "\n", "b " + long + "\nc " + long},
		{"a long line", "a\nb" + strings.Repeat("é", 3000) + "!\n", "… " + strings.Repeat("é", 2045) + "!"},
		{"secrets", "it is very\x1b[1msecret\nverysecret", "it is ***\n***"},
		{"drawn over", "1%\r2%\rover\n", "2%\nover"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, p, _ := progressOf(&client.SolveStatus{Logs: []*client.VertexLog{logged("step", 1, tt.text), logged("another", 1, "other\n")}})
			got := p.lastPrinted(digest.FromString("step").String())
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if len(got) > maxPrinted {
				t.Errorf("%d bytes", len(got))
			}
		})
	}
	_, p, _ := progressOf(&client.SolveStatus{Logs: []*client.VertexLog{logged("step", 1, "a\n"), logged("step", 2, "b\n"), logged("step", 1, "c")}})
	if got := p.lastPrinted(digest.FromString("step").String()); got != "a\nb\nc" {
		t.Errorf("of both streams %q", got)
	}
}

func TestProgressCounts(t *testing.T) {
	_, p, pushing := progressOf(&client.SolveStatus{Vertexes: []*client.Vertex{
		vtx("[internal] load build context", at(0), at(1)),
		vtx("[1/4] FROM busybox", at(0), at(1)),
		cached(vtx("[2/4] COPY a /", at(0), at(0))),
		cached(vtx("[3/4] RUN b", at(0), at(0))),
		vtx("[4/4] RUN c", nil, nil),
		vtx("exporting to image", at(0), at(1)),
	}}, &client.SolveStatus{Vertexes: []*client.Vertex{
		vtx("[3/4] RUN b", at(2), nil), // not cached after all
	}, Statuses: []*client.VertexStatus{
		{ID: "transferring context:", Started: at(0), Completed: at(time.Second)},
		{ID: "transferring dockerfile:", Started: at(0), Completed: at(2 * time.Second)},
		{ID: "exporting layers", Started: at(0), Completed: at(5 * time.Second)},
	}})
	if steps, cached := p.Counts(); steps != 3 || cached != 1 {
		t.Errorf("%d steps, %d cached", steps, cached)
	}
	if p.transfer != 3*time.Second {
		t.Errorf("transfer %v", p.transfer)
	}
	if got := p.Running(); got != "[3/4] RUN b" {
		t.Errorf("running %q", got)
	}
	if got := p.name(digest.FromString("[2/4] COPY a /").String()); got != "[2/4] COPY a /" {
		t.Errorf("name %q", got)
	}
	if pushing != 0 {
		t.Error("a push was seen")
	}
}

func TestProgressPush(t *testing.T) {
	_, _, pushing := progressOf(
		&client.SolveStatus{Statuses: []*client.VertexStatus{{ID: "exporting manifest sha256:1"}}},
		&client.SolveStatus{Statuses: []*client.VertexStatus{{ID: "pushing layers"}}},
	)
	if pushing != 1 {
		t.Errorf("a push was seen %d times", pushing)
	}
}

func TestNoSpaceSeen(t *testing.T) {
	_, p, _ := progressOf(
		&client.SolveStatus{Vertexes: []*client.Vertex{
			vtx("[1/3] RUN dd", at(0), nil), vtx("[2/3] RUN go", at(0), nil), vtx("[3/3] RUN runc", at(0), nil), vtx("[1/1] RUN :", at(0), nil),
		}},
		&client.SolveStatus{Logs: []*client.VertexLog{
			logged("[1/3] RUN dd", 2, "dd: writing: No space left on device\n"), logged("[1/1] RUN :", 1, "fine\n"),
			logged("[2/3] RUN go", 2, "write /x: no space "), logged("[2/3] RUN go", 2, "left on device"),
			logged("[3/3] RUN runc", 2, "runc run failed: unable to start container process: error during container init: error mounting \"/x/resolv.conf\" to rootfs at \"/etc/resolv.conf\": create mountpoint for /etc/resolv.conf mount: make mountpoint \"/etc/resolv.conf\": openat resolv.conf: no space left on device"),
		}},
	)
	for name, want := range map[string]struct{ noSpace, unstarted bool }{
		"[1/3] RUN dd": {true, false}, "[2/3] RUN go": {true, false}, "[3/3] RUN runc": {true, true},
		"[1/1] RUN :": {}, "another": {},
	} {
		d := digest.FromString(name).String()
		if n, u := p.noSpace(d), p.unstarted(d); n != want.noSpace || u != want.unstarted {
			t.Errorf("%s: out of disk %v, not started %v", name, n, u)
		}
	}
}

// TestDrainEnded has steps print on after the build's context has ended. Their output is
// taken and ignored.
func TestDrainEnded(t *testing.T) {
	for _, ended := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		if ended {
			cancel()
		}
		var lines []string
		w := &watch{}
		p := NewProgress(func(l ...string) { lines = append(lines, l...) }, redact.New(nil), w)
		ch := make(chan *client.SolveStatus)
		go func() {
			defer close(ch)
			for range 10 {
				ch <- &client.SolveStatus{Logs: []*client.VertexLog{{Vertex: "sha256:a", Stream: 1, Data: []byte("printed\n")}}}
			}
		}()
		p.Drain(ctx, ch)
		cancel()
		if w.listening {
			t.Error("the daemon's silence counts after the last message")
		}
		if want := map[bool]int{false: 10, true: 0}[ended]; len(lines) != want {
			t.Errorf("ended %v: %d lines, want %d", ended, len(lines), want)
		}
	}
}
