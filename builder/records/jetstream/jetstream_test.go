package jetstream_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"handler/function/api"
	"handler/function/records"
	"handler/function/records/jetstream"
	"handler/function/records/recordstest"
)

// unreachable returns a store whose server is not there.
func unreachable(t *testing.T) *jetstream.Store {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	s, err := jetstream.Open(jetstream.Options{URL: "nats://" + l.Addr().String(), Roots: [][]byte{[]byte("root")}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		s.Close(ctx)
	})
	return s
}

// TestUnreachable has a process that knows its own builds, and says so.
func TestUnreachable(t *testing.T) {
	s := unreachable(t)
	told := make(chan string, 1)
	b := s.Begin(records.Record{Tenant: "acme", ID: "id", Began: time.Now()}, func(by string) { told <- by })
	b.Log("one")
	ref := records.Ref{Tenant: "acme", ID: "id"}
	if rec, err := s.Get(t.Context(), ref); err != nil || !rec.Running() || rec.Lines != 1 {
		t.Errorf("an own build is %+v, %v", rec, err)
	}
	if _, err := s.Get(t.Context(), records.Ref{Tenant: "acme", ID: "other"}); !errors.Is(err, records.ErrUnknown) {
		t.Errorf("another build: %v", err)
	}
	if _, err := s.Find(t.Context(), "acme", "other", "x"); !errors.Is(err, records.ErrUnknown) {
		t.Errorf("finding another build: %v", err)
	}
	page, err := s.List(t.Context(), records.Query{Tenant: "acme", Limit: 10})
	if err != nil || page.Complete || len(page.Builds) != 1 || page.Builds[0].ID != "id" {
		t.Errorf("the list is %+v, %v", page, err)
	}
	if all, err := s.Everywhere(t.Context(), "id"); err != nil || len(all) != 1 || all[0].Tenant != "acme" {
		t.Errorf("an own build, everywhere: %+v, %v", all, err)
	}
	if l := s.Elsewhere(); l.Complete || len(l.Tenants) != 0 {
		t.Errorf("the load of others is %+v", l)
	}
	if rec, err := s.Cancel(t.Context(), records.Cancellation{Ref: ref, By: "k1", Once: "x"}); err != nil || !rec.Running() {
		t.Errorf("stopping an own build: %+v, %v", rec, err)
	}
	if by := <-told; by != "k1" {
		t.Errorf("it was stopped by %q", by)
	}
	if _, err := s.Cancel(t.Context(), records.Cancellation{Ref: records.Ref{Tenant: "acme", ID: "other"}}); !errors.Is(err, records.ErrUnknown) {
		t.Errorf("stopping another build: %v", err)
	}
	if st := s.Stats(); st.Reachable || st.Problem == "" {
		t.Errorf("the store is %+v", st)
	}
	b.End(recordstest.Success())
	if rec, err := s.Get(t.Context(), ref); err != nil || rec.Status != api.Success {
		t.Errorf("an own build that has ended is %+v, %v", rec, err)
	}
}

// heap is how many bytes are in use, apart from garbage.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestPending has more lines than a process may hold: the oldest go first.
func TestPending(t *testing.T) {
	s := unreachable(t)
	first, second := recordstest.Begin(s, "acme", "first"), recordstest.Begin(s, "acme", "second")
	line := strings.Repeat("x", 1000)
	var worst time.Duration
	for i := range 40000 {
		began := time.Now()
		[]records.Build{first, second}[i%2].Log(line)
		worst = max(worst, time.Since(began))
	}
	t.Logf("the slowest of 40000 calls took %v", worst)
	st := s.Stats()
	if st.Pending > 8<<20 || st.Pending < 7<<20 {
		t.Errorf("%d bytes are pending", st.Pending)
	}
	if kept := 40000 - int(st.Dropped); kept > 8<<10 || kept < 6<<10 {
		t.Errorf("%d lines of 1000 bytes are kept", kept)
	}
	if rec := first.Record(); rec.Lines != 20000 {
		t.Errorf("the record has %d lines", rec.Lines)
	}
}

