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

// The limits of all bodies whose signatures have not passed yet.
const (
	// These two, waitingMemory, and the 16 MiB of records in memory have to stay below GOMEMLIMIT
	// in stack.yml together.
	headMemory   = 32 << 20 // bytes of memory for all heads
	uploadMemory = 64 << 20 // bytes of memory for all bodies with a slot

	// headSize is how many bytes of a body are read before it needs an upload slot. A
	// body from a queue is smaller.
	headSize = 1 << 20

	// At maxArrivals bodies, each new body ends an old one: the body that has been silent
	// the longest, or else the slowest below slowRate. At twice maxArrivals, new bodies are
	// refused.
	maxArrivals = 1024

	// slowRate is in bytes per second. An upload below it can be ended, if another body
	// waits for its slot or its room.
	slowRate = 256 << 10
	// The rate of an upload counts only after judgedAfter. A burst raises the rate for
	// burstCounts at most.
	judgedAfter = time.Second
	burstCounts = 3 * time.Second
	// judgeEvery is the time between two judgements while a body waits for a slot, and
	// roomEvery while a body waits for room on the disk.
	judgeEvery = 50 * time.Millisecond
	roomEvery  = 10 * time.Millisecond
	// A body that has sent nothing for silentFor can be ended for its room.
	silentFor = 500 * time.Millisecond

	uploadWait = 30 * time.Second // for a slot
	roomWait   = 10 * time.Second // for room on the disk
)

// intake receives bodies until their signatures can be compared. Before that nobody knows
// who sends a body, so no sender can be given a share: all bodies draw on the same budgets.
//
// A body begins as a head of up to headSize bytes, in memory or, if memory is spent, on the
// disk. A larger body then takes a slot, and goes on as a stream. Heads and streams have
// budgets of their own: a sender that fills one budget leaves the other free.
type intake struct {
	draining context.Context // its end ends every wait

	limits intakeLimits
	line   int // bodies that may wait for a slot

	heads, uploads         *budget.Budget // of memory
	headsDisk, uploadsDisk *budget.Budget // parts of the disk
	gate                   payload.Gate
	searches               searches

	mu       sync.Mutex
	free     int // slots
	arrivals map[*arrival]struct{}
	waiting  []chan struct{} // for a slot, the first to come first

	// The last judgements for room on the disk: of bodies with a slot, and of those without.
	judgedUploads, judgedHeads time.Time
}

// intakeLimits are the operator's limits of an intake.
type intakeLimits struct {
	uploads int           // slots, taken or free
	rate    int64         // bytes per second that a body needs
	grace   time.Duration // before the rate counts
	spool   int64         // bytes of disk for all bodies together; a quarter is for heads
}

// newIntake makes an intake whose bodies draw on disk. Its waits end with draining.
func newIntake(draining context.Context, disk *budget.Budget, limits intakeLimits) *intake {
	spool := limits.spool
	in := &intake{
		draining: draining,
		limits:   limits, free: limits.uploads,
		// Each body in line keeps a whole head. They may fill half of the room for heads.
		line:  max(int((headMemory+spool/4)/headSize/2), 1),
		heads: budget.New(headMemory), uploads: budget.New(uploadMemory),
		headsDisk: disk.Part(spool / 4), uploadsDisk: disk.Part(spool - spool/4),
		// With a smaller gate, a single upload would wait for the disk.
		gate:     payload.NewGate(4 * runtime.GOMAXPROCS(0)),
		arrivals: make(map[*arrival]struct{}),
	}
	in.searches.open()
	return in
}

// errEvicted ends a body whose slot or room another body waits for.
var errEvicted = &api.Error{Code: api.Busy, Msg: "this body came slowly or not at all, and another waited for its room; send it again"}

