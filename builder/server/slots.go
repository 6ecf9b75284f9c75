package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"handler/function/api"
	"handler/function/fair"
	"handler/function/records"
)

// slots bounds how many goroutines do the same thing at once. Goroutines get a slot in the
// order in which they began to wait.
type slots chan struct{}

var errFull = errors.New("no slot became free in time")

// acquire takes a slot. Its error is errFull if none becomes free within wait, or ctx's
// cause.
func (s slots) acquire(ctx context.Context, wait time.Duration) error {
	select {
	case s <- struct{}{}:
		return nil
	default:
	}
	if wait <= 0 {
		return errFull
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case s <- struct{}{}:
		return nil
	case <-timer.C:
		return errFull
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s slots) release() { <-s }

// untilShutdown returns a context that also ends once the server shuts down. The caller must
// call stop.
func (s *Server) untilShutdown(ctx context.Context) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	unhook := context.AfterFunc(s.draining, func() { cancel(errShuttingDown) })
	return ctx, func() { unhook(); cancel(nil) }
}

// fairTenant is what a tenant may have of the build slots. Without a file there is one tenant, who
// may have all.
func (s *Server) fairTenant(by signer) fair.Tenant {
	if !by.file() {
		return fair.Tenant{ID: by.id()}
	}
	t := by.tenant
	return fair.Tenant{
		ID: t.ID, Weight: t.Weight, Most: t.Builds, Queue: t.Queue,
		Elsewhere: t.Builds > 0 && (s.Elsewhere != nil || s.Solver.Counted(t.Pool)),
	}
}

// countTimeout bounds a count of what other replicas build for tenants.
const countTimeout = 2 * time.Second

// countElsewhere is a fair.Slots.Elsewhere. If not all replicas have told what they have, the
// daemons are asked, and the higher of both counts: neither need know of all builds.
func (s *Server) countElsewhere(ctx context.Context) func(tenant string) int {
	var told records.Load
	if s.Elsewhere != nil {
		told = s.Elsewhere()
	}
	switch {
	case told.Complete && told.Others == 0:
		return nil
	case told.Complete:
		return func(tenant string) int { return told.Tenants[tenant] }
	}
	ctx, cancel := context.WithTimeout(ctx, countTimeout)
	defer cancel()
	counted := s.Solver.Running(ctx)
	return func(tenant string) int { return max(told.Tenants[tenant], counted(tenant)) }
}

// noSlot is the error of a build that got no slot. waits says that its caller waited for one.
func (s *Server) noSlot(err error, t fair.Tenant, waits bool) error {
	var e *api.Error
	switch {
	case errors.Is(err, fair.ErrQueue):
		return &api.Error{Code: api.TenantBusy, Msg: fmt.Sprintf("%d builds of the tenant wait for a slot, and its queue allows no more", t.Queue)}
	case errors.Is(err, fair.ErrMost):
		e = &api.Error{Code: api.TenantBusy, Msg: fmt.Sprintf("%d builds of the tenant are running, and its builds allows no more", t.Most)}
	case errors.Is(err, fair.ErrFull):
		e = &api.Error{Code: api.Busy, Msg: fmt.Sprintf("%d builds are running, and max_builds allows no more", s.MaxBuilds)}
	default:
		return canceled(err)
	}
	if waits {
		e.Code = api.QueueTimeout
		e.Msg += "; queue_wait has passed"
	}
	return e
}
