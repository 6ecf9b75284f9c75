package faults

import (
	"fmt"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/stack"
)

// daemons are n of the test's own. They run as many steps at once as are asked
// for.
func daemons(t *testing.T, n int) []*stack.Buildkitd {
	t.Helper()
	list := make([]*stack.Buildkitd, n)
	var started sync.WaitGroup
	for i := range list {
		started.Go(func() {
			var err error
			if list[i], err = stack.Shared(t).NewBuildkitd(testContext(t), stack.BuildkitdConfig{Args: []string{"--oci-max-parallelism=100"}}); err != nil {
				t.Error(err)
			}
		})
	}
	started.Wait()
	if t.Failed() {
		t.FailNow()
	}
	for _, b := range list {
		t.Cleanup(b.Kill)
	}
	return list
}

// pool is a function with the daemons.
func pool(t *testing.T, list []*stack.Buildkitd, env map[string]string) (*stack.Stack, *stack.Function) {
	t.Helper()
	c := stack.FunctionConfig{Env: map[string]string{"buildkit_addr": addrs(list), "max_builds": "100", "daemon_builds": "100"}}
	for k, v := range env {
		c.Env[k] = v
	}
	return stack.Test(t, c)
}

func addrs(list []*stack.Buildkitd) string {
	var all []string
	for _, b := range list {
		all = append(all, b.Addr)
	}
	return strings.Join(all, ",")
}

// app is an image of the test's own, with a step that is cached the second time.
type app struct {
	repository, image, mark string
}

func apps(s *stack.Stack, n int) []app {
	list := make([]app, n)
	for i := range list {
		m := mark()
		list[i] = app{strings.ToLower(m), s.Registry.Image(strings.ToLower(m) + ":v1"), m}
	}
	return list
}

func (a app) body(t *testing.T, step string) []byte {
	t.Helper()
	return request(t, &builder.BuildConfig{Image: a.image}, "FROM busybox", step)
}

// placed is the daemon that the image's last build ended on, from the log, and
// all of that line.
func (a app) placed(t *testing.T, f *stack.Function) (addr string, line map[string]any) {
	t.Helper()
	for _, l := range logged(t, f) {
		if l["image"] == a.image {
			addr, line = l["daemon"].(string), l
		}
	}
	return addr, line
}

