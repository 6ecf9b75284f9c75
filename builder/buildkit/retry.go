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

// verdict is the end of one attempt.
type verdict struct {
	kind    verdictKind
	outcome solve.Outcome // only with done
	err     *api.Error    // nil for done, follow and taken
	daemon  *pool.Daemon  // nil if the attempt found none
}

// verdictKind says what an attempt's end means for the build.
type verdictKind int

const (
	failed    verdictKind = iota // another attempt would fail too
	done                         // the image is built, or was found in a daemon's history
	elsewhere                    // the daemon was lost, or its disk is full and another's is not
	later                        // the registry takes no more requests for now
	follow                       // another replica ran the build
	taken                        // another build has the Ref, mostly one that another replica has just begun
)

// policy has the waits for each kind of verdict. A verdict takes the next wait of its kind, and
// then there is another attempt. If the waits of its kind are used up, or the kind has none, the
// verdict is final. The parts of a build for several architectures count on their own.
//
// For example, a build finds the registry busy, loses its daemon, and finds the registry busy
// again. It waits for 2 s, goes to another daemon at once, and waits for 5 s. If that daemon
// is lost too, the build has failed.
var policy = map[verdictKind][]time.Duration{
	// Building again is safe: the push comes last, and pushing the same image twice
	// changes nothing.
	elsewhere: {0},
	// BuildKit does not pass on a registry's Retry-After.
	later: {2 * time.Second, 5 * time.Second, 15 * time.Second},
	// The next attempt finds the result of the other replica's build, or builds with the next
	// Ref. There are maxRefs Refs.
	follow: slices.Repeat([]time.Duration{0}, maxRefs),
	// The next attempt finds the record of the other build. A busy daemon writes the record
	// seconds after it has accepted the build.
	taken: slices.Repeat([]time.Duration{500 * time.Millisecond}, 2*maxRefs),
}

// earlier is what the attempts before leave to the next one.
type earlier struct {
	prefer *pool.Daemon // has the build's results or its record; nil is none
	avoid  *pool.Daemon // was lost or full; nil is none
	built  *pool.Daemon // has built everything, and only the push is to be repeated; nil is none
}

// run is all attempts at one plan.
type run struct {
	*Solver
	plan   *plan
	log    solve.Log
	warn   func(string)
	limits *limits

	stats    solve.Stats
	progress *report.Progress // of the last attempt that reached a daemon
}

// attemptAll attempts p until a verdict is final. It sets the Stats beside an error too.
func (s *Solver) attemptAll(ctx context.Context, p *plan, log solve.Log) (solve.Outcome, solve.Stats, error) {
	r := &run{Solver: s, plan: p, log: log, warn: warner(log, p.mask), limits: s.newLimits(p.req.Tenant)}
	if !p.part {
		r.limits.told = p.req.Pushing
	}
	r.progress = report.NewProgress(log, p.mask, r.limits)
	ctx, stop := r.limits.start(ctx)
	defer stop()
	outcome, err := r.repeat(ctx, r.attempt)
	r.stats.Steps, r.stats.Cached = r.progress.Counts()
	r.stats.Transfer += r.progress.Transfer()
	r.stats.Push = r.limits.pushed()
	return outcome, r.stats, err
}

// repeat calls try until its verdict is final.
func (r *run) repeat(ctx context.Context, try func(context.Context, earlier) verdict) (solve.Outcome, error) {
	var e earlier
	var moved api.Code // why the build went to another daemon
	used := make(map[verdictKind]int)
	for {
		v := try(ctx, e)
		if v.kind == done {
			return v.outcome, nil
		}
		if ctx.Err() != nil {
			return solve.Outcome{}, r.ended(ctx, v.daemon)
		}
		n, waits := used[v.kind], policy[v.kind]
		if n == len(waits) {
			return solve.Outcome{}, final(v, moved)
		}
		used[v.kind]++
		switch v.kind {
		case elsewhere:
			e = earlier{avoid: v.daemon}
			moved = v.err.Code
			r.plan.logTo(r.cfg.Log).Warn().Err(r.plan.masked(v.err.Err)).Str("daemon", v.daemon.Addr()).Str("code", string(moved)).Msg("solving again")
		case later:
			e.prefer, e.built = v.daemon, v.daemon
		case follow, taken:
			e.prefer = v.daemon
		}
		if text := announcement(v, waits[n]); text != "" {
			r.warn(text)
		}
		if v.kind == elsewhere {
			r.limits.restart()
		}
		select {
		case <-ctx.Done():
			return solve.Outcome{}, r.ended(ctx, v.daemon)
		case <-time.After(waits[n]):
		}
	}
}

// announcement tells the client why there is another attempt. It is empty after follow and taken:
// whoever follows a build says so.
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

// final is the error of the last verdict. moved is why the build went to another daemon before,
// or empty.
func final(v verdict, moved api.Code) error {
	switch {
	case v.kind == follow:
		return &api.Error{Code: api.Internal, Msg: "other replicas have begun this build too often", Err: fmt.Errorf("followed %d builds", len(policy[follow])+1)}
	case v.kind == taken:
		return &api.Error{Code: api.Internal, Msg: "this build runs already, and its buildkitd has no record of it", Err: fmt.Errorf("the Ref was taken in %d attempts", len(policy[taken])+1)}
	case v.err.Code == api.NoDaemon && moved == api.DaemonLost:
		return &api.Error{Code: api.NoDaemon, Msg: "buildkitd was lost while building, and cannot be reached again", Err: v.err.Err}
	case v.err.Code == api.NoDaemon && moved == api.DaemonFull:
		return &api.Error{Code: api.NoDaemon, Msg: "buildkitd has no space left on its disk, and no other can be reached", Err: v.err.Err}
	}
	return v.err
}

// ended is the error of a build whose ctx has ended. A daemon that made no progress gets
// builds for a while only where no other takes them.
func (r *run) ended(ctx context.Context, at *pool.Daemon) error {
	if cause := context.Cause(ctx); errors.Is(cause, errStalled) && at != nil {
		r.plan.pool.MarkStalled(at, cause)
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
