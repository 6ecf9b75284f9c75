package clients_test

import (
	"bytes"
	"debug/buildinfo"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"handler/function/tests/stack"
)

// TestTemplateVariants builds the sample with what OpenFaaS's own template takes for
// other processors, and with what ours cannot do.
func TestTemplateVariants(t *testing.T) {
	// The stand-ins for the base images are for this machine's architecture.
	variant := map[string]struct{ platform, key, value string }{
		"amd64": {"linux/amd64/v2", "GOAMD64", "v2"}, "arm64": {"linux/arm64/v8", "GOARCH", "arm64"},
	}[runtime.GOARCH]
	if variant.platform == "" {
		t.Fatalf("no variant of %s is known here", runtime.GOARCH)
	}
	ctx, s, f := start(t, stack.FunctionConfig{})
	dir, err := s.Assemble("variants", filepath.Join(s.Repo, "tests", "testdata", "hello"))
	if err != nil {
		t.Fatal(err)
	}
	args := stack.GoSettings(ctx)
	ref := s.Registry.Image("variants:latest")
	body := stack.MustTar(t, dir, config{"image": ref, "buildArgs": args, "platforms": []string{variant.platform}})
	got := f.MustBuild(t, ctx, body)
	files := stack.MustFiles(t, pull(t, ctx, ref, got.Digest))
	handler := files["home/app/handler"]
	if handler == nil {
		t.Fatal("the image has no handler")
	}
	info, err := buildinfo.Read(bytes.NewReader(handler.Content))
	if err != nil {
		t.Fatal(err)
	}
	settings := map[string]string{}
	for _, setting := range info.Settings {
		settings[setting.Key] = setting.Value
	}
	if settings[variant.key] != variant.value || settings["CGO_ENABLED"] != "0" {
		t.Errorf("built with %v", settings)
	}

	args["CGO_ENABLED"] = "1"
	body = stack.MustTar(t, dir, config{"skipPush": true, "buildArgs": args})
	if a := f.MustPost(t, ctx, body); a.Code != "build_failed" || !strings.Contains(strings.Join(a.Log, "\n"), "no C compiler") {
		t.Errorf("with cgo: %s %s", a.Code, a.Error)
	}
}
