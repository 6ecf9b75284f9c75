// Package clients_test holds the builder against the clients that people have:
// go-sdk, faas-cli's requests, curl and openssl, Python and Node, and the tars
// that each of them writes. Everything runs on a real buildkitd and registry, and
// behind the real of-watchdog where this machine has one.
package clients_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
	"time"

	"handler/function/tests/stack"
)

func TestMain(m *testing.M) { stack.Main(m) }

// start returns a function of the test's own, and a context that ends before go
// test would kill the package.
func start(t *testing.T, c stack.FunctionConfig) (context.Context, *stack.Stack, *stack.Function) {
	t.Helper()
	c.Watchdog = true
	s, f := stack.Test(t, c)
	return stack.Within(t, 10*time.Minute), s, f
}

// within returns an error that names the first of want that text lacks.
func within(text string, want ...string) error {
	for _, w := range want {
		if !strings.Contains(text, w) {
			return fmt.Errorf("%q is not in %q", w, text)
		}
	}
	return nil
}

func sha256Hex(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
