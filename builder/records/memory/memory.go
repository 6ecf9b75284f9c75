// Package memory keeps records in the memory of one process. Other processes do not see them,
// and they are gone when it ends.
package memory

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"handler/function/api"
	"handler/function/records"
	"handler/function/records/batch"
)

// Limits says how much is kept. When the store is over one, it forgets the oldest build that
// has ended of the tenant that has the most of it. So each of n tenants can count on one nth.
// A tenant whose builds all run loses the oldest lines of its longest log.
type Limits struct {
	Age    time.Duration // since the end of a build
	Builds int           // that have ended
	Bytes  int           // of all records and logs
	Log    int           // bytes of one build's log
}

// Default has room for a day: Pro's queue stops delivering a request after hours.
var Default = Limits{Age: 24 * time.Hour, Builds: 1000, Bytes: 16 << 20, Log: records.MaxLog}

// overhead is about what a build takes in memory beside its texts, in bytes.
const overhead = 1 << 10

// Store is a records.Store.
type Store struct {
	limits    Limits
	followers records.Followers

	mu      sync.Mutex
	named   map[name][]*build // in the order of their attempts
	tenants map[string]*tenant
	ended   []*build // in the order in which they ended
	bytes   int      // of all builds
	order   uint64   // of the latest build
	dropped uint64
	used    records.Used
}

type name struct{ tenant, id string }

// tenant is what the builds of one tenant take.
type tenant struct {
	builds []*build // in the order in which they began
	ended  int
	bytes  int
}

// build is a records.Build.
type build struct {
	store  *Store
	name   name
	cancel func(by string)

	// All of this is under store.mu.
	order   uint64
	rec     records.Record
	log     []*batch.Batch
	bytes   int           // of log and rec, and overhead
	logged  int           // bytes of log alone
	changed chan struct{} // closed at the next line, and at the end
}

// New returns an empty store.
func New(limits Limits) *Store {
	return &Store{
		limits:    limits,
		followers: records.NewFollowers(),
		named:     make(map[name][]*build),
		tenants:   make(map[string]*tenant),
		used:      make(records.Used),
	}
}

func (s *Store) Begin(r records.Record, cancel func(by string)) records.Build {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire()
	b := &build{store: s, name: name{r.Tenant, r.ID}, cancel: cancel, rec: r, changed: make(chan struct{})}
	b.rec.Status, b.rec.Attempt, b.rec.Lines = api.InProgress, 1, 0
	if before := s.named[b.name]; len(before) > 0 {
		b.rec.Attempt = before[len(before)-1].rec.Attempt + 1
	}
	s.order++
	b.order = s.order
	s.named[b.name] = append(s.named[b.name], b)
	t := s.tenants[r.Tenant]
	if t == nil {
		t = new(tenant)
		s.tenants[r.Tenant] = t
	}
	t.builds = append(t.builds, b)
	b.resize()
	return b
}

func (b *build) Record() records.Record {
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	return b.rec
}

func (b *build) Update(change func(r *records.Record)) {
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	if !b.rec.Running() {
		return
	}
	b.rec.Change(change)
}

func (b *build) Log(lines ...string) {
	s := b.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if !b.rec.Running() || len(lines) == 0 {
		return
	}
	for _, line := range lines {
		line = records.ClipLine(line)
		var last *batch.Batch
		if len(b.log) > 0 {
			last = b.log[len(b.log)-1]
		}
		if last == nil || !last.Fits(line) {
			last = batch.New(b.rec.Lines + 1)
			b.log = append(b.log, last)
		}
		before := 0
		if last.Count > 0 {
			before = last.Cost()
		}
		last.Add(line)
		b.logged += last.Cost() - before
		b.rec.Lines++
	}
	for b.logged > s.limits.Log && len(b.log) > 1 {
		b.dropOldest()
	}
	b.resize()
	s.shrink()
	b.tell()
}

// dropOldest forgets the oldest lines. The caller calls resize.
func (b *build) dropOldest() {
	b.logged -= b.log[0].Cost()
	b.store.dropped += b.log[0].Count
	b.log[0] = nil
	b.log = b.log[1:]
}

// resize counts a build anew.
func (b *build) resize() {
	r := &b.rec
	size := overhead + b.logged + len(r.Error)
	for _, list := range [][]string{r.Tags, r.Platforms, r.Warnings} {
		for _, text := range list {
			size += len(text) + 16
		}
	}
	b.store.bytes += size - b.bytes
	b.store.tenants[b.name.tenant].bytes += size - b.bytes
	b.bytes = size
}

// tell wakes the followers.
func (b *build) tell() {
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *build) End(verdict api.Record) {
	s := b.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if !b.rec.Running() {
		return
	}
	b.rec.End(verdict)
	s.ended = append(s.ended, b)
	s.tenants[b.name.tenant].ended++
	b.resize()
	s.expire()
	s.shrink()
	b.tell()
}

// expire forgets the builds that ended too long ago.
func (s *Store) expire() {
	for len(s.ended) > 0 && time.Since(s.ended[0].rec.Ended) > s.limits.Age {
		s.forget(s.ended[0])
	}
}

