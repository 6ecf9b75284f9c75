package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	maxChildren = 64      // manifests of one image that are read
	maxObjects  = 10_000  // of JSON in one manifest; each takes about 100 bytes of memory
	maxValues   = 100_000 // of JSON in one manifest; each takes about 50 bytes while its list grows
	maxProven   = 20_000  // remembered; each takes about 200 bytes
)

// A registry can tell any digest. The daemon may have the image with this digest from another
// registry, and then does not ask for it again. So somebody who runs a registry, and knows only
// the digest of a private image, could pull that image out of the cache. For this reason a
// registry has to show the manifest itself, once.

// proven are the manifests that registries have shown, under "host/repository@digest platform".
// A digest stays proven, whoever asks: what is under it does not change.
type proven struct {
	mu   sync.Mutex
	seen map[string]bool
}

func (p *proven) has(key string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen[key]
}

func (p *proven) add(key string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.seen) >= maxProven {
		clear(p.seen)
	}
	p.seen[key] = true
}

// prove has the registry show the manifest of a digest, and those below it that are for the
// platform. Nil is every platform.
func (q *question) prove(ctx context.Context, d digest.Digest, platform *ocispecs.Platform) error {
	key := fmt.Sprintf("%s/%s@%s ", serverHost(q.host), reference.Path(q.ref), d)
	if platform != nil {
		key += platforms.FormatAll(platforms.Normalize(*platform))
	}
	if q.grant.creds.proven.has(key) {
		return nil
	}
	left := maxChildren
	if err := q.show(ctx, d, platform, &left); err != nil {
		return err
	}
	q.grant.creds.proven.add(key)
	return nil
}

// show reads the manifest of a digest and those below it. left is how many may be read.
func (q *question) show(ctx context.Context, d digest.Digest, platform *ocispecs.Platform, left *int) error {
	if *left--; *left < 0 {
		return fmt.Errorf("%w: over %d manifests", errAnswer, maxChildren)
	}
	text, err := q.read(ctx, d.String())
	if err != nil {
		return err
	}
	if d.Algorithm().FromBytes(text) != d {
		return fmt.Errorf("%w: a manifest that is not %s", errAnswer, d)
	}
	if bytes.Count(text, []byte{'{'}) > maxObjects {
		return fmt.Errorf("%w: a manifest of over %d objects", errAnswer, maxObjects)
	}
	if bytes.Count(text, []byte{','}) > maxValues {
		return fmt.Errorf("%w: a manifest of over %d values", errAnswer, maxValues)
	}
	var index struct {
		Manifests []struct {
			Digest   digest.Digest      `json:"digest"`
			Platform *ocispecs.Platform `json:"platform"`
		} `json:"manifests"`
	}
	if err := json.Unmarshal(text, &index); err != nil {
		return fmt.Errorf("%w: a manifest that is no JSON", errAnswer)
	}
	text = nil // it would stay in memory while its children are read
	for _, child := range index.Manifests {
		if child.Digest.Validate() != nil {
			return fmt.Errorf("%w: a manifest without a digest", errAnswer)
		}
		if platform != nil && child.Platform != nil && !platforms.Only(*platform).Match(*child.Platform) {
			continue
		}
		if err := q.show(ctx, child.Digest, platform, left); err != nil {
			return err
		}
	}
	return nil
}

// read reads the manifest of a tag or a digest.
func (q *question) read(ctx context.Context, object string) ([]byte, error) {
	resp, err := q.authorized(ctx, http.MethodGet, object)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, &statusError{code: resp.StatusCode}
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxManifest+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxManifest {
		return nil, fmt.Errorf("%w: a manifest over %d bytes", errAnswer, maxManifest)
	}
	return text, nil
}
