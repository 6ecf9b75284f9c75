// Package budget bounds how many bytes many requests take together. It does not know
// whether they are of memory or of a disk.
package budget

import "sync"

// Budget is a number of bytes that many accounts share. A nil Budget is unlimited.
type Budget struct {
	limit int64
	whole *Budget // of which this one is a part; nil if it is no part

	mu   sync.Mutex
	used int64
}

// New returns a Budget of limit bytes.
func New(limit int64) *Budget { return &Budget{limit: limit} }

// Part returns a Budget of at most limit bytes of b. Bytes that are taken from the part are
// taken from b too. So b may be spent while the part is not.
func (b *Budget) Part(limit int64) *Budget { return &Budget{limit: limit, whole: b} }

// Used returns how many bytes are taken.
func (b *Budget) Used() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

// Left returns how many bytes are left of the limit. A Budget that this one is a part of may
// have fewer.
func (b *Budget) Left() int64 { return b.limit - b.Used() }

// take takes n bytes of b and of every Budget above it, up to upTo. It takes none of upTo
// itself, nor above it. If one of them does not have n bytes, it takes nothing and returns
// false. With force, it takes them even if they exceed a limit.
func (b *Budget) take(n int64, force bool, upTo *Budget) bool {
	if b == nil || b == upTo {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !force && b.used+n > b.limit || !b.whole.take(n, force, upTo) {
		return false
	}
	b.used += n
	return true
}

// give gives n bytes back to b and to every Budget above it, up to upTo. It gives none to upTo
// itself, nor above it. With a nil upTo, it gives them back to all.
func (b *Budget) give(n int64, upTo *Budget) {
	for ; b != nil && b != upTo; b = b.whole {
		b.mu.Lock()
		b.used -= n
		b.mu.Unlock()
	}
}

// partOf says whether bytes that are taken from b are taken from whole too.
func (b *Budget) partOf(whole *Budget) bool {
	for ; b != nil; b = b.whole {
		if b == whole {
			return true
		}
	}
	return whole == nil
}

// Account is what one request has taken from a Budget. Its methods may be called
// concurrently. A nil Account takes without a limit.
type Account struct {
	mu    sync.Mutex
	of    *Budget
	taken int64
}

// Open returns an empty Account. It must be closed.
func (b *Budget) Open() *Account { return &Account{of: b} }

// Take takes n bytes more, or none and returns false if the Budget does not have them.
func (a *Account) Take(n int64) bool { return a.add(n, false) }

// Must takes n bytes more, even if the Budget does not have them. Then Take fails until
// enough is given back.
func (a *Account) Must(n int64) { a.add(n, true) }

func (a *Account) add(n int64, force bool) bool {
	if a == nil {
		return true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.of.take(n, force, nil) {
		return false
	}
	a.taken += n
	return true
}

// Taken returns how many bytes are taken.
func (a *Account) Taken() int64 {
	if a == nil {
		return 0
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.taken
}

// Give gives back n bytes of those that were taken.
func (a *Account) Give(n int64) {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.of.give(n, nil)
	a.taken -= n
}

// Move makes a an account of the Budget to: it takes from to what a has taken, and gives it
// back to the old Budget. If both are parts of one Budget, nothing changes in that one. If to
// does not have enough, Move returns false and changes nothing.
func (a *Account) Move(to *Budget) bool {
	if a == nil {
		return true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	shared := to
	for shared != nil && !a.of.partOf(shared) {
		shared = shared.whole
	}
	if !to.take(a.taken, false, shared) {
		return false
	}
	a.of.give(a.taken, shared)
	a.of = to
	return true
}

// Close gives everything back. A second call does nothing.
func (a *Account) Close() {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.of.give(a.taken, nil)
	a.taken = 0
}
