package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestClaim: a name has one owner, and who waits for it has it when that gives it up.
func TestClaim(t *testing.T) {
	first, err := claim("test")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := claim("test"); err == nil {
		t.Fatal("claimed twice")
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := claimWhenFree(ended, "test"); !errors.Is(err, context.Canceled) {
		t.Errorf("waited for a name that is taken: %v", err)
	}
	time.AfterFunc(50*time.Millisecond, func() { first.Close() })
	second, err := claimWhenFree(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	second.Close()
}

// TestFreePort: no port is handed out twice.
func TestFreePort(t *testing.T) {
	seen := make(map[int]bool)
	for range 300 {
		port, err := FreePort()
		if err != nil {
			t.Fatal(err)
		}
		if seen[port] {
			t.Fatalf("the port %d was handed out twice", port)
		}
		seen[port] = true
	}
}

// TestKilledAgain kills a process that has ended, when its pid is another's.
func TestKilledAgain(t *testing.T) {
	for range 1000 {
		first := startSleep(t)
		first.kill()
		// The next process or thread of this namespace gets the pid after this one.
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", fmt.Append(nil, first.cmd.Process.Pid-1), 0); err != nil {
			t.Fatal(err)
		}
		second := startSleep(t)
		if second.cmd.Process.Pid != first.cmd.Process.Pid {
			second.kill()
			continue
		}
		first.kill()
		if err := second.signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		state, err := second.wait(t.Context())
		if err != nil || state.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
			t.Errorf("the second process ended with %v, %v, want SIGTERM", state, err)
		}
		return
	}
	t.Fatal("no process got the pid of one that had ended")
}

func startSleep(t *testing.T) *process {
	t.Helper()
	p, err := startProcess("sleep", filepath.Join(t.TempDir(), "log"), exec.Command("sleep", "300"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	return p
}

// TestGroupEnds: what a process has started in its group ends with it.
func TestGroupEnds(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.Command("sh", "-c", "sleep 300 &")
	cmd.ExtraFiles = []*os.File{w}
	_, err = startProcess("sh", filepath.Join(t.TempDir(), "log"), cmd)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	// It is closed when nobody has the other end.
	r.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("what it started still runs: %v", err)
	}
}

// TestStopped has a process stopped, and finds it so.
func TestStopped(t *testing.T) {
	p, err := startProcess("sh", filepath.Join(t.TempDir(), "log"), exec.Command("sh", "-c", "while :; do :; done"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.kill()
	if stopped, err := isStopped(p.cmd.Process.Pid); err != nil || stopped {
		t.Errorf("while it runs: %v, %v", stopped, err)
	}
	if err := p.signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if stopped, err := isStopped(p.cmd.Process.Pid); err != nil || !stopped {
		t.Errorf("after SIGSTOP: %v, %v", stopped, err)
	}
}
