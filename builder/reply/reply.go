// Package reply writes an answer in the form its caller asked for: one JSON
// object, a stream of JSON lines, or server-sent events. It knows the records of
// package api and nothing of what they tell.
package reply

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"handler/function/api"
)

// maxQueued bounds the log lines that wait for a slow client, in bytes. One call
// of Log can exceed it.
const maxQueued = 256 << 10

// retryAfter is for a caller that was told to come back, in seconds: long enough
// for a small build to end or a daemon to restart.
const retryAfter = 10

var (
	// ErrSlow is why Log fails when the client has not read for WriteTimeout.
	ErrSlow = errors.New("client is too slow")
	// ErrFinished is why Log fails after Finish.
	ErrFinished = errors.New("answer is finished")
)

// Options of a Writer. All may be zero.
type Options struct {
	// ID is the build's, for every record.
	ID string
	// Request is the last record's, where that has none.
	Request string
	// Image is the reference to build, as it was sent.
	Image string
	// Start is when the request was accepted. Zero means now.
	Start time.Time
	// Sign adds the headers that sign the body of an answer that does not stream.
	// It may be nil.
	Sign func(h http.Header, body []byte)
	// NotBefore is when the answer may begin. Zero means at once.
	NotBefore time.Time
	// Text makes an error that does not stream plain text.
	Text bool
	// WriteTimeout is how long a client may take to accept one record.
	// Zero means 30 s.
	WriteTimeout time.Duration
	// Heartbeat is how long a stream is silent at most. Zero means 10 s.
	Heartbeat time.Duration
}

// Writer writes one answer. All its methods may be called concurrently.
type Writer struct {
	w    http.ResponseWriter
	rc   *http.ResponseController
	form Form
	opts Options

	mu       sync.Mutex
	image    string
	begun    bool // a stream's header has been sent, and run has w
	finished bool
	terminal *api.Record   // of a stream, once it is finished
	deadline time.Time     // of all writes, once it is finished
	excerpt  Excerpt       // of an answer that does not stream
	queue    []string      // of a stream: lines that wait for run
	queued   int           // their bytes
	room     chan struct{} // closed, and replaced, when queued shrinks
	err      error         // why the client can get no more

	wake chan struct{} // something is there for run; holds one
	gone chan struct{} // closed when err is set
	done chan struct{} // closed when run has ended
}

// New returns a Writer of the answer to one request. Finish must be called
// before the handler returns, as a stream is written by a goroutine that ends
// with it.
func New(w http.ResponseWriter, form Form, opts Options) *Writer {
	if opts.Start.IsZero() {
		opts.Start = time.Now()
	}
	opts.WriteTimeout = cmp.Or(opts.WriteTimeout, 30*time.Second)
	opts.Heartbeat = cmp.Or(opts.Heartbeat, 10*time.Second)
	return &Writer{
		w:     w,
		rc:    http.NewResponseController(w),
		form:  form,
		opts:  opts,
		image: opts.Image,
		room:  make(chan struct{}),
		wake:  make(chan struct{}, 1),
		gone:  make(chan struct{}),
		done:  make(chan struct{}),
	}
}

// SetImage sets the reference that records name from now on, as it was sent.
func (w *Writer) SetImage(image string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.image = image
}

// Begin sends the header of a stream; other headers must be set before. From
// then on a failure is told in its last record; before, by the HTTP status. For
// an answer that does not stream Begin does nothing.
func (w *Writer) Begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.begin()
}

func (w *Writer) begin() {
	if w.form == JSON || w.begun || w.finished {
		return
	}
	w.begun = true
	h := w.w.Header()
	if w.form == NDJSON {
		h.Set("Content-Type", api.NDJSONType)
	} else {
		h.Set("Content-Type", api.SSEType)
	}
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	// Without it nginx, and ingresses made of it, collect a stream in a buffer.
	h.Set("X-Accel-Buffering", "no")
	go w.run()
}

// Log adds lines to the answer. On a stream it blocks while more than 256 KiB
// wait for the client, but not for longer than WriteTimeout, and sends the
// header if Begin has not. It fails once the client is gone or too slow, which
// is when a build should be cancelled.
func (w *Writer) Log(ctx context.Context, lines ...string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.form == JSON {
		if w.finished {
			return ErrFinished
		}
		w.keep(lines)
		return nil
	}
	w.begin()
	if err := w.waitForRoom(ctx); err != nil {
		return err
	}
	w.enqueue(lines)
	return nil
}

// waitForRoom is called, and returns, with w.mu held.
func (w *Writer) waitForRoom(ctx context.Context) error {
	var timeout <-chan time.Time
	for {
		switch {
		case w.err != nil:
			return w.err
		case w.finished:
			return ErrFinished
		case w.queued < maxQueued:
			return nil
		}
		if timeout == nil {
			t := time.NewTimer(w.opts.WriteTimeout)
			defer t.Stop()
			timeout = t.C
		}
		room := w.room
		w.mu.Unlock()
		var err error
		select {
		case <-room:
		case <-w.gone:
		case <-ctx.Done():
			err = context.Cause(ctx)
		case <-timeout:
			err = ErrSlow
		}
		w.mu.Lock()
		if err != nil {
			return err
		}
	}
}

