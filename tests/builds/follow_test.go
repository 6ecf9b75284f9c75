package builds

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestFollow has one replica build, and reads the log from the other.
func TestFollow(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	m := mark()
	// The word before the held step comes before it is released, the others afterwards.
	request := body(t, h.a, m, "FROM busybox", "RUN echo before", held(m), "RUN seq 1 2000; echo ümlaut; printf 'no newline'; : "+m)
	built := background(t, &h.a.Client, request, named(m))
	waitStep(t, m)
	if b := record(t, &h.b.Client, m); b.Status != "in_progress" || b.Attempt != 1 || b.Queued || b.Image != h.a.Images+"/"+strings.ToLower(m)+":v1" {
		t.Errorf("meanwhile: %+v", b)
	}

	begun, plain := follow(t, &h.b.Client, m, "follow=1")
	_, events := follow(t, &h.b.Client, m, "follow=1", client.Accept(client.SSE))
	<-begun
	sofar := h.b.MustReadLog(t, within(t), m, "")
	if sofar.Status != "in_progress" || len(sofar.Lines) == 0 {
		t.Errorf("without following: %v", sofar.Answer)
	}
	// The line is in the store soon, not at once.
	stack.Eventually(t, patience, func() error {
		if sofar = h.b.MustReadLog(t, within(t), m, ""); !slices.Contains(sofar.Texts(), "l: before") {
			return fmt.Errorf("the log so far is %q", sofar.Texts())
		}
		return nil
	})
	release(t, m)

	a := built()
	a.WantSuccess(t)
	for name, l := range map[string]client.Log{
		"ndjson": plain(), "events": events(),
		"later":                 h.b.MustReadLog(t, within(t), m, ""),
		"later, from its own":   h.a.MustReadLog(t, within(t), m, "follow=1"),
		"later, as one attempt": h.b.MustReadLog(t, within(t), m, "attempt=1", client.Accept(client.SSE)),
	} {
		wantSame(t, name, l.Texts(), a.Log)
		b := l.Build
		if b.Status != "success" || b.Digest != a.Digest || b.ID != m || b.Lines != uint64(len(a.Log)) || b.Request != a.Request || b.Attempt != 1 {
			t.Errorf("%s: the record at the end is %+v", name, b)
		}
	}
	t.Logf("attached after %v", plain().First)
	if !slices.Contains(a.Log, "l: ümlaut") || !slices.Contains(a.Log, "l: no newline") {
		t.Errorf("the log lacks lines: %q", a.Log[max(0, len(a.Log)-20):])
	}

	// The second half, by both ways of asking for it.
	half := len(a.Log) / 2
	wantSame(t, "after=", h.b.MustReadLog(t, within(t), m, fmt.Sprintf("after=%d", half)).Texts(), a.Log[half:])
	wantSame(t, "Last-Event-ID", h.b.MustReadLog(t, within(t), m, "follow=1", client.Accept(client.SSE),
		client.Header("Last-Event-ID", fmt.Sprint(half))).Texts(), a.Log[half:])
	if l := h.b.MustList(t, within(t), "status=success&image="+h.a.Images+"/"+strings.ToLower(m)); !l.Complete || len(l.Builds) != 1 || l.Builds[0].Digest != a.Digest {
		t.Errorf("listed: %+v", l)
	}
}

// TestFollowMany attaches at several moments of a build that prints 1e5 lines.
func TestFollowMany(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	m := mark()
	request := body(t, h.a, m, "FROM busybox", held(m), "RUN seq 1 100000; : "+m)
	built := background(t, &h.a.Client, request, named(m))
	waitStep(t, m)
	begun, first := follow(t, &h.b.Client, m, "follow=1")
	<-begun
	release(t, m)
	logs := []func() client.Log{first}
	for range 6 {
		time.Sleep(150 * time.Millisecond)
		_, wait := follow(t, &h.b.Client, m, "follow=1")
		logs = append(logs, wait)
	}
	a := built()
	a.WantSuccess(t)
	if len(a.Log) < 100000 {
		t.Fatalf("the caller saw %d lines", len(a.Log))
	}
	for i, wait := range logs {
		l := wait()
		wantSame(t, fmt.Sprintf("follower %d", i), l.Texts(), a.Log)
		if l.Status != "success" || l.Build.Lines != uint64(len(a.Log)) {
			t.Errorf("follower %d: the record at the end is %+v", i, l.Build)
		}
	}
}
