package clients_test

import (
	"context"
	"crypto/rand"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	control "github.com/moby/buildkit/api/services/control"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestPull changes what a tag of a base image names between two builds. Images
// cannot show the difference: buildkitd with its OCI worker has no image store, and
// asks the registry in every build, whether pull is set or not. A daemon with
// containerd's would not. So the daemon is asked what it was told: its history has
// the attributes of builds that come from a queue.
func TestPull(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	base, ref := s.Registry.Image("config:base"), s.Registry.Image("config:pull")
	push := func(version string) {
		t.Helper()
		img := stack.MustPull(t, ctx, s.Registry.Image("library/busybox:latest"))
		c := configOf(t, img)
		c.Env = append(c.Env, "VERSION="+version)
		img, err := mutate.Config(img, c)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(reference(t, base), img, remote.WithContext(ctx)); err != nil {
			t.Fatal(err)
		}
	}
	for _, version := range []string{"one", "two"} {
		push(version)
		for _, again := range []bool{true, false} {
			got := f.MustBuild(t, ctx, stack.Body(t, config{"image": ref, "pull": again}, map[string]string{
				"Dockerfile": "FROM " + base + "\nRUN echo $VERSION > /version\n",
			}))
			if got := contents(t, pull(t, ctx, ref, got.Digest), "")["version"]; got != version+"\n" {
				t.Errorf("with pull %v: built on version %q, want %q", again, got, version)
			}
		}
	}
	for again, want := range map[bool]string{true: "pull", false: ""} {
		marker := rand.Text()
		body := stack.Body(t, config{"skipPush": true, "pull": again, "labels": config{"marker": marker}}, copyOnly)
		if a := f.MustPost(t, ctx, body, client.Queued(marker)); a.Status != "success" {
			t.Fatalf("got %v", a)
		}
		if got := attributes(t, ctx, s.Buildkitd, marker)["image-resolve-mode"]; got != want {
			t.Errorf("with pull %v the daemon was told image-resolve-mode %q, want %q", again, got, want)
		}
	}
}

// attributes are the frontend's, of the build with that label, in the daemon's
// history.
func attributes(t *testing.T, ctx context.Context, b *stack.Buildkitd, marker string) map[string]string {
	t.Helper()
	c, err := b.Client(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	events, err := c.ControlClient().ListenBuildHistory(ctx, &control.BuildHistoryRequest{EarlyExit: true})
	if err != nil {
		t.Fatal(err)
	}
	for {
		e, err := events.Recv()
		if err == io.EOF {
			t.Fatal("the build is not in the daemon's history")
		}
		if err != nil {
			t.Fatal(err)
		}
		if e.Record.FrontendAttrs["label:marker"] == marker {
			return e.Record.FrontendAttrs
		}
	}
}

// TestSyntax builds Dockerfiles that name a frontend nobody can pull here.
func TestSyntax(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	for name, dockerfile := range map[string]string{
		"hash":     "# syntax=registry.invalid/docker/dockerfile:1\nFROM scratch\nCOPY hello.txt /\n",
		"spaces":   "#   syntax  =  registry.invalid/docker/dockerfile:1\nFROM scratch\nCOPY hello.txt /\n",
		"after":    "# escape=`\n# syntax=registry.invalid/docker/dockerfile:1\n\nFROM scratch\nCOPY hello.txt /\n",
		"new form": "# syntax=registry.invalid/docker/dockerfile:1\nFROM scratch\nCOPY --link <<EOF /hello.txt\nhello\nEOF\n",
	} {
		t.Run(name, func(t *testing.T) {
			ref := s.Registry.Image("syntax:latest")
			got := f.MustBuild(t, ctx, stack.Body(t, config{"image": ref}, map[string]string{"Dockerfile": dockerfile, "hello.txt": "hello\n"}))
			if files := contents(t, pull(t, ctx, ref, got.Digest), ""); files["hello.txt"] != "hello\n" {
				t.Errorf("the image holds %q", files)
			}
			if err := within(strings.Join(got.Warnings, "\n"), "syntax=registry.invalid/docker/dockerfile:1", "not followed"); err != nil {
				t.Errorf("the warnings do not tell: %v", err)
			}
		})
	}
	// The same in the Dockerfile that the key names, and none where there is none.
	got := f.MustBuild(t, ctx, stack.Body(t, config{"skipPush": true, "dockerfile": "sub/Other"}, map[string]string{
		"sub/Other": "# syntax=registry.invalid/frontend\nFROM scratch\nCOPY hello.txt /\n",
		"hello.txt": "hello\n",
	}))
	if err := within(strings.Join(got.Warnings, "\n"), "registry.invalid/frontend"); err != nil {
		t.Error(err)
	}
	if got := f.MustBuild(t, ctx, stack.Body(t, config{"skipPush": true}, copyOnly)); len(got.Warnings) > 0 {
		t.Errorf("warnings of nothing: %q", got.Warnings)
	}
}

// TestAllowSyntax has syntax lines followed. No frontend can be pulled here, so that
// it is seen by the attempt.
func TestAllowSyntax(t *testing.T) {
	s := stack.Shared(t)
	startCtx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	enabled, err := s.NewBuildkitd(startCtx, stack.BuildkitdConfig{Edit: func(toml string) string {
		const off = "[frontend.\"gateway.v0\"]\n  enabled = false\n"
		if !strings.Contains(toml, off) {
			t.Fatal("buildkitd.toml does not turn gateway.v0 off")
		}
		return strings.Replace(toml, off, strings.Replace(off, "false", "true", 1), 1)
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(enabled.Kill)
	frontend := s.Registry.Image("syntax/frontend:1")
	body := stack.Body(t, config{"skipPush": true}, map[string]string{
		"Dockerfile": "# syntax=" + frontend + "\nFROM scratch\nCOPY hello.txt /\n", "hello.txt": "hello\n",
	})
	for name, test := range map[string]struct {
		allow  string
		daemon *stack.Buildkitd
		text   string // in the error
	}{
		"followed":              {"true", enabled, frontend},
		"followed, but refused": {"true", s.Buildkitd, "gateway.v0"},
		"not followed":          {"false", enabled, ""},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, _, f := start(t, stack.FunctionConfig{Env: map[string]string{"allow_syntax": test.allow}, Buildkitd: test.daemon})
			got := f.MustPost(t, ctx, body, client.Accept(client.NDJSON))
			if test.text == "" {
				if got.Status != "success" || within(strings.Join(got.Warnings, "\n"), frontend) != nil {
					t.Errorf("got %v, warnings %q", got, got.Warnings)
				}
				return
			}
			if got.Status != "failed" || !strings.Contains(got.Error, test.text) || len(got.Warnings) > 0 {
				t.Errorf("got %v, want a failure with %q", got, test.text)
			}
			// A Dockerfile without the line needs no frontend.
			f.MustBuild(t, ctx, stack.Body(t, config{"skipPush": true}, copyOnly))
		})
	}
}
