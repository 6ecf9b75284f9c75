package records

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"handler/function/api"
	"handler/function/records"
	"handler/function/records/jetstream"
	"handler/function/records/recordstest"
	"handler/function/tests/stack"
)

// ownerVariable has the address of the servers in the process of a replica that a test starts.
const ownerVariable = "RECORDS_OWNER"

func TestMain(m *testing.M) {
	if url := os.Getenv(ownerVariable); url != "" {
		if err := own(url, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// own is a replica. It has one build of each line that it reads, "begin ID", and logs a line
// every 10 ms. "end ID" ends it. It answers each line when it has done so, "memory" with what it
// takes.
func own(url string, in io.Reader, out io.Writer) error {
	var s *jetstream.Store
	builds := make(map[string]records.Build)
	var mu sync.Mutex
	go func() {
		for n := 1; ; n++ {
			mu.Lock()
			for _, b := range builds {
				b.Log(fmt.Sprintf("l: %d", n))
			}
			mu.Unlock()
			time.Sleep(10 * time.Millisecond)
		}
	}()
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		what, id, _ := strings.Cut(lines.Text(), " ")
		mu.Lock()
		switch what {
		case "open":
			var err error
			if s, err = jetstream.Open(jetstream.Options{URL: url, Roots: [][]byte{root}}); err != nil {
				return err
			}
		case "flood":
			flood(s)
		case "list":
			if _, err := s.List(context.Background(), records.Query{Operator: true, Limit: records.MaxPage}); err != nil {
				return err
			}
		case "begin":
			builds[id] = s.Begin(records.Record{Tenant: "acme", ID: id, Began: time.Now(), Building: true, Daemon: "tcp://one:1234"}, func(string) {})
		case "end":
			builds[id].End(recordstest.Success())
			delete(builds, id)
		}
		mu.Unlock()
		if what == "memory" {
			debug.FreeOSMemory()
			b, err := os.ReadFile("/proc/self/status")
			if err != nil {
				return err
			}
			_, rss, _ := strings.Cut(string(b), "VmRSS:")
			rss, _, _ = strings.Cut(rss, "\n")
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			fmt.Fprintf(out, "%s (heap %d kB, stacks %d kB, %d goroutines)\n", strings.TrimSpace(rss), m.HeapInuse>>10, m.StackInuse>>10, runtime.NumGoroutine())
			continue
		}
		fmt.Fprintln(out, "done")
	}
	return lines.Err()
}

// flood has more builds and lines than can be stored while a server is frozen.
func flood(s *jetstream.Store) {
	line := "l: " + strings.Repeat("x", 97)
	for i := range 10000 {
		b := recordstest.Begin(s, "acme", fmt.Sprint("ended-", i))
		b.Log(line)
		b.End(recordstest.Failure(api.BuildFailed))
	}
	for i := range 32 {
		b := recordstest.Begin(s, "acme", fmt.Sprint("running-", i))
		for range 10000 {
			b.Log(line)
		}
	}
}

// owner is a replica in a process of its own.
type owner struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startOwner(t testing.TB, servers []*stack.NATS) *owner {
	t.Helper()
	o := spawnOwner(t, servers)
	o.say(t, "open")
	return o
}

// spawnOwner is startOwner before it opens its store.
func spawnOwner(t testing.TB, servers []*stack.NATS) *owner {
	t.Helper()
	o := &owner{cmd: exec.Command(os.Args[0])}
	o.cmd.Env = append(os.Environ(), ownerVariable+"="+urls(servers))
	o.cmd.Stderr = os.Stderr
	var err error
	if o.in, err = o.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := o.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	o.out = bufio.NewReader(out)
	if err := o.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		o.cmd.Process.Kill()
		o.cmd.Wait()
	})
	return o
}

func (o *owner) say(t testing.TB, line string) string {
	t.Helper()
	if _, err := fmt.Fprintln(o.in, line); err != nil {
		t.Fatal(err)
	}
	answer, err := o.out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(answer)
}

func isLost(r records.Record) error {
	if r.Code != api.Lost {
		return fmt.Errorf("the build is %s %s", r.Status, r.Code)
	}
	return nil
}

func isRunning(r records.Record) error {
	if !r.Running() {
		return fmt.Errorf("the build is %s %s", r.Status, r.Code)
	}
	return nil
}

func isSuccess(r records.Record) error {
	if r.Status != api.Success {
		return fmt.Errorf("the build is %s %s", r.Status, r.Code)
	}
	return nil
}

// lostWithin is how soon the others find a build lost: 20 s, and as much again for a machine that is
// busy with other tests. What it looks for takes minutes.
const lostWithin = 40 * time.Second

