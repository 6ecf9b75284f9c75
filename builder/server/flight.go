package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"sync"
	"time"

	"handler/function/api"
	"handler/function/records"
	"handler/function/reply"
)

// flight is one build, and all the calls that wait for it. A queue delivers a request
// again if the answer takes too long; the second delivery joins the flight of the first,
// so that the image is not built twice.
type flight struct {
	id     flightID
	tenant string // a signer's tenantID
	owner  string // a signer's owner
	call   *call  // the first one
	ctx    context.Context
	cancel context.CancelCauseFunc
	done   chan struct{} // closed once verdict is set
	record records.Build // nil until the build begins here

	mu        sync.Mutex
	image     string
	waiters   []*waiter
	excerpt   reply.Excerpt // the log for later calls; kept only for a named flight
	abandoned bool          // the last waiter has left, and the build is being cancelled
	stopped   bool          // somebody has asked for the build's end
	pushing   bool          // the push has begun, and is let finish

	verdict api.Record // set before done is closed, and not changed after it
}

// flightID is what a second delivery has in common with the first. The call id alone is
// not enough: any caller can choose one. Nobody joins a flight with the zero flightID.
type flightID struct {
	tenant string // its id
	key    string // a signer's ownKey
	call   string // X-Call-Id
	body   [sha256.Size]byte
}

// waiter is one call that waits for a flight.
type waiter struct {
	out     *reply.Writer
	gone    chan struct{} // closed when out takes no more
	wasLast bool          // nobody else was left; set before gone is closed
}

func newFlight(c *call, body *upload) *flight {
	f := &flight{tenant: body.tenantID(), owner: body.owner(), call: c, done: make(chan struct{})}
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

// run gives the flight its verdict: that of an earlier delivery, or that of the build. It returns
// soon after the verdict.
func (s *Server) run(f *flight, body *upload) {
	defer s.active.Done()
	defer f.cancel(nil)
	defer s.working(f.tenant, f.cancel)()
	if f.named() && s.retell(f, body.signer) {
		s.flights.end(f)
		body.Close()
		return
	}
	s.beginRecord(f)
	j := &job{flight: f, body: body, log: f.call.log.With().Int64("bytes", body.Size()).Logger()}
	// Nothing needs the sum before the verdict, and summing a large body takes a while.
	j.aside.Go(func() {
		sum := body.request()
		f.record.Update(func(r *records.Record) { r.Request = sum })
	})

	res := s.build(j)
	res.err = s.shares.busy(res.err, body.share)
	rec := res.record(f.image)
	rec.Request = body.request()
	took := time.Since(f.call.start)
	if !j.slot.IsZero() {
		j.built = max(time.Since(j.slot)-res.stats.Push, 0)
	}
	s.metrics.Built(f.tenant, rec.Status, rec.Code, took, res.stats)
	last := rec
	last.Duration, last.Error = took.Seconds(), res.kept.Text(last.Error)
	last.Warnings = slices.Clone(last.Warnings) // the caller's stay as they are
	for i, w := range last.Warnings {
		last.Warnings[i] = res.kept.Text(w)
	}
	f.record.End(last)
	f.end(rec)
	s.flights.end(f)
	j.aside.Wait()
	body.Close()
	j.logEnd(rec, res, took)
	j.logUsage(rec, res.stats)
}

// beginRecord gives a flight its record.
func (s *Server) beginRecord(f *flight) {
	r := records.Record{Tenant: f.owner, ID: f.call.id, Began: f.call.start, Queued: f.call.queued}
	if f.named() {
		r.Request = hex.EncodeToString(f.id.body[:])
	}
	f.record = s.Records.Begin(r, f.stop)
	s.flights.built(f)
}

var errStopped = &api.Error{Code: api.Canceled, Msg: "the build was stopped by request (DELETE /builds/…)"}

// stop ends the build for whoever has asked for its end. A push that has begun is let finish: half
// of it may be in the registry.
func (f *flight) stop(by string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.stopped {
		f.call.log.Info().Str("by", by).Bool("pushing", f.pushing).Msg("build told to stop")
	}
	f.stopped = true
	if !f.pushing {
		f.cancel(errStopped)
	}
}

// setPushing says whether the build pushes. A build that begins anew does not.
func (f *flight) setPushing(yes bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pushing = yes
	if f.stopped && !yes {
		f.cancel(errStopped)
	}
}

// join adds a call, and gives it the log so far. It fails once the last waiter has left, or the
// flight has its verdict.
func (f *flight) join(out *reply.Writer) (*waiter, bool) {
	w := &waiter{out: out, gone: make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case <-f.done:
		return nil, false
	default:
	}
	if f.abandoned {
		return nil, false
	}
	out.SetImage(f.image)
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

// say adds log lines to the record, and passes them on to every waiter. Only the goroutine that
// builds calls it. A line that is too long for a record of an answer becomes several, so that they
// have the same numbers for everybody.
func (f *flight) say(lines ...string) {
	if slices.ContainsFunc(lines, func(line string) bool { return len(reply.Parts(line)) > 1 }) {
		var parts []string
		for _, line := range lines {
			parts = append(parts, reply.Parts(line)...)
		}
		lines = parts
	}
	if f.record != nil {
		f.record.Log(lines...)
	}
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
	if f.record != nil {
		f.record.Update(func(r *records.Record) { r.Image, r.ImageName = image, image })
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.image = image
	for _, w := range f.waiters {
		w.out.SetImage(image)
	}
}

// end gives the flight its verdict. It has a log only if the waiters have not seen one.
func (f *flight) end(verdict api.Record) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.verdict = verdict
	f.waiters = nil
	close(f.done)
}
