// Package fair gives slots to tenants, so that none of them waits for all builds of another.
// It does not know what a slot is for.
//
// A slot goes to the waiting tenant that has the fewest slots for its weight. If two have
// equally few, it goes to the one that was given fewer lately, and if that is equal too, to the
// one that has waited longer. Within one tenant, first come is first served.
//
// Example: there are two slots. Tenant a has both, and a hundred calls waiting. Then b comes
// with two calls. When a releases a slot, it goes to b, because b has none and a has one. From
// then on each has one slot, until b wants no more.
package fair

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// Tenant is who asks for a slot.
type Tenant struct {
	ID     string
	Weight int // its share of the slots, beside the others'; below 1 is 1
	Most   int // slots at once; zero is no limit
	Queue  int // that may wait; zero is no limit

	// With Elsewhere, Most also counts the tenant's slots in other processes, which
	// Slots.Elsewhere tells.
	Elsewhere bool
}

// Errors of Acquire.
var (
	ErrFull  = errors.New("no slot became free in time")
	ErrMost  = errors.New("the tenant has the most slots that it may have")
	ErrQueue = errors.New("as many as the tenant's queue allows wait already")
)

// Slots are a number of slots. Its methods may be called concurrently.
type Slots struct {
	// Elsewhere counts what tenants have in other processes, by the tenant's id. It returns nil
	// if there are none. It is called about once a second while a count may decide who gets a
	// slot, one call at a time, and must return soon after ctx has ended. It is needed for a
	// Tenant with Elsewhere, and must not be changed after the first Acquire.
	Elsewhere func(ctx context.Context) func(id string) int

	mu      sync.Mutex
	free    int
	tenants map[string]*tenant // that have or want a slot, or were given more than others lately
	came    uint64             // how many have begun to wait
	count   count

	// given is where a tenant that comes begins: what the tenant of the last slot had been
	// given before that slot. A new tenant is owed nothing for the time before it came.
	given float64
}

// tenant is a Tenant that has or wants slots.
type tenant struct {
	Tenant
	running int
	waiting []*waiter
	given   float64 // the sum of 1/Weight over the slots that it got

	counting, counted int // running when the count that runs, or the last one, began
}

// waiter is a call of Acquire.
type waiter struct {
	came   uint64
	wait   bool       // for a slot that others have; if not, only for a count
	result chan error // has room for one
}

// New returns n free Slots.
func New(n int) *Slots { return &Slots{free: n, tenants: make(map[string]*tenant)} }

// Taken returns how many slots are taken, of all tenants.
func (s *Slots) Taken() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, t := range s.tenants {
		n += t.running
	}
	return n
}

// Try takes a slot for t if it needs no wait, not even for a count, and says whether it has.
func (s *Slots) Try(t Tenant) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.tidy()
	of := s.tenant(t)
	if len(of.waiting) > 0 || s.free == 0 || s.may(of) != yes {
		return false
	}
	s.give(of)
	return true
}

// Acquire takes a slot for t. It waits for one for as long as wait. With a wait of zero, it
// waits only if the slot depends on a count of what t has elsewhere. Such a wait takes countAge
// and a call of Elsewhere, at most t.Most times.
//
// # Errors
//
// Without a wait, the error is ErrMost if t has its most, and ErrFull if all slots are taken.
// With a wait, it is ErrQueue if t.Queue others wait already. After the wait it is ErrMost or
// ErrFull too. If ctx ends, it is ctx's cause.
func (s *Slots) Acquire(ctx context.Context, t Tenant, wait time.Duration) error {
	of, w, err := s.enter(t, wait > 0)
	if err != nil {
		return err
	}
	var timeout <-chan time.Time
	if wait > 0 {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		timeout = timer.C
	}
	select {
	case err := <-w.result:
		return err
	case <-timeout:
		return s.leave(of, w, nil)
	case <-ctx.Done():
		return s.leave(of, w, context.Cause(ctx))
	}
}

