package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"handler/function/api"
	"handler/function/budget"
	"handler/function/payload"
)

// What bodies take before their signature has passed, all together. GOMEMLIMIT in
// stack.yml is above it.
const (
	intakeMemory = 96 << 20 // bytes of memory
	headMemory   = 32 << 20 // of them, for heads

	// headSize is how much of a body is read before it needs an upload slot. What a
	// queue delivers is smaller.
	headSize = 1 << 20
	// leastHead is what the first bytes of a head take.
	leastHead = 4 << 10

	// maxArrivals bounds the bodies that are being received, those included that
	// send nothing.
	maxArrivals = 1024

	// slowRate is what an upload is safe with, in bytes per second: none that is
	// faster is ended for another.
	slowRate = 256 << 10
	// judgedAfter is how long an upload goes on before it can be too slow.
	judgedAfter = 250 * time.Millisecond
	// judgeEvery is how often those are looked at again whom another waits for.
	judgeEvery = 50 * time.Millisecond

	// uploadWait is how long a body waits for others to be received.
	uploadWait = 30 * time.Second
)

// intake is where bodies are received, until their signatures are compared. Nobody
// knows yet who sends them. So each has what it has sent, and a share of what is there
// for all; and where there is not enough, the slowest goes.
//
// A body begins as a head: up to headSize bytes in memory, of a budget of headMemory.
// One that is larger takes one of the slots, and goes on in a stream.
type intake struct {
	draining context.Context // its end ends the waiting

	rate   int64         // bytes per second that a body must come at
	grace  time.Duration // before the rate counts
	slots  int           // how many there are
	memory *budget.Budget
	heads  *budget.Budget
	gate   payload.Gate

	mu       sync.Mutex
	free     int // slots
	arrivals map[*arrival]struct{}
	forHead  line // those that wait for memory
	forSlot  line
}

func newIntake(draining context.Context, slots int, rate int64, grace time.Duration) *intake {
	memory := budget.New(intakeMemory)
	return &intake{
		draining: draining,
		rate:     rate, grace: grace, slots: slots, free: slots,
		memory: memory, heads: memory.Part(headMemory),
		gate:     payload.NewGate(runtime.GOMAXPROCS(0)),
		arrivals: make(map[*arrival]struct{}),
	}
}

// errEvicted ends an upload that another waits for.
var errEvicted = &api.Error{Code: api.SlowUpload, Msg: fmt.Sprintf("the body came more slowly than %d bytes a second, and others are waiting", slowRate)}

func (in *intake) busy() error {
	return &api.Error{Code: api.Busy, Msg: fmt.Sprintf("%d bodies are being received, as many as may at once", in.slots)}
}

// arrival is one body that is being received.
type arrival struct {
	in   *intake
	body io.Reader
	rc   *http.ResponseController
	ctx  context.Context // its end ends the reading
	end  context.CancelCauseFunc

	memory *budget.Account // of in.heads, or of in.memory once it has a slot

	slot  bool  // guarded by in.mu, as is holds
	holds int64 // bytes of in.heads

	began   time.Time
	stopped chan struct{} // closed once the end of ctx has set its deadline
	keep    func() bool   // keeps the end of ctx from setting one
	set     time.Time     // the read deadline that was

	mu    sync.Mutex
	start time.Time // moves on while the body is not read
	left  time.Time // the end of the last Read; zero while there is one
	n     int64     // bytes read

	mark   time.Time // when lately was last reckoned
	markN  int64     // n then
	recent float64   // lately then
}

// arrive takes in a body of which nothing has been read. ctx ends the reading. The
// caller must call leave.
func (in *intake) arrive(ctx context.Context, body io.Reader, rc *http.ResponseController) (*arrival, error) {
	now := time.Now()
	a := &arrival{in: in, body: body, rc: rc, memory: in.heads.Open(), began: now, start: now, left: now, mark: now, recent: math.Inf(1), stopped: make(chan struct{})}
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.arrivals) >= maxArrivals {
		in.evict(1, (*arrival).lately, func(other *arrival) (holds int64, rank float64) { return 1, other.lately() })
	}
	if len(in.arrivals) >= 2*maxArrivals {
		// Those who were ended have not left yet.
		return nil, in.busy()
	}
	a.ctx, a.end = context.WithCancelCause(ctx)
	a.keep = context.AfterFunc(a.ctx, func() {
		defer close(a.stopped)
		rc.SetReadDeadline(time.Unix(0, 0))
	})
	in.arrivals[a] = struct{}{}
	return a, nil
}

