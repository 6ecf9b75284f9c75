package sources

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	gateway "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/gitutil"

	"handler/function/api"
	"handler/function/buildconfig"
	"handler/function/redact"
)

// A build that names a digest or a commit has not proven that it may read it: both are public,
// and the daemon gives out what its cache has under them without asking anybody. A request by
// the daemon proves nothing either: the daemon makes one request of two equal ones that come at
// the same moment. So:
//
//   - A URL is read in this build's own session, without its checksum, and then pinned to the
//     checksum of what came.
//   - A repository has a place in the cache for each tenant: no tenant gets the commits that
//     another one has fetched. But the daemon keeps one copy of each repository, for all who
//     know its URL. So for a commit, the daemon resolves the default branch first, which only
//     a build that may read the repository can have resolved.

// proofAttr marks a probe: the source that the daemon resolves in place of the one to be
// proven. Its value is the fingerprint of the source to be proven. BuildKit ignores attributes
// that it does not know.
const proofAttr = "builder.proof"

// proof has a source to be proven, op, and the source that is resolved in its place, probe.
type proof struct {
	op, probe *pb.SourceOp
}

// fingerprint is equal for equal sources, and for no others.
func fingerprint(op *pb.SourceOp) string {
	// The keys of a map are sorted. Strings and maps of them cannot fail.
	text, _ := json.Marshal([]any{op.GetIdentifier(), op.GetAttrs()})
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// with returns a copy of op with attributes set, and without others.
func with(op *pb.SourceOp, set map[string]string, without ...string) *pb.SourceOp {
	attrs := maps.Clone(op.GetAttrs())
	if attrs == nil {
		attrs = make(map[string]string)
	}
	maps.Copy(attrs, set)
	for _, key := range without {
		delete(attrs, key)
	}
	return &pb.SourceOp{Identifier: op.GetIdentifier(), Attrs: attrs}
}

// allow notes that a source is proven: it passes when the daemon asks about it again.
func (p *Policy) allow(op *pb.SourceOp) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.allowed[fingerprint(op)] = true
}

func (p *Policy) isAllowed(op *pb.SourceOp) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.allowed[fingerprint(op)]
}

// begin begins the proof of op: the daemon resolves probe in its place.
func (p *Policy) begin(op, probe *pb.SourceOp) decision {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := fingerprint(op)
	if p.proofs[key] == nil {
		if len(p.proofs) >= maxSources {
			return tooMany(op)
		}
		p.proofs[key] = &proof{op: op, probe: with(probe, map[string]string{proofAttr: key})}
	}
	return decision{convert: p.proofs[key].probe}
}

func tooMany(op *pb.SourceOp) decision {
	return decision{deny: &Denial{Err: errTooMany, Address: op.GetIdentifier()}}
}

// begun returns the proof that op is the probe of, or nil. The attribute alone proves nothing:
// a frontend may have written it.
func (p *Policy) begun(op *pb.SourceOp) *proof {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.proofs[op.GetAttrs()[proofAttr]]
	if b == nil || fingerprint(b.probe) != fingerprint(op) {
		return nil
	}
	return b
}

// http decides on http:// and https://. meta is set when the daemon has read it.
func (p *Policy) http(op *pb.SourceOp, meta *gateway.ResolveSourceHTTPResponse) decision {
	if !p.allowsHost(op.GetIdentifier()) {
		return forbidden(op, "an address at "+address(op))
	}
	if p.isAllowed(op) {
		return decision{allow: true}
	}
	b := p.begun(op)
	if b == nil {
		// A signature is checked when the source itself is read.
		return p.begin(op, with(op, nil, pb.AttrHTTPChecksum, pb.AttrHTTPSignatureVerify, pb.AttrHTTPSignatureVerifyPubKey))
	}
	if meta == nil {
		return decision{resolve: op}
	}
	if want := b.op.GetAttrs()[pb.AttrHTTPChecksum]; want != "" && want != meta.GetChecksum() {
		return decision{deny: &Denial{
			Err:     &api.Error{Code: api.BuildFailed, Msg: fmt.Sprintf("an address at %s has the checksum %s, and ADD wants %s", address(op), meta.GetChecksum(), want)},
			Address: op.GetIdentifier(),
		}}
	}
	pinned := with(b.op, map[string]string{pb.AttrHTTPChecksum: meta.GetChecksum()})
	p.allow(pinned)
	return decision{convert: pinned}
}

