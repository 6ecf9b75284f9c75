package client

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

const (
	running = `{"log":["l: hello"],"status":"in_progress","duration":1}`
	beat    = `{"log":[],"status":"in_progress","duration":2}`
	success = `{"log":["s: done"],"status":"success","duration":3,"image":"a","imageName":"a","digest":"sha256:1"}`
	failure = `{"log":[],"status":"failed","duration":3,"code":"busy","error":"later"}`
)

// answered reads what a server answers to a strict client.
func answered(t *testing.T, form string, status int, body string, changes ...Change) (Answer, error) {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", form)
		w.WriteHeader(status)
		fmt.Fprint(w, body)
	}))
	defer server.Close()
	c := Client{URL: server.URL, Secret: "secret", Strict: true}
	return c.Post(t.Context(), []byte("body"), changes...)
}

func TestAnswers(t *testing.T) {
	for _, test := range []struct {
		form       string
		status     int
		body       string
		log        string
		records    int
		heartbeats int
	}{
		{JSON, 200, success, "s: done", 0, 0},
		{NDJSON, 200, running + "\n" + beat + "\n" + success + "\n", "l: hello s: done", 3, 1},
		{SSE, 200, "data: " + running + "\n\n: still there\n\ndata: " + success + "\n\n", "l: hello s: done", 2, 1},
	} {
		a, err := answered(t, test.form, test.status, test.body)
		if err != nil || a.StatusCode != test.status || a.Status != "success" || a.Digest != "sha256:1" || a.Body != test.body ||
			strings.Join(a.Log, " ") != test.log || len(a.Records) != test.records || a.Heartbeats != test.heartbeats {
			t.Errorf("%s: got %+v, %v", test.form, a, err)
		}
	}
	if a, err := answered(t, JSON, 429, failure); err != nil || a.StatusCode != 429 || a.Code != "busy" || a.Error != "later" {
		t.Errorf("a refusal: got %v, %v", a, err)
	}
	text := Header("Content-Type", "text/plain")
	if a, err := answered(t, "text/plain; charset=utf-8", 422, "failed", text); err != nil || a.StatusCode != 422 || a.Status != "" || a.Body != "failed" {
		t.Errorf("text: got %v, %v", a, err)
	}
	if a, err := answered(t, "text/html", 502, "bad gateway", text); err == nil || !strings.Contains(err.Error(), "not a record") {
		t.Errorf("HTML instead of text: got %v, %v", a, err)
	}
}

// TestGatewaysAnswer: a client that is not strict takes an answer that is not a record.
func TestGatewaysAnswer(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "bad gateway", http.StatusBadGateway)
	}))
	defer server.Close()
	c := Client{URL: server.URL}
	if a, err := c.Post(t.Context(), nil); err != nil || a.StatusCode != 502 || a.Status != "" || a.Body != "bad gateway\n" {
		t.Errorf("got %v, %v", a, err)
	}
}

// TestBrokenAnswers has each promise of the contract broken once.
func TestBrokenAnswers(t *testing.T) {
	for name, test := range map[string]struct {
		form   string
		status int
		body   string
		want   string // in the error
	}{
		"an unknown key":          {JSON, 200, `{"log":[],"status":"success","more":1}`, "more"},
		"a second value":          {JSON, 200, success + success, "more than one"},
		"no JSON":                 {JSON, 200, "success", "reading a record"},
		"another status":          {JSON, 200, `{"log":[],"status":"done"}`, `a record has status "done"`},
		"two images":              {JSON, 200, `{"log":[],"status":"success","image":"a","imageName":"b"}`, "imageName"},
		"no log":                  {JSON, 200, `{"status":"success"}`, "log is missing"},
		"a failure without code":  {JSON, 422, `{"log":[],"status":"failed"}`, `code ""`},
		"a success with a code":   {JSON, 200, `{"log":[],"status":"success","code":"busy"}`, `code "busy"`},
		"a failure with 200":      {JSON, 200, failure, "HTTP 200"},
		"a success with 500":      {JSON, 500, success, "HTTP 500"},
		"a stream with 500":       {NDJSON, 500, success + "\n", "HTTP 500"},
		"events with 202":         {SSE, 202, "data: " + success + "\n\n", "HTTP 202"},
		"text":                    {"text/plain", 502, "bad gateway", "not a record"},
		"an empty body":           {"", 202, "", "not a record"},
		"a blank line":            {NDJSON, 200, running + "\n\n" + success + "\n", "reading a record"},
		"a line after the last":   {NDJSON, 200, success + "\n" + running + "\n", "after the last record"},
		"no newline at the end":   {NDJSON, 200, running + "\n" + success, "broke off"},
		"no verdict":              {NDJSON, 200, running + "\n" + beat + "\n", ErrNoVerdict.Error()},
		"nothing":                 {NDJSON, 200, "", ErrNoVerdict.Error()},
		"a long line":             {NDJSON, 200, `{"log":["` + strings.Repeat("x", maxLine) + `"],"status":"success"}` + "\n", "bytes"},
		"an event of two lines":   {SSE, 200, "data: " + running + "\ndata: " + success + "\n\n", "second line"},
		"another field":           {SSE, 200, "event: x\n\ndata: " + success + "\n\n", "not an event"},
		"an event without an end": {SSE, 200, "data: " + success + "\n", "broke off"},
		"two blank lines":         {SSE, 200, "data: " + running + "\n\n\ndata: " + success + "\n\n", "second line"},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := answered(t, test.form, test.status, test.body)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, %v, want an error with %q", a, err, test.want)
			}
			if strings.HasPrefix(test.body, running+"\n") && strings.Join(a.Log, " ") != "l: hello" {
				t.Errorf("the log of what had come is %q", a.Log)
			}
			if noVerdict := test.want == ErrNoVerdict.Error(); errors.Is(err, ErrNoVerdict) != noVerdict {
				t.Errorf("that the error is ErrNoVerdict is %t: %v", !noVerdict, err)
			}
		})
	}
}

