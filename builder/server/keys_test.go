package server_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"handler/function/api"
	"handler/function/server"
	"handler/function/signature"
	"handler/function/solve"
)

// stamped signs a request with a timestamp.
func (f *fixture) stamped(t *testing.T, r *http.Request, message string, at time.Time) *http.Request {
	t.Helper()
	stamp := signature.Timestamp(strconv.FormatInt(at.Unix(), 10))
	r.Header.Set(api.TimestampHeader, string(stamp))
	r.Header.Set(api.SignatureHeader, signature.Sign([]byte(secret), stamp, []byte(message)))
	return r
}

func (f *fixture) bodiless(t *testing.T, method, target string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, f.URL+target, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set(api.SignatureHeader, signature.Sign([]byte(secret), "", []byte(method+" "+target)))
	return r
}

// TestTimestamps: a signature with a timestamp expires, and the answer has a timestamp too.
func TestTimestamps(t *testing.T) {
	f := start(t, &scripted{}, nil)
	body := pack(t, config)
	bad := pack(t, "{")
	for _, tt := range []struct {
		name   string
		off    time.Duration
		status int
	}{
		{"now", 0, 200}, {"some time ago", -4 * time.Minute, 200}, {"soon", 4 * time.Minute, 200},
		{"long ago", -6 * time.Minute, 401}, {"in some time", 6 * time.Minute, 401},
	} {
		for _, b := range [][]byte{body, bad} {
			a := f.do(t, f.stamped(t, f.request(t, b), string(b), time.Now().Add(tt.off)))
			want := tt.status
			if want == 200 && &b[0] == &bad[0] {
				want = 400
			}
			if a.status != want {
				t.Errorf("%s: %d %s", tt.name, a.status, a.body)
			}
			if want != 401 {
				checkStamped(t, a)
			} else if !strings.Contains(a.rec.Error, "5m0s") || a.header.Get(api.SignatureHeader) != "" {
				t.Errorf("%s: %s, signed %q", tt.name, a.body, a.header.Get(api.SignatureHeader))
			}
		}
	}
	checkStamped(t, f.do(t, f.stamped(t, f.bodiless(t, "GET", "/builds/none?x=1"), "GET /builds/none?x=1", time.Now())))
	// The tar in a text envelope is signed in the same way.
	r := f.request(t, body)
	f.stamped(t, r, string(body), time.Now())
	text := envelope(r.Header.Get(api.SignatureHeader), body)
	if a := f.do(t, f.request(t, text, api.SignatureHeader, "", api.TimestampHeader, r.Header.Get(api.TimestampHeader))); a.status != 200 {
		t.Errorf("an envelope: %d %s", a.status, a.body)
	}
	// A timestamp that is sent and not signed, and one that is signed and not sent.
	if a := f.do(t, f.request(t, body, api.TimestampHeader, r.Header.Get(api.TimestampHeader))); a.status != 401 {
		t.Errorf("a timestamp beside the signature: %d %s", a.status, a.body)
	}
	r = f.stamped(t, f.request(t, body), string(body), time.Now())
	r.Header.Del(api.TimestampHeader)
	if a := f.do(t, r); a.status != 401 {
		t.Errorf("a timestamp taken away: %d %s", a.status, a.body)
	}
}

func checkStamped(t *testing.T, a answer) {
	t.Helper()
	stamp := a.header.Get(api.TimestampHeader)
	if n, err := strconv.ParseInt(stamp, 10, 64); err != nil || time.Since(time.Unix(n, 0)).Abs() > 10*time.Second {
		t.Errorf("%d: the answer's timestamp is %q", a.status, stamp)
	}
	if got, want := a.header.Get(api.SignatureHeader), signature.Sign([]byte(secret), signature.Timestamp(stamp), []byte(a.body)); got != want {
		t.Errorf("%d: the answer is signed %q, want %q", a.status, got, want)
	}
}

