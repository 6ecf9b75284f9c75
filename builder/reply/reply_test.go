package reply

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"handler/function/api"
)

func TestAccept(t *testing.T) {
	for _, tc := range []struct {
		accept []string
		want   Form
	}{
		{nil, JSON},
		{[]string{""}, JSON},
		{[]string{"*/*"}, JSON},
		{[]string{"application/json"}, JSON},
		{[]string{"application/json, text/plain, */*"}, JSON},
		{[]string{"application/x-ndjson"}, NDJSON},
		{[]string{"Application/X-NDJSON"}, NDJSON},
		{[]string{"application/x-ndjson; charset=utf-8;q=0.9"}, NDJSON},
		{[]string{"text/event-stream"}, SSE},
		{[]string{"TEXT/event-stream;q=1"}, SSE},
		{[]string{"text/event-stream, application/x-ndjson"}, NDJSON},
		{[]string{"application/x-ndjson,text/event-stream"}, NDJSON},
		{[]string{"text/event-stream", "application/x-ndjson"}, NDJSON},
		{[]string{"application/json", " \ttext/event-stream "}, SSE},
		{[]string{",,text/event-stream,,"}, SSE},
		{[]string{"application/x-ndjson;q=0, text/event-stream"}, SSE},
		{[]string{"application/x-ndjson; Q=0.000"}, JSON},
		{[]string{"application/x-ndjson;q="}, NDJSON},
		{[]string{"application/x-ndjsonx, xtext/event-stream"}, JSON},
	} {
		if got := Accept(http.Header{"Accept": tc.accept}); got != tc.want {
			t.Errorf("Accept(%q) = %d, want %d", tc.accept, got, tc.want)
		}
	}
}

// answer serves one request over a connection and returns the response with its
// body, as it was sent.
func answer(t *testing.T, form Form, opts Options, handle func(*Writer)) (*http.Response, string) {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handle(New(w, form, opts))
	}))
	defer srv.Close()
	res, err := srv.Client().Get(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body)
}

// records reads a stream as go-sdk does, and fails on what go-sdk would drop.
func records(t *testing.T, form Form, body string) []api.Record {
	t.Helper()
	var recs []api.Record
	scanner := bufio.NewScanner(strings.NewReader(body))
	for scanner.Scan() {
		line := scanner.Text()
		if len(line)+1 > maxRecord {
			t.Errorf("line of %d bytes", len(line)+1)
		}
		if form == SSE {
			data, ok := strings.CutPrefix(line, "data: ")
			if !ok && !strings.HasPrefix(line, ":") {
				t.Fatalf("line %.100q", line)
			}
			if !scanner.Scan() || scanner.Text() != "" {
				t.Fatalf("no blank line after an event, but %.100q", scanner.Text())
			}
			if !ok {
				continue
			}
			line = data
		}
		var rec api.Record
		if err := json.Unmarshal([]byte(line), &rec); err != nil {
			t.Fatalf("%v in %.100q", err, line)
		}
		if rec.Log == nil {
			t.Errorf("no log in %.100q", line)
		}
		if rec.Image != rec.ImageName {
			t.Errorf("two images in %.100q", line)
		}
		recs = append(recs, rec)
	}
	if err := scanner.Err(); err != nil {
		t.Fatal(err)
	}
	for i, rec := range recs {
		if last := i == len(recs)-1; last != (rec.Status == api.Success || rec.Status == api.Failed) || !last && rec.Status != api.InProgress {
			t.Errorf("status %q in record %d of %d", rec.Status, i+1, len(recs))
		}
	}
	if len(recs) == 0 {
		t.Error("no record")
	}
	return recs
}

func logOf(recs []api.Record) []string {
	var log []string
	for _, rec := range recs {
		log = append(log, rec.Log...)
	}
	return log
}

