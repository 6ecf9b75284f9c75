package content_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"handler/function/tests/stack"
)

// zipped is text that each level makes of another size.
func zipped(mark string) string {
	var b strings.Builder
	for i := range 4000 {
		fmt.Fprintf(&b, "%s line %d of %d: func (s *Server) handle%d(w http.ResponseWriter, r *http.Request) error {\n", mark, i, i*i%977, i*7919%1013)
	}
	return b.String()
}

// blob is what the registry has of one layer.
type blob struct {
	v1.Descriptor
	form string // zstd, or gzip and its level
}

// blobs are the layers of an image, or of a cache, that are not the base's.
func blobs(t *testing.T, ctx context.Context, ref string) (list []blob) {
	t.Helper()
	img := stack.MustPull(t, ctx, ref)
	manifest, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	for _, desc := range manifest.Layers {
		l, err := remote.Layer(r.Context().Digest(desc.Digest.String()), remote.WithContext(ctx))
		if err != nil {
			t.Fatal(err)
		}
		compressed, err := l.Compressed()
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(compressed)
		compressed.Close()
		if err != nil {
			t.Fatal(err)
		}
		if form, large := formOf(t, data); large {
			list = append(list, blob{desc, form})
		}
	}
	return list
}

// formOf compresses what is in a layer as buildkitd does, at the levels that are
// asked for here, and compares. large is what zipped has made.
func formOf(t *testing.T, data []byte) (form string, large bool) {
	t.Helper()
	if bytes.HasPrefix(data, []byte("\x28\xb5\x2f\xfd")) {
		return "zstd", len(data) > 8000
	}
	r, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(plain, []byte(" line 3999 of ")) {
		return "", false
	}
	form = "gzip"
	for _, level := range []int{1, 6} {
		var b bytes.Buffer
		w, err := gzip.NewWriterLevel(&b, level)
		if err != nil {
			t.Fatal(err)
		}
		w.Write(plain)
		w.Close()
		if bytes.Equal(b.Bytes(), data) {
			form += fmt.Sprintf(":%d", level)
		}
	}
	return form, true
}

