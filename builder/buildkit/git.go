package buildkit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/gitutil"

	"handler/function/api"
	"handler/function/buildconfig"
	"handler/function/buildkit/report"
)

// gitSource is the git context of one solve.
type gitSource struct {
	*buildconfig.Git

	// secret is the id of the session's secret with the Authorization header. A RUN step
	// can mount any secret of the session whose id it knows, and it knows GIT_AUTH_TOKEN
	// and the like. So the id is random, and made for one solve.
	secret string

	commit string // that the ref has been resolved to
	err    error  // of resolving or fetching it
}

// state is the source at a ref; an empty ref is the default branch. Submodules are not
// fetched: the repository decides where they come from.
func (g *gitSource) state(ref string, opts ...llb.GitOption) llb.State {
	opts = append(opts, llb.GitSkipSubmodules(), llb.AuthHeaderSecret(g.secret), llb.AuthTokenSecret(""))
	if ref != "" {
		opts = append(opts, llb.GitRef(ref))
	}
	if g.Dir != "" {
		opts = append(opts, llb.GitSubDir(g.Dir))
	}
	return llb.Git(g.Remote(), "", opts...)
}

// building returns the options for attempt.build. build resolves the ref to a commit, and has the
// Dockerfile frontend build this commit.
func (g *gitSource) building(opt client.SolveOpt) (_ client.SolveOpt, build gateway.BuildFunc) {
	attrs := opt.FrontendAttrs
	opt.FrontendAttrs = nil
	var imports []gateway.CacheOptionsEntry
	for _, entry := range opt.CacheImports {
		imports = append(imports, gateway.CacheOptionsEntry{Type: entry.Type, Attrs: entry.Attrs})
	}
	opt.CacheImports = nil
	return opt, func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
		checksum, err := g.checksum(ctx, c)
		if err != nil {
			g.err = err
			return nil, err
		}
		// If the ref moves meanwhile, this fails instead of building something else.
		def, err := g.state(g.Ref, llb.GitChecksum(checksum)).Marshal(ctx)
		if err != nil {
			return nil, err
		}
		res, err := c.Solve(ctx, gateway.SolveRequest{
			Frontend:       "dockerfile.v0",
			FrontendOpt:    attrs,
			CacheImports:   imports,
			FrontendInputs: map[string]*pb.Definition{"context": def.ToPB(), "dockerfile": def.ToPB()},
		})
		if err != nil && g.isFetch(report.Unquoted(err.Error())) {
			g.err = err
		}
		return res, err
	}
}

// isFetch says whether text is about a commit that was resolved and could not be fetched
// (source/git/source.go of BuildKit).
func (g *gitSource) isFetch(text string) bool {
	return strings.Contains(text, "failed to fetch remote "+g.Remote()+": ") || strings.Contains(text, "failed to checkout remote "+g.Remote()+": ")
}

// checksum is the object that the ref names, a commit or an annotated tag. Only a client that
// can read the repository gets it. For a commit, BuildKit does not ask the host: it gives the
// files that another build has fetched to anybody who knows the commit. So the default branch
// is asked for first.
func (g *gitSource) checksum(ctx context.Context, c gateway.Client) (string, error) {
	if gitutil.IsCommitSHA(g.Ref) {
		_, err := g.resolve(ctx, c, "")
		if err != nil && !strings.Contains(err.Error(), "could not find default branch") {
			return "", err
		}
	}
	git, err := g.resolve(ctx, c, g.Ref)
	if err != nil {
		return "", err
	}
	g.commit = cmp.Or(git.CommitChecksum, git.Checksum)
	return git.Checksum, nil
}

func (g *gitSource) resolve(ctx context.Context, c gateway.Client, ref string) (*sourceresolver.ResolveGitResponse, error) {
	def, err := g.state(ref).Marshal(ctx)
	if err != nil {
		return nil, err
	}
	var op pb.Op
	if err := op.Unmarshal(def.Def[0]); err != nil {
		return nil, err
	}
	meta, err := c.ResolveSourceMetadata(ctx, op.GetSource(), sourceresolver.Opt{LogName: "[internal] resolve git context"})
	if err != nil {
		return nil, err
	}
	if meta.Git == nil || meta.Git.Checksum == "" {
		return nil, errors.New("buildkitd resolved no commit")
	}
	return meta.Git, nil
}

// hostTrouble is how git reports a host that may answer later.
var hostTrouble = []string{
	"Could not resolve host", "Failed to connect", "Connection refused", "Connection timed out",
	"Operation timed out", "Connection reset", "returned error: 5", "returned error: 429", "early EOF",
}

// failure says why the ref could not be fetched. git's words may hold the URL, which has no
// credentials.
func (g *gitSource) failure(line func(string) string) *api.Error {
	text := g.err.Error()
	for _, sign := range hostTrouble {
		if strings.Contains(text, sign) {
			return &api.Error{Code: api.ContextFailed, Msg: fmt.Sprintf("the git host %s cannot be reached, or is in trouble", g.Host), Err: g.err}
		}
	}
	ref := "its default branch"
	if g.Ref != "" {
		ref = fmt.Sprintf("%q", g.Ref)
	}
	why := text
	if i := strings.LastIndex(text, "fatal: "); i >= 0 {
		why = text[i+len("fatal: "):]
	}
	why, _, _ = strings.Cut(why, "\n")
	if strings.Contains(why, "could not read Username") || strings.Contains(why, "Authentication failed") {
		why = "the host wants credentials, and the builder has none for it, or wrong ones"
	}
	return &api.Error{Code: api.BadContext, Msg: fmt.Sprintf("fetching %s of %s: %s", ref, g.Remote(), line(why)), Err: g.err}
}
