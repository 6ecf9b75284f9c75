package builds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"handler/function/records"
	"handler/function/records/jetstream"
	"handler/function/records/recordstest"
	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// many is how many builds there are in the store.
const many = 10_000

// archive is a house whose store has many builds of a tenant.
func archive(t testing.TB, c stack.FunctionConfig) (h *house, acme *stack.Tenant, ids []string) {
	t.Helper()
	acme = stack.NewTenant("acme", stack.Shared(t).Registry.Image("acme"))
	c.Secrets = stack.TenantsOf(acme).Secret()
	h = newHouse(t, c)
	connected(t, acme.Of(h.a.Client))
	connected(t, acme.Of(h.b.Client))
	// A process of the test's own has made them: it has the same root secret.
	s, err := jetstream.Open(jetstream.Options{URL: h.nats.URL, Roots: [][]byte{[]byte(h.s.PayloadSecret)}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		s.Close(ctx)
	})
	stored := func(most int64) {
		t.Helper()
		stack.Eventually(t, 3*patience, func() error {
			if p := s.Stats().Pending; p > most {
				return fmt.Errorf("%d bytes are pending", p)
			}
			return nil
		})
	}
	for i := range many {
		id := fmt.Sprint("archived-", i)
		ids = append(ids, id)
		b := s.Begin(records.Record{Tenant: acme.ID, ID: id, Began: time.Now()}, func(string) {})
		verdict := recordstest.Success()
		verdict.Image, verdict.ImageName = acme.Images[0]+"/app:v1", acme.Images[0]+"/app:v1"
		b.Log("l: one line")
		b.End(verdict)
		if i%200 == 0 {
			stored(1 << 20)
		}
	}
	stored(0)
	return h, acme, ids
}

// BenchmarkTenThousand asks the function for lists and records, of a store with 10,000. Run it with
// -benchtime 1x.
func BenchmarkTenThousand(b *testing.B) {
	h, acme, ids := archive(b, stack.FunctionConfig{Plain: true})
	c := acme.Of(h.b.Client)
	// While they ran, there were two records of each.
	time.Sleep(2 * time.Minute)
	stack.Eventually(b, 5*patience, func() error {
		n, err := h.nats.Subjects(within(b), jetstream.RecordStream, "builder.rec.*.*.*.*.b")
		if err == nil && n > 0 {
			err = fmt.Errorf("%d running records are left", n)
		}
		return err
	})
	list := func(query string, want int) func(int) error {
		return func(int) error {
			l, err := c.Builds(within(b), query)
			if err == nil && (len(l.Builds) != want || !l.Complete) {
				err = fmt.Errorf("%d builds, complete: %v", len(l.Builds), l.Complete)
			}
			return err
		}
	}
	for _, tt := range []struct {
		what string
		call func(i int) error
	}{
		{"GET /builds", list("", 50)},
		{"GET /builds?limit=200", list("limit=200", 200)},
		{"GET /builds?status=failed, which matches nothing", list("status=failed", 0)},
		{"GET /builds?image=…, which matches nothing", list("image=registry.example.com/none", 0)},
		{"GET /builds/<id>", func(i int) error {
			a, err := c.Verdict(within(b), ids[i*997%many])
			if err == nil && a.Status != "success" {
				err = fmt.Errorf("%v", a)
			}
			return err
		}},
		{"GET /builds/<id>/log", func(i int) error {
			l, err := c.ReadLog(within(b), ids[i*991%many], "", nil)
			if err == nil && (l.Status != "success" || len(l.Lines) != 1) {
				err = fmt.Errorf("%v", l.Answer)
			}
			return err
		}},
	} {
		var all []time.Duration
		for i := range 15 {
			began := time.Now()
			if err := tt.call(i); err != nil {
				b.Fatalf("%s: %v", tt.what, err)
			}
			all = append(all, time.Since(began))
		}
		slices.Sort(all)
		b.Logf("%s: median %v, longest %v", tt.what, all[len(all)/2], all[len(all)-1])
		if m := all[len(all)/2]; m > 150*time.Millisecond {
			b.Errorf("%s took %v", tt.what, m)
		}
	}
}

// softLimit is the memory that the function's runtime keeps to in stack.yml.
const softLimit = 96 << 20

