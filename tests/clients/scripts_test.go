package clients_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"handler/function/tests/stack"
)

// TestShell runs the documented steps with tar, openssl, curl and jq, in a folder
// where more lies than they mean to send.
func TestShell(t *testing.T) { everybody(t, testShell) }

func testShell(t *testing.T, start starter) {
	ctx, _, f := start(t, stack.FunctionConfig{})
	script, err := filepath.Abs("testdata/build.sh")
	if err != nil {
		t.Fatal(err)
	}
	dir := stack.Context(t, map[string]string{
		"context/Dockerfile":      "FROM scratch\nCOPY . /\n",
		"context/hello.txt":       "hello\n",
		"other-function/index.js": "not meant\n",
	})
	ref := f.Image("scripts:shell")
	cmd := exec.CommandContext(ctx, script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "BUILDER="+f.URL, "PAYLOAD_SECRET="+filepath.Join(f.SecretsDir, "payload-secret"), "IMAGE="+ref)
	out := strings.Split(strings.TrimSpace(run(t, cmd)), "\n")
	if len(out) < 4 || out[0] != "success" || out[1] != ref {
		t.Fatalf("the script printed %q", out)
	}
	got := contents(t, pull(t, ctx, ref, out[2]), "")
	if len(got) != 2 || got["hello.txt"] != "hello\n" || got["Dockerfile"] == "" {
		t.Errorf("the image holds %q", got)
	}
	if err := within(strings.Join(out[3:], "\n"), "2 entries", "other-function"); err != nil {
		t.Errorf("the warnings do not tell of the folder beside: %v", err)
	}
}

func TestPython(t *testing.T) {
	scripts(t, func(ctx context.Context, f *stack.Function, image, dir string) *exec.Cmd {
		return exec.CommandContext(ctx, "python3", "testdata/build.py", f.URL, filepath.Join(f.SecretsDir, "payload-secret"), image, filepath.Join(dir, "context"))
	})
}

func TestNode(t *testing.T) {
	scripts(t, func(ctx context.Context, f *stack.Function, image, dir string) *exec.Cmd {
		return exec.CommandContext(ctx, "node", "testdata/build.js", f.URL, filepath.Join(f.SecretsDir, "payload-secret"), image, dir)
	})
}

// script is a command that builds the directory dir and prints what came of it.
type script func(ctx context.Context, f *stack.Function, image, dir string) *exec.Cmd

func scripts(t *testing.T, script script) {
	everybody(t, func(t *testing.T, start starter) { testScript(t, start, script) })
}

func testScript(t *testing.T, start starter, script script) {
	ctx, _, f := start(t, stack.FunctionConfig{})
	ref := f.Image("scripts:" + strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-")))
	good := map[string]string{
		"context/Dockerfile": "FROM scratch\nCOPY hello.txt /\n",
		"context/hello.txt":  "hello from " + t.Name(),
	}
	if got, want := run(t, script(ctx, f, ref, stack.Context(t, good))), "success "+ref+"\n"; got != want {
		t.Fatalf("the script printed %q, want %q", got, want)
	}
	img := stack.MustPull(t, ctx, ref)
	if got := contents(t, img, ""); len(got) != 1 || got["hello.txt"] != good["context/hello.txt"] {
		t.Errorf("the image holds %q", got)
	}

	failing := map[string]string{"context/Dockerfile": "FROM busybox\nRUN false\n"}
	if got := run(t, script(ctx, f, ref, stack.Context(t, failing))); got != "422 failed\n" {
		t.Errorf("the script printed %q of a failed build", got)
	}

	// A secret that only the builder's file has: the answer to a wrong signature
	// is JSON too.
	other := *f
	other.SecretsDir = stack.Context(t, map[string]string{"payload-secret": "another"})
	if got := run(t, script(ctx, &other, ref, stack.Context(t, good))); got != "401 failed\n" {
		t.Errorf("the script printed %q of a wrong key", got)
	}
}

// run returns what a command prints on standard output.
func run(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", cmd, err, out, &stderr)
	}
	if stderr.Len() > 0 {
		t.Logf("%s: %s", cmd, &stderr)
	}
	return string(out)
}
