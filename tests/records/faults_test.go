package records

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	js "github.com/nats-io/nats.go/jetstream"

	"handler/function/api"
	"handler/function/records"
	"handler/function/records/jetstream"
	"handler/function/records/memory"
	"handler/function/records/recordstest"
	"handler/function/tests/stack"
)

// followed is a follower in a goroutine.
type followed struct {
	lines   map[uint64]string
	lost    uint64
	err     error
	silence time.Duration // the longest, from its first line on
	last    atomic.Uint64 // the number of its latest line
	done    chan struct{}
}

func follow(t testing.TB, s records.Store, ref records.Ref) *followed {
	f := &followed{lines: make(map[uint64]string), done: make(chan struct{})}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	go func() {
		defer cancel()
		defer close(f.done)
		var last time.Time
		next := uint64(1)
		for line, err := range s.Follow(ctx, ref, 0, true) {
			if f.err = err; err != nil {
				return
			}
			if line.N == 0 {
				continue
			}
			if !last.IsZero() {
				f.silence = max(f.silence, time.Since(last))
			}
			last = time.Now()
			if line.N != next+max(line.Lost, 1)-1 {
				f.err = fmt.Errorf("line %d, %d lost, where %d comes next", line.N, line.Lost, next)
				return
			}
			if next = line.N + 1; line.Lost > 0 {
				f.lost += line.Lost
			} else {
				f.lines[line.N] = line.Text
			}
			f.last.Store(line.N)
		}
	}()
	return f
}

// reaches waits until the follower has a line.
func (f *followed) reaches(t *testing.T, n uint64) {
	t.Helper()
	recordstest.Eventually(t, func() error {
		if last := f.last.Load(); last < n {
			return fmt.Errorf("a follower has line %d, and waits for line %d", last, n)
		}
		return nil
	})
}

// wait waits for the end, and checks that every line of a load was there, or said to be lost.
func (f *followed) wait(t *testing.T, l *load, mayLose bool) {
	t.Helper()
	<-f.done
	if f.err != nil || len(f.lines)+int(f.lost) != int(l.lines()) || f.lost > 0 && !mayLose {
		t.Errorf("of %d lines a follower has %d, and %d lost; %v", l.lines(), len(f.lines), f.lost, f.err)
	}
	for n, text := range f.lines {
		if text != fmt.Sprintf("l: line %d", n) {
			t.Errorf("line %d is %q", n, text)
			return
		}
	}
	t.Logf("%d lines, %d lost, longest silence %v", len(f.lines), f.lost, f.silence)
}

// TestServerKilled kills the only server for 15 s under a build. Nothing is lost, and no build is
// taken for lost.
func TestServerKilled(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{})
	a, b := opened(t, servers, nil), opened(t, servers, nil)
	l := run(a, "one")
	recordstest.Known(t, b, l.ref, recordstest.Any)
	f := follow(t, b, l.ref)
	time.Sleep(time.Second)
	servers[0].Kill()
	time.Sleep(5 * time.Second)
	during := run(a, "during")
	if rec, err := a.Get(recordstest.Context(t), during.ref); err != nil || !rec.Running() {
		t.Errorf("meanwhile the owner has %+v, %v", rec, err)
	}
	if _, err := b.Get(recordstest.Context(t), l.ref); err == nil {
		t.Error("meanwhile another knows the build")
	}
	time.Sleep(10 * time.Second)
	if err := servers[0].Restart(recordstest.Context(t)); err != nil {
		t.Fatal(err)
	}
	recordstest.Known(t, b, during.ref, isRunning)
	time.Sleep(15 * time.Second) // for a lost mark, if there were one
	for _, build := range []*load{l, during} {
		build.end()
		recordstest.Known(t, b, build.ref, isSuccess)
	}
	f.wait(t, l, false)
	follow(t, b, during.ref).wait(t, during, false)
	t.Logf("the slowest calls took %v and %v", l.worst, during.worst)
	if l.worst > quick || during.worst > quick {
		t.Errorf("a call took %v, %v", l.worst, during.worst)
	}
	if n := a.Stats().Lost + b.Stats().Lost; n != 0 {
		t.Errorf("%d builds were found lost", n)
	}
}

