package owned

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"

	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sync/errgroup"
)

// asksAtOnce is how many manifests Remove asks for at a time. A repository for many tenants has
// thousands of tags.
const asksAtOnce = 8

// Remove removes the tags that match, and their manifests. A manifest that has another tag too
// stays, with that tag. removed are the tags that are gone. left is what is still there: a tag
// or, if only its manifest is left, a digest. err is the reason for the first of left.
//
// A repository that does not exist has nothing to remove.
func (r *Repository) Remove(ctx context.Context, match func(tag string) bool) (removed, left []string, err error) {
	opts, done, err := r.Options(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer done()
	tags, err := remote.List(r.Repository, opts...)
	if err != nil && !IsMissing(err) {
		return nil, nil, fmt.Errorf("listing tags: %w", err)
	}
	var own, others []string
	for _, t := range tags {
		if match(t) {
			own = append(own, t)
		} else {
			others = append(others, t)
		}
	}
	if len(own) == 0 {
		return nil, nil, nil
	}
	digests, err := r.digests(tags, opts)
	if err != nil {
		return nil, own, err
	}
	shared := make(map[string]bool)
	for _, t := range others {
		shared[digests[t]] = true
	}
	var first error
	for i, t := range own {
		rest, err := r.remove(t, digests[t], shared[digests[t]], opts)
		if err == nil {
			removed = append(removed, t)
			continue
		}
		left = append(left, rest)
		if first == nil {
			first = fmt.Errorf("removing %s: %w", t, err)
		}
		// A registry that removes no tag has not removed this one, nor will it the next.
		if errors.Is(err, ErrNoDeletion) && rest == t || ctx.Err() != nil {
			left = append(left, own[i+1:]...)
			break
		}
	}
	return removed, left, first
}

// digests returns the digest of each tag's manifest. A tag that is gone has none.
func (r *Repository) digests(tags []string, opts []remote.Option) (map[string]string, error) {
	var mu sync.Mutex
	found := make(map[string]string)
	var asks errgroup.Group
	asks.SetLimit(asksAtOnce)
	for _, t := range tags {
		asks.Go(func() error {
			desc, err := remote.Head(r.Tag(t), opts...)
			if IsMissing(err) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("asking for %s: %w", t, err)
			}
			mu.Lock()
			defer mu.Unlock()
			found[t] = desc.Digest.String()
			return nil
		})
	}
	if err := asks.Wait(); err != nil {
		return nil, err
	}
	return found, nil
}

// remove removes a tag, and then its manifest unless another tag shares it. Some registries
// delete no manifest that has a tag. Others delete a tag only with its manifest. If err is not
// nil, rest is what is still there.
func (r *Repository) remove(tag, digest string, shared bool, opts []remote.Option) (rest string, err error) {
	if digest == "" {
		return "", nil
	}
	untagged := Delete(r.Tag(tag), opts)
	if shared && isUnsupported(untagged) {
		return tag, fmt.Errorf("its manifest has another tag, and the registry does not remove a tag alone: %v", untagged)
	}
	if shared {
		return tag, untagged
	}
	if untagged != nil && !isUnsupported(untagged) {
		return tag, untagged
	}
	if err := Delete(r.Digest(digest), opts); err != nil {
		if untagged == nil {
			return digest, err
		}
		return tag, err
	}
	return "", nil
}

// isUnsupported says whether a registry has answered that it deletes no tags: distribution-spec
// has 400 and 405 for it, and some have 501.
func isUnsupported(err error) bool {
	switch StatusOf(err) {
	case http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusNotImplemented:
		return true
	}
	return false
}
