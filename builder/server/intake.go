package server

import (
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

// Bodies take this much at most, all together, until their signatures have passed. With
// waitingMemory it has to stay below GOMEMLIMIT in stack.yml.
const (
	headMemory   = 32 << 20 // bytes of memory, for heads
	uploadMemory = 64 << 20 // bytes of memory, for those that have a slot

	// headSize is how much of a body is read before it needs an upload slot. What a
	// queue delivers is smaller.
	headSize = 1 << 20

	// maxArrivals bounds the bodies that are being received, those included that
	// send nothing.
	maxArrivals = 1024

	// slowRate is in bytes per second. An upload that is as fast is not ended for
	// another that waits for its slot.
	slowRate = 256 << 10
	// An upload is not judged by its rate in its first judgedAfter. A burst raises its
	// rate for burstCounts at most.
	judgedAfter = time.Second
	burstCounts = 3 * time.Second
	// judgeEvery is how often uploads are judged while a body waits for a slot, and
	// roomEvery while one waits for room on the disk.
	judgeEvery = 50 * time.Millisecond
	roomEvery  = 10 * time.Millisecond
	// silentFor is how long a body has to have sent nothing before it can be ended
	// for the room that it takes.
	silentFor = 500 * time.Millisecond

	// uploadWait is how long a body waits for a slot, and roomWait how long for room.
	uploadWait = 30 * time.Second
	roomWait   = 10 * time.Second
)

// intake is where bodies are received, until their signatures are compared. Nobody
// knows yet who sends them. So each has what it has sent, and a share of what is there
// for all.
//
// A body begins as a head: up to headSize bytes, in memory while there is some, and
// otherwise on the disk. One that is larger takes one of the slots, and goes on in a
// stream. Heads and streams have budgets of their own: whoever fills one of them leaves
// the other.
type intake struct {
	draining context.Context // its end ends the waiting

	rate  int64         // bytes per second that a body must come at
	grace time.Duration // before the rate counts
	slots int           // how many there are
	line  int           // how many wait for a slot at most

	heads, uploads         *budget.Budget // of memory
	headsDisk, uploadsDisk *budget.Budget // parts of the disk
	gate                   payload.Gate

	mu       sync.Mutex
	free     int // slots
	arrivals map[*arrival]struct{}
	waiting  []chan struct{}    // for a slot, in the order that they came
	judged   map[bool]time.Time // for their room: when those with a slot (true) were last, and those without
}

// newIntake makes one with the given number of slots. Of disk, unsigned bodies have
// spool at most, a quarter of it for heads.
func newIntake(draining context.Context, slots int, rate int64, grace time.Duration, disk *budget.Budget, spool int64) *intake {
	return &intake{
		draining: draining,
		rate:     rate, grace: grace, slots: slots, free: slots,
		// Whoever waits has a whole head. Half of the room is for others.
		line:  max(int((headMemory+spool/4)/headSize/2), 1),
		heads: budget.New(headMemory), uploads: budget.New(uploadMemory),
		headsDisk: disk.Part(spool / 4), uploadsDisk: disk.Part(spool - spool/4),
		// With fewer pieces, a single upload would wait for the disk.
		gate:     payload.NewGate(4 * runtime.GOMAXPROCS(0)),
		arrivals: make(map[*arrival]struct{}),
		judged:   make(map[bool]time.Time),
	}
}

// errEvicted ends an upload that another waits for.
var errEvicted = &api.Error{Code: api.Busy, Msg: "others waited for the room that this body took, which came slowly or not at all; send it again"}

// arrival is one body that is being received.
type arrival struct {
	in   *intake
	body io.Reader
	rc   *http.ResponseController
	ctx  context.Context // its end ends the reading
	end  context.CancelCauseFunc

	headDisk, uploadDisk *budget.Account // what it takes there, before it has a slot and after
	waited               time.Duration   // for room there

	slot  bool // guarded by in.mu, as are wants and over
	wants bool // it waits for room
	over  bool // it is read, or has left: it cannot be ended any more

	stopped chan struct{} // closed once the end of ctx has set its deadline
	keep    func() bool   // keeps the end of ctx from setting one
	set     time.Time     // the read deadline that was

	mu    sync.Mutex
	start time.Time // moves on while the body is not read
	asked time.Time // the beginning of the last Read
	left  time.Time // its end; zero before that
	n     int64     // bytes read

	// The rate of the last burstCounts, or since it was last asked for.
	recent float64
	markN  int64         // n then
	markAt time.Duration // after start
}

// arrive takes in a body of which nothing has been read. ctx ends the reading. The
// caller must call leave.
func (in *intake) arrive(ctx context.Context, body io.Reader, rc *http.ResponseController) (*arrival, error) {
	now := time.Now()
	a := &arrival{in: in, body: body, rc: rc, headDisk: in.headsDisk.Open(), uploadDisk: in.uploadsDisk.Open(), start: now, left: now, recent: math.Inf(1), stopped: make(chan struct{})}
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.arrivals) >= maxArrivals {
		in.endFor(func(*arrival) int64 { return 1 }, 0)
	}
	if len(in.arrivals) >= 2*maxArrivals {
		// Those who were ended have not left yet.
		return nil, &api.Error{Code: api.NoSpace, Msg: "too many requests are being received"}
	}
	a.ctx, a.end = context.WithCancelCause(ctx)
	a.keep = context.AfterFunc(a.ctx, func() {
		defer close(a.stopped)
		rc.SetReadDeadline(time.Unix(0, 0))
	})
	in.arrivals[a] = struct{}{}
	return a, nil
}

