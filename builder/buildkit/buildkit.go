// Package buildkit solves requests on a BuildKit daemon. It is the only package
// that imports BuildKit: the session and its attachables, the frontend's and the
// exporter's attributes, the status stream and the daemon's errors end here.
package buildkit

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/rs/zerolog"
	"github.com/tonistiigi/fsutil"

	"handler/function/api"
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

	// CAFile, CertFile and KeyFile are PEM, read again when they change. All
	// empty, or a unix address: no TLS.
	CAFile, CertFile, KeyFile string

	// BuildTimeout is until the push begins, and PushTimeout from then on, its
	// retries included; zero is none. Both begin anew on another daemon. Of
	// several architectures each has its own, and the index a PushTimeout.
	BuildTimeout, PushTimeout time.Duration

	StallTimeout time.Duration // without a sign from the daemon; zero is none

	// DaemonBuilds is how many builds a daemon has before further ones go to the
	// next, if that has less. Zero is no limit.
	DaemonBuilds int

	// DefaultPlatform is that of a request that names none. Empty is the
	// daemon's own.
	DefaultPlatform string

	// CacheRepository is where builds keep their cache beside the daemons', for
	// those that have none of theirs. Empty: nowhere.
	CacheRepository reference.Named

	// Compression is of images and of the cache.
	Compression Compression

	// AllowSyntax follows a Dockerfile's "# syntax=" line.
	AllowSyntax bool

	Credentials *registry.Credentials
	Log         zerolog.Logger
}

// Solver solves on a pool of daemons, over one connection to each.
type Solver struct {
	cfg       Config
	pool      *pool
	pushWaits []time.Duration // before each retry of a push that was told to wait
}

// New dials nothing. Its error is of an address.
func New(cfg Config) (*Solver, error) {
	var targets []target
	for _, addr := range cfg.Addrs {
		t, err := parseTarget(addr)
		if err != nil {
			return nil, fmt.Errorf("reading the address %q of buildkitd: %w", addr, err)
		}
		targets = append(targets, t)
	}
	if len(targets) == 0 {
		return nil, errors.New("no address of buildkitd")
	}
	dial := func(addr string) *daemon {
		return &daemon{
			addr:       addr,
			serverName: cfg.ServerName,
			files:      [3]string{cfg.CAFile, cfg.CertFile, cfg.KeyFile},
			log:        cfg.Log,
			health:     health{pruning: make(chan struct{}, 1)},
		}
	}
	return &Solver{
		cfg:  cfg,
		pool: newPool(targets, cfg.DaemonBuilds, dial, cfg.Log),
		// BuildKit keeps a registry's Retry-After to itself.
		pushWaits: []time.Duration{2 * time.Second, 5 * time.Second, 15 * time.Second},
	}, nil
}

// Close closes the connections, each after the last Solve that uses it.
func (s *Solver) Close() error { return s.pool.close() }

// Daemons counts the daemons. It takes a few seconds when one does
// not answer that did before.
func (s *Solver) Daemons(ctx context.Context) solve.Daemons {
	var reachable atomic.Int32
	s.pool.each(ctx, func(*daemon, *conn) { reachable.Add(1) })
	count := solve.Daemons{Reachable: int(reachable.Load())}
	for _, d := range s.pool.list(ctx) {
		count.Total++
		if d.isFull() {
			count.Full++
		}
	}
	return count
}

// Solve builds req and pushes it. It returns when ctx ends, and nothing is read
// from req.Context after that; log is called from one goroutine.
//
// # Errors
//
// Every error is an *api.Error: bad_tar, build_failed, registry_denied, registry_failed,
// registry_timeout, deadline, daemon_lost, daemon_full, no_daemon or internal;
// when ctx ended, its cause if that is one, and else canceled.
func (s *Solver) Solve(ctx context.Context, req *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error) {
	return s.solve(ctx, req, newContextFS(req.Context), log)
}

func (s *Solver) solve(ctx context.Context, req *solve.Request, files *contextFS, log solve.Log) (solve.Outcome, solve.Stats, error) {
	defer files.close()
	checking, stop := context.WithTimeout(ctx, s.cfg.BuildTimeout)
	err := files.checkSent(checking, req.Config.Dockerfile)
	stop()
	if err != nil {
		return solve.Outcome{}, solve.Stats{}, api.AsError(err)
	}
	b := s.newBuild(req, files, log)
	for _, w := range b.warnings {
		b.progress.warn(w)
	}
	outcome, err := b.all(ctx)
	stats := b.finish()
	stats.Sent = b.fs.sent.Load()
	stats.Push = b.limits.pushed()
	if err != nil {
		return solve.Outcome{}, stats, err
	}
	return outcome, stats, nil
}