// TestVerdictsOutliveLines has a build print more than a process may hold, after another has ended:
// the verdict of that one is kept.
func TestVerdictsOutliveLines(t *testing.T) {
	s := unreachable(t)
	ended, chatty := recordstest.Begin(s, "acme", "ended"), recordstest.Begin(s, "globex", "chatty")
	ended.Log("one")
	ended.End(recordstest.Success())
	line := strings.Repeat("x", 1000)
	for range 20000 {
		chatty.Log(line)
	}
	if rec, err := s.Get(t.Context(), records.Ref{Tenant: "acme", ID: "ended"}); err != nil || rec.Status != api.Success {
		t.Errorf("the build that has ended is %+v, %v", rec, err)
	}
	if st := s.Stats(); st.Forgotten != 0 || st.Dropped == 0 || st.Pending > 8<<20 {
		t.Errorf("%+v", st)
	}
}

// TestDropped has builds that run on after their lines were dropped. They keep none in memory.
func TestDropped(t *testing.T) {
	s := unreachable(t)
	line := strings.Repeat("x", 1000)
	before := heap()
	for i := range 40 {
		b := recordstest.Begin(s, "acme", fmt.Sprint(i))
		for range 1000 {
			b.Log(line)
		}
	}
	if grown := heap() - before; grown > 12<<20 {
		t.Errorf("40 MB of lines have left %d bytes in memory", grown)
	}
	if s.Stats().Dropped == 0 {
		t.Error("no line was dropped")
	}
}

// TestEnded ends many builds that cannot be stored: a few are kept, and no memory is lost.
func TestEnded(t *testing.T) {
	s := unreachable(t)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	const n = 10000
	verdict := recordstest.Failure(api.BuildFailed)
	verdict.Error = strings.Repeat("x", 4000)
	for i := range n {
		b := recordstest.Begin(s, "acme", fmt.Sprint(i))
		b.Log("a line", strings.Repeat("x", 2000))
		b.End(verdict)
	}
	st := s.Stats()
	if st.Pending > 8<<20 || st.Forgotten < n/2 {
		t.Errorf("%d bytes are pending, and %d builds forgotten", st.Pending, st.Forgotten)
	}
	if _, err := s.Get(t.Context(), records.Ref{Tenant: "acme", ID: "0"}); !errors.Is(err, records.ErrUnknown) {
		t.Errorf("the oldest build: %v", err)
	}
	if _, err := s.Get(t.Context(), records.Ref{Tenant: "acme", ID: fmt.Sprint(n - 1)}); err != nil {
		t.Errorf("the latest build: %v", err)
	}
	recordstest.Eventually(t, func() error { // the goroutines of forgotten builds end
		if g := runtime.NumGoroutine(); g > 1500 {
			return fmt.Errorf("%d goroutines", g)
		}
		return nil
	})
	runtime.GC()
	runtime.ReadMemStats(&after)
	grown := int64(after.HeapInuse+after.StackInuse) - int64(before.HeapInuse+before.StackInuse)
	t.Logf("%d bytes more, with %d pending", grown, st.Pending)
	if grown > 32<<20 {
		t.Errorf("the process has grown by %d bytes", grown)
	}
}

func TestAddress(t *testing.T) {
	for _, url := range []string{"", "localhost:4222", "http://localhost", "nats://", "nats://ok:4222,nope", "http://user:password@host"} {
		if s, err := jetstream.Open(jetstream.Options{URL: url, Roots: [][]byte{[]byte("root")}}); err == nil {
			s.Close(t.Context())
			t.Errorf("%q is an address", url)
		} else if strings.Contains(err.Error(), "password") {
			t.Errorf("the error shows a password: %v", err)
		}
	}
	if _, err := jetstream.Open(jetstream.Options{URL: "nats://localhost:4222"}); err == nil {
		t.Error("no root secret is no error")
	}
}
