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

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"handler/function/tests/stack"
)

func TestMain(m *testing.M) { stack.Main(m) }

// start returns a function of the test's own, and a context that ends before go
// test would kill the package.
func start(t *testing.T, c stack.FunctionConfig) (context.Context, *stack.Stack, *stack.Function) {
	t.Helper()
	c.Watchdog = true
	s, f := stack.Test(t, c)
	return stack.Within(t, 2*time.Minute), s, f
}

// pull returns an image and checks that its digest is the one that was told.
func pull(t *testing.T, ctx context.Context, ref, digest string) v1.Image {
	t.Helper()
	img := stack.MustPull(t, ctx, ref)
	if got, err := img.Digest(); err != nil || got.String() != digest {
		t.Errorf("%s has digest %v, %v, but the answer said %q", ref, got, err, digest)
	}
	return img
}

func configOf(t *testing.T, img v1.Image) v1.Config {
	t.Helper()
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return file.Config
}

// contents returns the regular files of an image below dir, which ends with a
// slash or is empty.
func contents(t *testing.T, img v1.Image, dir string) map[string]string {
	t.Helper()
	files := stack.MustFiles(t, img)
	texts := map[string]string{}
	for name, file := range files {
		if name, ok := strings.CutPrefix(name, dir); ok && file.FileInfo().Mode().IsRegular() {
			texts[name] = string(file.Content)
		}
	}
	return texts
}

// within says which of want does not stand in text.
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
