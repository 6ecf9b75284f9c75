package buildkit

import (
	"maps"
	"testing"

	"github.com/distribution/reference"
)

func TestParseCompression(t *testing.T) {
	for text, want := range map[string]Compression{
		"gzip": {"gzip", 1}, "gzip:1": {"gzip", 1}, "gzip:6": {"gzip", 6}, "gzip:9": {"gzip", 9},
		"zstd": {"zstd", 0}, "zstd:1": {"zstd", 1}, "zstd:22": {"zstd", 22},
	} {
		if got, err := ParseCompression(text); err != nil || got != want {
			t.Errorf("%q: got %+v, %v, want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "GZIP", "estargz", "uncompressed", "gzip:", "gzip:0", "gzip:10", "gzip:-1", "gzip:6:6", "gzip 6", "zstd:0", "zstd:23", "zstd:fast", ":6"} {
		if got, err := ParseCompression(text); err == nil || got != (Compression{}) {
			t.Errorf("%q: got %+v, %v", text, got, err)
		}
	}
}

// TestCompressionAttributes: the image and the cache get the same, and nothing is
// forced on what is there.
func TestCompressionAttributes(t *testing.T) {
	repository, err := reference.ParseNormalizedNamed("r:5000/cache")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		compression Compression
		want        map[string]string
	}{
		{Compression{}, map[string]string{}},
		{Compression{"gzip", 1}, map[string]string{"compression": "gzip", "compression-level": "1"}},
		{Compression{"zstd", 0}, map[string]string{"compression": "zstd", "oci-mediatypes": "true"}},
		{Compression{"zstd", 9}, map[string]string{"compression": "zstd", "compression-level": "9", "oci-mediatypes": "true"}},
	} {
		p := mustPlan(t, mustNew(t, Config{Compression: tt.compression, CacheRepository: repository}), `{"image":"acme/app:1","annotations":{"compression":"zstd"}}`, sample)
		opt := p.solveOpt("ref", newAuthServer(nil))
		image := maps.Clone(tt.want)
		maps.Copy(image, map[string]string{"name": "docker.io/acme/app:1", "push": "true", "annotation.compression": "zstd"})
		if got := opt.Exports[0].Attrs; !maps.Equal(got, image) {
			t.Errorf("%+v: the image gets %v, want %v", tt.compression, got, image)
		}
		cache := maps.Clone(tt.want)
		maps.Copy(cache, map[string]string{"ref": "r:5000/cache:key", "mode": "max", "image-manifest": "true", "oci-mediatypes": "true", "ignore-error": "true"})
		if got := opt.CacheExports[0].Attrs; !maps.Equal(got, cache) {
			t.Errorf("%+v: the cache gets %v, want %v", tt.compression, got, cache)
		}
	}
}
