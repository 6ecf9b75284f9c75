package builds

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestNATSWiped has the server come back without what it had, under a build. The build is known
// again. What is gone is not, and readers of the log are told.
func TestNATSWiped(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	gone, m := mark(), mark()
	h.a.MustPost(t, within(t), body(t, h.a, gone, "FROM busybox", "RUN : "+gone), client.Accept(client.NDJSON), named(gone)).WantSuccess(t)
	waitRecord(t, &h.b.Client, gone, func(a client.Answer) bool { return a.Status == "success" })
	built := background(t, &h.a.Client, body(t, h.a, m, "FROM busybox", "RUN seq 1 100; : "+m, held(m), "RUN seq 101 200; : "+m), named(m))
	waitStep(t, m)
	stack.Eventually(t, patience, func() error {
		if l := h.b.MustReadLog(t, within(t), m, ""); !slices.Contains(l.Texts(), "l: 100") {
			return fmt.Errorf("the log so far is %q", l.Texts())
		}
		return nil
	})
	h.nats.Kill()
	if err := h.nats.Wipe(); err != nil {
		t.Fatal(err)
	}
	if err := h.nats.Restart(within(t)); err != nil {
		t.Fatal(err)
	}
	b, took := waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Status == "in_progress" })
	t.Logf("known again %v after the server was back", took)
	if b.Build.Attempt != 1 || b.StatusCode != http.StatusAccepted {
		t.Errorf("its record is %+v", b.Build)
	}
	connected(t, &h.b.Client)
	for _, f := range []*stack.Function{h.a, h.b} {
		f.MustVerdict(t, within(t), gone).WantFailed(t, "not_found")
		f.MustStop(t, within(t), gone).WantFailed(t, "not_found")
		f.MustReadLog(t, within(t), gone, "").WantFailed(t, "not_found")
		if l := f.MustList(t, within(t), ""); len(l.Builds) != 1 || l.Builds[0].ID != m {
			t.Errorf("listed: %+v", l)
		}
	}
	release(t, m)
	a := built()
	a.WantSuccess(t)
	waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Status == "success" })
	l := h.b.MustReadLog(t, within(t), m, "follow=1")
	if l.Digest != a.Digest || l.Build.Lines != uint64(len(a.Log)) {
		t.Errorf("the record at the end is %+v", l.Build)
	}
	if len(l.Lines) == 0 || l.Lines[0].Lost < 100 {
		t.Fatalf("the log does not begin with a gap: %q", l.Texts())
	}
	wantSame(t, "after the gap", l.Texts()[1:], a.Log[l.Lines[0].N:])
	if n, err := h.b.Metric("builder_log_gaps_total"); err != nil || n < 1 {
		t.Errorf("%v gaps are counted, %v", n, err)
	}
}

// TestNATSTooSmall has a server without room for the records. A replica knows its own builds.
func TestNATSTooSmall(t *testing.T) {
	t.Parallel()
	h := newHouseOn(t, stack.NATSConfig{MaxFile: "1MB"}, stack.FunctionConfig{})
	ownOnly(t, h, func() {}, unknown)
	if l := h.a.MustList(t, within(t), ""); l.Complete {
		t.Errorf("the list is complete: %+v", l)
	}
}

