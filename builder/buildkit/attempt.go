package buildkit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/session"

	"handler/function/api"
	"handler/function/buildkit/pool"
	"handler/function/buildkit/report"
	"handler/function/buildkit/sources"
)

// attempt is one solve of a plan on one daemon. It owns its seat, its Ref and its credentials,
// and gives the seat up.
//
// The Ref is new for each attempt. BuildKit refuses a Ref while a build with it runs. For a Ref
// whose build has ended, it would show that build's progress again.
type attempt struct {
	*run
	seat  *pool.Seat
	ref   string
	built bool // the daemon has built everything in an earlier attempt
	auths *authServer
	git   *gitSource // nil for a context that is sent

	answered chan struct{} // closed when the solve's RPC has ended
	rpcErr   error         // of the solve's RPC; set before answered is closed
	foreign  bool          // the gateway was another build's until the end
}

// attempt finds a daemon and has it solve the plan. If the daemon knows the build's name, the
// attempt takes the result from its history, or follows the build that runs.
func (r *run) attempt(ctx context.Context, e earlier) verdict {
	prefer := cmp.Or(r.findHolder(ctx), e.prefer)
	seat, err := r.plan.pool.Place(ctx, r.plan.key(), prefer, e.avoid)
	if err != nil {
		return verdict{err: api.AsError(err)}
	}
	r.stats.Daemon, r.stats.Choice = seat.Daemon.Addr(), seat.Choice
	r.stats.Moved = e.avoid != nil && e.avoid != seat.Daemon
	ref := r.plan.newRef()
	if r.plan.named() {
		known, next, err := recall(ctx, seat, r.plan)
		switch {
		case err != nil && (ctx.Err() != nil || seat.Broke(err)):
			return brokenOff(ctx, seat, err)
		case err != nil:
			// The daemon answers, and its history does not. A second build does no harm.
			r.plan.logTo(r.cfg.Log).Warn().Err(err).Str("daemon", seat.Daemon.Addr()).Msg("building without a look into the history")
		case known == nil:
			ref = next
		case known.Running():
			return r.follow(ctx, seat, known.Ref)
		default:
			seat.Leave()
			r.placed(seat.Daemon, known.Ref)
			return verdict{kind: done, outcome: r.plan.outcome(seat.Daemon, known.Digest), daemon: seat.Daemon}
		}
	}
	if r.stats.Attempts++; r.stats.Attempts == 1 {
		r.warnEmulated(seat.Daemon)
	}
	r.placed(seat.Daemon, ref)
	r.newProgress()
	a := &attempt{
		run: r, seat: seat, ref: ref, built: e.built == seat.Daemon, auths: newAuthServer(r.plan.grant()),
		answered: make(chan struct{}),
	}
	if git := r.plan.req.Config.Git; git != nil && r.plan.joins == nil {
		a.git = &gitSource{Git: git, secret: identity.NewID()}
	}
	return a.solve(ctx)
}

// placed tells where the attempt is.
func (r *run) placed(on *pool.Daemon, ref string) {
	if r.plan.req.Placed != nil {
		r.plan.req.Placed(on.Addr(), ref)
	}
}

// newProgress is for the solve that begins. The transfers of the last one stay counted.
func (r *run) newProgress() {
	r.stats.Transfer += r.progress.Transfer()
	r.progress = report.NewProgress(r.log, r.plan.mask, r.limits)
}

// brokenOff gives the seat up: its daemon no longer answers. If ctx has ended, the connection stays,
// and of the verdict only the daemon is read: run.ended takes out a daemon that has stalled.
func brokenOff(ctx context.Context, seat *pool.Seat, cause error) verdict {
	if ctx.Err() != nil {
		seat.Leave()
		return verdict{err: api.AsError(cause), daemon: seat.Daemon}
	}
	seat.Lost(cause)
	return verdict{kind: elsewhere, daemon: seat.Daemon, err: &api.Error{
		Code: api.DaemonLost, Msg: "buildkitd was lost during the build, and the build had already begun a second time", Err: cause,
	}}
}

// follow shows the progress of another replica's build until it has ended.
func (r *run) follow(ctx context.Context, seat *pool.Seat, ref string) verdict {
	r.warn("this build runs already: following it")
	r.placed(seat.Daemon, ref)
	r.newProgress()
	updates := make(chan *client.SolveStatus)
	var drained sync.WaitGroup
	drained.Go(func() { r.progress.Drain(ctx, updates) })
	err := seat.Watch(ctx, ref, updates, r.limits.pause)
	drained.Wait()
	if err != nil {
		return brokenOff(ctx, seat, err)
	}
	seat.Leave()
	r.limits.restart()
	return verdict{kind: follow, daemon: seat.Daemon}
}

// taken gives the seat up: another build has the Ref.
func (a *attempt) taken() verdict {
	a.seat.Leave()
	a.limits.restart()
	return verdict{kind: taken, daemon: a.seat.Daemon}
}

