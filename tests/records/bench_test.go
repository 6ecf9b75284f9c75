package records

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"handler/function/records"
	"handler/function/records/jetstream"
	"handler/function/records/recordstest"
	"handler/function/tests/stack"
)

// The benchmarks here do all that they measure once, whatever b.N is: run them with -benchtime 1x, on
// a machine that does nothing else. They fail where a figure that the store promises is missed.

func median(list []time.Duration) time.Duration {
	slices.Sort(list)
	return list[len(list)/2]
}

// BenchmarkCalls measures what the store's calls add to one build, and when its verdict is elsewhere.
func BenchmarkCalls(b *testing.B) {
	for _, n := range []int{1, 3} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			servers := start(b, stack.NATSConfig{Servers: n})
			here, there := opened(b, servers, nil), opened(b, servers, nil)
			line := "l: " + strings.Repeat("x", 97)
			var calls, visible []time.Duration
			for i := range 200 {
				id := fmt.Sprint(i)
				began := time.Now()
				build := recordstest.Begin(here, "acme", id)
				for range 20 {
					build.Log(line)
				}
				took := time.Since(began)
				recordstest.Known(b, there, records.Ref{Tenant: "acme", ID: id}, recordstest.Any)
				time.Sleep(60 * time.Millisecond) // the lines are stored
				ended := time.Now()
				build.End(recordstest.Success())
				calls = append(calls, took+time.Since(ended))
				recordstest.Known(b, there, records.Ref{Tenant: "acme", ID: id}, recordstest.Ended)
				visible = append(visible, time.Since(ended))
			}
			b.Logf("22 calls of a build: median %v, longest %v; its verdict elsewhere: median %v", median(calls), slices.Max(calls), median(visible))
			if m := median(calls); m > 140*time.Microsecond {
				b.Errorf("the calls of a build took %v", m)
			}
		})
	}
}

// BenchmarkRate logs 100,000 lines of 100 bytes a second for five seconds, with a follower elsewhere.
func BenchmarkRate(b *testing.B) {
	for _, n := range []int{1, 3} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			servers := start(b, stack.NATSConfig{Servers: n})
			here, there := opened(b, servers, nil), opened(b, servers, nil)
			// More than MaxLog in one log would be a gap: eight builds have 5 MB each.
			const builds, each, rate = 8, 62500, 100000
			var all []records.Build
			for i := range builds {
				all = append(all, recordstest.Begin(here, "acme", fmt.Sprint(i)))
				recordstest.Known(b, there, records.Ref{Tenant: "acme", ID: fmt.Sprint(i)}, recordstest.Any)
			}
			var wg sync.WaitGroup
			wg.Go(func() {
				lines, lost, err := recordstest.FollowLog(recordstest.Context(b), there, records.Ref{Tenant: "acme", ID: "0"}, 0, true)
				if err != nil || len(lines) != each || lost != 0 {
					b.Errorf("a follower has %d lines, and %d lost; %v", len(lines), lost, err)
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
			dropped := here.Stats().Dropped
			b.Logf("%.0f lines a second, %d of %d dropped; the longest call %v", builds*each/took.Seconds(), dropped, builds*each, worst)
			if dropped > 0 {
				b.Errorf("%d lines were dropped", dropped)
			}
		})
	}
}

// BenchmarkTenThousand has 10,000 records in the store, and measures lists and a look-up.
func BenchmarkTenThousand(b *testing.B) {
	servers := start(b, stack.NATSConfig{})
	here, there := opened(b, servers, nil), opened(b, servers, nil)
	for i := range 10000 {
		build := recordstest.Begin(here, []string{"acme", "other"}[i%2], fmt.Sprint(i))
		build.End(recordstest.Success())
		if i%200 == 199 {
			recordstest.Eventually(b, func() error {
				if p := here.Stats().Pending; p > 1<<20 {
					return fmt.Errorf("%d bytes are pending", p)
				}
				return nil
			})
		}
	}
	recordstest.Eventually(b, func() error {
		if p := here.Stats().Pending; p > 0 {
			return fmt.Errorf("%d bytes are pending", p)
		}
		return nil
	})
	measure := func(what string, limit time.Duration, call func() error) {
		b.Helper()
		var all []time.Duration
		for range 7 {
			began := time.Now()
			if err := call(); err != nil {
				b.Fatalf("%s: %v", what, err)
			}
			all = append(all, time.Since(began))
		}
		m := median(all)
		b.Logf("%s: median %v, longest %v", what, m, all[len(all)-1])
		if m > limit {
			b.Errorf("%s took %v", what, m)
		}
	}
	list := func(q records.Query, want int) func() error {
		return func() error {
			page, err := there.List(context.Background(), q)
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
			_, err := there.Get(context.Background(), records.Ref{Tenant: "acme", ID: "500"})
			return err
		})
	}
	b.Log("while the running records of all are there:")
	both(600 * time.Millisecond) // 20,000 messages: nobody ends 10,000 builds in a minute
	time.Sleep(2 * time.Minute)
	recordstest.Eventually(b, func() error {
		n, err := servers[0].Subjects(recordstest.Context(b), jetstream.RecordStream, "builder.rec.*.*.*.*.b")
		if err == nil && n > 0 {
			err = fmt.Errorf("%d running records are left", n)
		}
		return err
	})
	b.Log("later:")
	both(150 * time.Millisecond)

	// What one more process takes.
	o := spawnOwner(b, servers)
	before := o.say(b, "memory")
	o.say(b, "open")
	time.Sleep(3 * time.Second)
	idle := o.say(b, "memory")
	o.say(b, "list")
	list200 := o.say(b, "memory")
	b.Logf("the server takes %s", megabytes(servers[0].Memory()))
	if err := servers[0].Freeze(); err != nil {
		b.Fatal(err)
	}
	o.say(b, "flood")
	b.Logf("a process takes %s before its store, %s with it, %s after a list of 200, %s with a frozen server and more than can be kept", before, idle, list200, o.say(b, "memory"))
}

func megabytes(n int64, err error) string {
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}