// TestServerFrozen freezes the only server for 25 s under 16 builds.
func TestServerFrozen(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{})
	a, b := opened(t, servers, nil), opened(t, servers, nil)
	var loads, idle []*load
	quiet := memory.New(memory.Default) // what calls take on this machine anyway
	for i := range 12 {
		loads = append(loads, run(a, fmt.Sprintf("build-%d", i)))
		idle = append(idle, run(quiet, fmt.Sprintf("build-%d", i)))
	}
	recordstest.Known(t, b, loads[0].ref, recordstest.Any)
	f := follow(t, b, loads[0].ref)
	time.Sleep(time.Second)
	if err := servers[0].Freeze(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	for i := range 4 {
		loads = append(loads, run(a, fmt.Sprintf("later-%d", i)))
	}
	began := time.Now()
	if rec, err := a.Get(recordstest.Context(t), loads[0].ref); err != nil || !rec.Running() || time.Since(began) > 5*time.Second {
		t.Errorf("an own build is %+v, %v after %v", rec, err, time.Since(began))
	}
	time.Sleep(23 * time.Second)
	servers[0].Thaw()
	reachable(t, a)
	time.Sleep(15 * time.Second)
	worst := time.Duration(0)
	for _, l := range loads {
		l.end()
		recordstest.Known(t, b, l.ref, isSuccess)
		worst = max(worst, l.worst)
	}
	f.wait(t, loads[0], true)
	anyway := time.Duration(0)
	for _, l := range idle {
		l.end()
		anyway = max(anyway, l.worst)
	}
	t.Logf("the slowest call took %v, of a store in memory %v; %d lines were dropped", worst, anyway, a.Stats().Dropped)
	if worst > quick {
		t.Errorf("a call took %v", worst)
	}
	if n := a.Stats().Lost + b.Stats().Lost; n != 0 {
		t.Errorf("%d builds were found lost", n)
	}
}

// TestServerWiped has a server come back without what it had: what runs is there again, and the
// lines that are gone are said.
func TestServerWiped(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{})
	a, b := opened(t, servers, nil), opened(t, servers, nil)
	recordstest.Begin(a, "acme", "gone").End(recordstest.Success())
	recordstest.Known(t, b, records.Ref{Tenant: "acme", ID: "gone"}, isSuccess)
	l := run(a, "one")
	recordstest.Known(t, b, l.ref, recordstest.Any)
	f := follow(t, b, l.ref)
	time.Sleep(time.Second)
	l.pause() // what the server has by now, the follower has too
	f.reaches(t, l.lines())
	stored(t, a)
	servers[0].Kill()
	l.resume()
	if err := servers[0].Wipe(); err != nil {
		t.Fatal(err)
	}
	if err := servers[0].Restart(recordstest.Context(t)); err != nil {
		t.Fatal(err)
	}
	rec := recordstest.Known(t, b, l.ref, isRunning)
	if rec.Attempt != 1 {
		t.Errorf("it has become attempt %d", rec.Attempt)
	}
	late := follow(t, b, l.ref)
	time.Sleep(time.Second)
	l.end()
	recordstest.Known(t, b, l.ref, isSuccess)
	f.wait(t, l, true)
	late.wait(t, l, true)
	// It had all that was gone, and reads the new stream from its beginning.
	if f.lost > 0 {
		t.Errorf("an earlier follower has lost %d lines", f.lost)
	}
	if late.lost == 0 {
		t.Error("a later follower is told of no gap")
	}
	if _, err := b.Get(recordstest.Context(t), records.Ref{Tenant: "acme", ID: "gone"}); err == nil {
		t.Error("the wiped build is known")
	}
	Begin := recordstest.Begin(b, "acme", "after")
	Begin.Log("a line")
	Begin.End(recordstest.Success())
	recordstest.Known(t, a, records.Ref{Tenant: "acme", ID: "after"}, isSuccess)
}

// TestServerTooSmall has no room for the streams. Builds go on, and the operator is told.
func TestServerTooSmall(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{MaxFile: "1MB"})
	s := open(t, servers, nil)
	recordstest.Eventually(t, func() error {
		if st := s.Stats(); !strings.Contains(st.Problem, "creating stream") {
			return fmt.Errorf("the problem is %q", st.Problem)
		}
		return nil
	})
	l := run(s, "one")
	time.Sleep(2 * time.Second)
	l.end()
	if rec, err := s.Get(recordstest.Context(t), l.ref); err != nil || isSuccess(rec) != nil {
		t.Errorf("the build is %+v, %v", rec, err)
	}
	t.Logf("the slowest call took %v", l.worst)
	if l.worst > quick {
		t.Errorf("a call took %v", l.worst)
	}
}

