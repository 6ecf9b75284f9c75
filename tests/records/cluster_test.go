package records

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	js "github.com/nats-io/nats.go/jetstream"

	"handler/function/records"
	"handler/function/records/jetstream"
	"handler/function/records/recordstest"
	"handler/function/tests/stack"
)

// TestPartition cuts one replica off. The others find its build lost. When it is back, it is
// still there.
func TestPartition(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{})
	link := stack.NewLink(t, strings.TrimPrefix(servers[0].URL, "nats://"))
	a := opened(t, servers, func(o *jetstream.Options) { o.URL = "nats://" + link.Addr })
	b := opened(t, servers, nil)
	l := run(a, "one")
	other := run(b, "other")
	recordstest.Known(t, b, l.ref, recordstest.Any)
	recordstest.Known(t, a, other.ref, recordstest.Any)
	f, g := follow(t, b, l.ref), follow(t, a, other.ref)
	time.Sleep(time.Second)
	link.Cut(true)
	cut := time.Now()
	recordstest.Known(t, b, l.ref, isLost)
	t.Logf("found lost after %v", time.Since(cut))
	if took := time.Since(cut); took > lostWithin {
		t.Errorf("it was found lost after %v", took)
	}
	if page, err := a.List(recordstest.Context(t), records.Query{Tenant: "acme", Limit: 10}); err != nil || page.Complete || len(page.Builds) != 1 {
		t.Errorf("the list of the replica that is cut off is %+v, %v", page, err)
	}
	if load := a.Elsewhere(); load.Complete {
		t.Errorf("its load is %+v", load)
	}
	<-f.done // it ended with the lost build
	link.Cut(false)
	healed := time.Now()
	recordstest.Known(t, b, l.ref, isRunning)
	t.Logf("it runs again %v after the cut", time.Since(healed))
	again := follow(t, b, l.ref)
	recordstest.Known(t, a, other.ref, isRunning)
	time.Sleep(time.Second)
	l.end()
	other.end()
	recordstest.Known(t, b, l.ref, isSuccess)
	recordstest.Known(t, a, other.ref, isSuccess)
	again.wait(t, l, false)
	g.wait(t, other, false)
	if n := a.Stats().Lost; n != 0 {
		t.Errorf("the replica that was cut off found %d builds lost", n)
	}
	if l.worst > quick || other.worst > quick {
		t.Errorf("a call took %v, %v", l.worst, other.worst)
	}
}

// TestLeaderKilled kills the leader of the logs' stream three times under two followers. The others
// choose a new one, and the followers go on before the dead server is back. With -timing they go on
// within 15 s. An election alone can take 9 s on a machine that does nothing else.
func TestLeaderKilled(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{Servers: 3})
	a, b := opened(t, servers, nil), opened(t, servers, nil)
	l := run(a, "one")
	recordstest.Known(t, b, l.ref, recordstest.Any)
	followers := []*followed{follow(t, a, l.ref), follow(t, b, l.ref)}
	for range 3 {
		time.Sleep(2 * time.Second)
		n := leader(t, servers, jetstream.LogStream)
		n.Kill()
		during := l.lines() + 1
		for _, f := range followers {
			f.reaches(t, during)
		}
		if err := n.Restart(recordstest.Context(t)); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(5 * time.Second)
	l.end()
	recordstest.Known(t, b, l.ref, isSuccess)
	for _, f := range followers {
		f.wait(t, l, false)
		if *timing && f.silence > 15*time.Second {
			t.Errorf("a follower heard nothing for %v", f.silence)
		}
	}
	t.Logf("the slowest call took %v", l.worst)
	if l.worst > quick {
		t.Errorf("a call took %v", l.worst)
	}
	if n := a.Stats().Lost + b.Stats().Lost; n != 0 {
		t.Errorf("%d builds were found lost", n)
	}
}

