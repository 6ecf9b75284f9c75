package server_test

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"handler/function/api"
	"handler/function/server"
	"handler/function/signature"
	"handler/function/solve"
)

const calledBack = "http://127.0.0.1/callback"

// deliver sends a body in the way a queue does.
func (f *fixture) deliver(t testing.TB, id string, body []byte, headers ...string) <-chan answer {
	answers := make(chan answer, 1)
	go func() {
		answers <- f.do(t, f.request(t, body, append([]string{api.CallIDHeader, id, api.CallbackHeader, calledBack}, headers...)...))
	}()
	return answers
}

// limit is for what happens at once where nothing is wrong, on a machine as busy as can
// be.
const limit = time.Minute

// eventually waits for ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, limit)
		}
	}
}

// speaking makes builds that log a line, wait for release, and log another line.
func speaking() (s *scripted, started, release chan struct{}) {
	started, release = make(chan struct{}, 10), make(chan struct{})
	return &scripted{solve: func(ctx context.Context, _ *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error) {
		log("first")
		started <- struct{}{}
		select {
		case <-release:
		case <-ctx.Done():
			return solve.Outcome{}, solve.Stats{}, context.Cause(ctx)
		}
		log("second")
		return solve.Outcome{Digest: "sha256:abc"}, solve.Stats{}, nil
	}}, started, release
}

func (f *fixture) joined(n int) func() bool {
	return func() bool { return strings.Count(f.log.String(), "build joined") >= n }
}

