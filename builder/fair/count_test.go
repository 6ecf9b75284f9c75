package fair

import (
	"context"
	"testing"
	"time"
)

// TestCountBeforeSlot has builds of a tenant without a limit wait, and take every slot that
// becomes free. A tenant whose builds have to be counted elsewhere waits for one slot all the same.
func TestCountBeforeSlot(t *testing.T) {
	s := New(1)
	s.Elsewhere = func(context.Context) func(string) int { return func(string) int { return 0 } }
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	many, one := Tenant{ID: "many"}, Tenant{ID: "one", Most: 2, Elsewhere: true}
	if err := s.Acquire(ctx, many, time.Minute); err != nil {
		t.Fatal(err)
	}
	for range 200 {
		go func() {
			if s.Acquire(ctx, many, time.Minute) == nil {
				time.Sleep(10 * time.Millisecond)
				s.Release("many")
			}
		}()
	}
	got := make(chan error, 1)
	go func() { got <- s.Acquire(ctx, one, time.Minute) }()
	time.Sleep(2 * countAge) // there has been a count, though no slot was free
	s.Release("many")
	select {
	case err := <-got:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Second):
		t.Error("100 builds of another tenant came first")
	}
}

// TestSlowCount: a count that takes longer than countAge counts, as one does where a daemon hangs.
func TestSlowCount(t *testing.T) {
	for _, wait := range []time.Duration{0, time.Minute} {
		s := New(4)
		s.Elsewhere = func(ctx context.Context) func(string) int {
			sleep(ctx, countAge+countAge/5)
			return func(string) int { return 0 }
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := s.Acquire(ctx, Tenant{ID: "one", Most: 2, Elsewhere: true}, wait); err != nil {
			t.Errorf("waiting for %v: %v", wait, err)
		}
		s.Release("one")
	}
}