// all builds what is asked for, in as many parts as that takes.
func (b *build) all(ctx context.Context) (solve.Outcome, error) {
	if err := b.prepare(ctx); err != nil {
		if ended := b.ended(ctx); ended != nil {
			return solve.Outcome{}, ended
		}
		return solve.Outcome{}, err
	}
	parts := b.split(ctx)
	if len(parts) > 1 {
		return b.runParts(ctx, parts)
	}
	b.part = parts[0]
	return b.run(ctx)
}

// finish is how the build went, after its last attempt.
func (b *build) finish() solve.Stats {
	steps, cached := b.progress.counts()
	b.stats.Steps += steps
	b.stats.Cached += cached
	b.stats.Transfer += b.progress.transfer
	return b.stats
}

// build is one request on its way, over all its attempts.
type build struct {
	solver   *Solver
	req      *solve.Request
	redact   *redact.Redactor
	log      solve.Log
	fs       *contextFS
	limits   *limits
	progress *progress // of the current attempt
	stats    solve.Stats
	warnings []string
	followed bool // what progress has seen was another replica's

	part    part   // what is built of the platforms
	partial bool   // other parts are built beside it
	joins   []part // that are in the registry, where this is what joins them

	daemon *daemon // of the current attempt
	lost   *daemon // that an attempt was lost on, or that was full
}

func (s *Solver) newBuild(req *solve.Request, files *contextFS, log solve.Log) *build {
	b := &build{
		solver: s,
		req:    req,
		redact: req.Mask,
		log:    log,
		fs:     files,
		limits: s.newLimits(),
	}
	if b.redact == nil {
		b.redact = redact.New(req.Secrets)
	}
	b.progress = b.newProgress()
	if syntax := syntaxLine(b.fs, req.Config.Dockerfile); syntax != "" && !s.cfg.AllowSyntax {
		b.warnings = append(b.warnings, fmt.Sprintf("the Dockerfile's line syntax=%s is not followed: the daemon's own frontend is used", b.redact.Line(syntax)))
	}
	return b
}

func (b *build) newProgress() *progress {
	return newProgress(b.log, b.redact, b.limits.listening, b.limits.pushing)
}

// run solves, a second time and elsewhere when the daemon was lost or its disk
// is full: it pushes last, so that nothing is done twice. A registry that wants
// the push to wait gets it again.
func (b *build) run(ctx context.Context) (solve.Outcome, error) {
	ctx, stop := b.limits.start(ctx)
	defer stop()
	pushes := 0
	for {
		outcome, err := b.attempt(ctx)
		if err == nil {
			return outcome, nil
		}
		if ended := b.ended(ctx); ended != nil {
			return solve.Outcome{}, ended
		}
		switch e := api.AsError(err); {
		case b.lost == nil && b.daemon != nil && (e.Code == api.DaemonLost || e.Code == api.DaemonFull && b.solver.pool.hasRoom(ctx)):
			b.lost = b.daemon
			b.solver.cfg.Log.Warn().Err(b.masked(e.Err)).Str("call_id", b.req.ID).Str("daemon", b.lost.addr).Str("code", string(e.Code)).Msg("solving again")
			if e.Code == api.DaemonFull {
				b.progress.warn("buildkitd has no space left on its disk: building on another")
			} else {
				b.progress.warn("the connection to buildkitd was lost: building again")
			}
			b.limits.again()
		case errors.Is(err, errRunsAlready):
			// The next attempt finds it in the history and waits for its end.
		case errors.Is(err, errPushLater) && pushes < len(b.solver.pushWaits):
			wait := b.solver.pushWaits[pushes]
			pushes++
			b.progress.warn(fmt.Sprintf("the registry takes no more requests for now: pushing again in %v", wait))
			select {
			case <-ctx.Done():
				return solve.Outcome{}, b.ended(ctx)
			case <-time.After(wait):
			}
		case e.Code == api.NoDaemon && b.lost != nil:
			return solve.Outcome{}, &api.Error{Code: api.NoDaemon, Msg: "buildkitd was lost while building, and cannot be reached again", Err: e.Err}
		default:
			return solve.Outcome{}, e
		}
	}
}

// prepare has the repositories there that the build pushes to, as far as the
// credentials' settings go. Without the cache's it builds all the same.
func (b *build) prepare(ctx context.Context) error {
	creds := b.solver.cfg.Credentials
	if cache := b.cache(); cache != nil {
		if err := creds.Prepare(ctx, []reference.Named{cache}); err != nil && ctx.Err() == nil {
			b.solver.cfg.Log.Warn().Err(err).Str("call_id", b.req.ID).Msg("building without the cache repository")
		}
	}
	if !b.pushes() {
		return nil
	}
	return creds.Prepare(ctx, b.req.Config.References)
}

