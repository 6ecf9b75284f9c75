package stack_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"handler/function/tests/stack"
)

// TestNothingStaysBehind runs a step that never ends, kills everything by
// Close, and looks for what could have stayed.
func TestNothingStaysBehind(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	s, err := stack.Start(ctx, stack.Config{Log: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()

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

	if left := processes(t, mark, s.Dir); len(left) > 0 {
		t.Errorf("processes are left:\n%s", strings.Join(left, "\n"))
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), s.Dir) {
		t.Errorf("mounts are left:\n%s", mounts)
	}
	if _, err := os.Stat(s.Dir); !os.IsNotExist(err) {
		t.Errorf("the directory %s is left: %v", s.Dir, err)
	}
	for _, pattern := range []string{"/sys/fs/cgroup/%s-*", "/sys/fs/cgroup/*/%s-*"} {
		left, err := filepath.Glob(fmt.Sprintf(pattern, filepath.Base(s.Dir)))
		if err != nil || len(left) > 0 {
			t.Errorf("cgroups are left: %v, %v", left, err)
		}
	}
}

// TestKilled kills a process that holds a stack, as go test does when its time
// is up: the daemons die with it, and the next stack removes its directory.
func TestKilled(t *testing.T) {
	if os.Getenv("STACK_HOLD") != "" {
		s, err := stack.Start(t.Context(), stack.Config{})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("holding", s.Dir)
		time.Sleep(time.Minute)
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
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
	if len(processes(t, dir)) == 0 {
		t.Fatal("no process names the stack's directory: the test looks for the wrong thing")
	}
	holder.Process.Kill()
	holder.Wait()
	for end := time.Now().Add(5 * time.Second); len(processes(t, dir)) > 0; time.Sleep(20 * time.Millisecond) {
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

// processes returns the command lines that hold one of the marks.
func processes(t *testing.T, marks ...string) (lines []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil || len(files) == 0 {
		t.Fatalf("listing processes: %v", err)
	}
	for _, f := range files {
		line, _ := os.ReadFile(f)
		for _, mark := range marks {
			if strings.Contains(string(line), mark) {
				lines = append(lines, f+": "+strings.ReplaceAll(string(line), "\x00", " "))
			}
		}
	}
	return lines
}

// TestContainer runs a server and a program that ends, both from an image of
// the registry.
func TestContainer(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	s, err := stack.Start(ctx, stack.Config{Log: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	img, err := stack.Pull(ctx, s.Registry.Image("library/busybox:latest"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.Run(ctx, img, []string{"GREETING=hello"}, "sh", "-c", "echo $GREETING; exit 3")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := c.Output(ctx); err == nil || !strings.Contains(err.Error(), "exit status 3") || out != "hello\n" {
		t.Errorf("got %q, %v, want hello and exit status 3", out, err)
	}
	c, err = s.Run(ctx, img, nil, "sh", "-c", "mkdir /www && echo served > /www/index.html && exec httpd -f -p 8080 -h /www")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := c.Get(ctx, 8080, "/"); err != nil || out != "served\n" {
		t.Errorf("got %q, %v", out, err)
	}
	if c.Ended(0) {
		t.Error("the server has ended")
	}
}
