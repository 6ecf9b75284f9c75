package buildkit

import (
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/rs/zerolog"
	"github.com/tonistiigi/fsutil"

	"handler/function/buildkit/contextfs"
	"handler/function/buildkit/pool"
	"handler/function/buildkit/sources"
	"handler/function/redact"
	"handler/function/registry"
	"handler/function/solve"
)

// plan is one build as any daemon would be asked for it. It does not change once it is attempted, so
// that attempts share it.
type plan struct {
	req   *solve.Request
	name  solve.Name // by which daemons remember the build; zero is none
	tags  pool.Tags  // by which replicas count the build; zero without a tenant
	pool  *pool.Pool // whose daemons build; enter sets that of a tenant
	mask  *redact.Redactor
	files *contextfs.FS

	native    string   // only daemons of this own platform may build it; empty is any
	platforms []string // to build; none is the daemon's own

	// part says that other parts of the image are built beside it. Its images are pushed
	// without a tag.
	part bool
	// joins are parts that are in the registry. With joins, nothing is built: they become
	// one image.
	joins []pushedPart

	builder     *registry.Credentials // the builder's own
	credentials *registry.Credentials // for the images
	sources     *sources.Policy       // what may be read; nil is everything

	cacheIn     reference.Named // the repository of a second copy of the cache; nil is nowhere
	cache       reference.Named // the tag there; nil is nowhere
	compression Compression
	allowSyntax bool
}

// newPlan returns the plan for the whole request, before it is split.
func (s *Solver) newPlan(req *solve.Request, files *contextfs.FS) *plan {
	p := &plan{
		req:         req,
		name:        req.Name,
		tags:        tagsOf(req),
		pool:        s.pools.shared,
		mask:        req.Mask,
		files:       files,
		platforms:   req.Config.Platforms,
		compression: s.cfg.Compression,
		allowSyntax: s.followsSyntax(req),
		credentials: s.cfg.Credentials,
		cacheIn:     s.cfg.CacheRepository,
		builder:     s.cfg.Credentials,
	}
	if p.mask == nil {
		p.mask = redact.New(req.Secrets)
	}
	if len(p.platforms) == 0 && s.cfg.DefaultPlatform != "" {
		p.platforms = []string{s.cfg.DefaultPlatform}
	}
	p.cache = cacheTag(p.cacheIn, req, "")
	return p
}

// followsSyntax says whether a "# syntax=" line is followed. A frontend can import a cache from
// anywhere into the daemon's own, and the source policy does not see it. So a tenant's line is
// followed only if From says which frontends there are.
func (s *Solver) followsSyntax(req *solve.Request) bool {
	return s.cfg.AllowSyntax && (req.Tenant == nil || req.Tenant.Sources.From != nil)
}

// cacheTag is where the request's cache is kept in the repository, or nil. suffix tells the
// parts of an image apart. A tenant's tags begin with the tenant's id, so that all of them can
// be found:
//
//	t-7f3a9c0e2b41d8f6-91b0…c4-linux-arm64
func cacheTag(repository reference.Named, req *solve.Request, suffix string) reference.Named {
	if repository == nil || len(req.Config.References) == 0 {
		return nil
	}
	// SharedKey is hex digits: a valid tag, and a key that no other tenant has.
	text := req.SharedKey + suffix
	if req.Tenant != nil {
		text = req.Tenant.ID + "-" + text
	}
	tag, err := reference.WithTag(repository, text)
	if err != nil {
		return nil
	}
	return tag
}

func (p *plan) key() pool.Key { return pool.Key{Cache: p.req.SharedKey, Native: p.native} }

// logTo is log with whose build it is.
func (p *plan) logTo(log zerolog.Logger) *zerolog.Logger {
	with := log.With().Str("call_id", p.req.ID)
	if t := p.req.Tenant; t != nil {
		with = with.Str("tenant", t.ID).Str("key", t.Key)
	}
	log = with.Logger()
	return &log
}

func (p *plan) named() bool { return p.name != solve.Name{} }

func (p *plan) pushes() bool { return !p.req.Config.SkipPush }

// outcome is what the plan comes to on d.
func (p *plan) outcome(d *pool.Daemon, digest string) solve.Outcome {
	outcome := solve.Outcome{Digest: digest, Platforms: p.platforms}
	if native := d.Native(); len(outcome.Platforms) == 0 && native != "" {
		outcome.Platforms = []string{native}
	}
	if p.pushes() {
		outcome.Tags = p.req.Config.Tags
	}
	return outcome
}

// grant makes the credentials of one attempt. The cache is the builder's, whoever builds.
func (p *plan) grant() *registry.Grant {
	g := p.credentials.Grant(p.req.Config.References)
	if p.cache != nil {
		g.Lend(p.builder, p.cache)
	}
	return g
}

