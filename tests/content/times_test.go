package content_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	buildkit "github.com/moby/buildkit/client"
	"github.com/tonistiigi/fsutil"
	"golang.org/x/sync/errgroup"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// long ago is a whole second, as reproducible packers write for every file.
var longAgo = time.Unix(1_600_000_000, 0)

// twin is a context that differs from the others in what one file holds, and in
// nothing that BuildKit compares: path, size, time and mode.
func twin(n int, dockerfile string) []entry {
	return []entry{
		{name: "Dockerfile", text: dockerfile, time: longAgo},
		{name: "app/", time: longAgo},
		{name: "app/beside", text: "the same in all", time: longAgo},
		{name: "app/data", text: twinText(n), time: longAgo},
	}
}

var twins atomic.Int64

// nextTwin is a number that no build has had: what is built again is cached,
// and prints nothing.
func nextTwin() int { return int(twins.Add(1)) }

func twinText(n int) string { return fmt.Sprintf("content %04d", n) }

// TestTwins builds contexts that look the same one after the other: an image
// holds what was sent for it.
func TestTwins(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	for _, tt := range []struct {
		name  string
		image func(n int) string
	}{
		{"one tag", func(int) string { return s.Registry.Image("twins/one:latest") }},
		{"changing tags", func(n int) string { return s.Registry.Image(fmt.Sprintf("twins/many:v%d", n)) }},
		{"one tag after changing tags", func(int) string { return s.Registry.Image("twins/many:latest") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var n int
			for range 4 {
				n = nextTwin()
				built := f.MustBuild(t, ctx, body(t, config{"image": tt.image(n)}, nil, twin(n, "FROM scratch\nCOPY app /\n")...))
				if got := mustPulled(t, ctx, built, "data"); got != twinText(n) {
					t.Fatalf("the image holds %q, want %q", got, twinText(n))
				}
			}
			// Back to what the daemon has seen.
			n--
			built := f.MustBuild(t, ctx, body(t, config{"image": tt.image(n)}, nil, twin(n, "FROM scratch\nCOPY app /\n")...))
			if got := mustPulled(t, ctx, built, "data"); got != twinText(n) {
				t.Fatalf("the image holds %q, want %q", got, twinText(n))
			}
		})
	}
	for _, c := range []config{{"skipPush": true}, {"skipPush": true, "image": s.Registry.Image("twins/one:latest")}} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			for range 3 {
				n := nextTwin()
				built := f.MustBuild(t, ctx, body(t, c, nil, twin(n, "FROM busybox\nCOPY app /app\nRUN cat /app/data\n")...))
				if got := strings.Join(printed(built.Log), "\n"); got != twinText(n) {
					t.Fatalf("the step printed %q, want %q", got, twinText(n))
				}
			}
		})
	}
}

