// Package faults breaks what a build depends on, one thing at a time and for
// real: the client's connection, buildkitd, the registry, disks, time and the
// function itself. Each test asks for a true verdict in time, and for nothing
// to stay behind.
package faults

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/stack"
)

func TestMain(m *testing.M) {
	// Most of these tests wait for a timeout to pass, and need no processor.
	flag.Set("test.parallel", "8")
	stack.Main(m)
}

// What a whole run and a busy machine leave out.
var (
	rounds = flag.Int("rounds", 1, "how often TestStrangers has each kind of stranger come")
	soak   = flag.Int("soak", 400, "how many builds TestNothingGrows makes")
	timing = flag.Bool("timing", false, "hold waits to what they are on a machine that does nothing else")
)

const (
	jsonForm = ""
	ndjson   = "application/x-ndjson"
	sse      = "text/event-stream"
)

// forms names them in tests.
var forms = map[string]string{jsonForm: "json", ndjson: "ndjson", sse: "sse"}

// testTimeout bounds whatever a test waits for that has no limit of its own.
const testTimeout = 3 * time.Minute

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	t.Cleanup(cancel)
	return ctx
}

// request is a tar with one Dockerfile.
func request(t *testing.T, config any, dockerfile ...string) []byte {
	t.Helper()
	dir := stack.Context(t, map[string]string{"Dockerfile": strings.Join(dockerfile, "\n") + "\n"})
	body, err := stack.Tar(dir, config)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// local is the config of a build that pushes nothing.
func local() *builder.BuildConfig { return &builder.BuildConfig{SkipPush: true} }

// mark is a word that makes a RUN step unlike all others, and that its
// processes can be found by.
func mark() string { return "mark-" + rand.Text() }

// sleep is a RUN line whose shell has m in its command line while it sleeps.
func sleep(m string, d time.Duration) string {
	return fmt.Sprintf("RUN sleep %g; : %s", d.Seconds(), m)
}

// answer is all that came of one request.
type answer struct {
	stack.Record
	code   int // HTTP status
	header http.Header
	took   time.Duration
	beats  int // heartbeats
}

func (a answer) String() string {
	return fmt.Sprintf("HTTP %d, %s %s after %v: %s\nlog: %q", a.code, a.Status, a.Code, a.took.Round(time.Millisecond), a.Error, a.Log)
}

// maxLine is the longest line that a stream may have, in bytes.
const maxLine = 60 << 10

// send posts a signed body and reads the answer to its end, which must be as
// the contract says for that form.
func send(ctx context.Context, f *stack.Function, body []byte, form string) (answer, error) {
	req, err := f.Request(ctx, body)
	if err != nil {
		return answer{}, err
	}
	if form != jsonForm {
		req.Header.Set("Accept", form)
	}
	return do(http.DefaultClient, req)
}

func do(client *http.Client, req *http.Request) (answer, error) {
	start := time.Now()
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	a, err := read(resp, nil)
	a.took = time.Since(start)
	return a, err
}

// read takes an answer apart and calls each, if not nil, for every record.
func read(resp *http.Response, each func(stack.Record)) (answer, error) {
	a := answer{code: resp.StatusCode, header: resp.Header}
	form := resp.Header.Get("Content-Type")
	if form != ndjson && form != sse {
		text, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
		if err != nil {
			return a, err
		}
		if err := json.Unmarshal(text, &a.Record); err != nil {
			return a, fmt.Errorf("the answer is not JSON: %w: %.300q", err, text)
		}
		if (a.code == http.StatusOK) != (a.Status == "success") {
			return a, fmt.Errorf("HTTP %d has status %q", a.code, a.Status)
		}
		return a, nil
	}
	var log []string
	lines := bufio.NewReader(resp.Body)
	for {
		line, err := lines.ReadBytes('\n')
		if err == io.EOF && len(line) == 0 {
			break
		}
		if err != nil {
			return a, fmt.Errorf("the stream broke off at %.100q: %w", line, err)
		}
		if len(line) > maxLine {
			return a, fmt.Errorf("a line of %d bytes: %.200q", len(line), line)
		}
		text := bytes.TrimSuffix(line, []byte("\n"))
		if form == sse {
			var ok bool
			if len(text) == 0 {
				continue
			}
			if text[0] == ':' {
				a.beats++
				continue
			}
			if text, ok = bytes.CutPrefix(text, []byte("data: ")); !ok {
				return a, fmt.Errorf("not an event: %.200q", line)
			}
		}
		if a.Status == "success" || a.Status == "failed" {
			return a, fmt.Errorf("after the last record came %.200q", line)
		}
		a.Record = stack.Record{}
		if err := json.Unmarshal(text, &a.Record); err != nil {
			return a, fmt.Errorf("not a record: %w: %.200q", err, line)
		}
		if !slices.Contains([]string{"in_progress", "success", "failed"}, a.Status) {
			return a, fmt.Errorf("a record of status %q", a.Status)
		}
		if a.Status == "in_progress" && len(a.Log) == 0 {
			a.beats++
		}
		log = append(log, a.Log...)
		if each != nil {
			each(a.Record)
		}
	}
	if a.Status != "success" && a.Status != "failed" {
		return a, fmt.Errorf("the stream ended without a verdict, after %.500q", log)
	}
	a.Log = log
	return a, nil
}

// mustSend is send for a test's own goroutine.
func mustSend(t *testing.T, f *stack.Function, body []byte, form string) answer {
	t.Helper()
	a, err := send(testContext(t), f, body, form)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// background is send in a goroutine. wait returns what came of it.
func background(t *testing.T, f *stack.Function, body []byte, form string) (wait func() answer) {
	ctx := testContext(t)
	var a answer
	var err error
	var done sync.WaitGroup
	done.Go(func() { a, err = send(ctx, f, body, form) })
	t.Cleanup(done.Wait)
	return func() answer {
		t.Helper()
		done.Wait()
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
}

// httpStatus is the contract's, by code.
var httpStatus = map[string]int{
	"build_failed": 422, "registry_denied": 422, "deadline": 422,
	"busy": 429, "slow_upload": 400, "unauthorized": 401,
	"no_daemon": 503, "daemon_lost": 503, "daemon_full": 503, "registry_failed": 503, "registry_timeout": 503,
	"no_space": 503, "shutting_down": 503, "stalled": 503, "queue_timeout": 503,
}

// wantFailed checks a failure's code, its HTTP status, and that its error
// contains all of the texts.
func (a answer) wantFailed(t *testing.T, code string, texts ...string) {
	t.Helper()
	if a.Status != "failed" || a.Code != code {
		t.Fatalf("want failed %s, got %v", code, a)
	}
	for _, text := range texts {
		if !strings.Contains(a.Error, text) {
			t.Errorf("the error lacks %q: %v", text, a)
		}
	}
	form := a.header.Get("Content-Type")
	if form == ndjson || form == sse {
		return
	}
	if want := httpStatus[code]; want == 0 || a.code != want {
		t.Errorf("%s came with HTTP %d, want %d", code, a.code, want)
	}
	if retry := a.code == 429 || a.code == 503; retry != (a.header.Get("Retry-After") != "") {
		t.Errorf("HTTP %d came with Retry-After %q", a.code, a.header.Get("Retry-After"))
	}
}

func (a answer) wantSuccess(t *testing.T) {
	t.Helper()
	if a.Status != "success" || a.Code != "" || a.Error != "" {
		t.Fatalf("want success, got %v", a)
	}
}

// patience is the limit of what takes d on a machine that does nothing else: d itself
// with -timing, and otherwise so much longer that no machine is too busy for it. What
// would go wrong takes longer still: steps sleep for five minutes.
func patience(d time.Duration) time.Duration {
	if *timing {
		return d
	}
	return d + 30*time.Second
}

// eventually polls until check is nil, and returns how long that took.
func eventually(t *testing.T, limit time.Duration, check func() error) time.Duration {
	t.Helper()
	start := time.Now()
	for {
		err := check()
		took := time.Since(start)
		if err == nil {
			return took
		}
		if took > limit {
			t.Fatalf("still after %v: %v", limit, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// waitStep returns once the RUN step with m in its command line runs.
func waitStep(t *testing.T, b *stack.Buildkitd, m string) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		if runs(t, b, m) {
			return nil
		}
		return errors.New("the RUN step has not begun")
	})
}

// waitGone returns once the RUN step has no process any more.
func waitGone(t *testing.T, b *stack.Buildkitd, m string, limit time.Duration) time.Duration {
	t.Helper()
	return eventually(t, patience(limit), func() error {
		if !runs(t, b, m) {
			return nil
		}
		return errors.New("the RUN step's process is still there")
	})
}

// sleepers are the processes that sleep in the steps that sleep made with the mark m,
// on whatever daemons those run.
func sleepers(t *testing.T, m string) (pids []int) {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range lines {
		// What has ended meanwhile has no line.
		line, _ := os.ReadFile(file)
		if !strings.Contains(string(line), m) {
			continue
		}
		pid := filepath.Base(filepath.Dir(file))
		children, _ := os.ReadFile("/proc/" + pid + "/task/" + pid + "/children")
		for child := range strings.FieldsSeq(string(children)) {
			n, err := strconv.Atoi(child)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, n)
		}
	}
	return pids
}

// release ends the sleep of the steps with the mark m. A step that is to be there for as
// long as a test looks at it sleeps for longer than any test, and is released when the
// test has seen what it waits for.
func release(t *testing.T, m string) {
	t.Helper()
	// A shell that has begun has its child soon.
	eventually(t, patience(time.Second), func() error {
		pids := sleepers(t, m)
		if len(pids) == 0 {
			return fmt.Errorf("no step with %s sleeps", m)
		}
		for _, pid := range pids {
			if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && err != syscall.ESRCH {
				return err
			}
		}
		return nil
	})
}

func runs(t *testing.T, b *stack.Buildkitd, m string) bool {
	t.Helper()
	steps, err := b.Steps()
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(steps, func(line string) bool { return strings.Contains(line, m) })
}

// roomy is a daemon for all tests whose steps sleep: the shipped configuration
// runs eight steps at once.
var roomy struct {
	sync.Mutex
	*stack.Buildkitd
}

// start is stack.Test with the roomy daemon, where c names none.
func start(t *testing.T, c stack.FunctionConfig) (*stack.Stack, *stack.Buildkitd, *stack.Function) {
	t.Helper()
	if c.Buildkitd == nil {
		roomy.Lock()
		if roomy.Buildkitd == nil {
			ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
			defer cancel()
			var err error
			if roomy.Buildkitd, err = stack.Shared(t).NewBuildkitd(ctx, stack.BuildkitdConfig{Args: []string{"--oci-max-parallelism=100"}}); err != nil {
				roomy.Unlock()
				t.Fatal(err)
			}
		}
		c.Buildkitd = roomy.Buildkitd
		roomy.Unlock()
	}
	s, f := stack.Test(t, c)
	return s, c.Buildkitd, f
}

// newBuildkitd is a daemon of this test's own.
func newBuildkitd(t *testing.T, c stack.BuildkitdConfig) *stack.Buildkitd {
	t.Helper()
	b, err := stack.Shared(t).NewBuildkitd(testContext(t), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Kill)
	return b
}

// metric is the sum of a metric's values whose labels contain all of the texts.
func metric(f *stack.Function, metric string, labels ...string) (float64, error) {
	resp, err := http.Get(f.URL + "/metrics")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	var sum float64
	found := false
	for _, m := range regexp.MustCompile(`(?m)^`+metric+`(\{.*\})? (\S+)$`).FindAllStringSubmatch(string(text), -1) {
		if slices.ContainsFunc(labels, func(l string) bool { return !strings.Contains(m[1], l) }) {
			continue
		}
		v, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			return 0, err
		}
		sum += v
		found = true
	}
	if !found {
		return 0, fmt.Errorf("there is no metric %s %v", metric, labels)
	}
	return sum, nil
}

// waitIdle returns once no build holds a slot or waits for one.
func waitIdle(t *testing.T, f *stack.Function) time.Duration {
	t.Helper()
	return eventually(t, patience(15*time.Second), func() error {
		for _, name := range []string{"builder_builds_in_flight", "builder_builds_waiting"} {
			if n, err := metric(f, name); err != nil || n != 0 {
				return fmt.Errorf("%s is %v, %v", name, n, err)
			}
		}
		return nil
	})
}

// logged is the function's log lines about ended builds, the last one last. A verdict
// is given before its line is written, so what has begun gets some time to be there.
func logged(t *testing.T, f *stack.Function) (ended []map[string]any) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		text, err := f.Log()
		if err != nil {
			t.Fatal(err)
		}
		started := 0
		ended = nil
		for line := range strings.Lines(text) {
			var fields map[string]any
			if json.Unmarshal([]byte(line), &fields) != nil {
				continue
			}
			switch fields["message"] {
			case "build started":
				started++
			case "build ended":
				ended = append(ended, fields)
			}
		}
		if started > 0 && len(ended) >= started || time.Now().After(deadline) {
			return ended
		}
	}
}

