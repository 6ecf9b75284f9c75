package records

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"handler/function/records"
	"handler/function/records/recordstest"
)

// load is a build that logs, and what its calls took.
type load struct {
	records.Build
	ref        records.Ref
	ran        clock
	worst      time.Duration // of all calls, by the clock
	n          atomic.Uint64 // lines so far
	stop, done chan struct{} // of the goroutine that logs
}

// run begins a build that logs a line every millisecond or so.
func run(s records.Store, id string) *load {
	l := &load{ref: records.Ref{Tenant: "acme", ID: id}, ran: clock{end: make(chan struct{})}}
	go l.ran.run()
	l.timed(func() { l.Build = recordstest.Begin(s, "acme", id) })
	l.resume()
	return l
}

// pause ends the logging, until resume. Once it has returned, no call is under way.
func (l *load) pause() {
	close(l.stop)
	<-l.done
}

func (l *load) resume() {
	l.stop, l.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(l.done)
		for {
			select {
			case <-l.stop:
				return
			case <-time.After(time.Millisecond):
				l.timed(func() { l.Log(fmt.Sprintf("l: line %d", l.n.Add(1))) })
			}
		}
	}()
}

func (l *load) end() {
	l.pause()
	l.timed(func() { l.End(recordstest.Success()) })
	close(l.ran.end)
}

// lines is how many there are.
func (l *load) lines() uint64 { return l.n.Load() }

func (l *load) timed(call func()) {
	began := l.ran.now()
	call()
	l.worst = max(l.worst, l.ran.now()-began)
}

// quick is how long a call of a build may take on a machine that does other things too, by a clock.
// A call that waits for a server takes 2 s or more.
const quick = time.Second

// clock is the time that this process has run. A machine that is busy may give a process nothing for
// seconds, and the call that it was in has not waited for a server. So the clock ticks every 10 ms,
// and a tick that comes late counts as maxTick. Example: a call that takes 3 s, of which the process
// stood still for 2.9 s, took 200 ms at most.
type clock struct {
	ns   atomic.Int64
	late atomic.Int64  // the longest time between two ticks, in ns
	end  chan struct{} // is closed
}

const maxTick = 100 * time.Millisecond

func (c *clock) now() time.Duration { return time.Duration(c.ns.Load()) }

// longest is for how long the process has stood still at most.
func (c *clock) longest() time.Duration { return time.Duration(c.late.Load()) }

// run ticks until end is closed.
func (c *clock) run() {
	ticks := time.NewTicker(10 * time.Millisecond)
	defer ticks.Stop()
	for last := time.Now(); ; {
		select {
		case <-c.end:
			return
		case <-ticks.C:
			now := time.Now()
			took := now.Sub(last)
			c.ns.Add(int64(min(took, maxTick)))
			c.late.Store(max(c.late.Load(), int64(took)))
			last = now
		}
	}
}

// stored waits until a process has nothing left that the servers do not have.
func stored(t *testing.T, s records.Store) {
	t.Helper()
	recordstest.Eventually(t, func() error {
		if p := s.Stats().Pending; p > 0 {
			return fmt.Errorf("%d bytes are pending", p)
		}
		return nil
	})
}
