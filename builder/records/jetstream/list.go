package jetstream

import (
	"bytes"
	"cmp"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	js "github.com/nats-io/nats.go/jetstream"

	"handler/function/records"
)

// What a scan asks for at once.
const (
	scanBatch = 1024                   // messages
	scanBytes = 4 << 20                // of these messages: a record is of about 1 KB, and can be of 100 KB
	scanFor   = 200 * time.Millisecond // that it waits for them; usually all are there
)

// candidate is a record that a page may have.
type candidate struct {
	order uint64
	at    place
	text  []byte // as decode reads it
}

// newest is a heap of candidates, the oldest first.
type newest []candidate

func (h newest) Len() int           { return len(h) }
func (h newest) Less(i, j int) bool { return h[i].order < h[j].order }
func (h newest) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *newest) Push(x any)        { *h = append(*h, x.(candidate)) }
func (h *newest) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}

// scan reads the records of a query, from the end of the stream to its beginning, and keeps those
// of one page. All records of a build come after its first one, whose sequence is the build's
// order. So a page is complete when all of its builds have a higher order than what was not read.
type scan struct {
	q      records.Query
	ring   *ring
	before uint64
	size   int // of the page, and one

	tenants map[*key]string // the hashes of the query's tenant; nil for an operator
	page    newest          // builds that have a verdict
	ended   map[string]bool // they, by the base of their subjects
	open    map[string]*openBuild
	read    int    // messages of parts that were not filtered
	own     int    // those of them that belong to the query's tenant
	sifted  bool   // the server filters the messages
	top     uint64 // the highest sequence that was read
	came    uint64 // messages of the consumer that is read
}

// openBuild is a build without a verdict, as far as was read. Most of these have one a few
// messages later, so they are not opened before the end.
type openBuild struct {
	at        place
	run, mark *message
}

// message is a record's, as it is in the stream.
type message struct {
	subject string
	data    []byte
	seq     uint64
}

func (s *Store) List(ctx context.Context, q records.Query) (records.Page, error) {
	sc := &scan{
		q: q, ring: s.ring.Load(), before: ^uint64(0), size: q.Size() + 1,
		ended: make(map[string]bool), open: make(map[string]*openBuild),
	}
	if !q.Operator {
		sc.tenants = make(map[*key]string)
		for _, k := range sc.ring.keys {
			sc.tenants[k] = k.tenant(q.Tenant)
		}
	}
	if q.Before != "" {
		var err error
		if sc.before, err = strconv.ParseUint(q.Before, 10, 64); err != nil {
			return records.Page{}, fmt.Errorf("listing builds: %q is not from an earlier page", q.Before)
		}
	}
	select {
	case s.scans <- struct{}{}:
		defer func() { <-s.scans }()
	case <-ctx.Done():
		return records.Page{}, context.Cause(ctx)
	}
	complete := true
	if err := s.scan(ctx, sc); err != nil {
		if err := s.failed(ctx, err); ctx.Err() != nil {
			return records.Page{}, err
		}
		complete = false
	}
	page := s.pageOf(sc)
	page.Complete = complete && !s.othersBehind()
	return page, nil
}

// scan reads parts of the stream that become larger, until the page is complete.
func (s *Store) scan(ctx context.Context, sc *scan) error {
	st, err := s.current()
	if err != nil {
		return err
	}
	asked, cancel := timed(ctx)
	defer cancel()
	info, err := st.records.Info(asked)
	if err != nil {
		return err
	}
	// A stream that has never had a message begins at 0, where no consumer can start.
	first, last := max(info.State.FirstSeq, 1), info.State.LastSeq
	for hi, part := last+1, uint64(4*sc.size+256); hi > first; part *= 4 {
		lo := first
		if hi-first > part {
			lo = hi - part
		}
		if err := s.scanPart(asked, st, sc, lo, hi); err != nil {
			return err
		}
		if page := sc.settled(); len(page) >= sc.size && page[0].order >= lo {
			break
		}
		hi = lo
	}
	// What was stored again meanwhile has gone to the end.
	if info, err = st.records.Info(asked); err != nil || info.State.LastSeq <= sc.top {
		return err
	}
	return s.scanPart(asked, st, sc, sc.top+1, info.State.LastSeq+1)
}

