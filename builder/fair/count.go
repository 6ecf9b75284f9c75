package fair

import (
	"context"
	"time"
)

// countAge is how long a count of what tenants have in other processes is believed, and the
// least time between two counts.
const countAge = time.Second

// count is the last count of what tenants have in other processes.
type count struct {
	began time.Time
	of    func(id string) int // nil before the first count
	stop  context.CancelFunc  // of the goroutine that counts; nil without one
}

func (c *count) fresh() bool { return c.of != nil && time.Since(c.began) < countAge }

// answer says whether a tenant may have one slot more.
type answer int

const (
	no answer = iota
	yes
	unknown // a count has to tell
)

// may says whether t may have one slot more than it has.
//
// From one count to the next it gets one more than it had at most, because no other process sees
// that one yet, and others may do the same. For example t may have 3 slots, and two processes
// count 2. Each gives t one, so that it has 4: one too many for each process but one.
func (s *Slots) may(t *tenant) answer {
	switch {
	case t.Most <= 0:
		return yes
	case t.running >= t.Most:
		return no
	case !t.Elsewhere:
		return yes
	case !s.count.fresh():
		return unknown
	case t.running+s.count.of(t.ID) >= t.Most:
		return no
	case t.running > t.counted:
		return unknown
	}
	return yes
}

// wanted says whether somebody waits for a count: a slot is free, and only what a tenant has
// elsewhere may keep it from him.
func (s *Slots) wanted() bool {
	if s.free == 0 {
		return false
	}
	for _, t := range s.tenants {
		if len(t.waiting) > 0 && t.Elsewhere && t.running < t.Most {
			return true
		}
	}
	return false
}

// startCount starts the goroutine that counts, if somebody wants it and none runs.
func (s *Slots) startCount() {
	if s.count.stop != nil || !s.wanted() {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.count.stop = cancel
	go s.counts(ctx)
}

// counts counts once in countAge, until nobody wants it. It takes s.mu itself.
func (s *Slots) counts(ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ctx.Err() == nil {
		if rest := countAge - time.Since(s.count.began); rest > 0 {
			s.unlocked(func() { sleep(ctx, rest) })
			continue
		}
		for _, t := range s.tenants {
			t.counting = t.running
		}
		began := time.Now()
		var of func(string) int
		s.unlocked(func() { of = s.Elsewhere(ctx) })
		if ctx.Err() != nil {
			break
		}
		for _, t := range s.tenants {
			t.counted = t.counting
		}
		s.count.began, s.count.of = began, of
		s.deal()
		s.tidy()
	}
	s.count.stop()
	s.count.stop = nil
	s.startCount() // somebody may have come since
}

// unlocked calls f without s.mu.
func (s *Slots) unlocked(f func()) {
	s.mu.Unlock()
	defer s.mu.Lock()
	f()
}

// sleep returns after d, or when ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
