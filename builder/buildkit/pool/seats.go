package pool

import (
	"maps"
	"sync"
)

// Seats counts the seats that this process has on each daemon. Pools share one count, by the
// address: a daemon may be in several pools, and may leave a pool and come back while its builds
// go on.
type Seats struct {
	mu sync.Mutex
	n  map[string]int // without zeros
}

// NewSeats returns a count of no seats.
func NewSeats() *Seats { return &Seats{n: make(map[string]int)} }

// All returns the counts by the daemons' addresses. A daemon without a seat is left out.
func (s *Seats) All() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.n)
}

func (s *Seats) on(addr string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n[addr]
}

// take counts one more, if there are fewer than limit.
func (s *Seats) take(addr string, limit int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n[addr] >= limit {
		return false
	}
	s.n[addr]++
	return true
}

// give counts one less.
func (s *Seats) give(addr string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n[addr]--; s.n[addr] == 0 {
		delete(s.n, addr)
	}
}
