package faults

import (
	"archive/tar"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	buildkit "github.com/moby/buildkit/client"
	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// perArch has a stage for each architecture; a stage of another name fails.
func perArch(t *testing.T, config any, arm string) []byte {
	t.Helper()
	dir := stack.Context(t, map[string]string{
		"Dockerfile": "ARG TARGETARCH\nFROM scratch AS amd64\nCOPY one /file\nFROM scratch AS arm64\nCOPY " + arm + " /file\nFROM ${TARGETARCH}\nCOPY both /\nLABEL a=b\nCMD [\"/file\"]\n",
		"one":        "amd64 " + mark(), "other": "arm64 " + mark(), "both": mark(),
	})
	body, err := stack.Tar(dir, config)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// mixed are a daemon of this machine's architecture and one that says it is an
// arm64 one: it can do everything but run a step.
func mixed(t *testing.T) []*stack.Buildkitd {
	t.Helper()
	return []*stack.Buildkitd{
		newBuildkitd(t, stack.BuildkitdConfig{}),
		newBuildkitd(t, stack.BuildkitdConfig{Args: []string{"--oci-worker-platform=linux/arm64"}}),
	}
}

// platformsOf pulls every image of an index, by platform.
func platformsOf(t *testing.T, ref string) (digest string, files map[string]string, annotations map[string]string) {
	t.Helper()
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	index, err := remote.Index(r, remote.WithContext(testContext(t)))
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	h, err := index.Digest()
	if err != nil {
		t.Fatal(err)
	}
	files = make(map[string]string)
	for _, d := range manifest.Manifests {
		img, err := index.Image(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		files[d.Platform.String()] = firstFile(t, img)
		config, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if got := (v1.Platform{OS: config.OS, Architecture: config.Architecture}).String(); got != d.Platform.String() {
			t.Errorf("the image for %s says %s", d.Platform, got)
		}
		if config.Config.Labels["a"] != "b" || len(config.Config.Cmd) != 1 || len(config.History) != 4 {
			t.Errorf("config of %s: %+v, %d lines of history", d.Platform, config.Config, len(config.History))
		}
	}
	return h.String(), files, manifest.Annotations
}

func firstFile(t *testing.T, img v1.Image) string {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err != nil {
			t.Fatal(err)
		}
		if h.Name == "file" {
			text, err := io.ReadAll(tr)
			if err != nil {
				t.Fatal(err)
			}
			return string(text)
		}
	}
}

// TestPlatformsOfTheirOwn: each platform is built by a daemon of its own, and
// they become one index.
func TestPlatformsOfTheirOwn(t *testing.T) {
	t.Parallel()
	list := mixed(t)
	s, f := pool(t, list, nil)
	repository := strings.ToLower(mark())
	ref, second := s.Registry.Image(repository+":v1"), s.Registry.Image(repository+"-copy:v2")
	config := map[string]any{
		"image": ref, "tags": []string{second}, "platforms": []string{"linux/arm64", "linux/amd64"},
		"annotations": map[string]string{"note": "kept"},
	}
	got := mustSend(t, f, perArch(t, config, "other"), client.NDJSON)
	got.WantSuccess(t)
	// Of what was pushed nothing but the configs is fetched for the index.
	if text, err := os.ReadFile(s.Registry.LogFile()); err != nil || strings.Count(string(text), `"GET /v2/`+repository+`/blobs/`) > 2 {
		t.Errorf("%d blobs were pulled to join them, %v", strings.Count(string(text), `"GET /v2/`+repository+`/blobs/`), err)
	}
	for _, r := range []string{ref, second} {
		digest, files, annotations := platformsOf(t, r)
		if digest != got.Digest || annotations["note"] != "kept" || len(files) != 2 ||
			!strings.HasPrefix(files["linux/amd64"], "amd64 ") || !strings.HasPrefix(files["linux/arm64"], "arm64 ") {
			t.Errorf("%s: %s, want %s; %q, %v", r, digest, got.Digest, files, annotations)
		}
	}
	if want := []string{"linux/arm64", "linux/amd64"}; !slices.Equal(got.Platforms, want) {
		t.Errorf("platforms %q", got.Platforms)
	}
	log := strings.Join(got.Log, "\n")
	for _, p := range []string{"linux/amd64", "linux/arm64"} {
		if !strings.Contains(log, p+" is built by a buildkitd of its own architecture") || !strings.Contains(log, "["+p+" stage-2 1/1] COPY both /") {
			t.Errorf("the log does not say how %s was built:\n%s", p, log)
		}
	}
	if strings.Contains(log, "emulation") {
		t.Errorf("emulated:\n%s", log)
	}
	// Both can build both, but for steps that run something.
	body := perArch(t, config, "other")
	for i, arch := range []string{"amd64", "arm64"} {
		if n := layersKept(t, list[i]); n == 0 {
			t.Errorf("the daemon of %s built nothing", arch)
		}
	}

	// What has been built is in each daemon's cache.
	mustSend(t, f, body, jsonForm).WantSuccess(t)
	again := mustSend(t, f, body, jsonForm)
	again.WantSuccess(t)
	if _, line := (app{image: ref}).placed(t, f); line["cached_steps"] != 4.0 {
		t.Errorf("%v of %v steps cached", line["cached_steps"], line["steps"])
	}

	// A platform of neither: emulated, beside the others.
	body = request(t, &builder.BuildConfig{Image: ref, Platforms: []string{"linux/amd64", "linux/s390x"}}, "FROM scratch", "COPY Dockerfile /")
	three := mustSend(t, f, body, jsonForm)
	three.WantSuccess(t)
	if log := strings.Join(three.Log, "\n"); !strings.Contains(log, "linux/s390x is built under emulation") {
		t.Errorf("the log does not tell of emulation:\n%s", log)
	}

	// None named: that of the function's machine, wherever the image is placed.
	for range 4 {
		a := apps(s, 1)[0]
		one := mustSend(t, f, request(t, &builder.BuildConfig{Image: a.image}, "FROM busybox", "RUN : "+a.mark), jsonForm)
		one.WantSuccess(t)
		if !slices.Equal(one.Platforms, []string{"linux/amd64"}) {
			t.Errorf("platforms %q", one.Platforms)
		}
	}

	// Without a push there is nothing to join.
	dry := mustSend(t, f, perArch(t, map[string]any{"skipPush": true, "platforms": []string{"linux/amd64", "linux/arm64"}}, "other"), jsonForm)
	dry.WantSuccess(t)
	if dry.Digest != "" || !strings.Contains(fmt.Sprint(dry.Warnings), "only a push") {
		t.Errorf("digest %q, warnings %q", dry.Digest, dry.Warnings)
	}
}

// layersKept counts what the daemon's cache holds.
func layersKept(t *testing.T, b *stack.Buildkitd) int {
	t.Helper()
	c, err := b.Client(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	all, err := c.DiskUsage(testContext(t), buildkit.WithFilter([]string{"type==regular"}))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// byDigest is the push of a part's manifest.
func byDigest(r *http.Request) bool {
	return manifestPut(r) && strings.Contains(r.URL.Path, "/sha256:")
}

// TestRegistryFailsPart: what becomes of the push of a part is what becomes of any
// push.
func TestRegistryFailsPart(t *testing.T) {
	t.Parallel()
	list := mixed(t)
	s := stack.Shared(t)
	for _, tt := range []struct {
		name  string
		fault *fault
		code  string // empty is success
	}{
		{"silent", hang(byDigest), "registry_timeout"},
		{"silent while they are joined", hang(func(r *http.Request) bool {
			return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/manifests/sha256:")
		}), "registry_timeout"},
		{"429 and back", during(3*time.Second, refuse(429, "TOOMANYREQUESTS", anyWrite)), ""},
		{"429 and back for the index", during(3*time.Second, refuse(429, "TOOMANYREQUESTS", func(r *http.Request) bool {
			return manifestPut(r) && !byDigest(r)
		})), ""},
		{"429", refuse(429, "TOOMANYREQUESTS", byDigest), "registry_timeout"},
		{"403", refuse(403, "DENIED", byDigest), "registry_denied"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			env := make(map[string]string)
			if tt.code == "registry_timeout" { // no push that is to succeed, and takes some retries, has this limit
				env["push_timeout"] = "20s"
			}
			_, f := pool(t, list, env)
			proxy := newFaultProxy(t, s.Registry.Addr)
			proxy.set(tt.fault)
			repository := strings.ToLower(mark())
			config := map[string]any{"image": proxy.addr + "/" + repository + ":v1", "platforms": []string{"linux/amd64", "linux/arm64"}}
			got := mustSend(t, f, perArch(t, config, "other"), jsonForm)
			n, since := proxy.broken()
			took := time.Since(since)
			t.Logf("%s %s, %d requests broken, %v from the first to the verdict: %s", got.Status, got.Code, n, took, got.Error)
			if n == 0 {
				t.Error("the fault was never met")
			}
			if took > patience(24*time.Second) {
				t.Errorf("the verdict took %v", took)
			}
			want := ""
			if tt.code == "" {
				got.WantSuccess(t)
				want = got.Digest
			} else {
				got.WantFailed(t, tt.code)
			}
			if d := digest(t, s.Registry.Image(repository+":v1")); d != want {
				t.Errorf("the tag is %q, want %q", d, want)
			}
		})
	}
}

// TestOnePlatformFails: no tag moves.
func TestOnePlatformFails(t *testing.T) {
	t.Parallel()
	list := mixed(t)
	s, f := pool(t, list, nil)
	repository := strings.ToLower(mark())
	ref := s.Registry.Image(repository + ":v1")
	config := map[string]any{"image": ref, "platforms": []string{"linux/amd64", "linux/arm64"}}
	before := mustSend(t, f, perArch(t, config, "other"), jsonForm)
	before.WantSuccess(t)
	mustSend(t, f, perArch(t, config, "absent"), jsonForm).WantFailed(t, "build_failed", "absent")
	mustSend(t, f, perArch(t, config, "absent"), client.SSE).WantFailed(t, "build_failed", "absent")
	if got := digest(t, ref); got != before.Digest {
		t.Errorf("the tag moved from %s to %s", before.Digest, got)
	}
	wantWhole(t, s.Registry.Image(repository))

	// The daemon of one architecture is lost. Its platform is not left to the other:
	// emulation is for those that no daemon has.
	list[1].Kill()
	body := request(t, &builder.BuildConfig{Image: ref, Platforms: []string{"linux/amd64", "linux/arm64"}}, "FROM scratch", "COPY Dockerfile /")
	got := mustSend(t, f, body, jsonForm)
	got.WantFailed(t, "no_daemon")
	if got := digest(t, ref); got != before.Digest {
		t.Errorf("the tag moved from %s to %s", before.Digest, got)
	}
}
