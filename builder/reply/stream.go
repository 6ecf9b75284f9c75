package reply

import (
	"bytes"
	"context"
	"net/http"
	"sync"
	"time"

	"handler/function/api"
)

// maxQueued bounds the log lines that wait for a slow client, in bytes. One call of log can
// exceed it.
const maxQueued = 256 << 10

// stream is an answer that is written while the build runs. log and finish add to a queue,
// and one goroutine, run, writes the queue to the client.
type stream struct {
	conn *conn
	form Form // NDJSON or SSE
	opts Options
	// inProgress locks Writer.mu. It is called while mu is held, so nothing may lock mu while
	// it holds Writer.mu.
	inProgress func() api.Record

	mu       sync.Mutex
	queue    []string      // lines that wait for run
	queued   int           // their cost
	room     chan struct{} // closed, and replaced, when queued shrinks
	last     *api.Record   // the record that ends the stream; nil before finish
	deadline time.Time     // for all writes after finish
	err      error         // why the client can get no more

	wake chan struct{} // there is something to write; holds one
	gone chan struct{} // closed when err is set
	done chan struct{} // closed when run has returned
}

// newStream sets the headers of a stream, and begins to write it.
func newStream(c *conn, form Form, opts Options, inProgress func() api.Record) *stream {
	s := &stream{
		conn: c, form: form, opts: opts, inProgress: inProgress,
		room: make(chan struct{}),
		wake: make(chan struct{}, 1),
		gone: make(chan struct{}),
		done: make(chan struct{}),
	}
	setStreamHeader(c.Header(), form)
	go s.run()
	return s
}

func setStreamHeader(h http.Header, form Form) {
	if form == NDJSON {
		h.Set("Content-Type", api.NDJSONType)
	} else {
		h.Set("Content-Type", api.SSEType)
	}
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	// Without it nginx, and ingresses made of it, collect a stream in a buffer.
	h.Set("X-Accel-Buffering", "no")
}

func (s *stream) log(ctx context.Context, lines []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.waitForRoom(ctx); err != nil {
		return err
	}
	s.enqueue(lines)
	return nil
}

// waitForRoom waits until the queue has room. The caller must hold s.mu; waitForRoom gives
// it up while it waits.
func (s *stream) waitForRoom(ctx context.Context) error {
	var timeout <-chan time.Time
	for {
		switch {
		case s.err != nil:
			return s.err
		case s.last != nil:
			return ErrFinished
		case s.queued < maxQueued:
			return nil
		}
		if timeout == nil {
			t := time.NewTimer(s.opts.WriteTimeout)
			defer t.Stop()
			timeout = t.C
		}
		room := s.room
		s.mu.Unlock()
		var err error
		select {
		case <-room:
		case <-s.gone:
		case <-ctx.Done():
			err = context.Cause(ctx)
		case <-timeout:
			err = ErrSlow
		}
		s.mu.Lock()
		if err != nil {
			return err
		}
	}
}

// enqueue adds lines to the queue. The caller must hold s.mu.
func (s *stream) enqueue(lines []string) {
	s.queue = append(s.queue, lines...)
	for _, line := range lines {
		s.queued += cost(line)
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// cost is what a waiting line takes of maxQueued: its bytes and its string header.
func cost(line string) int { return len(line) + 16 }

func (s *stream) finish(rec api.Record, lines []string) error {
	s.mu.Lock()
	s.last = &rec
	s.deadline = time.Now().Add(s.opts.WriteTimeout)
	s.enqueue(lines)
	s.mu.Unlock()
	<-s.done
	return s.err
}

// run writes the stream to its end. Nothing else uses s.conn meanwhile.
func (s *stream) run() {
	defer close(s.done)
	time.Sleep(time.Until(s.opts.NotBefore))
	if err := s.writeHeader(); err != nil {
		s.fail(err)
		return
	}
	beat := time.NewTimer(s.opts.Heartbeat)
	defer beat.Stop()
	for {
		silent := false
		select {
		case <-s.wake:
		case <-beat.C:
			silent = true
		}
		written, ended, err := s.writeQueue()
		if silent && written == 0 && err == nil {
			written, err = 1, s.writeHeartbeat()
		}
		switch {
		case err != nil:
			s.fail(err)
			return
		case ended:
			return
		case written > 0:
			beat.Reset(s.opts.Heartbeat)
		}
	}
}

func (s *stream) writeHeader() error {
	if err := s.conn.setDeadline(s.nextDeadline()); err != nil {
		return err
	}
	s.conn.WriteHeader(http.StatusOK)
	return s.conn.flush()
}

// writeQueue writes records until the queue is empty. It says how many, and whether the last
// of them ends the stream.
func (s *stream) writeQueue() (written int, ended bool, err error) {
	for rec := s.next(); rec != nil; rec = s.next() {
		if err := s.writeRecord(*rec); err != nil {
			return written, false, err
		}
		written++
		if rec.Status != api.InProgress {
			return written, true, nil
		}
	}
	return written, false, nil
}

// next returns the next record, or nil if there is nothing to write. A record takes as many
// lines from the queue as fit.
func (s *stream) next() *api.Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return s.last
	}
	rec := bounded(s.inProgress())
	// The 3 are the quotes and the comma of a line: short lines have many of them.
	left := maxLines
	taken := 0
	for ; taken < len(s.queue) && left > 0; taken++ {
		line := s.queue[taken]
		head, tail := split(line, left-3)
		if tail != "" {
			if len(rec.Log) > 0 {
				break // the whole line may fit into the next record
			}
			rec.Log = append(rec.Log, head)
			s.queue[taken] = tail
			s.queued -= len(head)
			break
		}
		rec.Log = append(rec.Log, line)
		left -= size(line) + 3
		s.queued -= cost(line)
		s.queue[taken] = "" // the array may live on for long
	}
	s.queue = s.queue[taken:]
	close(s.room)
	s.room = make(chan struct{})
	return &rec
}

func (s *stream) writeRecord(rec api.Record) error {
	var b bytes.Buffer
	if s.form == SSE {
		b.WriteString("data: ")
	}
	encode(&b, rec, "")
	if s.form == SSE {
		b.WriteByte('\n')
	}
	return s.write(b.Bytes())
}

func (s *stream) writeHeartbeat() error {
	if s.form == SSE {
		return s.write([]byte(": in progress\n\n"))
	}
	rec := s.inProgress()
	rec.Image, rec.Log = "", []string{}
	return s.writeRecord(rec)
}

func (s *stream) write(p []byte) error {
	if err := s.conn.setDeadline(s.nextDeadline()); err != nil {
		return err
	}
	return s.conn.send(p)
}

func (s *stream) nextDeadline() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last != nil {
		return s.deadline
	}
	return time.Now().Add(s.opts.WriteTimeout)
}

func (s *stream) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
	s.queue, s.queued = nil, 0
	close(s.gone)
}
