package reply

import (
	"bytes"
	"errors"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"handler/function/api"
)

// client is the client of an answer. It takes its time for each write.
type client struct {
	bytes.Buffer
	header   http.Header
	status   int
	writes   []string
	takes    time.Duration
	deadline time.Time
}

func (c *client) Header() http.Header { return c.header }

func (c *client) WriteHeader(status int) { c.status = status }

func (c *client) Write(p []byte) (int, error) {
	if end := time.Now().Add(c.takes); end.After(c.deadline) {
		time.Sleep(time.Until(c.deadline))
		return 0, os.ErrDeadlineExceeded
	}
	time.Sleep(c.takes)
	c.writes = append(c.writes, string(p))
	return len(p), nil
}

func (c *client) SetWriteDeadline(t time.Time) error { c.deadline = t; return nil }

func (c *client) Flush() {}

type item struct {
	N int `json:"n"`
}

// TestEvents writes both forms: what comes together is written together, and soon.
func TestEvents(t *testing.T) {
	for _, tt := range []struct {
		form   Form
		media  string
		writes []string
	}{
		{JSON, api.NDJSONType, []string{"", "{\"n\":1}\n{\"n\":2}\n", "{\"status\":\"in_progress\"}\n", "{\"n\":3}\n"}},
		{NDJSON, api.NDJSONType, []string{"", "{\"n\":1}\n{\"n\":2}\n", "{\"status\":\"in_progress\"}\n", "{\"n\":3}\n"}},
		{SSE, api.SSEType, []string{"", "id: 1\ndata: {\"n\":1}\n\ndata: {\"n\":2}\n\n", ": in progress\n\n", "data: {\"n\":3}\n\n"}},
	} {
		synctest.Test(t, func(t *testing.T) {
			c := &client{header: make(http.Header)}
			e := NewEvents(c, tt.form)
			time.Sleep(eventsWait)
			synctest.Wait()
			if c.status != 200 || c.header.Get("Content-Type") != tt.media || c.header.Get("X-Accel-Buffering") != "no" {
				t.Errorf("after %v: %d %v", eventsWait, c.status, c.header)
			}
			e.Send("1", item{1})
			e.Send("", item{2})
			time.Sleep(eventsWait)
			synctest.Wait()
			e.Beat()
			time.Sleep(eventsWait)
			synctest.Wait()
			e.Send("", item{3})
			if err := e.Close(); err != nil {
				t.Error(err)
			}
			if got := strings.Join(c.writes, "|"); got != strings.Join(tt.writes, "|") {
				t.Errorf("%v: %q, want %q", tt.form, c.writes, tt.writes)
			}
			time.Sleep(time.Second)
			if len(c.writes) != len(tt.writes) {
				t.Errorf("after Close: %q", c.writes)
			}
		})
	}
}

// TestEventsCancel: until something has been sent, another answer can be given.
func TestEventsCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &client{header: make(http.Header)}
		e := NewEvents(c, NDJSON)
		e.Send("", item{1})
		if !e.Cancel() {
			t.Error("nothing has been sent, and it cannot be cancelled")
		}
		time.Sleep(time.Second)
		if c.status != 0 || len(c.header) != 0 || len(c.writes) != 0 {
			t.Errorf("cancelled: %d %v %q", c.status, c.header, c.writes)
		}
		e = NewEvents(c, NDJSON)
		time.Sleep(time.Second)
		synctest.Wait()
		if e.Cancel() {
			t.Error("it has begun, and is cancelled as if it had not")
		}
	})
}

// TestEventsSlow: a client that is too slow for a write gets no more, and what waits is bounded.
func TestEventsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &client{header: make(http.Header)}
		e := NewEvents(c, NDJSON)
		time.Sleep(eventsWait)
		synctest.Wait()
		c.takes = time.Hour
		began, most := time.Now(), 0
		var err error
		for n := 0; err == nil && n < 1e6; n++ {
			err = e.Send("", item{n})
			most = max(most, e.buf.Len())
		}
		if took := time.Since(began); !errors.Is(err, ErrSlow) || took != eventsTimeout {
			t.Errorf("after %v: %v", took, err)
		}
		if most > maxEvents+100 {
			t.Errorf("%d bytes wait", most)
		}
		if err := e.Close(); !errors.Is(err, ErrSlow) {
			t.Errorf("at the end: %v", err)
		}
	})
}

// TestParts: no part is too long for a record, and nothing is lost.
func TestParts(t *testing.T) {
	for line, want := range map[string]int{"": 1, "x": 1, strings.Repeat("x", maxLines-3): 1, strings.Repeat("x", maxLines-2): 2, strings.Repeat("\"ä", maxLines): 5} {
		parts := Parts(line)
		if len(parts) != want || strings.Join(parts, "") != line {
			t.Errorf("a line of %d bytes has %d parts, want %d", len(line), len(parts), want)
		}
		for _, part := range parts {
			if size(part) > maxLines-3 {
				t.Errorf("a part of %d bytes", size(part))
			}
		}
	}
}