// finish says that a's body has been read: a cannot be ended from then on. It returns
// false if a was ended before. The read deadline lies in the past then, and a sets no
// other.
func (a *arrival) finish() bool {
	a.in.mu.Lock()
	was := a.over
	a.over = true
	a.in.mu.Unlock()
	if was {
		return true
	}
	if !a.keep() {
		<-a.stopped
		return false
	}
	return true
}

// leave gives back the slot. Nothing of a changes a read deadline afterwards.
func (a *arrival) leave() {
	a.finish()
	a.end(nil)
	in := a.in
	in.mu.Lock()
	defer in.mu.Unlock()
	delete(in.arrivals, a)
	if a.slot {
		a.slot = false
		in.free++
		in.wake()
	}
}

// takeSlot takes a slot. Where there is none it waits in line, and has the slowest of
// those that have one ended.
func (a *arrival) takeSlot() error {
	in := a.in
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.waiting) >= in.line {
		return in.busy()
	}
	me := make(chan struct{}, 1)
	in.waiting = append(in.waiting, me)
	defer func() {
		in.waiting = slices.DeleteFunc(in.waiting, func(c chan struct{}) bool { return c == me })
		in.wake()
	}()
	timeout := time.NewTimer(uploadWait)
	defer timeout.Stop()
	for {
		var again <-chan time.Time
		if in.waiting[0] == me {
			if in.free > 0 {
				in.free--
				a.slot = true
				return nil
			}
			in.endSlowest(func(other *arrival) bool { return other.slot })
			again = time.After(judgeEvery)
		}
		in.mu.Unlock()
		var err error
		select {
		case <-me:
		case <-again:
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

func (in *intake) busy() error {
	return &api.Error{Code: api.Busy, Msg: fmt.Sprintf("%d bodies are being received, as many as may at once", in.slots)}
}

// makeRoom ends another body that takes room on the disk, of the same budget as a's, and
// waits a moment. A body that still finds no room calls it again. After roomWait it
// returns payload.ErrNoRoom.
func (a *arrival) makeRoom() error {
	start := time.Now()
	defer func() { a.waited += time.Since(start) }()
	if a.waited >= roomWait {
		return payload.ErrNoRoom
	}
	in := a.in
	in.mu.Lock()
	a.wants = true
	in.judge(a.slot)
	in.mu.Unlock()
	defer func() {
		in.mu.Lock()
		defer in.mu.Unlock()
		a.wants = false
	}()
	select {
	case <-time.After(roomEvery):
		return nil
	case <-in.draining.Done():
		return errShuttingDown
	case <-a.ctx.Done():
		return a.cause()
	}
}

// judge ends a body for the room that it takes on the disk: one with a slot, or one
// without. However many wait, it does so every roomEvery. The caller must hold in.mu.
func (in *intake) judge(slot bool) {
	if time.Since(in.judged[slot]) < roomEvery {
		return
	}
	in.judged[slot] = time.Now()
	in.endFor(func(other *arrival) int64 {
		switch {
		case other.slot != slot:
			return 0
		case slot:
			return other.uploadDisk.Taken()
		}
		return other.headDisk.Taken()
	}, silentFor)
}

// endFor considers those that take something of what is wanted. It ends the one that has
// been silent the longest, if that is more than atLeast. If none is silent, it ends the
// slowest below slowRate. If none is slow either, and several all wait for room, it ends
// the one that takes most: they would wait for one another. The caller must hold in.mu.
func (in *intake) endFor(takes func(*arrival) int64, atLeast time.Duration) {
	var silent, largest *arrival
	longest, most := atLeast, int64(0)
	waiting, others := 0, 0
	for a := range in.arrivals {
		n := takes(a)
		if n == 0 {
			continue
		}
		if a.ctx.Err() != nil {
			return // it is about to leave
		}
		if a.over {
			continue
		}
		if d := a.silence(); d > longest {
			silent, longest = a, d
		}
		if !a.wants {
			others++
			continue
		}
		if waiting++; n > most {
			largest, most = a, n
		}
	}
	if silent != nil {
		silent.end(errEvicted)
		return
	}
	if !in.endSlowest(func(a *arrival) bool { return takes(a) > 0 }) && waiting > 1 && others == 0 {
		largest.end(errEvicted)
	}
}

// wake has the first in line try again. It is called with in.mu held.
func (in *intake) wake() {
	if len(in.waiting) == 0 {
		return
	}
	select {
	case in.waiting[0] <- struct{}{}:
	default:
	}
}

// endSlowest ends the slowest upload of those that among takes, if it is slower than
// slowRate and none of them is about to leave. It returns whether one leaves. It is
// called with in.mu held.
func (in *intake) endSlowest(among func(*arrival) bool) bool {
	var slowest *arrival
	least := float64(slowRate)
	for a := range in.arrivals {
		if !among(a) {
			continue
		}
		if a.ctx.Err() != nil {
			return true
		}
		if a.over {
			continue
		}
		if speed := a.speed(); speed < least {
			slowest, least = a, speed
		}
	}
	if slowest != nil {
		slowest.end(errEvicted)
	}
	return slowest != nil
}

// speed is the rate that the body has come at, or comes at now if that is less, in bytes
// per second of its client's time; infinite while it is too early to tell.
func (a *arrival) speed() float64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.left
	if now.IsZero() {
		now = time.Now()
	}
	took := now.Sub(a.start)
	if since := took - a.markAt; since >= burstCounts {
		a.recent, a.markN, a.markAt = rate(a.n-a.markN, since), a.n, took
	}
	return min(a.recent, rate(a.n, took))
}

// silence is for how long the body has been read without a byte.
func (a *arrival) silence() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.left.IsZero() {
		return 0
	}
	return time.Since(a.asked)
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
	a.asked, a.left = now, time.Time{}
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
	switch {
	case err == io.EOF && !a.finish():
		// net/http watches the connection from now on, and would take the deadline for
		// the client's leaving.
		err = a.cause()
	case err != nil && err != io.EOF && a.ctx.Err() != nil:
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
