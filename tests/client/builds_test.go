package client

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

const (
	line1 = `{"n":1,"t":"l: one"}`
	line2 = `{"n":2,"t":"l: two"}`
	ended = `{"id":"a","attempt":1,"status":"success","duration":1,"began":"2026-11-29T10:00:00Z","ended":"2026-11-29T10:00:01Z","lines":2,"queued":false}`
	alive = `{"status":"in_progress"}`
)

// readLog reads the log that a server answers with.
func readLog(t *testing.T, form, body, query string) (Log, *http.Request, error) {
	t.Helper()
	var got *http.Request
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		got = req
		w.Header().Set("Content-Type", form)
		fmt.Fprint(w, body)
	}))
	defer server.Close()
	c := Client{URL: server.URL, Secret: "key"}
	l, err := c.ReadLog(t.Context(), "a", query, nil)
	return l, got, err
}

func TestReadLog(t *testing.T) {
	for _, tt := range []struct {
		form, query, body, log string
		beats                  int
	}{
		{NDJSON, "", line1 + "\n" + alive + "\n" + line2 + "\n" + ended + "\n", "l: one l: two", 1},
		{NDJSON, "after=1&follow=1", line2 + "\n" + ended + "\n", "l: two", 0},
		{NDJSON, "", `{"n":2,"lost":2,"t":"…"}` + "\n" + ended + "\n", "…", 0},
		{SSE, "", "id: 1\ndata: " + line1 + "\n\n: in progress\n\nid: 2\ndata: " + line2 + "\n\ndata: " + ended + "\n\n", "l: one l: two", 1},
	} {
		l, req, err := readLog(t, tt.form, tt.body, tt.query)
		if err != nil || strings.Join(l.Texts(), " ") != tt.log || l.Heartbeats != tt.beats || l.Build.Attempt != 1 || l.Status != "success" {
			t.Errorf("%q: got %+v, %v", tt.body, l, err)
		}
		text := req.Header.Get("X-Build-Timestamp") + ".GET " + req.URL.RequestURI()
		if req.Header.Get("X-Build-Signature") != Sign("key", []byte(text)) {
			t.Errorf("%q is not what was signed", text)
		}
	}
}

// TestBrokenLogs has each promise of a log broken once.
func TestBrokenLogs(t *testing.T) {
	for name, tt := range map[string]struct{ form, body, want string }{
		"a line is missing":      {NDJSON, line2 + "\n" + ended + "\n", "after line 0"},
		"a line comes twice":     {NDJSON, line1 + "\n" + line1 + "\n" + ended + "\n", "after line 1"},
		"too few are lost":       {NDJSON, `{"n":3,"lost":2,"t":"…"}` + "\n" + ended + "\n", "after line 0"},
		"no record":              {NDJSON, line1 + "\n", ErrNoVerdict.Error()},
		"a line after it":        {NDJSON, ended + "\n" + line1 + "\n", "after the record"},
		"no newline":             {NDJSON, line1 + "\n" + ended, "broke off"},
		"an unknown key":         {NDJSON, `{"n":1,"t":"","more":1}` + "\n" + ended + "\n", "more"},
		"a record with a key":    {NDJSON, strings.Replace(ended, "queued", "secret", 1) + "\n", "secret"},
		"a record without end":   {NDJSON, strings.Replace(ended, "success", "in_progress", 1) + "\n", "ended at"},
		"another id":             {SSE, "id: 2\ndata: " + line1 + "\n\ndata: " + ended + "\n\n", `has the id "2"`},
		"an event of two lines":  {SSE, "data: " + line1 + "\ndata: " + line2 + "\n\ndata: " + ended + "\n\n", "blank line"},
		"an event of another":    {SSE, "event: x\n\ndata: " + ended + "\n\n", "not an event"},
		"an event without blank": {SSE, "data: " + ended + "\n", "blank line"},
	} {
		if l, _, err := readLog(t, tt.form, tt.body, ""); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %+v, %v, want an error with %q", name, l, err, tt.want)
		}
	}
}

func TestBuildsAndStop(t *testing.T) {
	answer := ""
	var got *http.Request
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		got = req
		w.Header().Set("Content-Type", JSON)
		fmt.Fprint(w, answer)
	}))
	defer server.Close()
	c := Client{URL: server.URL, Secret: "key"}
	answer = `{"builds":[` + ended + `],"next":"7","complete":true,"id":"x"}`
	l, err := c.Builds(t.Context(), "limit=1")
	if err != nil || len(l.Builds) != 1 || l.Builds[0].ID != "a" || l.Next != "7" || !l.Complete || got.URL.RequestURI() != "/builds?limit=1" {
		t.Errorf("listing: %+v, %v of %s", l, err, got.URL)
	}
	for _, answer = range []string{`{"builds":null,"complete":true}`, `{"builds":[],"more":1}`, `{"builds":[{"status":"done"}]}`} {
		if l, err := c.Builds(t.Context(), ""); err == nil {
			t.Errorf("%s: got %+v", answer, l)
		}
	}
	answer = ended
	a, err := c.Stop(t.Context(), "a?attempt=1")
	if err != nil || a.Build.Lines != 2 || a.Status != "success" || got.Method != http.MethodDelete || got.URL.RequestURI() != "/builds/a?attempt=1" {
		t.Errorf("stopping: %v, %v of %s %s", a, err, got.Method, got.URL)
	}
}
