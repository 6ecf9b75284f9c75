package records

import (
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"handler/function/records"
	"handler/function/records/jetstream"
	"handler/function/records/recordstest"
	"handler/function/tests/stack"
)

// TestElsewhere: each replica knows what the others have, and not its own, also one that has just
// begun.
func TestElsewhere(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{})
	var seats atomic.Int32
	a := opened(t, servers, func(o *jetstream.Options) {
		o.Daemons = func() map[string]int { return map[string]int{"tcp://one:1234": int(seats.Load())} }
	})
	b := opened(t, servers, func(o *jetstream.Options) {
		o.Daemons = func() map[string]int { return map[string]int{"tcp://one:1234": 1, "tcp://two:1234": 1} }
	})
	waits := recordstest.Begin(a, "acme", "waits")
	builds := recordstest.Begin(a, "acme", "builds")
	other := recordstest.Begin(b, "other", "builds")
	told := func(s *jetstream.Store, want string) {
		t.Helper()
		recordstest.Eventually(t, func() error {
			l := s.Elsewhere()
			if got := fmt.Sprint(l.Tenants, l.Daemons, l.Complete); got != want {
				return fmt.Errorf("others have %s, want %s", got, want)
			}
			return nil
		})
	}
	has := func(r *records.Record) { r.Building = true }
	seats.Store(2)
	builds.Update(has)
	other.Update(has)
	told(a, "map[other:1] map[tcp://one:1234:1 tcp://two:1234:1] true")
	told(b, "map[acme:1] map[tcp://one:1234:2] true")

	// A change is told at once, and not with the next heartbeat, which comes 2 s after the one before.
	// A busy machine may be late with a few of them.
	var took []time.Duration
	change := func(change func(*records.Record), want string) {
		t.Helper()
		began := time.Now()
		waits.Update(change)
		told(b, want)
		took = append(took, time.Since(began))
	}
	for range 5 {
		change(has, "map[acme:2] map[tcp://one:1234:2] true")
		change(func(r *records.Record) { r.Building = false }, "map[acme:1] map[tcp://one:1234:2] true")
	}
	slices.Sort(took)
	t.Logf("a change is told within %v", took)
	if took[len(took)/2] > time.Second {
		t.Errorf("the changes were told after %v", took)
	}

	// A new process is not certain that it has heard all before it has listened for as long as
	// there may be between two heartbeats. But the others tell it at once what they have: without
	// that, half of the new ones would wait for a second and more.
	const fresh = 8
	var c *jetstream.Store
	took = nil
	for range fresh {
		c = open(t, servers, nil)
		opened := time.Now()
		recordstest.Eventually(t, func() error {
			l := c.Elsewhere()
			if l.Complete && time.Since(opened) < 2*time.Second {
				t.Fatalf("it is certain after %v: %+v", time.Since(opened), l)
			}
			if l.Tenants["acme"] != 1 || l.Tenants["other"] != 1 {
				return fmt.Errorf("others have %+v", l)
			}
			return nil
		})
		took = append(took, time.Since(opened))
	}
	slices.Sort(took)
	t.Logf("a new process has been told after %v", took)
	if took[fresh/2] > time.Second {
		t.Errorf("the new processes were told after %v", took)
	}
	told(c, "map[acme:1 other:1] map[tcp://one:1234:3 tcp://two:1234:1] true")
	for i, s := range []*jetstream.Store{a, c} {
		recordstest.Eventually(t, func() error {
			if l := s.Elsewhere(); l.Others != fresh+1 {
				return fmt.Errorf("store %d hears %d others", i, l.Others)
			}
			return nil
		})
	}

	builds.End(recordstest.Success())
	seats.Store(0)
	told(b, "map[] map[tcp://one:1234:0] true")
	other.End(recordstest.Success())
	told(a, "map[] map[tcp://one:1234:1 tcp://two:1234:1] true")
	if err := b.Close(recordstest.Context(t)); err != nil {
		t.Error(err)
	}
	told(a, "map[] map[] true")
	told(c, "map[] map[tcp://one:1234:0] true")
}
