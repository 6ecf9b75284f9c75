package jetstream

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	js "github.com/nats-io/nats.go/jetstream"

	"handler/function/records"
	"handler/function/records/batch"
)

// write stores a build: its running record, its lines, its verdict, and a mark at the end of its
// log. It returns when this is done, or the build is given up, or the store is closed.
func (b *build) write() {
	s := b.store
	defer s.writers.Done()
	pause := time.Duration(0)
	for {
		step, wait, up := b.next()
		if step == nil && wait == 0 {
			return
		}
		if step != nil {
			err, ok := b.try(step)
			if !ok {
				continue
			}
			b.wrote(err)
			if err == nil || s.ctx.Err() != nil {
				pause = 0
				continue
			}
			s.failed(s.ctx, err)
			pause = min(max(2*pause, 50*time.Millisecond), 2*time.Second)
			wait = pause
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-up:
		case <-s.ctx.Done():
			timer.Stop()
			return
		case <-b.idle(step == nil):
		}
		timer.Stop()
	}
}

// try does a step when it may. It returns false if it may not yet, and something has happened.
func (b *build) try(step func() error) (err error, ok bool) {
	s := b.store
	select {
	case s.requests <- struct{}{}:
		defer func() { <-s.requests }()
		return step(), true
	case <-b.wake:
	case <-s.ctx.Done():
	}
	return nil, false
}

// idle returns what wakes a writer that has nothing to do. A writer that could not write ignores
// wake: it waits for its pause, or until the streams are found again.
func (b *build) idle(nothing bool) <-chan struct{} {
	if nothing {
		return b.wake
	}
	return nil
}

// next returns what is to be done, or else how long there is nothing to do, or neither if all is
// done.
func (b *build) next() (step func() error, wait time.Duration, up <-chan struct{}) {
	const long = time.Hour
	s := b.store
	s.mu.Lock()
	defer s.mu.Unlock()
	switch st := s.streams; {
	case b.over():
		return nil, 0, nil
	case st == nil:
		return nil, long, s.up
	case !b.done && !b.epoch.Equal(st.epoch):
		return b.begin, 0, s.up
	case b.dirty && b.ended == nil:
		return b.put, 0, s.up
	}
	switch left := b.unripe(); {
	case b.overtakes && !b.done:
		return b.putVerdict, 0, s.up
	case left > 0:
		return nil, left, s.up
	case len(b.lines) > 0:
		return b.putLines, 0, s.up
	case b.ended == nil:
		return nil, long, s.up
	case !b.done:
		return b.putVerdict, 0, s.up
	}
	return b.mark, 0, s.up
}

// over says whether there is nothing left to store, or nobody to store it.
func (b *build) over() bool { return b.gone || b.marked || b.store.ctx.Err() != nil }

// unripe is how long the lines wait for others, 0 if they do not.
func (b *build) unripe() time.Duration {
	if len(b.lines) != 1 || b.ended != nil {
		return 0
	}
	first := b.lines[0].Value.(*item)
	if first.lines.Full() {
		return 0
	}
	return max(0, batchFor-time.Since(first.at))
}

// request returns the context of one request by a writer.
func (s *Store) request() (context.Context, context.CancelFunc) {
	return context.WithTimeout(s.ctx, writeTimeout)
}

// publish sends a payload to a stream.
func (s *Store) publish(subject string, sealed []byte, opts ...js.PublishOpt) (uint64, error) {
	st, err := s.current()
	if err != nil {
		return 0, err
	}
	ctx, cancel := s.request()
	defer cancel()
	ack, err := st.js.PublishMsg(ctx, &nats.Msg{Subject: subject, Data: sealed}, append(opts, js.WithRetryAttempts(0))...)
	if err != nil {
		return 0, err
	}
	return ack.Sequence, nil
}

// isConflict says whether a message was refused because its subject has another one.
func isConflict(err error) bool {
	api, ok := errors.AsType[*js.APIError](err)
	return ok && (api.ErrorCode == js.JSErrCodeStreamWrongLastSequence || api.ErrorCode == js.JSErrCodeStreamWrongLastSequenceConstant)
}