// solveOpt are the client's options for one attempt, with a Ref and credentials of its own.
func (p *plan) solveOpt(ref string, auths *authServer) client.SolveOpt {
	attachables := []session.Attachable{auths}
	if len(p.req.Secrets) > 0 {
		attachables = append(attachables, p.secrets(""))
	}
	opt := client.SolveOpt{
		Ref:            ref,
		Frontend:       "dockerfile.v0",
		FrontendAttrs:  p.frontendAttrs(),
		LocalMounts:    map[string]fsutil.FS{"context": p.files, "dockerfile": p.files},
		LocalFilterOpt: p.files.Filter,
		SharedKey:      p.req.SharedKey,
		Session:        attachables,
		Exports:        []client.ExportEntry{{Type: client.ExporterImage, Attrs: p.exporterAttrs()}},
	}
	if p.sources != nil {
		opt.SourcePolicyProvider = p.sources.Provider()
	}
	if p.cache == nil {
		return opt
	}
	opt.CacheImports = []client.CacheOptionsEntry{{Type: "registry", Attrs: map[string]string{"ref": p.cache.String()}}}
	if p.pushes() {
		// The exporter of the cache compresses the layers that are in no image. A later
		// image may have them.
		attrs := p.compression.attrs()
		maps.Copy(attrs, map[string]string{
			"ref": p.cache.String(),
			// The results of all stages, as an image: some registries take no other
			// manifest. Without ignore-error, an error of the cache would keep the
			// image from being pushed.
			"mode": "max", "image-manifest": "true", "oci-mediatypes": "true", "ignore-error": "true",
		})
		opt.CacheExports = []client.CacheOptionsEntry{{Type: "registry", Attrs: attrs}}
	}
	return opt
}

// secrets are the session's: the build's own, and under the id git the header for the git
// host, unless git is empty.
func (p *plan) secrets(git string) session.Attachable {
	all := make(map[string][]byte)
	maps.Copy(all, p.req.Secrets)
	if git != "" && p.req.GitAuthorization != "" {
		all[git] = []byte(p.req.GitAuthorization)
	}
	return secretsprovider.FromMap(all)
}

func (p *plan) frontendAttrs() map[string]string {
	cfg := p.req.Config
	attrs := make(map[string]string)
	for k, v := range cfg.BuildArgs {
		attrs["build-arg:"+k] = v
	}
	for k, v := range cfg.Labels {
		attrs["label:"+k] = v
	}
	if cfg.Dockerfile != "" {
		attrs["filename"] = path.Clean(cfg.Dockerfile)
	}
	if cfg.Target != "" {
		attrs["target"] = cfg.Target
	}
	if len(p.platforms) > 0 {
		attrs["platform"] = strings.Join(p.platforms, ",")
	}
	if p.part {
		attrs["multi-platform"] = "true" // puts the platform into the names of steps
	}
	if cfg.NoCache {
		attrs["no-cache"] = ""
	}
	if cfg.Pull {
		attrs["image-resolve-mode"] = "pull"
	}
	if p.req.Hostname != "" {
		attrs["hostname"] = p.req.Hostname
	}
	if p.req.CacheMountNS != "" {
		attrs["build-arg:BUILDKIT_CACHE_MOUNT_NS"] = p.req.CacheMountNS
	}
	p.limitSteps(attrs)
	// The frontend takes cmdline for the command line of a foreign frontend that has been
	// started already. It then looks for no syntax line.
	if !p.allowSyntax {
		attrs["cmdline"] = "dockerfile.v0"
	}
	return attrs
}

// exporterAttrs names the image only if it is pushed. Otherwise the image is exported for its
// digest, and the daemon keeps nothing of it but the cache.
func (p *plan) exporterAttrs() map[string]string {
	attrs := p.compression.attrs()
	for k, v := range p.req.Config.Annotations {
		attrs["annotation."+k] = v
		if len(p.platforms) > 1 {
			attrs["annotation-index."+k] = v
		}
	}
	if !p.pushes() {
		return attrs
	}
	name := reference.Named.String
	if p.part {
		attrs["push-by-digest"] = "true"
		name = reference.Named.Name
	}
	attrs["name"] = strings.Join(p.names(name), ",")
	attrs["push"] = "true"
	return attrs
}

// names returns name(ref) for each reference, without duplicates.
func (p *plan) names(name func(reference.Named) string) []string {
	var list []string
	for _, ref := range p.req.Config.References {
		if n := name(ref); !slices.Contains(list, n) {
			list = append(list, n)
		}
	}
	return list
}
