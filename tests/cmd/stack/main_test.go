package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"handler/function/tests/stack"
)

// TestMain is the command itself where a test has started it.
func TestMain(m *testing.M) {
	if args := os.Getenv("STACK_ARGS"); args != "" {
		os.Args = append(os.Args[:1], strings.Fields(args)...)
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// command is a running one, in a process group of its own as at a terminal.
type command struct {
	t    *testing.T
	cmd  *exec.Cmd
	out  string // file of what it prints
	tmp  string // its TMPDIR
	done chan struct{}
}

func start(t *testing.T, args ...string) *command {
	t.Helper()
	c := &command{t: t, out: filepath.Join(t.TempDir(), "out"), tmp: t.TempDir(), done: make(chan struct{})}
	out, err := os.Create(c.out)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	c.cmd = exec.Command(os.Args[0])
	c.cmd.Env = append(os.Environ(), "TMPDIR="+c.tmp, "STACK_ARGS="+strings.Join(args, " "))
	c.cmd.Stdout, c.cmd.Stderr = out, out
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		c.cmd.Wait()
		close(c.done)
	}()
	t.Cleanup(func() {
		select {
		case <-c.done: // its pid may be another process's now
		default:
			c.signal(syscall.SIGKILL)
			<-c.done
		}
		if t.Failed() {
			t.Logf("it printed:\n%s", c.printed())
		}
	})
	return c
}

func (c *command) signal(sig syscall.Signal) { syscall.Kill(-c.cmd.Process.Pid, sig) }

func (c *command) printed() string {
	c.t.Helper()
	text, err := os.ReadFile(c.out)
	if err != nil {
		c.t.Fatal(err)
	}
	return string(text)
}

// until waits for a text among what is printed, and returns the directory of the
// stack.
func (c *command) until(text string) (dir string) {
	c.t.Helper()
	// The first one on a machine compiles the daemons.
	for end := time.Now().Add(15 * time.Minute); !strings.Contains(c.printed(), text); time.Sleep(20 * time.Millisecond) {
		select {
		case <-c.done:
			if !strings.Contains(c.printed(), text) {
				c.t.Fatalf("it has ended without %q", text)
			}
		default:
		}
		if time.Now().After(end) {
			c.t.Fatalf("no %q in 15 minutes", text)
		}
	}
	dirs, err := filepath.Glob(filepath.Join(c.tmp, "function-builder-*"))
	if err != nil || len(dirs) != 1 {
		c.t.Fatalf("its directories are %q, %v", dirs, err)
	}
	return dirs[0]
}

// ended waits for the end and expects an exit code, and nothing to be left of the
// stack in dir.
func (c *command) ended(limit time.Duration, code int, dir string) {
	c.t.Helper()
	select {
	case <-c.done:
	case <-time.After(limit):
		c.t.Fatalf("it still runs after %v", limit)
	}
	if got := c.cmd.ProcessState.ExitCode(); got != code {
		c.t.Errorf("it ended with %v, want exit code %d", c.cmd.ProcessState, code)
	}
	if left, err := stack.Left(dir); err != nil || len(left) > 0 {
		c.t.Errorf("left behind: %v\n%s", err, strings.Join(left, "\n"))
	}
	if entries, err := os.ReadDir(c.tmp); err != nil || len(entries) > 0 {
		c.t.Errorf("left in TMPDIR: %v, %v", entries, err)
	}
}

// TestRun builds a folder and runs its image, as make run FUNCTION=dir IMAGE=ref.
func TestRun(t *testing.T) {
	folder := stack.Context(t, map[string]string{"Dockerfile": "FROM busybox\nRUN echo seen as it comes; echo built > /greeting\nCMD [\"cat\", \"/greeting\"]\n"})
	c := start(t, "run", "-standins=always", "-function="+folder, "-image=sample:v1")
	dir := c.until(" bytes packed\n")
	if left, err := stack.Left(dir); err != nil || len(left) < 2 {
		t.Fatalf("while it runs, %q are seen, %v: the test looks for the wrong things", left, err)
	}
	c.until("it prints:\nbuilt\n")
	c.ended(3*time.Minute, 0, dir)
	out := c.printed()
	for _, want := range []string{`\n  l: seen as it comes\n`, `\npushed 127\.0\.0\.1:\d+/sample:v1@sha256:[0-9a-f]{64} in \d`} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("it does not print %s", want)
		}
	}
}

// TestRunInterrupted presses Ctrl-C while a step runs.
func TestRunInterrupted(t *testing.T) {
	folder := stack.Context(t, map[string]string{"Dockerfile": "FROM busybox\nRUN echo it waits; sleep 1000\n"})
	c := start(t, "run", "-standins=always", "-function="+folder, "-image=sample:v1")
	dir := c.until("l: it waits\n")
	c.signal(syscall.SIGINT)
	c.ended(3*time.Minute, 1, dir)
}

// TestUp builds with the commands that make up prints, and presses Ctrl-C.
func TestUp(t *testing.T) {
	c := start(t, "up", "-standins=always", "-openfaas=false")
	dir := c.until("Ctrl-C ends all of it")
	block := regexp.MustCompile(`(?s)A build with curl:\n(.*?)\nA function with faas-cli`).FindStringSubmatch(c.printed())
	if block == nil {
		t.Fatal("it prints no commands")
	}
	req := filepath.Join(t.TempDir(), "req")
	script := strings.ReplaceAll(block[1], "/tmp/req", req)
	out, err := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", script).CombinedOutput()
	if err != nil || !regexp.MustCompile(`"status":"success".*"digest":"sha256:[0-9a-f]{64}"`).Match(out) {
		t.Errorf("%s\nended with %v: %s", script, err, out)
	}
	exports := regexp.MustCompile(`export BUILDER=(\S+) GATEWAY=\S+ REGISTRY=\S+ PAYLOAD_SECRET=(\S+)`).FindStringSubmatch(c.printed())
	if exports == nil || !strings.Contains(block[1], exports[1]+"/build") {
		t.Errorf("the lines to export are %q", exports)
	} else if _, err := os.Stat(exports[2]); err != nil {
		t.Error(err)
	}
	c.signal(syscall.SIGINT)
	c.ended(3*time.Minute, 0, dir)
	if !strings.HasSuffix(c.printed(), "\nstopping\n") {
		t.Error("it does not say that it stops")
	}
}
