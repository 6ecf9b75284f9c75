package server_test

import (
	"context"
	"iter"
	"slices"
	"strings"
	"testing"

	"handler/function/api"
	"handler/function/records"
	"handler/function/records/memory"
	"handler/function/server"
	"handler/function/solve"
)

// replicas are two servers that share a store, as two processes share one in NATS.
func replicas(t *testing.T, solver *scripted) (a, b *fixture, store *memory.Store) {
	t.Helper()
	store = memory.New(memory.Default)
	share := func(c *server.Config) { c.Records, c.Elsewhere = store, func() records.Load { return records.Load{} } }
	return start(t, solver, share), start(t, solver, share), store
}

// TestRedeliveryElsewhere: a delivery to another replica follows the build, and has its verdict.
func TestRedeliveryElsewhere(t *testing.T) {
	solver, started, release := speaking()
	solver.find = func(string, string) (*solve.Past, error) { t.Error("a daemon is asked"); return nil, nil }
	a, b, _ := replicas(t, solver)
	body := pack(t, config)
	first := a.deliver(t, "call", body)
	<-started
	var others []<-chan answer
	for _, accept := range []string{"", api.NDJSONType} {
		others = append(others, b.deliver(t, "call", body, "Accept", accept))
	}
	eventually(t, "they join", func() bool { return b.joined(2)() && strings.Contains(b.metrics(t), "builder_log_followers 1\n") })
	close(release)
	want := <-first
	for _, answers := range append(others, b.deliver(t, "call", body), b.deliver(t, "call", body, "Accept", api.NDJSONType)) {
		got := <-answers
		if got.status != 200 || got.rec.Digest != "sha256:abc" || got.rec.Request != want.rec.Request || got.rec.Image != want.rec.Image || !strings.Contains(got.body, `"first"`) || !strings.Contains(got.body, `"second"`) {
			t.Errorf("%d %s", got.status, got.body)
		}
		if strings.HasPrefix(got.body, "{\n") && !slices.Equal(got.rec.Log, want.rec.Log) {
			t.Errorf("the log is %q", got.rec.Log)
		}
	}
	if n := solver.calls.Load(); n != 1 {
		t.Errorf("%d builds", n)
	}
	// Each replica tells, follows and stops.
	if status, rec := b.record(t, secret, "call"); status != 200 || rec.Digest != "sha256:abc" || len(rec.Log) != 2 {
		t.Errorf("the record: %d %+v", status, rec)
	}
	if lines, _ := b.readLog(t, "/builds/call/log?follow=1", 0); len(lines) != 2 {
		t.Errorf("the log: %q", lines)
	}
	if strings.Contains(b.log.String(), `"build ended"`) || strings.Contains(b.metrics(t), `builder_builds_total{code="",status="success"} 1`) {
		t.Errorf("the other replica counts the build: %s", b.log)
	}
}

// TestStopElsewhere: the deliveries to both replicas are told, and so are later ones.
func TestStopElsewhere(t *testing.T) {
	solver, started, _ := speaking()
	a, b, _ := replicas(t, solver)
	body := pack(t, config)
	first := a.deliver(t, "call", body)
	<-started
	second := b.deliver(t, "call", body)
	eventually(t, "it joins", b.joined(1))
	b.stop(t, "/builds/call", 202)
	for _, answers := range []<-chan answer{first, second, a.deliver(t, "call", body), b.deliver(t, "call", body)} {
		wantStopped(t, "told", <-answers)
	}
	if n := solver.calls.Load(); n != 1 {
		t.Errorf("%d builds", n)
	}
}

