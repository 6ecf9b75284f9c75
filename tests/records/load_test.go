package records

import (
	"fmt"
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

	// A change is told at once, and not with the next heartbeat.
	const times = 5
	var took time.Duration
	for range times {
		began := time.Now()
		waits.Update(has)
		told(b, "map[acme:2] map[tcp://one:1234:2] true")
		waits.Update(func(r *records.Record) { r.Building = false })
		told(b, "map[acme:1] map[tcp://one:1234:2] true")
		took += time.Since(began)
	}
	t.Logf("a change is told within %v", took/(2*times))
	if took > 2*times*time.Second {
		t.Errorf("%d changes were told after %v", 2*times, took)
	}

	// A new process is not certain that it has heard all before it has listened for as long as
	// there may be between two heartbeats. But the others tell it at once what they have: without
	// that, half of the new ones would wait for a second and more.
	const fresh = 8
	var c *jetstream.Store
	began := time.Now()
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
	}
	took = time.Since(began)
	t.Logf("a new process has been told after %v", took/fresh)
	if took > fresh*time.Second {
		t.Errorf("%d new processes were told after %v", fresh, took)
	}
	told(c, "map[acme:1 other:1] map[tcp://one:1234:3 tcp://two:1234:1] true")
	for i, s := range []*jetstream.Store{a, c} {
		if l := s.Elsewhere(); l.Others != fresh+1 {
			t.Errorf("store %d hears %d others", i, l.Others)
		}
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
