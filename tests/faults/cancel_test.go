package faults

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestDisconnect closes the client's connection while a step runs. It runs
// before the others, which would be in its figures.
func TestDisconnect(t *testing.T) {
	for _, form := range []string{jsonForm, client.NDJSON, client.SSE} {
		t.Run(forms[form], func(t *testing.T) {
			s, b, f := start(t, stack.FunctionConfig{})
			var took []time.Duration
			for range 6 {
				m := mark()
				ref := s.Registry.Image("disconnect:" + strings.ToLower(m))
				body := request(t, &builder.BuildConfig{Image: ref}, "FROM busybox", sleep(m, 5*time.Minute))
				ctx, cancel := context.WithCancel(testContext(t))
				ended := make(chan error, 1)
				go func() {
					_, err := f.Post(ctx, body, client.Accept(form))
					ended <- err
				}()
				b.WaitStep(t, m)
				cancel()
				took = append(took, waitGone(t, b, m, 2*time.Second))
				if err := <-ended; !errors.Is(err, context.Canceled) {
					t.Fatalf("the client did not go away while building: %v", err)
				}
				waitIdle(t, f)
				if d := digest(t, ref); d != "" {
					t.Errorf("%s was pushed as %s after the client had gone", ref, d)
				}
			}
			slices.Sort(took)
			judged := took[0]
			if *timing {
				judged = took[len(took)/2]
			}
			t.Logf("from disconnect to the step's end: median %v, longest %v", took[len(took)/2], took[len(took)-1])
			// A function that noticed at its next heartbeat would take 10 s each time. A busy
			// machine makes some of them late, so without -timing the fastest counts.
			if judged > 5*time.Second {
				t.Errorf("steps ended %v after the disconnect, want 5s at most", took)
			}
			for _, end := range logged(t, f) {
				if end["code"] != "canceled" {
					t.Errorf("the log has the code %v for a client that left", end["code"])
				}
			}
		})
	}
}

// frozenLimit is for the verdict about a daemon that has stopped answering.
const frozenLimit = 30 * time.Second

// TestFrozenWhileBuilding stops buildkitd under a running step.
func TestFrozenWhileBuilding(t *testing.T) {
	t.Parallel()
	for _, form := range []string{jsonForm, client.NDJSON} {
		t.Run(forms[form], func(t *testing.T) {
			t.Parallel()
			b := newBuildkitd(t, stack.BuildkitdConfig{})
			_, f := stack.Test(t, stack.FunctionConfig{Buildkitd: b})
			m := mark()
			wait := background(t, f, request(t, local(), "FROM busybox", sleep(m, 5*time.Minute)), form)
			b.WaitStep(t, m)
			freeze(t, b)
			start := time.Now()
			a := wait()
			took := time.Since(start)
			t.Logf("verdict %s %v after the freeze", a.Code, took)
			if took > patience(frozenLimit) {
				t.Errorf("the verdict took %v, want %v at most", took, patience(frozenLimit))
			}
			a.WantFailed(t, "no_daemon")

			if err := b.Resume(); err != nil {
				t.Fatal(err)
			}
			waitGone(t, b, m, 5*time.Second)
			mustSend(t, f, request(t, local(), "FROM busybox", "RUN : "+mark()), jsonForm).WantSuccess(t)
		})
	}
}

// TestFrozenBefore stops buildkitd between two builds, with a connection that
// is kept and with none.
func TestFrozenBefore(t *testing.T) {
	t.Parallel()
	for _, kept := range []bool{true, false} {
		t.Run(fmt.Sprintf("kept %v", kept), func(t *testing.T) {
			t.Parallel()
			b := newBuildkitd(t, stack.BuildkitdConfig{})
			_, f := stack.Test(t, stack.FunctionConfig{Buildkitd: b})
			body := request(t, local(), "FROM busybox", "RUN : "+mark())
			if kept {
				mustSend(t, f, body, jsonForm).WantSuccess(t)
			}
			freeze(t, b)
			start := time.Now()
			mustSend(t, f, body, jsonForm).WantFailed(t, "no_daemon")
			took := time.Since(start)
			t.Logf("verdict after %v", took)
			if took > patience(frozenLimit) {
				t.Errorf("the verdict took %v, want %v at most", took, patience(frozenLimit))
			}
			if n, err := f.Metric("builder_daemons_reachable"); err != nil || n != 0 {
				t.Errorf("builder_daemons_reachable is %v, %v, want 0", n, err)
			}
			if err := b.Resume(); err != nil {
				t.Fatal(err)
			}
			mustSend(t, f, body, jsonForm).WantSuccess(t)
		})
	}
}

