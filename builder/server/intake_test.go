package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"handler/function/api"
	"handler/function/budget"
)

// client is a body that a test sends in its own way. It obeys its read deadline.
type client struct {
	*httptest.ResponseRecorder
	size  int           // of the body, in bytes
	piece int           // bytes at once
	pause time.Duration // before each of the head
	after time.Duration // before each of what follows

	mu       sync.Mutex
	deadline *time.Timer
	passed   bool          // it was in the past when it was set
	ended    chan struct{} // closed by it
}

func newClient(size, piece int, pause time.Duration) *client {
	return &client{ResponseRecorder: httptest.NewRecorder(), size: size, piece: piece, pause: pause, ended: make(chan struct{})}
}

func (c *client) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.passed || c.deadline != nil && !c.deadline.Stop() {
		c.ended, c.passed = make(chan struct{}), false // the last one has passed
	}
	ended := c.ended
	c.deadline = nil
	if left := time.Until(t); left > 0 {
		c.deadline = time.AfterFunc(left, func() { close(ended) })
	} else {
		close(ended)
		c.passed = true
	}
	return nil
}

// late is closed when the deadline passes.
func (c *client) late() chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

func (c *client) Read(b []byte) (int, error) {
	select {
	case <-time.After(c.pause):
	case <-c.late():
		return 0, os.ErrDeadlineExceeded
	}
	if c.size == 0 {
		return 0, io.EOF
	}
	n := min(len(b), c.piece, c.size)
	c.size -= n
	return n, nil
}

// arrive begins to receive the body.
func (c *client) arrive(t *testing.T, in *intake) *arrival {
	t.Helper()
	a, err := in.arrive(t.Context(), c, http.NewResponseController(c))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// leave ends an arrival. Nothing of its client goes on.
func (c *client) leave(a *arrival) {
	a.leave()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.deadline != nil {
		c.deadline.Stop()
	}
}

// receive reads a body in the way Server.receive does, and leaves.
func (c *client) receive(a *arrival) error {
	defer c.leave(a)
	_, err := io.CopyN(discard{}, a, headSize+1)
	if err == io.EOF {
		return nil
	}
	if err != nil {
		return err
	}
	if err := a.takeSlot(); err != nil {
		return err
	}
	c.pause = c.after
	_, err = io.CopyBuffer(discard{}, struct{ io.Reader }{a}, make([]byte, 10<<20))
	return err
}

// discard has no ReadFrom, so that a copy to it uses its buffer.
type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }

func testIntake(slots int) *intake {
	return newIntake(context.Background(), budget.New(1<<40), intakeLimits{uploads: slots, rate: 64 << 10, grace: 10 * time.Second, spool: 1 << 39})
}

func code(err error) api.Code {
	if err == nil {
		return ""
	}
	return api.AsError(bodyError(err)).Code
}

// TestPace: the time between two reads does not count against the client. The time inside of
// a read does.
func TestPace(t *testing.T) {
	read := func(t *testing.T, slow, between time.Duration) error {
		in := newIntake(context.Background(), nil, intakeLimits{uploads: 1, rate: 1, grace: 10 * time.Second})
		c := newClient(20, 1, slow)
		a := c.arrive(t, in)
		defer c.leave(a)
		for range 20 {
			if _, err := a.Read(make([]byte, 1)); err != nil {
				return err
			}
			time.Sleep(between)
		}
		return nil
	}
	synctest.Test(t, func(t *testing.T) {
		if err := read(t, time.Second, time.Minute); err != nil {
			t.Errorf("at the rate, with a slow reader: %v", err)
		}
		if err := read(t, 3*time.Second, 0); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("below the rate: %v", err)
		}
	})
}

// TestSlowestEnds: a body that waits for a slot ends the slowest upload that is below
// 256 KiB/s, and no other.
func TestSlowestEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := testIntake(3)
		ends := make(chan string, 10)
		upload := func(name string, rate int) {
			c := newClient(100<<20, rate, 0)
			c.after = time.Second
			a := c.arrive(t, in)
			go func() { ends <- name + " " + string(code(c.receive(a))) }()
			synctest.Wait()
		}
		upload("fast", 10<<20)
		upload("slower", 100<<10)
		upload("slowest", 80<<10)
		time.Sleep(60 * time.Second)
		select {
		case end := <-ends:
			if end != "fast " {
				t.Fatalf("%q ended while nobody waited", end)
			}
		default:
		}
		upload("second", 10<<20)
		upload("third", 10<<20)
		time.Sleep(time.Second)
		got := []string{<-ends, <-ends, <-ends, <-ends}
		slices.Sort(got[1:3]) // they come to their end together
		if want := []string{"slowest busy", "second ", "third ", "slower "}; !slices.Equal(got, want) {
			t.Errorf("ended: %q, want %q", got, want)
		}
	})
}

