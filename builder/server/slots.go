package server

import (
	"context"
	"errors"
	"time"

	"handler/function/api"
)

// slots bounds how many do a thing at once. Those who wait are served in the
// order they came.
type slots chan struct{}

var errFull = errors.New("no slot became free in time")

// acquire takes a slot, waiting at most wait for it. It returns errFull, or
// ctx's cause.
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

// take takes one of the slots within wait, or returns full.
func (s *Server) take(ctx context.Context, from slots, wait time.Duration, full *api.Error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Waiting longer than the process lives is of no use.
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
