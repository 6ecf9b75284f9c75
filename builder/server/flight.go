package server

import (
	"context"
	"crypto/sha256"
	"slices"
	"sync"
	"time"

	"handler/function/api"
	"handler/function/reply"
)

// flight is one build, and all the calls that wait for it. A queue delivers a request
// again if the answer takes too long; the second delivery joins the flight of the first,
// so that the image is not built twice.
type flight struct {
	id     flightID
	tenant string // a signer's tenantID
	call   *call  // the first one
	ctx    context.Context
	cancel context.CancelCauseFunc
	done   chan struct{} // closed once verdict is set

	mu        sync.Mutex
	image     string
	waiters   []*waiter
	excerpt   reply.Excerpt // the log for later calls; kept only for a named flight
	abandoned bool          // the last waiter has left, and the build is being cancelled

	// Set before done is closed, and not changed after it.
	verdict api.Record
	ended   time.Time
}

// flightID is what a second delivery has in common with the first. The call id alone is
// not enough: any caller can choose one. Nobody joins a flight with the zero flightID.
type flightID struct {
	tenant string // its id
	key    string // a signer's ownKey
	call   string // X-Call-Id
	body   [sha256.Size]byte
}

// isOf says whether the flight is the signer's.
func (id flightID) isOf(by signer) bool {
	return id.tenant == by.id() && id.key == string(by.ownKey())
}

// waiter is one call that waits for a flight.
type waiter struct {
	out      *reply.Writer
	afterEnd bool          // it came after the end
	gone     chan struct{} // closed when out takes no more
	wasLast  bool          // nobody else was left; set before gone is closed
}

func newFlight(c *call, body *upload) *flight {
	f := &flight{tenant: body.tenantID(), call: c, done: make(chan struct{})}
	// Not the request's context: the build is for every call that joins the flight.
	f.ctx, f.cancel = context.WithCancelCause(context.Background())
	if c.mayJoin() {
		// There is no sum if the body could not be stored. Then no other body can be
		// compared with it.
		if sum, ok := body.SHA256(); ok {
			f.id = flightID{tenant: body.id(), key: string(body.ownKey()), call: c.id, body: sum}
		}
	}
	return f
}

// named says whether a later call can join the flight.
func (f *flight) named() bool { return f.id != flightID{} }

// run builds, and gives the flight its verdict. It returns soon after the verdict.
func (s *Server) run(f *flight, body *upload) {
	defer s.active.Done()
	defer f.cancel(nil)
	j := &job{flight: f, body: body, log: f.call.log.With().Int64("bytes", body.Size()).Logger()}
	// Nothing needs the sum before the verdict, and summing a large body takes a while.
	j.aside.Go(func() { body.request() })

	defer s.working(f.tenant, f.cancel)()

	res := s.build(j)
	res.err = s.shares.busy(res.err, body.share)
	rec := res.record(f.image)
	rec.Request = body.request()
	took := time.Since(f.call.start)
	if !j.slot.IsZero() {
		j.built = max(time.Since(j.slot)-res.stats.Push, 0)
	}
	s.metrics.Built(f.tenant, rec.Status, rec.Code, took, res.stats)
	f.end(rec)
	s.flights.end(f)
	j.aside.Wait()
	body.Close()
	j.logEnd(rec, res, took)
	j.logUsage(rec, res.stats)
}

// join adds a call, and gives it the log so far. It fails once the last waiter has
// left.
func (f *flight) join(out *reply.Writer) (*waiter, bool) {
	w := &waiter{out: out, gone: make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.abandoned {
		return nil, false
	}
	out.SetImage(f.image)
	select {
	case <-f.done:
		w.afterEnd = true
		return w, true
	default:
	}
	f.waiters = append(f.waiters, w)
	// This does not block: a new Writer has room.
	if lines := f.excerpt.Lines(); len(lines) > 0 {
		out.Log(f.ctx, lines...)
	}
	return w, true
}

// leave removes a waiter. If no other is left, leave cancels the build.
func (f *flight) leave(w *waiter, cause error) (last bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.Index(f.waiters, w)
	if i < 0 {
		return false
	}
	f.waiters = slices.Delete(f.waiters, i, i+1)
	if len(f.waiters) > 0 {
		return false
	}
	f.abandoned = true
	f.cancel(canceled(cause))
	return true
}

// wait returns the flight's verdict, or the reason why this call does not see it. The last
// waiter to leave waits until the build has ended, so that a build never outlives its
// calls.
func (f *flight) wait(ctx context.Context, w *waiter) api.Record {
	last := false
	select {
	case <-f.done:
		if w.afterEnd {
			return f.replay()
		}
		return f.verdict
	case <-ctx.Done():
		last = f.leave(w, context.Cause(ctx))
	case <-w.gone:
		last = w.wasLast
	}
	if !last {
		return failedRecord(api.AsError(canceled(context.Cause(ctx))), "")
	}
	<-f.done
	return f.verdict
}

// say passes log lines on to every waiter. Only the goroutine that builds calls it.
func (f *flight) say(lines ...string) {
	f.mu.Lock()
	if f.named() {
		for _, line := range lines {
			f.excerpt.Add(line)
		}
	}
	waiters := slices.Clone(f.waiters)
	f.mu.Unlock()
	for _, w := range waiters {
		if err := w.out.Log(f.ctx, lines...); err != nil && f.ctx.Err() == nil {
			w.wasLast = f.leave(w, err)
			close(w.gone)
		}
	}
}

func (f *flight) setImage(image string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.image = image
	for _, w := range f.waiters {
		w.out.SetImage(image)
	}
}

// end gives the flight its verdict, which has no log: the waiters have seen the log,
// and replay adds it for later calls.
func (f *flight) end(verdict api.Record) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.verdict, f.ended = verdict, time.Now()
	f.waiters = nil
	close(f.done)
}

// current is the verdict for a call that only asks, or a record of a build that still runs.
func (f *flight) current() api.Record {
	select {
	case <-f.done:
		return f.replay()
	default:
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return api.Record{Status: api.InProgress, Image: f.image, ImageName: f.image, Duration: time.Since(f.call.start).Seconds()}
}

// replay is the verdict for a call that came after the end.
func (f *flight) replay() api.Record {
	rec := f.verdict
	rec.Log = f.excerpt.Lines()
	rec.Duration = f.ended.Sub(f.call.start).Seconds()
	return rec
}

// size is what an ended flight takes of keepBytes.
func (f *flight) size() int {
	n := f.excerpt.Size() + len(f.verdict.Error)
	for _, w := range f.verdict.Warnings {
		n += len(w)
	}
	return n
}
