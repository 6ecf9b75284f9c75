package records

import (
	"context"
	"flag"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	js "github.com/nats-io/nats.go/jetstream"

	"handler/function/records"
	"handler/function/records/jetstream"
	"handler/function/records/recordstest"
	"handler/function/tests/stack"
)

// figures is for a machine that does nothing else, without the race detector. faults is for what
// takes minutes. make test-records sets both.
var (
	figures = flag.Bool("figures", false, "measure the store, and hold it to its figures")
	faults  = flag.Bool("faults", false, "also freeze, wipe and cut off servers and replicas")
)

func onlyFigures(t *testing.T) {
	t.Helper()
	if !*figures {
		t.Skip("measures only with -figures")
	}
}

func onlyFaults(t *testing.T) {
	t.Helper()
	if !*faults {
		t.Skip("takes long: only with -faults")
	}
}

func median(list []time.Duration) time.Duration {
	slices.Sort(list)
	return list[len(list)/2]
}

// TestCalls measures what the store's calls add to one build, and when its verdict is elsewhere.
func TestCalls(t *testing.T) {
	onlyFigures(t)
	for _, n := range []int{1, 3} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			servers := start(t, stack.NATSConfig{Servers: n})
			a, b := opened(t, servers, nil), opened(t, servers, nil)
			line := "l: " + strings.Repeat("x", 97)
			var calls, visible []time.Duration
			for i := range 200 {
				id := fmt.Sprint(i)
				began := time.Now()
				build := recordstest.Begin(a, "acme", id)
				for range 20 {
					build.Log(line)
				}
				took := time.Since(began)
				recordstest.Known(t, b, records.Ref{Tenant: "acme", ID: id}, recordstest.Any)
				time.Sleep(60 * time.Millisecond) // the lines are stored
				ended := time.Now()
				build.End(recordstest.Success())
				calls = append(calls, took+time.Since(ended))
				recordstest.Known(t, b, records.Ref{Tenant: "acme", ID: id}, recordstest.Ended)
				visible = append(visible, time.Since(ended))
			}
			t.Logf("22 calls of a build: median %v, longest %v; its verdict elsewhere: median %v", median(calls), slices.Max(calls), median(visible))
			if m := median(calls); m > 140*time.Microsecond {
				t.Errorf("the calls of a build took %v", m)
			}
		})
	}
}

// TestRate logs 100,000 lines of 100 bytes a second for five seconds, with a follower elsewhere.
func TestRate(t *testing.T) {
	onlyFigures(t)
	for _, n := range []int{1, 3} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			servers := start(t, stack.NATSConfig{Servers: n})
			a, b := opened(t, servers, nil), opened(t, servers, nil)
			// More than MaxLog in one log would be a gap: eight builds have 5 MB each.
			const builds, each, rate = 8, 62500, 100000
			var all []records.Build
			for i := range builds {
				all = append(all, recordstest.Begin(a, "acme", fmt.Sprint(i)))
				recordstest.Known(t, b, records.Ref{Tenant: "acme", ID: fmt.Sprint(i)}, recordstest.Any)
			}
			var wg sync.WaitGroup
			wg.Go(func() {
				lines, lost, err := recordstest.FollowLog(recordstest.Context(t), b, records.Ref{Tenant: "acme", ID: "0"}, 0, true)
				if err != nil || len(lines) != each || lost != 0 {
					t.Errorf("a follower has %d lines, and %d lost; %v", len(lines), lost, err)
				}
			})
			began := time.Now()
			var worst time.Duration
			for n := range each {
				for _, build := range all {
					at := time.Now()
					build.Log(fmt.Sprintf("l: %0*d", 97, n))
					worst = max(worst, time.Since(at))
				}
				if ahead := time.Duration(n*builds)*time.Second/rate - time.Since(began); ahead > time.Millisecond {
					time.Sleep(ahead)
				}
			}
			took := time.Since(began)
			for _, build := range all {
				build.End(recordstest.Success())
			}
			wg.Wait()
			dropped := a.Stats().Dropped
			t.Logf("%.0f lines a second, %d of %d dropped; the longest call %v", builds*each/took.Seconds(), dropped, builds*each, worst)
			if dropped > 0 {
				t.Errorf("%d lines were dropped", dropped)
			}
		})
	}
}

