package server_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"handler/function/api"
	"handler/function/records"
	"handler/function/server"
	"handler/function/solve"
)

// logLine is a line of a log route, or the record at its end.
type logLine struct {
	N    uint64
	Lost uint64
	T    string
	seen
}

// readLog reads a log from the line after a given one, and wants every line once and in order, and
// the record at its end.
func (f *fixture) readLog(t testing.TB, target string, after uint64, headers ...string) (lines []string, end seen) {
	t.Helper()
	res, err := f.Client().Do(f.asking(t, secret, "GET", target, headers...))
	if err != nil {
		t.Error(err)
		return
	}
	defer res.Body.Close()
	sse := strings.HasPrefix(res.Header.Get("Content-Type"), api.SSEType)
	if res.StatusCode != 200 || res.Header.Get(api.SignatureHeader) != "" || !sse && res.Header.Get("Content-Type") != api.NDJSONType {
		t.Errorf("%s: %d %s", target, res.StatusCode, res.Header)
	}
	scan := bufio.NewScanner(res.Body)
	scan.Buffer(nil, 60<<10)
	id := ""
	for scan.Scan() {
		text := scan.Text()
		if sse {
			if text == "" || text[0] == ':' {
				continue
			}
			if rest, ok := strings.CutPrefix(text, "id: "); ok {
				id = rest
				continue
			}
			text = strings.TrimPrefix(text, "data: ")
		}
		var line logLine
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Errorf("%s: %v in %q", target, err, text)
			return
		}
		switch {
		case end.Status != "":
			t.Errorf("%s: %s after the record", target, text)
		case line.Status != "":
			end = line.seen
		case line.N != after+max(line.Lost, 1):
			t.Errorf("%s: line %d, %d lost, after %d", target, line.N, line.Lost, after)
			return
		default:
			after = line.N
			lines = append(lines, line.T)
		}
		if sse && line.N > 0 && id != strconv.FormatUint(line.N, 10) {
			t.Errorf("%s: line %d has the id %q", target, line.N, id)
		}
	}
	if err := scan.Err(); err != nil || end.Status == "" {
		t.Errorf("%s: it ends without a record: %v", target, err)
	}
	return lines, end
}

// TestLog reads the log of a build that runs, and of one that has ended, in both forms.
func TestLog(t *testing.T) {
	solver, started, release := speaking()
	f := start(t, solver, nil)
	sent := f.deliver(t, "call", pack(t, config))
	<-started
	if lines, end := f.readLog(t, "/builds/call/log", 0); !slices.Equal(lines, []string{"first"}) || end.Status != api.InProgress {
		t.Errorf("so far: %q, %+v", lines, end)
	}
	type read struct {
		lines []string
		end   seen
	}
	followers := make(map[string]chan read)
	for _, accept := range []string{"", api.SSEType, api.SSEType + ", " + api.NDJSONType} {
		followers[accept] = make(chan read, 1)
		go func() {
			lines, end := f.readLog(t, "/builds/call/log?follow=1", 0, "Accept", accept)
			followers[accept] <- read{lines, end}
		}()
	}
	eventually(t, "three follow", func() bool { return strings.Contains(f.metrics(t), "builder_log_followers 3\n") })
	close(release)
	<-sent
	want := []string{"first", "second"}
	for accept, got := range followers {
		if r := <-got; !slices.Equal(r.lines, want) || r.end.Status != api.Success || r.end.Digest != "sha256:abc" || r.end.Lines != 2 || r.end.Attempt != 1 || r.end.Tenant != "" {
			t.Errorf("Accept %q: %q, %+v", accept, r.lines, r.end)
		}
	}
	for _, tt := range []struct {
		query, header string
		after         uint64
	}{
		{"", "", 0}, {"?follow=1", "", 0}, {"?follow=0&attempt=1", "", 0}, {"?after=0", "", 0}, {"?after=1", "", 1}, {"?after=2&follow=1", "", 2},
		{"?after=99&follow=1", "", 99}, {"?follow=1", "1", 1}, {"?after=2", "1", 1},
	} {
		headers := []string{"Accept", api.SSEType}
		if tt.header != "" {
			headers = append(headers, "Last-Event-ID", tt.header)
		}
		lines, end := f.readLog(t, "/builds/call/log"+tt.query, tt.after, headers...)
		if !slices.Equal(lines, want[min(tt.after, 2):]) || end.Status != api.Success {
			t.Errorf("%s, %q: %q, %+v", tt.query, tt.header, lines, end)
		}
	}
	if a := f.do(t, f.asking(t, secret, "GET", "/builds/call/log", "Last-Event-ID", "x")); a.status != 400 || a.rec.Code != api.BadQuery {
		t.Errorf("a Last-Event-ID that is no number: %d %s", a.status, a.body)
	}
}

