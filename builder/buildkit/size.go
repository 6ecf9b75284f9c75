package buildkit

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// sizeTimeout bounds the question for the size of an image. The daemon has the manifests
	// on its disk.
	sizeTimeout = 2 * time.Second
	// maxManifest is the size of the largest manifest that registries take, in bytes.
	maxManifest = 4 << 20
)

// imageSize is the size of the layers and configs of an image that has just been exported, in
// bytes. Layers that several platforms share count once. BuildKit does not report which of them a
// push sends: those that the registry has are not sent again.
func imageSize(ctx context.Context, c *client.Client, resp *client.SolveResponse) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, sizeTimeout)
	defer cancel()
	text, err := base64.StdEncoding.DecodeString(resp.ExporterResponse[exptypes.ExporterImageDescriptorKey])
	if err != nil {
		return 0, fmt.Errorf("reading the image's descriptor: %w", err)
	}
	var root ocispecs.Descriptor
	if err := json.Unmarshal(text, &root); err != nil {
		return 0, fmt.Errorf("reading the image's descriptor: %w", err)
	}
	sizes := make(map[digest.Digest]int64)
	if err := addSizes(ctx, proxy.NewContentStore(c.ContentClient()), root, sizes); err != nil {
		return 0, err
	}
	var sum int64
	for _, n := range sizes {
		sum += n
	}
	return sum, nil
}

// addSizes adds the blobs of a manifest, or of all manifests of an index, to sizes.
func addSizes(ctx context.Context, store content.Provider, of ocispecs.Descriptor, sizes map[digest.Digest]int64) error {
	if of.Size > maxManifest {
		return fmt.Errorf("reading the manifest %s: it has %d bytes", of.Digest, of.Size)
	}
	text, err := content.ReadBlob(ctx, store, of)
	if err != nil {
		return fmt.Errorf("reading the manifest %s: %w", of.Digest, err)
	}
	var m struct {
		Manifests []ocispecs.Descriptor `json:"manifests"`
		Config    ocispecs.Descriptor   `json:"config"`
		Layers    []ocispecs.Descriptor `json:"layers"`
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return fmt.Errorf("reading the manifest %s: %w", of.Digest, err)
	}
	for _, part := range m.Manifests {
		if err := addSizes(ctx, store, part, sizes); err != nil {
			return err
		}
	}
	if m.Config.Digest != "" {
		sizes[m.Config.Digest] = m.Config.Size
	}
	for _, layer := range m.Layers {
		sizes[layer.Digest] = layer.Size
	}
	return nil
}