// arrival is one body that is being received.
type arrival struct {
	in     *intake
	body   io.Reader
	rc     *http.ResponseController
	ctx    context.Context // its end ends the reading
	cancel context.CancelCauseFunc

	headDisk, uploadDisk *budget.Account // room on the disk, before it has a slot and after
	waited               time.Duration   // for room on the disk, so far

	// Guarded by in.mu.
	slot      bool // it has a slot
	wantsRoom bool // it waits for room on the disk
	finished  bool // it has been read, or has left; it cannot be ended any more

	stopped       chan struct{} // closed once the end of ctx has set a read deadline
	stopAfterFunc func() bool   // keeps the end of ctx from setting a read deadline
	set           time.Time     // the read deadline that Read has set

	mu        sync.Mutex
	start     time.Time // moved on by the time between two Reads
	readBegan time.Time // the beginning of the last Read
	readEnded time.Time // the end of the last Read; zero during a Read
	n         int64     // bytes read

	recent float64       // the rate in the last period of burstCounts or more
	markN  int64         // n at the end of that period
	markAt time.Duration // from start to the end of that period
}

// arrive begins to receive a body. Nothing of it may have been read. The end of ctx ends the
// reading. The caller must call leave.
func (in *intake) arrive(ctx context.Context, body io.Reader, rc *http.ResponseController) (*arrival, error) {
	now := time.Now()
	a := &arrival{in: in, body: body, rc: rc, headDisk: in.headsDisk.Open(), uploadDisk: in.uploadsDisk.Open(), start: now, readEnded: now, recent: math.Inf(1), stopped: make(chan struct{})}
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.arrivals) >= maxArrivals {
		// Every body counts the same here: the longest silence ends one, or else the lowest rate.
		in.endFor(func(*arrival) int64 { return 1 }, 0)
	}
	if len(in.arrivals) >= 2*maxArrivals {
		// So many bodies have been ended, and have not left yet.
		return nil, &api.Error{Code: api.NoSpace, Msg: "too many requests are being received"}
	}
	a.ctx, a.cancel = context.WithCancelCause(ctx)
	a.stopAfterFunc = context.AfterFunc(a.ctx, func() {
		defer close(a.stopped)
		rc.SetReadDeadline(time.Unix(0, 0))
	})
	in.arrivals[a] = struct{}{}
	return a, nil
}

// finish must be called once the body has been read. From then on a cannot be ended. finish
// returns false if a has been ended already. Then the read deadline lies in the past, and a
// does not set another.
func (a *arrival) finish() bool {
	a.in.mu.Lock()
	was := a.finished
	a.finished = true
	a.in.mu.Unlock()
	if was {
		return true
	}
	if !a.stopAfterFunc() {
		<-a.stopped
		return false
	}
	return true
}

// hasSlot says whether the body is larger than a head.
func (a *arrival) hasSlot() bool {
	a.in.mu.Lock()
	defer a.in.mu.Unlock()
	return a.slot
}

// leave gives back the slot. After it, nothing of a sets a read deadline.
func (a *arrival) leave() {
	a.finish()
	a.cancel(nil)
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

// takeSlot takes a slot. If none is free, a waits in line. The first in line has the slowest
// body with a slot ended, if that body is slow enough.
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
	return &api.Error{Code: api.Busy, Msg: fmt.Sprintf("%d bodies are being received, and max_uploads allows no more", in.limits.uploads)}
}