// scanPart reads from one sequence to another, with a fresh consumer: one from before a server was
// lost could stay deaf for ever.
func (s *Store) scanPart(ctx context.Context, st *streams, sc *scan, lo, hi uint64) error {
	filters := sc.filters()
	c, err := st.records.CreateConsumer(ctx, js.ConsumerConfig{
		FilterSubjects: filters, DeliverPolicy: js.DeliverByStartSequencePolicy, OptStartSeq: lo, AckPolicy: js.AckNonePolicy,
		MemoryStorage: true, Replicas: 1, InactiveThreshold: 10 * time.Second,
	})
	if err != nil {
		return err
	}
	info := c.CachedInfo()
	defer s.drop(st.records, info.Name)
	// It may be more than there are below hi. To read some above hi again changes nothing.
	left := int(min(info.NumPending, hi-lo))
	sc.came = 0
	for left > 0 {
		got, at, err := sc.take(c.Fetch(min(left, scanBatch), js.FetchMaxBytes(scanBytes), js.FetchMaxWait(scanFor)))
		if got == 0 && err == nil {
			// The rest was replaced meanwhile, or the next message alone is over scanBytes.
			got, at, err = sc.take(c.FetchNoWait(1))
		}
		if err := cmp.Or(err, ctx.Err()); err != nil {
			return err
		}
		if left -= got; at >= hi {
			return nil
		}
		if got == 0 {
			return whole(ctx, c, sc.came)
		}
	}
	return nil
}

// errMissed is of a message that the server has sent and that has not come.
var errMissed = errors.New("reading records: some have not come")

// whole says with its error that a consumer has messages that have not come. A fetch ends without an
// error after a silence, and the server does not send again what it has sent.
func whole(ctx context.Context, c js.Consumer, got uint64) error {
	info, err := c.Info(ctx)
	switch {
	case err != nil:
		return err
	case info.NumPending > 0 || info.Delivered.Consumer != got:
		return fmt.Errorf("reading records: %d of %d have come, and %d are still to be sent", got, info.Delivered.Consumer, info.NumPending)
	}
	return nil
}

// filters are the subjects to ask a server for. It returns none to ask for all messages: to look for
// a subject takes the server longer than to send a message. An operator's scan always asks for
// all. A tenant's scan does until it has found that most messages belong to others. From then on it
// filters. Example: of the first 460 messages, 200 belong to the tenant. All later parts are filtered.
func (sc *scan) filters() (subjects []string) {
	if sc.tenants == nil || !sc.sifted && 2*sc.own >= sc.read {
		return nil
	}
	sc.sifted = true
	for k, tenant := range sc.tenants {
		subjects = append(subjects, "builder.rec."+k.id+"."+tenant+".*.*.*")
	}
	return subjects
}

// take adds the messages of a fetch. It returns how many there were, and the sequence of the last.
func (sc *scan) take(msgs js.MessageBatch, err error) (got int, at uint64, _ error) {
	if err != nil {
		return 0, 0, err
	}
	for msg := range msgs.Messages() {
		meta, err := msg.Metadata()
		if err != nil {
			return got, at, err
		}
		if sc.came++; meta.Sequence.Consumer != sc.came {
			return got, at, errMissed
		}
		got, at = got+1, meta.Sequence.Stream
		sc.top = max(sc.top, at)
		if !sc.sifted {
			sc.read++
		}
		sc.add(&message{msg.Subject(), msg.Data(), at})
	}
	return got, at, msgs.Error()
}

// drop removes a consumer, in the background. What fails is removed by the server.
func (s *Store) drop(stream js.Stream, consumer string) {
	go func() {
		ctx, cancel := s.request()
		defer cancel()
		stream.DeleteConsumer(ctx, consumer)
	}()
}

