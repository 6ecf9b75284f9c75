package buildkit

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"handler/function/api"
	"handler/function/solve"
)

// A pool may have daemons of several architectures. Each platform of an image is
// then built and pushed, without a tag, by a daemon of its own; at last one of
// them makes an index of what is in the registry, and that gets the tags.

// part is the platforms of an image that daemons of one architecture build.
type part struct {
	native    string // the daemons' platform; empty is any daemon
	platforms []string
	digest    string // of an index, once it is pushed
}

// natives are the daemons' own platforms, each once. A daemon that has never
// answered has none.
func (p *pool) natives(ctx context.Context) []string {
	var list []string
	var unknown bool
	for _, d := range p.list(ctx) {
		if native := d.native(); native != "" {
			list = append(list, native)
		} else {
			unknown = true
		}
	}
	if unknown {
		list = nil
		p.each(ctx, func(*daemon, *conn) {})
		for _, d := range p.list(ctx) {
			if native := d.native(); native != "" {
				list = append(list, native)
			}
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// native is the daemon's own platform, as it said last.
func (d *daemon) native() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.platform
}

// runs says whether a daemon of the native platform runs p without emulation.
func runs(native, p string) bool {
	n, err := platforms.Parse(native)
	if err != nil {
		return false
	}
	want, err := platforms.Parse(p)
	if want.Architecture == "amd64" {
		want.Variant = "" // which of them it has, a daemon does not say first
	}
	return err == nil && platforms.Only(n).Match(want)
}

// split divides the build by the architectures of the pool's daemons. One part
// alone is built in one go.
func (b *build) split(ctx context.Context) []part {
	whole := []part{{platforms: b.platforms()}}
	if len(b.solver.pool.list(ctx)) < 2 {
		return whole
	}
	natives := b.solver.pool.natives(ctx)
	if len(natives) < 2 {
		return whole
	}
	wanted := b.platforms()
	if len(wanted) == 0 {
		// Not that of whichever daemon the image happens to be placed on.
		i := slices.IndexFunc(natives, func(n string) bool { return runs(n, "linux/"+runtime.GOARCH) })
		return []part{{native: natives[max(i, 0)], platforms: []string{natives[max(i, 0)]}}}
	}
	var parts []part
	for _, p := range wanted {
		native := ""
		if i := slices.IndexFunc(natives, func(n string) bool { return runs(n, p) }); i >= 0 {
			native = natives[i]
			b.progress.warn(p + " is built by a buildkitd of its own architecture")
		}
		if i := slices.IndexFunc(parts, func(q part) bool { return q.native == native }); i >= 0 {
			parts[i].platforms = append(parts[i].platforms, p)
		} else {
			parts = append(parts, part{native: native, platforms: []string{p}})
		}
	}
	return parts
}

// emulated says which platforms the daemon runs under emulation.
func (b *build) emulated(d *daemon) {
	native := d.native()
	if native == "" || b.joins != nil {
		return
	}
	for _, p := range b.platforms() {
		if !runs(native, p) {
			b.progress.warn(fmt.Sprintf("%s is built under emulation, by a buildkitd of %s", p, native))
		}
	}
}

// runParts builds every part at once, and joins them if all succeed.
func (b *build) runParts(ctx context.Context, parts []part) (solve.Outcome, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var mu sync.Mutex
	builds := make([]*build, len(parts))
	var first error
	var commit string
	var all sync.WaitGroup
	for i := range parts {
		sub := *b
		sub.part, sub.partial = parts[i], true
		sub.limits = b.solver.newLimits()
		// Nothing but the joining is found again by the name, or is the push.
		req := *b.req
		req.Name = solve.Name{}
		sub.req = &req
		sub.log = func(lines ...string) {
			mu.Lock()
			defer mu.Unlock()
			b.log(lines...)
		}
		sub.progress = sub.newProgress()
		builds[i] = &sub
		all.Go(func() {
			outcome, err := sub.run(ctx)
			mu.Lock()
			defer mu.Unlock()
			parts[i].digest = outcome.Digest
			if err == nil && commit != "" && outcome.Commit != commit {
				err = &api.Error{Code: api.ContextFailed, Msg: "the git ref moved while it was built"}
			}
			commit = cmp.Or(outcome.Commit, commit)
			if err != nil && first == nil {
				first = err
				cancel(errOtherPlatform)
			}
		})
	}
	all.Wait()
	for _, sub := range builds {
		b.stats.Add(sub.finish())
	}
	if first != nil {
		return solve.Outcome{}, first
	}
	if !b.pushes() {
		const warning = "platforms of several buildkitds make an index, and have a digest, only when they are pushed"
		return solve.Outcome{Commit: commit, Platforms: b.platforms(), Warnings: append(slices.Clone(b.warnings), warning)}, nil
	}
	b.joins = parts
	outcome, err := b.run(ctx)
	outcome.Commit = commit
	return outcome, err
}

// join makes one result of images that are in the registry. Their layers are not
// pulled: the push finds them where they are.
func (b *build) join(ctx context.Context, c *client.Client, opt client.SolveOpt, status chan *client.SolveStatus) (*client.SolveResponse, error) {
	opt.Frontend, opt.FrontendAttrs, opt.LocalMounts = "", nil, nil
	opt.CacheImports, opt.CacheExports = nil, nil
	return c.Build(ctx, opt, "", func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
		result := gateway.NewResult()
		var all exptypes.Platforms
		for _, part := range b.joins {
			image, err := reference.WithDigest(reference.TrimNamed(b.req.Config.References[0]), digest.Digest(part.digest))
			if err != nil {
				return nil, err
			}
			for _, name := range part.platforms {
				p, err := platforms.Parse(name)
				if err != nil {
					return nil, err
				}
				ref, config, err := pushedImage(ctx, c, image.String(), p)
				if err != nil {
					return nil, fmt.Errorf("joining %s: %w", name, err)
				}
				result.AddRef(name, ref)
				result.AddMeta(exptypes.ExporterImageConfigKey+"/"+name, config)
				all.Platforms = append(all.Platforms, exptypes.Platform{ID: name, Platform: p})
			}
		}
		meta, err := json.Marshal(all)
		if err != nil {
			return nil, err
		}
		result.AddMeta(exptypes.ExporterPlatformsKey, meta)
		return result, nil
	}, status)
}

func pushedImage(ctx context.Context, c gateway.Client, image string, p ocispecs.Platform) (gateway.Reference, []byte, error) {
	def, err := llb.Image(image, llb.Platform(p)).Marshal(ctx)
	if err != nil {
		return nil, nil, err
	}
	_, _, config, err := c.ResolveImageConfig(ctx, image, sourceresolver.Opt{ImageOpt: &sourceresolver.ResolveImageOpt{Platform: &p}})
	if err != nil {
		return nil, nil, err
	}
	result, err := c.Solve(ctx, gateway.SolveRequest{Definition: def.ToPB()})
	if err != nil {
		return nil, nil, err
	}
	ref, err := result.SingleRef()
	return ref, config, err
}

// untagged are the repositories that a part is pushed to.
func (b *build) untagged() string {
	var list []string
	for _, ref := range b.req.Config.References {
		if name := ref.Name(); !slices.Contains(list, name) {
			list = append(list, name)
		}
	}
	return strings.Join(list, ",")
}
