// Package buildkit solves requests on a pool of BuildKit daemons. BuildKit ends here: no
// package outside this folder imports it.
//
// A request becomes one plan, or several where daemons of several architectures build its
// platforms. A plan is attempted until a verdict is final; see [policy]. Package pool finds
// the daemon for an attempt, package contextfs serves the build context to it, and package
// report reads what it says.
package buildkit

import (
	"context"
	"fmt"
	"time"

	"github.com/distribution/reference"
	"github.com/rs/zerolog"

	"handler/function/buildkit/contextfs"
	"handler/function/buildkit/pool"
	"handler/function/redact"
	"handler/function/registry"
	"handler/function/solve"
)

// Config says which daemons solve, and for how long they may.
type Config struct {
	// Addrs are tcp://host:port or unix:///path. A name with several addresses is
	// several daemons.
	Addrs      []string
	ServerName string // in the certificate of each daemon

	// CAFile, CertFile and KeyFile are PEM. They are read again when they change. All
	// empty, or a unix address: no TLS.
	CAFile, CertFile, KeyFile string

	// BuildTimeout bounds the build until its push begins. PushTimeout bounds the push, with
	// its retries. Zero is no limit. Both begin anew when the build goes to another daemon,
	// and after it has followed or met another replica's build. Where daemons of several
	// architectures build, each has both, and the index has a PushTimeout.
	BuildTimeout, PushTimeout time.Duration

	StallTimeout time.Duration // without a sign from the daemon; zero is no limit

	// DaemonBuilds is a pool.Config.Builds.
	DaemonBuilds int

	// Elsewhere tells how many builds other processes have on daemons, as in pool.Config. Nil
	// asks the daemons.
	Elsewhere func() (builds map[string]int, all bool)

	// DefaultPlatform is for a request that names no platform. Empty is the daemon's own.
	DefaultPlatform string

	// CacheRepository is where builds keep a second copy of their cache, for daemons that
	// have none. Nil is nowhere.
	CacheRepository reference.Named

	// Compression is of images and of the cache.
	Compression Compression

	// AllowSyntax follows a Dockerfile's "# syntax=" line.
	AllowSyntax bool

	// Unasked are patterns of repositories that only the daemon can ask for. They count for
	// tenants.
	Unasked []string

	Credentials *registry.Credentials
	Log         zerolog.Logger
}

// Solver solves requests on pools of daemons.
type Solver struct {
	cfg         Config
	pools       *pools
	running     running
	cacheScheme *registry.Scheme // of CacheRepository's registry; nil without one
}

// New dials nothing. Its error is about an address.
func New(cfg Config) (*Solver, error) {
	daemons, err := newPools(pool.Config{
		Addrs:      cfg.Addrs,
		ServerName: cfg.ServerName,
		CAFile:     cfg.CAFile,
		CertFile:   cfg.CertFile,
		KeyFile:    cfg.KeyFile,
		Builds:     cfg.DaemonBuilds,
		Elsewhere:  cfg.Elsewhere,
		Log:        cfg.Log,
	})
	if err != nil {
		return nil, err
	}
	s := &Solver{cfg: cfg, pools: daemons}
	if cfg.CacheRepository != nil {
		s.cacheScheme = cfg.Credentials.Scheme(reference.Domain(cfg.CacheRepository))
	}
	return s, nil
}

// Close closes each connection after the last Solve that uses it.
func (s *Solver) Close() error { return s.pools.close() }

// Solve builds req and pushes it. It returns when ctx ends, and reads nothing from
// req.Context after that. It calls log from one goroutine at a time.
//
// # Errors
//
// Every error is an *api.Error: bad_tar, build_failed, registry_denied, registry_failed,
// registry_timeout, from_forbidden, deadline, stalled, daemon_lost, daemon_full, no_daemon,
// bad_context, context_failed or internal. When ctx ended, it is ctx's cause if that is an
// *api.Error, and otherwise deadline or canceled.
func (s *Solver) Solve(ctx context.Context, req *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error) {
	files := contextfs.New(req.Context)
	defer files.Close()
	return s.solve(ctx, req, files, log)
}

