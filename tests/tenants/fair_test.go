package tenants_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// fleet is replicas of a function with one file, and daemons that they share.
type fleet struct {
	*house
	replicas []*stack.Function
	daemons  []*stack.Buildkitd
}

// newFleet starts two replicas and three daemons of the test's own, whose steps run as many
// at once as are asked for.
func newFleet(t *testing.T, change func(h *house, c *stack.FunctionConfig)) *fleet {
	t.Helper()
	fl := &fleet{daemons: make([]*stack.Buildkitd, 3)}
	var started sync.WaitGroup
	ctx := within(t)
	for i := range fl.daemons {
		started.Go(func() {
			var err error
			if fl.daemons[i], err = stack.Shared(t).NewBuildkitd(ctx, stack.BuildkitdConfig{Args: []string{"--oci-max-parallelism=100"}}); err != nil {
				t.Error(err)
			}
		})
	}
	started.Wait()
	if t.Failed() {
		t.FailNow()
	}
	var addrs []string
	for _, b := range fl.daemons {
		t.Cleanup(b.Kill)
		addrs = append(addrs, b.Addr)
	}
	var second stack.FunctionConfig
	fl.house = newHouse(t, func(h *house, c *stack.FunctionConfig) {
		c.Env = map[string]string{"buildkit_addr": strings.Join(addrs, ","), "daemon_builds": "100"}
		change(h, c)
		second = *c
	})
	second.Secrets = fl.file.Secret()
	_, replica := stack.Test(t, second)
	fl.replicas = []*stack.Function{fl.f, replica}
	return fl
}

// runs says whether a step with the mark runs on any of the daemons.
func (fl *fleet) runs(t testing.TB, m string) bool {
	t.Helper()
	return len(fl.running(t, []string{m})) > 0
}

// running are those of the marks whose steps run.
func (fl *fleet) running(t testing.TB, marks []string) (list []string) {
	t.Helper()
	var steps []string
	for _, b := range fl.daemons {
		on, err := b.Steps()
		if err != nil {
			t.Fatal(err)
		}
		steps = append(steps, on...)
	}
	for _, m := range marks {
		if has(steps, m) {
			list = append(list, m)
		}
	}
	return list
}

// crowdOf sends n builds of a tenant to these replicas in turn. Each holds its slot until it is
// released. leave ends those that are still there.
func (fl *fleet) crowdOf(t *testing.T, of *stack.Tenant, on []*stack.Function, n int) (marks []string, leave func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(within(t))
	var sent sync.WaitGroup
	for i := range n {
		m := mark()
		marks = append(marks, m)
		request := body(t, config{"image": fmt.Sprintf("%s/app-%d:v1", of.Images[0], i)}, "FROM busybox", held(m))
		c := of.Of(on[i%len(on)].Client)
		sent.Go(func() {
			// What a test leaves ends with its context.
			if a, err := c.Post(ctx, request, client.Accept(client.NDJSON)); err == nil && a.Status != "success" {
				t.Errorf("a build of the crowd: %v", a)
			}
		})
	}
	leave = sync.OnceFunc(func() {
		cancel()
		sent.Wait()
	})
	t.Cleanup(leave)
	return marks, leave
}

// TestFair: with a hundred builds of one tenant waiting, another's next one waits for one
// slot at most, on each replica.
func TestFair(t *testing.T) {
	t.Parallel()
	const slots = 2
	fl := newFleet(t, func(h *house, c *stack.FunctionConfig) { c.Env["max_builds"] = strconv.Itoa(slots) })
	marks, leave := fl.crowdOf(t, fl.acme, fl.replicas, 100)
	stack.Eventually(t, patience, func() error {
		for _, f := range fl.replicas {
			if waiting, err := f.Metric("builder_builds_waiting"); err != nil || waiting != 50-slots {
				return fmt.Errorf("%v builds wait: %v", waiting, err)
			}
		}
		if n := len(fl.running(t, marks)); n != 2*slots {
			return fmt.Errorf("%d builds run", n)
		}
		return nil
	})
	for i, f := range fl.replicas {
		m := mark()
		theirs := background(t, fl.globex.Of(f.Client), body(t, app(fl.globex), "FROM busybox", held(m)))
		stack.Eventually(t, patience, func() error {
			if waiting, err := f.Metric("builder_builds_waiting"); err != nil || waiting != 50-slots+1 {
				return fmt.Errorf("%v builds wait: %v", waiting, err)
			}
			return nil
		})
		// One slot of this replica becomes free. The marks alternate between replicas.
		before := fl.running(t, marks)
		for _, one := range before {
			if slices.Index(marks, one)%len(fl.replicas) == i {
				release(t, one)
				break
			}
		}
		stack.Eventually(t, patience, func() error {
			if !fl.runs(t, m) {
				return errors.New("globex's build has not begun")
			}
			return nil
		})
		var begun []string
		for _, one := range fl.running(t, marks) {
			// The other replica may have had a slot that became free before.
			if slices.Index(before, one) < 0 && slices.Index(marks, one)%len(fl.replicas) == i {
				begun = append(begun, one)
			}
		}
		if len(begun) > 0 {
			t.Errorf("%d builds of acme began before globex's: %v", len(begun), begun)
		}
		release(t, m)
		theirs().WantSuccess(t)
	}
	leave()
}