// digest is what a tag resolves to, "" for a tag that is not there.
func digest(t *testing.T, ref string, opts ...remote.Option) string {
	t.Helper()
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	d, err := remote.Head(r, append(opts, remote.WithContext(testContext(t)))...)
	if err != nil {
		if strings.Contains(err.Error(), "404") {
			return ""
		}
		t.Fatal(err)
	}
	return d.Digest.String()
}

// wantWhole pulls every tag of a repository with all its blobs and compares
// their digests. A repository that is not there has no tags.
func wantWhole(t *testing.T, repository string, opts ...remote.Option) (tags []string) {
	t.Helper()
	repo, err := name.NewRepository(repository)
	if err != nil {
		t.Fatal(err)
	}
	opts = append(opts, remote.WithContext(testContext(t)))
	tags, err = remote.List(repo, opts...)
	if err != nil && !strings.Contains(err.Error(), "NAME_UNKNOWN") {
		t.Fatal(err)
	}
	for _, tag := range tags {
		if err := pullWhole(repo.Tag(tag), opts); err != nil {
			t.Errorf("the tag %s is there without all that it names: %v", tag, err)
		}
	}
	return tags
}

// pullWhole reads everything of an image; what has not its digest is an error.
func pullWhole(ref name.Reference, opts []remote.Option) error {
	img, err := remote.Image(ref, opts...)
	if err != nil {
		return err
	}
	if _, err := img.RawConfigFile(); err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		r, err := l.Compressed()
		if err != nil {
			return err
		}
		defer r.Close()
		if _, err := io.Copy(io.Discard, r); err != nil {
			return err
		}
	}
	return nil
}

func basic(user, password string) remote.Option {
	return remote.WithAuth(&authn.Basic{Username: user, Password: password})
}
