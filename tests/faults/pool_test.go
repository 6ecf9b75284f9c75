package faults

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/client"
	poolbench "handler/function/tests/pool"
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

// slowCount says whether a build was placed past a daemon that took longer than 2 s to count
// its builds, as on a busy disk. It needs a function whose daemons never have daemon_builds:
// there is no other reason for the choice "full". Where such a build is shows nothing.
func slowCount(line map[string]any) bool { return line["choice"] == "full" }

// build has the image built, and returns the answer and where, as placed does. It builds again
// after a slowCount, three times in all.
func (a app) build(t *testing.T, f *stack.Function, step string) (got client.Answer, addr string, line map[string]any) {
	t.Helper()
	for range 3 {
		got = mustSend(t, f, a.body(t, step), jsonForm)
		if addr, line = a.placed(t, f); !slowCount(line) {
			return got, addr, line
		}
	}
	t.Fatalf("a daemon was too slow to count its builds, three times: %v", line)
	return got, addr, line
}

// everywhere builds all of the apps, a few at once, and returns where. It builds again what
// came to its place by a slowCount, three times in all.
func everywhere(t *testing.T, f *stack.Function, list []app) map[app]string {
	t.Helper()
	at := make(map[app]string)
	for range 3 {
		atOnce(t, f, list)
		var again []app
		for _, a := range list {
			addr, line := a.placed(t, f)
			if at[a] = addr; slowCount(line) {
				again = append(again, a)
			}
		}
		if len(again) == 0 {
			return at
		}
		t.Logf("building %d of %d images again: a daemon was too slow to count its builds", len(again), len(list))
		list = again
	}
	t.Fatalf("a daemon was too slow to count its builds, three times for %d images", len(list))
	return at
}