func (s *Solver) solve(ctx context.Context, req *solve.Request, files *contextfs.FS, log solve.Log) (solve.Outcome, solve.Stats, error) {
	if err := s.checkSent(ctx, req, files); err != nil {
		return solve.Outcome{}, solve.Stats{}, err
	}
	p := s.newPlan(req, files)
	leave, err := s.enter(p)
	if err != nil {
		return solve.Outcome{}, solve.Stats{}, err
	}
	defer leave()
	say := warner(log, p.mask)
	withoutCache, err := s.forTenant(ctx, p)
	if err != nil {
		return solve.Outcome{}, solve.Stats{}, err
	}
	warnings := s.warnings(p)
	if withoutCache != "" {
		warnings = append(warnings, withoutCache)
	}
	for _, w := range warnings {
		say(w)
	}
	outcome, stats, err := s.build(ctx, p, log, say)
	stats.Sent = files.Sent()
	if err != nil {
		return solve.Outcome{}, stats, err
	}
	outcome.Warnings = append(warnings, outcome.Warnings...)
	return outcome, stats, nil
}

// enter gives p the pool of its tenant, and counts it until leave is called. Its error is an
// *api.Error, no_daemon.
func (s *Solver) enter(p *plan) (leave func(), err error) {
	name := ""
	if p.req.Tenant != nil {
		name = p.req.Tenant.Pool
	}
	daemons, unuse, err := s.pools.use(name)
	if err != nil {
		return nil, err
	}
	p.pool = daemons
	uncount := s.running.add(p.tags)
	return func() { uncount(); unuse() }, nil
}

// checkSent refuses what BuildKit cannot be given. It has a BuildTimeout of its own.
func (s *Solver) checkSent(ctx context.Context, req *solve.Request, files *contextfs.FS) error {
	l := s.newLimits(req.Tenant)
	ctx, stop := l.start(ctx)
	defer stop()
	if err := files.CheckSent(ctx, req.Config.Dockerfile); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return l.ended(ctx, "")
	}
	return nil
}

// warner returns a function that logs a warning of the builder's own.
func warner(log solve.Log, mask *redact.Redactor) func(string) {
	return func(text string) { log("w: " + mask.Line(text)) }
}

// warnings returns those that are known before the build.
func (s *Solver) warnings(p *plan) []string {
	syntax := p.files.Syntax(p.req.Config.Dockerfile)
	if syntax == "" || p.allowSyntax {
		return nil
	}
	return []string{fmt.Sprintf("the Dockerfile's line syntax=%s is not followed: the daemon's own frontend is used", p.mask.Line(syntax))}
}

// build solves p, in as many parts as the pool's architectures need.
func (s *Solver) build(ctx context.Context, p *plan, log solve.Log, say func(string)) (solve.Outcome, solve.Stats, error) {
	if err := s.prepare(ctx, p); err != nil {
		if ctx.Err() != nil {
			err = endedByCaller(context.Cause(ctx))
		}
		return solve.Outcome{}, solve.Stats{}, err
	}
	parts := s.split(ctx, p, say)
	if len(parts) > 1 {
		return s.solveParts(ctx, p, parts, log)
	}
	return s.attemptAll(ctx, parts[0], log)
}

// prepare creates missing repositories, if create_repositories is set. A build goes on without
// its cache repository. The errors are package registry's.
func (s *Solver) prepare(ctx context.Context, p *plan) error {
	if p.cache != nil {
		if err := s.cfg.Credentials.Prepare(ctx, []reference.Named{p.cache}); err != nil && ctx.Err() == nil {
			p.logTo(s.cfg.Log).Warn().Err(err).Msg("building without the cache repository")
		}
	}
	if !p.pushes() {
		return nil
	}
	return p.credentials.Prepare(ctx, p.req.Config.References)
}
