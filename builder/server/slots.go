package server

import (
	"context"
	"errors"
	"time"

	"handler/function/api"
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

// take takes a slot. Its error is full if none becomes free within wait. It waits no longer
// once the server shuts down.
func (s *Server) take(ctx context.Context, from slots, wait time.Duration, full *api.Error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.draining, func() { cancel(errShuttingDown) })()
	switch err := from.acquire(ctx, wait); {
	case err == nil:
		return nil
	case errors.Is(err, errFull):
		return full
	default:
		return canceled(err)
	}
}
