package stack

import (
	"context"
	"errors"
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