// enter has t wait for a slot. The slot may be there already.
func (s *Slots) enter(t Tenant, wait bool) (*tenant, *waiter, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.tidy()
	of := s.tenant(t)
	if wait && t.Queue > 0 && of.queue() >= t.Queue {
		return nil, nil, ErrQueue
	}
	s.came++
	w := &waiter{came: s.came, wait: wait, result: make(chan error, 1)}
	of.waiting = append(of.waiting, w)
	s.deal()
	return of, w, nil
}

// leave ends a wait, because of cause or, if that is nil, because its time has passed. A slot
// that came meanwhile is taken, unless there is a cause.
func (s *Slots) leave(of *tenant, w *waiter, cause error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.tidy()
	i := slices.Index(of.waiting, w)
	if i < 0 {
		err := <-w.result
		if err == nil && cause != nil {
			s.takeBack(of)
			s.deal()
			return cause
		}
		return err
	}
	of.waiting = slices.Delete(of.waiting, i, i+1)
	switch {
	case cause != nil:
		return cause
	case s.free > 0 || s.may(of) == no:
		return ErrMost
	}
	return ErrFull
}

// Release gives a slot of the tenant with that id back.
func (s *Slots) Release(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.tidy()
	s.takeBack(s.tenants[id])
	s.deal()
}

// The caller of all functions below must hold s.mu.

// tenant returns the known tenant with t's id, or a new one, with t's limits.
func (s *Slots) tenant(t Tenant) *tenant {
	t.Weight = max(t.Weight, 1)
	of := s.tenants[t.ID]
	if of == nil {
		of = &tenant{given: s.given}
		s.tenants[t.ID] = of
	}
	of.Tenant = t
	return of
}

// queue is how many wait for a slot.
func (t *tenant) queue() (n int) {
	for _, w := range t.waiting {
		if w.wait {
			n++
		}
	}
	return n
}

func (s *Slots) give(t *tenant) {
	s.free--
	t.running++
	s.given = max(t.given, s.given)
	t.given = s.given + 1/float64(t.Weight)
}

func (s *Slots) takeBack(t *tenant) {
	s.free++
	t.running--
}

// tidy forgets each tenant that has and wants no slot and was not given more than others
// lately. It ends a count that nobody waits for. Once nobody has or wants a slot, it forgets
// all.
func (s *Slots) tidy() {
	idle := true
	for id, t := range s.tenants {
		switch {
		case t.running > 0 || len(t.waiting) > 0:
			idle = false
		case t.given <= s.given:
			delete(s.tenants, id)
		}
	}
	if idle {
		clear(s.tenants)
		s.given = 0
	}
	if s.count.stop != nil && !s.wanted() {
		s.count.stop()
	}
}

// deal gives out the free slots, and ends the waits that cannot bring a slot.
func (s *Slots) deal() {
	for next := s.next(); next != nil; next = s.next() {
		w := next.waiting[0]
		next.waiting = slices.Delete(next.waiting, 0, 1)
		s.give(next)
		w.result <- nil
	}
	for _, t := range s.tenants {
		s.refuse(t)
	}
	s.startCount()
}

// next is the tenant that gets the next slot, or nil.
func (s *Slots) next() *tenant {
	if s.free == 0 {
		return nil
	}
	var first *tenant
	for _, t := range s.tenants {
		if len(t.waiting) > 0 && s.may(t) == yes && (first == nil || t.before(first)) {
			first = t
		}
	}
	return first
}

// before says whether t gets a slot before other. Both want one.
func (t *tenant) before(other *tenant) bool {
	mine, its := t.running*other.Weight, other.running*t.Weight
	switch {
	case mine != its:
		return mine < its
	case t.given != other.given:
		return t.given < other.given
	}
	return t.waiting[0].came < other.waiting[0].came
}

// refuse ends the waits of t that are only for a count, unless a count can still bring a slot.
func (s *Slots) refuse(t *tenant) {
	why := ErrFull
	switch may := s.may(t); {
	case may == no:
		why = ErrMost
	case s.free > 0:
		return
	}
	t.waiting = slices.DeleteFunc(t.waiting, func(w *waiter) bool {
		if !w.wait {
			w.result <- why
		}
		return !w.wait
	})
}