// TestNATSFull fills the server's disk under a build, and keeps it full: a server makes room when it
// removes what it could not store whole, and would take one record more.
func TestNATSFull(t *testing.T) {
	t.Parallel()
	h := newHouseOn(t, stack.NATSConfig{Disk: "24m"}, stack.FunctionConfig{})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	for i := range 10 {
		// 6 MB, in lines of 10 kB.
		m := mark()
		h.a.MustPost(t, within(t), body(t, h.a, m, "FROM busybox", `RUN x=$(head -c 10000 /dev/zero | tr '\0' x); for i in $(seq 1 600); do echo "$i $x"; done; : `+m), client.Accept(client.NDJSON)).WantSuccess(t)
		if up, err := h.a.Metric("builder_records_reachable"); err != nil || up == 0 {
			t.Logf("it was full after %d builds, %v", i+1, err)
			break
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	filled := make(chan error, 1)
	go func() { filled <- h.nats.FillDisk(ctx) }()
	defer func() {
		cancel()
		if err := <-filled; err != nil {
			t.Errorf("keeping the disk full: %v", err)
		}
	}()
	// What has room on the last page of a file is still stored.
	another := func() {
		m := mark()
		h.a.MustPost(t, within(t), body(t, h.a, m, "FROM busybox", "RUN : "+m), client.Accept(client.NDJSON)).WantSuccess(t)
	}
	ownOnly(t, h, another, func(t *testing.T, c *client.Client, id string) {
		// Some records still find room, and others do not: who does not find a build does not say
		// that there is none.
		for _, id := range []string{id, mark()} {
			if a := c.MustVerdict(t, within(t), id); a.StatusCode != http.StatusAccepted {
				a.WantFailed(t, "records_unreachable")
			}
		}
	})
	pending, err := h.a.Metric("builder_records_pending_bytes")
	if err != nil || pending == 0 || pending > 8<<20 {
		t.Errorf("%v bytes wait for the store, %v", pending, err)
	}
}

// ownOnly has a replica build whose server takes no records. Builds are as ever, their replica
// knows them, and the other one says that it does not know all. another is called until the server
// takes no record. others asks the other replica for a build.
func ownOnly(t *testing.T, h *house, another func(), others func(t *testing.T, c *client.Client, id string)) {
	t.Helper()
	m, n := mark(), mark()
	built := background(t, &h.a.Client, body(t, h.a, m, "FROM busybox", held(m), "RUN seq 1 500; : "+m), named(m))
	stopped := background(t, &h.a.Client, body(t, h.a, n, "FROM busybox", held(n)), named(n))
	waitStep(t, m)
	waitStep(t, n)
	stack.Eventually(t, patience, func() error {
		if l := h.b.MustList(t, within(t), "limit=1"); l.Complete {
			another()
			return fmt.Errorf("the other replica's list is complete: %+v", l)
		}
		return nil
	})
	others(t, &h.b.Client, m)
	if b := record(t, &h.a.Client, m); b.Status != "in_progress" {
		t.Errorf("its own replica has the record %+v", b)
	}
	for _, id := range []string{m, n} {
		l := h.a.MustList(t, within(t), "status=in_progress")
		if !slices.ContainsFunc(l.Builds, func(b client.Build) bool { return b.ID == id }) {
			t.Errorf("its own replica does not list %s: %+v", id, l)
		}
	}
	if a := h.a.MustStop(t, within(t), n); a.StatusCode != http.StatusAccepted {
		t.Errorf("stopping at its own replica: %v", a)
	}
	waitGone(t, n)
	if a := stopped(); a.Code != "canceled" {
		t.Errorf("its caller was told %v", a)
	}
	release(t, m)
	a := built()
	a.WantSuccess(t)
	if b := record(t, &h.a.Client, m); b.Digest != a.Digest || b.Lines != uint64(len(a.Log)) {
		t.Errorf("its own replica has the record %+v", b)
	}
}

// unknown wants a replica to say of a build of another that it cannot know.
func unknown(t *testing.T, c *client.Client, id string) {
	t.Helper()
	c.MustVerdict(t, within(t), id).WantFailed(t, "records_unreachable")
	c.MustStop(t, within(t), id).WantFailed(t, "records_unreachable")
	c.MustReadLog(t, within(t), id, "follow=1").WantFailed(t, "records_unreachable")
	if l := c.MustList(t, within(t), ""); l.Complete || slices.ContainsFunc(l.Builds, func(b client.Build) bool { return b.ID == id }) {
		t.Errorf("it lists %+v", l)
	}
}

// TestPartition cuts one replica off from the server while both have builds. The other finds the
// build of the replica lost, until the way is open again.
func TestPartition(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{})
	link := stack.NewLink(t, strings.TrimPrefix(h.nats.URL, "nats://"))
	h.config.Env["nats_url"] = "nats://" + link.Addr
	cut := h.replica(t)
	connected(t, &cut.Client)
	connected(t, &h.b.Client)
	m, n := mark(), mark()
	built := background(t, &cut.Client, body(t, h.a, m, "FROM busybox", held(m), "RUN seq 1 500; : "+m), named(m))
	other := background(t, &h.b.Client, body(t, h.a, n, "FROM busybox", held(n), "RUN seq 1 500; : "+n), named(n))
	waitStep(t, m)
	waitStep(t, n)
	waitRecord(t, &cut.Client, n, func(a client.Answer) bool { return a.Status == "in_progress" })
	begun, followed := follow(t, &h.b.Client, m, "follow=1")
	<-begun
	link.Cut(true)

	h.b.MustStop(t, within(t), m).WantFailed(t, "owner_unreachable")
	_, took := waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Code == "lost" })
	t.Logf("lost after %v", took)
	if l := followed(); l.Code != "lost" {
		t.Errorf("the follower: %v", l.Answer)
	}
	if l := completeList(t, &h.b.Client, "status=in_progress"); len(l.Builds) != 1 || l.Builds[0].ID != n {
		t.Errorf("who is not cut off lists %+v", l)
	}
	unknown(t, &cut.Client, n)
	if b := record(t, &cut.Client, m); b.Status != "in_progress" {
		t.Errorf("who is cut off has its own record as %+v", b)
	}
	if n, err := cut.Metric("builder_builds_lost_total"); err != nil || n != 0 {
		t.Errorf("who is cut off has found %v builds lost, %v", n, err)
	}
	release(t, n)
	a := other()
	a.WantSuccess(t)

	link.Cut(false)
	_, took = waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Status == "in_progress" })
	t.Logf("it runs again %v after the cut", took)
	waitRecord(t, &cut.Client, n, func(b client.Answer) bool { return b.Digest == a.Digest })
	_, followed = follow(t, &h.b.Client, m, "follow=1")
	release(t, m)
	a = built()
	a.WantSuccess(t)
	l := followed()
	wantSame(t, "the follower", l.Texts(), a.Log)
	if l.Digest != a.Digest || l.Build.Attempt != 1 {
		t.Errorf("the record at the end is %+v", l.Build)
	}
	connected(t, &cut.Client)
	if l := cut.MustList(t, within(t), "status=success"); len(l.Builds) != 2 {
		t.Errorf("afterwards: %+v", l)
	}
}

// TestLostWhilePartitioned ends a build while its replica is cut off: its verdict comes late, and
// counts.
func TestLostWhilePartitioned(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{})
	link := stack.NewLink(t, strings.TrimPrefix(h.nats.URL, "nats://"))
	h.config.Env["nats_url"] = "nats://" + link.Addr
	cut := h.replica(t)
	connected(t, &cut.Client)
	connected(t, &h.b.Client)
	m := mark()
	built := background(t, &cut.Client, body(t, h.a, m, "FROM busybox", held(m), "RUN seq 1 500; : "+m), named(m))
	waitStep(t, m)
	waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Status == "in_progress" })
	link.Cut(true)
	release(t, m)
	a := built()
	a.WantSuccess(t)
	waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Code == "lost" })
	began := time.Now()
	link.Cut(false)
	b, _ := waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Status == "success" })
	t.Logf("its verdict was there %v after the cut", time.Since(began))
	if b.Digest != a.Digest || b.Build.Attempt != 1 {
		t.Errorf("its record is %+v", b.Build)
	}
	wantSame(t, "the log", h.b.MustReadLog(t, within(t), m, "follow=1").Texts(), a.Log)
}
