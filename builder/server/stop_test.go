package server_test

import (
	"context"
	"iter"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"handler/function/api"
	"handler/function/records"
	"handler/function/records/memory"
	"handler/function/server"
	"handler/function/signature"
	"handler/function/solve"
)

// phases makes builds that say where they are, and go on when they are told to. A build that is
// cancelled ends at once, wherever it is.
type phases struct {
	*scripted
	began chan *solve.Request
	next  chan func(*solve.Request) // nil ends the build
}

func inPhases() *phases {
	p := &phases{began: make(chan *solve.Request, 10), next: make(chan func(*solve.Request))}
	p.scripted = &scripted{solve: func(ctx context.Context, req *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error) {
		log("first")
		req.Placed("tcp://daemon:1", "ref")
		p.began <- req
		for {
			select {
			case do := <-p.next:
				if do == nil {
					return solve.Outcome{Digest: "sha256:abc"}, solve.Stats{}, nil
				}
				do(req)
			case <-ctx.Done():
				return solve.Outcome{}, solve.Stats{}, context.Cause(ctx)
			}
		}
	}}
	return p
}

func pushing(yes bool) func(*solve.Request) {
	return func(r *solve.Request) { r.Pushing(yes) }
}

func (f *fixture) stop(t testing.TB, target string, status int) seen {
	t.Helper()
	a := f.do(t, f.asking(t, secret, "DELETE", target))
	if a.status != status || !strings.HasPrefix(a.body, "{\n") || a.header.Get(api.SignatureHeader) == "" {
		t.Errorf("DELETE %s: %d %s, want %d", target, a.status, a.body, status)
	}
	return decode[seen](t, a)
}

// wantStopped wants the answer to a call whose build was stopped.
func wantStopped(t testing.TB, what string, a answer) {
	t.Helper()
	status := 409
	if strings.HasPrefix(a.header.Get("Content-Type"), api.NDJSONType) {
		status = 200
	}
	if a.status != status || a.rec.Status != api.Failed || a.rec.Code != api.Canceled || !strings.Contains(a.rec.Error, "stopped by request") {
		t.Errorf("%s: %d %s", what, a.status, a.body)
	}
}

// TestStop stops builds in each phase of their lives.
func TestStop(t *testing.T) {
	p := inPhases()
	f := start(t, p.scripted, func(c *server.Config) { c.MaxBuilds = 1 })
	body := pack(t, config)

	// Building, with two more deliveries that have joined.
	first := f.deliver(t, "building", body)
	<-p.began
	second, stream := f.deliver(t, "building", body), f.deliver(t, "building", body, "Accept", api.NDJSONType)
	eventually(t, "both join", f.joined(2))
	waiting := f.deliver(t, "waiting", body)
	eventually(t, "the next waits", func() bool { return strings.Contains(f.metrics(t), "builder_builds_waiting 1\n") })

	// Waiting: it leaves the queue, and the daemon has never heard of it.
	if rec := f.stop(t, "/builds/waiting", 202); rec.Status != api.InProgress || rec.CanceledBy != "default" {
		t.Errorf("told to stop: %+v", rec)
	}
	wantStopped(t, "waiting", <-waiting)
	if n := p.calls.Load(); n != 1 {
		t.Errorf("%d builds on the daemon", n)
	}
	f.stop(t, "/builds/building?attempt=1", 202)
	for what, answers := range map[string]<-chan answer{"the first": first, "the second": second, "a stream": stream} {
		wantStopped(t, what, <-answers)
	}
	if _, rec := f.record(t, secret, "building"); rec.Code != api.Canceled || rec.CanceledBy != "default" || rec.Lines != 1 || rec.Log[0] != "first" {
		t.Errorf("the record is %+v", rec)
	}
	if !strings.Contains(f.log.String(), `"by":"default"`) || !strings.Contains(f.log.String(), `"pushing":false`) {
		t.Errorf("the log is %s", f.log)
	}

	// It is final: a redelivery is told, and not built.
	for _, id := range []string{"building", "waiting"} {
		wantStopped(t, "delivered again", <-f.deliver(t, id, body))
	}
	if n := p.calls.Load(); n != 1 {
		t.Errorf("%d builds after redeliveries", n)
	}
	// Another body with the same id is another build.
	other := f.deliver(t, "building", pack(t, config, "context/x", "y"))
	<-p.began
	if rec := f.stop(t, "/builds/building?attempt=1", 200); rec.Code != api.Canceled || rec.Attempt != 1 {
		t.Errorf("the first attempt: %+v", rec)
	}
	p.next <- nil
	if a := <-other; a.status != 200 {
		t.Errorf("the second attempt: %d %s", a.status, a.body)
	}

	// Ended: nothing changes.
	if rec := f.stop(t, "/builds/building", 200); rec.Status != api.Success || rec.CanceledBy != "" || rec.Digest != "sha256:abc" {
		t.Errorf("stopped after its end: %+v", rec)
	}
}