// TestCompression looks at what is in the registry: the layers of an image, and
// those of a stage that is in the cache alone and in a later image.
func TestCompression(t *testing.T) {
	shared := stack.Shared(t)
	for i, tt := range []struct{ setting, form, media string }{
		{"", "gzip:1", "application/vnd.oci.image.layer.v1.tar+gzip"},
		{"gzip:6", "gzip:6", "application/vnd.oci.image.layer.v1.tar+gzip"},
		{"zstd", "zstd", "application/vnd.oci.image.layer.v1.tar+zstd"},
		{"zstd:9", "zstd", "application/vnd.oci.image.layer.v1.tar+zstd"},
	} {
		t.Run("setting "+tt.setting, func(t *testing.T) {
			cache := shared.Registry.Image(fmt.Sprintf("compression%d-cache", i))
			ctx, s, f := start(t, stack.FunctionConfig{Env: map[string]string{"image_compression": tt.setting, "cache_repository": cache}})
			mark := rand.Text()
			files := []entry{{name: "one", text: zipped(mark)}, {name: "two", text: zipped(mark + "2")}, {name: "three", text: zipped(mark + "3")}}
			dockerfile := func(target string) entry {
				return entry{name: "Dockerfile", text: "FROM busybox AS inner\nCOPY one /one\nRUN cat /one /one >/twice\nFROM busybox AS outer\nCOPY two /two\nRUN --mount=from=inner,target=/inner cat /inner/one >/copy\nFROM " + target + "\nCOPY three /three\n"}
			}
			image := s.Registry.Image(fmt.Sprintf("compression%d:v1", i))
			built := f.MustBuild(t, ctx, body(t, config{"image": image}, nil, append(files, dockerfile("outer"))...))
			check := func(what, ref string, want int) []blob {
				t.Helper()
				list := blobs(t, ctx, ref)
				if len(list) != want {
					t.Errorf("%s: %d layers of ours, want %d: %v", what, len(list), want, list)
				}
				for _, l := range list {
					if l.form != tt.form || string(l.MediaType) != tt.media {
						t.Errorf("%s: a layer of %d bytes is %s, %s, want %s, %s", what, l.Size, l.form, l.MediaType, tt.form, tt.media)
					}
				}
				return list
			}
			first := check("the image", image, 3)
			if m, err := stack.Pull(ctx, image); err != nil {
				t.Fatal(err)
			} else if media, err := m.MediaType(); err != nil || media != "application/vnd.oci.image.manifest.v1+json" {
				t.Errorf("the manifest is %s, %v", media, err)
			}
			repository, err := name.NewRepository(cache)
			if err != nil {
				t.Fatal(err)
			}
			tags, err := remote.List(repository, remote.WithContext(ctx))
			if err != nil || len(tags) != 1 {
				t.Fatalf("the cache has %q, %v", tags, err)
			}
			inner := check("the cache", cache+":"+tags[0], 5)

			// The inner stage's layers are in the next image as they are there.
			f.MustBuild(t, ctx, body(t, config{"image": image}, nil, append(files, dockerfile("inner"))...))
			for _, l := range check("the later image", image, 3)[:2] {
				if !slices.ContainsFunc(inner, func(b blob) bool { return b.Digest == l.Digest }) {
					t.Errorf("%v is not of the cache", l.Digest)
				}
			}

			// buildctl, asked for the same, makes the same layers.
			kind, level, _ := strings.Cut(tt.form, ":")
			if i := strings.IndexByte(tt.setting, ':'); i >= 0 {
				level = tt.setting[i+1:]
			}
			attrs := "compression=" + kind
			if level != "" {
				attrs += ",compression-level=" + level
			}
			dir := stack.Context(t, map[string]string{"Dockerfile": dockerfile("outer").text, "one": files[0].text, "two": files[1].text, "three": files[2].text})
			ref := s.Registry.Image(fmt.Sprintf("compression%d-buildctl:v1", i))
			if out, err := s.Buildkitd.Buildctl(ctx, "build", "--no-cache", "--frontend=dockerfile.v0", "--local=context="+dir, "--local=dockerfile="+dir,
				"--output=type=image,push=true,name="+ref+","+attrs).CombinedOutput(); err != nil {
				t.Fatalf("building with buildctl: %v\n%s", err, out)
			}
			for i, l := range check("buildctl's image", ref, 3) {
				// Their times differ, and so do a few bytes.
				if d := l.Size - first[i].Size; d < -200 || d > 200 {
					t.Errorf("layer %d of %s has %d bytes, and buildctl's %d", i, built.Image, first[i].Size, l.Size)
				}
			}
		})
	}
}

// TestCompressionOfCached: a layer keeps the form that its first build gave it.
func TestCompressionOfCached(t *testing.T) {
	ctx, s, plain := start(t, stack.FunctionConfig{})
	_, _, zstd := start(t, stack.FunctionConfig{Env: map[string]string{"image_compression": "zstd"}})
	image := s.Registry.Image("compression-cached:v1")
	mark := rand.Text()
	request := func(more ...string) []byte {
		text := "FROM busybox\nCOPY one /one\n"
		for _, name := range more {
			text += "COPY " + name + " /" + name + "\n"
		}
		return body(t, config{"image": image}, nil, entry{name: "Dockerfile", text: text}, entry{name: "one", text: zipped(mark)}, entry{name: "two", text: zipped(mark + "2")})
	}
	for _, step := range []struct {
		f    *stack.Function
		more []string
		want []string
	}{
		{plain, nil, []string{"gzip:1"}},
		{zstd, nil, []string{"gzip:1"}},
		{zstd, []string{"two"}, []string{"gzip:1", "zstd"}},
		{plain, []string{"two"}, []string{"gzip:1", "zstd"}},
	} {
		step.f.MustBuild(t, ctx, request(step.more...))
		var got []string
		for _, l := range blobs(t, ctx, image) {
			got = append(got, l.form)
		}
		if !slices.Equal(got, step.want) {
			t.Errorf("the layers are %q, want %q", got, step.want)
		}
	}
}
