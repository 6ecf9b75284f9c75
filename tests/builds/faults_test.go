package builds

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"syscall"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestOwnerKilled kills the replica that builds. The others say so, once.
func TestOwnerKilled(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{})
	c := h.replica(t)
	for _, f := range []*stack.Function{h.a, h.b, c} {
		connected(t, &f.Client)
	}
	m := mark()
	request := body(t, h.a, m, "FROM busybox", held(m))
	cut := stack.Later(t, func(ctx context.Context) (error, error) {
		_, err := h.a.Post(ctx, request, client.Accept(client.NDJSON), delivery(m))
		return err, nil
	})
	waitStep(t, m)
	begun, atB := follow(t, &h.b.Client, m, "follow=1")
	<-begun
	// Its beginning is in the store, so the log of the dead can be read.
	sofar := h.b.MustReadLog(t, within(t), m, "").Texts()
	if err := h.a.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	killed := time.Now()
	if err := cut(); err == nil {
		t.Error("the caller of the dead replica got an answer")
	}
	h.b.MustStop(t, within(t), m).WantFailed(t, "owner_unreachable")

	lost, _ := waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Status == "failed" })
	took := time.Since(killed)
	t.Logf("lost after %v", took)
	if lost.Code != "lost" || lost.StatusCode != http.StatusOK || lost.Build.CanceledBy != "" {
		t.Errorf("it is %v", lost)
	}
	if took > 40*time.Second {
		t.Errorf("lost after %v, want 20s", took)
	}
	l := atB()
	if l.Code != "lost" || !slices.Equal(l.Texts()[:len(sofar)], sofar) {
		t.Errorf("the follower: %v, %q", l.Answer, l.Texts())
	}
	// Both who are left might have said so, and one has. The record is the same at both, and stays.
	said := func() error {
		times := 0.0
		for _, f := range []*stack.Function{h.b, c} {
			n, err := f.Metric("builder_builds_lost_total")
			if err != nil {
				return err
			}
			times += n
		}
		if times != 1 {
			return fmt.Errorf("it was found lost %v times", times)
		}
		return nil
	}
	stack.Eventually(t, patience, said) // the record comes before the metric
	for range 3 {
		for _, f := range []*stack.Function{h.b, c} {
			waited, _ := waitRecord(t, &f.Client, m, func(a client.Answer) bool { return a.Code != "records_unreachable" })
			b := waited.Build
			if b.Code != "lost" || b.Attempt != 1 || !b.Ended.Equal(lost.Build.Ended) {
				t.Errorf("it became %+v, want %+v", b, lost.Build)
			}
			if list := completeList(t, &f.Client, "status=failed"); len(list.Builds) != 1 || list.Builds[0].Code != "lost" {
				t.Errorf("listed: %+v", list)
			}
			if list := completeList(t, &f.Client, "status=in_progress"); len(list.Builds) != 0 {
				t.Errorf("still running: %+v", list)
			}
		}
		time.Sleep(500 * time.Millisecond)
	}
	if a := stop(t, &h.b.Client, m, http.StatusOK); a.Code != "lost" {
		t.Errorf("stopping a lost build: %v", a)
	}
	// Its daemon has ended the step, as it does for a client that has left. A delivery builds.
	waitGone(t, m)
	again := background(t, &c.Client, request, delivery(m))
	waitStep(t, m)
	release(t, m)
	again().WantSuccess(t)
	if b, _ := waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Status == "success" }); b.Build.Attempt != 2 {
		t.Errorf("built again: %+v", b.Build)
	}
	if err := said(); err != nil {
		t.Errorf("at the end: %v", err)
	}
}

// TestOwnerFrozen stops the replica that builds until it is lost, and lets it go on: its own
// verdict is the one that counts.
func TestOwnerFrozen(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	m := mark()
	built := background(t, &h.a.Client, body(t, h.a, m, "FROM busybox", held(m), "RUN echo thawed; : "+m), named(m))
	waitStep(t, m)
	begun, followed := follow(t, &h.b.Client, m, "follow=1")
	<-begun
	if err := h.a.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	_, took := waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Code == "lost" })
	t.Logf("lost after %v", took)
	if l := followed(); l.Code != "lost" || len(l.Lines) == 0 {
		t.Errorf("who followed it until then: %v, %q", l.Answer, l.Texts())
	}
	if err := h.a.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	release(t, m)
	a := built()
	a.WantSuccess(t)
	b, _ := waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Status == "success" })
	if b.Digest != a.Digest || b.Build.Attempt != 1 {
		t.Errorf("its record is %+v", b.Build)
	}
	wantSame(t, "the log", h.b.MustReadLog(t, within(t), m, "follow=1").Texts(), a.Log)
}