// ended is the error of a build whose ctx has, or nil.
func (b *build) ended(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	cause := context.Cause(ctx)
	switch {
	case errors.Is(cause, errBuildTimeout):
		msg := fmt.Sprintf("the build did not end within %v (build_timeout)", b.solver.cfg.BuildTimeout)
		if step := b.progress.running(); step != "" {
			msg += "; it was at " + step
		}
		return &api.Error{Code: api.Deadline, Msg: msg}
	case errors.Is(cause, errStalled):
		msg := fmt.Sprintf("buildkitd reported no progress for %v (stall_timeout)", b.solver.cfg.StallTimeout)
		if step := b.progress.running(); step != "" {
			msg += "; it was at " + step
		}
		if b.daemon != nil {
			b.solver.pool.takeOut(b.daemon, stallRest, cause)
		}
		return &api.Error{Code: api.Stalled, Msg: msg}
	case errors.Is(cause, errPushTimeout):
		return &api.Error{Code: api.RegistryTimeout, Msg: fmt.Sprintf("the push did not end within %v (push_timeout)", b.solver.cfg.PushTimeout)}
	}
	if e, ok := errors.AsType[*api.Error](cause); ok {
		return e
	}
	if errors.Is(cause, context.DeadlineExceeded) {
		return &api.Error{Code: api.Deadline, Msg: "the deadline passed", Err: cause}
	}
	return &api.Error{Code: api.Canceled, Msg: "the build was canceled", Err: cause}
}

// attempt solves once, with a Ref of its own: BuildKit looks a finished one up
// in its history.
func (b *build) attempt(ctx context.Context) (solve.Outcome, error) {
	pool := b.solver.pool
	b.daemon = nil
	at, err := pool.place(ctx, placeKey{b.req.SharedKey, b.part.native}, b.elsewhere(ctx), b.lost)
	if err != nil {
		return solve.Outcome{}, err
	}
	d, c := at.daemon, at.conn
	b.daemon = d
	b.stats.Daemon, b.stats.Choice = d.addr, at.choice
	b.stats.Moved = b.lost != nil && b.lost != d
	end := c.ends.next()
	ref := identity.NewID()
	if b.named() {
		past, next, err := b.recall(ctx, at)
		if err != nil || past != nil {
			// A daemon that does not tell of its builds is no better than a lost one.
			gone := err != nil && ctx.Err() == nil
			at.give(gone)
			switch {
			case gone:
				pool.lose(d, err)
				return solve.Outcome{}, daemonLost(err)
			case err != nil:
				return solve.Outcome{}, err
			}
			return *past, nil
		}
		ref = next
	}
	if b.stats.Attempts++; b.stats.Attempts > 1 || b.followed {
		b.stats.Transfer += b.progress.transfer
		b.progress = b.newProgress()
	}
	if b.stats.Attempts == 1 {
		b.emulated(d)
	}
	auths := newAuthServer(b.solver.cfg.Credentials.Build(b.repositories()))
	status := make(chan *client.SolveStatus)
	var drained sync.WaitGroup
	drained.Go(func() { b.progress.drain(ctx, status) })
	opt := b.solveOpt(ref, auths)
	var git *gitSource
	var resp *client.SolveResponse
	switch {
	case b.joins != nil:
		b.limits.pushing() // all that joining does is with the registry
		resp, err = b.join(ctx, c.client, opt, status)
	case b.req.Config.Git == nil:
		resp, err = c.client.Solve(ctx, nil, opt, status)
	default:
		git = &gitSource{Git: b.req.Config.Git, secret: identity.NewID()}
		opt.LocalMounts = nil
		opt.Session = []session.Attachable{auths, b.secrets(git.secret)}
		resp, err = git.solve(ctx, c.client, opt, status)
	}
	drained.Wait()
	gone := err != nil && ctx.Err() == nil && connectionLost(err, end)
	var failed *failure
	if err != nil && !gone {
		failed = &failure{
			err: err, redact: b.redact, step: b.progress.name, printed: b.progress.lastPrinted, noSpace: b.progress.noSpace, pushing: b.limits.isPushing(),
			auths: auths.failed(), anonymous: auths.build.Anonymous(), hints: auths.build.Hints(), troubled: b.progress.troubled,
		}
		v, ok := errors.AsType[*errdefs.VertexError](err)
		if saysFull(err) || ok && b.progress.unstarted(v.Digest) {
			failed.full = c.isFull(ctx)
		}
	}
	at.give(gone)
	if gone {
		pool.lose(d, err)
		return solve.Outcome{}, daemonLost(err)
	}
	if ctx.Err() == nil {
		d.works()
	}
	switch {
	case err != nil && runsAlready(err, ref):
		return solve.Outcome{}, errRunsAlready
	case err != nil && git != nil && git.err != nil && !failed.full:
		return solve.Outcome{}, git.failure(b.redact.Line)
	case err != nil:
		err := failed.classify()
		if failed.full {
			pool.fill(d, b.masked(err))
		}
		return solve.Outcome{}, err
	}
	outcome := b.outcome(d, resp.ExporterResponse["containerimage.digest"])
	if git != nil {
		outcome.Commit = git.commit
	}
	return outcome, nil
}