func TestRequireTimestamp(t *testing.T) {
	f := start(t, &scripted{}, func(c *server.Config) { c.RequireTimestamp = true })
	body := pack(t, config)
	if a := f.do(t, f.request(t, body)); a.status != 401 || !strings.Contains(a.rec.Error, "require_timestamp") {
		t.Errorf("without: %d %s", a.status, a.body)
	}
	if a := f.do(t, f.bodiless(t, "GET", "/builds/x")); a.status != 401 {
		t.Errorf("without a body: %d %s", a.status, a.body)
	}
	if a := f.do(t, f.stamped(t, f.request(t, body), string(body), time.Now())); a.status != 200 {
		t.Errorf("with: %d %s", a.status, a.body)
	}
}

// TestAnswersNameTheirRequest: every signed answer has the id of its build, and the sum of the
// request's body if there was one.
func TestAnswersNameTheirRequest(t *testing.T) {
	solver := &scripted{find: func(_, call string) (*solve.Past, error) {
		return nil, &api.Error{Code: api.NoDaemon, Msg: "no daemon"}
	}}
	f := start(t, solver, func(c *server.Config) { c.Contexts = &inMemory{all: map[string][]byte{}} })
	body, bad := pack(t, config), pack(t, `{"image":"UPPER"}`)
	context := packTar(t, "context/x", "x")
	for name, tt := range map[string]struct {
		r      *http.Request
		body   []byte // nil for none
		id     string // empty for one that is made
		status int
	}{
		"a success":            {f.request(t, body, api.CallIDHeader, "a"), body, "a", 200},
		"without an id":        {f.request(t, body), body, "", 200},
		"with a long id":       {f.request(t, body, api.CallIDHeader, strings.Repeat("x", 200)), body, "", 200},
		"refused in a slot":    {f.request(t, bad, api.CallIDHeader, "b"), bad, "b", 400},
		"a stream":             {f.request(t, body, api.CallIDHeader, "c", "Accept", api.NDJSONType), body, "c", 200},
		"a failed stream":      {f.request(t, bad, api.CallIDHeader, "d", "Accept", api.NDJSONType), bad, "d", 200},
		"a verdict":            {f.bodiless(t, "GET", "/builds/none"), nil, "none", 503},
		"a context":            {f.context(t, "PUT", digestOf(context), context), context, "", 201},
		"a context of another": {f.context(t, "PUT", digestOf(nil), context), context, "", 400},
	} {
		a := f.do(t, tt.r)
		if a.status != tt.status {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
		lines := []string{a.body}
		if strings.HasPrefix(a.header.Get("Content-Type"), api.NDJSONType) {
			lines = strings.Split(strings.TrimSpace(a.body), "\n")
		} else if a.header.Get(api.SignatureHeader) == "" {
			t.Errorf("%s: not signed", name)
		}
		id := tt.id
		if id == "" {
			id = a.header.Get(api.CallIDHeader)
		}
		for i, line := range lines {
			var rec struct{ ID, Request string }
			if err := json.Unmarshal([]byte(line), &rec); err != nil || rec.ID != id || len(id) > 128 || id == "" {
				t.Errorf("%s: its id is %q, want %q: %v", name, rec.ID, id, err)
			}
			want := ""
			if tt.body != nil && i == len(lines)-1 {
				sum := sha256.Sum256(tt.body)
				want = hex.EncodeToString(sum[:])
			}
			if rec.Request != want {
				t.Errorf("%s: its request is %q, want %q", name, rec.Request, want)
			}
		}
		if tt.id != "" && tt.body != nil && a.header.Get(api.CallIDHeader) != tt.id {
			t.Errorf("%s: X-Call-Id %q", name, a.header.Get(api.CallIDHeader))
		}
	}
	// A text answer has them too.
	a := f.do(t, f.request(t, bad, api.CallIDHeader, "e", "Content-Type", "text/plain"))
	sum := sha256.Sum256(bad)
	if want := "id: e\nrequest: " + hex.EncodeToString(sum[:]) + "\n\n"; !strings.HasPrefix(a.body, want) {
		t.Errorf("text begins %q, want %q", a.body[:min(len(a.body), len(want))], want)
	}
}

// TestNothingSignedIsAnotherThing: a signature of a request without a body, of a body with a
// timestamp, or of an answer, cannot be used for any other request.
func TestNothingSignedIsAnotherThing(t *testing.T) {
	f := start(t, &scripted{}, func(c *server.Config) { c.Contexts = &inMemory{all: map[string][]byte{}} })
	body := pack(t, config)
	var zipped bytes.Buffer
	writeGzip(t, &zipped, body)

	// This timestamp is valid now.
	now := string(signature.Now())
	seen := map[string]string{} // message that a signature is over, by what it is
	for name, r := range map[string]*http.Request{
		"success": f.request(t, body), "failure": f.request(t, pack(t, "{")), "text": f.request(t, []byte("x"), "Content-Type", "text/plain"),
		"verdict": f.bodiless(t, "GET", "/builds/x"), "context": f.context(t, "PUT", digestOf(body), body),
	} {
		a := f.do(t, r)
		if a.header.Get(api.SignatureHeader) != signature.Sign([]byte(secret), "", []byte(a.body)) {
			t.Fatalf("%s: not signed: %d %s", name, a.status, a.body)
		}
		seen["the answer "+name] = a.body
		seen["the answer "+name+" with a timestamp"] = now + "." + a.body
	}
	for _, text := range []string{"GET /builds/x", "HEAD /contexts/sha256:00", "DELETE /builds/x?attempt=1", "GET /builds?limit=1"} {
		seen[text] = text
		seen[text+" with a timestamp"] = now + "." + text
	}
	for name, b := range map[string][]byte{"a tar": body, "gzip": zipped.Bytes()} {
		seen[name+" with a timestamp"] = now + "." + string(b)
	}

	solves := f.solver.calls.Load()
	for name, message := range seen {
		mac := signature.Sign([]byte(secret), "", []byte(message))
		replays := map[string]*http.Request{
			"a build":     f.request(t, []byte(message), api.SignatureHeader, mac),
			"an envelope": f.request(t, envelope(mac, []byte(message)), api.SignatureHeader, ""),
			"a context":   f.context(t, "PUT", digestOf([]byte(message)), []byte(message)),
		}
		// Sent with its timestamp, the body is what was signed.
		if rest, ok := strings.CutPrefix(message, now+"."); ok && rest != string(body) && rest != zipped.String() {
			replays["a request with the timestamp"] = f.request(t, []byte(rest), api.SignatureHeader, mac, api.TimestampHeader, now)
		}
		for as, r := range replays {
			a := f.do(t, r)
			if a.status != 401 || a.header.Get(api.SignatureHeader) != "" {
				t.Errorf("%s as %s: %d %s", name, as, a.status, a.body)
			}
		}
	}
	// The other way round, the signature of a body is not good for a request without one.
	for _, message := range []string{string(body), zipped.String()} {
		for _, target := range []string{"/builds/x", "/builds/" + base64.RawURLEncoding.EncodeToString([]byte(message)[:30])} {
			r := f.bodiless(t, "GET", target)
			r.Header.Set(api.SignatureHeader, signature.Sign([]byte(secret), "", []byte(message)))
			if a := f.do(t, r); a.status != 401 {
				t.Errorf("a body's signature for %s: %d %s", target, a.status, a.body)
			}
		}
	}
	if n := f.solver.calls.Load(); n != solves {
		t.Errorf("%d builds", n-solves)
	}
}

// TestQueryIsSigned: a request without a body signs its query too, as it was sent.
func TestQueryIsSigned(t *testing.T) {
	f := start(t, &scripted{}, nil)
	for signed, status := range map[string]int{"GET /builds/x?attempt=%31": 404, "GET /builds/x": 401, "GET /builds/x?": 401, "GET /builds/x?attempt=1": 401, "HEAD /builds/x?attempt=%31": 401} {
		r := f.bodiless(t, "GET", "/builds/x?attempt=%31")
		r.Header.Set(api.SignatureHeader, signature.Sign([]byte(secret), "", []byte(signed)))
		if a := f.do(t, r); a.status != status {
			t.Errorf("signed %q: %d", signed, a.status)
		}
	}
}

// TestKeysAreLogged: each change of the payload secret is one line in the log, which says how
// the secret was read.
func TestKeysAreLogged(t *testing.T) {
	var mu sync.Mutex
	content := "-----BEGIN KEY-----\nAAAAAAAAAAAAAAAAAAAAAAAA\n-----END KEY-----\n"
	f := start(t, &scripted{}, func(c *server.Config) {
		c.PayloadSecret = func() ([]byte, error) { mu.Lock(); defer mu.Unlock(); return []byte(content), nil }
	})
	for _, tt := range []struct{ file, says string }{
		{content, "one key, the whole file"},
		{"0123456789abcdef\nfedcba9876543210\n", "is a list"},
		{"short\n", "holds no key"},
	} {
		mu.Lock()
		content = tt.file
		mu.Unlock()
		for range 3 {
			f.do(t, f.request(t, []byte("x")))
		}
		if n := strings.Count(f.log.String(), tt.says); n != 1 {
			t.Errorf("%q is in the log %d times", tt.says, n)
		}
	}
}

// TestHeadersThatNobodyReads: headers that nobody reads are not kept while the body comes.
func TestHeadersThatNobodyReads(t *testing.T) {
	r := httptest.NewRequest(http.MethodPost, "/build", strings.NewReader("x"))
	for i := range 1000 {
		r.Header.Set("X-"+strconv.Itoa(i), "x")
	}
	r.Header["X-Build-Signature"] = []string{"one", "two"}
	f := start(t, &scripted{}, nil)
	f.s.ServeHTTP(httptest.NewRecorder(), r)
	if len(r.Header) != 1 || len(r.Header.Values(api.SignatureHeader)) != 2 {
		t.Errorf("%d headers are kept, %q", len(r.Header), r.Header.Values(api.SignatureHeader))
	}
}

// TestRefusalsAreCounted: unsigned requests do not fill the log, and each is counted.
func TestRefusalsAreCounted(t *testing.T) {
	f := start(t, &scripted{}, nil)
	const n = 300
	for i := range n {
		r := f.request(t, []byte("x"))
		if i%2 == 1 {
			r = f.bodiless(t, "GET", "/builds/x")
		}
		r.Header.Set(api.SignatureHeader, signature.Sign([]byte("a key that is wrong"), "", []byte("x")))
		f.do(t, r)
	}
	if lines := strings.Count(f.log.String(), `"request refused"`); lines < 5 || lines > 60 {
		t.Errorf("%d lines of %d refusals", lines, n)
	}
	r, err := http.NewRequest(http.MethodGet, f.URL+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	if a := f.do(t, r); !strings.Contains(a.body, `builder_requests_refused_total{code="unauthorized"} 300`) {
		t.Errorf("not all of %d are counted", n)
	}
	// A signed request is always logged, whatever strangers do.
	for range 40 {
		f.do(t, f.request(t, pack(t, "{"), api.CallIDHeader, "signed-one"))
	}
	if n := strings.Count(f.log.String(), `"signed-one"`); n < 40 {
		t.Errorf("%d lines of 40 signed requests", n)
	}
}

func writeGzip(t *testing.T, to *bytes.Buffer, data []byte) {
	t.Helper()
	w := gzip.NewWriter(to)
	w.Write(data)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}