// TestStopPush: a push that has begun is let finish, unless the build begins anew.
func TestStopPush(t *testing.T) {
	p := inPhases()
	f := start(t, p.scripted, nil)
	body := pack(t, config)
	for _, tt := range []struct {
		id    string
		steps []func(*solve.Request)
		after []func(*solve.Request)
		ends  bool // with a success
	}{
		{"pushing", []func(*solve.Request){pushing(true)}, []func(*solve.Request){nil}, true},
		{"anew", []func(*solve.Request){pushing(true)}, []func(*solve.Request){pushing(false)}, false},
		{"before", []func(*solve.Request){pushing(true), pushing(false)}, nil, false},
	} {
		sent := f.deliver(t, tt.id, body)
		<-p.began
		for _, do := range tt.steps {
			p.next <- do
		}
		// The build takes the next step only when it has done the one before.
		p.next <- func(*solve.Request) {}
		if rec := f.stop(t, "/builds/"+tt.id, 202); rec.CanceledBy == "" {
			t.Errorf("%s: told to stop: %+v", tt.id, rec)
		}
		for _, do := range tt.after {
			p.next <- do
		}
		a := <-sent
		if tt.ends && (a.status != 200 || a.rec.Digest != "sha256:abc") {
			t.Errorf("%s: %d %s", tt.id, a.status, a.body)
		}
		if !tt.ends {
			wantStopped(t, tt.id, a)
		}
		if _, rec := f.record(t, secret, tt.id); rec.Status == api.Success != tt.ends || rec.CanceledBy != "default" {
			t.Errorf("%s: the record is %+v", tt.id, rec)
		}
	}
}

// TestStopOnce: a DELETE works once, however its signature is written.
func TestStopOnce(t *testing.T) {
	p := inPhases()
	f := start(t, p.scripted, nil)
	body := pack(t, config)
	build := func() <-chan answer {
		sent := make(chan answer, 1)
		go func() { sent <- f.do(t, f.request(t, body, api.CallIDHeader, "call")) }()
		<-p.began
		return sent
	}
	sent := build()
	r := f.asking(t, secret, "DELETE", "/builds/call")
	if a := f.do(t, r); a.status != 202 {
		t.Errorf("%d %s", a.status, a.body)
	}
	wantStopped(t, "the first attempt", <-sent)
	sent = build()
	for range 2 {
		a := f.do(t, r.Clone(t.Context()))
		if a.status != 401 || a.rec.Code != api.Unauthorized || !strings.Contains(a.rec.Error, "works no more") {
			t.Errorf("replayed: %d %s", a.status, a.body)
		}
		r.Header.Set(api.SignatureHeader, "sha256="+strings.ToUpper(strings.TrimPrefix(r.Header.Get(api.SignatureHeader), "sha256=")))
	}
	// Its signature is not good for another method, or for another build.
	for _, target := range []string{"/builds/call?attempt=2", "/builds/other", "/builds/call/log"} {
		again := r.Clone(t.Context())
		again.URL, _ = again.URL.Parse(target)
		if a := f.do(t, again); a.status != 401 && a.status != 405 {
			t.Errorf("for %s: %d %s", target, a.status, a.body)
		}
	}
	old := strconv.FormatInt(time.Now().Add(-6*time.Minute).Unix(), 10)
	late := f.asking(t, secret, "DELETE", "/builds/call", api.TimestampHeader, old, api.SignatureHeader, signature.Sign([]byte(secret), signature.Timestamp(old), []byte("DELETE /builds/call")))
	if a := f.do(t, late); a.status != 401 {
		t.Errorf("an old one: %d %s", a.status, a.body)
	}
	p.next <- nil
	if a := <-sent; a.status != 200 {
		t.Errorf("the second attempt: %d %s", a.status, a.body)
	}
}