// leave gives back the slot. Nothing of the arrival changes a read deadline afterwards.
// What it has of memory is somebody else's to give back, before that.
func (a *arrival) leave() {
	if !a.keep() {
		<-a.stopped // its deadline is not to be the last
	}
	a.end(nil)
	in := a.in
	in.mu.Lock()
	defer in.mu.Unlock()
	delete(in.arrivals, a)
	if a.slot {
		a.slot = false
		in.free++
		in.forSlot.wake()
	}
	in.forHead.wake()
}

// readHead reads the body to its end or, if it is larger than headSize, some more than
// that. whole says that it has ended. begins is asked about the first byte, if there is
// one, before memory is taken for it.
func (a *arrival) readHead(begins func(first byte) error) (head []byte, whole bool, err error) {
	var first [1]byte
	switch n, err := io.ReadFull(a, first[:]); {
	case n == 0 && err == io.EOF:
		return nil, true, nil
	case err != nil:
		return nil, false, fmt.Errorf("reading body: %w", err)
	}
	if err := begins(first[0]); err != nil {
		return nil, false, err
	}
	for next := leastHead; ; next *= 2 {
		// One block above headSize shows whether a body of that size has ended.
		next = min(next, headSize+leastHead)
		if err := a.takeHead(int64(next - cap(head))); err != nil {
			return nil, false, err
		}
		larger := make([]byte, len(head), next)
		copy(larger, head)
		if head = larger; len(head) == 0 {
			head = append(head, first[0])
		}
		for len(head) < next {
			n, err := a.Read(head[len(head):next])
			head = head[:len(head)+n]
			if err == io.EOF {
				return head, true, nil
			}
			if err != nil {
				return nil, false, fmt.Errorf("reading body: %w", err)
			}
		}
		if len(head) > headSize {
			return head, false, nil
		}
	}
}

// takeHead takes n bytes of in.heads, and waits for them if it must.
func (a *arrival) takeHead(n int64) error {
	return a.in.wait(a, &a.in.forHead, func() bool {
		if !a.memory.Take(n) {
			return false
		}
		a.holds += n
		return true
	}, func() {
		// The oldest goes first. The slowest could be one that has just begun to wait.
		a.in.evict(n, (*arrival).lately, func(other *arrival) (holds int64, rank float64) {
			if other == a {
				return 0, 0
			}
			return other.holds, -time.Since(other.began).Seconds()
		})
	})
}

// takeSlot takes a slot, and waits for one if it must. The head's memory is of in.memory
// afterwards.
func (a *arrival) takeSlot() error {
	err := a.in.wait(a, &a.in.forSlot, func() bool {
		if a.in.free == 0 {
			return false
		}
		a.in.free--
		a.slot = true
		return true
	}, func() {
		a.in.evict(1, (*arrival).speed, func(other *arrival) (holds int64, rank float64) {
			if !other.slot {
				return 0, 0
			}
			return 1, other.speed()
		})
	})
	if err != nil {
		return err
	}
	a.memory.Move(a.in.memory)
	a.in.mu.Lock()
	defer a.in.mu.Unlock()
	a.holds = 0
	a.in.forHead.wake()
	return nil
}

// wait calls try until it succeeds, once the turn of a has come, and evict whenever it
// has not. Both are called with in.mu held.
func (in *intake) wait(a *arrival, l *line, try func() bool, evict func()) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(l.waiting) == 0 && try() {
		return nil
	}
	if l == &in.forSlot && len(l.waiting) >= maxSlotWait {
		return in.busy()
	}
	me := l.join()
	defer l.leave(me)
	timeout := time.NewTimer(uploadWait)
	defer timeout.Stop()
	again := time.NewTicker(judgeEvery)
	defer again.Stop()
	for {
		if l.waiting[0] == me {
			if try() {
				return nil
			}
			evict()
		}
		in.mu.Unlock()
		var err error
		select {
		case <-me:
		case <-again.C:
		case <-timeout.C:
			err = in.busy()
		case <-in.draining.Done():
			err = errShuttingDown
		case <-a.ctx.Done():
			err = a.cause()
		}
		in.mu.Lock()
		if err != nil {
			return err
		}
	}
}