// git decides on git://. meta is set when the daemon has resolved it.
func (p *Policy) git(op *pb.SourceOp, meta *gateway.ResolveSourceGitResponse) decision {
	attrs := op.GetAttrs()
	repo, ref := gitParts(op)
	if !p.isContext(repo) && !p.allowsHost(repo) || attrs[pb.AttrGitBundle] != "" || attrs[pb.AttrGitMTime] == "commit" {
		return forbidden(op, "a git repository at "+address(op))
	}
	if b := p.begun(op); b != nil {
		if meta == nil {
			return decision{resolve: op}
		}
		p.allow(b.op)
		return decision{convert: b.op}
	}
	// BuildKit takes every value of git.mtime but "commit" for the default, and has the value
	// in its cache key. Submodules are skipped: the repository says where they come from, and
	// everybody who may read the repository would get them from the cache.
	if own := "tenant " + p.cfg.Tenant; attrs[pb.AttrGitMTime] != own || attrs[pb.AttrGitSkipSubmodules] != "true" {
		return decision{convert: with(op, map[string]string{pb.AttrGitMTime: own, pb.AttrGitSkipSubmodules: "true"})}
	}
	byCommit := gitutil.IsCommitSHA(ref) || attrs[pb.AttrGitFetchByCommit] == "true"
	if !byCommit || p.isAllowed(op) {
		return decision{allow: true}
	}
	probe := with(op, nil, pb.AttrGitChecksum, pb.AttrGitFetchByCommit)
	probe.Identifier, _, _ = strings.Cut(op.GetIdentifier(), "#")
	return p.begin(op, probe)
}

// gitParts returns the URL of a git source's repository, and its ref.
func gitParts(op *pb.SourceOp) (repo, ref string) {
	identifier, fragment, _ := strings.Cut(strings.TrimPrefix(op.GetIdentifier(), "git://"), "#")
	ref, _, _ = strings.Cut(fragment, ":")
	if full := op.GetAttrs()[pb.AttrFullRemoteURL]; full != "" {
		repo, _, _ = strings.Cut(full, "#")
		return repo, ref
	}
	if !gitutil.IsGitTransport(identifier) {
		identifier = "https://" + identifier
	}
	return identifier, ref
}

// isContext says whether a repository is the build's own context.
func (p *Policy) isContext(repo string) bool { return p.cfg.Git != nil && repo == p.cfg.Git.Remote() }

// allowsHost says whether ADD may read from a URL's host.
func (p *Policy) allowsHost(text string) bool {
	origin := origin(text)
	scheme, host, err := buildconfig.ContextHost(origin)
	return origin != "" && err == nil && slices.ContainsFunc(p.cfg.Hosts, func(entry string) bool {
		s, h, err := buildconfig.ContextHost(entry)
		return err == nil && s == scheme && h == host
	})
}

// origin is the scheme and the host of a URL of http or https, and empty for any other text.
func origin(text string) string {
	u, err := gitutil.ParseURL(text)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" {
		return ""
	}
	return u.Scheme + "://" + u.Host
}

// address is how messages write the place of a source: the path and the query of a URL may be
// secret.
func address(op *pb.SourceOp) string {
	text := op.GetIdentifier()
	if strings.HasPrefix(text, "git://") {
		text, _ = gitParts(op)
	}
	if o := origin(text); o != "" {
		return o
	}
	return fmt.Sprintf("%q", redact.URLs(text))
}
