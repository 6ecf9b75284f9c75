// Package reply writes an answer in the form that its caller asked for: one JSON object, a
// stream of JSON lines, or server-sent events. It knows the records of package api, and
// nothing about the builds that they tell of.
package reply

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"handler/function/api"
)

var (
	// ErrSlow is why Log fails when the client has not read for WriteTimeout.
	ErrSlow = errors.New("client is too slow")
	// ErrFinished is why Log fails after Finish.
	ErrFinished = errors.New("answer is finished")
)

// Options of a Writer. All may be zero.
type Options struct {
	// ID of the build, for every record.
	ID string
	// Request is for the last record, if that has none.
	Request string
	// Start is when the request was accepted. Zero means now.
	Start time.Time
	// Sign adds headers with a signature of the body to a whole answer. It may be nil.
	Sign func(h http.Header, body []byte)
	// NotBefore is when the answer may begin. Zero means at once.
	NotBefore time.Time
	// Text makes an error plain text in a whole answer.
	Text bool
	// Waits says that the caller waits for a slot, which decides the status of some codes.
	Waits bool
	// WriteTimeout is how long a client may take to accept one record.
	// Zero means 30 s.
	WriteTimeout time.Duration
	// Heartbeat is the longest silence of a stream. Zero means 10 s.
	Heartbeat time.Duration
}

func (o Options) withDefaults() Options {
	if o.Start.IsZero() {
		o.Start = time.Now()
	}
	o.WriteTimeout = cmp.Or(o.WriteTimeout, 30*time.Second)
	o.Heartbeat = cmp.Or(o.Heartbeat, 10*time.Second)
	return o
}

// Writer writes one answer. All its methods may be called concurrently.
//
// An answer is whole or a stream. Every answer is whole at first, because nothing has been
// sent yet and a failure can still have an HTTP status. An NDJSON or SSE answer becomes a
// stream when Begin, the first line of the log, or a success says that it goes well so far.
type Writer struct {
	conn *conn
	form Form
	opts Options

	mu       sync.Mutex
	body     body
	image    string
	finished bool
}

// body is the rest of an answer: whole or a stream. Its methods may be called concurrently.
type body interface {
	// log adds lines. It fails with ErrFinished after finish.
	log(ctx context.Context, lines []string) error
	// finish adds lines, and ends the answer with rec. It must be called once, and
	// returns when the client has accepted all or can get no more.
	finish(rec api.Record, lines []string) error
}

// New returns a Writer for the answer to one request. Finish must be called before the
// handler returns: a stream has a goroutine, which ends with Finish.
func New(w http.ResponseWriter, form Form, opts Options) *Writer {
	opts = opts.withDefaults()
	c := newConn(w)
	return &Writer{conn: c, form: form, opts: opts, body: &whole{conn: c, opts: opts}}
}

// SetImage sets the reference that records name from now on, as it was sent.
func (w *Writer) SetImage(image string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.image = image
}

// Begin makes an NDJSON or SSE answer a stream, and sends its header. Other headers must be
// set before. After Begin a failure is told in the last record, and not by the HTTP status.
// For a JSON answer Begin does nothing.
func (w *Writer) Begin() { w.begin() }

// begin returns the body, as a stream if the form is one.
func (w *Writer) begin() body {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, isWhole := w.body.(*whole); isWhole && w.form != JSON && !w.finished {
		w.body = newStream(w.conn, w.form, w.opts, w.inProgress)
	}
	return w.body
}

// Log adds lines to the answer. A stream's Log sends the header if Begin has not. It waits
// while more than 256 KiB wait for the client, but not longer than WriteTimeout. It fails
// once the client is gone or too slow. Then the build should be cancelled.
func (w *Writer) Log(ctx context.Context, lines ...string) error {
	return w.begin().log(ctx, lines)
}

// Finish writes the record that ends the answer. The code of rec decides the HTTP status of
// a whole answer. Finish fills in what rec leaves empty: the image, the duration, the status
// (failed) and, for a failure, the code (internal). Finish returns once the client has
// accepted everything or can get no more, WriteTimeout later at most. A second call does
// nothing.
func (w *Writer) Finish(rec api.Record) error {
	if rec.Status == api.Success {
		w.begin()
	}
	w.mu.Lock()
	if w.finished {
		w.mu.Unlock()
		return nil
	}
	w.finished = true
	b, image := w.body, w.image
	w.mu.Unlock()

	rec.ID = w.opts.ID
	rec.Request = cmp.Or(rec.Request, w.opts.Request)
	rec.Image = cmp.Or(rec.Image, image)
	if rec.Status != api.Success {
		rec.Status = api.Failed
		rec.Code = cmp.Or(rec.Code, api.Internal)
	}
	if rec.Duration == 0 {
		rec.Duration = time.Since(w.opts.Start).Seconds()
	}
	rec.Duration = milliseconds(rec.Duration)
	lines := rec.Log
	rec.Log = []string{}
	return b.finish(bounded(rec), lines)
}

// inProgress is a record of a build that has not ended.
func (w *Writer) inProgress() api.Record {
	w.mu.Lock()
	defer w.mu.Unlock()
	return api.Record{ID: w.opts.ID, Status: api.InProgress, Image: w.image, Duration: milliseconds(time.Since(w.opts.Start).Seconds())}
}