func TestStream(t *testing.T) {
	big := strings.Repeat("x", 300<<10)
	for _, tc := range []struct {
		name  string
		log   [][]string
		rec   api.Record
		want  string // the log's text
		lines int    // of the log, 0 for as many as were sent
	}{
		{name: "nothing", rec: api.Record{Status: api.Success, Digest: "sha256:1"}},
		{name: "lines", log: [][]string{{"a", "b"}, {"c"}}, rec: api.Record{Status: api.Success}, want: "abc"},
		{name: "blank line", log: [][]string{{"a", "", "b"}}, rec: api.Record{Status: api.Success}, want: "ab"},
		{name: "failure", log: [][]string{{"a"}}, rec: api.Record{Status: api.Failed, Code: api.BuildFailed, Error: "exit code: 1"}, want: "a"},
		{name: "last lines with the verdict", log: [][]string{{"a"}}, rec: api.Record{Status: api.Success, Log: []string{"b", "c"}}, want: "abc"},
		{name: "markup", log: [][]string{{"<a> & 'b'\t"}}, rec: api.Record{Status: api.Success}, want: "<a> & 'b'\t"},
		{name: "long line", log: [][]string{{big}}, rec: api.Record{Status: api.Success}, want: big, lines: 6},
		{name: "long line of quotes", log: [][]string{{strings.Repeat(`"`, 60<<10)}}, rec: api.Record{Status: api.Success}, want: strings.Repeat(`"`, 60<<10), lines: 3},
		{name: "long line of controls", log: [][]string{{strings.Repeat("\x01", 30<<10)}}, rec: api.Record{Status: api.Success}, want: strings.Repeat("\x01", 30<<10), lines: 4},
		{name: "long line of runes", log: [][]string{{strings.Repeat("日本🙂", 10<<10)}}, rec: api.Record{Status: api.Success}, want: strings.Repeat("日本🙂", 10<<10), lines: 2},
		{name: "many lines", log: [][]string{slices.Repeat([]string{"l: abc"}, 20000)}, rec: api.Record{Status: api.Success}, want: strings.Repeat("l: abc", 20000)},
		{name: "many blank lines", log: [][]string{make([]string, 50000)}, rec: api.Record{Status: api.Success}},
	} {
		for form, name := range map[Form]string{NDJSON: "NDJSON", SSE: "SSE"} {
			t.Run(tc.name+"/"+name, func(t *testing.T) {
				res, body := answer(t, form, Options{}, func(w *Writer) {
					w.SetImage("r/i:1")
					w.Begin()
					for _, lines := range tc.log {
						if err := w.Log(t.Context(), lines...); err != nil {
							t.Error(err)
						}
					}
					if err := w.Finish(tc.rec); err != nil {
						t.Error(err)
					}
				})
				contentType := map[Form]string{NDJSON: api.NDJSONType, SSE: api.SSEType}[form]
				if res.StatusCode != 200 || res.Header.Get("Content-Type") != contentType || res.Header.Get("X-Content-Type-Options") != "nosniff" {
					t.Errorf("status %d, header %v", res.StatusCode, res.Header)
				}
				if strings.Contains(body, `\u003c`) || strings.Contains(body, `\u0026`) {
					t.Error("HTML is escaped")
				}
				recs := records(t, form, body)
				log := logOf(recs)
				if strings.Join(log, "") != tc.want {
					t.Errorf("log is %.200q", log)
				}
				lines := tc.lines
				if lines == 0 {
					lines = len(slices.Concat(append(tc.log, tc.rec.Log)...))
				}
				if len(log) != lines {
					t.Errorf("log has %d lines, want %d", len(log), lines)
				}
				last := recs[len(recs)-1]
				if last.Image != "r/i:1" || last.Status != tc.rec.Status || last.Code != tc.rec.Code || last.Error != tc.rec.Error || last.Digest != tc.rec.Digest {
					t.Errorf("last record is %+v", last)
				}
			})
		}
	}
}

