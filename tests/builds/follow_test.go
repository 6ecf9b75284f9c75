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
	waitRecord(t, &h.b.Client, m, func(a client.Answer) bool {
		return a.Status == "in_progress" && a.Build.Attempt == 1 && !a.Build.Queued && a.Image == h.a.Images+"/"+strings.ToLower(m)+":v1"
	})

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
	// These are compared as they came: to decode each line of them takes a busy machine minutes.
	plain := func(ctx context.Context) (string, error) {
		req, err := h.b.Ask(ctx, http.MethodGet, "/builds/"+m+"/log?follow=1")
		if err != nil {
			return "", err
		}
		a, err := h.b.Fetch(req)
		return strings.ReplaceAll(a.Body, "{\"status\":\"in_progress\"}\n", ""), err // heartbeats
	}
	var others []func() string
	for range 6 {
		time.Sleep(150 * time.Millisecond)
		others = append(others, stack.Later(t, plain))
	}
	a := built()
	a.WantSuccess(t)
	if len(a.Log) < 100000 {
		t.Fatalf("the caller saw %d lines", len(a.Log))
	}
	l := first()
	wantSame(t, "a follower", l.Texts(), a.Log)
	if l.Status != "success" || l.Build.Lines != uint64(len(a.Log)) {
		t.Errorf("the record at the end is %+v", l.Build)
	}
	later, err := plain(within(t))
	if err != nil || strings.Count(later, "\n") != len(a.Log)+1 {
		t.Fatalf("afterwards the log has %d lines, %v", strings.Count(later, "\n"), err)
	}
	for i, wait := range others {
		if got := wait(); got != later {
			t.Errorf("follower %d has %d lines, and they are not those that are read afterwards: %.200q", i, strings.Count(got, "\n"), got)
		}
	}
}