// TestDiskFull has a server whose disk is full before its streams are. It gives up JetStream.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{Disk: "24m"})
	s := opened(t, servers, nil)
	l := run(s, "one")
	recordstest.Known(t, s, l.ref, recordstest.Any)
	began := time.Now()
	for i := 0; s.Stats().Reachable; i++ {
		b := recordstest.Begin(s, "acme", fmt.Sprint(i))
		for range 100 {
			b.Log(strings.Repeat("x", 10000))
		}
		b.End(recordstest.Success())
		time.Sleep(50 * time.Millisecond)
		if time.Since(began) > recordstest.Timeout {
			t.Fatalf("a disk of 24 MB took %d MB", i)
		}
	}
	t.Logf("the problem is: %s", s.Stats().Problem)
	time.Sleep(2 * time.Second)
	l.end()
	if rec, err := s.Get(recordstest.Context(t), l.ref); err != nil || isSuccess(rec) != nil {
		t.Errorf("the build is %+v, %v", rec, err)
	}
	st := s.Stats()
	t.Logf("the slowest call took %v; %d bytes are pending, %d lines were dropped", l.worst, st.Pending, st.Dropped)
	if st.Pending > 8<<20 || l.worst > quick {
		t.Errorf("%d bytes are pending, and a call took %v", st.Pending, l.worst)
	}
}

// TestRefused has a server that answers, and takes no further record. Nobody takes a build that is
// not there for one that never was.
func TestRefused(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{})
	conn, err := nats.Connect(urls(servers), patient)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	j, err := js.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	cfg := js.StreamConfig{Name: jetstream.RecordStream, Subjects: []string{"builder.rec.>"}, MaxMsgsPerSubject: 1, MaxMsgs: 2, Discard: js.DiscardNew}
	if _, err := j.CreateStream(recordstest.Context(t), cfg); err != nil {
		t.Fatal(err)
	}
	a, b := opened(t, servers, nil), opened(t, servers, nil)
	before := run(a, "before")
	recordstest.Known(t, b, before.ref, isRunning)
	before.end()
	recordstest.Known(t, b, before.ref, isSuccess)
	never := records.Ref{Tenant: "acme", ID: "never"}
	if _, err := b.Get(recordstest.Context(t), never); !errors.Is(err, records.ErrNotFound) {
		t.Errorf("a build that never was: %v", err)
	}

	during := run(a, "during")
	recordstest.Eventually(t, func() error {
		if _, err := b.Get(recordstest.Context(t), during.ref); !errors.Is(err, records.ErrUnknown) {
			return fmt.Errorf("another process: %v", err)
		}
		return nil
	})
	if rec, err := a.Get(recordstest.Context(t), during.ref); err != nil || isRunning(rec) != nil {
		t.Errorf("its own process: %+v, %v", rec, err)
	}
	for what, err := range map[string]error{"stopping it": errOf(b.Cancel(recordstest.Context(t), records.Cancellation{Ref: during.ref, By: "k1"})), "finding it": errOf(b.Find(recordstest.Context(t), "acme", "during", "aa")), "everywhere": errOf(b.Everywhere(recordstest.Context(t), "during"))} {
		if !errors.Is(err, records.ErrUnknown) {
			t.Errorf("%s: %v", what, err)
		}
	}
	page, err := b.List(recordstest.Context(t), records.Query{Tenant: "acme", Limit: 10})
	if err != nil || page.Complete || len(page.Builds) != 1 {
		t.Errorf("another process lists %+v, %v", page, err)
	}
	during.end()

	cfg.MaxMsgs = -1
	if _, err := j.UpdateStream(recordstest.Context(t), cfg); err != nil {
		t.Fatal(err)
	}
	recordstest.Known(t, b, during.ref, isSuccess)
	recordstest.Eventually(t, func() error {
		if page, err := b.List(recordstest.Context(t), records.Query{Tenant: "acme", Limit: 10}); err != nil || !page.Complete || len(page.Builds) != 2 {
			return fmt.Errorf("afterwards it lists %+v, %v", page, err)
		}
		return nil
	})
	if _, err := b.Get(recordstest.Context(t), never); !errors.Is(err, records.ErrNotFound) {
		t.Errorf("afterwards, a build that never was: %v", err)
	}
}

func errOf[T any](_ T, err error) error { return err }

