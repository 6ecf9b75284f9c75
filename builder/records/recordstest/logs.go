package recordstest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"handler/function/records"
)

// testFollow attaches followers at random moments of a long log, from both processes.
func testFollow(t *testing.T, open Open) {
	a, b := open(t), open(t)
	const lines, followers = 20000, 12
	ref := records.Ref{Tenant: "acme", ID: "long"}
	build := Begin(a, "acme", "long")
	Known(t, b, ref, Any)
	text := func(n uint64) string { return fmt.Sprintf("l: line %d of a step", n) }
	var wg sync.WaitGroup
	for i := range followers {
		wg.Go(func() {
			s := []records.Store{a, b}[i%2]
			time.Sleep(time.Duration(rand.IntN(1000)) * time.Millisecond)
			after := uint64(rand.IntN(lines / 2))
			got, lost, err := FollowLog(Context(t), s, ref, after, true)
			if err != nil || lost != 0 || uint64(len(got)) != lines-after {
				t.Errorf("follower %d from %d: %d lines, %d lost, %v", i, after, len(got), lost, err)
				return
			}
			for n, line := range got {
				if line != text(n) {
					t.Errorf("follower %d: line %d is %q", i, n, line)
					return
				}
			}
		})
	}
	for n := uint64(1); n <= lines; n++ {
		build.Log(text(n))
		if n%20 == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	build.End(Success())
	wg.Wait()
	if rec := Known(t, b, ref, Ended); rec.Lines != lines {
		t.Errorf("the record has %d lines", rec.Lines)
	}
	for _, s := range []records.Store{a, b} {
		got, lost := ReadLog(t, s, ref, lines-3, false)
		if len(got) != 3 || lost != 0 {
			t.Errorf("the last three lines are %v, %d lost", got, lost)
		}
		if got, lost = ReadLog(t, s, ref, lines, true); len(got) != 0 || lost != 0 {
			t.Errorf("after the last line: %v, %d lost", got, lost)
		}
	}
}

// testSoFar reads the log of a running build without waiting: it ends at the latest line.
func testSoFar(t *testing.T, open Open) {
	a, b := open(t), open(t)
	build, ref := Begin(a, "acme", "short"), records.Ref{Tenant: "acme", ID: "short"}
	build.Log("one", "two")
	Eventually(t, func() error {
		if _, err := b.Get(Context(t), ref); err != nil {
			return err
		}
		if got, _ := ReadLog(t, b, ref, 0, false); len(got) != 2 {
			return fmt.Errorf("%d lines", len(got))
		}
		return nil
	})
}

// testFollowerLeaves: a follower that leaves cancels nothing.
func testFollowerLeaves(t *testing.T, open Open) {
	a, b := open(t), open(t)
	build, ref := Begin(a, "acme", "short"), records.Ref{Tenant: "acme", ID: "short"}
	build.Log("one", "two")
	Known(t, b, ref, Any)
	ctx, cancel := context.WithCancel(Context(t))
	left := make(chan error)
	go func() {
		_, _, err := FollowLog(ctx, b, ref, 2, true)
		left <- err
	}()
	time.Sleep(50 * time.Millisecond)
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("a follower that left got %v", err)
	}
	if rec := Known(t, b, ref, Any); !rec.Running() {
		t.Errorf("after its follower left, the build is %+v", rec)
	}
}

// testLongLog has more than MaxLog in a log: the latest lines are kept, and the gap is said.
func testLongLog(t *testing.T, open Open) {
	a, b := open(t), open(t)
	ref := records.Ref{Tenant: "acme", ID: "long"}
	build := Begin(a, "acme", "long")
	Known(t, b, ref, Any)
	const size, lines = 1000, 12 << 20 / 1000
	for n := 1; n <= lines; n++ {
		build.Log(fmt.Sprintf("%06d %s", n, strings.Repeat("x", size-7)))
		if n%500 == 0 {
			// A store far away needs the time.
			Eventually(t, func() error {
				if s := a.Stats(); s.Pending > 2<<20 {
					return fmt.Errorf("%d bytes are pending", s.Pending)
				}
				return nil
			})
		}
	}
	build.End(Success())
	Known(t, b, ref, Ended)
	for _, s := range []records.Store{a, b} {
		got, lost := ReadLog(t, s, ref, 0, true)
		if uint64(len(got))+lost != lines {
			t.Errorf("%d lines and %d lost, of %d", len(got), lost, lines)
		}
		if kept := len(got) * size; kept > records.MaxLog || kept < records.MaxLog/2 {
			t.Errorf("%d bytes are kept", kept)
		}
		if !strings.HasPrefix(got[lines], fmt.Sprintf("%06d ", lines)) {
			t.Errorf("the last line is %.20q", got[lines])
		}
	}
}

func testFollowers(t *testing.T, open Open) {
	s := open(t)
	ref := records.Ref{Tenant: "acme", ID: "popular"}
	build := Begin(s, "acme", "popular")
	build.Log("one")
	Known(t, s, ref, Any)
	ctx, cancel := context.WithCancel(Context(t))
	defer cancel()
	var wg sync.WaitGroup
	for range records.MaxFollowers {
		wg.Go(func() { FollowLog(ctx, s, ref, 0, true) })
	}
	Eventually(t, func() error {
		if n := s.Stats().Followers; n != records.MaxFollowers {
			return fmt.Errorf("%d followers", n)
		}
		return nil
	})
	if _, _, err := FollowLog(ctx, s, ref, 0, true); !errors.Is(err, records.ErrBusy) {
		t.Errorf("one follower more got %v", err)
	}
	build.End(Success())
	wg.Wait()
	if n := s.Stats().Followers; n != 0 {
		t.Errorf("%d followers after the end", n)
	}
}
