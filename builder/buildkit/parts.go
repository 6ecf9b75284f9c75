package buildkit

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
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

// A pool may have daemons of several architectures. Then the platforms of an image are split by
// architecture. Each part is built by daemons of its own architecture and pushed without a tag.
// Finally one daemon makes an index of the parts in the registry, and the index gets the tags.

// runsNatively says whether a daemon of the native platform runs programs of p without
// emulation.
func runsNatively(native, p string) bool {
	n, err := platforms.Parse(native)
	if err != nil {
		return false
	}
	want, err := platforms.Parse(p)
	if want.Architecture == "amd64" {
		want.Variant = "" // a daemon does not name its best variant first
	}
	return err == nil && platforms.Only(n).Match(want)
}

// split returns the plans of the parts of p, by the architectures of the pool's daemons. say
// is told of platforms that have daemons of their own. A single plan is pushed with its tags.
func (s *Solver) split(ctx context.Context, p *plan, say func(string)) []*plan {
	natives := p.pool.Natives(ctx)
	if len(natives) < 2 {
		return []*plan{p}
	}
	if len(p.platforms) == 0 {
		// If no platform were set, it would be that of the daemon on which the image
		// happens to be placed.
		i := slices.IndexFunc(natives, func(n string) bool { return runsNatively(n, "linux/"+runtime.GOARCH) })
		native := natives[max(i, 0)]
		return []*plan{p.on(native, []string{native})}
	}
	var order []string // natives that build a part; empty is any daemon, by emulation
	wanted := make(map[string][]string)
	for _, platform := range p.platforms {
		native := ""
		if i := slices.IndexFunc(natives, func(n string) bool { return runsNatively(n, platform) }); i >= 0 {
			native = natives[i]
			say(platform + " is built by a buildkitd of its own architecture")
		}
		if !slices.Contains(order, native) {
			order = append(order, native)
		}
		wanted[native] = append(wanted[native], platform)
	}
	var parts []*plan
	for _, native := range order {
		part := p.on(native, wanted[native])
		if len(order) > 1 {
			part.part = true
			part.name = solve.Name{} // daemons remember the join alone
			part.cache = cacheTag(p.cacheIn, p.req, strings.ReplaceAll("-"+native, "/", "-"))
		}
		parts = append(parts, part)
	}
	return parts
}

// on is p for some platforms, on daemons of the native platform.
func (p *plan) on(native string, wanted []string) *plan {
	part := *p
	part.native, part.platforms = native, wanted
	return &part
}

// errOtherPlatform is the cause that ends the other parts when one has failed.
var errOtherPlatform = errors.New("another platform failed")

// pushedPart is an image in the registry, or an index of several.
type pushedPart struct {
	platforms []string
	digest    string
}

// solveParts builds all parts at once, and joins them if all succeed. whole is the plan of
// the image. If the image is not pushed, there is nothing to join: the Outcome has a warning
// and no digest.
func (s *Solver) solveParts(ctx context.Context, whole *plan, parts []*plan, log solve.Log) (outcome solve.Outcome, stats solve.Stats, err error) {
	building, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var mu sync.Mutex // guards failed, commit and log
	var failed error
	var commit string
	pushed, partStats := make([]pushedPart, len(parts)), make([]solve.Stats, len(parts))
	locked := func(lines ...string) {
		mu.Lock()
		defer mu.Unlock()
		log(lines...)
	}
	var all sync.WaitGroup
	for i, part := range parts {
		all.Go(func() {
			outcome, stats, err := s.attemptAll(building, part, locked)
			pushed[i], partStats[i] = pushedPart{part.platforms, outcome.Digest}, stats
			mu.Lock()
			defer mu.Unlock()
			if err == nil && commit != "" && outcome.Commit != commit {
				err = &api.Error{Code: api.ContextFailed, Msg: "the git ref moved while it was built"}
			}
			commit = cmp.Or(outcome.Commit, commit)
			if err != nil && failed == nil {
				failed = err
				cancel(errOtherPlatform)
			}
		})
	}
	all.Wait()
	for _, part := range partStats {
		stats.Add(part)
	}
	switch {
	case failed != nil:
		return solve.Outcome{}, stats, failed
	case !whole.pushes():
		const warning = "the image has no digest: it was built in parts, and only a push makes one image of them"
		return solve.Outcome{Commit: commit, Platforms: whole.platforms, Warnings: []string{warning}}, stats, nil
	}
	joint := *whole
	joint.joins = pushed
	outcome, joinStats, err := s.attemptAll(ctx, &joint, log)
	outcome.Commit = commit
	stats.Add(joinStats)
	stats.Push = joinStats.Push
	return outcome, stats, err
}

// joining returns the options for attempt.build. join makes one image of the plan's parts, which are
// in the registry. The daemon does not pull their layers: its push finds them where they are.
func joining(opt client.SolveOpt, p *plan) (_ client.SolveOpt, join gateway.BuildFunc) {
	opt.Frontend, opt.FrontendAttrs, opt.LocalMounts = "", nil, nil
	opt.CacheImports, opt.CacheExports = nil, nil
	repository := reference.TrimNamed(p.req.Config.References[0])
	return opt, func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
		result := gateway.NewResult()
		var all exptypes.Platforms
		for _, part := range p.joins {
			image, err := reference.WithDigest(repository, digest.Digest(part.digest))
			if err != nil {
				return nil, err
			}
			for _, name := range part.platforms {
				platform, err := platforms.Parse(name)
				if err != nil {
					return nil, err
				}
				ref, config, err := pushedImage(ctx, c, image.String(), platform)
				if err != nil {
					return nil, fmt.Errorf("joining %s: %w", name, err)
				}
				result.AddRef(name, ref)
				result.AddMeta(exptypes.ExporterImageConfigKey+"/"+name, config)
				all.Platforms = append(all.Platforms, exptypes.Platform{ID: name, Platform: platform})
			}
		}
		meta, err := json.Marshal(all)
		if err != nil {
			return nil, err
		}
		result.AddMeta(exptypes.ExporterPlatformsKey, meta)
		return result, nil
	}
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