// add is called for each message.
func (sc *scan) add(m *message) {
	p, kind, ok := sc.ring.parse(m.subject)
	if !ok || sc.tenants != nil && sc.tenants[p.key] != p.tenant {
		return
	}
	if !sc.sifted {
		sc.own++
	}
	base := strings.TrimSuffix(m.subject, "."+kind)
	if sc.ended[base] {
		return
	}
	if kind == ended {
		if c, ok := m.candidate(p); ok {
			sc.ended[base] = true
			delete(sc.open, base)
			sc.offer(&sc.page, c)
		}
		return
	}
	o := sc.open[base]
	if o == nil {
		o = &openBuild{at: p}
		sc.open[base] = o
	}
	if kind == running {
		o.run = m
	} else {
		o.mark = m
	}
}

// candidate opens a message. It fails for one that is forged.
func (m *message) candidate(p place) (candidate, bool) {
	order, text, err := unseal(p, m.subject, m.data, m.seq)
	return candidate{order, p, text}, err == nil
}

// offer adds a candidate to a page, if it belongs there. It is decoded only if it has to be.
func (sc *scan) offer(page *newest, c candidate) {
	if c.order >= sc.before || len(*page) >= sc.size && c.order <= (*page)[0].order {
		return
	}
	if sc.q.Status != "" || sc.q.Image != "" {
		if !bytes.Contains(c.text, []byte(sc.q.Status)) || !bytes.Contains(c.text, []byte(sc.q.Image)) {
			return
		}
		r, err := decode(c.at, c.order, c.text)
		if err != nil || !sc.q.Matches(&r.Record) {
			return
		}
	}
	heap.Push(page, c)
	if len(*page) > sc.size {
		heap.Pop(page)
	}
}

// settled is the page with the builds that have no verdict.
func (sc *scan) settled() newest {
	page := slices.Clone(sc.page)
	for _, o := range sc.open {
		var both [2]candidate
		var kinds [2]*stored
		for i, m := range []*message{o.mark, o.run} {
			if m == nil {
				continue
			}
			if c, ok := m.candidate(o.at); ok {
				both[i] = c
				kinds[i], _ = decode(c.at, c.order, c.text)
			}
		}
		switch r := settle(kinds[0], kinds[1]); r {
		case nil:
		case kinds[0]:
			sc.offer(&page, both[0])
		default:
			sc.offer(&page, both[1])
		}
	}
	return page
}

// pageOf makes a page of a scan and of this process's own builds.
func (s *Store) pageOf(sc *scan) records.Page {
	sc.page = sc.settled()
	byPlace := make(map[place]*stored)
	var found []*stored
	for _, c := range sc.page {
		if r, err := decode(c.at, c.order, c.text); err == nil {
			found = append(found, r)
			byPlace[c.at] = r
		}
	}
	s.mu.Lock()
	for _, all := range s.builds {
		for _, b := range all {
			r := b.record()
			r.at = b.place
			switch there := byPlace[r.at]; {
			case there != nil:
				*there = r
			case b.epoch.IsZero() && sc.q.Before == "":
				r.Order = ^uint64(0) // not stored yet: newer than all that are
				found = append(found, &r)
			case !b.epoch.IsZero() && r.Order < sc.before && r.Order > sc.oldest():
				found = append(found, &r)
			}
		}
	}
	s.mu.Unlock()
	found = slices.DeleteFunc(found, func(r *stored) bool { return !sc.q.Matches(&r.Record) })
	slices.SortFunc(found, func(a, b *stored) int {
		return cmp.Or(cmp.Compare(b.Order, a.Order), b.Record.Began.Compare(a.Record.Began))
	})
	var page records.Page
	for i, r := range found {
		if i == sc.size-1 {
			page.Next = strconv.FormatUint(found[i-1].Order, 10)
			break
		}
		page.Builds = append(page.Builds, r.Record)
	}
	if page.Next == "" && len(sc.page) == sc.size {
		// A build of this process was found as it was, and no longer matches. There may be older
		// ones that do.
		page.Next = strconv.FormatUint(sc.page[0].order, 10)
	}
	return page
}

// oldest is the order of the oldest build of a full page: own builds that are older belong to
// another page.
func (sc *scan) oldest() uint64 {
	if len(sc.page) < sc.size {
		return 0
	}
	return sc.page[0].order
}
