// Package sources decides what one build may read from elsewhere. buildkitd asks it before it
// reads a source: an image, an address for ADD, a git repository. It knows the rules of a
// tenant, and the forms in which BuildKit writes sources.
//
// A daemon has one cache for all builds, and serves from it without asking anybody. So each build
// asks again, with its own credentials:
//
//   - The function itself asks the registry of an image, which has to tell the digest, and once
//     to show the manifest. Docker Hub is not asked where nobody here may have credentials for
//     it, and no registry is asked for what Config.Unasked matches.
//   - For an address or a git repository, the function has the daemon ask.
package sources

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/distribution/reference"
	gateway "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	sourcepolicy "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/moby/buildkit/sourcepolicy/policysession"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"handler/function/api"
	"handler/function/buildconfig"
	"handler/function/solve"
)

// Asker asks the registry of an image for the image, as package registry's Grant does.
type Asker interface {
	Ask(ctx context.Context, ref reference.Named, named bool, platform *ocispecs.Platform) (digest.Digest, error)
}

// Known says whether the builder's own configuration names a registry, and whether it may have
// credentials for it, as package registry's Credentials do.
type Known interface {
	Names(host string) (bool, error)
	Serves(host string) (bool, error)
}

// Config is the rules of one build.
type Config struct {
	solve.Sources
	Tenant string // its id

	// Git is the build's context, whose host was allowed before. It is nil if the context is
	// sent.
	Git *buildconfig.Git

	// Asker asks with the build's own credentials.
	Asker Asker
	Known Known

	// Unasked are patterns of repositories that only the daemon reaches. The function does
	// not ask for them.
	Unasked []string

	// Cache is the repository of the builder's cache, or empty. Unasked does not count at
	// its host: the daemon may have the builder's credentials there.
	Cache string
}

const (
	maxSources = 10_000 // of one build; a Dockerfile of 1 MiB has fewer
	maxAsking  = 8      // questions of one build at once
)

// Policy decides for one build. It may be used from many goroutines.
type Policy struct {
	cfg    Config
	asking chan struct{} // has a value for each question that is asked now

	mu      sync.Mutex
	images  map[string]*answer      // by reference and platform
	proofs  map[string]*proof       // by fingerprint
	allowed map[string]bool         // fingerprints of sources that are proven
	asked   map[string]*pb.SourceOp // sources by the fingerprint of what the daemon resolves now for each
	denials []*Denial
}

// Denial is a source that the build may not read, or could not be asked for.
type Denial struct {
	Err *api.Error

	// Image is the image that was denied, normalised, with a tag or a digest. Address is the
	// URL of anything else. One of them is empty.
	Image   reference.Named
	Address string
}

// New makes the policy of one build.
func New(cfg Config) *Policy {
	return &Policy{
		cfg:     cfg,
		asking:  make(chan struct{}, maxAsking),
		images:  make(map[string]*answer),
		proofs:  make(map[string]*proof),
		allowed: make(map[string]bool),
		asked:   make(map[string]*pb.SourceOp),
	}
}

// Provider makes the policy a part of a session.
func (p *Policy) Provider() session.Attachable { return policysession.NewPolicyProvider(p.check) }

// Denied returns the denial that a daemon's error is about, or nil. p may be nil.
func (p *Policy) Denied(err error) *Denial {
	if p == nil {
		return nil
	}
	messages := policysession.DenyMessages(err)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, d := range p.denials {
		if slices.ContainsFunc(messages, func(m *policysession.DenyMessage) bool { return m.GetMessage() == d.Err.Msg }) {
			return d
		}
	}
	return nil
}

// resolving is what BuildKit puts before the error of a source that it resolves for a policy.
const resolving = "error resolving source metadata from policy request: "

// Unresolved returns the source of a daemon's error, if the error is about a source that had to
// be resolved. It returns nil if several sources had to be. p may be nil.
func (p *Policy) Unresolved(err error) *Denial {
	if p == nil {
		return nil
	}
	_, why, ok := strings.Cut(err.Error(), resolving)
	p.mu.Lock()
	defer p.mu.Unlock()
	if !ok || len(p.asked) > 1 {
		return nil
	}
	for _, op := range p.asked {
		return &Denial{Err: &api.Error{Code: api.BuildFailed, Msg: address(op) + ": " + why}, Address: op.GetIdentifier()}
	}
	return nil
}

// decision is what to do with a source. One field is set.
type decision struct {
	allow   bool
	convert *pb.SourceOp // to be decided on again
	resolve *pb.SourceOp // to be decided on again when the daemon has resolved it
	deny    *Denial
}

// check is a policysession.PolicyCallback.
func (p *Policy) check(ctx context.Context, req *policysession.CheckPolicyRequest) (*policysession.DecisionResponse, *gateway.ResolveSourceMetaRequest, error) {
	op := req.GetSource().GetSource()
	p.mu.Lock()
	delete(p.asked, fingerprint(op))
	p.mu.Unlock()
	d, err := p.decide(ctx, req.GetSource(), req.GetPlatform())
	if err != nil {
		return nil, nil, err
	}
	switch {
	case d.allow:
		return &policysession.DecisionResponse{Action: sourcepolicy.PolicyAction_ALLOW}, nil, nil
	case d.convert != nil:
		return &policysession.DecisionResponse{Action: sourcepolicy.PolicyAction_CONVERT, Update: d.convert}, nil, nil
	case d.resolve != nil:
		source := op
		if b := p.begun(op); b != nil {
			source = b.op
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.asked[fingerprint(op)] = source
		return nil, &gateway.ResolveSourceMetaRequest{
			Source: d.resolve, Platform: req.GetPlatform(), LogName: "[internal] ask for " + address(d.resolve),
		}, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.denials) < maxSources {
		p.denials = append(p.denials, d.deny)
	}
	return &policysession.DecisionResponse{
		Action:       sourcepolicy.PolicyAction_DENY,
		DenyMessages: []*policysession.DenyMessage{{Message: d.deny.Err.Msg}},
	}, nil, nil
}

// decide decides on a source and what the daemon has resolved of it. What is not known is
// denied. Its error is that of a ctx that has ended.
func (p *Policy) decide(ctx context.Context, source *gateway.ResolveSourceMetaResponse, platform *pb.Platform) (decision, error) {
	op := source.GetSource()
	scheme, rest, _ := strings.Cut(op.GetIdentifier(), "://")
	switch scheme {
	case "local":
		if rest == "context" || rest == "dockerfile" {
			return decision{allow: true}, nil
		}
	case "docker-image":
		return p.image(ctx, op, rest, platform)
	case "http", "https":
		return p.http(op, source.GetHTTP()), nil
	case "git":
		return p.git(op, source.GetGit()), nil
	}
	return forbidden(op, "sources of the form "+fmt.Sprintf("%q", scheme)), nil
}

// forbidden denies a source that is no image. what is in the message.
func forbidden(op *pb.SourceOp, what string) decision {
	return decision{deny: &Denial{
		Err:     &api.Error{Code: api.FromForbidden, Msg: what + " may not be read by this build"},
		Address: op.GetIdentifier(),
	}}
}