// TestStreamBounds checks that nothing in the last record makes it too long.
func TestStreamBounds(t *testing.T) {
	big := strings.Repeat("\x01 \xff \" <é> \u2028", 100<<10)
	list := slices.Repeat([]string{"some warning\x02"}, 5000)
	for form, prefix := range map[Form]string{NDJSON: "", SSE: "data: "} {
		_, body := answer(t, form, Options{}, func(w *Writer) {
			w.SetImage(big)
			w.Log(t.Context(), "a line with the image")
			w.Finish(api.Record{
				Status: api.Failed, Code: api.BuildFailed, Error: "the start" + big + "the end", Digest: big, Commit: big, Request: big,
				Tags: list, Platforms: []string{big}, Warnings: slices.Repeat([]string{big}, 10),
			})
		})
		recs := records(t, form, body)
		last := recs[len(recs)-1]
		if !strings.HasPrefix(last.Error, "the start") || !strings.HasSuffix(last.Error, "the end") || !strings.Contains(last.Error, "bytes cut) …") {
			t.Errorf("%serror is %.50q … %q", prefix, last.Error, last.Error[max(0, len(last.Error)-50):])
		}
		n := len(last.Tags)
		if n < 100 || last.Tags[n-1] != fmt.Sprintf("… (%d more)", len(list)-n+1) {
			t.Errorf("%d tags, the last is %q", n, last.Tags[n-1])
		}
	}
}

// TestLive checks that a line arrives before there is anything after it.
func TestLive(t *testing.T) {
	step := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w := New(rw, NDJSON, Options{})
		w.Begin()
		<-step
		w.Log(t.Context(), "first")
		<-step
		w.SetImage("r/i:2")
		w.Log(t.Context(), "second")
		<-step
		w.Finish(api.Record{Status: api.Success})
	}))
	defer srv.Close()
	res, err := srv.Client().Get(srv.URL) // returns with the header
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	d := json.NewDecoder(res.Body)
	for _, want := range []api.Record{
		{Log: []string{"first"}, Status: api.InProgress},
		{Log: []string{"second"}, Status: api.InProgress, Image: "r/i:2"},
		{Log: []string{}, Status: api.Success, Image: "r/i:2"},
	} {
		step <- struct{}{}
		var rec api.Record
		if err := d.Decode(&rec); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(rec.Log, want.Log) || rec.Status != want.Status || rec.Image != want.Image {
			t.Errorf("got %+v, want %+v", rec, want)
		}
	}
}

func TestHeartbeat(t *testing.T) {
	const beats = 3
	for _, tc := range []struct {
		form Form
		want func(line string) bool
	}{
		// The duration is in seconds: it is a fraction, and less than ten.
		{NDJSON, regexp.MustCompile(`^\{"log":\[\],"status":"in_progress","duration":\d\.`).MatchString},
		{SSE, func(line string) bool { return strings.HasPrefix(line, ":") }},
	} {
		heard := make(chan struct{})
		srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			w := New(rw, tc.form, Options{Heartbeat: 20 * time.Millisecond})
			w.SetImage("r/i:1")
			w.Begin()
			<-heard
			w.Finish(api.Record{Status: api.Success})
		}))
		defer srv.Close()
		res, err := srv.Client().Get(srv.URL)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		r := bufio.NewReader(res.Body)
		for range beats {
			line, err := r.ReadString('\n')
			if err != nil || !tc.want(line) {
				t.Errorf("heartbeat is %q, %v", line, err)
			}
			if tc.form == SSE {
				r.ReadString('\n')
			}
		}
		close(heard)
		rest, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		recs := records(t, tc.form, string(rest))
		if recs[len(recs)-1].Status != api.Success {
			t.Errorf("last record is %+v", recs[len(recs)-1])
		}
	}
}