// shrink brings the store below its limits.
func (s *Store) shrink() {
	for len(s.ended) > s.limits.Builds {
		s.forget(s.largest(func(t *tenant) int { return t.ended }).oldest())
	}
	for s.bytes > s.limits.Bytes {
		t := s.largest(func(t *tenant) int { return t.bytes })
		if old := t.oldest(); old != nil {
			s.forget(old)
			continue
		}
		b := slices.MaxFunc(t.builds, func(a, b *build) int { return a.logged - b.logged })
		if len(b.log) < 2 {
			return // it has nothing but its latest lines
		}
		b.dropOldest()
		b.resize()
	}
}

func (s *Store) largest(size func(*tenant) int) *tenant {
	var found *tenant
	for _, t := range s.tenants {
		if found == nil || size(t) > size(found) {
			found = t
		}
	}
	return found
}

// oldest returns the tenant's oldest build that has ended, or nil.
func (t *tenant) oldest() *build {
	if t.ended == 0 {
		return nil
	}
	i := slices.IndexFunc(t.builds, func(b *build) bool { return !b.rec.Running() })
	return t.builds[i]
}

// forget removes a build that has ended.
func (s *Store) forget(b *build) {
	is := func(other *build) bool { return other == b }
	s.named[b.name] = slices.DeleteFunc(s.named[b.name], is)
	if len(s.named[b.name]) == 0 {
		delete(s.named, b.name)
	}
	s.ended = slices.DeleteFunc(s.ended, is)
	t := s.tenants[b.name.tenant]
	t.builds = slices.DeleteFunc(t.builds, is)
	t.ended--
	t.bytes -= b.bytes
	s.bytes -= b.bytes
	if len(t.builds) == 0 {
		delete(s.tenants, b.name.tenant)
	}
}

// find returns a build, or nil.
func (s *Store) find(ref records.Ref) *build {
	s.expire()
	all := s.named[name{ref.Tenant, ref.ID}]
	if len(all) == 0 {
		return nil
	}
	if ref.Attempt == 0 {
		return all[len(all)-1]
	}
	i := slices.IndexFunc(all, func(b *build) bool { return b.rec.Attempt == ref.Attempt })
	if i < 0 {
		return nil
	}
	return all[i]
}

func (s *Store) Get(ctx context.Context, ref records.Ref) (records.Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.find(ref)
	if b == nil {
		return records.Record{}, records.ErrNotFound
	}
	return b.rec, nil
}

func (s *Store) Find(ctx context.Context, tenant, id, request string) (records.Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire()
	for _, b := range slices.Backward(s.named[name{tenant, id}]) {
		if b.rec.Request == request && (b.rec.Running() || b.rec.Final()) {
			return b.rec, nil
		}
	}
	return records.Record{}, records.ErrNotFound
}

func (s *Store) Everywhere(ctx context.Context, id string) ([]records.Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire()
	var found []records.Record
	for name, all := range s.named {
		if name.id == id {
			found = append(found, all[len(all)-1].rec)
		}
	}
	if len(found) == 0 {
		return nil, records.ErrNotFound
	}
	return found, nil
}

// List's Complete is true: the caller knows whether there are other processes.
func (s *Store) List(ctx context.Context, q records.Query) (records.Page, error) {
	before := ^uint64(0)
	if q.Before != "" {
		var err error
		if before, err = strconv.ParseUint(q.Before, 10, 64); err != nil {
			return records.Page{}, fmt.Errorf("listing builds: %q is not from an earlier page", q.Before)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire()
	var found []*build
	for id, t := range s.tenants {
		if !q.Operator && id != q.Tenant {
			continue
		}
		for _, b := range t.builds {
			if b.order < before && q.Matches(&b.rec) {
				found = append(found, b)
			}
		}
	}
	slices.SortFunc(found, func(a, b *build) int { return int(int64(b.order) - int64(a.order)) })
	page := records.Page{Complete: true}
	for i, b := range found {
		if i == q.Size() {
			page.Next = strconv.FormatUint(found[i-1].order, 10)
			break
		}
		page.Builds = append(page.Builds, b.rec)
	}
	return page, nil
}

func (s *Store) Cancel(ctx context.Context, c records.Cancellation) (records.Record, error) {
	s.mu.Lock()
	b := s.find(c.Ref)
	switch {
	case b == nil:
		s.mu.Unlock()
		return records.Record{}, records.ErrNotFound
	case !s.used.Use(c.Once):
		s.mu.Unlock()
		return records.Record{}, records.ErrUsed
	case !b.rec.Running():
		defer s.mu.Unlock()
		return b.rec, nil
	}
	if b.rec.CanceledBy == "" {
		b.rec.CanceledBy = c.By
	}
	rec := b.rec
	s.mu.Unlock()
	b.cancel(c.By)
	return rec, nil
}

func (s *Store) Forget(ctx context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for t := s.tenants[id]; t != nil && t.ended > 0; {
		s.forget(t.oldest())
	}
	return nil
}

func (s *Store) Stats() records.Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return records.Stats{Reachable: true, Dropped: s.dropped, Followers: len(s.followers)}
}

func (s *Store) Close(ctx context.Context) error { return nil }
