package server

import (
	"sync"

	"handler/function/records"
	"handler/function/reply"
)

// flights are the builds that are under way. Those that have ended are in the store of records.
type flights struct {
	mu    sync.Mutex
	named map[flightID]*flight // that a later call can join
	all   map[*flight]bool     // that have a record
}

// begin adds a call to the flight that it can join, or else to f. If first is true, the
// caller has to run f.
func (fs *flights) begin(f *flight, out *reply.Writer) (_ *flight, w *waiter, first bool) {
	if f.named() {
		fs.mu.Lock()
		defer fs.mu.Unlock()
		if before := fs.named[f.id]; before != nil {
			if w, ok := before.join(out); ok {
				return before, w, false
			}
		}
		fs.named[f.id] = f
	}
	w, _ = f.join(out)
	return f, w, true
}

// built adds a flight that has a record.
func (fs *flights) built(f *flight) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.all[f] = true
}

// has says whether a record is of a flight that is under way here.
func (fs *flights) has(r *records.Record) bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for f := range fs.all {
		if f.owner != r.Tenant || f.call.id != r.ID {
			continue
		}
		// A record has no number at first.
		if n := f.record.Record().Attempt; n == r.Attempt || r.Attempt == 0 {
			return true
		}
	}
	return false
}

// end removes a flight that has its verdict.
func (fs *flights) end(f *flight) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	delete(fs.all, f)
	if fs.named[f.id] == f { // otherwise it was abandoned, and another has taken its place
		delete(fs.named, f.id)
	}
}