func TestSecondDeliveryJoins(t *testing.T) {
	solver, started, release := speaking()
	f := start(t, solver, nil)
	body := pack(t, config)
	first := f.deliver(t, "call", body)
	<-started
	second := f.deliver(t, "call", body)
	stream := f.deliver(t, "call", body, "Accept", api.NDJSONType)
	eventually(t, "both join", f.joined(2))
	close(release)
	third := func() <-chan answer { <-first; return f.deliver(t, "call", body) }()
	for name, answers := range map[string]<-chan answer{"second": second, "third, after the end": third} {
		a := <-answers
		if a.status != http.StatusOK || a.rec.Digest != "sha256:abc" || !slices.Equal(a.rec.Log, []string{"first", "second"}) {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
		if want := signature.Sign([]byte(secret), "", []byte(a.body)); a.header.Get(api.SignatureHeader) != want {
			t.Errorf("%s: signed %q, want %q", name, a.header.Get(api.SignatureHeader), want)
		}
	}
	if a := <-stream; a.rec.Digest != "sha256:abc" || !strings.Contains(a.body, `"first"`) || !strings.Contains(a.body, `"second"`) {
		t.Errorf("a stream: %s", a.body)
	}
	if n := solver.calls.Load(); n != 1 {
		t.Errorf("%d builds, want 1", n)
	}
}

func TestOnlyDeliveriesJoin(t *testing.T) {
	solver := &scripted{}
	f := start(t, solver, nil)
	body := pack(t, config)
	<-f.deliver(t, "call", body)
	for name, send := range map[string]func() answer{
		"another body":    func() answer { return <-f.deliver(t, "call", pack(t, config, "context/x", "y")) },
		"another call id": func() answer { return <-f.deliver(t, "other", body) },
		"no call id":      func() answer { return <-f.deliver(t, "", body) },
		"no queue":        func() answer { return f.do(t, f.request(t, body, api.CallIDHeader, "call")) },
	} {
		before := solver.calls.Load()
		if a := send(); a.status != http.StatusOK {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
		if solver.calls.Load() == before {
			t.Errorf("%s: not built", name)
		}
	}
	if a := <-f.deliver(t, "call", body); a.status != http.StatusOK || f.joined(1)() == false {
		t.Errorf("the same again: %d %s", a.status, a.body)
	}
}

// TestKeysDoNotJoin: a request never joins a build that another key has signed.
func TestKeysDoNotJoin(t *testing.T) {
	solver := &scripted{}
	f := start(t, solver, func(c *server.Config) {
		c.PayloadSecret = func() ([]byte, error) { return []byte(secret + "\nanother-payload-secret"), nil }
	})
	body := pack(t, config)
	<-f.deliver(t, "call", body)
	<-f.deliver(t, "call", body, api.SignatureHeader, signature.Sign([]byte("another-payload-secret"), "", body))
	if n := solver.calls.Load(); n != 2 {
		t.Errorf("%d builds, want 2", n)
	}
	if a := f.verdict(t, "call", "another-payload-secret"); a.status != http.StatusOK {
		t.Errorf("its own verdict: %d %s", a.status, a.body)
	}
	if a := f.verdict(t, "call", secret+"\nanother-payload-secret"); a.status != http.StatusNotFound {
		t.Errorf("a key that built nothing: %d %s", a.status, a.body)
	}
}

func TestFinalVerdictsAreKept(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want int64 // builds of two deliveries
	}{
		{nil, 1},
		{&api.Error{Code: api.BuildFailed, Msg: "exit code 1"}, 1},
		{&api.Error{Code: api.RegistryDenied, Msg: "denied"}, 1},
		{&api.Error{Code: api.Deadline, Msg: "too long"}, 1},
		{&api.Error{Code: api.RegistryFailed, Msg: "503"}, 2},
		{&api.Error{Code: api.NoDaemon, Msg: "none"}, 2},
		{context.Canceled, 2},
	} {
		solver := &scripted{solve: func(context.Context, *solve.Request, solve.Log) (solve.Outcome, solve.Stats, error) {
			return solve.Outcome{Digest: "sha256:abc"}, solve.Stats{}, tt.err
		}}
		f := start(t, solver, nil)
		first := <-f.deliver(t, "call", pack(t, config))
		second := <-f.deliver(t, "call", pack(t, config))
		if n := solver.calls.Load(); n != tt.want {
			t.Errorf("%v: %d builds, want %d", tt.err, n, tt.want)
		}
		if first.status != second.status || first.rec.Error != second.rec.Error {
			t.Errorf("%v: %s and %s", tt.err, first.body, second.body)
		}
	}
}

func TestLastToLeaveCancels(t *testing.T) {
	solver, started, release := speaking()
	defer close(release)
	canceled, linger := make(chan struct{}), make(chan struct{})
	stopLingering := sync.OnceFunc(func() { close(linger) })
	defer stopLingering()
	build := solver.solve
	solver.solve = func(ctx context.Context, req *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error) {
		o, s, err := build(ctx, req, log)
		if err != nil {
			close(canceled)
			<-linger
		}
		return o, s, err
	}
	f := start(t, solver, nil)
	body := pack(t, config)
	send := func() context.CancelFunc {
		ctx, cancel := context.WithCancel(t.Context())
		r := f.request(t, body, api.CallIDHeader, "call", api.CallbackHeader, calledBack).WithContext(ctx)
		go func() {
			if res, err := f.Client().Do(r); err == nil {
				res.Body.Close()
			}
		}()
		return cancel
	}
	leave := send()
	<-started
	leaveToo := send()
	eventually(t, "the second joins", f.joined(1))
	leave()
	time.Sleep(100 * time.Millisecond)
	select {
	case <-canceled:
		t.Fatal("one of two left, and the build was cancelled")
	default:
	}
	leaveToo()
	<-canceled

	// A delivery that comes before the cancelled build has ended begins a new build.
	again := f.deliver(t, "call", body)
	select {
	case <-started:
	case <-time.After(limit):
		t.Fatal("delivered again, and not built")
	}
	stopLingering()
	eventually(t, "the cancelled one ends", func() bool { return strings.Contains(f.log.String(), `"code":"canceled"`) })
	release <- struct{}{}
	if a := <-again; a.status != http.StatusOK {
		t.Errorf("delivered again: %d %s", a.status, a.body)
	}
	if a := f.verdict(t, "call", secret); a.rec.Status != api.Success {
		t.Errorf("the verdict: %d %s", a.status, a.body)
	}
}

// signed says whether the usual key has signed the answer.
func (a answer) signed() bool {
	return a.header.Get(api.SignatureHeader) == signature.Sign([]byte(secret), "", []byte(a.body))
}

func (f *fixture) verdict(t testing.TB, id, key string) answer {
	t.Helper()
	path := "/builds/" + id
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, f.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set(api.SignatureHeader, signature.Sign([]byte(key), "", []byte("GET "+path)))
	return f.do(t, r)
}

func TestVerdict(t *testing.T) {
	solver, started, release := speaking()
	f := start(t, solver, nil)
	if a := f.verdict(t, "call", secret); a.status != http.StatusNotFound || a.rec.Code != api.NotFound || !a.signed() {
		t.Errorf("before: %d %s %s", a.status, a.header, a.body)
	}
	delivered := f.deliver(t, "call", pack(t, config))
	<-started
	if a := f.verdict(t, "call", secret); a.status != http.StatusAccepted || a.rec.Status != api.InProgress || a.rec.Image != "ghcr.io/acme/app:v1" {
		t.Errorf("meanwhile: %d %s", a.status, a.body)
	}
	close(release)
	<-delivered
	a := f.verdict(t, "call", secret)
	if a.status != http.StatusOK || a.rec.Status != api.Success || a.rec.Digest != "sha256:abc" || len(a.rec.Log) != 2 || a.rec.Duration < 0 {
		t.Errorf("after: %d %s", a.status, a.body)
	}
	if want := signature.Sign([]byte(secret), "", []byte(a.body)); a.header.Get(api.SignatureHeader) != want {
		t.Errorf("signed %q, want %q", a.header.Get(api.SignatureHeader), want)
	}
	<-f.deliver(t, "bad", pack(t, `{"image":7}`))
	if a := f.verdict(t, "bad", secret); a.status != http.StatusOK || a.rec.Status != api.Failed || a.rec.Code != api.BadConfig {
		t.Errorf("of a failure: %d %s", a.status, a.body)
	}
	if a := f.verdict(t, "call", "wrong"); a.status != http.StatusUnauthorized {
		t.Errorf("a wrong key: %d %s", a.status, a.body)
	}
	if r, err := http.Get(f.URL + "/builds/call"); err != nil || r.StatusCode != http.StatusUnauthorized {
		t.Errorf("no signature: %v %v", r, err)
	}
	for _, path := range []string{"/builds/", "/builds/a/b", "/builds//log", "/builds/a/log/", "/builds/*/*"} {
		if r, err := http.Get(f.URL + path); err != nil || r.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %v %v", path, r, err)
		}
	}
}