// TestFastKeepTheirSlots: if no upload is slow, a body that waits is told to come back.
func TestFastKeepTheirSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := testIntake(1)
		fast := newClient(100<<20, 1<<20, 0)
		fast.after = time.Second
		a := fast.arrive(t, in)
		ended := make(chan error, 1)
		go func() { ended <- fast.receive(a) }()
		time.Sleep(5 * time.Second)

		began := time.Now()
		c := newClient(2<<20, 1<<20, 0)
		err := c.receive(c.arrive(t, in))
		if code(err) != api.Busy || time.Since(began) != uploadWait {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		// A small body needs no slot.
		c = newClient(1<<20, 1<<20, 0)
		if err := c.receive(c.arrive(t, in)); err != nil {
			t.Error(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// TestLine: bodies that wait for a slot may take half of the room for heads. The next body is
// told to come back at once.
func TestLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const spool = 32 << 20 // a quarter of it, and headMemory, are the room of heads
		in := newIntake(context.Background(), budget.New(1<<40), intakeLimits{uploads: 1, rate: 1 << 10, grace: time.Minute, spool: spool})
		fast := newClient(1<<30, 1<<20, 0)
		fast.after = time.Second
		a := fast.arrive(t, in)
		go fast.receive(a)
		synctest.Wait()
		ended := make(chan error, 100)
		const room = (headMemory + spool/4) / headSize / 2
		for range room + 1 {
			c := newClient(2<<20, 100<<20, 0)
			a := c.arrive(t, in)
			go func() { ended <- c.receive(a) }()
		}
		time.Sleep(time.Second)
		if n := len(ended); n != 1 {
			t.Errorf("%d of %d bodies have been refused, want 1", n, room+1)
		} else if err := <-ended; code(err) != api.Busy {
			t.Error(err)
		}
		a.cancel(errShuttingDown)
	})
}

// TestSilentHeadsGoFirst: a head finds no room on the disk. Of the heads that take room there,
// the one that has been silent the longest is ended.
func TestSilentHeadsGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newIntake(context.Background(), budget.New(1<<40), intakeLimits{uploads: 1, rate: 64 << 10, grace: time.Minute, spool: 1 << 39})
		ended := make(chan string, 10)
		head := func(name string, disk int64, silent bool) {
			c := newClient(1<<30, 1<<20, 100*time.Millisecond)
			a := c.arrive(t, in)
			a.headDisk.Take(disk)
			if silent {
				a.body = readerFunc(func([]byte) (int, error) {
					<-c.late()
					return 0, os.ErrDeadlineExceeded
				})
			}
			go func() {
				defer a.headDisk.Close()
				defer c.leave(a)
				_, err := io.Copy(discard{}, a)
				ended <- name + " " + string(code(err))
			}()
			time.Sleep(time.Second)
		}
		head("in memory", 0, true)
		head("silent", 1, true)
		head("silent later", 1, true)
		head("fast", 1, false)
		c := newClient(1, 1, 0)
		a := c.arrive(t, in)
		for _, want := range []string{"silent busy", "silent later busy"} {
			if err := a.makeRoom(); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if len(ended) != 1 {
				t.Fatalf("%d have ended, want %q", len(ended), want)
			}
			if got := <-ended; got != want {
				t.Errorf("ended: %q, want %q", got, want)
			}
		}
		began := time.Now()
		var err error
		for err == nil {
			err = a.makeRoom()
		}
		if took := time.Since(began); code(err) != api.NoSpace || took > roomWait {
			t.Errorf("after %v: %v", took, err)
		}
		if len(ended) > 0 {
			t.Errorf("ended: %q", <-ended)
		}
		c.leave(a)
		in.mu.Lock()
		defer in.mu.Unlock()
		for other := range in.arrivals {
			other.cancel(errShuttingDown)
		}
	})
}

// TestSilentLeaveFirst: maxArrivals bodies are being received. A further one ends the body that
// has been silent the longest, and no slow one.
func TestSilentLeaveFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := testIntake(1)
		var all sync.WaitGroup
		var honest *arrival
		for i := range maxArrivals {
			c := newClient(100<<20, 1<<10, 10*time.Millisecond)
			a := c.arrive(t, in)
			if i == 0 {
				honest = a
			} else {
				a.body = readerFunc(func([]byte) (int, error) {
					<-c.late()
					return 0, os.ErrDeadlineExceeded
				})
			}
			all.Go(func() {
				defer c.leave(a)
				io.Copy(discard{}, a)
			})
			if i == 0 {
				time.Sleep(5 * time.Second) // it can be judged then
			}
		}
		time.Sleep(judgedAfter / 2)
		for range 3 {
			c := newClient(1, 1, 0)
			c.leave(c.arrive(t, in))
			synctest.Wait()
		}
		in.mu.Lock()
		if n := len(in.arrivals); honest.ctx.Err() != nil || n >= maxArrivals {
			t.Errorf("the slow one ended with %v; %d are left", honest.ctx.Err(), n)
		}
		for a := range in.arrivals {
			a.cancel(errShuttingDown)
		}
		in.mu.Unlock()
		all.Wait()
	})
}

