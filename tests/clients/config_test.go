package clients_test

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/google/go-containerregistry/pkg/v1/remote"

	"handler/function/tests/stack"
)

// config is com.openfaas.docker.config.
type config map[string]any

var copyOnly = map[string]string{
	"Dockerfile": "FROM scratch\nCOPY hello.txt /\n",
	"hello.txt":  "hello\n",
}

func TestBuildArgs(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	ref := s.Registry.Image("config:args")
	files := map[string]string{"Dockerfile": `FROM scratch
ARG GIVEN=default
ARG EMPTY=default
ARG ABSENT=default
ARG ODD=default
ARG ADDITIONAL_PACKAGE=default
LABEL given=<$GIVEN> empty=<$EMPTY> absent=<$ABSENT> odd="<$ODD>" package=<$ADDITIONAL_PACKAGE>
`}
	got := f.MustBuild(t, ctx, stack.Body(t, config{"image": ref, "buildArgs": config{
		"GIVEN": "value", "EMPTY": "", "ODD": "a=b, c\"d", "ADDITIONAL_PACKAGE": "",
	}}, files))
	want := map[string]string{"given": "<value>", "empty": "<>", "absent": "<default>", "odd": `<a=b, c"d>`, "package": "<>"}
	if labels := configOf(t, pull(t, ctx, ref, got.Digest)).Labels; !maps.Equal(labels, want) {
		t.Errorf("got %q, want %q", labels, want)
	}
}

// TestNull has null wherever a config takes it: in a build argument the Dockerfile's
// default holds, which an empty value replaces.
func TestNull(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	ref, tag := s.Registry.Image("config:null"), s.Registry.Image("config:null-tag")
	got := f.MustBuild(t, ctx, stack.Body(t, config{
		"image":       ref,
		"buildArgs":   config{"VERSION": nil, "EMPTY": ""},
		"labels":      config{"none": nil, "empty": "", "own": nil},
		"annotations": config{"none": nil, "empty": ""},
		"tags":        []any{nil, tag},
		"platforms":   []any{nil},
		"skipPush":    nil, "target": nil, "dockerfile": nil, "noCache": nil, "pull": nil, "context": nil, "frontend": nil,
	}, map[string]string{"Dockerfile": `FROM busybox
ARG VERSION=1.2.3
ARG EMPTY=full
RUN echo "[$VERSION][$EMPTY]" > /out
LABEL own=dockerfile
`}))
	if len(got.Warnings) > 0 || !slices.Equal(got.Tags, []string{tag}) {
		t.Errorf("got warnings %q and tags %q", got.Warnings, got.Tags)
	}
	img := pull(t, ctx, tag, got.Digest)
	if out := contents(t, img, "")["out"]; out != "[1.2.3][]\n" {
		t.Errorf("the step saw %q", out)
	}
	labels, annotations := configOf(t, img).Labels, manifest(t, img).Annotations
	if _, ok := labels["none"]; ok || labels["own"] != "dockerfile" || !maps.Equal(annotations, map[string]string{"empty": ""}) {
		t.Errorf("labels are %q and annotations %q", labels, annotations)
	}
	if empty, ok := labels["empty"]; !ok || empty != "" {
		t.Errorf("labels are %q", labels)
	}

	ref = s.Registry.Image("config:null-all")
	got = f.MustBuild(t, ctx, stack.Body(t, config{"image": ref, "buildArgs": nil, "labels": nil, "annotations": nil, "tags": nil, "platforms": nil}, copyOnly))
	pull(t, ctx, ref, got.Digest)
}

// TestEncodings builds with configs as editors and shells write them.
func TestEncodings(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	ref := s.Registry.Image("config:encodings")
	text := fmt.Sprintf(`{"image":%q}`, ref)
	got := f.MustBuild(t, ctx, stack.Body(t, []byte("\ufeff"+text), copyOnly))
	pull(t, ctx, ref, got.Digest)
	for name, order := range map[string]binary.AppendByteOrder{"little-endian": binary.LittleEndian, "big-endian": binary.BigEndian} {
		for _, mark := range []string{"\ufeff", ""} {
			var body []byte
			for _, unit := range utf16.Encode([]rune(mark + text)) {
				body = order.AppendUint16(body, unit)
			}
			got := f.MustPost(t, ctx, stack.Body(t, body, copyOnly))
			if got.StatusCode != http.StatusBadRequest || got.Code != "bad_config" || !strings.Contains(got.Error, "UTF-16") {
				t.Errorf("%s after %q: got %v", name, mark, got)
			}
		}
	}
}