// manager returns a connection to the servers' streams.
func manager(t *testing.T, servers []*stack.NATS) js.JetStream {
	t.Helper()
	conn, err := nats.Connect(urls(servers), patient)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	j, err := js.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

// leader returns the server that leads a stream.
func leader(t *testing.T, servers []*stack.NATS, stream string) *stack.NATS {
	t.Helper()
	j := manager(t, servers)
	var found *stack.NATS
	recordstest.Eventually(t, func() error {
		s, err := j.Stream(recordstest.Context(t), stream)
		if err != nil {
			return err
		}
		name := s.CachedInfo().Cluster.Leader
		for _, n := range servers {
			if strings.HasSuffix(n.URL, ":"+strings.TrimPrefix(name, "n")) {
				found = n
				return nil
			}
		}
		return fmt.Errorf("the leader is %q", name)
	})
	return found
}

// TestNodeFrozen freezes the server of a cluster that a replica is connected to. The replica finds
// another one before it is taken for dead. That takes most of the time that it has, so a round in
// which the replica itself stood still says nothing.
func TestNodeFrozen(t *testing.T) {
	t.Parallel()
	for rounds := 1; ; rounds++ {
		lost, still := nodeFrozen(t)
		if lost == 0 {
			return
		}
		if still < quick || rounds == 3 {
			t.Fatalf("round %d: %d builds were found lost, and the replica stood still for %v at most", rounds, lost, still)
		}
		t.Logf("round %d: %d builds were found lost, of a replica that stood still for %v", rounds, lost, still)
	}
}

// nodeFrozen is a round of TestNodeFrozen. It returns how many builds were found lost, and the longest
// time for which this process, which has the replicas, stood still.
func nodeFrozen(t *testing.T) (lost uint64, still time.Duration) {
	servers := start(t, stack.NATSConfig{Servers: 3})
	first := func(i int) func(*jetstream.Options) {
		return func(o *jetstream.Options) {
			o.URL = urls([]*stack.NATS{servers[i], servers[(i+1)%3], servers[(i+2)%3]})
			o.NATS = append(o.NATS, nats.DontRandomize())
		}
	}
	a, b := opened(t, servers, first(0)), opened(t, servers, first(1))
	l := run(a, "one")
	recordstest.Known(t, b, l.ref, recordstest.Any)
	f := follow(t, b, l.ref)
	time.Sleep(time.Second)
	if err := servers[0].Freeze(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(25 * time.Second)
	reachable(t, a)
	rec := recordstest.Known(t, b, l.ref, recordstest.Any)
	if err := servers[0].Thaw(); err != nil {
		t.Fatal(err)
	}
	l.end()
	if lost = a.Stats().Lost + b.Stats().Lost; lost > 0 {
		return lost, l.ran.longest()
	}
	if !rec.Running() {
		t.Errorf("the build is %+v", rec)
	}
	recordstest.Known(t, b, l.ref, isSuccess)
	f.wait(t, l, false)
	t.Logf("the slowest call took %v", l.worst)
	if l.worst > quick {
		t.Errorf("a call took %v", l.worst)
	}
	return a.Stats().Lost + b.Stats().Lost, l.ran.longest()
}

// TestAllFrozen freezes all servers of a cluster for 30 s. A replica goes from one to the next, and
// is connecting nearly all the time. No call of a build waits for it.
func TestAllFrozen(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{Servers: 3})
	a, b := opened(t, servers, nil), opened(t, servers, nil)
	loads := []*load{run(a, "before")}
	recordstest.Known(t, b, loads[0].ref, isRunning)
	for _, n := range servers {
		if err := n.Freeze(); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 30 {
		loads = append(loads, run(a, fmt.Sprintf("during-%d", i)))
		time.Sleep(time.Second)
	}
	for _, n := range servers {
		if err := n.Thaw(); err != nil {
			t.Fatal(err)
		}
	}
	reachable(t, a)
	for _, l := range loads {
		l.end()
		recordstest.Known(t, b, l.ref, isSuccess)
		if l.worst > quick {
			t.Errorf("a call of %s took %v", l.ref.ID, l.worst)
		}
	}
}