// TestWaitersMakeRoom: if all bodies that take room wait for more room, the one that takes the
// most is ended. Heads and streams have budgets of their own.
func TestWaitersMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := testIntake(4)
		ended := make(chan string, 10)
		var all sync.WaitGroup
		waiter := func(name string, slot bool, head, upload int64) {
			c := newClient(1<<30, 1<<20, 0)
			a := c.arrive(t, in)
			if slot {
				if err := a.takeSlot(); err != nil {
					t.Fatal(err)
				}
			}
			a.headDisk.Take(head)
			a.uploadDisk.Take(upload)
			a.Read(make([]byte, 10))
			all.Go(func() {
				defer c.leave(a)
				var err error
				for err == nil {
					err = a.makeRoom()
				}
				a.headDisk.Close()
				a.uploadDisk.Close()
				ended <- name + " " + string(code(err))
			})
		}
		waiter("large head", false, 2, 0)
		waiter("small head", false, 1, 0)
		waiter("small stream", true, 3, 1)
		waiter("large stream", true, 0, 2)
		time.Sleep(2 * roomEvery)
		synctest.Wait()
		first := []string{<-ended, <-ended}
		slices.Sort(first)
		if want := []string{"large head busy", "large stream busy"}; !slices.Equal(first, want) {
			t.Errorf("ended: %q, want %q", first, want)
		}
		all.Wait()
	})
}

// TestBurst: a body that came fast and then stopped is slow, whatever its average.
func TestBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := testIntake(1)
		burst := newClient(1<<30, 1<<20, 0)
		a := burst.arrive(t, in)
		a.body = io.MultiReader(io.LimitReader(burst, 50<<20), readerFunc(func([]byte) (int, error) {
			<-burst.late()
			return 0, os.ErrDeadlineExceeded
		}))
		ended := make(chan error, 1)
		go func() { ended <- burst.receive(a) }()
		time.Sleep(3 * time.Second)
		began := time.Now()
		c := newClient(2<<20, 1<<20, 0)
		if err := c.receive(c.arrive(t, in)); err != nil || time.Since(began) > 5*time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		if err := <-ended; code(err) != api.Busy {
			t.Errorf("the other ended with %v", err)
		}
	})
}

// TestEndedAfterItsEnd: a body that has been read cannot be ended, and leaves no deadline in
// the past, because net/http watches its connection.
func TestEndedAfterItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := testIntake(1)
		c := newClient(100, 100, 0)
		a := c.arrive(t, in)
		if _, err := io.Copy(io.Discard, a); err != nil {
			t.Fatal(err)
		}
		a.cancel(errEvicted)
		synctest.Wait()
		select {
		case <-c.late():
			t.Error("its deadline is in the past")
		default:
		}
		c.leave(a)

		c = newClient(100, 100, 0)
		a = c.arrive(t, in)
		a.cancel(errEvicted)
		synctest.Wait()
		if _, err := io.Copy(io.Discard, a); code(err) != api.Busy {
			t.Errorf("one that was ended before: %v", err)
		}
		c.leave(a)
		if len(in.arrivals) != 0 {
			t.Error("something is left")
		}
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// TestManyArrivals: more bodies than maxArrivals send nothing.
func TestManyArrivals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := testIntake(1)
		ends := make(chan error, 3*maxArrivals)
		for range maxArrivals {
			c := newClient(1, 1, time.Hour)
			a := c.arrive(t, in)
			go func() { ends <- c.receive(a) }()
		}
		time.Sleep(2 * time.Second)
		for range 100 {
			c := newClient(5000, 5000, 0)
			if err := c.receive(c.arrive(t, in)); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if n := len(ends); n < 1 || n > 100 {
			t.Errorf("%d were ended", n)
		}
		in.mu.Lock()
		for a := range in.arrivals {
			a.cancel(errShuttingDown)
		}
		in.mu.Unlock()
		synctest.Wait()
		if len(in.arrivals) != 0 {
			t.Errorf("%d are left", len(in.arrivals))
		}
	})
}

// TestAmbiguous: a thing that is signed is never taken for another thing.
func TestAmbiguous(t *testing.T) {
	tar := strings.Repeat("\x00", 1024)
	for message, want := range map[string]bool{
		"GET /builds/x": true, "HEAD /contexts/sha256:00": true, "DELETE /builds/x?attempt=1": true, "1795915276.GET /builds": true,
		"1795915276." + tar: true, "1.\x1f\x8b\x08": true, "1.\x28\xb5\x2f\xfd": true, `1.{"log":[]}`: true,
		"{\n  \"log\": []\n}\n": true, "1795915276.{\n  \"log\": []": true, "id: x\n\nfailed: busy": true, "1795915276.id: x\n": true,
		tar: false, "\x1f\x8b": false, "{\"signature\":\"\"": false, "": false, "1795915276": false, "GET": false, "GET of/x": false,
		"123.txt" + tar: false, "1795915276.context/x" + tar: false,
	} {
		if ambiguous([]byte(message)) != want {
			t.Errorf("%.40q: want %v", message, want)
		}
	}
	if !ambiguous(bytes.Join([][]byte{[]byte("1795915276."), []byte(tar)}, nil)[:1024]) {
		t.Error("a tar after a timestamp, its beginning alone")
	}
}