// chatty makes builds that print n lines, of every length, to the end.
func chatty(n int, started chan struct{}) *scripted {
	return &scripted{solve: func(ctx context.Context, _ *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error) {
		close(started)
		var some []string
		for i := range n {
			line := fmt.Sprintf("l: %d %s", i, strings.Repeat("\"x", i%40))
			if i%1000 == 999 {
				line += strings.Repeat("ä\\", 100<<10/4) // too long for a line of a stream
			}
			if some = append(some, line); len(some) > i%7 {
				log(some...)
				some = nil
			}
			if i%500 == 0 {
				time.Sleep(time.Millisecond)
			}
		}
		log(some...)
		return solve.Outcome{Digest: "sha256:abc"}, solve.Stats{}, nil
	}}
}

// TestSameLines has callers and followers of a chatty build, which come at random moments: all see
// the same lines, and the followers every one once and in order.
func TestSameLines(t *testing.T) {
	lines := 20_000
	if testing.Short() {
		lines = 5_000 // under the race detector, followers still come while they are printed
	}
	started := make(chan struct{})
	f := start(t, chatty(lines, started), nil)
	stream := f.deliver(t, "call", pack(t, config), "Accept", api.NDJSONType)
	<-started
	var wg sync.WaitGroup
	read := make([][]string, 12)
	for i := range read {
		wg.Go(func() {
			time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond)
			read[i], _ = f.readLog(t, "/builds/call/log?follow=1", 0, "Accept", []string{"", api.SSEType}[i%2])
		})
	}
	a := <-stream
	wg.Wait()
	var live []string
	for text := range strings.Lines(a.body) {
		if len(text) > 60<<10 {
			t.Errorf("a line of %d bytes", len(text))
		}
		var rec api.Record
		if err := json.Unmarshal([]byte(text), &rec); err != nil {
			t.Fatal(err)
		}
		live = append(live, rec.Log...)
	}
	if len(live) < lines {
		t.Errorf("the caller has seen %d lines", len(live))
	}
	for i, got := range read {
		if !slices.Equal(got, live) {
			t.Errorf("follower %d has %d lines, the caller %d, and they differ", i, len(got), len(live))
		}
	}
	after := uint64(rand.IntN(lines))
	if got, end := f.readLog(t, fmt.Sprintf("/builds/call/log?after=%d", after), after); !slices.Equal(got, live[after:]) || end.Lines != uint64(len(live)) {
		t.Errorf("after %d: %d lines of %d", after, len(got), end.Lines)
	}
}

// TestFollowersLeave: a follower that leaves is nothing to a build.
func TestFollowersLeave(t *testing.T) {
	solver, started, release := speaking()
	f := start(t, solver, nil)
	sent := f.deliver(t, "call", pack(t, config))
	<-started
	for range 3 {
		ctx, leave := context.WithCancel(t.Context())
		res, err := f.Client().Do(f.asking(t, secret, "GET", "/builds/call/log?follow=1").WithContext(ctx))
		if err != nil {
			t.Fatal(err)
		}
		leave()
		res.Body.Close()
	}
	eventually(t, "all have left", func() bool { return strings.Contains(f.metrics(t), "builder_log_followers 0\n") })
	close(release)
	if a := <-sent; a.status != 200 {
		t.Errorf("%d %s", a.status, a.body)
	}
	if strings.Contains(f.log.String(), "cut off") {
		t.Errorf("the log has %s", f.log)
	}
}

// mostLogs is how many logs of a replica are read at once. A tenant reads half of them.
const mostLogs = 32

// followMany has n followers of a build, which must see it to its end. The request makes them.
func (f *fixture) followMany(t *testing.T, wg *sync.WaitGroup, n int, request func() *http.Request) {
	for range n {
		wg.Go(func() {
			if a := f.do(t, request()); a.status != 200 || !strings.Contains(a.body, `"success"`) {
				t.Errorf("a follower has %d %s", a.status, a.body)
			}
		})
	}
}

