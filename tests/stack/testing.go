package stack

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

var shared *Stack

// Main is what TestMain of a package of end-to-end tests calls: it runs the
// tests with one stack for all of them, and ends the process.
func Main(m *testing.M) {
	os.Exit(runMain(m))
}

func runMain(m *testing.M) (code int) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	s, err := Start(ctx, Config{Log: os.Stderr, Race: true, InMemory: true})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	interrupted := context.AfterFunc(ctx, func() {
		if err := s.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "closing the stack:", err)
		}
		os.Exit(130)
	})
	defer func() {
		interrupted()
		if err := s.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "closing the stack:", err)
			code = 1
		}
	}()
	shared = s
	return m.Run()
}

// Shared returns the stack that Main started. It fails the test if the registry or buildkitd
// has ended since. When the test fails, the end of buildkitd's log is shown.
func Shared(t testing.TB) *Stack {
	t.Helper()
	if shared == nil {
		t.Fatal("no shared stack: TestMain must call stack.Main")
	}
	for _, p := range []*process{shared.Registry.proc, shared.Buildkitd.proc} {
		if p.ended() {
			t.Fatalf("%s ended before this test, with %v; its log ends:\n%s", p.name, p.cmd.ProcessState, tail(p.log, 4<<10))
		}
	}
	showLog(t, "buildkitd", shared.Buildkitd.LogFile())
	return shared
}

// Test returns a function on the shared stack for this test alone, which is
// killed at its end. When the test fails, the ends of the logs are shown.
func Test(t testing.TB, c FunctionConfig) (*Stack, *Function) {
	t.Helper()
	s := Shared(t)
	// The first function is compiled, and one with a watchdog waits for others on this machine.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	f, err := s.Function(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.Kill()
		if log, err := f.Log(); err == nil && strings.Contains(log, "DATA RACE") {
			t.Errorf("the function raced:\n%s", log)
		}
		os.RemoveAll(f.dir)
	})
	showLog(t, "function", f.LogFile())
	return s, f
}

// Context writes files into a directory of the test and returns it.
func Context(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	if err := WriteContext(dir, files); err != nil {
		t.Fatal(err)
	}
	return dir
}

