package buildkit

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strconv"

	"github.com/distribution/reference"

	"handler/function/api"
	"handler/function/buildkit/sources"
	"handler/function/repository"
)

// forTenant gives the plan what its tenant may have: credentials, a policy for sources, and
// the registry cache. The plan of a build without a tenant stays as it is. warning is for the
// client, or empty.
func (s *Solver) forTenant(ctx context.Context, p *plan) (warning string, err error) {
	t := p.req.Tenant
	if t == nil {
		return "", nil
	}
	if !t.BuilderRegistry {
		if p.credentials, err = s.cfg.Credentials.Of(t.RegistryConfig); err != nil {
			return "", &api.Error{Code: api.Internal, Msg: "the tenant's registry credentials cannot be read; the builder's log has the cause", Err: err}
		}
		if s.sharesLogin(ctx, p) {
			warning = fmt.Sprintf("no registry cache: %s asks for Basic authentication, and is this tenant's registry as well", reference.Domain(p.cacheIn))
			p.cacheIn, p.cache = nil, nil
		}
	}
	p.sources = sources.New(s.sourcesOf(p))
	return warning, nil
}

// sourcesOf are the rules for what the build of a tenant reads, once the plan has the tenant's
// credentials and cache.
func (s *Solver) sourcesOf(p *plan) sources.Config {
	t := p.req.Tenant
	c := sources.Config{
		Sources: t.Sources,
		Tenant:  t.ID,
		Git:     p.req.Config.Git,
		Asker:   p.credentials.Grant(nil),
		Known:   s.cfg.Credentials,
		Unasked: s.cfg.Unasked,
	}
	if p.cacheIn != nil {
		c.Cache = p.cacheIn.Name()
	}
	return c
}

// sharesLogin says whether the daemon may have to choose between the builder's login and the
// tenant's: for Basic authentication it asks by the host alone.
func (s *Solver) sharesLogin(ctx context.Context, p *plan) bool {
	if p.cache == nil {
		return false
	}
	host := repository.Host(p.cacheIn.Name())
	pushes := slices.ContainsFunc(p.req.Config.References, func(ref reference.Named) bool { return repository.Host(ref.Name()) == host })
	serves, err := p.credentials.Serves(reference.Domain(p.cacheIn))
	return (pushes || serves || err != nil) && s.cacheScheme.MayBeBasic(ctx)
}

// cpuPeriod is how often the kernel gives a step its share of the processors, in µs. It is the
// kernel's default. The least share that the kernel takes is 1,000 µs, and so 0.01 of a processor.
const cpuPeriod = 100_000

// limitSteps sets the attributes for the memory and the processors of a tenant's steps. They
// are not in BuildKit's cache keys: a result that was built with other limits counts.
func (p *plan) limitSteps(attrs map[string]string) {
	t := p.req.Tenant
	if t == nil {
		return
	}
	if t.Memory > 0 {
		attrs["memory"] = strconv.FormatInt(t.Memory, 10)
		// This is memory and swap together: with a number as high as that of the memory,
		// there is no swap.
		attrs["memswap"] = attrs["memory"]
	}
	if t.CPUs > 0 {
		attrs["cpuperiod"] = strconv.Itoa(cpuPeriod)
		attrs["cpuquota"] = strconv.Itoa(int(math.Round(t.CPUs * cpuPeriod)))
	}
}
