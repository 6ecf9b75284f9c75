package faults

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// unread sends a request over a connection that takes little more than what is read from it.
func unread(t *testing.T, req *http.Request) net.Conn {
	t.Helper()
	raw, err := httputil.DumpRequestOut(req, true)
	if err != nil {
		t.Fatal(err)
	}
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		controlErr := c.Control(func(fd uintptr) {
			err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096)
		})
		return errors.Join(controlErr, err)
	}}
	conn, err := dialer.DialContext(testContext(t), "tcp", req.URL.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := conn.Write(raw); err != nil {
		t.Fatal(err)
	}
	return conn
}

// TestReaderStops opens a stream and never reads it, while steps print until the
// connection's buffers are full, however large they are, and go on. The function can
// tell only then that nobody reads: what is written and not read grows no more.
func TestReaderStops(t *testing.T) {
	t.Parallel()
	// A daemon that clips prints less than the connection's buffers take.
	b := newBuildkitd(t, stack.BuildkitdConfig{Env: stack.WholeLogs})
	_, f := stack.Test(t, stack.FunctionConfig{Buildkitd: b, Env: map[string]string{"max_builds": "1"}})
	m := mark()
	conn := unread(t, f.MustRequest(t, testContext(t), request(t, local(), printing("while sleep 0.1; do cat /line; done; : "+m)...), client.Accept(client.NDJSON)))
	b.WaitStep(t, m)
	began := time.Now()
	var full time.Time
	var most int64
	for end := time.Now().Add(testTimeout); b.Runs(t, m); time.Sleep(20 * time.Millisecond) {
		if n := underway(t, conn.RemoteAddr(), conn.LocalAddr()); n > most {
			most, full = n, time.Now()
		}
		if time.Now().After(end) {
			t.Fatalf("the steps still run, with %d bytes underway", most)
		}
	}
	took, all := time.Since(full), time.Since(began)
	t.Logf("the steps ended %v after the last of %d bytes, and %v after they began", took, most, all)
	// The write that found no room began before the last bytes: the kernel still takes some of it
	// seconds later. So only the whole time says that the build was not ended too early.
	if limit := patience(32 * time.Second); all < 30*time.Second || took > limit {
		t.Errorf("the build was held for %v after the last bytes and for %v in all, want 30s", took, all)
	}
	waitIdle(t, f)
	mustSend(t, f, request(t, local(), "FROM busybox", "RUN : "+mark()), jsonForm).WantSuccess(t)
	if ends := logged(t, f); len(ends) == 0 || ends[0]["code"] != "canceled" {
		t.Errorf("the log has %v, want canceled first", ends)
	}

	// What has arrived is no whole stream.
	conn.SetReadDeadline(time.Now().Add(patience(5 * time.Second)))
	got, _ := io.ReadAll(conn)
	if strings.Contains(string(got), `"status":"success"`) {
		t.Error("a cut stream tells of a success")
	}
}

// printing is a Dockerfile of six steps that run at once and print the file
// /line, of 40 KB. buildkitd as it comes passes on 200 KiB a second of each step,
// and 2 MiB in all, which the connection's buffers can hold.
func printing(command string) []string {
	lines := []string{"FROM busybox AS base", "RUN head -c 30000 /dev/urandom | base64 -w 0 >/line; echo >>/line"}
	var copies []string
	for i := range 6 {
		lines = append(lines, fmt.Sprintf("FROM base AS s%d", i), fmt.Sprintf("RUN %s %d", command, i))
		copies = append(copies, fmt.Sprintf("COPY --from=s%d /line /%d", i, i))
	}
	return append(append(lines, "FROM base"), copies...)
}

