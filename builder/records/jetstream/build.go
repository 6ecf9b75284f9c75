package jetstream

import (
	"container/list"
	"crypto/cipher"
	"crypto/rand"
	"slices"
	"time"

	"handler/function/api"
	"handler/function/records"
	"handler/function/records/batch"
)

// build is a records.Build. The first block does not change. The writer alone uses tried, stored and
// storedN, and it alone sets place and aead, which it reads without a lock. Everything else, and
// setting place, is under store.mu.
type build struct {
	store  *Store
	name   name
	id     string // tells it from all other builds
	key    *key
	cancel func(by string)
	wake   chan struct{} // has a value when the writer has something to do

	rec    records.Record
	ended  *list.Element   // of *item in the queue; set at the end, and not unset
	gone   bool            // it was forgotten before it could be stored
	lines  []*list.Element // of *item in the queue, with the lines that are not stored yet
	writer *list.Element   // of lines: the writer has it, and nobody may change it

	// What is stored.
	place      place
	tried      int       // the attempt whose first record was sent last; 0 if none was
	epoch      time.Time // of the stream that has the record; zero if none has
	order      uint64
	turn       int
	dirty      bool      // the record has changed
	failed     bool      // the latest write was refused
	done       bool      // the verdict is stored
	stuckSince time.Time // the oldest lines could not be stored; zero if they have not been tried
	overtakes  bool      // the verdict is tried before the lines
	marked     bool      // the mark at the end of the log is tried
	aead       cipher.AEAD
	stored     []segment // of the log
	storedN    int       // bytes of stored
}

// item is something in the queue of what is not stored yet: lines, or the end of a build.
type item struct {
	build *build
	lines *batch.Batch // nil for an end
	cost  int
	at    time.Time
}

// segment is a part of a log in its stream.
type segment struct {
	last  uint64 // sequence of its last message
	bytes int
}

func (s *Store) Begin(r records.Record, cancel func(by string)) records.Build {
	b := &build{
		store: s, name: name{r.Tenant, r.ID}, id: rand.Text(), key: s.ring.Load().keys[0], cancel: cancel,
		wake: make(chan struct{}, 1), rec: r,
	}
	b.rec.Status, b.rec.Attempt, b.rec.Lines = api.InProgress, 0, 0
	s.mu.Lock()
	defer s.mu.Unlock()
	s.builds[b.name] = append(s.builds[b.name], b)
	s.beatSoon()
	s.writers.Add(1)
	go b.write()
	return b
}

// poke wakes the writer.
func (b *build) poke() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

func (b *build) Record() records.Record {
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	return b.rec
}

func (b *build) Update(change func(r *records.Record)) {
	s := b.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.ended != nil {
		return
	}
	was := b.rec
	b.rec.Change(change)
	if b.rec.Building != was.Building || b.rec.Daemon != was.Daemon {
		s.beatSoon()
	}
	b.dirty = true
	b.poke()
}

func (b *build) Log(lines ...string) {
	s := b.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.ended != nil {
		return
	}
	for _, line := range lines {
		b.add(records.ClipLine(line))
	}
	s.shrink()
}

// add puts a line into the queue.
func (b *build) add(line string) {
	s := b.store
	var last *item
	if n := len(b.lines); n > 0 && b.lines[n-1] != b.writer {
		last = b.lines[n-1].Value.(*item)
	}
	if last == nil || !last.lines.Fits(line) {
		last = &item{build: b, lines: batch.New(b.rec.Lines + 1), at: time.Now()}
		b.lines = append(b.lines, s.queue.PushBack(last))
		b.poke()
	}
	last.lines.Add(line)
	b.rec.Lines++
	cost := itemCost + last.lines.Cost()
	s.pending += cost - last.cost
	last.cost = cost
	if last.lines.Full() {
		b.poke()
	}
}

func (b *build) End(verdict api.Record) {
	s := b.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.ended != nil {
		return
	}
	b.rec.End(verdict)
	end := &item{build: b, cost: buildCost + len(b.rec.Error), at: time.Now()}
	for _, w := range b.rec.Warnings {
		end.cost += len(w)
	}
	b.ended = s.queue.PushBack(end)
	s.pending += end.cost
	s.shrink()
	s.beatSoon()
	b.poke()
}

// shrink drops the oldest lines that are not stored, until the rest is below the limit. What a
// writer has in hand stays. If there are no more lines, it forgets the builds that ended first.
func (s *Store) shrink() {
	for e := s.queue.Front(); e != nil && s.pending > maxPending; {
		next := e.Next()
		if it := e.Value.(*item); it.lines != nil && e != it.build.writer {
			s.dropped += it.lines.Count
			it.build.remove(e)
		}
		e = next
	}
	for e := s.queue.Front(); e != nil && s.pending > maxPending; {
		it := e.Value.(*item)
		if e = e.Next(); it.lines == nil {
			s.forget(it.build)
			e = s.queue.Front()
		}
	}
}

// remove takes lines off the queue: they are stored, or dropped.
func (b *build) remove(e *list.Element) {
	i := slices.Index(b.lines, e) // mostly 0
	copy(b.lines[1:i+1], b.lines[:i])
	b.lines[0] = nil // the array behind the slice is kept, and must not keep the lines
	b.lines = b.lines[1:]
	b.store.pending -= e.Value.(*item).cost
	b.store.queue.Remove(e)
}

// forget gives up an ended build that could not be stored. If a store has a record of it, the
// others find that this process no longer has the build, and that it is lost.
func (s *Store) forget(b *build) {
	s.forgotten++
	for len(b.lines) > 0 {
		s.dropped += b.lines[0].Value.(*item).lines.Count
		b.remove(b.lines[0])
	}
	b.writer = nil
	b.gone = true
	s.leave(b)
	b.poke()
}

// leave takes a build that is stored, or given up, off the store.
func (s *Store) leave(b *build) {
	s.pending -= b.ended.Value.(*item).cost
	s.queue.Remove(b.ended)
	all := slices.DeleteFunc(s.builds[b.name], func(other *build) bool { return other == b })
	if s.builds[b.name] = all; len(all) == 0 {
		delete(s.builds, b.name)
	}
}

// local returns this process's build that a Ref names, or nil. Of several it is the latest.
func (s *Store) local(tenant, id string, attempt int) *build {
	all := s.builds[name{tenant, id}]
	for i := len(all) - 1; i >= 0; i-- {
		if attempt == 0 || all[i].rec.Attempt == attempt {
			return all[i]
		}
	}
	return nil
}
