package jetstream

import (
	"cmp"
	"container/heap"
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	js "github.com/nats-io/nats.go/jetstream"

	"handler/function/records"
)

// scanBatch is how many messages a scan asks for at once.
const scanBatch = 512

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

// scan reads all records of a query once, and keeps those of one page.
type scan struct {
	q      records.Query
	ring   *ring
	before uint64
	size   int // of the page, and one

	page  newest
	ended map[string]bool         // of builds that have a verdict, by the base of their subjects
	open  map[string][2]candidate // of the others: the running record, and the lost one
}

func (s *Store) List(ctx context.Context, q records.Query) (records.Page, error) {
	sc := &scan{
		q: q, ring: s.ring.Load(), before: ^uint64(0), size: q.Size() + 1,
		ended: make(map[string]bool), open: make(map[string][2]candidate),
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
	page.Complete = complete
	return page, nil
}

// scan reads with a fresh consumer: one from before a server was lost could stay deaf for ever.
func (s *Store) scan(ctx context.Context, sc *scan) error {
	st, err := s.current()
	if err != nil {
		return err
	}
	asked, cancel := timed(ctx)
	defer cancel()
	var filters []string
	for _, k := range sc.ring.keys {
		tenant := "*"
		if !sc.q.Operator {
			tenant = k.tenant(sc.q.Tenant)
		}
		filters = append(filters, "builder.rec."+k.id+"."+tenant+".*.*.*")
	}
	c, err := st.records.CreateConsumer(asked, js.ConsumerConfig{
		FilterSubjects: filters, DeliverPolicy: js.DeliverAllPolicy, AckPolicy: js.AckNonePolicy,
		MemoryStorage: true, Replicas: 1, InactiveThreshold: 10 * time.Second,
	})
	if err != nil {
		return err
	}
	info := c.CachedInfo()
	defer s.drop(st.records, info.Name)
	for left := info.NumPending; left > 0; {
		batch, err := c.FetchNoWait(scanBatch)
		if err != nil {
			return err
		}
		got := 0
		for msg := range batch.Messages() {
			meta, err := msg.Metadata()
			if err != nil {
				return err
			}
			got++
			left = meta.NumPending
			sc.add(msg.Subject(), msg.Data(), meta.Sequence.Stream)
		}
		if err := batch.Error(); err != nil {
			return err
		}
		if err := asked.Err(); err != nil {
			return err
		}
		if got == 0 {
			break // the rest was replaced meanwhile, and came before its turn
		}
	}
	return nil
}

// drop removes a consumer, in the background. What fails is removed by the server.
func (s *Store) drop(stream js.Stream, consumer string) {
	go func() {
		ctx, cancel := s.request()
		defer cancel()
		stream.DeleteConsumer(ctx, consumer)
	}()
}

// add is called for each message, in the order of the stream.
func (sc *scan) add(subject string, data []byte, seq uint64) {
	p, kind, ok := sc.ring.parse(subject)
	if !ok {
		return
	}
	order, text, err := unseal(p, subject, data, seq)
	if err != nil {
		return
	}
	c, base := candidate{order, p, text}, subject[:len(subject)-2]
	switch kind {
	case ended:
		sc.ended[base] = true
		delete(sc.open, base)
		sc.offer(c)
	case running:
		if !sc.ended[base] {
			sc.open[base] = [2]candidate{c, sc.open[base][1]}
		}
	case lost:
		if !sc.ended[base] {
			sc.open[base] = [2]candidate{sc.open[base][0], c}
		}
	}
}

// offer adds a candidate to the page, if it belongs there. It is decoded only if it has to be.
func (sc *scan) offer(c candidate) {
	if c.order >= sc.before || len(sc.page) >= sc.size && c.order <= sc.page[0].order {
		return
	}
	if sc.q.Status != "" || sc.q.Image != "" {
		r, err := decode(c.at, c.order, c.text)
		if err != nil || !sc.q.Matches(&r.Record) {
			return
		}
	}
	heap.Push(&sc.page, c)
	if len(sc.page) > sc.size {
		heap.Pop(&sc.page)
	}
}

// settle offers the builds without a verdict.
func (sc *scan) settle() {
	for _, pair := range sc.open {
		var kinds [2]*stored
		for i, c := range pair {
			if c.text != nil {
				kinds[i], _ = decode(c.at, c.order, c.text)
			}
		}
		switch r := settle(kinds[1], kinds[0]); r {
		case nil:
		case kinds[0]:
			sc.offer(pair[0])
		default:
			sc.offer(pair[1])
		}
	}
}

// pageOf makes a page of a scan and of this process's own builds.
func (s *Store) pageOf(sc *scan) records.Page {
	sc.settle()
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