func TestPlatforms(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	native := "linux/" + runtime.GOARCH
	foreign := "linux/arm64"
	if native == foreign {
		foreign = "linux/amd64"
	}
	files := map[string]string{
		"Dockerfile": "FROM scratch\nARG TARGETPLATFORM\nLABEL target=$TARGETPLATFORM\nCOPY hello.txt /\n",
		"hello.txt":  "hello\n",
	}
	for _, test := range []struct {
		name      string
		platforms []string
		want      []string
	}{
		{"absent", nil, []string{native}},
		{"none", []string{}, []string{native}},
		{"empty", []string{""}, []string{native}}, // faas-cli publish --platforms ""
		{"one", []string{native}, []string{native}},
		{"foreign", []string{foreign}, []string{foreign}},
		{"two", []string{"linux/amd64", "linux/arm64"}, []string{"linux/amd64", "linux/arm64"}},
		{"twice", []string{native, native}, []string{native}},
	} {
		t.Run(test.name, func(t *testing.T) {
			ref := s.Registry.Image("platforms:" + test.name)
			c := config{"image": ref, "annotations": config{"org.example.of": "platforms"}}
			if test.platforms != nil {
				c["platforms"] = test.platforms
			}
			got := f.MustBuild(t, ctx, stack.Body(t, c, files))
			if !slices.Equal(got.Platforms, test.want) {
				t.Errorf("platforms are %q, want %q", got.Platforms, test.want)
			}
			images := imagesOf(t, ctx, ref, got.Digest)
			if platforms := slices.Sorted(maps.Keys(images)); !slices.Equal(platforms, test.want) {
				t.Errorf("the registry has %q, want %q", platforms, test.want)
			}
			for platform, img := range images {
				if labels := configOf(t, img).Labels; labels["target"] != platform {
					t.Errorf("%s was built for %q", platform, labels["target"])
				}
				if files := contents(t, img, ""); files["hello.txt"] != "hello\n" {
					t.Errorf("%s holds %q", platform, files)
				}
				if m := manifest(t, img); m.Annotations["org.example.of"] != "platforms" {
					t.Errorf("%s has annotations %q", platform, m.Annotations)
				}
			}
		})
	}
}

func TestDefaultPlatform(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{Env: map[string]string{"default_platform": "linux/riscv64"}})
	for _, test := range []struct {
		name, want string
		platforms  []string
	}{
		{"absent", "linux/riscv64", nil},
		{"empty", "linux/riscv64", []string{""}},
		{"given", "linux/s390x", []string{"linux/s390x"}},
	} {
		ref := s.Registry.Image("default-platform:" + test.name)
		got := f.MustBuild(t, ctx, stack.Body(t, config{"image": ref, "platforms": test.platforms}, copyOnly))
		images := imagesOf(t, ctx, ref, got.Digest)
		if len(images) != 1 || images[test.want] == nil || !slices.Equal(got.Platforms, []string{test.want}) {
			t.Errorf("%s: got %q and %v, want %s", test.name, got.Platforms, images, test.want)
		}
	}
}

func TestSkipPush(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	ref, tag := s.Registry.Image("skip-push:image"), s.Registry.Image("skip-push:tag")
	for _, test := range []struct {
		name   string
		config config
		image  string
	}{
		{"with an image", config{"image": ref, "skipPush": true, "tags": []string{tag}}, ref},
		{"without", config{"skipPush": true}, ""},
	} {
		got := f.MustBuild(t, ctx, stack.Body(t, test.config, copyOnly))
		if got.Image != test.image || got.Digest == "" || len(got.Tags) > 0 {
			t.Errorf("%s: got %+v", test.name, got)
		}
	}
	for _, ref := range []string{ref, tag} {
		if _, err := stack.Pull(ctx, ref); !isNotFound(err) {
			t.Errorf("pulling %s: %v, want not found", ref, err)
		}
	}
	// The same request does push without it.
	got := f.MustBuild(t, ctx, stack.Body(t, config{"image": ref}, copyOnly))
	pull(t, ctx, ref, got.Digest)
}

func TestTags(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	// One of another repository, one without a tag, which is latest, and one
	// that is the image itself.
	ref := s.Registry.Image("tags:image")
	tags := []string{s.Registry.Image("tags:second"), s.Registry.Image("other/repository:v1"), s.Registry.Image("tags"), ref}
	got := f.MustBuild(t, ctx, stack.Body(t, config{"image": ref, "tags": tags}, copyOnly))
	if got.Image != ref || !slices.Equal(got.Tags, tags) {
		t.Errorf("got image %q and tags %q", got.Image, got.Tags)
	}
	for _, ref := range append(tags, ref, s.Registry.Image("tags:latest")) {
		pull(t, ctx, ref, got.Digest)
	}
}