// maxSlotWait bounds the bodies that wait for a slot. Each has a head in memory, and
// together they leave half of it to those that need no slot.
const maxSlotWait = headMemory / headSize / 2

// evict ends uploads whose speed is below slowRate, those of the lowest rank first,
// until what they hold is need. look says what an upload holds and its rank. All are
// called with in.mu held.
func (in *intake) evict(need int64, speed func(*arrival) float64, look func(*arrival) (holds int64, rank float64)) {
	type candidate struct {
		*arrival
		holds int64
		rank  float64
	}
	var slow []candidate
	for a := range in.arrivals {
		holds, rank := look(a)
		switch {
		case holds == 0:
		case a.ctx.Err() != nil:
			need -= holds // it is about to leave
		case speed(a) < slowRate:
			slow = append(slow, candidate{a, holds, rank})
		}
	}
	slices.SortFunc(slow, func(a, b candidate) int { return cmp.Compare(a.rank, b.rank) })
	for _, c := range slow {
		if need <= 0 {
			return
		}
		c.end(errEvicted)
		need -= c.holds
	}
}

// speed is the rate that the body has come at, in bytes per second of its client's
// time; infinite while it is too early to tell.
func (a *arrival) speed() float64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.left.IsZero() {
		return rate(a.n, time.Since(a.start))
	}
	return rate(a.n, a.left.Sub(a.start))
}

// lately is the rate of the last judgedAfter, or since it was last asked for; infinite
// while it is too early to tell. The time counts, too, that the body waits for memory. Else those that
// have all the memory, and wait for more of it, would be stuck together.
func (a *arrival) lately() float64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	if since := time.Since(a.mark); since >= judgedAfter {
		a.recent, a.mark, a.markN = rate(a.n-a.markN, since), a.mark.Add(since), a.n
	}
	return a.recent
}

func rate(bytes int64, took time.Duration) float64 {
	if took < judgedAfter {
		return math.Inf(1)
	}
	return float64(bytes) / took.Seconds()
}

// Read reads the body with a deadline that moves on as bytes come. What passes between
// two reads is not the client's time.
func (a *arrival) Read(b []byte) (int, error) {
	a.mu.Lock()
	now := time.Now()
	a.start = a.start.Add(now.Sub(a.left))
	a.left = time.Time{}
	deadline := a.start.Add(a.in.grace + time.Duration(float64(a.n)/float64(a.in.rate)*float64(time.Second)))
	a.mu.Unlock()
	n, err := a.read(b, now, deadline)
	a.mu.Lock()
	a.n += int64(n)
	a.left = time.Now()
	a.mu.Unlock()
	return n, err
}

func (a *arrival) read(b []byte, now, deadline time.Time) (int, error) {
	// A fast client moves the deadline by far more than it uses up.
	if now.After(deadline) {
		return 0, os.ErrDeadlineExceeded
	} else if deadline.Sub(a.set) > a.in.grace/8 {
		if err := a.rc.SetReadDeadline(deadline); err != nil {
			return 0, err
		}
		a.set = deadline
	}
	// Asked after the deadline was set, which may have moved it out of the past.
	if a.ctx.Err() != nil {
		return 0, a.cause()
	}
	n, err := a.body.Read(b)
	if err != nil && err != io.EOF && a.ctx.Err() != nil {
		err = a.cause()
	}
	return n, err
}

// cause is why the reading was ended.
func (a *arrival) cause() error {
	if err := context.Cause(a.ctx); errors.Is(err, errEvicted) {
		return err
	}
	return errShuttingDown
}

// line is who waits, in the order that they came.
type line struct{ waiting []chan struct{} }

func (l *line) join() chan struct{} {
	me := make(chan struct{}, 1)
	l.waiting = append(l.waiting, me)
	return me
}

func (l *line) leave(me chan struct{}) {
	l.waiting = slices.DeleteFunc(l.waiting, func(c chan struct{}) bool { return c == me })
	l.wake()
}

// wake has the first try again.
func (l *line) wake() {
	if len(l.waiting) == 0 {
		return
	}
	select {
	case l.waiting[0] <- struct{}{}:
	default:
	}
}