func TestRequests(t *testing.T) {
	var got *http.Request
	var body string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		b, _ := io.ReadAll(req.Body)
		got, body = req, string(b)
		w.Header().Set("Content-Type", JSON)
		fmt.Fprint(w, success)
	}))
	defer server.Close()
	c := Client{URL: server.URL, Secret: "key"}
	// Of RFC 2104's HMAC, by openssl dgst -sha256 -hmac key.
	const signature = "sha256=f7bc83f430538424b13298e6aa6fb143ef4d59a14946175997479dbc2d1a3cd8"
	const fox = "The quick brown fox jumps over the lazy dog"

	if _, err := c.Post(t.Context(), []byte(fox), nil, Queued("id"), Header("Content-Type", "")); err != nil {
		t.Fatal(err)
	}
	if got.Method != "POST" || got.URL.Path != "/build" || body != fox {
		t.Errorf("got %s %s with %q", got.Method, got.URL, body)
	}
	for name, want := range map[string]string{
		"X-Build-Signature": signature, "X-Call-Id": "id", "X-Callback-Url": "http://127.0.0.1:1/", "Content-Type": "", "Accept": "",
	} {
		if value := got.Header.Get(name); value != want {
			t.Errorf("%s is %q, want %q", name, value, want)
		}
	}
	if r, err := c.Build(t.Context(), nil); err != nil || r.Digest != "sha256:1" || got.Header.Get("Accept") != NDJSON {
		t.Errorf("building: got %+v, %v, Accept %q", r, err, got.Header.Get("Accept"))
	}
	if a, err := c.Verdict(t.Context(), "id"); err != nil || a.Status != "success" || got.Method != "GET" || got.URL.Path != "/builds/id" ||
		got.Header.Get("X-Build-Signature") != Sign("key", []byte("GET /builds/id")) {
		t.Errorf("asking for a verdict: got %v, %v of %s %s, headers %v", a, err, got.Method, got.URL, got.Header)
	}
	if text, err := c.Get(t.Context(), "/ready"); err != nil || text != success || got.URL.Path != "/ready" || got.Header.Get("X-Build-Signature") != "" {
		t.Errorf("getting: %q, %v of %s, headers %v", text, err, got.URL, got.Header)
	}
}

// TestFailedBuild: a build that fails is an error of Build, and an answer of Post.
func TestFailedBuild(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", JSON)
		w.WriteHeader(http.StatusTooManyRequests)
		fmt.Fprint(w, failure)
	}))
	defer server.Close()
	c := Client{URL: server.URL}
	if r, err := c.Build(t.Context(), nil); err == nil || r.Code != "busy" || !strings.Contains(err.Error(), "failed, busy: later") {
		t.Errorf("building: got %+v, %v", r, err)
	}
	if _, err := c.Get(t.Context(), "/ready"); err == nil || !strings.Contains(err.Error(), "429") {
		t.Errorf("getting: %v", err)
	}
	if r := c.MustFail(t, t.Context(), nil, "busy"); r.Error != "later" {
		t.Errorf("failing: got %+v", r)
	}
}
