package clients_test

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"handler/function/tests/stack"
)

func reference(t *testing.T, ref string) name.Reference {
	t.Helper()
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// imagesOf returns the images that a reference names, by platform. A reference names an
// index of images, or one image. An index must have no attestations.
func imagesOf(t *testing.T, ctx context.Context, ref, digest string) map[string]v1.Image {
	t.Helper()
	desc, err := remote.Get(reference(t, ref), remote.WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	if desc.Digest.String() != digest {
		t.Errorf("%s has digest %s, but the answer said %q", ref, desc.Digest, digest)
	}
	var images []v1.Image
	if desc.MediaType.IsIndex() {
		index, err := desc.ImageIndex()
		if err != nil {
			t.Fatal(err)
		}
		m, err := index.IndexManifest()
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range m.Manifests {
			img, err := index.Image(d.Digest)
			if err != nil {
				t.Fatal(err)
			}
			images = append(images, img)
		}
	} else {
		img, err := desc.Image()
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, img)
	}
	byPlatform := map[string]v1.Image{}
	for _, img := range images {
		file, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		byPlatform[file.Platform().String()] = img
	}
	if len(byPlatform) != len(images) {
		t.Errorf("%s has %d images of %d platforms", ref, len(images), len(byPlatform))
	}
	return byPlatform
}

func manifest(t *testing.T, img v1.Image) *v1.Manifest {
	t.Helper()
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func isNotFound(err error) bool {
	var e *transport.Error
	return errors.As(err, &e) && e.StatusCode == http.StatusNotFound
}

// pull returns an image and compares its digest with that of the answer.
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