// TestBuildsOverReplicas: builds bounds what a tenant has running on all replicas together:
// at most one too many for each other replica. Another tenant has the rest.
func TestBuildsOverReplicas(t *testing.T) {
	t.Parallel()
	const builds, tooMany = 2, 1
	fl := newFleet(t, func(h *house, c *stack.FunctionConfig) {
		c.Env["max_builds"], h.acme.Builds = "10", builds
	})
	// A replica counts the builds that the daemons have. On a busy machine a build is there
	// late, and two replicas that begin at once begin two each. So one has its builds running
	// before the other gets any.
	marks, leave := fl.crowdOf(t, fl.acme, fl.replicas[:1], 6)
	defer leave()
	stack.Eventually(t, patience, func() error {
		if n := len(fl.running(t, marks)); n < builds {
			return fmt.Errorf("%d builds run, and %d may", n, builds)
		}
		return nil
	})
	more, leaveToo := fl.crowdOf(t, fl.acme, fl.replicas[1:], 6)
	defer leaveToo()
	marks = append(marks, more...)
	most := 0
	look := func() int {
		n := len(fl.running(t, marks))
		most = max(most, n)
		return n
	}
	for done := 0; done < 6; done++ {
		stack.Eventually(t, patience, func() error {
			if n := look(); n < builds {
				return fmt.Errorf("%d builds run, and %d may", n, builds)
			}
			return nil
		})
		// Long enough for both replicas to have counted and begun more.
		for until := time.Now().Add(1500 * time.Millisecond); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
			look()
		}
		m := mark()
		if done == 0 {
			theirs := background(t, fl.globex.Of(fl.replicas[0].Client), body(t, app(fl.globex), "FROM busybox", "RUN : "+m))
			theirs().WantSuccess(t)
		}
		if running := fl.running(t, marks); len(running) > 0 {
			release(t, running[0])
		}
	}
	if most > builds+tooMany {
		t.Errorf("%d builds ran at once, with builds: %d and two replicas", most, builds)
	}
	t.Logf("at most %d ran at once", most)
}

// TestWeight: freed slots are shared by weight. Of four slots, acme has three with the weight 3,
// and globex one, for as long as builds of both wait.
func TestWeight(t *testing.T) {
	t.Parallel()
	const slots, each = 4, 10
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		h.acme.Weight = 3
		c.Env = map[string]string{"max_builds": strconv.Itoa(slots)}
	})
	fl := &fleet{house: h, replicas: []*stack.Function{h.f}, daemons: []*stack.Buildkitd{h.s.Buildkitd}}
	acmes, leave := fl.crowdOf(t, h.acme, fl.replicas, each)
	globexs, leaveToo := fl.crowdOf(t, h.globex, fl.replicas, each)
	defer leave()
	defer leaveToo()
	ended := 0
	end := func(m string) {
		release(t, m)
		ended++
	}
	// running waits until every slot is taken and all other builds wait.
	running := func() (acme, globex []string) {
		t.Helper()
		stack.Eventually(t, patience, func() error {
			waiting, err := h.f.Metric("builder_builds_waiting")
			acme, globex = fl.running(t, acmes), fl.running(t, globexs)
			if n := len(acme) + len(globex); err != nil || n != slots || int(waiting) != 2*each-slots-ended {
				return fmt.Errorf("%d builds run and %v wait: %v", n, waiting, err)
			}
			return nil
		})
		return acme, globex
	}
	acme, globex := running()
	// Who came first may have more than its share. It gets no slot back until it has its share.
	for ended < 3 && len(acme) != 3 {
		if len(globex) > 1 {
			end(globex[0])
		} else {
			end(acme[0])
		}
		acme, globex = running()
	}
	for range 3 {
		if len(acme) != 3 || len(globex) != 1 {
			t.Fatalf("after %d builds have ended, acme has %d slots and globex %d", ended, len(acme), len(globex))
		}
		end(acme[0])
		acme, globex = running()
	}
	if len(acme) != 3 || len(globex) != 1 {
		t.Errorf("acme gave a slot back, and then has %d slots and globex %d", len(acme), len(globex))
	}
}

// TestQueue: more than queue builds of a tenant do not wait on one replica. Another tenant's
// do.
func TestQueue(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) { h.acme.Builds, h.acme.Queue = 1, 2 })
	runs := mark()
	running := background(t, h.of(h.acme), body(t, app(h.acme), "FROM busybox", held(runs)))
	h.s.Buildkitd.WaitStep(t, runs)
	request := body(t, app(h.acme), "FROM busybox", "RUN : "+mark())
	// Who does not wait is told at once.
	a := h.of(h.acme).MustPost(t, within(t), request)
	a.WantFailed(t, "tenant_busy")
	var waiting []func() client.Answer
	for i := range 2 {
		waiting = append(waiting, background(t, h.of(h.acme), request))
		stack.Eventually(t, patience, func() error {
			if n, err := h.f.Metric("builder_builds_waiting"); err != nil || int(n) != i+1 {
				return fmt.Errorf("%v builds wait: %v", n, err)
			}
			return nil
		})
	}
	if a := h.of(h.acme).MustPost(t, within(t), request, client.Accept(client.NDJSON)); a.Code != "tenant_busy" {
		t.Errorf("a third one waits: %v", a)
	}
	// For a queue it is a 503, which it tries again.
	if a := h.of(h.acme).MustPost(t, within(t), request, client.Queued("call-"+mark())); a.Code != "tenant_busy" || a.StatusCode != 503 || a.Header.Get("Retry-After") == "" {
		t.Errorf("from the queue: %v", a)
	}
	h.of(h.globex).MustPost(t, within(t), body(t, app(h.globex), "FROM busybox", "RUN : "+mark())).WantSuccess(t)
	release(t, runs)
	running().WantSuccess(t)
	for _, wait := range waiting {
		wait().WantSuccess(t)
	}
}