func freeze(t *testing.T, b *stack.Buildkitd) {
	t.Helper()
	if err := b.Pause(); err != nil {
		t.Fatal(err)
	}
}

// TestDaemonRestartedBetween restarts buildkitd five times; each time the same
// function must build with it at once.
func TestDaemonRestartedBetween(t *testing.T) {
	t.Parallel()
	b := newBuildkitd(t, stack.BuildkitdConfig{})
	_, f := stack.Test(t, stack.FunctionConfig{Buildkitd: b})
	build := func() time.Duration {
		t.Helper()
		a := mustSend(t, f, request(t, local(), "FROM busybox", "RUN : "+mark()), jsonForm)
		a.WantSuccess(t)
		return a.Took
	}
	build()
	var took []time.Duration
	for range 5 {
		if err := b.Restart(testContext(t)); err != nil {
			t.Fatal(err)
		}
		took = append(took, build())
	}
	t.Logf("the first build after a restart took %v", took)
	for _, end := range logged(t, f) {
		if end["attempts"] != 1.0 {
			t.Errorf("a build took %v attempts: it found out about the restart on its way", end["attempts"])
		}
	}

	// And without one: the callers are told at once, and the next build works.
	b.Kill()
	a := mustSend(t, f, request(t, local(), "FROM busybox", "RUN : "+mark()), jsonForm)
	a.WantFailed(t, "no_daemon")
	t.Logf("no daemon at all: verdict after %v", a.Took)
	if a.Took > patience(10*time.Second) {
		t.Errorf("took %v to say that there is no daemon", a.Took)
	}
	if err := b.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	build()
}

// link is a way to the daemon, and buildkit_addr for it.
func link(t *testing.T, b *stack.Buildkitd) (l *stack.Link, addr string) {
	l = stack.NewLink(t, host(b))
	return l, "tcp://" + l.Addr
}

// host is the daemon's host:port.
func host(b *stack.Buildkitd) string { return strings.TrimPrefix(b.Addr, "tcp://") }

// TestDaemonKilledAndBack kills buildkitd under a step. Another, which has run before, is at
// once at its address: the function gives a daemon up after 5 s, and a busy machine takes
// longer to start one.
func TestDaemonKilledAndBack(t *testing.T) {
	t.Parallel()
	b, next := newBuildkitd(t, stack.BuildkitdConfig{}), newBuildkitd(t, stack.BuildkitdConfig{})
	way, addr := link(t, b)
	s, f := stack.Test(t, stack.FunctionConfig{Env: map[string]string{"buildkit_addr": addr}})
	m := mark()
	ref := s.Registry.Image("killed-and-back:latest")
	body := request(t, &builder.BuildConfig{Image: ref}, "FROM busybox", sleep(m, 5*time.Minute))
	wait := background(t, f, body, client.NDJSON)
	b.WaitStep(t, m)
	way.Lead(host(next))
	b.Kill()
	next.WaitStep(t, m)
	release(t, m)
	a := wait()
	a.WantSuccess(t)
	if !slices.ContainsFunc(a.Log, func(l string) bool { return strings.Contains(l, "building again") }) {
		t.Errorf("nothing in the log tells of the second attempt: %q", a.Log)
	}
	if ends := logged(t, f); len(ends) != 1 || ends[0]["attempts"] != 2.0 {
		t.Errorf("the function's log has %v, want one build of two attempts", ends)
	}
	if d := digest(t, ref); d != a.Digest {
		t.Errorf("the registry has %q, the answer %q", d, a.Digest)
	}
	wantWhole(t, s.Registry.Image("killed-and-back"))

	// The first, with its state, builds what was broken off there.
	if err := b.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	way.Lead(host(b))
	next.Kill()
	wait = background(t, f, body, client.NDJSON)
	b.WaitStep(t, m)
	release(t, m)
	wait().WantSuccess(t)
}