func (w *Writer) keep(lines []string) {
	for _, line := range lines {
		w.excerpt.Add(line)
	}
}

func (w *Writer) enqueue(lines []string) {
	w.queue = append(w.queue, lines...)
	for _, line := range lines {
		w.queued += cost(line)
	}
	w.signal()
}

// cost is what a waiting line takes of maxQueued: its bytes and its header.
func cost(line string) int { return len(line) + 16 }

func (w *Writer) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Finish writes the record that ends the answer. The HTTP status of one that
// does not stream follows from its code. What rec leaves empty is filled in:
// image, duration in seconds, status (failed) and, for a failure, code
// (internal). Finish returns once the client has accepted all or can get no
// more, WriteTimeout later at most. A second call does nothing.
func (w *Writer) Finish(rec api.Record) error {
	w.mu.Lock()
	if w.finished {
		w.mu.Unlock()
		return nil
	}
	rec.ID = w.opts.ID
	rec.Request = cmp.Or(rec.Request, w.opts.Request)
	rec.Image = cmp.Or(rec.Image, w.image)
	if rec.Status != api.Success {
		rec.Status = api.Failed
		rec.Code = cmp.Or(rec.Code, api.Internal)
	}
	if rec.Duration == 0 {
		rec.Duration = time.Since(w.opts.Start).Seconds()
	}
	rec.Duration = milliseconds(rec.Duration)
	if w.form != JSON && rec.Status == api.Success {
		w.begin()
	}
	lines := rec.Log
	rec.Log = []string{}
	rec = bounded(rec)
	w.deadline = time.Now().Add(w.opts.WriteTimeout)
	w.finished = true

	if !w.begun {
		w.keep(lines)
		rec.Log = w.excerpt.Lines()
		w.mu.Unlock()
		status := http.StatusOK
		if rec.Status != api.Success {
			status = rec.Code.HTTPStatus()
		}
		return w.writeWhole(status, rec)
	}
	w.terminal = &rec
	w.enqueue(lines)
	w.mu.Unlock()
	<-w.done
	return w.err
}

// Object answers with one record as it is, whatever its status, and not before
// the client has accepted it or can get no more.
func Object(w http.ResponseWriter, status int, rec api.Record, opts Options) error {
	rec.ID = opts.ID
	rec.Duration = milliseconds(rec.Duration)
	if rec.Log == nil {
		rec.Log = []string{}
	}
	return whole(w, opts).writeWhole(status, bounded(rec))
}

// Value is Object for what is no record.
func Value(w http.ResponseWriter, status int, v any, opts Options) error {
	var body bytes.Buffer
	encode(&body, v, "  ")
	return whole(w, opts).writeBody(status, api.JSONType, body.Bytes())
}

// whole is a Writer of an answer that is written now, at once.
func whole(w http.ResponseWriter, opts Options) *Writer {
	rw := New(w, JSON, opts)
	rw.deadline = time.Now().Add(rw.opts.WriteTimeout)
	return rw
}

// writeWhole writes an answer that does not stream.
func (w *Writer) writeWhole(status int, rec api.Record) error {
	var body bytes.Buffer
	if w.opts.Text && rec.Status != api.Success {
		writeText(&body, rec)
		return w.writeBody(status, api.TextType+"; charset=utf-8", body.Bytes())
	}
	encode(&body, rec, "  ")
	return w.writeBody(status, api.JSONType, body.Bytes())
}

func (w *Writer) writeBody(status int, contentType string, body []byte) error {
	h := w.w.Header()
	h.Set("Content-Type", contentType)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable {
		h.Set("Retry-After", strconv.Itoa(retryAfter))
	}
	if w.opts.Sign != nil {
		w.opts.Sign(h, body)
	}
	time.Sleep(time.Until(w.opts.NotBefore))
	if err := w.setDeadline(w.deadline); err != nil {
		return err
	}
	w.w.WriteHeader(status)
	return w.send(body)
}

// What every answer that does not stream begins with: JSON with an indentation, or text.
const (
	jsonPrefix = "{\n"
	textPrefix = "id: "
)

// IsAnswer says that b begins as the body of an answer does. An answer is signed as the
// body of a request is, and must not be taken for one.
func IsAnswer(b []byte) bool {
	return bytes.HasPrefix(b, []byte(jsonPrefix)) || bytes.HasPrefix(b, []byte(textPrefix))
}