// TestOrphans: a delivery builds when the one that it follows has died, or its caller has left.
func TestOrphans(t *testing.T) {
	for _, tt := range []struct {
		name    string
		verdict api.Record
		again   bool
	}{
		{"lost", api.Record{Status: api.Failed, Code: api.Lost, Error: "lost"}, true},
		{"its caller has left", api.Record{Status: api.Failed, Code: api.Canceled, Error: "left"}, true},
		{"no daemon", api.Record{Status: api.Failed, Code: api.NoDaemon, Error: "none"}, false},
		{"failed", api.Record{Status: api.Failed, Code: api.BuildFailed, Error: "exit code 1"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			solver := &scripted{solve: func(_ context.Context, _ *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error) {
				log("again")
				return solve.Outcome{Digest: "sha256:new"}, solve.Stats{}, nil
			}}
			_, b, store := replicas(t, solver)
			body := pack(t, config)
			elsewhere := store.Begin(records.Record{Tenant: server.Owner([]byte(secret)), ID: "call", Request: digestOf(body)[len("sha256:"):], Queued: true}, func(string) {})
			elsewhere.Log("before")
			sent := b.deliver(t, "call", body)
			eventually(t, "it joins", b.joined(1))
			elsewhere.End(tt.verdict)
			got := <-sent
			want := []string{"before"}
			if tt.again {
				want = append(want, "w: the replica that ran this build has not ended it: building again", "again")
			}
			if !slices.Equal(got.rec.Log, want) || tt.again != (got.rec.Digest == "sha256:new") || !tt.again && got.rec.Code != tt.verdict.Code {
				t.Errorf("%d %s", got.status, got.body)
			}
			if tt.again {
				if _, rec := b.record(t, secret, "call"); rec.Attempt != 2 || !slices.Equal(rec.Log, []string{"again"}) {
					t.Errorf("its own record: %+v", rec)
				}
			}
		})
	}
}

// TestFollowingEnds: a delivery that follows ends with the process, and when its caller leaves.
func TestFollowingEnds(t *testing.T) {
	solver := &scripted{}
	_, b, store := replicas(t, solver)
	body := pack(t, config)
	store.Begin(records.Record{Tenant: server.Owner([]byte(secret)), ID: "call", Request: digestOf(body)[len("sha256:"):], Queued: true}, func(string) { t.Error("the build is stopped") })
	ctx, leave := context.WithCancel(t.Context())
	go b.Client().Do(b.request(t, body, api.CallIDHeader, "call", api.CallbackHeader, calledBack).WithContext(ctx))
	eventually(t, "it follows", func() bool { return strings.Contains(b.metrics(t), "builder_log_followers 1\n") })
	leave()
	eventually(t, "it has left", func() bool { return strings.Contains(b.metrics(t), "builder_log_followers 0\n") })
	sent := b.deliver(t, "call", body)
	eventually(t, "another follows", func() bool { return strings.Contains(b.metrics(t), "builder_log_followers 1\n") })
	b.s.Shutdown()
	if a := <-sent; a.status != 503 || a.rec.Code != api.ShuttingDown {
		t.Errorf("%d %s", a.status, a.body)
	}
	if n := solver.calls.Load(); n != 0 {
		t.Errorf("%d builds", n)
	}
}

// TestSuspendedIsNotFinal: a redelivery builds once its tenant may build again.
func TestSuspendedIsNotFinal(t *testing.T) {
	solver := &scripted{}
	_, b, store := replicas(t, solver)
	body := pack(t, config)
	store.Begin(records.Record{Tenant: server.Owner([]byte(secret)), ID: "call", Request: digestOf(body)[len("sha256:"):], Queued: true}, func(string) {}).End(api.Record{Status: api.Failed, Code: api.Suspended})
	if a := <-b.deliver(t, "call", body); a.status != 200 || solver.calls.Load() != 1 {
		t.Errorf("%d %s", a.status, a.body)
	}
}

// deaf is a store whose logs cannot be followed.
type deaf struct{ records.Store }

func (deaf) Follow(context.Context, records.Ref, uint64, bool) iter.Seq2[records.Line, error] {
	return func(yield func(records.Line, error) bool) { yield(records.Line{}, records.ErrBusy) }
}

// TestNotFollowed: a build that cannot be followed is left to the daemons, which know it by its
// name.
func TestNotFollowed(t *testing.T) {
	store := memory.New(memory.Default)
	solver := &scripted{}
	f := start(t, solver, func(c *server.Config) { c.Records = deaf{store} })
	body := pack(t, config)
	store.Begin(records.Record{Tenant: server.Owner([]byte(secret)), ID: "call", Request: digestOf(body)[len("sha256:"):], Queued: true}, func(string) {})
	a := <-f.deliver(t, "call", body)
	if a.status != 200 || solver.calls.Load() != 1 || len(a.rec.Log) != 1 || !strings.Contains(a.rec.Log[0], "cannot be followed") {
		t.Errorf("%d %s", a.status, a.body)
	}
}