func TestJSON(t *testing.T) {
	signed := func(h http.Header, body []byte) { h.Set(api.SignatureHeader, "signed "+strconv.Itoa(len(body))) }
	for _, tc := range []struct {
		name   string
		form   Form
		text   bool
		waits  bool
		log    []string
		rec    api.Record
		status int
		retry  string
		want   string
	}{
		{
			name: "success", log: []string{"<a>", "b"}, status: 200,
			rec:  api.Record{Status: api.Success, Digest: "sha256:1", Duration: 1.2345},
			want: "{\n  \"log\": [\n    \"<a>\",\n    \"b\"\n  ],\n  \"image\": \"r/i:1\",\n  \"imageName\": \"r/i:1\",\n  \"status\": \"success\",\n  \"duration\": 1.235,\n  \"digest\": \"sha256:1\",\n  \"id\": \"call-1\"\n}\n",
		},
		{
			name: "failure without a log", status: 422,
			rec:  api.Record{Status: api.Failed, Code: api.BuildFailed, Error: "exit code: 1", Duration: 2},
			want: "{\n  \"log\": [],\n  \"image\": \"r/i:1\",\n  \"imageName\": \"r/i:1\",\n  \"status\": \"failed\",\n  \"error\": \"exit code: 1\",\n  \"code\": \"build_failed\",\n  \"duration\": 2,\n  \"id\": \"call-1\"\n}\n",
		},
		{
			name: "busy", status: 429, retry: "10",
			rec:  api.Record{Status: api.Failed, Code: api.Busy, Duration: 2},
			want: "{\n  \"log\": [],\n  \"image\": \"r/i:1\",\n  \"imageName\": \"r/i:1\",\n  \"status\": \"failed\",\n  \"code\": \"busy\",\n  \"duration\": 2,\n  \"id\": \"call-1\"\n}\n",
		},
		{
			name: "busy tenant", status: 429, retry: "10",
			rec:  api.Record{Status: api.Failed, Code: api.TenantBusy, Duration: 2},
			want: "{\n  \"log\": [],\n  \"image\": \"r/i:1\",\n  \"imageName\": \"r/i:1\",\n  \"status\": \"failed\",\n  \"code\": \"tenant_busy\",\n  \"duration\": 2,\n  \"id\": \"call-1\"\n}\n",
		},
		{
			name: "busy tenant, for a queue", status: 503, retry: "10", waits: true,
			rec:  api.Record{Status: api.Failed, Code: api.TenantBusy, Duration: 2},
			want: "{\n  \"log\": [],\n  \"image\": \"r/i:1\",\n  \"imageName\": \"r/i:1\",\n  \"status\": \"failed\",\n  \"code\": \"tenant_busy\",\n  \"duration\": 2,\n  \"id\": \"call-1\"\n}\n",
		},
		{
			name: "no code, no status", status: 500,
			rec:  api.Record{Duration: 2},
			want: "{\n  \"log\": [],\n  \"image\": \"r/i:1\",\n  \"imageName\": \"r/i:1\",\n  \"status\": \"failed\",\n  \"code\": \"internal\",\n  \"duration\": 2,\n  \"id\": \"call-1\"\n}\n",
		},
		{
			name: "stream that has not begun", form: NDJSON, status: 401,
			rec:  api.Record{Status: api.Failed, Code: api.Unauthorized, Error: "no signature", Duration: 2},
			want: "{\n  \"log\": [],\n  \"image\": \"r/i:1\",\n  \"imageName\": \"r/i:1\",\n  \"status\": \"failed\",\n  \"error\": \"no signature\",\n  \"code\": \"unauthorized\",\n  \"duration\": 2,\n  \"id\": \"call-1\"\n}\n",
		},
		{
			name: "text", text: true, log: []string{"a", "b"}, status: 503, retry: "10",
			rec:  api.Record{Status: api.Failed, Code: api.NoDaemon, Error: "no daemon\n", Duration: 2.34},
			want: "id: call-1\n\na\nb\n\nno daemon\n\nfailed: no_daemon, r/i:1, 2.3s\n",
		},
		{
			name: "text with a long log", text: true, log: slices.Repeat([]string{"a"}, 60), status: 422,
			rec:  api.Record{Status: api.Failed, Code: api.BuildFailed, Error: "exit code: 1", Duration: 2, Request: "abc"},
			want: "id: call-1\nrequest: abc\n\n… 10 lines left out …\n" + strings.Repeat("a\n", 50) + "\nexit code: 1\n\nfailed: build_failed, r/i:1, 2.0s\n",
		},
		{
			name: "success for text", text: true, status: 200,
			rec:  api.Record{Status: api.Success, Duration: 2},
			want: "{\n  \"log\": [],\n  \"image\": \"r/i:1\",\n  \"imageName\": \"r/i:1\",\n  \"status\": \"success\",\n  \"duration\": 2,\n  \"id\": \"call-1\"\n}\n",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			res, body := answer(t, tc.form, Options{ID: "call-1", Sign: signed, Text: tc.text, Waits: tc.waits}, func(w *Writer) {
				w.SetImage("r/i:1")
				if tc.form == JSON {
					w.Begin()
				}
				for _, line := range tc.log {
					w.Log(t.Context(), line)
				}
				if err := w.Finish(tc.rec); err != nil {
					t.Error(err)
				}
				if err := w.Log(t.Context(), "late"); !errors.Is(err, ErrFinished) {
					t.Errorf("Log after Finish: %v", err)
				}
				if err := w.Finish(api.Record{Status: api.Success, Error: "second"}); err != nil {
					t.Error(err)
				}
			})
			if body != tc.want {
				t.Errorf("got %s\nwant %s", body, tc.want)
			}
			contentType := "application/json"
			if tc.text && tc.status != 200 {
				contentType = "text/plain; charset=utf-8"
			}
			for key, want := range map[string]string{
				"Content-Type":           contentType,
				"X-Content-Type-Options": "nosniff",
				"X-Build-Signature":      "signed " + strconv.Itoa(len(body)),
				"Retry-After":            tc.retry,
			} {
				if got := res.Header.Get(key); got != want {
					t.Errorf("%s is %q, want %q", key, got, want)
				}
			}
			if res.StatusCode != tc.status {
				t.Errorf("status is %d, want %d", res.StatusCode, tc.status)
			}
		})
	}
}

