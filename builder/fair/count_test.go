package fair

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// TestCountBeforeSlot has builds of a tenant without a limit wait, and take every slot that
// becomes free. A tenant whose builds have to be counted elsewhere waits for one slot all the same.
func TestCountBeforeSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, 1)
		b.Elsewhere = func(context.Context) func(string) int { return func(string) int { return 0 } }
		many, one := Tenant{ID: "many"}, Tenant{ID: "one", Most: 2, Elsewhere: true}
		for i := range 200 {
			b.ask(many, fmt.Sprint("many ", i), time.Hour)
		}
		b.ask(one, "one", time.Hour)
		b.want("one slot", "many 0")
		time.Sleep(2 * countAge) // there has been a count, though no slot was free
		b.Release("many")
		b.want("the next", "one")
	})
}

// TestSlowCount: a count that takes longer than countAge counts, as one does where a daemon hangs.
func TestSlowCount(t *testing.T) {
	for _, wait := range []time.Duration{0, time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			s := New(4)
			const takes = countAge + countAge/5
			s.Elsewhere = func(ctx context.Context) func(string) int {
				sleep(ctx, takes)
				return func(string) int { return 0 }
			}
			began := time.Now()
			if err := s.Acquire(t.Context(), Tenant{ID: "one", Most: 2, Elsewhere: true}, wait); err != nil {
				t.Errorf("waiting for %v: %v", wait, err)
			}
			if took := time.Since(began); took != takes {
				t.Errorf("waiting for %v: it took %v", wait, took)
			}
			s.Release("one")
		})
	}
}
