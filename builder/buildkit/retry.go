package buildkit

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"handler/function/api"
	"handler/function/buildkit/pool"
	"handler/function/buildkit/report"
	"handler/function/solve"
)

// verdict is what one attempt came to.
type verdict struct {
	kind    kind
	outcome solve.Outcome // of done
	err     *api.Error    // nil of done and follow
	daemon  *pool.Daemon  // nil if the attempt found none
}

// kind says what a verdict means for the build.
type kind int

const (
	failed    kind = iota // another attempt would come to the same
	done                  // it is built, or was found in a daemon's history
	elsewhere             // the daemon was lost, or its disk is full and another's is not
	later                 // the registry takes no more requests for now
	follow                // another replica runs the build, or has just ended it
)

// policy says how often a build is attempted again after a verdict of each kind, and how long
// it waits before each of these attempts. When they are used up, and for every other kind,
// the verdict is final.
//
// For example, a build finds the registry busy, loses its daemon, and finds the registry busy
// again. It waits for 2 s, goes to another daemon at once, and waits for 5 s. If that daemon
// is lost too, the build has failed.
var policy = map[kind][]time.Duration{
	// The push comes last, so that no attempt does anything twice.
	elsewhere: {0},
	// BuildKit does not pass on a registry's Retry-After.
	later: {2 * time.Second, 5 * time.Second, 15 * time.Second},
	// The next attempt follows the other replica's build, or finds its result.
	follow: slices.Repeat([]time.Duration{0}, maxRefs),
}

// run is all attempts at one plan.
type run struct {
	*Solver
	plan   *plan
	log    solve.Log
	warn   func(string)
	limits *limits

	stats    solve.Stats
	progress *report.Progress // of the last attempt that had any
}

// attemptAll attempts p until a verdict is final. Its Stats are also set beside an error.
func (s *Solver) attemptAll(ctx context.Context, p *plan, log solve.Log) (solve.Outcome, solve.Stats, error) {
	r := &run{Solver: s, plan: p, log: log, warn: warner(log, p.mask), limits: s.newLimits()}
	r.progress = report.NewProgress(log, p.mask, r.limits)
	ctx, stop := r.limits.start(ctx)
	defer stop()
	outcome, err := r.all(ctx, r.attempt)
	r.stats.Steps, r.stats.Cached = r.progress.Counts()
	r.stats.Transfer += r.progress.Transfer()
	r.stats.Push = r.limits.pushed()
	return outcome, r.stats, err
}

// all calls attempt until its verdict is final. attempt gets the daemon to avoid, or nil.
func (r *run) all(ctx context.Context, attempt func(context.Context, *pool.Daemon) verdict) (solve.Outcome, error) {
	var avoid *pool.Daemon
	again := make(map[kind]int) // attempts after a verdict of the kind
	for {
		v := attempt(ctx, avoid)
		if v.kind == done {
			return v.outcome, nil
		}
		if ctx.Err() != nil {
			return solve.Outcome{}, r.ended(ctx, v.daemon)
		}
		n, waits := again[v.kind], policy[v.kind]
		if n == len(waits) {
			return solve.Outcome{}, final(v, avoid)
		}
		again[v.kind]++
		if v.kind == elsewhere {
			avoid = v.daemon
			r.limits.again()
			r.cfg.Log.Warn().Err(r.plan.masked(v.err.Err)).Str("call_id", r.plan.req.ID).Str("daemon", avoid.Addr()).Str("code", string(v.err.Code)).Msg("solving again")
		}
		if text := announcement(v, waits[n]); text != "" {
			r.warn(text)
		}
		select {
		case <-ctx.Done():
			return solve.Outcome{}, r.ended(ctx, v.daemon)
		case <-time.After(waits[n]):
		}
	}
}

// announcement tells the client why there is another attempt. It is empty after follow, which
// has told it already.
func announcement(v verdict, wait time.Duration) string {
	switch {
	case v.kind == later:
		return fmt.Sprintf("the registry takes no more requests for now: pushing again in %v", wait)
	case v.kind == elsewhere && v.err.Code == api.DaemonFull:
		return "buildkitd has no space left on its disk: building on another"
	case v.kind == elsewhere:
		return "the connection to buildkitd was lost: building again"
	}
	return ""
}

// final is the error of the last verdict. lost is the daemon that an earlier attempt was
// lost on, or nil.
func final(v verdict, lost *pool.Daemon) error {
	switch {
	case v.kind == follow:
		return &api.Error{Code: api.Internal, Msg: "other replicas have begun this build too often", Err: errors.New("every Ref is taken")}
	case v.err.Code == api.NoDaemon && lost != nil:
		return &api.Error{Code: api.NoDaemon, Msg: "buildkitd was lost while building, and cannot be reached again", Err: v.err.Err}
	}
	return v.err
}

// ended is the error of a build whose ctx has ended. A daemon that made no progress gets no
// builds for a while.
func (r *run) ended(ctx context.Context, at *pool.Daemon) error {
	if cause := context.Cause(ctx); errors.Is(cause, errStalled) && at != nil {
		r.pool.Stalled(at, cause)
	}
	return r.limits.ended(ctx, r.progress.Running())
}

// masked is err for the function's own log.
func (p *plan) masked(err error) error {
	if err == nil {
		return nil
	}
	return errors.New(p.mask.Text(err.Error()))
}
