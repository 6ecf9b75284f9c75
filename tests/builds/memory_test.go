package builds

import (
	"net/http"
	"slices"
	"testing"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestMemory has one replica without a server for its records, which is started again.
func TestMemory(t *testing.T) {
	t.Parallel()
	s, f := stack.Test(t, stack.FunctionConfig{})
	ctx := within(t)
	m, n := mark(), mark()
	built := background(t, &f.Client, body(t, f, m, "FROM busybox", held(m)), delivery(m))
	s.Buildkitd.WaitStep(t, m)
	stopped := background(t, &f.Client, body(t, f, n, "FROM busybox", held(n)), named(n))
	s.Buildkitd.WaitStep(t, n)
	begun, followed := follow(t, &f.Client, m, "follow=1", client.Accept(client.SSE))
	<-begun
	if a := f.MustStop(t, ctx, n); a.StatusCode != http.StatusAccepted {
		t.Errorf("stopping: %v", a)
	}
	if a := stopped(); a.Code != "canceled" {
		t.Errorf("its caller was told %v", a)
	}
	release(t, m)
	a := built()
	a.WantSuccess(t)
	l := followed()
	wantSame(t, "the follower", l.Texts(), a.Log)
	wantSame(t, "later", f.MustReadLog(t, ctx, m, "").Texts(), a.Log)
	if l.Build.Digest != a.Digest || !l.Build.Queued {
		t.Errorf("the record at the end is %+v", l.Build)
	}
	wantStopped(t, record(t, &f.Client, n), "default")
	// It cannot know whether there are other replicas.
	var ids []string
	list := f.MustList(t, ctx, "")
	for _, b := range list.Builds {
		ids = append(ids, b.ID)
	}
	if list.Complete || !slices.Equal(ids, []string{n, m}) {
		t.Errorf("listed: %+v", list)
	}

	// What it forgets with its process, a daemon knows of queued builds.
	f.Kill()
	_, g := stack.Test(t, stack.FunctionConfig{})
	if l := g.MustList(t, ctx, ""); l.Complete || len(l.Builds) != 0 {
		t.Errorf("after a restart: %+v", l)
	}
	if b := g.MustVerdict(t, ctx, m); b.StatusCode != http.StatusOK || b.Status != "success" || b.Digest != a.Digest {
		t.Errorf("after a restart, a queued build: %v", b)
	}
	g.MustVerdict(t, ctx, n).WantFailed(t, "not_found")
	g.MustReadLog(t, ctx, m, "").WantFailed(t, "not_found")
	if a := g.MustStop(t, ctx, m); a.StatusCode != http.StatusOK || a.Digest == "" {
		t.Errorf("stopping what has ended: %v", a)
	}
	g.MustStop(t, ctx, n).WantFailed(t, "not_found")
}