func TestTargetAndDockerfile(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	files := map[string]string{
		"Dockerfile":             "FROM scratch AS first\nLABEL at=first\nFROM scratch AS second\nLABEL at=second\nFROM first\nLABEL at=last\n",
		"docker/Prod.Dockerfile": "FROM scratch AS first\nLABEL at=prod-first\nFROM scratch\nLABEL at=prod\nCOPY data /\n",
		// BuildKit looks for one beside the Dockerfile first.
		"docker/Prod.Dockerfile.dockerignore": "data/ignored\n",
		"data/kept":                           "kept\n",
		"data/ignored":                        "ignored\n",
	}
	for at, c := range map[string]config{
		"last":       {},
		"second":     {"target": "second"},
		"prod":       {"dockerfile": "docker/Prod.Dockerfile"},
		"prod-first": {"dockerfile": "./docker/../docker/Prod.Dockerfile", "target": "first"},
	} {
		ref := s.Registry.Image("target:" + at)
		c["image"] = ref
		got := f.MustBuild(t, ctx, stack.Body(t, c, files))
		img := pull(t, ctx, ref, got.Digest)
		if labels := configOf(t, img).Labels; labels["at"] != at {
			t.Errorf("%v built %q, want %q", c, labels["at"], at)
		}
		if got := contents(t, img, ""); at == "prod" && !maps.Equal(got, map[string]string{"kept": "kept\n"}) {
			t.Errorf("the context of docker/Prod.Dockerfile gave %q", got)
		}
	}

	nowhere := stack.Body(t, config{"image": s.Registry.Image("target:none"), "target": "nowhere"}, files)
	if got := f.MustFail(t, ctx, nowhere, "build_failed"); !strings.Contains(got.Error, "nowhere") {
		t.Errorf("a target that is not there: got %+v", got)
	}
}

