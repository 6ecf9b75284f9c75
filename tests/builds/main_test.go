// Package builds follows, stops and finds builds through replicas that do not run them. The
// replicas, their daemons and the NATS server with their records are real, and each of them dies
// once.
package builds

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

func TestMain(m *testing.M) {
	// Most of these tests wait, and need no processor.
	flag.Set("test.parallel", "4")
	stack.Main(m)
}

// Of the kit that all such tests share.
const patience = stack.Patience

var (
	within     = stack.Soon
	mark       = stack.Mark
	held       = stack.Held
	background = stack.Background
)

// pool are three daemons, of all tests. They pass on all that steps print.
var pool struct {
	sync.Mutex
	daemons []*stack.Buildkitd
}

func daemons(t testing.TB) []*stack.Buildkitd {
	t.Helper()
	pool.Lock()
	defer pool.Unlock()
	for len(pool.daemons) < 3 {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		b, err := stack.Shared(t).NewBuildkitd(ctx, stack.BuildkitdConfig{Env: stack.WholeLogs})
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		pool.daemons = append(pool.daemons, b)
	}
	return pool.daemons
}

// house are two replicas with three daemons and one NATS server.
type house struct {
	s       *stack.Stack
	nats    *stack.NATS
	a, b    *stack.Function
	daemons []*stack.Buildkitd
	config  stack.FunctionConfig
}

// newHouse returns a house whose replicas see each other. c changes their configuration.
func newHouse(t testing.TB, c stack.FunctionConfig) *house {
	t.Helper()
	return newHouseOn(t, stack.NATSConfig{}, c)
}

// newHouseOn is newHouse with a server of some kind.
func newHouseOn(t testing.TB, server stack.NATSConfig, c stack.FunctionConfig) *house {
	t.Helper()
	h := &house{s: stack.Shared(t), nats: stack.TestNATS(t, server), daemons: daemons(t), config: c}
	var addrs []string
	for _, b := range h.daemons {
		addrs = append(addrs, b.Addr)
	}
	h.config.Env = map[string]string{"buildkit_addr": strings.Join(addrs, ","), "nats_url": h.nats.URL}
	maps.Copy(h.config.Env, c.Env)
	h.a, h.b = h.replica(t), h.replica(t)
	return h
}

// replica starts another replica.
func (h *house) replica(t testing.TB) *stack.Function {
	t.Helper()
	_, f := stack.Test(t, h.config)
	return f
}

// connected waits until a replica has its store. who may ask it for a list.
func connected(t testing.TB, who *client.Client) {
	t.Helper()
	stack.Eventually(t, patience, func() error {
		l, err := who.Builds(within(t), "")
		if err == nil && !l.Complete {
			err = errors.New("the list is not complete")
		}
		return err
	})
}

// completeList lists builds once the replica can tell all of them. The store has a few seconds, which a
// busy machine may need.
func completeList(t testing.TB, c *client.Client, query string) (l client.List) {
	t.Helper()
	stack.Eventually(t, patience, func() error {
		if l = c.MustList(t, within(t), query); !l.Complete {
			return fmt.Errorf("the list is not complete: %+v", l)
		}
		return nil
	})
	return l
}

// body is a request with a Dockerfile of lines that pushes to a repository of its own.
func body(t testing.TB, f *stack.Function, name string, dockerfile ...string) []byte {
	t.Helper()
	return stack.Body(t, map[string]any{"image": f.Images + "/" + strings.ToLower(name) + ":v1"}, stack.Dockerfile(dockerfile...))
}

func release(t testing.TB, m string) {
	t.Helper()
	stack.Release(t, m, patience)
}

// waitStep returns once a held step sleeps, on whichever daemon.
func waitStep(t testing.TB, m string) {
	t.Helper()
	stack.Eventually(t, patience, func() error {
		if len(stack.Sleepers(t, m)) == 0 {
			return errors.New("the step has not begun")
		}
		return nil
	})
}

// waitGone returns once a held step has no process any more, and how long that took.
func waitGone(t testing.TB, m string) time.Duration {
	t.Helper()
	return stack.Eventually(t, patience, func() error {
		if n := len(stack.Sleepers(t, m)); n > 0 {
			return fmt.Errorf("%d processes of the step are still there", n)
		}
		return nil
	})
}

// named gives a build its id. delivery makes it a delivery of a queue, too.
func named(id string) client.Change    { return client.Header("X-Call-Id", id) }
func delivery(id string) client.Change { return client.Queued(id) }

// follow reads a log in a goroutine until the build has ended. begun is closed with its first line,
// or its end.
func follow(t *testing.T, c *client.Client, id string, query string, changes ...client.Change) (begun <-chan struct{}, wait func() client.Log) {
	t.Helper()
	first := make(chan struct{})
	once := sync.OnceFunc(func() { close(first) })
	return first, stack.Later(t, func(ctx context.Context) (client.Log, error) {
		defer once()
		return c.ReadLog(ctx, id, query, func(client.Line) { once() }, changes...)
	})
}

// record is what a replica knows of a build, with any status.
func record(t testing.TB, c *client.Client, id string) client.Build {
	t.Helper()
	a := c.MustVerdict(t, within(t), id)
	if a.Build.Began.IsZero() {
		t.Fatalf("no record of %s: %v", id, a)
	}
	return a.Build
}

// waitRecord waits until a replica says of a build what is wanted.
func waitRecord(t testing.TB, c *client.Client, id string, is func(client.Answer) bool) (a client.Answer, took time.Duration) {
	t.Helper()
	took = stack.Eventually(t, patience, func() error {
		a = c.MustVerdict(t, within(t), id)
		if !is(a) {
			return fmt.Errorf("%s: %v", id, a)
		}
		return nil
	})
	return a, took
}

// stop has a replica stop a build, and wants an answer with this status. The replica gives the store
// and the owner a second or so, which a busy machine may need. Then it says that they cannot be reached,
// and is asked again, three times at most. The build may have been stopped all the same.
func stop(t testing.TB, c *client.Client, path string, status int, changes ...client.Change) (a client.Answer) {
	t.Helper()
	for try := 1; ; try++ {
		a = c.MustStop(t, within(t), path, changes...)
		if a.StatusCode == status || try > 1 && a.StatusCode == http.StatusOK && a.Code == "canceled" {
			return a
		}
		if try == 3 || a.Code != "owner_unreachable" && a.Code != "records_unreachable" {
			t.Errorf("stopping %s, try %d: %v, want HTTP %d", path, try, a, status)
			return a
		}
		t.Logf("stopping %s, try %d: %v", path, try, a)
		nextSecond()
	}
}

// nextSecond returns in the next second of the clock. Two equal requests within a second have one
// signature, which works once.
func nextSecond() {
	now := time.Now()
	time.Sleep(time.Until(now.Truncate(time.Second).Add(time.Second)))
}

// wantStopped checks a record of a build that somebody has stopped.
func wantStopped(t testing.TB, b client.Build, by string) {
	t.Helper()
	if b.Code != "canceled" || b.CanceledBy != by {
		t.Errorf("%s is %s %s, canceled by %q, want it canceled by %q: %s", b.ID, b.Status, b.Code, b.CanceledBy, by, b.Error)
	}
}

// wantSame compares two logs.
func wantSame(t testing.TB, what string, got, want []string) {
	t.Helper()
	if slices.Equal(got, want) {
		return
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			t.Errorf("%s: of %d and %d lines, line %d is %q, want %q", what, len(got), len(want), i+1, got[i], want[i])
			return
		}
	}
	t.Errorf("%s: %d lines, want %d", what, len(got), len(want))
}
