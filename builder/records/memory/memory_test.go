package memory_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"handler/function/api"
	"handler/function/records"
	"handler/function/records/memory"
	"handler/function/records/recordstest"
)

func TestContract(t *testing.T) {
	recordstest.Run(t, func(t *testing.T) recordstest.Open {
		s := memory.New(memory.Default)
		return func(*testing.T) records.Store { return s }
	})
}

// known is how many of n builds of a tenant are still known, named as fill names them.
func known(t *testing.T, s *memory.Store, tenant string, n int) (count int) {
	for i := range n {
		if _, err := s.Get(t.Context(), records.Ref{Tenant: tenant, ID: fmt.Sprint(i)}); err == nil {
			count++
		}
	}
	return count
}

// fill has n builds of a tenant, each with a log of this many bytes.
func fill(s *memory.Store, tenant string, n, size int) {
	for i := range n {
		b := recordstest.Begin(s, tenant, fmt.Sprint(i))
		for range size / 1000 {
			b.Log(strings.Repeat("x", 1000))
		}
		b.End(recordstest.Success())
	}
}

// TestShares has one tenant that fills the store: another keeps what it has.
func TestShares(t *testing.T) {
	limits := memory.Limits{Age: time.Hour, Builds: 100, Bytes: 4 << 20, Log: 1 << 20}
	for _, tt := range []struct {
		name string
		size int // of each log
	}{{"builds", 0}, {"bytes", 40 << 10}} {
		t.Run(tt.name, func(t *testing.T) {
			s := memory.New(limits)
			fill(s, "quiet", 20, tt.size)
			fill(s, "loud", 500, tt.size)
			if n := known(t, s, "quiet", 20); n != 20 {
				t.Errorf("the quiet tenant has %d of 20 builds", n)
			}
			if n := known(t, s, "loud", 500); n > 80 || n < 20 {
				t.Errorf("the loud tenant has %d builds", n)
			}
			if _, err := s.Get(t.Context(), records.Ref{Tenant: "loud", ID: "499"}); err != nil {
				t.Errorf("its latest build: %v", err)
			}
		})
	}
}

// TestRunning has more in the logs of running builds than the store may take.
func TestRunning(t *testing.T) {
	s := memory.New(memory.Limits{Age: time.Hour, Builds: 100, Bytes: 1 << 20, Log: 1 << 20})
	var builds []records.Build
	for i := range 4 {
		builds = append(builds, recordstest.Begin(s, "acme", fmt.Sprint(i)))
	}
	for n := range 1000 {
		for _, b := range builds {
			b.Log(fmt.Sprintf("%04d %s", n, strings.Repeat("x", 995)))
		}
	}
	kept := 0
	for i, b := range builds {
		b.End(recordstest.Success())
		lines, lost := recordstest.ReadLog(t, s, records.Ref{Tenant: "acme", ID: fmt.Sprint(i)}, 0, true)
		if uint64(len(lines))+lost != 1000 || lost == 0 || !strings.HasPrefix(lines[1000], "0999") {
			t.Errorf("build %d has %d lines, and lost %d", i, len(lines), lost)
		}
		kept += len(lines)
	}
	if kept > 1100 || kept < 300 {
		t.Errorf("%d lines of 1000 bytes are kept in a MiB", kept)
	}
	if s.Stats().Dropped == 0 {
		t.Error("no line is counted as dropped")
	}
}

func TestAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := memory.New(memory.Default)
		running := recordstest.Begin(s, "acme", "running")
		fill(s, "acme", 3, 1000)
		time.Sleep(24*time.Hour - time.Second)
		if n := known(t, s, "acme", 3); n != 3 {
			t.Errorf("%d builds before a day has passed", n)
		}
		time.Sleep(2 * time.Second)
		if n := known(t, s, "acme", 3); n != 0 {
			t.Errorf("%d builds after a day", n)
		}
		if _, err := s.Get(t.Context(), records.Ref{Tenant: "acme", ID: "running"}); err != nil {
			t.Errorf("a build that still runs after a day: %v", err)
		}
		running.End(api.Record{Status: api.Success})
	})
}

// TestPace has a silence, and a follower that is too slow.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := memory.New(memory.Default)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		b := recordstest.Begin(s, "acme", "id")
		go func() {
			time.Sleep(25 * time.Second)
			b.Log("one")
			b.Log("two")
		}()
		began, quiet := time.Now(), 0
		var got []string
		for line, err := range s.Follow(ctx, records.Ref{Tenant: "acme", ID: "id"}, 0, true) {
			switch {
			case err != nil:
				got = append(got, err.Error())
			case line.N == 0:
				quiet++
				if at := time.Since(began); at != time.Duration(quiet)*records.KeepAlive {
					t.Errorf("sign of life %d after %v", quiet, at)
				}
			default:
				got = append(got, line.Text)
				time.Sleep(records.SlowAfter + time.Second)
			}
		}
		if want := []string{"one", records.ErrSlow.Error()}; quiet != 2 || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%d signs of life, and %q, want %q", quiet, got, want)
		}
	})
}