// masked is err for the function's own log.
func (b *build) masked(err error) error { return errors.New(b.redact.Text(err.Error())) }

func (b *build) outcome(d *daemon, digest string) solve.Outcome {
	outcome := solve.Outcome{
		Digest:    digest,
		Platforms: b.platforms(),
		Warnings:  b.warnings,
	}
	if native := d.native(); len(outcome.Platforms) == 0 && native != "" {
		outcome.Platforms = []string{native}
	}
	if b.pushes() {
		outcome.Tags = b.req.Config.Tags
	}
	return outcome
}

func (b *build) named() bool { return b.req.Name != solve.Name{} }

func (b *build) pushes() bool { return !b.req.Config.SkipPush }

// platforms are those asked for; none are the daemon's own.
func (b *build) platforms() []string {
	if list := b.part.platforms; len(list) > 0 {
		return list
	}
	if list := b.req.Config.Platforms; len(list) > 0 {
		return list
	}
	if p := b.solver.cfg.DefaultPlatform; p != "" {
		return []string{p}
	}
	return nil
}

func (b *build) solveOpt(ref string, auths *authServer) client.SolveOpt {
	attachables := []session.Attachable{auths}
	if len(b.req.Secrets) > 0 {
		attachables = append(attachables, b.secrets(""))
	}
	opt := client.SolveOpt{
		Ref:           ref,
		Frontend:      "dockerfile.v0",
		FrontendAttrs: b.frontendAttrs(),
		LocalMounts:   map[string]fsutil.FS{"context": b.fs, "dockerfile": b.fs},
		SharedKey:     b.req.SharedKey,
		Session:       attachables,
		Exports:       []client.ExportEntry{{Type: client.ExporterImage, Attrs: b.exporterAttrs()}},
		// The daemon's history would keep the build arguments in the clear for two
		// days, and takes a quarter of a cached build's time. What a queue may
		// deliver again has to be found there; and from what is in it, replicas know
		// how many builds each daemon of a pool has.
		Internal: !b.named() && !b.solver.pool.several(),
	}
	if cache := b.cache(); cache != nil {
		opt.CacheImports = []client.CacheOptionsEntry{{Type: "registry", Attrs: map[string]string{"ref": cache.String()}}}
		if b.pushes() {
			// What is in no image is compressed by the cache's exporter, and may be in a
			// later one.
			attrs := b.solver.cfg.Compression.attrs()
			maps.Copy(attrs, map[string]string{
				"ref": cache.String(),
				// The results of all stages, as an image: some registries take no other
				// manifest. Without ignore-error the image would not be pushed either.
				"mode": "max", "image-manifest": "true", "oci-mediatypes": "true", "ignore-error": "true",
			})
			opt.CacheExports = []client.CacheOptionsEntry{{Type: "registry", Attrs: attrs}}
		}
	}
	return opt
}

// cache is the image's own tag in the cache repository, or nil.
func (b *build) cache() reference.Named {
	if b.solver.cfg.CacheRepository == nil || len(b.req.Config.References) == 0 {
		return nil
	}
	// Hex digits: a key that no other tenant has, and a tag.
	name := b.req.SharedKey
	if b.partial {
		name += strings.ReplaceAll("-"+b.part.native, "/", "-")
	}
	tag, err := reference.WithTag(b.solver.cfg.CacheRepository, name)
	if err != nil {
		return nil
	}
	return tag
}

// repositories are what the build may push to.
func (b *build) repositories() []reference.Named {
	list := b.req.Config.References
	if cache := b.cache(); cache != nil {
		list = append(slices.Clone(list), cache)
	}
	return list
}