// record is the build as it is stored.
func (b *build) record() stored {
	return stored{
		Record: b.rec, Building: b.rec.Building, Daemon: b.rec.Daemon, Ref: b.rec.Ref,
		Owner: b.store.process, Build: b.id, Turn: b.turn, Order: b.order,
	}
}

// payload is what is sealed of a record: its order, so that a list need not read the rest of
// those that it leaves out, and JSON.
func (r *stored) payload() []byte {
	text, err := json.Marshal(r)
	if err != nil {
		panic(err) // it has nothing that JSON lacks
	}
	return append(binary.BigEndian.AppendUint64(nil, r.Order), text...)
}

// begin finds the build's attempt, and stores its record for the first time. If the stream was
// lost, it does so again, and keeps the attempt if it can.
func (b *build) begin() error {
	s := b.store
	st, err := s.current()
	if err != nil {
		return err
	}
	ctx, cancel := s.request()
	defer cancel()
	p := place{b.key, b.key.tenant(b.name.tenant), b.key.call(b.name.id), b.tried}
	if b.tried > 0 {
		if mine, err := s.read(ctx, st, p, running); err != nil {
			return err
		} else if mine != nil && mine.Build == b.id {
			s.mu.Lock()
			b.dirty = true // it may have changed since it was sent
			s.mu.Unlock()
			b.begun(p, mine.seq, st.epoch)
			return nil
		}
	}
	latest, err := s.latest(ctx, st, b.name)
	if err != nil {
		return err
	}
	s.mu.Lock()
	r := b.record()
	b.dirty = false
	s.mu.Unlock()
	r.Order, r.Record.Attempt = 0, max(latest+1, r.Record.Attempt)
	p.attempt, b.tried = r.Record.Attempt, r.Record.Attempt
	subject := p.record(running)
	seq, err := s.publish(subject, seal(b.key.records, subject, r.payload()), js.WithExpectLastSequencePerSubject(0))
	if isConflict(err) {
		return nil // another build was quicker, and the next try finds the number taken
	}
	if err == nil {
		b.begun(p, seq, st.epoch)
	}
	return err
}

// begun notes where the build is stored.
func (b *build) begun(p place, seq uint64, epoch time.Time) {
	s := b.store
	s.mu.Lock()
	defer s.mu.Unlock()
	b.rec.Attempt, b.place, b.order = p.attempt, p, seq
	// If the stream is lost, this process may store the record in the next one before it has
	// noticed. begin then finds it.
	b.tried, b.dirty = p.attempt, b.dirty || !b.epoch.IsZero() && !b.epoch.Equal(epoch)
	b.aead = b.key.logAEAD(p.log())
	b.stored, b.storedN, b.epoch = nil, 0, epoch
	s.beatSoon()
}

// put stores the running record again.
func (b *build) put() error {
	s := b.store
	s.mu.Lock()
	r := b.record()
	b.dirty = false
	s.mu.Unlock()
	subject := b.place.record(running)
	_, err := s.publish(subject, seal(b.key.records, subject, r.payload()))
	if err != nil {
		s.mu.Lock()
		b.dirty = true
		s.mu.Unlock()
	}
	return err
}

// putLines stores the oldest lines.
func (b *build) putLines() error {
	s := b.store
	s.mu.Lock()
	if len(b.lines) == 0 {
		s.mu.Unlock()
		return nil // they were dropped meanwhile
	}
	e := b.lines[0]
	b.writer = e
	lines := e.Value.(*item).lines
	s.mu.Unlock()
	plain := lines.AppendTo(nil)
	subject := b.place.log()
	since := time.Now()
	seq, err := s.publish(subject, seal(b.aead, subject, plain))
	if b.stuck(since, err) {
		// The followers see a gap.
		s.mu.Lock()
		s.dropped += lines.Count
		s.mu.Unlock()
	} else if err != nil {
		s.release(b)
		return err
	}
	s.mu.Lock()
	if b.writer == e {
		b.writer = nil
		b.remove(e)
	}
	s.mu.Unlock()
	return b.trim(seq, len(plain))
}

func (s *Store) release(b *build) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b.writer = nil
}

