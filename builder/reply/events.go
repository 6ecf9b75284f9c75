package reply

import (
	"bytes"
	"net/http"
	"sync"
	"time"

	"handler/function/api"
)

const (
	// eventsWait is how long an event waits for others, so that they are written together.
	eventsWait = 20 * time.Millisecond
	// maxEvents is how many bytes of events wait.
	maxEvents = 32 << 10
	// eventsTimeout is how long a client may take for a write.
	eventsTimeout = 10 * time.Second
)

// Events is an answer that is a stream of objects, which are no records of this request's own. It
// begins eventsWait after NewEvents at the latest, or with the first bytes.
type Events struct {
	conn *conn
	form Form

	mu    sync.Mutex
	buf   bytes.Buffer
	timer *time.Timer // writes buf; nil if it does not run
	begun bool        // the header has been sent
	over  bool        // nothing more is written
	err   error       // of a write
}

// NewEvents returns the Events of a request. Every form but SSE is NDJSON. Close or Cancel must be
// called before the handler returns.
func NewEvents(w http.ResponseWriter, form Form) *Events {
	if form != SSE {
		form = NDJSON
	}
	e := &Events{conn: newConn(w), form: form}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.soon()
	return e
}

// Send adds an object. id is that of the server-sent event; an empty one is none. It fails once the
// client is gone or too slow.
func (e *Events) Send(id string, v any) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.form == SSE {
		if id != "" {
			e.buf.WriteString("id: " + id + "\n")
		}
		e.buf.WriteString("data: ")
	}
	encode(&e.buf, v, "")
	if e.form == SSE {
		e.buf.WriteByte('\n')
	}
	return e.added()
}

// Beat adds a sign of life. In NDJSON it is a record that says nothing but in_progress.
func (e *Events) Beat() error {
	if e.form == NDJSON {
		return e.Send("", struct {
			Status api.Status `json:"status"`
		}{api.InProgress})
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.buf.WriteString(": in progress\n\n")
	return e.added()
}

// added writes what waits, now or soon. The caller must hold e.mu, as for all below.
func (e *Events) added() error {
	if e.buf.Len() >= maxEvents {
		if e.timer != nil && e.timer.Stop() {
			e.timer = nil
		}
		e.write()
	}
	if e.err == nil && e.timer == nil && e.buf.Len() > 0 {
		e.soon()
	}
	return e.err
}

func (e *Events) soon() {
	e.timer = time.AfterFunc(eventsWait, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.timer = nil
		e.write()
	})
}

func (e *Events) write() {
	if e.over || e.err != nil {
		return
	}
	if e.err = e.conn.setDeadline(time.Now().Add(eventsTimeout)); e.err != nil {
		return
	}
	if !e.begun {
		e.begun = true
		setStreamHeader(e.conn.Header(), e.form)
		e.conn.WriteHeader(http.StatusOK)
	}
	e.err = e.conn.send(e.buf.Bytes())
	e.buf.Reset()
}

// Cancel ends the answer where it is. It returns true if nothing has been sent: then another answer
// can be given.
func (e *Events) Cancel() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.over = true
	return !e.begun
}

// Close writes what waits.
func (e *Events) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.write()
	e.over = true
	return e.err
}