// TestIsAnswer checks that IsAnswer recognises the beginning of every whole answer.
func TestIsAnswer(t *testing.T) {
	for _, text := range []bool{false, true} {
		for _, rec := range []api.Record{{Status: api.Success}, {Code: api.Busy}, {Code: api.BadTar, Error: "GET /", Log: []string{"x"}}} {
			if _, body := answer(t, JSON, Options{Text: text}, func(w *Writer) { w.Finish(rec) }); !IsAnswer([]byte(body)) {
				t.Errorf("not known for an answer: %s", body)
			}
		}
	}
	w := httptest.NewRecorder()
	Object(w, 200, api.Record{Status: api.InProgress}, Options{})
	Value(w, 200, struct{ A int }{1}, Options{})
	if body := w.Body.String(); !IsAnswer([]byte(body)) || !IsAnswer([]byte(body[strings.LastIndex(body, "{"):])) {
		t.Errorf("not known for answers: %s", body)
	}
	for _, body := range []string{"", "{", `{"signature":"x"}`, "\x1f\x8b", "context/", "id:"} {
		if IsAnswer([]byte(body)) {
			t.Errorf("%q is taken for an answer", body)
		}
	}
}

// TestEmptyAnswers checks an answer to which nothing was given.
func TestEmptyAnswers(t *testing.T) {
	for _, form := range []Form{JSON, NDJSON, SSE} {
		start := time.Now().Add(-90 * time.Second)
		res, body := answer(t, form, Options{Start: start}, func(w *Writer) {
			w.Begin()
			w.Finish(api.Record{Status: api.Success})
		})
		if got := res.Header.Get("X-Build-Signature"); got != "" {
			t.Errorf("form %d: signature %q", form, got)
		}
		body = strings.TrimPrefix(body, "data: ")
		var rec api.Record
		if err := json.Unmarshal([]byte(body), &rec); err != nil {
			t.Fatal(err)
		}
		if rec.Log == nil || rec.Duration < 90 || rec.Duration > 3000 || rec.Status != api.Success {
			t.Errorf("form %d: %s", form, body)
		}
	}
}