// TestCertificateReplaced changes the client's certificate under a function
// with a kept connection, and then the CA with everything that it signed.
func TestCertificateReplaced(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	certs := copyCerts(t, s.Certs)
	b := newBuildkitd(t, stack.BuildkitdConfig{Certs: certs})
	_, f := stack.Test(t, stack.FunctionConfig{Buildkitd: b})
	build := func() client.Answer {
		t.Helper()
		return mustSend(t, f, request(t, local(), "FROM busybox", "RUN : "+mark()), jsonForm)
	}
	build().WantSuccess(t)

	// One of another CA must be noticed, or the kept connection still serves.
	foreign := filepath.Join(t.TempDir(), "certs")
	makeCerts(t, s, foreign)
	install(t, f, foreign, "buildkit-cert", "buildkit-key")
	a := build()
	a.WantFailed(t, "no_daemon")
	t.Logf("a certificate of a foreign CA: %v", a)

	// A new one of the same CA; meanwhile a build runs on the old connection.
	install(t, f, certs, "buildkit-cert", "buildkit-key")
	renewed := copyCerts(t, certs)
	makeCerts(t, s, renewed)
	m := mark()
	long := background(t, f, request(t, local(), "FROM busybox", sleep(m, 5*time.Minute)), client.NDJSON)
	b.WaitStep(t, m)
	connected := func(want int, limit time.Duration, when string) {
		t.Helper()
		stack.Eventually(t, patience(limit), func() error {
			if n := connections(t, b); n != want {
				return fmt.Errorf("%d connections to buildkitd %s, want %d", n, when, want)
			}
			return nil
		})
	}
	connected(1, 5*time.Second, "before the certificate changed")
	install(t, f, renewed, "buildkit-cert", "buildkit-key")
	build().WantSuccess(t)
	connected(2, 0, "after the certificate changed")
	if !b.Runs(t, m) {
		t.Error("the running build ended with the old certificate")
	}
	release(t, m)
	long().WantSuccess(t)
	connected(1, 5*time.Second, "after the last build on the old one")

	// A new CA: the daemon reads its files when it starts.
	if err := os.RemoveAll(certs); err != nil {
		t.Fatal(err)
	}
	makeCerts(t, s, certs)
	b.Kill()
	install(t, f, certs, "buildkit-ca", "buildkit-cert", "buildkit-key")
	if err := b.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	build().WantSuccess(t)
}

func copyCerts(t *testing.T, certs string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "certs")
	if err := os.CopyFS(dir, os.DirFS(certs)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// makeCerts makes new certificates in dir, with the CA that is there or, where
// there is none, a new one.
func makeCerts(t *testing.T, s *stack.Stack, dir string) {
	t.Helper()
	cmd := exec.Command(filepath.Join(s.Repo, "buildkit", "certs.sh"), dir)
	cmd.Env = append(os.Environ(), "FORCE=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("making certificates: %v\n%s", err, out)
	}
}

// install puts certificates where the function reads them.
func install(t *testing.T, f *stack.Function, certs string, names ...string) {
	t.Helper()
	from := map[string]string{"buildkit-ca": "ca.pem", "buildkit-cert": "client/cert.pem", "buildkit-key": "client/key.pem"}
	for _, name := range names {
		text, err := os.ReadFile(filepath.Join(certs, from[name]))
		if err != nil {
			t.Fatal(err)
		}
		replace(t, f, name, text)
	}
}

// underway is the number of bytes that were written to a connection at from and not
// read at to, two addresses of this machine: what waits to be sent, and what has
// arrived. A nil address is any.
func underway(t *testing.T, from, to net.Addr) (n int64) {
	t.Helper()
	is := func(field string, addr net.Addr) bool { return addr == nil || strings.HasSuffix(field, portHex(addr)) }
	for _, fields := range sockets(t) {
		// The fifth field is the send queue, a colon and the receive queue.
		sent, received, _ := strings.Cut(fields[4], ":")
		for _, end := range []struct {
			local, remote net.Addr
			queue         string
		}{{from, to, sent}, {to, from, received}} {
			if !is(fields[1], end.local) || !is(fields[2], end.remote) {
				continue
			}
			bytes, err := strconv.ParseInt(end.queue, 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			n += bytes
		}
	}
	return n
}

// sockets are the lines on established connections in the kernel's tables: sl, local
// address, remote address, state, queues.
func sockets(t *testing.T) (lines [][]string) {
	t.Helper()
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if fields := strings.Fields(line); len(fields) > 4 && fields[3] == "01" {
				lines = append(lines, fields)
			}
		}
	}
	return lines
}

// portHex is how the kernel's tables write an address's port.
func portHex(addr net.Addr) string { return fmt.Sprintf(":%04X", addr.(*net.TCPAddr).Port) }

// connections is the number of connections that a daemon has accepted.
func connections(t *testing.T, b *stack.Buildkitd) int {
	t.Helper()
	addr, err := net.ResolveTCPAddr("tcp", strings.TrimPrefix(b.Addr, "tcp://"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fields := range sockets(t) {
		if strings.HasSuffix(fields[1], portHex(addr)) {
			n++
		}
	}
	return n
}