// TestTwinsAtOnce does the same at once, and each image copies the file twice.
func TestTwinsAtOnce(t *testing.T) {
	for _, tt := range []struct {
		name   string
		builds int
		config func(s *stack.Stack, i int) config
	}{
		{"one tag", 20, func(s *stack.Stack, _ int) config { return config{"image": s.Registry.Image("atonce/one:latest")} }},
		{"changing tags", 10, func(s *stack.Stack, i int) config {
			return config{"image": s.Registry.Image(fmt.Sprintf("atonce/many:v%d", i))}
		}},
		{"skipPush", 4, func(s *stack.Stack, i int) config {
			if i%2 == 0 {
				return config{"skipPush": true}
			}
			return config{"skipPush": true, "image": s.Registry.Image("atonce/skipped:latest")}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, s, f := start(t, stack.FunctionConfig{Env: map[string]string{"max_builds": "20"}})
			dockerfile := "FROM scratch\nCOPY app/data /first\nCOPY app /app\n"
			if tt.name == "skipPush" {
				dockerfile = "FROM busybox\nCOPY app /app\nRUN cat /app/data\n"
			}
			one := func(n int, req []byte) error {
				built, err := f.Build(ctx, req)
				if err != nil {
					return err
				}
				if tt.name == "skipPush" {
					if got := strings.Join(printed(built.Log), "\n"); got != twinText(n) {
						return fmt.Errorf("the step of build %d printed %q", n, got)
					}
					return nil
				}
				for _, path := range []string{"first", "app/data"} {
					if got, err := pulled(ctx, built, path); err != nil || got != twinText(n) {
						return fmt.Errorf("/%s of build %d is %q, %v", path, n, got, err)
					}
				}
				return nil
			}
			// The daemon gives builds that are at once directories of their own:
			// those of the second time find what the first ones left.
			for range 2 {
				var g errgroup.Group
				for i := range tt.builds {
					n := nextTwin()
					req := body(t, tt.config(s, i), nil, twin(n, dockerfile)...)
					g.Go(func() error { return one(n, req) })
				}
				if err := g.Wait(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestTrap shows what TestTwins and TestTwinsAtOnce would see if content were not
// carried in the times: BuildKit's own client, given twins with the times that they
// have, builds the second image with the first one's file.
func TestTrap(t *testing.T) {
	ctx, s, _ := start(t, stack.FunctionConfig{})
	c, err := s.Buildkitd.Client(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	first, second := nextTwin(), nextTwin()
	for _, n := range []int{first, second} {
		dir := t.TempDir()
		for _, e := range twin(n, "FROM scratch\nCOPY app /\n") {
			path := filepath.Join(dir, e.name)
			if strings.HasSuffix(e.name, "/") {
				err = os.Mkdir(path, 0o755)
			} else {
				err = os.WriteFile(path, []byte(e.text), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		// Only now: a file's arrival changes its directory's time.
		for _, e := range twin(n, "") {
			if err := os.Chtimes(filepath.Join(dir, e.name), e.time, e.time); err != nil {
				t.Fatal(err)
			}
		}
		files, err := fsutil.NewFS(dir)
		if err != nil {
			t.Fatal(err)
		}
		ref := s.Registry.Image("trap:latest")
		built, err := c.Solve(ctx, nil, buildkit.SolveOpt{
			Frontend:      "dockerfile.v0",
			FrontendAttrs: map[string]string{"filename": "Dockerfile"},
			LocalMounts:   map[string]fsutil.FS{"context": files, "dockerfile": files},
			SharedKey:     "trap",
			Exports:       []buildkit.ExportEntry{{Type: buildkit.ExporterImage, Attrs: map[string]string{"name": ref, "push": "true"}}},
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := mustPulled(t, ctx, client.Record{Image: ref, Digest: built.ExporterResponse["containerimage.digest"]}, "data"); got != twinText(first) {
			t.Errorf("the image of twin %d holds %q, want %q: BuildKit looks at more than it did, and the twins prove nothing", n, got, twinText(first))
		}
	}
}

// withMake is a context with this machine's GNU make under make/, for
// COPY make /.
func withMake(t *testing.T) []entry {
	t.Helper()
	bin, err := exec.LookPath("make")
	if err != nil {
		t.Fatal(err)
	}
	if bin, err = filepath.EvalSymlinks(bin); err != nil {
		t.Fatal(err)
	}
	libs, err := exec.CommandContext(t.Context(), "ldd", bin).Output()
	if err != nil {
		t.Fatalf("asking ldd for the libraries of make: %v", err)
	}
	add := func(path, as string) entry {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return entry{name: "make/" + strings.TrimPrefix(as, "/"), text: string(b), mode: 0o755, time: longAgo}
	}
	list := []entry{add(bin, "bin/make")}
	for _, m := range regexp.MustCompile(`(/\S+) \(0x`).FindAllStringSubmatch(string(libs), -1) {
		list = append(list, add(m[1], m[1]))
	}
	return list
}

// TestMake asks make, in a RUN step, which of many targets are newer than what
// they are made of. The times that carry content must not change its answer.
func TestMake(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	pairs := []struct {
		name   string
		source time.Time
		target time.Time
		stale  bool
	}{
		{"equal", longAgo, longAgo, false},
		{"equal-with-ns", longAgo.Add(123_456_789), longAgo.Add(123_456_789), false},
		{"newer-by-1ns", longAgo.Add(5), longAgo.Add(6), false},
		{"newer-by-1ms", longAgo.Add(time.Millisecond), longAgo.Add(2 * time.Millisecond), false},
		{"newer-across-a-second", longAgo.Add(time.Second - 1), longAgo.Add(time.Second), false},
		{"newer-by-1s", longAgo.Add(time.Second), longAgo.Add(2 * time.Second), false},
		{"newer-by-a-year", longAgo, longAgo.AddDate(1, 0, 0), false},
		{"older-by-1ns", longAgo.Add(6), longAgo.Add(5), true},
		{"older-by-1ms", longAgo.Add(2 * time.Millisecond), longAgo.Add(time.Millisecond), true},
		{"older-across-a-second", longAgo.Add(time.Second), longAgo.Add(time.Second - 1), true},
		{"older-by-1s", longAgo.Add(2 * time.Second), longAgo.Add(time.Second), true},
	}
	const each = 8 // a random order is right for one pair half of the time
	context := append(withMake(t), entry{name: "Dockerfile", time: longAgo, text: `FROM busybox
COPY make /
COPY src /src
WORKDIR /src
RUN for t in *.o; do make -q $t && echo $t fresh || echo $t stale; done
`})
	// A rule without a recipe would make every target look new.
	rules := "%.o: %.c\n\tfalse\n"
	var want []string
	for _, p := range pairs {
		for i := range each {
			name := fmt.Sprintf("src/%s-%d", p.name, i)
			context = append(context,
				entry{name: name + ".c", text: fmt.Sprint(rand.Uint64()), time: p.source},
				entry{name: name + ".o", text: fmt.Sprint(rand.Uint64()), time: p.target})
		}
	}
	// make builds in the order of the shell's list.
	context = append(context, entry{name: "src/Makefile", text: rules, time: longAgo})
	for _, p := range pairs {
		for i := range each {
			verdict := "fresh"
			if p.stale {
				verdict = "stale"
			}
			want = append(want, fmt.Sprintf("%s-%d.o %s", p.name, i, verdict))
		}
	}
	built := f.MustBuild(t, ctx, body(t, config{"image": s.Registry.Image("make:latest")}, nil, context...))
	got := map[string]bool{}
	for _, l := range printed(built.Log) {
		got[l] = true
	}
	wrong := 0
	for _, l := range want {
		if !got[l] {
			if wrong++; wrong <= 20 {
				t.Errorf("make does not say %q", l)
			}
		}
	}
	if wrong > 0 || len(got) != len(want) {
		t.Errorf("%d of %d are wrong, of %d lines", wrong, len(want), len(got))
	}
}

// TestSeconds shows that what layers keep of a time, its second, is what was
// sent: for a file, a hard link, a symlink and a directory, also before 1970.
func TestSeconds(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	times := map[string]time.Time{
		"whole":  longAgo,
		"half":   longAgo.Add(time.Second / 2),
		"almost": longAgo.Add(time.Second - 1),
		"epoch":  time.Unix(0, 0),
		"late":   time.Unix(4_000_000_000, 1),
		"before": time.Unix(-1000, 250_000_000),
	}
	context := []entry{{name: "Dockerfile", text: "FROM scratch\nCOPY times /\n", time: longAgo}, {name: "times/", time: longAgo}}
	for name, at := range times {
		context = append(context,
			entry{name: "times/" + name, text: name, time: at},
			entry{name: "times/" + name + "-dir/", time: at},
			entry{name: "times/" + name + "-link", link: name, time: at})
	}
	built := f.MustBuild(t, ctx, body(t, config{"image": s.Registry.Image("seconds:latest")}, nil, context...))
	img, err := pull(ctx, built)
	if err != nil {
		t.Fatal(err)
	}
	files := stack.MustFiles(t, img)
	for name, at := range times {
		for _, path := range []string{name, name + "-dir", name + "-link"} {
			if h := files[path]; h == nil || h.ModTime.Unix() != at.Unix() {
				t.Errorf("%s has %+v, want time %v", path, h, at)
			}
		}
	}
}

// TestOneFileChanged measures what is sent of 3 MB in 300 files when one of them
// has changed.
func TestOneFileChanged(t *testing.T) {
	const files, size = 300, 10_000
	ctx, s, f := start(t, stack.FunctionConfig{})
	apart := func(i int) time.Time { return longAgo.Add(time.Duration(i) * time.Minute) }
	// As files are that are unpacked or checked out.
	close := func(i int) time.Time { return longAgo.Add(time.Duration(i) * 100 * time.Microsecond) }
	for i, tt := range []struct {
		name    string
		time    func(i int) time.Time
		changed time.Time // of the changed file; zero is what it had
		most    int64     // how many files may be sent
	}{
		{"edited, minutes apart", apart, longAgo.AddDate(1, 0, 0), 1},
		{"time kept, minutes apart", apart, time.Time{}, 1},
		{"time kept, in one second", close, time.Time{}, 1},
		{"edited, in one second", close, longAgo.AddDate(1, 0, 0), 8},
	} {
		t.Run(tt.name, func(t *testing.T) {
			src := rand.NewChaCha8([32]byte{1})
			context := []entry{{name: "Dockerfile", text: "FROM scratch\nCOPY files /\n", time: longAgo.AddDate(-1, 0, 0)}}
			for i := range files {
				b := make([]byte, size)
				src.Read(b)
				context = append(context, entry{name: fmt.Sprintf("files/%03d", i), text: string(b), time: tt.time(i)})
			}
			// A repository of its own, and so nothing on the daemon to begin with.
			c := config{"image": s.Registry.Image(fmt.Sprintf("onefile%d:latest", i))}
			first := body(t, c, nil, context...)
			f.MustBuild(t, ctx, first)
			if sent := ended(t, f, first).Sent; sent < files*size {
				t.Errorf("the first build sent %d bytes, want at least %d", sent, files*size)
			}

			e := &context[1+files/2]
			e.text = strings.Repeat("changed\n", size/8)
			if !tt.changed.IsZero() {
				e.time = tt.changed
			}
			second := body(t, c, nil, context...)
			built := f.MustBuild(t, ctx, second)
			sent := ended(t, f, second).Sent
			t.Logf("%d bytes were sent", sent)
			if sent < size || sent > tt.most*size+1000 {
				t.Errorf("%d bytes were sent for a changed file of %d", sent, size)
			}
			if got := mustPulled(t, ctx, built, fmt.Sprintf("%03d", files/2)); got != e.text {
				t.Error("the image does not hold the changed file")
			}

			// Once more, packed anew: nothing but the Dockerfile is sent.
			c["labels"] = map[string]string{"again": "yes"}
			third := body(t, c, nil, context...)
			f.MustBuild(t, ctx, third)
			if sent := ended(t, f, third).Sent; sent > 1000 {
				t.Errorf("%d bytes were sent though nothing has changed", sent)
			}
		})
	}
}