func TestExcerpt(t *testing.T) {
	for _, tc := range []struct {
		name  string
		lines int
		line  string
	}{
		{"short lines", 150000, ""},
		{"lines", 50000, "a line like many others"},
		{"quotes", 20000, strings.Repeat(`"`, 100)},
		{"long lines", 50, strings.Repeat("x", 100<<10)},
		{"all fit", 1000, strings.Repeat("x", 900)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, body := answer(t, JSON, Options{}, func(w *Writer) {
				w.Log(t.Context(), "first")
				for range tc.lines {
					w.Log(t.Context(), tc.line)
				}
				w.Log(t.Context(), "last")
				w.Finish(api.Record{Status: api.Failed, Code: api.BuildFailed})
			})
			var rec api.Record
			if err := json.Unmarshal([]byte(body), &rec); err != nil {
				t.Fatal(err)
			}
			log := rec.Log
			if log[0] != "first" || log[len(log)-1] != "last" {
				t.Errorf("log begins with %.100q and ends with %.100q", log[0], log[len(log)-1])
			}
			size := strings.Index(body, `"status"`) - strings.Index(body, `"log"`)
			if size > maxLog {
				t.Errorf("log takes %d bytes", size)
			}
			mark := slices.IndexFunc(log, func(s string) bool { return strings.Contains(s, "left out") })
			if tc.name == "all fit" {
				if mark >= 0 || len(log) != tc.lines+2 {
					t.Errorf("%d lines, mark at %d", len(log), mark)
				}
				return
			}
			if mark < 0 {
				t.Fatal("no mark")
			}
			if size < maxLog*8/10 {
				t.Errorf("log takes only %d bytes", size)
			}
			var omitted int
			if _, err := fmt.Sscanf(log[mark], "… %d lines left out …", &omitted); err != nil {
				t.Fatal(err)
			}
			if tc.name != "long lines" && omitted+len(log)-1 != tc.lines+2 {
				t.Errorf("%d lines and %d omitted of %d", len(log)-1, omitted, tc.lines+2)
			}
		})
	}
}

// slack is how much longer than a timeout a loaded machine may take. It only guards against a
// hang.
const slack = 20 * time.Second

// stalled serves one answer to a client that sends a request and never reads.
// The connection is small, so that it fills.
func stalled(t *testing.T, handle func(*http.Request, http.ResponseWriter)) net.Conn {
	t.Helper()
	done := make(chan struct{})
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer close(done)
		handle(r, w)
	}))
	srv.Config.ConnState = func(c net.Conn, s http.ConnState) {
		if s == http.StateNew {
			c.(*net.TCPConn).SetWriteBuffer(4 << 10)
		}
	}
	srv.Start()
	c, err := net.Dial("tcp", srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c.(*net.TCPConn).SetReadBuffer(4 << 10)
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	t.Cleanup(func() {
		select {
		case <-done:
		case <-time.After(3 * slack):
			t.Error("the handler did not return")
		}
		c.Close()
		srv.Close()
	})
	return c
}

// TestSlowReader has several goroutines log to a client that does not read.
func TestSlowReader(t *testing.T) {
	const timeout = 300 * time.Millisecond
	for _, form := range []Form{NDJSON, SSE} {
		t.Run(fmt.Sprint(form), func(t *testing.T) {
			stalled(t, func(r *http.Request, rw http.ResponseWriter) {
				w := New(rw, form, Options{WriteTimeout: timeout})
				w.Begin()
				// Not r's context: net/http ends it with the write that fails.
				line := strings.Repeat("x", 8<<10)
				begin := time.Now()
				var wg sync.WaitGroup
				for range 3 {
					wg.Go(func() {
						for {
							at := time.Now()
							err := w.Log(context.Background(), line)
							if d := time.Since(at); d > timeout+slack {
								t.Errorf("Log took %v", d)
							}
							if err != nil {
								if !errors.Is(err, ErrSlow) {
									t.Errorf("Log: %v", err)
								}
								return
							}
							if time.Since(begin) > slack {
								t.Error("Log still succeeds")
								return
							}
							s := w.body.(*stream)
							s.mu.Lock()
							if s.queued > maxQueued+cost(line) {
								t.Errorf("%d bytes are waiting", s.queued)
							}
							s.mu.Unlock()
						}
					})
				}
				wg.Wait()
				at := time.Now()
				if err := w.Finish(api.Record{Status: api.Failed, Code: api.Canceled}); !errors.Is(err, ErrSlow) {
					t.Errorf("Finish: %v", err)
				}
				if d := time.Since(at); d > timeout+slack {
					t.Errorf("Finish took %v", d)
				}
			})
		})
	}
}