// TestTenThousand has 10,000 records in the store, and measures lists and a look-up.
func TestTenThousand(t *testing.T) {
	onlyFigures(t)
	servers := start(t, stack.NATSConfig{})
	a, b := opened(t, servers, nil), opened(t, servers, nil)
	n := 10000
	if testing.Short() {
		n = 1000
	}
	for i := range n {
		build := recordstest.Begin(a, []string{"acme", "other"}[i%2], fmt.Sprint(i))
		build.End(recordstest.Success())
		if i%200 == 199 {
			recordstest.Eventually(t, func() error {
				if p := a.Stats().Pending; p > 1<<20 {
					return fmt.Errorf("%d bytes are pending", p)
				}
				return nil
			})
		}
	}
	recordstest.Eventually(t, func() error {
		if p := a.Stats().Pending; p > 0 {
			return fmt.Errorf("%d bytes are pending", p)
		}
		return nil
	})
	measure := func(what string, limit time.Duration, call func() error) {
		t.Helper()
		var all []time.Duration
		for range 7 {
			began := time.Now()
			if err := call(); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			all = append(all, time.Since(began))
		}
		m := median(all)
		t.Logf("%s: median %v, longest %v", what, m, all[len(all)-1])
		if m > limit {
			t.Errorf("%s took %v", what, m)
		}
	}
	list := func(q records.Query, want int) func() error {
		return func() error {
			page, err := b.List(context.Background(), q)
			if err == nil && (len(page.Builds) != want || !page.Complete) {
				err = fmt.Errorf("%d builds, complete: %v", len(page.Builds), page.Complete)
			}
			return err
		}
	}
	both := func(all time.Duration) {
		measure("the latest 50 of all", 150*time.Millisecond, list(records.Query{Operator: true, Limit: 50}, 50))
		measure("the latest 200 of all", 150*time.Millisecond, list(records.Query{Operator: true, Limit: 200}, 200))
		measure("the latest 50 of one tenant", 150*time.Millisecond, list(records.Query{Tenant: "acme", Limit: 50}, 50))
		measure("the failed ones of all", all, list(records.Query{Operator: true, Limit: 50, Status: "failed"}, 0))
		measure("one by its id", 150*time.Millisecond, func() error {
			_, err := b.Get(context.Background(), records.Ref{Tenant: "acme", ID: "500"})
			return err
		})
	}
	t.Log("while the running records of all are there:")
	both(600 * time.Millisecond) // 20,000 messages: nobody ends 10,000 builds in a minute
	time.Sleep(2 * time.Minute)
	recordstest.Eventually(t, func() error {
		if n := purged(t, servers); n > 0 {
			return fmt.Errorf("%d running records are left", n)
		}
		return nil
	})
	t.Log("later:")
	both(150 * time.Millisecond)

	// What one more process takes.
	o := spawnOwner(t, servers)
	before := o.say(t, "memory")
	o.say(t, "open")
	time.Sleep(3 * time.Second)
	idle := o.say(t, "memory")
	o.say(t, "list")
	list200 := o.say(t, "memory")
	t.Logf("the server takes %s", megabytes(servers[0].Memory()))
	if err := servers[0].Freeze(); err != nil {
		t.Fatal(err)
	}
	o.say(t, "flood")
	t.Logf("a process takes %s before its store, %s with it, %s after a list of 200, %s with a frozen server and more than can be kept", before, idle, list200, o.say(t, "memory"))
}

func megabytes(n int64, err error) string {
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}

// purged returns how many running records there are.
func purged(t *testing.T, servers []*stack.NATS) int {
	t.Helper()
	conn, err := nats.Connect(urls(servers))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	j, err := js.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	s, err := j.Stream(recordstest.Context(t), jetstream.RecordStream)
	if err != nil {
		t.Fatal(err)
	}
	info, err := s.Info(recordstest.Context(t), js.WithSubjectFilter("builder.rec.*.*.*.*.b"))
	if err != nil {
		t.Fatal(err)
	}
	return len(info.State.Subjects)
}