// makeRoom ends another body that takes room on the disk from the same budget as a, and
// waits a moment. If a still finds no room, it calls makeRoom again. Once a has waited for
// roomWait in all, makeRoom returns payload.ErrNoRoom.
func (a *arrival) makeRoom() error {
	start := time.Now()
	defer func() { a.waited += time.Since(start) }()
	if a.waited >= roomWait {
		return payload.ErrNoRoom
	}
	in := a.in
	in.mu.Lock()
	a.wantsRoom = true
	in.judge(a.slot)
	in.mu.Unlock()
	defer func() {
		in.mu.Lock()
		defer in.mu.Unlock()
		a.wantsRoom = false
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

// judge ends a body for its room on the disk. It looks at the bodies with a slot, or at those
// without one. It ends one body every roomEvery at most, however many bodies wait. The
// caller must hold in.mu.
func (in *intake) judge(slot bool) {
	last := &in.judgedHeads
	if slot {
		last = &in.judgedUploads
	}
	if time.Since(*last) < roomEvery {
		return
	}
	*last = time.Now()
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

// endFor ends one body at most. It looks at the bodies for which takes is above 0, and ends
// the first of these that there is:
//
//  1. the body that has been silent the longest, if for more than atLeast;
//  2. the slowest body below slowRate;
//  3. the body that takes the most, if several bodies take something and all of them wait
//     for room: they would wait for one another.
//
// It ends none while an ended body has not left yet. The caller must hold in.mu.
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
			return // a is about to leave, and gives its room back
		}
		if a.finished {
			continue
		}
		if d := a.silence(); d > longest {
			silent, longest = a, d
		}
		if !a.wantsRoom {
			others++
			continue
		}
		if waiting++; n > most {
			largest, most = a, n
		}
	}
	if silent != nil {
		silent.cancel(errEvicted)
		return
	}
	if !in.endSlowest(func(a *arrival) bool { return takes(a) > 0 }) && waiting > 1 && others == 0 {
		largest.cancel(errEvicted)
	}
}

// wake makes the first in line try again. The caller must hold in.mu.
func (in *intake) wake() {
	if len(in.waiting) == 0 {
		return
	}
	select {
	case in.waiting[0] <- struct{}{}:
	default:
	}
}

// endSlowest looks at the bodies for which among is true, and ends the slowest if it is below
// slowRate. It ends none while an ended body has not left yet. It returns whether any of
// them is about to leave. The caller must hold in.mu.
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
		if a.finished {
			continue
		}
		if speed := a.speed(); speed < least {
			slowest, least = a, speed
		}
	}
	if slowest != nil {
		slowest.cancel(errEvicted)
	}
	return slowest != nil
}

// speed is the rate of the body in bytes per second: over all of its time, or recently,
// whichever is less. It is infinite while it is too early to tell. Only time in Read counts.
func (a *arrival) speed() float64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.readEnded
	if now.IsZero() {
		now = time.Now()
	}
	took := now.Sub(a.start)
	if since := took - a.markAt; since >= burstCounts {
		a.recent, a.markN, a.markAt = rate(a.n-a.markN, since), a.n, took
	}
	return min(a.recent, rate(a.n, took))
}

// silence is how long the current Read has waited for a byte.
func (a *arrival) silence() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.readEnded.IsZero() {
		return 0
	}
	return time.Since(a.readBegan)
}

func rate(bytes int64, took time.Duration) float64 {
	if took < judgedAfter {
		return math.Inf(1)
	}
	return float64(bytes) / took.Seconds()
}

// Read reads the body. Its deadline moves on as bytes come. The time between two Reads is not
// the client's fault, so it does not count.
func (a *arrival) Read(b []byte) (int, error) {
	a.mu.Lock()
	now := time.Now()
	a.start = a.start.Add(now.Sub(a.readEnded))
	a.readBegan, a.readEnded = now, time.Time{}
	deadline := a.start.Add(a.in.limits.grace + time.Duration(float64(a.n)/float64(a.in.limits.rate)*float64(time.Second)))
	a.mu.Unlock()
	n, err := a.read(b, now, deadline)
	a.mu.Lock()
	a.n += int64(n)
	a.readEnded = time.Now()
	a.mu.Unlock()
	return n, err
}

func (a *arrival) read(b []byte, now, deadline time.Time) (int, error) {
	// To set a deadline takes time, so it is set only when it has moved by enough.
	if now.After(deadline) {
		return 0, os.ErrDeadlineExceeded
	} else if deadline.Sub(a.set) > a.in.limits.grace/8 {
		if err := a.rc.SetReadDeadline(deadline); err != nil {
			return 0, err
		}
		a.set = deadline
	}
	// This must come after the deadline is set: the deadline that ended the body may just
	// have been replaced.
	if a.ctx.Err() != nil {
		return 0, a.cause()
	}
	n, err := a.body.Read(b)
	switch {
	case err == io.EOF && !a.finish():
		// From now on net/http watches the connection, and would take the deadline in
		// the past for the client's leaving.
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
