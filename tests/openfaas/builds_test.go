package openfaas

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestFollowThroughGateway follows, lists and stops queued builds through the gateway, with the
// query signed as the function sees it.
func TestFollowThroughGateway(t *testing.T) {
	s, _, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true})
	r := newReceiver(t)
	f := function(o)
	ctx := stack.Within(t, 3*time.Minute)
	m := mark()
	id := enqueue(t, o, request(t, s, "followed", "FROM busybox", "RUN echo before", "RUN sleep 600; : "+m, "RUN seq 1 500; : "+m), callbackTo(r))
	s.Buildkitd.WaitStep(t, m)

	// The line before the held step arrives while the step is held.
	live := make(chan struct{})
	type result struct {
		log client.Log
		err error
	}
	ended := make(chan result, 1)
	go func() {
		l, err := f.ReadLog(ctx, id, "follow=1", func(line client.Line) {
			if line.Text == "l: before" {
				close(live)
			}
		}, client.Accept(both))
		ended <- result{l, err}
	}()
	select {
	case <-live:
	case res := <-ended:
		t.Fatalf("the log ended: %v, %v", res.log.Answer, res.err)
	case <-time.After(time.Minute):
		t.Fatal("the gateway passes on no line while the build runs")
	}
	if l := f.MustList(t, ctx, "status=in_progress&image="+s.Registry.Image("followed")); len(l.Builds) != 1 || l.Builds[0].ID != id || !l.Builds[0].Queued {
		t.Errorf("listed: %+v", l)
	}
	stack.Release(t, m, time.Minute)
	c, res := r.next(t), <-ended
	if res.err != nil {
		t.Fatal(res.err)
	}
	if c.Status != "success" || res.log.Digest != c.Digest || !slices.Equal(res.log.Texts(), c.Log) {
		t.Errorf("the callback: %v\nthe log: %v, %q", c, res.log.Answer, res.log.Texts())
	}
	half := len(c.Log) / 2
	for name, change := range map[string]client.Change{"json lines": client.Accept(client.NDJSON), "events": client.Accept(client.SSE)} {
		l := f.MustReadLog(t, ctx, id, "follow=1", change, client.Header("Last-Event-ID", "1"))
		if !slices.Equal(l.Texts(), c.Log[1:]) || l.Digest != c.Digest {
			t.Errorf("%s: %v, %q", name, l.Answer, l.Texts())
		}
	}
	if l := f.MustReadLog(t, ctx, id, fmt.Sprintf("after=%d", half)); !slices.Equal(l.Texts(), c.Log[half:]) {
		t.Errorf("the second half: %q", l.Texts())
	}

	// A follower that leaves cancels nothing, and DELETE does.
	m = mark()
	id = enqueue(t, o, request(t, s, "stopped", "FROM busybox", "RUN sleep 600; : "+m), callbackTo(r))
	s.Buildkitd.WaitStep(t, m)
	left, leave := context.WithCancel(ctx)
	if _, err := f.ReadLog(left, id, "follow=1", func(client.Line) { leave() }, client.Accept(both)); err == nil {
		t.Error("a log that was left has an end")
	}
	leave()
	time.Sleep(time.Second)
	if !s.Buildkitd.Runs(t, m) {
		t.Error("the build ended with its follower")
	}
	if a := f.MustStop(t, ctx, id+"?attempt=1"); a.StatusCode != http.StatusAccepted {
		t.Errorf("stopping: %v", a)
	}
	s.Buildkitd.WaitGone(t, m, time.Minute)
	if c := r.next(t); c.Code != "canceled" || c.StatusCode != http.StatusConflict {
		t.Errorf("the callback: %v", c)
	}
	if v := verdict(t, o, id); v.StatusCode != http.StatusOK || v.Code != "canceled" || v.Build.CanceledBy != "default" {
		t.Errorf("afterwards: %v", v)
	}
}