// MustTar is Tar.
func MustTar(t testing.TB, contextDir string, config any) []byte {
	t.Helper()
	body, err := Tar(contextDir, config)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// Body is Tar of files, which it writes with Context.
func Body(t testing.TB, config any, files map[string]string) []byte {
	t.Helper()
	return MustTar(t, Context(t, files), config)
}

// ConfigAlone is a request without a context.
func ConfigAlone(t testing.TB, config any) []byte {
	t.Helper()
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err = w.WriteHeader(&tar.Header{Name: "com.openfaas.docker.config", Mode: 0o600, Size: int64(len(text))})
	if err == nil {
		_, err = w.Write(text)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// WithSecrets appends com.openfaas.secrets to a body of Tar.
func WithSecrets(t testing.TB, body []byte, secrets string) []byte {
	t.Helper()
	const end = 2 * 512 // zeros
	b := bytes.NewBuffer(bytes.Clone(body[:len(body)-end]))
	w := tar.NewWriter(b)
	err := w.WriteHeader(&tar.Header{Name: "com.openfaas.secrets", Mode: 0o600, Size: int64(len(secrets))})
	if err == nil {
		_, err = w.Write([]byte(secrets))
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Within returns a context that ends with the test, or at a limit before it.
func Within(t testing.TB, limit time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// Eventually polls until check returns nil, and returns how long that took.
func Eventually(t testing.TB, limit time.Duration, check func() error) time.Duration {
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

// Runs says whether a RUN step of this daemon runs with mark in its command line.
func (b *Buildkitd) Runs(t testing.TB, mark string) bool {
	t.Helper()
	steps, err := b.Steps()
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(steps, func(line string) bool { return strings.Contains(line, mark) })
}

// WaitStep returns once a RUN step runs with mark in its command line.
func (b *Buildkitd) WaitStep(t testing.TB, mark string) {
	t.Helper()
	Eventually(t, time.Minute, func() error {
		if !b.Runs(t, mark) {
			return errors.New("the RUN step has not begun")
		}
		return nil
	})
}

// WaitGone returns once no process of such a RUN step is left, and how long that took.
func (b *Buildkitd) WaitGone(t testing.TB, mark string, limit time.Duration) time.Duration {
	t.Helper()
	return Eventually(t, limit, func() error {
		if b.Runs(t, mark) {
			return errors.New("the RUN step's process is still there")
		}
		return nil
	})
}

// Sleepers are the processes that sleep in RUN steps with mark in their command line, on
// whatever daemons those run: children of a shell such as that of RUN sleep 600; : mark.
func Sleepers(t testing.TB, mark string) (pids []int) {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range lines {
		// What has ended meanwhile has no line.
		line, _ := os.ReadFile(file)
		if !strings.Contains(string(line), mark) {
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

// Release ends the Sleepers of a mark, and so their steps. It waits for them: a shell that
// has begun has its child soon.
func Release(t testing.TB, mark string, limit time.Duration) {
	t.Helper()
	Eventually(t, limit, func() error {
		pids := Sleepers(t, mark)
		if len(pids) == 0 {
			return fmt.Errorf("no step with %s sleeps", mark)
		}
		for _, pid := range pids {
			if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && err != syscall.ESRCH {
				return err
			}
		}
		return nil
	})
}

// Pushes counts the manifests that the registry took for a repository.
func (r *Registry) Pushes(t testing.TB, repository string) int {
	t.Helper()
	log, err := os.ReadFile(r.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(log), `"PUT /v2/`+repository+`/manifests/`)
}

// MustPull is Pull.
func MustPull(t testing.TB, ctx context.Context, ref string) v1.Image {
	t.Helper()
	img, err := Pull(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// MustFiles is Files.
func MustFiles(t testing.TB, img v1.Image) map[string]*File {
	t.Helper()
	files, err := Files(img)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// Left lists what there is of the stack in a directory: processes that name it,
// mounts, cgroups, and the directory itself.
func Left(dir string) (left []string, err error) {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil || len(lines) == 0 {
		return nil, fmt.Errorf("listing processes: %d, %v", len(lines), err)
	}
	for _, file := range lines {
		// What has ended meanwhile has no line.
		if line, _ := os.ReadFile(file); strings.Contains(string(line), dir) {
			left = append(left, file+": "+strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir) {
			left = append(left, "mount: "+strings.TrimSpace(line))
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/%s-*", "/sys/fs/cgroup/*/%s-*"} {
		dirs, err := filepath.Glob(fmt.Sprintf(pattern, filepath.Base(dir)))
		if err != nil {
			return nil, err
		}
		left = append(left, dirs...)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		left = append(left, fmt.Sprintf("%s: %v", dir, err))
	}
	return left, nil
}

// showLog shows what a daemon has logged since the test began, if it fails.
func showLog(t testing.TB, name, path string) {
	var before int64
	if info, err := os.Stat(path); err == nil {
		before = info.Size()
	}
	t.Cleanup(func() {
		if info, err := os.Stat(path); err == nil && t.Failed() && info.Size() > before {
			t.Logf("%s logged:\n%s", name, tail(path, min(info.Size()-before, 8<<10)))
		}
	})
}

// TestNATS starts a NATS server for this test alone. c need not say which, where or how many. When
// the test fails, the end of its log is shown.
func TestNATS(t testing.TB, c NATSConfig) *NATS {
	t.Helper()
	s := Shared(t)
	bin, _, err := BuildNATS(t.Context(), s.Repo, s.log)
	if err != nil {
		t.Fatal(err)
	}
	c.Bin, c.Dir, c.Servers = bin, t.TempDir(), 1
	servers, err := StartNATS(Within(t, time.Minute), c)
	t.Cleanup(func() {
		for _, n := range servers {
			if t.Failed() {
				t.Logf("%s ended its log with\n%s", n.URL, n.Log())
			}
			n.Kill()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return servers[0]
}
