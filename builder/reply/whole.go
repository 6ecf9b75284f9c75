package reply

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"handler/function/api"
)

// retryAfter is for a caller that is told to come back, in seconds: long enough for a small
// build to end, or for a daemon to restart.
const retryAfter = 10

// whole is an answer that is written at once, when the build has ended. Until then it keeps
// an excerpt of the log.
type whole struct {
	conn *conn
	opts Options

	mu       sync.Mutex
	excerpt  Excerpt
	finished bool
}

func (a *whole) log(_ context.Context, lines []string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.finished {
		return ErrFinished
	}
	for _, line := range lines {
		a.excerpt.Add(line)
	}
	return nil
}

func (a *whole) finish(rec api.Record, lines []string) error {
	a.mu.Lock()
	a.finished = true
	for _, line := range lines {
		a.excerpt.Add(line)
	}
	rec.Log = a.excerpt.Lines()
	a.mu.Unlock()
	status := http.StatusOK
	if rec.Status != api.Success {
		status = rec.Code.HTTPStatusFor(a.opts.Waits)
	}
	return a.writeRecord(status, rec)
}

// Object answers with one record as it is, whatever its status. It returns once the client
// has accepted the record or can get no more.
func Object(w http.ResponseWriter, status int, rec api.Record, opts Options) error {
	rec.ID = opts.ID
	rec.Duration = milliseconds(rec.Duration)
	if rec.Log == nil {
		rec.Log = []string{}
	}
	a := &whole{conn: newConn(w), opts: opts.withDefaults()}
	return a.writeRecord(status, bounded(rec))
}

// Value answers with v, which is no record. It returns like Object.
func Value(w http.ResponseWriter, status int, v any, opts Options) error {
	a := &whole{conn: newConn(w), opts: opts.withDefaults()}
	return a.writeJSON(status, v)
}

func (a *whole) writeRecord(status int, rec api.Record) error {
	if a.opts.Text && rec.Status != api.Success {
		var body bytes.Buffer
		writeText(&body, rec)
		return a.writeBody(status, api.TextType+"; charset=utf-8", body.Bytes())
	}
	return a.writeJSON(status, rec)
}

func (a *whole) writeJSON(status int, v any) error {
	var body bytes.Buffer
	encode(&body, v, "  ")
	return a.writeBody(status, api.JSONType, body.Bytes())
}

func (a *whole) writeBody(status int, contentType string, body []byte) error {
	deadline := time.Now().Add(a.opts.WriteTimeout)
	h := a.conn.Header()
	h.Set("Content-Type", contentType)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable {
		h.Set("Retry-After", strconv.Itoa(retryAfter))
	}
	if a.opts.Sign != nil {
		a.opts.Sign(h, body)
	}
	time.Sleep(time.Until(a.opts.NotBefore))
	if err := a.conn.setDeadline(deadline); err != nil {
		return err
	}
	a.conn.WriteHeader(status)
	return a.conn.send(body)
}

// The first bytes of every whole answer: JSON with an indentation, or text.
const (
	jsonPrefix = "{\n"
	textPrefix = "id: "
)

// IsAnswer says whether b begins like the body of an answer. An answer is signed in the same
// way as a request, and must not be taken for a request.
func IsAnswer(b []byte) bool {
	return bytes.HasPrefix(b, []byte(jsonPrefix)) || bytes.HasPrefix(b, []byte(textPrefix))
}

// writeText writes a failure for a terminal or the OpenFaaS UI. The reason is near the end,
// where a terminal shows it.
func writeText(b *bytes.Buffer, rec api.Record) {
	const lastLines = 50
	// The caller makes sure that an id has no line break.
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