// secrets are the session's: the build's own, and under the id git the header for
// the git host.
func (b *build) secrets(git string) session.Attachable {
	all := make(map[string][]byte)
	maps.Copy(all, b.req.Secrets)
	if git != "" && b.req.GitAuthorization != "" {
		all[git] = []byte(b.req.GitAuthorization)
	}
	return secretsprovider.FromMap(all)
}

func (b *build) frontendAttrs() map[string]string {
	cfg := b.req.Config
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
	if p := b.platforms(); len(p) > 0 {
		attrs["platform"] = strings.Join(p, ",")
	}
	if b.partial {
		// Its steps are named with their platform then.
		attrs["multi-platform"] = "true"
	}
	if cfg.NoCache {
		attrs["no-cache"] = ""
	}
	if cfg.Pull {
		attrs["image-resolve-mode"] = "pull"
	}
	if b.req.Hostname != "" {
		attrs["hostname"] = b.req.Hostname
	}
	if b.req.CacheMountNS != "" {
		attrs["build-arg:BUILDKIT_CACHE_MOUNT_NS"] = b.req.CacheMountNS
	}
	// The frontend takes this for the command line of a foreign one that has
	// already been started, and looks for no syntax line.
	if !b.solver.cfg.AllowSyntax {
		attrs["cmdline"] = "dockerfile.v0"
	}
	return attrs
}

// exporterAttrs name no image that is not pushed, so that the daemon keeps
// nothing of it but its cache. It is exported all the same, for its digest.
func (b *build) exporterAttrs() map[string]string {
	cfg := b.req.Config
	attrs := b.solver.cfg.Compression.attrs()
	for k, v := range cfg.Annotations {
		attrs["annotation."+k] = v
		if len(b.platforms()) > 1 {
			attrs["annotation-index."+k] = v
		}
	}
	if b.pushes() {
		names := make(map[string]bool)
		var list []string
		for _, ref := range cfg.References {
			if name := ref.String(); !names[name] {
				names[name] = true
				list = append(list, name)
			}
		}
		attrs["name"] = strings.Join(list, ",")
		attrs["push"] = "true"
		if b.partial {
			attrs["name"], attrs["push-by-digest"] = b.untagged(), "true"
		}
	}
	return attrs
}

// limits end a build that takes too long. The push has a limit of its own: a
// registry is not the build's fault.
type limits struct {
	build, push, stall time.Duration

	mu     sync.Mutex
	cancel context.CancelCauseFunc
	timer  *time.Timer // of the build, then of the push; nil without one
	silent *time.Timer
	began  time.Time // when the push did
}

func (s *Solver) newLimits() *limits {
	return &limits{build: s.cfg.BuildTimeout, push: s.cfg.PushTimeout, stall: s.cfg.StallTimeout}
}

var (
	errBuildTimeout = errors.New("build_timeout passed")
	errPushTimeout  = errors.New("push_timeout passed")
	errStalled      = errors.New("stall_timeout passed")

	// errOtherPlatform ends the builds beside the one that failed.
	errOtherPlatform = errors.New("another platform failed")
)

func (l *limits) start(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cancel = cancel
	l.building()
	if l.stall > 0 {
		l.silent = time.AfterFunc(l.stall, func() { cancel(errStalled) })
	}
	return ctx, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, t := range []*time.Timer{l.timer, l.silent} {
			if t != nil {
				t.Stop()
			}
		}
		cancel(nil)
	}
}

// building starts the build's timer. It holds l.mu.
func (l *limits) building() {
	l.timer, l.began = nil, time.Time{}
	if l.build > 0 {
		l.timer = time.AfterFunc(l.build, func() { l.cancel(errBuildTimeout) })
	}
}

// again begins anew: what an attempt took is not the next one's.
func (l *limits) again() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.timer != nil {
		l.timer.Stop()
	}
	l.building()
	if l.silent != nil {
		l.silent.Reset(l.stall)
	}
}

// listening is told whether the daemon's next sign is waited for.
func (l *limits) listening(yes bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.silent == nil {
		return
	}
	if l.silent.Stop(); yes {
		l.silent.Reset(l.stall)
	}
}

// pushing is told of every sign of a push; the first one counts.
func (l *limits) pushing() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.began.IsZero() {
		return
	}
	l.began = time.Now()
	// A build timer that has fired has the last word.
	if l.timer != nil && !l.timer.Stop() {
		return
	}
	if l.push > 0 {
		l.timer = time.AfterFunc(l.push, func() { l.cancel(errPushTimeout) })
	}
}

func (l *limits) isPushing() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.began.IsZero()
}

func (l *limits) pushed() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.began.IsZero() {
		return 0
	}
	return time.Since(l.began)
}