// TestSlowReaderAtTheEnd has a client that reads little or nothing when the
// build ends: Finish gives all that is left one WriteTimeout.
func TestSlowReaderAtTheEnd(t *testing.T) {
	const timeout = 300 * time.Millisecond
	for _, tc := range []struct {
		name  string
		form  Form
		reads bool
	}{
		{"JSON", JSON, false},
		{"stalled", NDJSON, false},
		{"trickle", NDJSON, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := stalled(t, func(r *http.Request, rw http.ResponseWriter) {
				w := New(rw, tc.form, Options{WriteTimeout: timeout})
				w.Begin()
				// One call logs more than any socket holds.
				w.Log(r.Context(), slices.Repeat([]string{strings.Repeat("x", 8<<10)}, 2000)...)
				at := time.Now()
				err := w.Finish(api.Record{Status: api.Success})
				if d := time.Since(at); d > timeout+slack {
					t.Errorf("Finish took %v", d)
				}
				// The JSON form's 1 MiB may fit into what the kernel takes.
				if !errors.Is(err, ErrSlow) && (tc.form != JSON || err != nil) {
					t.Errorf("Finish: %v", err)
				}
			})
			if tc.reads {
				c.(*net.TCPConn).SetReadBuffer(256 << 10)
				// One record takes much less than timeout, and all records much more.
				go func() {
					b := make([]byte, 64<<10)
					for {
						if _, err := io.ReadFull(c, b); err != nil {
							return
						}
						time.Sleep(40 * time.Millisecond)
					}
				}()
			}
		})
	}
}

// TestLogContext checks that a waiting Log returns with its build.
func TestLogContext(t *testing.T) {
	stalled(t, func(r *http.Request, rw http.ResponseWriter) {
		w := New(rw, NDJSON, Options{WriteTimeout: 3 * slack})
		why := errors.New("deadline")
		ctx, cancel := context.WithCancelCause(r.Context())
		time.AfterFunc(200*time.Millisecond, func() { cancel(why) })
		begin := time.Now()
		line := strings.Repeat("x", 8<<10)
		var err error
		for err == nil && time.Since(begin) < slack {
			err = w.Log(ctx, line)
		}
		if !errors.Is(err, why) || time.Since(begin) > 2*slack {
			t.Errorf("Log: %v after %v", err, time.Since(begin))
		}
		w.conn.rc.SetWriteDeadline(time.Now()) // do not wait for the rest
		w.Finish(api.Record{Status: api.Failed, Code: api.Deadline})
	})
}

// TestClientGone has the client leave, once while Log waits for it and once while
// Log does not wait.
func TestClientGone(t *testing.T) {
	for _, line := range []string{"a line", strings.Repeat("x", 8<<10)} {
		c := stalled(t, func(r *http.Request, rw http.ResponseWriter) {
			w := New(rw, NDJSON, Options{})
			w.Begin()
			begin := time.Now()
			var err error
			for err == nil && time.Since(begin) < slack {
				err = w.Log(context.Background(), line)
			}
			if err == nil || errors.Is(err, ErrSlow) || time.Since(begin) > 2*slack {
				t.Errorf("Log: %v after %v", err, time.Since(begin))
			}
			if err := w.Finish(api.Record{Status: api.Failed, Code: api.Canceled}); err == nil {
				t.Error("Finish succeeds")
			}
		})
		time.AfterFunc(300*time.Millisecond, func() { c.Close() })
	}
}

// TestServerWriteTimeout checks that a stream may take longer than the server's
// own timeout, and that a connection is used again after an answer.
func TestServerWriteTimeout(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w := New(rw, NDJSON, Options{WriteTimeout: slack})
		w.Begin()
		time.Sleep(300 * time.Millisecond)
		if err := w.Finish(api.Record{Status: api.Success}); err != nil {
			t.Error(err)
		}
	}))
	srv.Config.WriteTimeout = 100 * time.Millisecond
	srv.Start()
	defer srv.Close()
	for range 2 {
		res, err := srv.Client().Get(srv.URL)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		records(t, NDJSON, string(body))
	}
}

