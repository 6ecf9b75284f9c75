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

	"handler/function/api"
	"handler/function/buildconfig"
)

// gitSource is a git context on its way into one solve.
type gitSource struct {
	*buildconfig.Git

	// secret is the id of the session's secret with the Authorization header. It
	// is made for one solve: a RUN step can mount any secret of the session whose
	// id it knows, and it knows GIT_AUTH_TOKEN and the like.
	secret string

	commit string // that the ref has been resolved to
	err    error  // of resolving it
}

// state fetches no submodules: they come from wherever the repository says.
func (g *gitSource) state(opts ...llb.GitOption) llb.State {
	opts = append(opts, llb.GitSkipSubmodules(), llb.AuthHeaderSecret(g.secret), llb.AuthTokenSecret(""))
	if g.Ref != "" {
		opts = append(opts, llb.GitRef(g.Ref))
	}
	if g.Dir != "" {
		opts = append(opts, llb.GitSubDir(g.Dir))
	}
	return llb.Git(g.Remote(), "", opts...)
}

// solve resolves the ref to a commit, and has the Dockerfile frontend build that.
func (g *gitSource) solve(ctx context.Context, c *client.Client, opt client.SolveOpt, status chan *client.SolveStatus) (*client.SolveResponse, error) {
	attrs := opt.FrontendAttrs
	opt.FrontendAttrs = nil
	var imports []gateway.CacheOptionsEntry
	for _, entry := range opt.CacheImports {
		imports = append(imports, gateway.CacheOptionsEntry{Type: entry.Type, Attrs: entry.Attrs})
	}
	opt.CacheImports = nil
	return c.Build(ctx, opt, "", func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
		checksum, err := g.resolve(ctx, c)
		if err != nil {
			g.err = err
			return nil, err
		}
		// Should the ref move meanwhile, this fails instead of building something
		// else.
		def, err := g.state(llb.GitChecksum(checksum)).Marshal(ctx)
		if err != nil {
			return nil, err
		}
		return c.Solve(ctx, gateway.SolveRequest{
			Frontend:       "dockerfile.v0",
			FrontendOpt:    attrs,
			CacheImports:   imports,
			FrontendInputs: map[string]*pb.Definition{"context": def.ToPB(), "dockerfile": def.ToPB()},
		})
	}, status)
}

// resolve returns what the ref names, a commit or an annotated tag.
func (g *gitSource) resolve(ctx context.Context, c gateway.Client) (string, error) {
	def, err := g.state().Marshal(ctx)
	if err != nil {
		return "", err
	}
	var op pb.Op
	if err := op.Unmarshal(def.Def[0]); err != nil {
		return "", err
	}
	meta, err := c.ResolveSourceMetadata(ctx, op.GetSource(), sourceresolver.Opt{LogName: "[internal] resolve git context"})
	if err != nil {
		return "", err
	}
	if meta.Git == nil || meta.Git.Checksum == "" {
		return "", errors.New("buildkitd resolved no commit")
	}
	g.commit = cmp.Or(meta.Git.CommitChecksum, meta.Git.Checksum)
	return meta.Git.Checksum, nil
}

// hostTrouble are git's words for a host that may answer later.
var hostTrouble = []string{
	"Could not resolve host", "Failed to connect", "Connection refused", "Connection timed out",
	"Operation timed out", "Connection reset", "returned error: 5", "returned error: 429", "early EOF",
}

// failure says why a ref could not be resolved. What git says of it may hold the
// URL, which has no credentials.
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
		why = "it wants credentials, or others"
	}
	return &api.Error{Code: api.BadContext, Msg: fmt.Sprintf("fetching %s of %s: %s", ref, g.Remote(), line(why)), Err: g.err}
}
