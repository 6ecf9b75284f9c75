package buildkit

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"handler/function/api"
	"handler/function/solve"
)

// limits cancel a plan's context when its build, its push or the daemon's silence takes too
// long. The push has a limit of its own, because a slow registry is not the build's fault.
// limits are a report.Watch.
type limits struct {
	build, push, stall time.Duration // zero is no limit

	mu     sync.Mutex
	cancel context.CancelCauseFunc
	timer  *time.Timer   // of the build, later of the push; nil without a limit
	due    time.Time     // when timer fires
	cause  error         // timer cancels with this cause
	paused time.Time     // when the time was stopped; zero while it runs
	left   time.Duration // what timer gets at resume; zero is no limit
	silent *time.Timer   // runs while a message is waited for; nil without a limit
	began  time.Time     // when the push began

	told func(pushing bool) // a solve.Request.Pushing
}

// newLimits are those of a build. t may be nil. A timeout in t replaces the installation's: the
// caller has taken the lesser of the two.
func (s *Solver) newLimits(t *solve.Tenant) *limits {
	l := &limits{build: s.cfg.BuildTimeout, push: s.cfg.PushTimeout, stall: s.cfg.StallTimeout}
	if t != nil && t.BuildTimeout > 0 {
		l.build = t.BuildTimeout
	}
	return l
}

// Causes of a context that limits end.
var (
	errBuildTimeout = errors.New("build_timeout passed")
	errPushTimeout  = errors.New("push_timeout passed")
	errStalled      = errors.New("stall_timeout passed")
)

// start begins the build's time. The caller must call stop.
func (l *limits) start(ctx context.Context) (limited context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cancel = cancel
	l.building()
	if l.stall > 0 {
		l.silent = time.AfterFunc(l.stall, func() { cancel(errStalled) })
		l.silent.Stop()
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

// building starts the build's timer. The caller must hold l.mu.
func (l *limits) building() {
	l.timer, l.paused, l.began = nil, time.Time{}, time.Time{}
	if l.build > 0 {
		l.run(l.build, errBuildTimeout)
	}
}

// run starts timer. The caller must hold l.mu.
func (l *limits) run(d time.Duration, cause error) {
	l.due, l.cause = time.Now().Add(d), cause
	l.timer = time.AfterFunc(d, func() { l.cancel(cause) })
}

// pause stops the time until resume or restart: the daemon has ended the solve, and its reader
// takes the rest of the progress at a pace of its own.
func (l *limits) pause() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.isPaused() || l.timer != nil && !l.timer.Stop() {
		return // a limit that has passed ends the build
	}
	l.paused, l.left = time.Now(), 0
	if l.timer != nil {
		l.left = max(time.Until(l.due), 1)
	}
	if l.silent != nil {
		l.silent.Stop()
	}
}

// resume lets the time go on, for another attempt.
func (l *limits) resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.isPaused() {
		return
	}
	if !l.began.IsZero() {
		l.began = l.began.Add(time.Since(l.paused)) // the push did not take this time
	}
	if l.left > 0 {
		l.run(l.left, l.cause)
	}
	l.paused = time.Time{}
}

func (l *limits) isPaused() bool { return !l.paused.IsZero() }

// restart gives the next attempt all of the time.
func (l *limits) restart() {
	l.mu.Lock()
	if l.timer != nil {
		l.timer.Stop()
	}
	anew := !l.began.IsZero()
	l.building()
	l.mu.Unlock()
	if anew && l.told != nil {
		l.told(false)
	}
}

// Listening has the stall timer run while the daemon's next message is waited for.
func (l *limits) Listening(yes bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.silent == nil {
		return
	}
	if l.silent.Stop(); yes && !l.isPaused() {
		l.silent.Reset(l.stall)
	}
}

// Pushing replaces the build's timer with that of the push. The first call counts.
func (l *limits) Pushing() {
	if l.beginPush() && l.told != nil {
		l.told(true)
	}
}

// beginPush returns false if the push had begun before.
func (l *limits) beginPush() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.began.IsZero() {
		return false
	}
	if l.isPaused() {
		// The solve has ended, and the progress that tells of its push is late.
		l.began, l.left, l.cause = l.paused, l.push, errPushTimeout
		if l.push == 0 {
			l.timer = nil
		}
		return true
	}
	l.began = time.Now()
	if l.timer != nil && !l.timer.Stop() {
		return true // a limit that has passed ends the build
	}
	l.timer = nil
	if l.push > 0 {
		l.run(l.push, errPushTimeout)
	}
	return true
}

// pushed is how long the push has taken so far. It is 0 before the push.
func (l *limits) pushed() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.began.IsZero() {
		return 0
	}
	return time.Since(l.began)
}

// ended is the error of a build whose ctx has ended, by a limit or by the caller of Solve. at
// is the step that it was at, or empty.
func (l *limits) ended(ctx context.Context, at string) *api.Error {
	cause := context.Cause(ctx)
	if at != "" {
		at = "; it was at " + at
	}
	switch {
	case errors.Is(cause, errBuildTimeout):
		return &api.Error{Code: api.Deadline, Msg: fmt.Sprintf("the build did not end within %v (build_timeout)%s", l.build, at)}
	case errors.Is(cause, errStalled):
		return &api.Error{Code: api.Stalled, Msg: fmt.Sprintf("buildkitd reported no progress for %v (stall_timeout)%s", l.stall, at)}
	case errors.Is(cause, errPushTimeout):
		return &api.Error{Code: api.RegistryTimeout, Msg: fmt.Sprintf("the push did not end within %v (push_timeout)", l.push)}
	}
	return endedByCaller(cause)
}

// endedByCaller is the error of a build whose context was ended with cause.
func endedByCaller(cause error) *api.Error {
	if e, ok := errors.AsType[*api.Error](cause); ok {
		return e
	}
	if errors.Is(cause, context.DeadlineExceeded) {
		return &api.Error{Code: api.Deadline, Msg: "the deadline passed", Err: cause}
	}
	return &api.Error{Code: api.Canceled, Msg: "the build was canceled", Err: cause}
}