func TestLabelsAndAnnotations(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	ref := s.Registry.Image("config:labels")
	labels := map[string]string{"com.openfaas.git-sha": "abc", "odd": "a=b, \"c\"\nd", "over": "config", "empty": ""}
	annotations := map[string]string{"org.opencontainers.image.source": "https://example.com/r?a=1,b", "odd": "x=y"}
	c := config{"image": ref, "labels": labels, "annotations": annotations}
	files := map[string]string{"Dockerfile": "FROM scratch\nLABEL own=dockerfile over=dockerfile\n"}

	got := f.MustBuild(t, ctx, stack.Body(t, c, files))
	img := pull(t, ctx, ref, got.Digest)
	want := maps.Clone(labels)
	want["own"] = "dockerfile"
	if got := configOf(t, img).Labels; !maps.Equal(got, want) {
		t.Errorf("labels are %q, want %q", got, want)
	}
	if got := manifest(t, img).Annotations; !maps.Equal(got, annotations) {
		t.Errorf("annotations are %q, want %q", got, annotations)
	}

	c["platforms"] = []string{"linux/amd64", "linux/arm64"}
	got = f.MustBuild(t, ctx, stack.Body(t, c, files))
	for platform, img := range imagesOf(t, ctx, ref, got.Digest) {
		if got := manifest(t, img).Annotations; !maps.Equal(got, annotations) {
			t.Errorf("annotations of %s are %q, want %q", platform, got, annotations)
		}
	}
	index, err := remote.Index(reference(t, ref), remote.WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	if m, err := index.IndexManifest(); err != nil || !maps.Equal(m.Annotations, annotations) {
		t.Errorf("annotations of the index are %v, %v, want %q", m, err, annotations)
	}
}

func TestNoCache(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	ref := s.Registry.Image("config:no-cache")
	files := map[string]string{"Dockerfile": "FROM busybox\nRUN cat /proc/sys/kernel/random/uuid > /id\n"}
	build := func(noCache bool) (id string, cached bool) {
		got := f.MustBuild(t, ctx, stack.Body(t, config{"image": ref, "noCache": noCache}, files))
		cached = slices.ContainsFunc(got.Log, func(line string) bool {
			return strings.Contains(line, "RUN cat") && strings.HasSuffix(line, " CACHED")
		})
		return contents(t, pull(t, ctx, ref, got.Digest), "")["id"], cached
	}
	first, _ := build(false)
	second, cached := build(false)
	if second != first || !cached {
		t.Errorf("without noCache the step ran again: cached is %v", cached)
	}
	if third, cached := build(true); third == first || cached {
		t.Errorf("with noCache the step did not run again: cached is %v", cached)
	}
}

func TestIgnoredKeys(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	ref := s.Registry.Image("config:ignored")
	got := f.MustBuild(t, ctx, stack.Body(t, config{
		"image": ref, "frontend": "dockerfile.v0", "squash": true, "extraTags": []int{1}, "buildArgs": config{},
	}, copyOnly))
	pull(t, ctx, ref, got.Digest)
	if err := within(strings.Join(got.Warnings, "\n"), `"squash"`, `"extraTags"`); err != nil {
		t.Error(err)
	}
	if strings.Contains(strings.Join(got.Warnings, "\n"), "buildArgs") {
		t.Errorf("warnings of a known key: %q", got.Warnings)
	}
}

// TestImageNames pushes to names that are normalised on the way and told as they
// were sent.
func TestImageNames(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	_, port, _ := strings.Cut(s.Registry.Addr, ":")
	for sent, ref := range map[string]string{
		s.Registry.Image("names"):            s.Registry.Image("names:latest"),
		s.Registry.Image("a/b/c/d:V1.2_x-y"): s.Registry.Image("a/b/c/d:V1.2_x-y"),
		"localhost:" + port + "/names:host":  s.Registry.Image("names:host"),
	} {
		got := f.MustBuild(t, ctx, stack.Body(t, config{"image": sent}, copyOnly))
		if got.Image != sent {
			t.Errorf("the answer names %q, want %q as it was sent", got.Image, sent)
		}
		pull(t, ctx, ref, got.Digest)
	}
}

func TestBadConfig(t *testing.T) {
	ctx, _, f := start(t, stack.FunctionConfig{})
	for name, test := range map[string]struct {
		config any
		want   string // in the error
	}{
		"no image":          {config{}, `"image"`},
		"image with digest": {config{"image": "a/b@sha256:" + strings.Repeat("0", 64)}, "digest"},
		"image in capitals": {config{"image": "Example/App"}, `"Example/App"`},
		"image type":        {config{"image": 1}, `"image"`},
		"tag":               {config{"image": "a/b", "tags": []string{"not a tag"}}, `"not a tag"`},
		"tags type":         {config{"image": "a/b", "tags": "x"}, `"tags"`},
		"platform":          {config{"image": "a/b", "platforms": []string{"linux/amd64/v1/extra/more"}}, `"platforms"`},
		"platforms type":    {config{"image": "a/b", "platforms": "linux/amd64"}, `"platforms"`},
		"build arg":         {config{"image": "a/b", "buildArgs": config{"BUILDKIT_SYNTAX": "x"}}, "BUILDKIT_SYNTAX"},
		"build args type":   {config{"image": "a/b", "buildArgs": config{"A": 1}}, `"buildArgs.A"`},
		"build args list":   {config{"image": "a/b", "buildArgs": []string{"A=1"}}, `"buildArgs"`},
		"one tag's type":    {config{"image": "a/b", "tags": []any{"a/b:c", nil, 3}}, `"tags[2]"`},
		"platform type":     {config{"image": "a/b", "platforms": []any{config{"os": "linux"}}}, `"platforms[0]"`},
		"git type":          {config{"image": "a/b", "context": config{"git": true}}, `"context.git"`},
		"annotation type":   {config{"image": "a/b", "annotations": config{"a": "b", "c.d": []string{}}}, `"annotations.c.d"`},
		"skipPush type":     {config{"image": "a/b", "skipPush": "true"}, `"skipPush"`},
		"dockerfile":        {config{"image": "a/b", "dockerfile": "../Dockerfile"}, `"dockerfile"`},
		"target type":       {config{"image": "a/b", "target": []string{}}, `"target"`},
		"labels type":       {config{"image": "a/b", "labels": config{"a": nil, "b": 2}}, `"labels.b"`},
		"annotations type":  {config{"image": "a/b", "annotations": "x"}, `"annotations"`},
		"noCache type":      {config{"image": "a/b", "noCache": 1}, `"noCache"`},
		"pull type":         {config{"image": "a/b", "pull": "yes"}, `"pull"`},
		"not an object":     {[]byte(`["image"]`), "object"},
		"not JSON":          {[]byte(`image: a/b`), "com.openfaas.docker.config"},
		"cut short":         {[]byte(`{"image":"a/b"`), "too early"},
		"key twice":         {[]byte(`{"image":"a/b","image":"c/d"}`), `"image"`},
	} {
		t.Run(name, func(t *testing.T) {
			got := f.MustPost(t, ctx, stack.Body(t, test.config, copyOnly))
			if got.StatusCode != http.StatusBadRequest || got.Code != "bad_config" || !strings.Contains(got.Error, test.want) {
				t.Errorf("got %v; want HTTP 400, bad_config and %s", got, test.want)
			}
		})
	}
}
