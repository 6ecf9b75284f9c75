package buildkit

import (
	"bytes"
	"encoding/json"
	"maps"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/moby/buildkit/util/contentutil"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestSizes adds up the blobs of an index of two images that share a layer.
func TestSizes(t *testing.T) {
	store := contentutil.NewBuffer()
	put := func(v any) ocispecs.Descriptor {
		t.Helper()
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		desc := ocispecs.Descriptor{Digest: digest.FromBytes(text), Size: int64(len(text))}
		if err := content.WriteBlob(t.Context(), store, desc.Digest.String(), bytes.NewReader(text), desc); err != nil {
			t.Fatal(err)
		}
		return desc
	}
	blob := func(name string, size int64) ocispecs.Descriptor {
		return ocispecs.Descriptor{Digest: digest.FromString(name), Size: size}
	}
	shared := blob("shared", 1000)
	one := put(ocispecs.Manifest{Config: blob("config 1", 1), Layers: []ocispecs.Descriptor{shared, blob("layer 1", 20)}})
	two := put(ocispecs.Manifest{Config: blob("config 2", 2), Layers: []ocispecs.Descriptor{shared, blob("layer 2", 40)}})
	index := put(ocispecs.Index{Manifests: []ocispecs.Descriptor{one, two}})
	for _, tt := range []struct {
		name string
		of   ocispecs.Descriptor
		want int64
	}{{"an image", one, 1021}, {"an index", index, 1063}} {
		sizes := make(map[digest.Digest]int64)
		if err := addSizes(t.Context(), store, tt.of, sizes); err != nil {
			t.Fatal(err)
		}
		var sum int64
		for n := range maps.Values(sizes) {
			sum += n
		}
		if sum != tt.want {
			t.Errorf("%s: %d bytes, want %d", tt.name, sum, tt.want)
		}
	}
	large := one
	large.Size = maxManifest + 1
	for name, of := range map[string]ocispecs.Descriptor{"too large": large, "not there": blob("x", 1), "no manifest": put("text")} {
		if err := addSizes(t.Context(), store, of, make(map[digest.Digest]int64)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
