package stack_test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"handler/function/tests/stack"
)

func TestMain(m *testing.M) { stack.Main(m) }

// TestNothingStaysBehind runs a step that never ends, kills everything by
// Close, and looks for what could have stayed.
func TestNothingStaysBehind(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	enough, err := stack.EnoughMemory()
	if err != nil {
		t.Fatal(err)
	}
	s, err := stack.Start(ctx, stack.Config{Log: t.Output(), InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()

	// A daemon that starts later has this stack's mounts in its namespace.
	later, err := stack.Shared(t).NewBuildkitd(ctx, stack.BuildkitdConfig{})
	if err != nil {
		t.Fatal(err)
	}
	defer later.Kill()
	inMemory := func() bool {
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", later.Pid()))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(mounts), s.Dir)
	}
	// Another stack may take the memory between the first answer and the start.
	if still, err := stack.EnoughMemory(); err != nil || enough && still && !inMemory() {
		t.Errorf("the stack stores on the disk: %v", err)
	}

	// The number is in the command line, and so in every process to look for.
	mark := fmt.Sprint(100000 + os.Getpid())
	dir := stack.Context(t, map[string]string{"Dockerfile": "FROM busybox\nRUN sleep " + mark + "\n"})
	build := s.Buildkitd.Buildctl(ctx, "build", "--frontend=dockerfile.v0", "--local=context="+dir, "--local=dockerfile="+dir)
	var out strings.Builder
	build.Stdout, build.Stderr = &out, &out
	if err := build.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- build.Wait() }()
	for {
		steps, err := s.Buildkitd.Steps()
		if err != nil {
			t.Fatal(err)
		}
		if len(steps) > 0 && strings.Contains(steps[0], mark) {
			break
		}
		select {
		case err := <-ended:
			t.Fatalf("the build ended before its step ran: %v\n%s", err, out.String())
		case <-time.After(20 * time.Millisecond):
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	<-ended

	if left := processes(t, mark); len(left) > 0 {
		t.Errorf("processes are left:\n%s", strings.Join(left, "\n"))
	}
	if left, err := stack.Left(s.Dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v\n%s", err, strings.Join(left, "\n"))
	}
	if inMemory() {
		t.Error("another stack's daemon has the mount still, and keeps its memory")
	}
}

// TestKilled kills a process that holds a stack, as go test does when its time
// is up: the daemons die with it, and the next stack removes its directory.
func TestKilled(t *testing.T) {
	if os.Getenv("STACK_HOLD") != "" {
		fmt.Println("holding", stack.Shared(t).Dir)
		time.Sleep(time.Minute)
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	holder := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestKilled$")
	holder.Env = append(os.Environ(), "STACK_HOLD=1", "TMPDIR="+t.TempDir())
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	holder.Stderr = os.Stderr
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	var dir string
	if _, err := fmt.Fscanf(out, "holding %s\n", &dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(filepath.Join(dir, "storage"), syscall.MNT_DETACH) }) // if no stack removes it
	if len(processes(t, dir)) == 0 {
		t.Fatal("no process names the stack's directory: the test looks for the wrong thing")
	}
	holder.Process.Kill()
	holder.Wait()
	for end := time.Now().Add(time.Minute); len(processes(t, dir)) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("processes are left:\n%s", strings.Join(processes(t, dir), "\n"))
		}
	}
	t.Setenv("TMPDIR", filepath.Dir(dir))
	s, err := stack.Start(ctx, stack.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the directory %s is left: %v", dir, err)
	}
}

// processes returns the command lines that hold a mark.
func processes(t *testing.T, mark string) (lines []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil || len(files) == 0 {
		t.Fatalf("listing processes: %v", err)
	}
	for _, f := range files {
		line, _ := os.ReadFile(f)
		if strings.Contains(string(line), mark) {
			lines = append(lines, f+": "+strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return lines
}

// TestBuild is the example of the package's documentation.
func TestBuild(t *testing.T) {
	s, f := stack.Test(t, stack.FunctionConfig{Env: map[string]string{"max_builds": "1"}})
	ref := s.Registry.Image("hello:latest")
	body := stack.Body(t, map[string]string{"image": ref}, map[string]string{
		"Dockerfile": "FROM busybox\nCOPY greeting /\nCMD [\"cat\", \"/greeting\"]\n",
		"greeting":   "hello\n",
	})
	f.MustBuild(t, t.Context(), body)
	img := stack.MustPull(t, t.Context(), ref)
	c, err := s.Run(t.Context(), img, stack.RunConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := c.Output(t.Context()); err != nil || out != "hello\n" {
		t.Errorf("the image printed %q, %v", out, err)
	}
	files := stack.MustFiles(t, img)
	if f := files["greeting"]; f == nil || string(f.Content) != "hello\n" || f.Mode != 0o644 {
		t.Errorf("greeting is %+v", f)
	}

	names, unlinked, err := f.TempFiles()
	if err != nil || len(names) > 0 || unlinked > 0 {
		t.Errorf("after the build TMPDIR holds %q and %d nameless bytes: %v", names, unlinked, err)
	}
	if rss, peak, err := f.Memory(); err != nil || rss > peak {
		t.Errorf("memory is %d, its peak %d: %v", rss, peak, err)
	}
	if n, err := f.FDs(); err != nil || n < 3 {
		t.Errorf("%d descriptors: %v", n, err)
	}
	if err := f.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestDaemon stops, freezes and restarts a daemon of its own.
func TestDaemon(t *testing.T) {
	s := stack.Shared(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	b, err := s.NewBuildkitd(ctx, stack.BuildkitdConfig{Edit: func(toml string) string {
		return toml + "\n[worker.oci.labels]\ncolour = \"green\"\n"
	}})
	if err != nil {
		t.Fatal(err)
	}
	label := func() (string, error) {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		c, err := b.Client(ctx)
		if err != nil {
			return "", err
		}
		defer c.Close()
		workers, err := c.ListWorkers(ctx)
		if err != nil {
			return "", err
		}
		return workers[0].Labels["colour"], nil
	}
	if got, err := label(); got != "green" {
		t.Errorf("the worker's label is %q, %v", got, err)
	}
	if err := b.Pause(); err != nil {
		t.Fatal(err)
	}
	if got, err := label(); err == nil {
		t.Errorf("a frozen daemon answers %q", got)
	}
	if err := b.Resume(); err != nil {
		t.Fatal(err)
	}
	if _, err := label(); err != nil {
		t.Errorf("a resumed daemon does not answer: %v", err)
	}
	pid := b.Pid()
	if err := b.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	if got, err := label(); got != "green" || b.Pid() == pid {
		t.Errorf("after a restart the label is %q, %v, the pid %d after %d", got, err, b.Pid(), pid)
	}
	if err := b.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := b.Wait(ctx); err != nil {
		t.Error(err)
	}
}

// TestKept has two stacks, one after the other, with a daemon of one state. The second takes
// what the first has in a cache mount, and waits until the first has ended.
func TestKept(t *testing.T) {
	first, err := stack.Start(t.Context(), stack.Config{Log: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	s := stack.Shared(t)
	config := stack.BuildkitdConfig{Kept: "kept-" + filepath.Base(s.Dir)}
	t.Cleanup(func() { os.RemoveAll(filepath.Join(s.Repo, ".cache", config.Kept)) })
	ctx := stack.Within(t, 5*time.Minute)
	run := func(b *stack.Buildkitd, command string) {
		t.Helper()
		dir := stack.Context(t, map[string]string{"Dockerfile": "FROM busybox\nRUN --mount=type=cache,target=/kept " + command + "\n"})
		if out, err := b.Buildctl(ctx, "build", "--frontend=dockerfile.v0", "--local=context="+dir, "--local=dockerfile="+dir).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
	}
	b, err := first.NewBuildkitd(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	run(b, "[ ! -e /kept/file ] && echo it is kept > /kept/file")

	soon, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if b, err := s.NewBuildkitd(soon, config); err == nil {
		b.Kill()
		t.Error("two daemons had the state at once")
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if b, err = s.NewBuildkitd(ctx, config); err != nil {
		t.Fatal(err)
	}
	defer b.Kill()
	run(b, "grep kept /kept/file")
}

// TestPasswordRegistry runs a registry that asks for a password.
func TestPasswordRegistry(t *testing.T) {
	s := stack.Shared(t)
	file := filepath.Join(t.TempDir(), "htpasswd")
	line, err := stack.Htpasswd("me", "secret")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(line), 0o644); err != nil {
		t.Fatal(err)
	}
	r, err := s.NewRegistry(t.Context(), map[string]string{
		"REGISTRY_AUTH_HTPASSWD_REALM": "test", "REGISTRY_AUTH_HTPASSWD_PATH": file,
	})
	if err != nil {
		t.Fatal(err)
	}
	status := func(password string) int {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+r.Addr+"/v2/", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.SetBasicAuth("me", password)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	if got := status("wrong"); got != http.StatusUnauthorized {
		t.Errorf("a wrong password gets %d", got)
	}
	r.Kill()
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := status("secret"); got != http.StatusOK {
		t.Errorf("the right password gets %d after a restart", got)
	}
}

// TestContainer runs a server and a program that ends, both from an image of
// the registry.
func TestContainer(t *testing.T) {
	s := stack.Shared(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	img, err := stack.Pull(ctx, s.Registry.Image("library/busybox:latest"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.Run(ctx, img, stack.RunConfig{Env: []string{"GREETING=hello"}, Args: []string{"sh", "-c", "echo $GREETING; exit 3"}})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := c.Output(ctx); err == nil || !strings.Contains(err.Error(), "exit status 3") || out != "hello\n" {
		t.Errorf("got %q, %v, want hello and exit status 3", out, err)
	}
	c, err = s.Run(ctx, img, stack.RunConfig{Args: []string{"sh", "-c", "mkdir /www && echo served > /www/index.html && exec httpd -f -p 8080 -h /www"}})
	if err != nil {
		t.Fatal(err)
	}
	if status, out, err := c.Get(ctx, 8080, "/"); err != nil || status != http.StatusOK || out != "served\n" {
		t.Errorf("got %d, %q, %v", status, out, err)
	}
	if c.Ended() {
		t.Error("the server has ended")
	}

	// Nothing but /tmp can be written, and the machine's network is there.
	c, err = s.Run(ctx, img, stack.RunConfig{
		ReadOnly: true, HostNetwork: true, Mounts: map[string]string{"/var/given": stack.Context(t, map[string]string{"file": "given"})},
		Args: []string{"sh", "-c", "cat /var/given/file; for d in / /bin /var /var/given /tmp; do touch $d/x 2>/dev/null && echo $d; done; nc -w 5 ${REGISTRY%:*} ${REGISTRY#*:} </dev/null && echo reached"},
		Env:  []string{"REGISTRY=" + s.Registry.Addr},
	})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := c.Output(ctx); err != nil || out != "given/tmp\nreached\n" {
		t.Errorf("read-only: got %q, %v", out, err)
	}
}

// TestMemoryLimit starts a function within its limit, and one that has too little
// memory to start with.
func TestMemoryLimit(t *testing.T) {
	s := stack.Shared(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	f, err := s.Function(ctx, stack.FunctionConfig{Plain: true, Memory: 512 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Kill()
	rss, _, err := f.Memory()
	if err != nil {
		t.Fatal(err)
	}
	if n, err := f.Anonymous(); err != nil || n < 1<<20 || n > rss {
		t.Errorf("%d bytes of %d are no file's, %v", n, rss, err)
	}
	f.Kill()
	if f, err := s.Function(ctx, stack.FunctionConfig{Plain: true, Memory: 2 << 20}); err == nil {
		f.Kill()
		t.Error("a function started in 2 MiB")
	} else if !strings.Contains(err.Error(), "signal: killed") {
		t.Errorf("starting in 2 MiB: %v", err)
	}
	left, err := filepath.Glob("/sys/fs/cgroup/*/" + filepath.Base(s.Dir) + "-function-*")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
	if left, err = filepath.Glob("/sys/fs/cgroup/" + filepath.Base(s.Dir) + "-function-*"); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}