// TestLeavingIsNotFinal: unlike a DELETE, a caller that leaves lets the next delivery build.
func TestLeavingIsNotFinal(t *testing.T) {
	p := inPhases()
	f := start(t, p.scripted, nil)
	body := pack(t, config)
	ctx, leave := context.WithCancel(t.Context())
	left := make(chan struct{})
	go func() {
		defer close(left)
		if res, err := f.Client().Do(f.request(t, body, api.CallIDHeader, "call", api.CallbackHeader, calledBack).WithContext(ctx)); err == nil {
			res.Body.Close()
		}
	}()
	<-p.began
	leave()
	<-left
	eventually(t, "the build ends", func() bool { status, _ := f.record(t, secret, "call"); return status == 200 })
	if _, rec := f.record(t, secret, "call"); rec.Code != api.Canceled || rec.CanceledBy != "" {
		t.Errorf("its caller has left: %+v", rec)
	}
	sent := f.deliver(t, "call", body)
	<-p.began
	p.next <- nil
	if a := <-sent; a.status != 200 {
		t.Errorf("delivered again: %d %s", a.status, a.body)
	}
}

// closing is a store that notes how many builds run at its Close. Its logs end a moment after their
// builds.
type closing struct {
	*memory.Store
	closed chan int // how many builds were running
}

func (c *closing) Close(ctx context.Context) error {
	c.closed <- c.running()
	return c.Store.Close(ctx)
}

func (c *closing) Follow(ctx context.Context, ref records.Ref, after uint64, wait bool) iter.Seq2[records.Line, error] {
	return func(yield func(records.Line, error) bool) {
		c.Store.Follow(ctx, ref, after, wait)(yield)
		time.Sleep(20 * time.Millisecond)
		if ctx.Err() != nil {
			yield(records.Line{}, context.Cause(ctx))
		}
	}
}

func (c *closing) running() int {
	page, _ := c.List(context.Background(), records.Query{Operator: true, Status: api.InProgress, Limit: records.MaxPage})
	return len(page.Builds)
}

// TestShutdownEndsRecords: every record has a verdict when the store is closed, and whoever reads a
// log then has read all of it.
func TestShutdownEndsRecords(t *testing.T) {
	p := inPhases()
	store := &closing{memory.New(memory.Default), make(chan int, 1)}
	f := start(t, p.scripted, func(c *server.Config) {
		c.MaxBuilds, c.Records, c.ShutdownTimeout = 1, store, 300*time.Millisecond
	})
	body := pack(t, config)
	running, waiting := f.deliver(t, "running", body), f.deliver(t, "waiting", pack(t, config, "context/x", "y"))
	<-p.began
	eventually(t, "both have records", func() bool { return store.running() == 2 })
	follow := make(chan answer, 1)
	ids := []string{"running", "waiting"}
	if status, rec := f.record(t, secret, "running"); status != 202 || rec.Lines == 0 {
		ids[0], ids[1] = ids[1], ids[0] // the other was first
	}
	go func() { follow <- f.do(t, f.asking(t, secret, "GET", "/builds/"+ids[0]+"/log?follow=1")) }()
	eventually(t, "the log is followed", func() bool { return strings.Contains(f.metrics(t), "builder_log_followers 1\n") })
	for i, id := range ids {
		rec, err := store.Get(t.Context(), records.Ref{Tenant: server.Owner([]byte(secret)), ID: id})
		if err != nil || rec.Building != (i == 0) || (rec.Daemon == "tcp://daemon:1" && rec.Ref == "ref") != (i == 0) {
			t.Errorf("%s: %+v, %v", id, rec, err)
		}
	}
	f.s.Shutdown()
	if n := <-store.closed; n != 0 {
		t.Errorf("%d builds run when the store is closed", n)
	}
	for _, a := range []answer{<-running, <-waiting} {
		if a.status != 503 || a.rec.Code != api.ShuttingDown {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
	for _, id := range ids {
		rec, err := store.Get(t.Context(), records.Ref{Tenant: server.Owner([]byte(secret)), ID: id})
		if err != nil || rec.Code != api.ShuttingDown || rec.Ended.IsZero() {
			t.Errorf("%s: %+v, %v", id, rec, err)
		}
	}
	if a := <-follow; a.status != http.StatusOK || a.rec.Code != api.ShuttingDown {
		t.Errorf("whoever reads the log is told %d %s", a.status, a.body)
	}
}