// everywhere builds all of the apps, a few at once, and returns where.
func everywhere(t *testing.T, f *stack.Function, list []app) map[app]string {
	t.Helper()
	var all sync.WaitGroup
	slots := make(chan struct{}, 4)
	for _, a := range list {
		body := a.body(t, "RUN : "+a.mark)
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			got, err := send(testContext(t), f, body, jsonForm)
			if err != nil || got.Status != "success" {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
	all.Wait()
	at := make(map[app]string)
	for _, a := range list {
		at[a], _ = a.placed(t, f)
	}
	return at
}

// TestDaemonKilled kills one of three daemons in the middle of 20 builds, and
// starts it again.
func TestDaemonKilled(t *testing.T) {
	t.Parallel()
	list := daemons(t, 3)
	s, f := pool(t, list, nil)
	images := apps(s, 20)
	var waits []func() answer
	for _, a := range images {
		waits = append(waits, background(t, f, a.body(t, sleep(a.mark, 6*time.Second)), sse))
	}
	running := func() map[*stack.Buildkitd][]app {
		at := make(map[*stack.Buildkitd][]app)
		for _, b := range list {
			steps, err := b.Steps()
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range images {
				if slices.ContainsFunc(steps, func(line string) bool { return strings.Contains(line, a.mark) }) {
					at[b] = append(at[b], a)
				}
			}
		}
		return at
	}
	var at map[*stack.Buildkitd][]app
	eventually(t, time.Minute, func() error {
		at = running()
		if n := len(at[list[0]]) + len(at[list[1]]) + len(at[list[2]]); n != len(images) {
			return fmt.Errorf("%d steps run", n)
		}
		return nil
	})
	victim := slices.MaxFunc(list, func(a, b *stack.Buildkitd) int { return len(at[a]) - len(at[b]) })
	victim.Kill()
	for i, wait := range waits {
		wait().wantSuccess(t)
		if n := pushes(t, s, images[i].repository); n != 1 {
			t.Errorf("%d pushes of one image", n)
		}
	}
	for b, some := range at {
		for _, a := range some {
			addr, line := a.placed(t, f)
			if moved := addr != b.Addr; moved != (b == victim) || moved != (line["attempts"] == 2.0) {
				t.Errorf("it ran on %s, ended on %s, after %v attempts; %s was killed", b.Addr, addr, line["attempts"], victim.Addr)
			}
		}
	}
	if moved, err := metric(f, "builder_builds_moved_total"); err != nil || int(moved) != len(at[victim]) {
		t.Errorf("%v builds moved, want %d; %v", moved, len(at[victim]), err)
	}

	// What it had comes back with it.
	if err := victim.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, func() error {
		if n, err := metric(f, "builder_daemons_reachable"); err != nil || n != 3 {
			return fmt.Errorf("%v reachable, %v", n, err)
		}
		return nil
	})
	again := everywhere(t, f, images)
	for b, some := range at {
		for _, a := range some {
			if again[a] != b.Addr {
				t.Errorf("built on %s at first, and on %s when all were back", b.Addr, again[a])
			}
		}
	}
	t.Logf("%d of %d builds moved", len(at[victim]), len(images))
}

// drop has the machine lose every packet to and from a loopback port.
func drop(t *testing.T, addr string) {
	t.Helper()
	port := addr[strings.LastIndex(addr, ":")+1:]
	for _, match := range []string{"--dport", "--sport"} {
		rule := []string{"INPUT", "-i", "lo", "-p", "tcp", match, port, "-j", "DROP"}
		if out, err := exec.Command("iptables", append([]string{"-w", "-I"}, rule...)...).CombinedOutput(); err != nil {
			t.Fatalf("iptables: %v: %s", err, out)
		}
		t.Cleanup(func() {
			if out, err := exec.Command("iptables", append([]string{"-w", "-D"}, rule...)...).CombinedOutput(); err != nil {
				t.Errorf("iptables: %v: %s", err, out)
			}
		})
	}
}

// TestDaemonUnwell has one daemon freeze, one cut off and one drain while builds
// run and begin.
func TestDaemonUnwell(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		make func(t *testing.T, b *stack.Buildkitd)
		// ends says that what runs there comes to its end there.
		ends bool
	}{
		{"frozen", func(t *testing.T, b *stack.Buildkitd) {
			if err := b.Pause(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { b.Resume() })
		}, false},
		{"partitioned", func(t *testing.T, b *stack.Buildkitd) { drop(t, b.Addr) }, false},
		{"draining", func(t *testing.T, b *stack.Buildkitd) {
			if err := b.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			list := daemons(t, 3)
			s, f := pool(t, list, nil)
			images := apps(s, 9)
			everywhere(t, f, images) // so that there are connections
			const step = 5 * time.Second
			var waits []func() answer
			for _, a := range images {
				waits = append(waits, background(t, f, a.body(t, sleep(a.mark, step)), ndjson))
			}
			victim := list[rand.IntN(len(list))]
			eventually(t, time.Minute, func() error {
				n := 0
				for _, b := range list {
					steps, err := b.Steps()
					if err != nil {
						return err
					}
					for _, a := range images {
						if slices.ContainsFunc(steps, func(line string) bool { return strings.Contains(line, a.mark) }) {
							n++
						}
					}
				}
				if n != len(images) {
					return fmt.Errorf("%d steps run", n)
				}
				return nil
			})
			tt.make(t, victim)
			more := apps(s, 9)
			for _, a := range more {
				waits = append(waits, background(t, f, a.body(t, "RUN : "+a.mark), ndjson))
			}
			var longest time.Duration
			for _, wait := range waits {
				got := wait()
				got.wantSuccess(t)
				longest = max(longest, got.took)
			}
			// The step may have to run twice.
			if longest > 30*time.Second+2*step {
				t.Errorf("one build took %v", longest)
			}
			for _, a := range more {
				if addr, _ := a.placed(t, f); addr == victim.Addr {
					t.Errorf("a build ended on the daemon that is %s", tt.name)
				}
			}
			for _, a := range images {
				if addr, line := a.placed(t, f); !tt.ends && addr == victim.Addr || tt.ends && line["attempts"] != 1.0 {
					t.Errorf("a build that ran ended on %s after %v attempts", addr, line["attempts"])
				}
			}
			t.Logf("%s: the longest build took %v", tt.name, longest.Round(100*time.Millisecond))
		})
	}
}

// TestDaemonJoins: about a quarter of the images move to a fourth daemon, and
// none between the other three.
func TestDaemonJoins(t *testing.T) {
	t.Parallel()
	list := daemons(t, 4)
	s, three := pool(t, list[:3], nil)
	_, four := pool(t, list, nil)
	images := apps(s, 30)
	before, after := everywhere(t, three, images), everywhere(t, four, images)
	moved := 0
	for _, a := range images {
		switch {
		case after[a] == before[a]:
		case after[a] == list[3].Addr:
			moved++
		default:
			t.Errorf("an image moved from %s to %s", before[a], after[a])
		}
	}
	// 7.5 of 30, give or take two deviations.
	if moved == 0 || moved > 12 {
		t.Errorf("%d of %d images moved", moved, len(images))
	}
	t.Logf("%d of %d images moved", moved, len(images))
}

// TestStalled: a build that says nothing for too long is ended, and its daemon
// gets no other for a while.
func TestStalled(t *testing.T) {
	t.Parallel()
	list := daemons(t, 2)
	s, f := pool(t, list, map[string]string{"stall_timeout": "3s"})
	a := apps(s, 1)[0]
	start := time.Now()
	mustSend(t, f, a.body(t, sleep(a.mark, time.Minute)), jsonForm).wantFailed(t, "stalled", "3s (stall_timeout)", a.mark)
	if took := time.Since(start); took > 15*time.Second {
		t.Errorf("ended after %v", took)
	}
	for _, b := range list {
		waitGone(t, b, a.mark, 5*time.Second)
	}
	first, _ := a.placed(t, f)
	mustSend(t, f, a.body(t, "RUN for i in 1 2 3 4; do echo $i; sleep 1; done; : "+a.mark), jsonForm).wantSuccess(t)
	if second, line := a.placed(t, f); second == first || line["choice"] != "down" {
		t.Errorf("built on %s and then on %s, %v", first, second, line["choice"])
	}
}