// TestTenantsFollowers: a tenant that reads as many logs as it may leaves others room.
func TestTenantsFollowers(t *testing.T) {
	solver, started, release := speaking()
	f, _ := startTenants(t, solver, []string{tenant("acme", ""), tenant("globex", "")}, nil)
	var wg sync.WaitGroup
	for _, name := range []string{"acme", "globex"} {
		wg.Go(func() { f.do(t, f.as(t, name, pack(t, imageOf(name)), api.CallIDHeader, "call")) })
		<-started
	}
	log := func(name, query string) *http.Request {
		return f.asking(t, keyOf(name), "GET", "/builds/call/log"+query, api.TenantHeader, name)
	}
	for i, name := range []string{"acme", "globex"} {
		f.followMany(t, &wg, mostLogs/2, func() *http.Request { return log(name, "?follow=1") })
		eventually(t, name+" follows", func() bool {
			return strings.Contains(f.metrics(t), fmt.Sprintf("builder_log_followers %d\n", (i+1)*mostLogs/2))
		})
		if a := f.do(t, log(name, "")); a.status != http.StatusTooManyRequests || a.rec.Code != api.Busy {
			t.Errorf("one more of %s: %d %s", name, a.status, a.body)
		}
	}
	close(release)
	wg.Wait()
	if a := f.do(t, log("acme", "")); a.status != 200 {
		t.Errorf("after all have left: %d %s", a.status, a.body)
	}
}

// TestFollowersAreBounded: one more than the most is told to come back.
func TestFollowersAreBounded(t *testing.T) {
	solver, started, release := speaking()
	f := start(t, solver, nil)
	sent := f.deliver(t, "call", pack(t, config))
	<-started
	var wg sync.WaitGroup
	f.followMany(t, &wg, mostLogs, func() *http.Request { return f.asking(t, secret, "GET", "/builds/call/log?follow=1") })
	eventually(t, "all follow", func() bool {
		return strings.Contains(f.metrics(t), fmt.Sprintf("builder_log_followers %d\n", mostLogs))
	})
	for _, target := range []string{"/builds/call/log?follow=1", "/builds/call/log"} {
		if a := f.do(t, f.asking(t, secret, "GET", target)); a.status != http.StatusTooManyRequests || a.rec.Code != api.Busy || a.header.Get("Retry-After") == "" {
			t.Errorf("%s: %d %s", target, a.status, a.body)
		}
	}
	close(release)
	wg.Wait()
	if a := <-sent; a.status != 200 {
		t.Errorf("%d %s", a.status, a.body)
	}
	if lines, _ := f.readLog(t, "/builds/call/log", 0); len(lines) != 2 {
		t.Errorf("after they have left: %q", lines)
	}
}

// young is a store in which a build has no number at first.
type young struct {
	records.Store
	asked atomic.Int32
}

func (y *young) Get(ctx context.Context, ref records.Ref) (records.Record, error) {
	rec, err := y.Store.Get(ctx, ref)
	if y.asked.Add(1) <= 3 {
		rec.Attempt = 0
	}
	return rec, err
}

// TestLogOfYoungBuild reads a log of a build that has no number yet. It is that of this build, also
// when another attempt has begun at its end.
func TestLogOfYoungBuild(t *testing.T) {
	y := &young{}
	solver, started, release := speaking()
	f := start(t, solver, func(c *server.Config) { y.Store, c.Records = c.Records, y })
	sent := f.deliver(t, "call", pack(t, config))
	<-started
	followed := make(chan seen, 1)
	go func() {
		_, end := f.readLog(t, "/builds/call/log?follow=1", 0)
		followed <- end
	}()
	eventually(t, "it is followed", func() bool { return y.asked.Load() > 3 })
	all, err := y.Everywhere(t.Context(), "call")
	if err != nil || len(all) != 1 {
		t.Fatalf("%+v, %v", all, err)
	}
	y.Begin(records.Record{Tenant: all[0].Tenant, ID: "call", Began: time.Now()}, func(string) {})
	close(release)
	<-sent
	if end := <-followed; end.Attempt != 1 || end.Status != api.Success {
		t.Errorf("it ends with %+v", end)
	}
}

// TestSlowFollower: a follower that does not read is cut, and the build does not wait for it.
func TestSlowFollower(t *testing.T) {
	started := make(chan struct{})
	f := start(t, chatty(200_000, started), nil)
	sent := f.deliver(t, "call", pack(t, config))
	<-started
	conn := f.dial(t, f.asking(t, secret, "GET", "/builds/call/log?follow=1"))
	defer conn.Close()
	if a := <-sent; a.status != 200 {
		t.Errorf("%d %s", a.status, a.body)
	}
	eventually(t, "it is cut", func() bool { return strings.Contains(f.log.String(), `"log cut off"`) })
	if !strings.Contains(f.metrics(t), "builder_log_followers 0\n") {
		t.Error("it still follows")
	}
}

// dial sends a request, and leaves the answer unread.
func (f *fixture) dial(t *testing.T, r *http.Request) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", f.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
		t.Fatal(err)
	}
	if err := r.Write(conn); err != nil {
		t.Fatal(err)
	}
	return conn
}
