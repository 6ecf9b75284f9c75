package server

import (
	"net/http"
	"slices"
	"sync"
	"time"

	"handler/function/api"
	"handler/function/reply"
)

// A flight is kept after its end: a queue may deliver its request again, and clients ask
// for it with GET /builds/<id>. The Pro queue stops delivering after hours, so a day is enough.
const (
	keepFlights = 1000
	keepBytes   = 16 << 20 // of logs, errors and warnings
	keepFor     = 24 * time.Hour
)

// flights are the named flights that are under way, and those that have ended, for a
// while.
type flights struct {
	mu    sync.Mutex
	all   map[flightID]*flight
	ended []*flight // in the order in which they ended
	bytes int       // the sum of the sizes of ended
}

// begin adds a call to the flight that it can join, or else to f. If first is true, the
// caller has to build f. A flight that was joined may have ended already.
func (fs *flights) begin(f *flight, out *reply.Writer) (_ *flight, w *waiter, first bool) {
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
				if w, ok := before.join(out); ok {
					return before, w, false
				}
			}
			fs.forget(before)
		}
		fs.all[f.id] = f
	}
	w, _ = f.join(out)
	return f, w, true
}

// final says whether a further attempt would have the same verdict.
func final(rec api.Record) bool {
	if rec.Status == api.Success {
		return true
	}
	switch status := rec.Code.HTTPStatus(); {
	case rec.Code == api.Canceled, rec.Code == api.Suspended, status == http.StatusTooManyRequests, status >= 500:
		return false
	}
	return true
}

// end keeps a flight that has its verdict.
func (fs *flights) end(f *flight) {
	if !f.named() {
		return
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.all[f.id] != f {
		return // it was abandoned, and another has taken its place
	}
	fs.ended = append(fs.ended, f)
	fs.bytes += f.size()
	fs.expire()
}

// expire forgets the oldest flights that are over a limit. The caller must hold fs.mu.
func (fs *flights) expire() {
	for len(fs.ended) > 0 && (len(fs.ended) > keepFlights || fs.bytes > keepBytes || time.Since(fs.ended[0].ended) > keepFor) {
		fs.forget(fs.ended[0])
	}
}

// The caller of forget must hold fs.mu.
func (fs *flights) forget(f *flight) {
	delete(fs.all, f.id)
	if i := slices.Index(fs.ended, f); i >= 0 {
		fs.ended = slices.Delete(fs.ended, i, i+1)
		fs.bytes -= f.size()
	}
}

// find returns the signer's latest flight of a call id, or nil.
func (fs *flights) find(by signer, call string) *flight {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.expire()
	var found *flight
	for id, f := range fs.all {
		if id.call == call && id.isOf(by) && (found == nil || f.call.start.After(found.call.start)) {
			found = f
		}
	}
	return found
}