// TestMaxPayload has a server that takes smaller messages than a batch of lines. They are lost, and
// followers are told; the build has its verdict.
func TestMaxPayload(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{More: "max_payload: 16KB"})
	s := opened(t, servers, nil)
	b := recordstest.Begin(s, "acme", "one")
	ref := records.Ref{Tenant: "acme", ID: "one"}
	for range 1000 {
		b.Log(strings.Repeat("x", 1000))
	}
	stored(t, s) // or dropped, and no longer in the last line's batch
	b.Log("the last")
	b.End(recordstest.Success())
	recordstest.Known(t, s, ref, isSuccess)
	lines, lost := recordstest.ReadLog(t, s, ref, 0, true)
	if lines[1001] != "the last" || len(lines)+int(lost) != 1001 || lost < 900 || s.Stats().Dropped != lost {
		t.Errorf("%d lines, %d lost, %d dropped", len(lines), lost, s.Stats().Dropped)
	}
}

// TestLogsRefused has the server refuse all lines, and take records. A build that has ended has its
// verdict all the same, and its log a gap.
func TestLogsRefused(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{})
	a, b := opened(t, servers, nil), opened(t, servers, nil)
	build, ref := recordstest.Begin(a, "acme", "one"), records.Ref{Tenant: "acme", ID: "one"}
	build.Log("l: stored")
	recordstest.Known(t, b, ref, recordstest.Any)
	recordstest.Eventually(t, func() error {
		if lines, _ := recordstest.ReadLog(t, b, ref, 0, false); len(lines) != 1 {
			return fmt.Errorf("%d lines", len(lines))
		}
		return nil
	})
	refuse(t, servers, jetstream.LogStream)
	build.Log("l: refused", "l: refused too")
	build.End(recordstest.Success())
	if rec := recordstest.Known(t, b, ref, recordstest.Ended); rec.Status != api.Success || rec.Lines != 3 {
		t.Errorf("the build is %+v", rec)
	}
	lines, lost := recordstest.ReadLog(t, b, ref, 0, true)
	if len(lines) != 1 || lines[1] != "l: stored" || lost != 2 {
		t.Errorf("the log is %v, and %d lines lost", lines, lost)
	}
	// The lines are tried for a minute.
	stack.Eventually(t, 3*time.Minute, func() error {
		if st := a.Stats(); st.Dropped != 2 || st.Forgotten != 0 || st.Pending != 0 {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
}

// refuse has a stream take no message more.
func refuse(t *testing.T, servers []*stack.NATS, stream string) {
	t.Helper()
	j, ctx := manager(t, servers), recordstest.Context(t)
	s, err := j.Stream(ctx, stream)
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	cfg.Discard, cfg.MaxMsgs = js.DiscardNew, 1
	if _, err := j.UpdateStream(ctx, cfg); err != nil {
		t.Fatal(err)
	}
}

// TestStreamsFull has streams that are smaller than what comes: the oldest goes.
func TestStreamsFull(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{})
	s := opened(t, servers, func(o *jetstream.Options) { o.RecordBytes, o.LogBytes = 64<<10, 1<<20 })
	const builds = 300
	for i := range builds {
		b := recordstest.Begin(s, "acme", fmt.Sprint(i))
		for range 10 {
			b.Log(strings.Repeat("x", 1000))
		}
		b.End(recordstest.Success())
		if i%20 == 0 {
			recordstest.Known(t, s, records.Ref{Tenant: "acme", ID: fmt.Sprint(i)}, recordstest.Ended)
		}
	}
	stored(t, s)
	last := records.Ref{Tenant: "acme", ID: fmt.Sprint(builds - 1)}
	recordstest.Known(t, s, last, isSuccess)
	if lines, lost := recordstest.ReadLog(t, s, last, 0, true); len(lines) != 10 || lost != 0 {
		t.Errorf("the latest log has %d lines, %d lost", len(lines), lost)
	}
	page, err := s.List(recordstest.Context(t), records.Query{Tenant: "acme", Limit: 200})
	if err != nil || len(page.Builds) < 20 || len(page.Builds) > 200 || !slices.ContainsFunc(page.Builds, func(r records.Record) bool { return r.ID == last.ID }) {
		t.Errorf("%d builds are left, %v", len(page.Builds), err)
	}
	// The record of a log that is gone has its end: its follower does not hang.
	old := page.Builds[len(page.Builds)-1]
	began := time.Now()
	lines, lost := recordstest.ReadLog(t, s, records.Ref{Tenant: "acme", ID: old.ID}, 0, true)
	if len(lines)+int(lost) != 10 || time.Since(began) > 10*time.Second {
		t.Errorf("the log of build %s has %d lines and %d lost, after %v", old.ID, len(lines), lost, time.Since(began))
	}
}