// Times of lines that cannot be stored. The stream of logs can be full, or without a leader, while
// that of records is well. A log that is read between the verdict and the lines has a gap at its end.
const (
	overtakeAfter = 3 * time.Second // after which the verdict of their build is tried too; a writer pauses for 2 s at most
	giveUpAfter   = time.Minute     // after which they are dropped, if the verdict could be stored
)

// stuck notes whether the oldest lines could be stored. The try began at began and ended with err. It
// returns true if the lines are to be dropped.
func (b *build) stuck(began time.Time, err error) (drop bool) {
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	if err == nil {
		b.stuckSince, b.overtakes = time.Time{}, false
		return false
	}
	if b.stuckSince.IsZero() {
		b.stuckSince = began
	}
	since := time.Since(b.stuckSince)
	b.overtakes = b.ended != nil && since >= overtakeAfter
	return b.done && since > giveUpAfter ||
		errors.Is(err, nats.ErrMaxPayload) || errors.Is(err, js.ErrStreamMessageExceedsMaximum) // the server's max_payload is too small
}

// trim removes the oldest lines of a log that has become longer than MaxLog, in large parts.
func (b *build) trim(seq uint64, n int) error {
	const part = 512 << 10
	if seq == 0 {
		return nil
	}
	if last := len(b.stored) - 1; last >= 0 && b.stored[last].bytes < part {
		b.stored[last] = segment{seq, b.stored[last].bytes + n}
	} else {
		b.stored = append(b.stored, segment{seq, n})
	}
	if b.storedN += n; b.storedN <= records.MaxLog {
		return nil
	}
	st, err := b.store.current()
	if err != nil {
		return nil // the next lines try again
	}
	ctx, cancel := b.store.request()
	defer cancel()
	if err := st.logs.Purge(ctx, js.WithPurgeSubject(b.place.log()), js.WithPurgeSequence(b.stored[0].last+1)); err != nil {
		b.store.failed(b.store.ctx, fmt.Errorf("removing the oldest lines of a log: %w", err))
		return nil
	}
	b.storedN -= b.stored[0].bytes
	b.stored = b.stored[1:]
	return nil
}

// putOnce stores a record if seq is still the sequence of the last one of its kind; 0 is for none. It
// returns false if somebody was quicker. What was not sealed for its subject is replaced.
func (s *Store) putOnce(p place, kind string, r *stored, seq uint64) (first bool, err error) {
	subject := p.record(kind)
	sealed := seal(p.key.records, subject, r.payload())
	_, err = s.publish(subject, sealed, js.WithExpectLastSequencePerSubject(seq))
	if !isConflict(err) {
		return err == nil, err
	}
	st, err := s.current()
	if err != nil {
		return false, err
	}
	ctx, cancel := s.request()
	defer cancel()
	msg, err := st.records.GetLastMsgForSubject(ctx, subject)
	if err != nil {
		return false, err
	}
	if _, _, err := unseal(p, subject, msg.Data, msg.Sequence); err == nil {
		return false, nil
	}
	_, err = s.publish(subject, sealed, js.WithExpectLastSequencePerSubject(msg.Sequence))
	return err == nil, err
}

// putVerdict stores the verdict. Only the owner of a build stores one. If there is one already, an
// earlier try has stored it, and the answer was lost.
func (b *build) putVerdict() error {
	s := b.store
	s.mu.Lock()
	r := b.record()
	b.overtakes = false // in turn with lines, if there are any
	s.mu.Unlock()
	if _, err := s.putOnce(b.place, ended, &r, 0); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b.done = true
	s.purges = append(s.purges, purge{b.place.record(running), b.epoch, time.Now().Add(keepRunning)})
	if !b.gone { // it was forgotten meanwhile
		s.leave(b)
	}
	return nil
}

// mark ends the log, so that followers need not look for the verdict. One attempt is enough:
// without the mark they look.
func (b *build) mark() error {
	s := b.store
	subject := b.place.log()
	end := batch.New(b.Record().Lines + 1)
	if _, err := s.publish(subject, seal(b.aead, subject, end.AppendTo(nil))); err != nil {
		s.failed(s.ctx, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b.marked = true
	return nil
}