// writeText writes a failure for a terminal or the OpenFaaS UI, the reason
// last but for one line.
func writeText(b *bytes.Buffer, rec api.Record) {
	const lastLines = 50
	// The caller has seen to it that an id has no line break.
	fmt.Fprintf(b, "%s%s\n", textPrefix, rec.ID)
	if rec.Request != "" {
		fmt.Fprintf(b, "request: %s\n", rec.Request)
	}
	b.WriteByte('\n')
	log := rec.Log
	if n := len(log) - lastLines; n > 0 {
		fmt.Fprintf(b, "… %d lines left out …\n", n)
		log = log[n:]
	}
	for _, line := range log {
		fmt.Fprintln(b, line)
	}
	if len(log) > 0 {
		b.WriteByte('\n')
	}
	if rec.Error != "" {
		fmt.Fprintf(b, "%s\n\n", strings.TrimRight(rec.Error, "\n"))
	}
	fmt.Fprintf(b, "%s: %s", rec.Status, rec.Code)
	if rec.Image != "" {
		fmt.Fprintf(b, ", %s", rec.Image)
	}
	fmt.Fprintf(b, ", %.1fs\n", rec.Duration)
}

// run writes a stream. Until it ends, it alone uses w.w.
func (w *Writer) run() {
	defer close(w.done)
	time.Sleep(time.Until(w.opts.NotBefore))
	if err := w.header(); err != nil {
		w.fail(err)
		return
	}
	beat := time.NewTimer(w.opts.Heartbeat)
	defer beat.Stop()
	for {
		silent := false
		select {
		case <-w.wake:
		case <-beat.C:
			silent = true
		}
		for {
			rec, more := w.next()
			if rec == nil && !silent {
				break
			}
			var err error
			if rec != nil {
				err = w.writeRecord(*rec)
			} else {
				err = w.writeHeartbeat()
			}
			if err != nil {
				w.fail(err)
				return
			}
			if rec != nil && rec.Status != api.InProgress {
				return
			}
			silent = false
			beat.Reset(w.opts.Heartbeat)
			if !more {
				break
			}
		}
	}
}

func (w *Writer) header() error {
	if err := w.setDeadline(w.nextDeadline()); err != nil {
		return err
	}
	w.w.WriteHeader(http.StatusOK)
	return w.flush()
}

// next returns what is to be written now, nil if nothing is. Of the lines that
// wait, a record takes as many as fit. more tells that there may be another.
func (w *Writer) next() (rec *api.Record, more bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.queue) == 0 {
		return w.terminal, false
	}
	rec = &api.Record{ID: w.opts.ID, Status: api.InProgress, Image: w.image, Duration: milliseconds(time.Since(w.opts.Start).Seconds())}
	*rec = bounded(*rec)
	// What the quotes and commas of many short lines take is counted too.
	left := maxLines
	taken := 0
	for ; taken < len(w.queue) && left > 0; taken++ {
		line := w.queue[taken]
		head, tail := split(line, left-3)
		if tail != "" {
			if len(rec.Log) > 0 {
				break // it may fit into the next as a whole
			}
			rec.Log = append(rec.Log, head)
			w.queue[taken] = tail
			w.queued -= len(head)
			break
		}
		rec.Log = append(rec.Log, line)
		left -= size(line) + 3
		w.queued -= cost(line)
		w.queue[taken] = ""
	}
	w.queue = w.queue[taken:]
	close(w.room)
	w.room = make(chan struct{})
	return rec, true
}

func (w *Writer) writeRecord(rec api.Record) error {
	var b bytes.Buffer
	if w.form == SSE {
		b.WriteString("data: ")
	}
	encode(&b, rec, "")
	if w.form == SSE {
		b.WriteByte('\n')
	}
	return w.write(b.Bytes())
}

func (w *Writer) writeHeartbeat() error {
	if w.form == SSE {
		return w.write([]byte(": in progress\n\n"))
	}
	return w.writeRecord(api.Record{ID: w.opts.ID, Log: []string{}, Status: api.InProgress, Duration: milliseconds(time.Since(w.opts.Start).Seconds())})
}

func (w *Writer) write(p []byte) error {
	if err := w.setDeadline(w.nextDeadline()); err != nil {
		return err
	}
	return w.send(p)
}

func (w *Writer) nextDeadline() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.finished {
		return w.deadline
	}
	return time.Now().Add(w.opts.WriteTimeout)
}

func (w *Writer) send(p []byte) error {
	if _, err := w.w.Write(p); err != nil {
		return writeError(err)
	}
	return w.flush()
}

// setDeadline does nothing for a ResponseWriter without a connection. The
// deadline of the last write is left for what the server writes after it, and
// net/http clears it before the next request.
func (w *Writer) setDeadline(t time.Time) error {
	return supported(w.rc.SetWriteDeadline(t))
}

func (w *Writer) flush() error {
	return supported(w.rc.Flush())
}

func supported(err error) error {
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return writeError(err)
}

func writeError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ErrSlow
	}
	return fmt.Errorf("writing answer: %w", err)
}

func (w *Writer) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
	w.queue, w.queued = nil, 0
	close(w.gone)
}