// TestStopFrozen has a build stopped whose replica is frozen. Whoever asks is told in time, and the
// build is as it was until the replica goes on.
func TestStopFrozen(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	m := mark()
	built := background(t, &h.a.Client, body(t, h.a, m, "FROM busybox", held(m)), named(m))
	waitStep(t, m)
	waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Status == "in_progress" })
	frozen := time.Now()
	if err := h.a.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	a := h.b.MustStop(t, within(t), m)
	a.WantFailed(t, "owner_unreachable")
	t.Logf("answered after %v", a.Took)
	if a.Took > stopWithin {
		t.Errorf("answered after %v", a.Took)
	}
	if b := record(t, &h.b.Client, m); b.CanceledBy != "" || b.Status != "in_progress" && time.Since(frozen) < lostAfter {
		t.Errorf("meanwhile: %+v", b)
	}
	if len(stack.Sleepers(t, m)) == 0 {
		t.Error("the step has ended")
	}
	// The request waits for the replica.
	if err := h.a.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	waitGone(t, m)
	if a := built(); a.Code != "canceled" {
		t.Errorf("its caller was told %v", a)
	}
	b, _ := waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Status == "failed" })
	wantStopped(t, b.Build, "default")
}

// lostAfter is how soon after a freeze a replica's builds may be found lost: after a silence of 10 s,
// which began with its latest heartbeat, up to 2 s before.
const lostAfter = 8 * time.Second

// stopWithin is how long an answer to DELETE may take: the 5 s that the function gives the store,
// and as much as a busy machine takes. A frozen replica stays frozen for longer.
const stopWithin = 5*time.Second + patience/4

// TestNATSKilled kills the server under a build. Its caller notices nothing.
func TestNATSKilled(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	m, n := mark(), mark()
	built := background(t, &h.a.Client, body(t, h.a, m, "FROM busybox", held(m), "RUN seq 1 500; : "+m), named(m))
	waitStep(t, m)
	begun, followed := follow(t, &h.b.Client, m, "follow=1")
	<-begun
	h.nats.Kill()

	stack.Eventually(t, patience, func() error {
		if l := h.b.MustList(t, within(t), ""); l.Complete || len(l.Builds) != 0 {
			return fmt.Errorf("who has no build lists %+v", l)
		}
		return nil
	})
	if l := h.a.MustList(t, within(t), ""); l.Complete || len(l.Builds) != 1 || l.Builds[0].ID != m {
		t.Errorf("who has the build lists %+v", l)
	}
	h.b.MustVerdict(t, within(t), m).WantFailed(t, "records_unreachable")
	h.b.MustStop(t, within(t), m).WantFailed(t, "records_unreachable")
	refused, err := h.b.ReadLog(within(t), m, "follow=1", nil)
	if err != nil {
		t.Fatal(err)
	}
	refused.WantFailed(t, "records_unreachable")
	// The owner needs no store, neither for a record nor to stop.
	if b := record(t, &h.a.Client, m); b.Status != "in_progress" {
		t.Errorf("the owner's record is %+v", b)
	}
	stopped := background(t, &h.a.Client, body(t, h.a, n, "FROM busybox", held(n)), named(n))
	waitStep(t, n)
	if a := h.a.MustStop(t, within(t), n); a.StatusCode != http.StatusAccepted {
		t.Errorf("stopping at the owner: %v", a)
	}
	if a := stopped(); a.Code != "canceled" {
		t.Errorf("its caller was told %v", a)
	}
	release(t, m)
	a := built()
	a.WantSuccess(t)

	// All of it is in the store once there is one again.
	if err := h.nats.Restart(within(t)); err != nil {
		t.Fatal(err)
	}
	b, took := waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Status == "success" })
	t.Logf("known to the other replica %v after the server was back", took)
	if b.Digest != a.Digest || b.Build.Lines != uint64(len(a.Log)) {
		t.Errorf("its record is %+v", b.Build)
	}
	wantSame(t, "the log", h.b.MustReadLog(t, within(t), m, "").Texts(), a.Log)
	l := followed()
	wantSame(t, "who has followed it all the time", l.Texts(), a.Log)
	if l.Digest != a.Digest {
		t.Errorf("who has followed it all the time: %v", l.Answer)
	}
	s, _ := waitRecord(t, &h.b.Client, n, func(a client.Answer) bool { return a.Status == "failed" })
	wantStopped(t, s.Build, "default")
	connected(t, &h.b.Client)
}
