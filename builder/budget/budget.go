// Package budget bounds what many requests take together, in bytes. It knows
// nothing of what the bytes are: memory, or a disk.
package budget

import "sync"

// Budget is a number of bytes that many accounts share. A nil Budget has no end.
type Budget struct {
	limit int64
	whole *Budget // that this one is a part of; nil for one of its own

	mu   sync.Mutex
	used int64
}

// New returns a Budget of limit bytes.
func New(limit int64) *Budget { return &Budget{limit: limit} }

// Part returns a Budget of limit bytes of b. What is taken of the part is taken of
// b too, and b may be spent before the part is.
func (b *Budget) Part(limit int64) *Budget { return &Budget{limit: limit, whole: b} }

// Used is how many bytes are taken.
func (b *Budget) Used() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

// take takes n bytes, or nothing. With force it takes them even if they are over
// the limit.
func (b *Budget) take(n int64, force bool) bool {
	if b == nil {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !force && b.used+n > b.limit || !b.whole.take(n, force) {
		return false
	}
	b.used += n
	return true
}

// give gives n bytes back to b and to what b is a part of, but not to upTo or beyond
// it. A nil upTo is beyond all.
func (b *Budget) give(n int64, upTo *Budget) {
	for ; b != nil && b != upTo; b = b.whole {
		b.mu.Lock()
		b.used -= n
		b.mu.Unlock()
	}
}

// partOf says that what is taken of b is taken of whole as well.
func (b *Budget) partOf(whole *Budget) bool {
	for ; b != nil; b = b.whole {
		if b == whole {
			return true
		}
	}
	return whole == nil
}

// Account is what one request has taken of a Budget. All its methods may be called
// concurrently. A nil Account takes from nowhere.
type Account struct {
	mu    sync.Mutex
	of    *Budget
	taken int64
}

// Open returns an empty Account. It must be closed.
func (b *Budget) Open() *Account { return &Account{of: b} }

// Take takes n bytes more, or none if the Budget has not got them.
func (a *Account) Take(n int64) bool { return a.add(n, false) }

// Must takes n bytes more, whatever is left. The next Take fails then.
func (a *Account) Must(n int64) { a.add(n, true) }

func (a *Account) add(n int64, force bool) bool {
	if a == nil {
		return true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.of.take(n, force) {
		return false
	}
	a.taken += n
	return true
}

// Taken is how many bytes are taken.
func (a *Account) Taken() int64 {
	if a == nil {
		return 0
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.taken
}

// Give gives n bytes back, which were taken before.
func (a *Account) Give(n int64) {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.of.give(n, nil)
	a.taken -= n
}

// Move has all that was taken counted against another Budget from now on. Where the
// other has not got as much, Move returns false and changes nothing.
func (a *Account) Move(to *Budget) bool {
	if a == nil {
		return true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.of.partOf(to) && !to.take(a.taken, false) {
		return false
	}
	a.of.give(a.taken, to)
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