// atOnce builds all of the apps, four at once.
func atOnce(t *testing.T, f *stack.Function, list []app) {
	t.Helper()
	var all sync.WaitGroup
	slots := make(chan struct{}, 4)
	for _, a := range list {
		body := a.body(t, "LABEL mark="+a.mark)
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			got, err := f.Post(testContext(t), body, client.Accept(jsonForm))
			if err != nil || got.Status != "success" {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
	all.Wait()
}

// running waits until a step of each of the apps runs, and returns where.
func running(t *testing.T, list []*stack.Buildkitd, images []app) map[*stack.Buildkitd][]app {
	t.Helper()
	var at map[*stack.Buildkitd][]app
	stack.Eventually(t, time.Minute, func() error {
		at = make(map[*stack.Buildkitd][]app)
		n := 0
		for _, b := range list {
			steps, err := b.Steps()
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range images {
				if slices.ContainsFunc(steps, func(line string) bool { return strings.Contains(line, a.mark) }) {
					at[b] = append(at[b], a)
					n++
				}
			}
		}
		if n != len(images) {
			return fmt.Errorf("%d of %d steps run", n, len(images))
		}
		return nil
	})
	return at
}

// holdOn has a step with a mark sleep on a daemon, the first of its build's order. It builds
// again with another mark where that daemon was too slow to count its builds, and another has
// the step; three times in all.
func holdOn(t *testing.T, f *stack.Function, list []*stack.Buildkitd, b *stack.Buildkitd, body func(m string) []byte) (m string, wait func() client.Answer) {
	t.Helper()
	for range 3 {
		m = mark()
		wait = background(t, f, body(m), jsonForm)
		if at := running(t, list, []app{{mark: m}}); len(at[b]) == 1 {
			return m, wait
		}
		release(t, m)
		wait()
	}
	t.Fatalf("the steps were not on %s, three times", b.Addr)
	return m, wait
}

// saysMoved says whether the log tells of a daemon that was lost.
func saysMoved(a client.Answer) bool {
	return slices.ContainsFunc(a.Log, func(l string) bool {
		return strings.HasPrefix(l, "w: ") && strings.Contains(l, "was lost: building again")
	})
}

// TestDaemonKilled kills one of three daemons in the middle of 20 builds, and
// starts it again.
func TestDaemonKilled(t *testing.T) {
	t.Parallel()
	list := daemons(t, 3)
	s, f := pool(t, list, nil)
	images := apps(s, 20)
	homes := everywhere(t, f, images)
	var waits []func() client.Answer
	for _, a := range images {
		waits = append(waits, background(t, f, a.body(t, sleep(a.mark, 5*time.Minute)), client.SSE))
	}
	at := running(t, list, images)
	victim := slices.MaxFunc(list, func(a, b *stack.Buildkitd) int { return len(at[a]) - len(at[b]) })
	var pushed []int // before: nothing of those builds is
	for _, a := range images {
		pushed = append(pushed, s.Registry.Pushes(t, a.repository))
	}
	victim.Kill()
	running(t, list, images) // again
	for _, a := range images {
		release(t, a.mark)
	}
	for i, wait := range waits {
		got := wait()
		got.WantSuccess(t)
		if moved := slices.Contains(at[victim], images[i]); saysMoved(got) != moved {
			t.Errorf("moved: %v; the log says %q", moved, got.Log)
		}
		if n := s.Registry.Pushes(t, images[i].repository) - pushed[i]; n != 1 {
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
	if moved, err := f.Metric("builder_builds_moved_total"); err != nil || int(moved) != len(at[victim]) {
		t.Errorf("%v builds moved, want %d; %v", moved, len(at[victim]), err)
	}

	// What it had comes back with it.
	if err := victim.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	stack.Eventually(t, patience(30*time.Second), func() error {
		if n, err := f.Metric("builder_daemons_reachable"); err != nil || n != 3 {
			return fmt.Errorf("%v reachable, %v", n, err)
		}
		return nil
	})
	for a, addr := range everywhere(t, f, images) {
		if addr != homes[a] {
			t.Errorf("built on %s at first, and on %s when all were back", homes[a], addr)
		}
	}
	t.Logf("%d of %d builds moved", len(at[victim]), len(images))
}

// TestKilledWhilePushing kills a daemon in the middle of a push. The next one has
// none of the build's steps, and needs longer for them than push_timeout.
func TestKilledWhilePushing(t *testing.T) {
	t.Parallel()
	const step, pushTimeout = 22 * time.Second, 20 * time.Second
	for _, tt := range []struct {
		name      string
		fault     *fault
		manifests int // that the registry takes
	}{
		{"a layer is half there", &fault{blobBody, func(_ http.ResponseWriter, r *http.Request, next http.Handler) {
			r.Body = &heldBody{r.Body, r.Context(), 500 << 10}
			next.ServeHTTP(httptest.NewRecorder(), r)
		}}, 1},
		// The tag is there, and nobody knows: it is pushed twice.
		{"all is there", &fault{manifestPut, func(_ http.ResponseWriter, r *http.Request, next http.Handler) {
			next.ServeHTTP(httptest.NewRecorder(), r)
			<-r.Context().Done()
		}}, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			list := daemons(t, 2)
			s, f := pool(t, list, map[string]string{"push_timeout": pushTimeout.String()})
			proxy := newFaultProxy(t, s.Registry.Addr)
			proxy.set(first(1, tt.fault))
			m := mark()
			repository := strings.ToLower(m)
			noise := make([]byte, 2<<20)
			crand.Read(noise)
			body, err := stack.Tar(stack.Context(t, map[string]string{
				"Dockerfile": "FROM busybox\n" + sleep(m, step) + "\nCOPY noise /\n",
				"noise":      string(noise),
			}), &builder.BuildConfig{Image: proxy.addr + "/" + repository + ":v1"})
			if err != nil {
				t.Fatal(err)
			}
			wait := background(t, f, body, client.SSE)
			var victim *stack.Buildkitd
			for b := range running(t, list, []app{{mark: m}}) {
				victim = b
			}
			stack.Eventually(t, time.Minute, func() error {
				if n, _ := proxy.broken(); n == 0 {
					return errors.New("nothing is pushed")
				}
				return nil
			})
			time.Sleep(time.Second)
			victim.Kill()
			got := wait()
			got.WantSuccess(t)
			if !saysMoved(got) {
				t.Errorf("the log does not say that it moved: %q", got.Log)
			}
			ends := logged(t, f)
			if len(ends) != 1 || ends[0]["attempts"] != 2.0 || ends[0]["daemon"] == victim.Addr {
				t.Errorf("want one build that ended on the second of two daemons, and %s was killed: %v", victim.Addr, ends)
			}
			if d := digest(t, s.Registry.Image(repository+":v1")); d != got.Digest {
				t.Errorf("the tag is %s, the answer %s", d, got.Digest)
			}
			if tags := wantWhole(t, s.Registry.Image(repository)); len(tags) != 1 {
				t.Errorf("the repository has the tags %q, want v1 alone", tags)
			}
			if n := s.Registry.Pushes(t, repository); n != tt.manifests {
				t.Errorf("the registry took %d manifests, want %d", n, tt.manifests)
			}
		})
	}
}

// heldBody passes on a part, and nothing more until the client is gone.
type heldBody struct {
	io.ReadCloser
	ctx  context.Context // of the request
	left int64
}

func (b *heldBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		// net/http looks for the client's end only after the body's.
		io.Copy(io.Discard, b.ReadCloser)
		<-b.ctx.Done()
		return 0, context.Cause(b.ctx)
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
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

// TestDaemonUnwell has a daemon freeze, one cut off and one drain while builds run
// and begin: each in a pool of its own, and all in one.
func TestDaemonUnwell(t *testing.T) {
	t.Parallel()
	type illness struct {
		name   string
		befall func(t *testing.T, b *stack.Buildkitd)
		// ends says that what runs there comes to its end there.
		ends bool
	}
	frozen := illness{"frozen", func(t *testing.T, b *stack.Buildkitd) {
		freeze(t, b)
		t.Cleanup(func() { b.Resume() })
	}, false}
	partitioned := illness{"partitioned", func(t *testing.T, b *stack.Buildkitd) { drop(t, b.Addr) }, false}
	draining := illness{"draining", func(t *testing.T, b *stack.Buildkitd) {
		if err := b.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		stack.Eventually(t, patience(5*time.Second), func() error {
			if conn, err := net.Dial("tcp", host(b)); err == nil {
				conn.Close()
				return errors.New("it still takes connections")
			}
			return nil
		})
	}, true}
	for _, tt := range []struct {
		name      string
		illnesses []illness
	}{
		{frozen.name, []illness{frozen}},
		{partitioned.name, []illness{partitioned}},
		{draining.name, []illness{draining}},
		{"each of them", []illness{frozen, partitioned, draining}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			list := daemons(t, max(3, len(tt.illnesses)+1))
			s, f := pool(t, list, nil)
			images := apps(s, 12)
			everywhere(t, f, images) // so that there are connections
			var waits []func() client.Answer
			for _, a := range images {
				waits = append(waits, background(t, f, a.body(t, sleep(a.mark, 5*time.Minute)), client.NDJSON))
			}
			at := running(t, list, images)
			// Where most builds run.
			slices.SortFunc(list, func(a, b *stack.Buildkitd) int { return len(at[b]) - len(at[a]) })
			ill := make(map[string]illness) // by the daemon's address
			for i, illness := range tt.illnesses {
				illness.befall(t, list[i])
				ill[list[i].Addr] = illness
			}
			more := apps(s, 12)
			for _, a := range more {
				waits = append(waits, background(t, f, a.body(t, "RUN : "+a.mark), client.NDJSON))
			}
			// Each runs again on another, where its own is too ill for it to end there.
			var able []*stack.Buildkitd
			for i, b := range list {
				if i >= len(tt.illnesses) || tt.illnesses[i].ends {
					able = append(able, b)
				}
			}
			began := time.Now()
			running(t, able, images)
			moved := time.Since(began)
			if limit := patience(30 * time.Second); moved > limit {
				t.Errorf("the builds had moved after %v, %v at most", moved, limit)
			}
			for _, a := range images {
				release(t, a.mark)
			}
			for i, wait := range waits {
				got := wait()
				got.WantSuccess(t)
				// The builds of images wait for their release.
				if limit := patience(30 * time.Second); i >= len(images) && got.Took > limit {
					t.Errorf("a build beside daemons that are ill took %v, want %v at most", got.Took, limit)
				}
			}
			for _, a := range more {
				addr, _ := a.placed(t, f)
				if illness, ok := ill[addr]; ok {
					t.Errorf("a build ended on the daemon that is %s", illness.name)
				}
			}
			for b, some := range at {
				illness, ok := ill[b.Addr]
				attempts := 1.0
				if ok && !illness.ends {
					attempts = 2
				}
				for _, a := range some {
					if addr, line := a.placed(t, f); (addr == b.Addr) != (attempts == 1) || line["attempts"] != attempts {
						t.Errorf("a build that ran on a daemon that is %q ended on it: %v, after %v attempts", illness.name, addr == b.Addr, line["attempts"])
					}
				}
			}
			t.Logf("%s: all had moved after %v", tt.name, moved.Round(100*time.Millisecond))
		})
	}
}

// TestAllFrozen has every daemon of a pool freeze, between builds and under one.
func TestAllFrozen(t *testing.T) {
	t.Parallel()
	list := daemons(t, 3)
	s, f := pool(t, list, nil)
	everywhere(t, f, apps(s, 12)) // so that there are connections
	images := apps(s, 2)
	wait := background(t, f, images[0].body(t, sleep(images[0].mark, 5*time.Minute)), client.NDJSON)
	running(t, list, images[:1])
	for _, b := range list {
		freeze(t, b)
		t.Cleanup(func() { b.Resume() })
	}
	start := time.Now()
	got := mustSend(t, f, images[1].body(t, "RUN : "+images[1].mark), jsonForm)
	got.WantFailed(t, "no_daemon")
	limit := patience(frozenLimit)
	if got.Took > limit {
		t.Errorf("the verdict took %v, want %v at most", got.Took, limit)
	}
	lost := wait()
	took := time.Since(start)
	lost.WantFailed(t, "no_daemon")
	if took > limit {
		t.Errorf("the verdict of the build that ran took %v, want %v at most", took, limit)
	}
	t.Logf("verdicts after %v, and %v for the build that ran", got.Took, took)
	for _, b := range list {
		if err := b.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	mustSend(t, f, images[1].body(t, "RUN : "+images[1].mark), jsonForm).WantSuccess(t)
}

// TestDaemonJoins: about a quarter of the images move to a fourth daemon, and
// none between the other three.
func TestDaemonJoins(t *testing.T) {
	t.Parallel()
	list := daemons(t, 4)
	s, three := pool(t, list[:3], nil)
	_, four := pool(t, list, nil)
	images := apps(s, 100)
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
	// 25 of 100, give or take five deviations: by chance one run of a million is outside.
	if moved < 4 || moved > 46 {
		t.Errorf("%d of %d images moved", moved, len(images))
	}
	t.Logf("%d of %d images moved", moved, len(images))
}

// TestStalled: a build that says nothing for too long is ended, and its daemon
// gets no other for a while.
func TestStalled(t *testing.T) {
	t.Parallel()
	list := daemons(t, 2)
	s, f := pool(t, list, map[string]string{"stall_timeout": "10s"})
	a := apps(s, 1)[0]
	start := time.Now()
	mustSend(t, f, a.body(t, sleep(a.mark, 5*time.Minute)), jsonForm).WantFailed(t, "stalled", "10s (stall_timeout)", a.mark)
	if took := time.Since(start); took > patience(20*time.Second) {
		t.Errorf("ended after %v", took)
	}
	for _, b := range list {
		waitGone(t, b, a.mark, 5*time.Second)
	}
	first, _ := a.placed(t, f)
	mustSend(t, f, a.body(t, "RUN for i in $(seq 12); do echo $i; sleep 1; done; : "+a.mark), jsonForm).WantSuccess(t)
	if second, line := a.placed(t, f); second == first || line["choice"] != "down" {
		t.Errorf("built on %s and then on %s, %v", first, second, line["choice"])
	}
}

// zone is a stand-in for the cluster's DNS: the headless Service "pool".
type zone struct {
	mu   sync.Mutex
	pods map[string]*stack.Buildkitd // by name
}

func (z *zone) set(pods map[string]*stack.Buildkitd) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.pods = pods
}

func (z *zone) ServeDNS(w dns.ResponseWriter, req *dns.Msg) {
	z.mu.Lock()
	defer z.mu.Unlock()
	resp := new(dns.Msg)
	resp.SetReply(req)
	resp.Authoritative = true
	q := req.Question[0]
	header := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET}
	known := q.Name == "pool.test." || q.Name == "_buildkit._tcp.pool.test."
	for name, b := range z.pods {
		host := name + ".pool.test."
		switch {
		case q.Name == "_buildkit._tcp.pool.test." && q.Qtype == dns.TypeSRV:
			port, _ := strconv.Atoi(b.Addr[strings.LastIndex(b.Addr, ":")+1:])
			resp.Answer = append(resp.Answer, &dns.SRV{Hdr: header, Port: uint16(port), Target: host})
		case q.Name == host:
			known = true
			if q.Qtype == dns.TypeA {
				resp.Answer = append(resp.Answer, &dns.A{Hdr: header, A: net.IPv4(127, 0, 0, 1)})
			}
		}
	}
	if !known {
		resp.Rcode = dns.RcodeNameError
	}
	w.WriteMsg(resp)
}

// serveZone returns the address of a server of its own, whose port is 53.
func serveZone(t *testing.T, z *zone) string {
	t.Helper()
	addr := fmt.Sprintf("127.%d.%d.53", 1+rand.IntN(250), rand.IntN(250))
	conn, err := net.ListenPacket("udp", addr+":53")
	if err != nil {
		t.Fatal(err)
	}
	server := &dns.Server{PacketConn: conn, Handler: z}
	var done sync.WaitGroup
	done.Go(func() { server.ActivateAndServe() })
	t.Cleanup(func() {
		conn.Close()
		done.Wait()
	})
	return addr
}

// TestHeadlessService finds the daemons by their SRV records, which name them.
func TestHeadlessService(t *testing.T) {
	t.Parallel()
	list := daemons(t, 3)
	z := &zone{}
	z.set(map[string]*stack.Buildkitd{"buildkitd-0": list[0], "buildkitd-1": list[1]})
	s, f := stack.Test(t, stack.FunctionConfig{
		Nameserver: serveZone(t, z),
		Env:        map[string]string{"buildkit_addr": "tcp://pool.test:1234", "max_builds": "100", "daemon_builds": "100"},
	})
	reachable := func(want float64) {
		t.Helper()
		stack.Eventually(t, patience(30*time.Second), func() error {
			if n, err := f.Metric("builder_daemons_reachable"); err != nil || n != want {
				return fmt.Errorf("%v reachable, want %v; %v", n, want, err)
			}
			return nil
		})
	}
	reachable(2)
	images := apps(s, 30)
	before := everywhere(t, f, images)
	names := make(map[string]int)
	for _, addr := range before {
		names[addr]++
	}
	for i, b := range list[:2] {
		if want := fmt.Sprintf("tcp://buildkitd-%d.pool.test:%s", i, b.Addr[strings.LastIndex(b.Addr, ":")+1:]); names[want] == 0 {
			t.Errorf("no build on %s, but on %v", want, names)
		}
	}

	z.set(map[string]*stack.Buildkitd{"buildkitd-0": list[0], "buildkitd-1": list[1], "buildkitd-2": list[2]})
	reachable(3)
	moved := 0
	for a, addr := range everywhere(t, f, images) {
		if addr != before[a] {
			moved++
			if !strings.Contains(addr, "buildkitd-2") {
				t.Errorf("an image moved from %s to %s", before[a], addr)
			}
		}
	}
	// 10 of 30, give or take five deviations.
	if moved == 0 || moved > 22 {
		t.Errorf("%d of %d images moved to the daemon that joined", moved, len(images))
	}

	// One leaves while it builds: the build ends there.
	var running app
	for _, a := range images {
		if strings.Contains(before[a], "buildkitd-0") {
			running = a
		}
	}
	wait := background(t, f, running.body(t, sleep(running.mark, 5*time.Minute)), client.SSE)
	stack.Eventually(t, time.Minute, func() error {
		for _, b := range list {
			if b.Runs(t, running.mark) {
				return nil
			}
		}
		return fmt.Errorf("the step does not run")
	})
	z.set(map[string]*stack.Buildkitd{"buildkitd-1": list[1]})
	reachable(1)
	release(t, running.mark)
	wait().WantSuccess(t)
	if _, line := running.placed(t, f); line["attempts"] != 1.0 {
		t.Errorf("%v attempts", line["attempts"])
	}
	for _, addr := range everywhere(t, f, images) {
		if !strings.Contains(addr, "buildkitd-1") {
			t.Errorf("a build on %s, which has left", addr)
		}
	}
}

// TestColdDaemon: with a cache repository, what one daemon has built is not built
// again by another.
func TestColdDaemon(t *testing.T) {
	t.Parallel()
	list := daemons(t, 2)
	shared := stack.Shared(t)
	repository := strings.ToLower(mark())
	env := map[string]string{"cache_repository": shared.Registry.Image("cache/" + repository)}
	s, warm := pool(t, list[:1], env)
	_, cold := pool(t, list[1:], env)
	_, without := pool(t, list[1:], nil)
	a := apps(s, 1)[0]
	body := request(t, &builder.BuildConfig{Image: a.image},
		"FROM busybox AS one", "RUN sleep 1; echo "+a.mark+" > /one", "FROM busybox", "COPY --from=one /one /", "RUN echo "+a.mark+" > /two")
	first := mustSend(t, warm, body, jsonForm)
	first.WantSuccess(t)
	second := mustSend(t, cold, body, jsonForm)
	second.WantSuccess(t)
	cached := 0
	for _, l := range second.Log {
		if strings.Contains(l, "] RUN ") || strings.Contains(l, "] COPY ") {
			if strings.HasPrefix(l, "v: ") && strings.HasSuffix(l, " CACHED") {
				cached++
			}
		}
	}
	_, line := a.placed(t, cold)
	if second.Digest != first.Digest || cached != 3 {
		t.Errorf("%d steps cached, %v of %v; digests %s and %s\n%s", cached, line["cached_steps"], line["steps"], first.Digest, second.Digest, strings.Join(second.Log, "\n"))
	}

	// A repository that cannot be written to fails no build.
	_, f := pool(t, list[:1], map[string]string{"cache_repository": "127.0.0.1:1/cache"})
	mustSend(t, f, a.body(t, "RUN : "+a.mark), jsonForm).WantSuccess(t)
	// Nor has a build without one any of it.
	other := apps(s, 1)[0]
	mustSend(t, without, other.body(t, "RUN : "+other.mark), jsonForm).WantSuccess(t)
	if tags := wantWhole(t, s.Registry.Image("cache/"+repository)); len(tags) != 1 {
		t.Errorf("%d images have a cache", len(tags))
	}
}

// TestCertificatesRotated replaces the CA and every certificate, one daemon
// after the other, while builds run.
func TestCertificatesRotated(t *testing.T) {
	t.Parallel()
	shared := stack.Shared(t)
	dir := t.TempDir()
	certs, next := filepath.Join(dir, "certs"), filepath.Join(dir, "next")
	script := filepath.Join(shared.Repo, "buildkit", "certs.sh")
	for _, d := range []string{certs, next} {
		if out, err := exec.Command(script, d).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	read := func(path ...string) []byte {
		data, err := os.ReadFile(filepath.Join(path...))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	// Each file at once, as Kubernetes replaces it.
	write := func(name string, data []byte) {
		if err := os.WriteFile(name+".new", data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(name+".new", name); err != nil {
			t.Fatal(err)
		}
	}
	daemonCA := filepath.Join(certs, "ca.pem")
	list := make([]*stack.Buildkitd, 2)
	for i := range list {
		list[i] = newBuildkitd(t, stack.BuildkitdConfig{Certs: certs})
	}
	s, f := stack.Test(t, stack.FunctionConfig{
		Env: map[string]string{"buildkit_addr": addrs(list), "max_builds": "100"},
		Secrets: map[string][]byte{
			"buildkit-ca": read(certs, "ca.pem"), "buildkit-cert": read(certs, "client", "cert.pem"), "buildkit-key": read(certs, "client", "key.pem"),
		},
	})

	stop := make(chan struct{})
	var load sync.WaitGroup
	var built atomic.Int32
	for _, a := range apps(s, 4) {
		load.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(100 * time.Millisecond):
				}
				body := a.body(t, sleep(fmt.Sprint(a.mark, i), time.Second))
				if got, err := f.Post(testContext(t), body, client.Accept(client.NDJSON)); err != nil || got.Status != "success" {
					t.Errorf("%v, %v", got, err)
				}
				built.Add(1)
			}
		})
	}
	restart := func() {
		t.Helper()
		for _, b := range list {
			if err := b.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := b.Wait(testContext(t)); err != nil {
				t.Fatal(err)
			}
			if err := b.Start(testContext(t)); err != nil {
				t.Fatal(err)
			}
		}
	}
	secret := func(name string) string { return filepath.Join(f.SecretsDir, name) }
	both := append(read(certs, "ca.pem"), read(next, "ca.pem")...)

	// First both CAs are trusted everywhere, then the certificates change, then the
	// old CA goes.
	write(daemonCA, both)
	restart()
	write(secret("buildkit-ca"), both)
	write(secret("buildkit-cert"), read(next, "client", "cert.pem"))
	write(secret("buildkit-key"), read(next, "client", "key.pem"))
	for _, name := range []string{"daemon/cert.pem", "daemon/key.pem", "client/cert.pem", "client/key.pem"} {
		write(filepath.Join(certs, name), read(next, name))
	}
	restart()
	write(daemonCA, read(next, "ca.pem"))
	write(secret("buildkit-ca"), read(next, "ca.pem"))
	restart()
	before := built.Load()
	stack.Eventually(t, time.Minute, func() error {
		if built.Load() < before+8 {
			return fmt.Errorf("%d builds since the last restart", built.Load()-before)
		}
		return nil
	})
	close(stop)
	load.Wait()
	t.Logf("%d builds, none failed", built.Load())
}

// TestVolumeFull fills the volume of one daemon. Builds move, it is pruned, and
// it comes back.
func TestVolumeFull(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "volume")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 256<<20); err != nil {
		t.Fatal(err)
	}
	mount := t.TempDir()
	for _, command := range [][]string{{"mkfs.ext4", "-q", "-m", "0", image}, {"mount", "-o", "loop", image, mount}} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", command[0], err, out)
		}
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(mount, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	small := newBuildkitd(t, stack.BuildkitdConfig{Args: []string{"--root", filepath.Join(mount, "root")}})
	large := newBuildkitd(t, stack.BuildkitdConfig{})
	list := []*stack.Buildkitd{small, large}
	s, f := pool(t, list, nil)

	images := apps(s, 24)
	var home []app // on the small volume
	for a, addr := range everywhere(t, f, images) {
		if addr == small.Addr {
			home = append(home, a)
		}
	}
	if len(home) < 2 {
		t.Fatalf("%d of %d images on the small volume", len(home), len(images))
	}
	// Something that a prune can remove, and something that it cannot.
	a := home[0]
	blob, _, _ := a.build(t, f, "RUN dd if=/dev/urandom of=/blob bs=1M count=40; : "+a.mark)
	blob.WantSuccess(t)
	ballast := filepath.Join(mount, "ballast")
	// What runc says when it has no room to start a step, which it seldom is the
	// first to find: the step says so in its stead.
	const unstarted = "echo runc run failed: unable to start container process: no space left on device; false"
	m, wait := holdOn(t, f, list, small, func(m string) []byte {
		return home[1].body(t, sleep(m, 5*time.Minute)+"; "+unstarted)
	})
	fill(t, ballast)

	start := time.Now()
	release(t, m)
	large.WaitStep(t, m)
	release(t, m)
	late := wait()
	late.WantFailed(t, "build_failed", "disk is full")
	if !slices.Contains(late.Log, "w: buildkitd has no space left on its disk: building on another") {
		t.Errorf("not moved from the full volume: %v", late)
	}
	for _, a := range home {
		mustSend(t, f, a.body(t, "RUN : again "+a.mark), jsonForm).WantSuccess(t)
	}
	moved, err := f.Metric("builder_builds_moved_total")
	if err != nil || moved == 0 {
		t.Errorf("%v builds moved, %v", moved, err)
	}
	took := time.Since(start)
	if took > patience(30*time.Second)*time.Duration(len(home)) {
		t.Errorf("%d builds took %v", len(home), took)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	stack.Eventually(t, time.Minute, func() error {
		if n, err := f.Metric("builder_daemons_full"); err != nil || n != 0 {
			return fmt.Errorf("%v full, %v", n, err)
		}
		return nil
	})
	// The line comes after the daemon has room.
	stack.Eventually(t, patience(5*time.Second), func() error {
		if log, err := f.Log(); err != nil || !strings.Contains(log, "buildkitd pruned") {
			return fmt.Errorf("nothing was pruned: %v", err)
		}
		return nil
	})
	for _, a := range home {
		got, addr, line := a.build(t, f, "RUN : and again "+a.mark)
		got.WantSuccess(t)
		if addr != small.Addr || line["choice"] != "first" {
			t.Errorf("with room again, on %s: %v", addr, line["choice"])
		}
	}

	// What a step itself writes is the build's own failure, wherever it runs, and
	// so is what it only says.
	for _, step := range []string{unstarted, "dd if=/dev/zero of=/blob bs=1M; false"} {
		got, addr, line := a.build(t, f, "RUN : "+a.mark+"; "+step)
		got.WantFailed(t, "build_failed", "disk is full")
		if addr != small.Addr || line["attempts"] != 1.0 {
			t.Errorf("%s: %v attempts, the last on %s", step, line["attempts"], addr)
		}
	}
	t.Logf("%d images there, %v builds moved, in %v", len(home), moved, took.Round(100*time.Millisecond))
}

// TestAffinity: with three daemons and two replicas, what can come from a cache
// does, and by chance it would not.
func TestAffinity(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	// 80 rebuilds have about 120 steps that can come from a cache. At random, about half of
	// the steps do: 0.8 is far from that.
	var affinity, random poolbench.Result
	for round := 1; round == 1 || affinity.Diverted > 0 && affinity.Share() < 0.99 && round <= 3; round++ {
		var err error
		affinity, random, err = poolbench.Compare(ctx, stack.Shared(t), poolbench.Workload{
			Daemons: 3, Replicas: 2, Images: 20, Rebuilds: 4, AtOnce: 3, DepsEvery: 2,
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("round %d: a daemon was too slow to count its builds for %d builds", round, affinity.Diverted)
	}
	if affinity.Share() < 0.99 {
		t.Errorf("%d of %d cacheable steps came from the cache", affinity.Cached, affinity.Cacheable)
	}
	// Else this shows nothing.
	if random.Share() > 0.8 {
		t.Errorf("at random %d of %d", random.Cached, random.Cacheable)
	}
	t.Logf("cached: %.3f with affinity, %.3f at random", affinity.Share(), random.Share())
}