// TestMemoryOfRecords has a replica do all that takes memory for records: lists of 10,000, as many
// followers as there may be, and logs that a frozen server does not take.
func TestMemoryOfRecords(t *testing.T) {
	t.Parallel()
	h, acme, ids := archive(t, stack.FunctionConfig{Plain: true, Env: map[string]string{"GOMEMLIMIT": "96MiB"}})
	c := acme.Of(h.b.Client)
	var askers sync.WaitGroup
	for i := range 4 {
		askers.Go(func() {
			for _, query := range []string{"limit=200", "status=failed", "image=registry.example.com/none"} {
				if err := listed(t, c, query); err != nil {
					t.Error(err)
				}
			}
			if a, err := c.Verdict(within(t), ids[i]); err != nil || a.Status != "success" {
				t.Errorf("%v, %v", a, err)
			}
		})
	}
	askers.Wait()
	report(t, h.b, "after lists")

	// 7 MB of log, to 16 followers.
	m := mark()
	print := "RUN x=$(seq 1 2000 | tr -d '\\n'); for i in $(seq 1 1000); do echo $x; done; : "
	request := func(m string, lines ...string) []byte {
		return stack.Body(t, map[string]any{"image": acme.Images[0] + "/app:v1"}, stack.Dockerfile(append([]string{"FROM busybox", held(m)}, lines...)...))
	}
	built := background(t, c, request(m, print+m), named(m))
	waitStep(t, m)
	var logs []func() int64
	for range 16 {
		logs = append(logs, stack.Later(t, func(ctx context.Context) (int64, error) {
			req, err := c.Ask(ctx, http.MethodGet, "/builds/"+m+"/log?follow=1")
			if err != nil {
				return 0, err
			}
			resp, err := c.Send(req)
			if err != nil {
				return 0, err
			}
			defer resp.Body.Close()
			// Reading each line would take the time of all others on this machine.
			return io.Copy(io.Discard, resp.Body)
		}))
	}
	followers(t, h.b, 16)
	release(t, m)
	built().WantSuccess(t)
	for _, wait := range logs {
		if n := wait(); n < 6<<20 {
			t.Errorf("a follower has read %d bytes", n)
		}
	}
	report(t, h.b, "after followers")

	// More than may wait for the store.
	if err := h.nats.Freeze(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		m := mark()
		built := background(t, c, request(m, print+m), named(m))
		release(t, m)
		built().WantSuccess(t)
	}
	report(t, h.b, "with a frozen server")
	if n, err := h.b.Metric("builder_records_pending_bytes"); err != nil || n > 8<<20 {
		t.Errorf("%v bytes wait, %v", n, err)
	}
	if err := h.nats.Thaw(); err != nil {
		t.Fatal(err)
	}
}

// listed asks for a list, three times at most. A tenant's lists are made one at a time, and one that
// waits for too long is refused.
func listed(t testing.TB, c *client.Client, query string) (err error) {
	for range 3 {
		_, err = c.Builds(within(t), query)
		if err == nil || !strings.Contains(err.Error(), "busy") && !strings.Contains(err.Error(), "records_unreachable") {
			break
		}
		t.Logf("listing %s: %v", query, err)
	}
	return err
}

// report logs the memory of a replica, and wants its peak below the limit.
func report(t *testing.T, f *stack.Function, when string) {
	t.Helper()
	rss, peak, err := f.Memory()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %.1f MiB, at most %.1f MiB so far", when, float64(rss)/(1<<20), float64(peak)/(1<<20))
	if peak > softLimit {
		t.Errorf("%s: %d bytes at its peak, want at most %d", when, peak, softLimit)
	}
}

// idleMore is what a replica at rest may take more if its records are in NATS. 2 MiB is wanted; what
// a process takes differs by as much from one start to the next.
const idleMore = 5 << 20

// TestIdleMemory compares replicas that do nothing, with a server for their records and without.
func TestIdleMemory(t *testing.T) {
	t.Parallel()
	server := stack.TestNATS(t, stack.NATSConfig{})
	var with, without []int64
	for range 3 {
		for _, tt := range []struct {
			url string
			all *[]int64
		}{{server.URL, &with}, {"", &without}} {
			_, f := stack.Test(t, stack.FunctionConfig{Plain: true, Env: map[string]string{"nats_url": tt.url}})
			// Answers take memory too, so neither is asked often. Without a server no list is complete.
			stack.Eventually(t, patience, func() error {
				l, err := f.Builds(within(t), "")
				if err == nil && !l.Complete && tt.url != "" {
					err = errors.New("the list is not complete")
				}
				if err != nil {
					time.Sleep(500 * time.Millisecond)
				}
				return err
			})
			time.Sleep(3 * time.Second) // some heartbeats
			rss, _, err := f.Memory()
			if err != nil {
				t.Fatal(err)
			}
			*tt.all = append(*tt.all, rss)
			f.Kill()
		}
	}
	slices.Sort(with)
	slices.Sort(without)
	more := with[1] - without[1]
	t.Logf("%.1f MiB more: %d, without %d", float64(more)/(1<<20), with, without)
	if more > idleMore {
		t.Errorf("a replica at rest takes %d bytes more with nats_url", more)
	}
}
