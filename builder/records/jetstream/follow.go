package jetstream

import (
	"context"
	"crypto/cipher"
	"errors"
	"iter"
	"time"

	js "github.com/nats-io/nats.go/jetstream"

	"handler/function/records"
	"handler/function/records/batch"
)

// Times and sizes of followers.
const (
	fetchFor     = 3 * time.Second // of silence, after which a follower looks at the record
	fetchBytes   = 256 << 10       // that one fetch asks for
	fetchBatches = fetchBytes / batch.Size
	fetchWithin  = 20 * time.Second // between two fetches; a server forgets a consumer after 30 s
	goneFor      = 10 * time.Second // that a running build may be without a record
	deafFor      = 60 * time.Second // without an answer of the store, after which following ends
)

// follower reads one log. It asks for lines when it has room for them, so that a slow one holds
// nothing.
type follower struct {
	s    *Store
	ctx  context.Context
	ref  records.Ref
	at   place
	wait bool
	out  *records.Pacer
	next uint64 // number of the next line
	over bool   // the build had ended when following began
	aead cipher.AEAD

	consumer js.Consumer
	stream   js.Stream // of consumer
	epoch    time.Time // of stream
	seq      uint64    // of the last message
	got      uint64    // messages of consumer
	fetched  time.Time // when consumer was made or last asked
	heard    time.Time // the store answered
	marked   bool      // the log's end has come
	total    uint64    // of lines, once marked or ended
}

func (s *Store) Follow(ctx context.Context, ref records.Ref, after uint64, wait bool) iter.Seq2[records.Line, error] {
	return s.followers.Follow(func(out *records.Pacer) {
		f := &follower{s: s, ctx: ctx, ref: ref, wait: wait, out: out, next: after + 1, heard: time.Now()}
		defer f.close()
		if err := f.find(); err != nil {
			f.out.Fail(err)
			return
		}
		for {
			more, err := f.read()
			if err != nil {
				f.out.Fail(err)
			}
			if err != nil || !more {
				return
			}
		}
	})
}

