package fair

import (
	"context"
	"time"
)

// countAge is the least time between two counts of what tenants have in other processes. A count
// is believed for twice as long after its end, so that a slow one is not old when it comes.
const countAge = time.Second

// count is the last count of what tenants have in other processes.
type count struct {
	began time.Time
	ended time.Time
	of    func(id string) int // nil if there are no other processes
	stop  context.CancelFunc  // of the goroutine that counts; nil without one
}

func (c *count) fresh() bool { return time.Since(c.ended) < 2*countAge }

// answer says whether a tenant may have one slot more.
type answer int

const (
	no answer = iota
	yes
	unknown // a count has to tell
)

// may says whether t may have one slot more than it has.
//
// Between two counts t gets at most one slot more. Other processes do not see this slot before
// their next count, and each of them may give one too. Example: t may have 3 slots, and two
// processes count 2. Each gives t one, so that t has 4. With n processes, t can have n-1 too
// many.
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
	case s.count.of == nil:
		return yes
	case t.running+s.count.of(t.ID) >= t.Most:
		return no
	case t.running > t.counted:
		return unknown
	}
	return yes
}

// wanted says whether a count may decide who gets a free slot, or the next slot that becomes
// free. If counting began only when a slot is free, a tenant that needs a count would always
// come after one that needs none.
func (s *Slots) wanted() bool {
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
		s.count = count{began: began, ended: time.Now(), of: of, stop: s.count.stop}
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