func (a *attempt) solve(ctx context.Context) verdict {
	solving, forget, err := a.seat.Await(ctx, a.ref, func(err error) {
		a.limits.pause()
		a.rpcErr = err
		close(a.answered)
	})
	if err != nil {
		return a.taken()
	}
	status := make(chan *client.SolveStatus)
	var drained sync.WaitGroup
	drained.Go(func() { a.progress.Drain(ctx, status) })
	resp, err := a.put(solving, status)
	forget()
	drained.Wait()
	a.limits.resume()
	if a.foreign && a.rpcErr != nil {
		err = fmt.Errorf("failed to solve: %w", a.rpcErr) // put only says that it was canceled
	}
	switch {
	case errors.Is(a.rpcErr, pool.ErrTaken) && ctx.Err() == nil:
		return a.taken()
	case err == nil:
		a.measure(ctx, resp)
		a.seat.Worked()
		outcome := a.plan.outcome(a.seat.Daemon, resp.ExporterResponse["containerimage.digest"])
		if a.git != nil {
			outcome.Commit = a.git.commit
		}
		return verdict{kind: done, outcome: outcome, daemon: a.seat.Daemon}
	case ctx.Err() != nil, a.seat.Broke(err):
		return brokenOff(ctx, a.seat, err)
	}
	return a.failed(ctx, err)
}

// measure notes the size of a tenant's image. The sizes of parts are added up, and an index of
// them has nothing more.
func (a *attempt) measure(ctx context.Context, resp *client.SolveResponse) {
	if a.plan.req.Tenant == nil || !a.plan.pushes() || a.plan.joins != nil {
		return
	}
	size, err := imageSize(ctx, a.seat.Client(), resp)
	if err != nil {
		a.plan.logTo(a.cfg.Log).Warn().Err(err).Msg("the size of an image is not known")
	}
	a.stats.Pushed = size
}

// put hands the plan to the daemon, in one of three forms.
func (a *attempt) put(ctx context.Context, status chan *client.SolveStatus) (*client.SolveResponse, error) {
	c, opt := a.seat.Client(), a.solveOpt()
	switch {
	case a.plan.joins != nil:
		a.limits.Pushing() // joining only asks the registry
		opt, join := joining(opt, a.plan)
		return a.build(ctx, opt, join, status)
	case a.git != nil:
		opt, build := a.git.building(opt)
		return a.build(ctx, opt, build, status)
	}
	return c.Solve(ctx, nil, opt, status)
}

func (a *attempt) solveOpt() client.SolveOpt {
	opt := a.plan.solveOpt(a.ref, a.auths)
	// Internal keeps a build out of the daemon's history, where its build arguments would
	// stay in the clear as long as the record. The record takes a quarter of a cached
	// build's time, too. But a named build has to be found there. And replicas that cannot tell
	// each other their builds count a daemon's builds by its records.
	opt.Internal = !a.plan.named() && !a.plan.pool.Counts()
	if a.built {
		// noCache asks for new results. The daemon has them, from the attempt before.
		delete(opt.FrontendAttrs, "no-cache")
	}
	if a.git != nil {
		opt.LocalMounts = nil
		opt.Session = []session.Attachable{a.auths, a.plan.secrets(a.git.secret)}
	}
	return opt
}

// failed is the verdict of a solve that ended with err, while its daemon stayed reachable.
func (a *attempt) failed(ctx context.Context, err error) verdict {
	f := &report.Failure{
		Err: err, Progress: a.progress, Mask: a.plan.mask, Pushing: a.progress.Pushing() || a.plan.joins != nil,
		Refused: a.auths.failed(), Anonymous: a.auths.grant.Anonymous(), Hints: a.auths.grant.Hints(),
	}
	if d := cmp.Or(a.plan.sources.Denied(err), a.unresolved(err)); d != nil {
		name, dockerfile := a.plan.files.Dockerfile(a.plan.req.Config.Dockerfile)
		f.Denied, f.DeniedAt = d.Err, d.In(name, dockerfile, a.plan.req.Config.BuildArgs)
	}
	if a.progress.MayBeFull(err) {
		f.Full = a.seat.CannotWrite(ctx)
	}
	a.seat.Worked()
	v := verdict{daemon: a.seat.Daemon}
	if a.git != nil && a.git.err != nil && !f.Full && f.Denied == nil {
		v.err = a.git.failure(a.plan.mask.Line)
		return v
	}
	if refused := a.plan.files.Refused(); refused != nil {
		e := api.AsError(refused)
		v.err = &api.Error{Code: e.Code, Msg: a.plan.mask.Line(e.Msg), Err: err}
		return v
	}
	var registryBusy bool
	v.err, registryBusy = f.Classify()
	if f.Full {
		a.plan.pool.MarkFull(a.seat.Daemon, a.plan.masked(v.err))
	}
	switch {
	case registryBusy:
		v.kind = later
	case v.err.Code == api.DaemonFull && a.plan.pool.HasRoom(ctx, a.plan.key(), a.seat.Daemon):
		v.kind = elsewhere
	}
	return v
}

// unresolved is a source of the Dockerfile that err is about, or nil. An error of the git context
// has words of its own.
func (a *attempt) unresolved(err error) *sources.Denial {
	if a.git != nil && a.git.err != nil {
		return nil
	}
	return a.plan.sources.Unresolved(err)
}

// warnEmulated tells which platforms the daemon builds under emulation.
func (r *run) warnEmulated(d *pool.Daemon) {
	native := d.Native()
	if native == "" || r.plan.joins != nil {
		return
	}
	for _, p := range r.plan.platforms {
		if !runsNatively(native, p) {
			r.warn(fmt.Sprintf("%s is built under emulation, by a buildkitd of %s", p, native))
		}
	}
}