// find waits until the build has a place: one that has just begun may have none yet.
func (f *follower) find() error {
	for {
		r, err := f.s.get(f.ctx, f.ref)
		if err != nil {
			return err
		}
		if r.Record.Attempt > 0 {
			f.at, f.ref.Attempt, f.over = r.at, r.Record.Attempt, !r.Record.Running()
			f.aead = r.at.key.logAEAD(r.at.log())
			return nil
		}
		select {
		case <-f.ctx.Done():
			return context.Cause(f.ctx)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Since(f.heard) > readTimeout {
			return records.ErrUnknown
		}
	}
}

func (f *follower) close() {
	if f.consumer != nil {
		f.s.drop(f.stream, f.consumer.CachedInfo().Name)
		f.consumer = nil
	}
}

// read yields what there is next. It returns false if nothing must follow.
func (f *follower) read() (more bool, err error) {
	if st, err := f.s.current(); err == nil && f.consumer != nil && !f.epoch.Equal(st.logEpoch) {
		f.close() // it is of a stream that is gone
	}
	if f.consumer != nil && time.Since(f.fetched) > fetchWithin {
		f.close() // the reader is slow
	}
	if f.consumer == nil {
		if err := f.subscribe(); err != nil {
			return f.deaf(err)
		}
	}
	f.fetched = time.Now()
	var msgs js.MessageBatch
	if f.wait && !f.over {
		msgs, err = f.consumer.Fetch(fetchBatches, js.FetchMaxBytes(fetchBytes), js.FetchMaxWait(fetchFor))
	} else {
		msgs, err = f.consumer.FetchNoWait(fetchBatches)
	}
	if err != nil {
		return f.deaf(err)
	}
	got, more, err := f.take(msgs)
	switch {
	case err != nil || !more:
		return false, err
	case f.marked:
		return false, f.finish(f.total)
	case got:
		return true, nil
	}
	return f.look(msgs.Error())
}

// take yields the lines of a fetch.
func (f *follower) take(msgs js.MessageBatch) (got, more bool, err error) {
	for {
		select {
		case <-f.ctx.Done():
			return got, false, context.Cause(f.ctx)
		case msg, ok := <-msgs.Messages():
			if !ok {
				return got, true, nil
			}
			got, f.heard = true, time.Now()
			if f.missed(msg) {
				f.close() // the next consumer begins after the last message that came
				return got, true, nil
			}
			if !f.message(msg) {
				return got, false, nil
			}
		}
	}
}

// missed says whether the server has sent messages that have not come. A fetch gives up after a
// silence, and the server does not send them again.
func (f *follower) missed(msg js.Msg) bool {
	meta, err := msg.Metadata()
	if err != nil {
		return false
	}
	f.got++
	return meta.Sequence.Consumer != f.got
}

// message yields the lines of one message. Those that came before are left out: a writer sends
// lines again if the answer was lost, and so may anybody else.
func (f *follower) message(msg js.Msg) bool {
	meta, err := msg.Metadata()
	if err != nil {
		return true
	}
	f.seq = meta.Sequence.Stream
	plain, err := open(f.aead, msg.Subject(), msg.Data())
	if err != nil {
		f.s.tell(errForged)
		return true
	}
	lines, err := batch.Parse(plain)
	if err != nil {
		f.s.tell(err)
		return true
	}
	if lines.Count == 0 {
		f.marked, f.total = true, lines.First-1
		return true
	}
	f.marked = false // the mark of an earlier stream, or one that was sent again
	if !f.out.Batch(lines, f.next) {
		return false
	}
	f.next = max(f.next, lines.Next())
	return true
}

// look is called in a silence: the log may have been evicted, or its end may never have been
// marked.
func (f *follower) look(failed error) (more bool, err error) {
	r, err := f.s.get(f.ctx, f.ref)
	switch {
	case errors.Is(err, records.ErrNotFound) && !f.over && time.Since(f.heard) < goneFor:
		// A server has lost its streams, and the owner has not stored the record again yet.
		return f.deaf(records.ErrUnknown)
	case errors.Is(err, records.ErrUnknown):
		return f.deaf(err)
	case err != nil:
		return false, err
	}
	left, lost := f.pending()
	if lost == nil && left == 0 && !r.Record.Running() && f.next <= r.Record.Lines {
		left, lost = f.unread()
	}
	switch {
	case failed != nil:
		return f.deaf(failed)
	case lost != nil:
		return f.deaf(lost)
	case left > 0 && time.Since(f.heard) < deafFor:
		f.close() // lines have come meanwhile, or the server keeps them back
		select {
		case <-f.ctx.Done():
			return false, context.Cause(f.ctx)
		case <-time.After(20 * time.Millisecond):
		}
		return f.out.Tick(), nil
	}
	f.heard = time.Now()
	if !r.Record.Running() && f.at == r.at {
		return false, f.finish(r.Record.Lines)
	}
	if !f.wait {
		return false, nil
	}
	return f.out.Tick(), nil
}

// pending is how many messages the consumer still has. It fails if the consumer is gone.
func (f *follower) pending() (uint64, error) {
	ctx, cancel := timed(f.ctx)
	defer cancel()
	info, err := f.consumer.Info(ctx)
	if err != nil {
		return 0, err
	}
	return info.NumPending, nil
}

// unread is 1 if the log has a message after the last one that was read, and 0 otherwise. Before lines
// are said to be lost, the stream itself is asked, and not only its consumer.
func (f *follower) unread() (uint64, error) {
	ctx, cancel := timed(f.ctx)
	defer cancel()
	msg, err := f.stream.GetLastMsgForSubject(ctx, f.at.log())
	switch {
	case errors.Is(err, js.ErrMsgNotFound):
		return 0, nil
	case err != nil:
		return 0, err
	case msg.Sequence > f.seq:
		return 1, nil
	}
	return 0, nil
}

// finish yields the lines up to total as lost, if there are any.
func (f *follower) finish(total uint64) error {
	if f.next <= total {
		f.out.Line(records.Gap(f.next, total))
	}
	return nil
}

// deaf waits a moment for a store that gives no answer. It gives up when there has been none for
// too long.
func (f *follower) deaf(err error) (more bool, _ error) {
	f.close()
	if f.ctx.Err() != nil {
		return false, context.Cause(f.ctx)
	}
	if !errors.Is(err, records.ErrUnknown) {
		err = f.s.failed(f.ctx, err)
	}
	if !f.wait || time.Since(f.heard) > deafFor {
		return false, err
	}
	select {
	case <-f.ctx.Done():
		return false, context.Cause(f.ctx)
	case <-time.After(250 * time.Millisecond):
	}
	return f.out.Tick(), nil
}

// subscribe makes a consumer that begins after the last message.
func (f *follower) subscribe() error {
	st, err := f.s.current()
	if err != nil {
		return err
	}
	if !f.epoch.Equal(st.logEpoch) {
		f.epoch, f.seq = st.logEpoch, 0
	}
	cfg := js.ConsumerConfig{
		FilterSubject: f.at.log(), DeliverPolicy: js.DeliverByStartSequencePolicy, OptStartSeq: f.seq + 1,
		AckPolicy: js.AckNonePolicy, MemoryStorage: true, Replicas: 1, InactiveThreshold: 30 * time.Second,
	}
	ctx, cancel := timed(f.ctx)
	defer cancel()
	c, err := st.logs.CreateConsumer(ctx, cfg)
	if err != nil {
		return err
	}
	f.consumer, f.stream, f.got = c, st.logs, 0
	return nil
}