// TestOwnerKilled kills a replica that has many builds. Three others are there, and each build is
// found lost by one of them, although nobody is quick to say what became of it.
func TestOwnerKilled(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{})
	const more = 30
	asked := make(chan records.Record, 3*(more+1))
	var others []*jetstream.Store
	for range 3 {
		others = append(others, opened(t, servers, func(o *jetstream.Options) {
			o.Ask = func(ctx context.Context, r records.Record) records.Record {
				asked <- r
				time.Sleep(time.Second)
				r.Digest = "sha256:pushed"
				return r
			}
		}))
	}
	o := startOwner(t, servers)
	ref := records.Ref{Tenant: "acme", ID: "killed"}
	o.say(t, "begin killed")
	for i := range more {
		o.say(t, fmt.Sprint("begin more-", i))
	}
	recordstest.Known(t, others[0], ref, isRunning)
	recordstest.Eventually(t, func() error {
		if l := others[0].Elsewhere(); !l.Complete || l.Tenants["acme"] != more+1 {
			return fmt.Errorf("the load is %+v", l)
		}
		return nil
	})
	followed := make(chan error, 1)
	go func() {
		lines, _, err := recordstest.FollowLog(recordstest.Context(t), others[1], ref, 0, true)
		if err == nil && len(lines) == 0 {
			err = errors.New("no lines")
		}
		followed <- err
	}()
	const logged = 50
	recordstest.Known(t, others[1], ref, func(r records.Record) error {
		if r.Lines < logged {
			return fmt.Errorf("%d lines so far", r.Lines)
		}
		return nil
	})
	o.cmd.Process.Kill()
	o.cmd.Wait()
	died := time.Now()

	_, err := recordstest.Reached(t, func() (records.Record, error) {
		return others[2].Cancel(recordstest.Context(t), records.Cancellation{Ref: ref, By: "k1", Once: rand.Text()})
	})
	if !errors.Is(err, records.ErrOwnerUnreachable) {
		t.Errorf("stopping its build: %v after %v", err, time.Since(died))
	}
	rec := recordstest.Known(t, others[0], ref, isLost)
	for i := range more {
		recordstest.Known(t, others[0], records.Ref{Tenant: "acme", ID: fmt.Sprint("more-", i)}, isLost)
	}
	took := time.Since(died)
	t.Logf("found lost after %v", took)
	if took > lostWithin {
		t.Errorf("it was found lost after %v", took)
	}
	if rec.Digest != "sha256:pushed" || rec.Status != api.Failed || rec.Final() || rec.Ended.IsZero() || rec.Lines < logged {
		t.Errorf("the lost build is %+v", rec)
	}
	if err := <-followed; err != nil {
		t.Errorf("its follower: %v", err)
	}
	t.Logf("its follower ended after %v", time.Since(died))
	time.Sleep(5 * time.Second) // for a second one, if there were one
	var found uint64
	for _, s := range others {
		found += s.Stats().Lost
		recordstest.Eventually(t, func() error {
			if l := s.Elsewhere(); !l.Complete || l.Tenants["acme"] != 0 {
				return fmt.Errorf("the load is %+v", l)
			}
			return nil
		})
	}
	if found != more+1 {
		t.Errorf("%d builds were found lost %d times", more+1, found)
	}
	if r := <-asked; r.Daemon != "tcp://one:1234" {
		t.Errorf("what became of it was asked of the daemon %q", r.Daemon)
	}
	if rec := recordstest.Known(t, others[1], ref, recordstest.Any); rec.Error == "" || rec.Code != api.Lost {
		t.Errorf("it became %+v", rec)
	}
}

// TestOwnerFrozen freezes a replica until its builds are found lost. One ends while it is thought
// lost, and the other goes on.
func TestOwnerFrozen(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{})
	other := opened(t, servers, nil)
	o := startOwner(t, servers)
	for _, id := range []string{"one", "two"} {
		o.say(t, "begin "+id)
		recordstest.Known(t, other, records.Ref{Tenant: "acme", ID: id}, isRunning)
	}
	ref := records.Ref{Tenant: "acme", ID: "two"}
	o.cmd.Process.Signal(syscall.SIGSTOP)
	frozen := time.Now()
	for _, id := range []string{"one", "two"} {
		recordstest.Known(t, other, records.Ref{Tenant: "acme", ID: id}, isLost)
	}
	if took := time.Since(frozen); took > lostWithin {
		t.Errorf("its builds were found lost after %v", took)
	}
	if _, err := recordstest.Stop(t, other, &records.Cancellation{Ref: ref, By: "k1"}); err != nil {
		t.Errorf("stopping a lost build: %v", err)
	}
	o.cmd.Process.Signal(syscall.SIGCONT)
	thawed := time.Now()
	o.say(t, "end one")
	recordstest.Known(t, other, records.Ref{Tenant: "acme", ID: "one"}, isSuccess)
	recordstest.Known(t, other, ref, isRunning)
	t.Logf("it runs again %v after the thaw", time.Since(thawed))
	o.say(t, "end two")
	rec := recordstest.Known(t, other, ref, isSuccess)
	lines, lost := recordstest.ReadLog(t, other, ref, 0, true)
	if lost != 0 || uint64(len(lines)) != rec.Lines || rec.Attempt != 1 {
		t.Errorf("%d lines, %d lost; the record is %+v", len(lines), lost, rec)
	}
	recordstest.Eventually(t, func() error {
		page, err := other.List(recordstest.Context(t), records.Query{Tenant: "acme", Limit: 10})
		if err == nil && (len(page.Builds) != 2 || page.Builds[0].Status != api.Success || page.Builds[1].Status != api.Success) {
			err = fmt.Errorf("the list is %+v", page)
		}
		return err
	})
}
