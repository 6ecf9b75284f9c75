package sources

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/solver/pb"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"handler/function/api"
	"handler/function/hosts"
	"handler/function/registry"
	"handler/function/repository"
)

// maxPlatform is how long the name of a platform in FROM --platform may be, in bytes. The config's
// platforms have the same limit.
const maxPlatform = 255

// image decides on docker-image://rest for a platform, which may be nil.
func (p *Policy) image(ctx context.Context, op *pb.SourceOp, rest string, platform *pb.Platform) (decision, error) {
	ref, err := reference.ParseNormalizedNamed(rest)
	if err != nil {
		return forbidden(op, "an image that cannot be read as one"), nil
	}
	// The port 0443 is 443 on the network, and would be another host to the rules below.
	if _, err := hosts.Parse(reference.Domain(ref)); err != nil {
		return forbidden(op, fmt.Sprintf("an image at the host %q", reference.Domain(ref))), nil
	}
	// A Dockerfile can name any platform, and what is known of an image is kept by its platform.
	if platform != nil && len(platforms.FormatAll(platform.Spec())) > maxPlatform {
		return forbidden(op, fmt.Sprintf("an image for a platform whose name has over %d bytes", maxPlatform)), nil
	}
	ref = reference.TagNameOnly(ref)
	if !p.mayPull(ref.Name()) {
		// These words do not tell the builder's own repositories from images of other tenants.
		// Without From, a build can see that one of the two is there.
		return denied(ref, &api.Error{Code: api.FromForbidden, Msg: fmt.Sprintf("image %q may not be pulled by this build", reference.FamiliarString(ref))}), nil
	}
	asks, named, err := p.asks(ref)
	if err != nil {
		return denied(ref, api.AsError(err)), nil
	}
	if !asks {
		return decision{allow: true}, nil
	}
	told, err := p.ask(ctx, ref, named, platformOf(platform))
	if err != nil {
		if e, ok := errors.AsType[*api.Error](err); ok {
			return denied(ref, e), nil
		}
		return decision{}, err
	}
	if _, ok := ref.(reference.Digested); ok {
		return decision{allow: true}, nil
	}
	// For a tag, the daemon would ask the registry itself. Of the builds that ask at one
	// moment, it would use the credentials of one, and give all of them the answer.
	pinned, err := reference.WithDigest(ref, told)
	if err != nil {
		return denied(ref, api.AsError(err)), nil
	}
	return decision{convert: &pb.SourceOp{Identifier: "docker-image://" + pinned.String(), Attrs: op.GetAttrs()}}, nil
}

func denied(ref reference.Named, err *api.Error) decision {
	return decision{deny: &Denial{Err: err, Image: ref}}
}

// mayPull says whether the rules allow a repository, whatever its registry says.
func (p *Policy) mayPull(name string) bool {
	for _, own := range p.cfg.Own {
		if repository.MayBeWithin(name, own) {
			return false
		}
	}
	if slices.ContainsFunc(p.cfg.Images, func(prefix string) bool { return repository.Within(name, prefix) }) {
		return true
	}
	if p.cfg.From != nil {
		return slices.ContainsFunc(p.cfg.From, func(pattern string) bool { return repository.Match(name, pattern) })
	}
	return p.cfg.Others == nil || !p.cfg.Others(name)
}

// asks says whether the registry is asked for an image, and whether the operator has named it, so
// that it may have a private address.
//
// Docker Hub is asked if somebody here may have credentials for it. Any other registry may be a
// tenant's own, also one that the tenant pushes to. It could tell the digest of somebody else's
// private image that the daemon has. So any other registry is always asked, and has to show the
// manifest.
func (p *Policy) asks(ref reference.Named) (asks, named bool, err error) {
	name, host := ref.Name(), reference.Domain(ref)
	atCache := p.cfg.Cache != "" && repository.Host(name) == repository.Host(p.cfg.Cache)
	if !atCache && slices.ContainsFunc(p.cfg.Unasked, func(pattern string) bool { return repository.Match(name, pattern) }) {
		return false, false, nil
	}
	if named, err = p.cfg.Known.Names(host); err != nil {
		return false, false, err
	}
	named = named || registry.Covers(p.cfg.Asked, host) || p.names(host)
	if repository.Host(name) != repository.Hub {
		return true, named, nil
	}
	serves, err := p.cfg.Known.Serves(host)
	return serves || registry.MayServe(p.cfg.Asked, host), named, err
}

// names says whether the operator has written a host into the tenant's images or from.
func (p *Policy) names(host string) bool {
	is := func(text string) bool { return repository.Host(text) == repository.Host(host) }
	return slices.ContainsFunc(p.cfg.Images, is) || slices.ContainsFunc(p.cfg.From, is)
}

func platformOf(p *pb.Platform) *ocispecs.Platform {
	if p == nil {
		return nil
	}
	spec := platforms.Normalize(p.Spec())
	return &spec
}

// answer is what a registry says about one reference. It holds for the build.
type answer struct {
	turn chan struct{} // has room for whoever asks, and for whoever reads the answer

	known bool
	told  digest.Digest
	err   error // an *api.Error, or nil
}

// ask asks for an image once in the build. An answer about a tag counts for the digest in the
// answer too. Its error is an *api.Error, or that of a ctx that has ended.
func (p *Policy) ask(ctx context.Context, ref reference.Named, named bool, platform *ocispecs.Platform) (digest.Digest, error) {
	name := ref.Name()
	if platform != nil {
		name = platforms.FormatAll(*platform) + " " + name
	}
	key := name
	if d, ok := ref.(reference.Digested); ok {
		key += "@" + d.Digest().String() // a tag beside a digest means nothing
	} else if t, ok := ref.(reference.Tagged); ok {
		key += ":" + t.Tag()
	}
	a, err := p.answerTo(key)
	if err != nil {
		return "", err
	}
	for _, turn := range []chan struct{}{a.turn, p.asking} {
		select {
		case turn <- struct{}{}:
			defer func() { <-turn }()
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
		if turn == a.turn && a.known {
			return a.told, a.err
		}
	}
	told, err := p.cfg.Asker.Ask(ctx, ref, named, platform)
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	a.known, a.told, a.err = true, told, err
	if err == nil {
		p.learn(name+"@"+told.String(), told)
	}
	return told, err
}

// answerTo returns the answer under a key, which may not be known yet.
func (p *Policy) answerTo(key string) (*answer, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := p.images[key]
	if a == nil {
		if len(p.images) >= 2*maxSources {
			return nil, errTooMany
		}
		a = &answer{turn: make(chan struct{}, 1)}
		p.images[key] = a
	}
	return a, nil
}

// learn makes the answer under a key known, if nobody asks for it now.
func (p *Policy) learn(key string, told digest.Digest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.images[key] == nil {
		p.images[key] = &answer{turn: make(chan struct{}, 1), known: true, told: told}
	}
}

var errTooMany = &api.Error{Code: api.BuildFailed, Msg: fmt.Sprintf("a build may read at most %d sources", maxSources)}
