package pool

import (
	"math"
	"sync"
	"time"
)

const (
	// loadAge is how long the last count of a daemon's builds is believed.
	loadAge = time.Second

	// probeMin and probeMax are how long a daemon that was lost is left alone. The time
	// doubles with each loss in a row: 1 s, 2 s, 4 s, …, 60 s.
	probeMin = time.Second
	probeMax = time.Minute
)

// health says whether a daemon gets builds, and how many it has.
type health struct {
	mu     sync.Mutex
	out    bool // it was lost, or a build stalled there; a probe brings it back
	losses int  // in a row
	full   bool // its disk was full, and has not been pruned since

	addr  string
	seats *Seats // of this process, on all daemons

	others  int       // builds of others, as they have told, or as the daemon said
	counted int       // builds of others when the daemon was last asked
	asked   time.Time // when that was

	pruning chan struct{} // holds one value while somebody prunes
}

// isFit says whether the daemon gets builds that could go elsewhere.
func (h *health) isFit() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return !h.out && !h.full
}

func (h *health) isOut() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.out
}

func (h *health) isFull() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.full
}

// lose takes the daemon out, and returns how long to leave it alone. However many builds lose
// a daemon that goes away once, it is one loss: a daemon that is out already stays as it is,
// and before is true.
func (h *health) lose() (rest time.Duration, before bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.out {
		return 0, true
	}
	h.out = true
	h.losses++
	return min(probeMin<<min(h.losses-1, 10), probeMax), false
}

// worked forgets the losses: a build has ended there in an orderly way.
func (h *health) worked() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.losses = 0
}

// setOut returns the state before.
func (h *health) setOut(out bool) (before bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	before, h.out = h.out, out
	return before
}

// setFull returns the state before.
func (h *health) setFull(full bool) (before bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	before, h.full = h.full, full
	return before
}

// take counts one more build of this process, if there are fewer than limit. Zero is no
// limit.
func (h *health) take(limit int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if limit == 0 {
		return h.seats.take(h.addr, math.MaxInt)
	}
	return h.seats.take(h.addr, limit-h.others)
}

// give counts one build less.
func (h *health) give() { h.seats.give(h.addr) }

// mine is how many builds this process has there.
func (h *health) mine() int { return h.seats.on(h.addr) }

// told notes how many builds others have told of, and returns how many the daemon has, with this
// process's own. If not all have told, the higher of their sum and the daemon's own count is taken.
func (h *health) told(others int, all bool) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !all {
		others = max(others, h.counted)
	}
	h.others = others
	return h.others + h.mine()
}

// stale says whether the last count is older than loadAge.
func (h *health) stale() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return time.Since(h.asked) > loadAge
}

// count notes the daemon's own count of its builds. mine is how many seats this process had
// when the daemon was asked. A build that has a seat and has not begun is in mine and not in
// active: the count of others is then too low by one, for loadAge at most. A build of this process
// that is in no record makes the count too low until the build ends. Such builds began while
// Config.Elsewhere told of all, or are those of a pool with one daemon.
func (h *health) count(active, mine int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counted, h.asked = max(active-mine, 0), time.Now()
}