// TestReadersBehind has two who read nothing until a while after the image is pushed: the
// build's caller, and one who follows the build from another replica. What their connections do
// not take waits at the daemon. It comes once they read.
//
// A stream ends when its reader takes nothing for 30 s. A round in which the build takes almost
// as long shows nothing. Nor does a round in which a stream ends in this way although somebody reads:
// the kernel takes seconds to notice it on a connection that has been full. Another round follows,
// three at most.
func TestReadersBehind(t *testing.T) {
	t.Parallel()
	b := newBuildkitd(t, stack.BuildkitdConfig{Env: stack.WholeLogs})
	s, _, one := start(t, stack.FunctionConfig{Buildkitd: b})
	_, _, two := start(t, stack.FunctionConfig{Buildkitd: b})
	for range 3 {
		readers, took := readersBehind(t, s, b, one, two)
		t.Logf("nothing was read for %v", took)
		if took < 28*time.Second && readAll(t, readers) {
			return
		}
		for _, r := range readers {
			r.conn.Close()
		}
		waitIdle(t, one)
		waitIdle(t, two)
	}
	t.Fatal("the streams were cut off, or would have been, three times")
}

// reader is a connection with a stream.
type reader struct {
	who    string
	conn   net.Conn
	before []byte // what has been read
}

// readersBehind begins a build with two readers, and returns when the image has been there for a
// while. took is how long the readers have read nothing.
func readersBehind(t *testing.T, s *stack.Stack, b *stack.Buildkitd, one, two *stack.Function) (readers []*reader, took time.Duration) {
	t.Helper()
	m := mark()
	image := s.Registry.Image(strings.ToLower(m) + ":v1")
	lines := printing("for i in $(seq 50); do cat /line; done; :")
	lines = slices.Insert(lines, 1, sleep(m, 5*time.Minute))
	body := request(t, &builder.BuildConfig{Image: image}, lines...)

	begin := func(f *stack.Function, who, until string) {
		conn := unread(t, f.MustRequest(t, testContext(t), body, client.Queued(m), client.Accept(client.NDJSON)))
		r := &reader{who: who, conn: conn}
		for chunk := make([]byte, 1024); !strings.Contains(string(r.before), until); {
			n, err := conn.Read(chunk)
			if err != nil {
				t.Fatalf("%s, after %q: %v", who, r.before, err)
			}
			r.before = append(r.before, chunk[:n]...)
		}
		readers = append(readers, r)
	}
	begin(one, "the caller", "sleep 300")
	b.WaitStep(t, m)
	begin(two, "who follows", "following it")
	released := time.Now()
	release(t, m)
	stack.Eventually(t, testTimeout, func() error {
		if digest(t, image) == "" {
			return errors.New("nothing is pushed")
		}
		return nil
	})
	// BuildKit's client gives up progress that it cannot hand on for five seconds.
	time.Sleep(8 * time.Second)
	return readers, time.Since(released)
}

// readAll reads the streams to their ends, and wants all that the steps printed. It returns false if a
// stream was cut off.
func readAll(t *testing.T, readers []*reader) bool {
	t.Helper()
	var reading sync.WaitGroup
	var cut atomic.Bool
	for _, r := range readers {
		if n := underway(t, r.conn.RemoteAddr(), r.conn.LocalAddr()); n > 11<<20 {
			t.Fatalf("the connection took all of the log, %d bytes: the test shows nothing", n)
		}
		r.conn.SetReadDeadline(time.Now().Add(time.Minute))
		reading.Go(func() {
			resp, err := http.ReadResponse(bufio.NewReader(io.MultiReader(bytes.NewReader(r.before), r.conn)), nil)
			if err != nil {
				t.Errorf("%s: %v", r.who, err)
				return
			}
			n := 0
			a, err := client.Read(resp, func(r client.Record) {
				for _, line := range r.Log {
					n += len(line)
				}
			})
			switch {
			case err != nil || a.Status == "in_progress":
				t.Logf("%s: the stream was cut off after %d bytes: %v", r.who, n, err)
				cut.Store(true)
				return
			case a.Status != "success":
				t.Errorf("%s: got %v", r.who, a)
			}
			if n < 11<<20 {
				t.Errorf("%s: %d bytes came, of the 12 MB that were printed", r.who, n)
			}
		})
	}
	reading.Wait()
	return !cut.Load()
}