// TestConcurrent logs from several callers at once. Each caller's lines must stay in
// order. Some callers go on after the end.
func TestConcurrent(t *testing.T) {
	const callers, lines = 8, 500
	_, body := answer(t, NDJSON, Options{Heartbeat: time.Millisecond}, func(w *Writer) {
		var wg sync.WaitGroup
		for c := range callers {
			wg.Go(func() {
				for i := range lines {
					if err := w.Log(t.Context(), fmt.Sprintf("%d %d", c, i)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		for range callers {
			wg.Go(func() {
				for w.Log(t.Context(), "late") == nil {
				}
			})
		}
		wg.Go(func() { w.SetImage("r/i:1") })
		for range 2 {
			wg.Go(func() { w.Finish(api.Record{Status: api.Success}) })
		}
		wg.Wait()
	})
	next := make([]int, callers)
	for _, line := range logOf(records(t, NDJSON, body)) {
		var c, i int
		if line == "late" {
			continue
		}
		if _, err := fmt.Sscanf(line, "%d %d", &c, &i); err != nil || next[c] != i {
			t.Fatalf("line %q after %d of its caller", line, next[c])
		}
		next[c]++
	}
	for c, n := range next {
		if n != lines {
			t.Errorf("%d lines of caller %d", n, c)
		}
	}
}

func TestSize(t *testing.T) {
	for _, s := range []string{"", "abc", `"\`, "\t\x00\x7f", "é日🙂", "\xff\xe2\x82", "\u2028<&>"} {
		b := new(bytes.Buffer)
		encode(b, s, "")
		exact := b.Len() - len(`""`) - 1
		if got := size(s); got < exact || got > exact && !strings.ContainsAny(s, "\t\b\f\r\n") {
			t.Errorf("size(%q) = %d, want %d", s, got, exact)
		}
		for limit := range exact + 1 {
			head, tail := split(s, limit)
			if head+tail != s || size(head) > limit || !utf8.ValidString(head) && utf8.ValidString(s) {
				t.Errorf("split(%q, %d) = %q, %q", s, limit, head, tail)
			}
			if end := lastPart(s, limit); !strings.HasSuffix(s, end) || size(end) > limit {
				t.Errorf("lastPart(%q, %d) = %q", s, limit, end)
			}
		}
	}
}

func FuzzStream(f *testing.F) {
	f.Add([]byte("a\nb"), "exit code: 1", "r/i:1", 1, true)
	f.Add([]byte("\x00\xff\u2028\"\\<>"), "\x1b[1m", "", 5000, false)
	f.Add([]byte(strings.Repeat("x", 1000)), strings.Repeat("é", 100), "\xff", 300, true)
	f.Add([]byte("\xa8\xe2\x80"), "", "", 5000, false)
	f.Fuzz(func(t *testing.T, log []byte, errText, image string, times int, sse bool) {
		// This is enough for several records, and quick.
		times = min(max(times, 1), 1000, 1+(128<<10)/(len(log)+len(errText)+1))
		form := NDJSON
		if sse {
			form = SSE
		}
		lines := strings.Split(string(log), "\n")
		rec := httptest.NewRecorder()
		w := New(rec, form, Options{})
		w.SetImage(image)
		w.Begin()
		if err := w.Log(t.Context(), strings.Repeat(string(log), times)); err != nil {
			t.Fatal(err)
		}
		for range times {
			w.Log(t.Context(), lines...)
		}
		w.Finish(api.Record{
			Status: api.Failed, Code: api.BuildFailed,
			Error: strings.Repeat(errText, times), Warnings: slices.Repeat(lines, times), Log: lines,
		})
		recs := records(t, form, rec.Body.String())
		got := strings.Join(logOf(recs), "")
		var each strings.Builder
		for _, line := range lines {
			each.WriteString(toValid(line))
		}
		want := toValid(strings.Repeat(string(log), times)) + strings.Repeat(each.String(), times+1)
		if got != want {
			t.Errorf("log is %.200q, want %.200q", got, want)
		}
	})
}

// toValid replaces each invalid byte, as encoding/json does.
func toValid(s string) string {
	return string([]rune(s))
}