// TestVerdictOfAnother reads the verdict of another replica's build from a daemon.
func TestVerdictOfAnother(t *testing.T) {
	began := time.Now().Add(-time.Minute)
	var asked, named []string
	var past *solve.Past
	var findErr error
	solver := &scripted{
		find: func(_, call string) (*solve.Past, error) { asked = append(asked, call); return past, findErr },
		solve: func(_ context.Context, req *solve.Request, _ solve.Log) (solve.Outcome, solve.Stats, error) {
			named = append(named, req.Name.Call, req.Name.Body)
			return solve.Outcome{}, solve.Stats{}, nil
		},
	}
	f := start(t, solver, nil)
	past = &solve.Past{Running: true, Image: "ghcr.io/acme/app:v1", Began: began}
	if a := f.verdict(t, "call", secret); a.status != http.StatusAccepted || a.rec.Status != api.InProgress || a.rec.Duration < 60 {
		t.Errorf("running: %d %s", a.status, a.body)
	}
	past = &solve.Past{Image: "ghcr.io/acme/app:v1", Began: began, Ended: began.Add(time.Second), Outcome: solve.Outcome{Digest: "sha256:abc"}}
	if a := f.verdict(t, "call", secret); a.status != http.StatusOK || a.rec.Status != api.Success || a.rec.Digest != "sha256:abc" || a.rec.Duration != 1 {
		t.Errorf("ended: %d %s", a.status, a.body)
	}
	findErr = &api.Error{Code: api.NoDaemon, Msg: "none"}
	if a := f.verdict(t, "call", secret); a.status != http.StatusServiceUnavailable || a.rec.Code != api.NoDaemon || !a.signed() {
		t.Errorf("no daemon: %d %s %s", a.status, a.header, a.body)
	}
	findErr = nil
	past.Err = &api.Error{Code: api.BuildFailed, Msg: "exit code 1"}
	if a := f.verdict(t, "call", secret); a.status != http.StatusOK || a.rec.Code != api.BuildFailed {
		t.Errorf("failed: %d %s", a.status, a.body)
	}

	<-f.deliver(t, "call", pack(t, config))
	f.do(t, f.request(t, pack(t, config), api.CallIDHeader, "call"))
	if len(named) != 4 || named[0] != asked[0] || named[1] == "" || named[2] != "" || named[3] != "" {
		t.Errorf("asked for %q, built %q: want the first build's name alone to be known, by its call", asked, named)
	}
}

// TestKeptVerdictsAreBounded: the log of each build is 1 MiB, and takes up to 1.25 in memory, so
// 12 to 16 builds are kept.
func TestKeptVerdictsAreBounded(t *testing.T) {
	line := strings.Repeat("x", 16<<10)
	solver := &scripted{solve: func(_ context.Context, _ *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error) {
		for range 64 {
			log(line)
		}
		return solve.Outcome{Digest: "sha256:abc"}, solve.Stats{}, nil
	}}
	f := start(t, solver, nil)
	kept := 0
	for i := range 20 {
		<-f.deliver(t, fmt.Sprint("call", i), pack(t, config))
	}
	for i := range 20 {
		if a := f.verdict(t, fmt.Sprint("call", i), secret); a.status == http.StatusOK {
			kept++
		} else if i > 7 {
			t.Errorf("call %d is forgotten before older ones: %d", i, a.status)
		}
	}
	if kept < 12 || kept > 16 {
		t.Errorf("%d verdicts kept", kept)
	}
}
