package stack

import (
	"context"
	"errors"
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
