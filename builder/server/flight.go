package server

import (
	"context"
	"crypto/sha256"
	"net/http"
	"slices"
	"sync"
	"time"

	"handler/function/api"
	"handler/function/reply"
)

// flight is one build and all the calls that wait for it. A queue delivers what
// outlasts its patience again, and what it delivers is not built twice.
type flight struct {
	id     flightID
	call   *call // that began it
	ctx    context.Context
	cancel context.CancelCauseFunc
	done   chan struct{} // closed once verdict is there

	mu       sync.Mutex
	image    string
	waiting  []*seat
	spoken   reply.Excerpt // for those that come later; of a named flight only
	deserted bool          // by the last seat: it is being cancelled

	// Set before done is closed, and not changed after it.
	verdict api.Record
	ended   time.Time
}

// flightID names a flight by what a second delivery has in common with the
// first. The call id alone is the caller's to choose. The zero flightID is that
// of a flight that nobody joins.
type flightID struct {
	key  string // that signed; empty without HMAC
	call string // X-Call-Id
	body [sha256.Size]byte
}

// seat is one call's place on a flight.
type seat struct {
	out  *reply.Writer
	late bool          // it came after the end
	lost chan struct{} // closed when out takes no more
	last bool          // set before lost is closed: nobody else was left
}

func (f *flight) named() bool { return f.id != flightID{} }

// board adds a call, and tells it what it has missed. It fails once the last
// has left.
func (f *flight) board(out *reply.Writer) (*seat, bool) {
	s := &seat{out: out, lost: make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.deserted {
		return nil, false
	}
	out.SetImage(f.image)
	select {
	case <-f.done:
		s.late = true
		return s, true
	default:
	}
	f.waiting = append(f.waiting, s)
	// A new Writer has room, so that this does not block.
	if lines := f.spoken.Lines(); len(lines) > 0 {
		out.Log(f.ctx, lines...)
	}
	return s, true
}

// leave takes a seat off the flight, and cancels the build with the last.
func (f *flight) leave(s *seat, cause error) (last bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.Index(f.waiting, s)
	if i < 0 {
		return false
	}
	f.waiting = slices.Delete(f.waiting, i, i+1)
	if len(f.waiting) > 0 {
		return false
	}
	f.deserted = true
	f.cancel(canceled(cause))
	return true
}

// wait returns what the flight came to, or why this call did not see its end.
// The last to leave waits for the build to have ended: nothing of it outlives
// its calls.
func (f *flight) wait(ctx context.Context, s *seat) api.Record {
	last := false
	select {
	case <-f.done:
		if s.late {
			return f.past()
		}
		return f.verdict
	case <-ctx.Done():
		last = f.leave(s, context.Cause(ctx))
	case <-s.lost:
		last = s.last
	}
	if !last {
		return failure(api.AsError(canceled(context.Cause(ctx))), "")
	}
	<-f.done
	return f.verdict
}

// say passes lines on to every call. One goroutine calls it.
func (f *flight) say(lines ...string) {
	f.mu.Lock()
	if f.named() {
		for _, line := range lines {
			f.spoken.Add(line)
		}
	}
	seats := slices.Clone(f.waiting)
	f.mu.Unlock()
	for _, s := range seats {
		if err := s.out.Log(f.ctx, lines...); err != nil && f.ctx.Err() == nil {
			s.last = f.leave(s, err)
			close(s.lost)
		}
	}
}

func (f *flight) setImage(image string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.image = image
	for _, s := range f.waiting {
		s.out.SetImage(image)
	}
}

// end gives the verdict. Its log is what was said, for calls that come later;
// those that wait have seen it.
func (f *flight) end(verdict api.Record) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.verdict, f.ended = verdict, time.Now()
	f.waiting = nil
	close(f.done)
}

// past is what to tell of a flight that has ended.
func (f *flight) past() api.Record {
	rec := f.verdict
	rec.Log = f.spoken.Lines()
	rec.Duration = f.ended.Sub(f.call.start).Seconds()
	return rec
}

// size is what is kept of a flight that has ended, in bytes.
func (f *flight) size() int {
	n := f.spoken.Size() + len(f.verdict.Error)
	for _, w := range f.verdict.Warnings {
		n += len(w)
	}
	return n
}

// final says that a further attempt would come to the same.
func final(rec api.Record) bool {
	if rec.Status == api.Success {
		return true
	}
	switch status := rec.Code.HTTPStatus(); {
	case rec.Code == api.Canceled, status == http.StatusTooManyRequests, status >= 500:
		return false
	}
	return true
}

// What is kept of flights that have ended, for a queue that delivers again and
// for GET /builds. The Pro queue gives up after hours.
const (
	keepFlights = 1000
	keepBytes   = 16 << 20 // of their logs and errors
	keepFor     = 24 * time.Hour
)

// flights are those that run, and those that have ended, for a while.
type flights struct {
	mu    sync.Mutex
	all   map[flightID]*flight
	ended []*flight // in the order they did
	bytes int       // sum of the sizes of ended
}

// begin returns the flight that a call is to wait for, and whether the caller
// has to run it. The flight that it returns otherwise may have ended.
func (fs *flights) begin(f *flight, out *reply.Writer) (_ *flight, s *seat, run bool) {
	if f.named() {
		fs.mu.Lock()
		defer fs.mu.Unlock()
		fs.expire()
		if before := fs.all[f.id]; before != nil {
			ended := false
			select {
			case <-before.done:
				ended = true
			default:
			}
			if !ended || final(before.verdict) {
				if s, ok := before.board(out); ok {
					return before, s, false
				}
			}
			fs.forget(before)
		}
		fs.all[f.id] = f
	}
	s, _ = f.board(out)
	return f, s, true
}

// end keeps what a flight came to.
func (fs *flights) end(f *flight) {
	if !f.named() {
		return
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.all[f.id] != f {
		return // deserted, and begun anew
	}
	fs.ended = append(fs.ended, f)
	fs.bytes += f.size()
	fs.expire()
}

// expire forgets what is kept for too long, or is too much. It is called with
// fs.mu held.
func (fs *flights) expire() {
	for len(fs.ended) > 0 && (len(fs.ended) > keepFlights || fs.bytes > keepBytes || time.Since(fs.ended[0].ended) > keepFor) {
		fs.forget(fs.ended[0])
	}
}

// forget is called with fs.mu held.
func (fs *flights) forget(f *flight) {
	delete(fs.all, f.id)
	if i := slices.Index(fs.ended, f); i >= 0 {
		fs.ended = slices.Delete(fs.ended, i, i+1)
		fs.bytes -= f.size()
	}
}

// find returns the flight of a call that began last, or nil.
func (fs *flights) find(key []byte, call string) *flight {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.expire()
	var found *flight
	for id, f := range fs.all {
		if id.call == call && id.key == string(key) && (found == nil || f.call.start.After(found.call.start)) {
			found = f
		}
	}
	return found
}
