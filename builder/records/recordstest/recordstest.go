// Package recordstest holds every store of records to the contract of records.Store. A store's
// tests call Run.
package recordstest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"handler/function/api"
	"handler/function/records"
)

// Open returns a store for one more process that shares the records of a test. A store that
// shares none is returned again.
type Open func(t *testing.T) records.Store

// Run runs the contract. setup is called for each test, and returns a place without records.
func Run(t *testing.T, setup func(t *testing.T) Open) {
	for _, tt := range []struct {
		name string
		test func(t *testing.T, open Open)
	}{
		{"Life", testLife},
		{"AfterEnd", testAfterEnd},
		{"Never", testNever},
		{"Attempts", testAttempts},
		{"Find", testFind},
		{"FindEarlier", testFindEarlier},
		{"List", testList},
		{"Rare", testRare},
		{"Pages", testPages},
		{"LateEnds", testLateEnds},
		{"Follow", testFollow},
		{"SoFar", testSoFar},
		{"FollowerLeaves", testFollowerLeaves},
		{"LongLog", testLongLog},
		{"Followers", testFollowers},
		{"Cancel", testCancel},
		{"CancelOnce", testCancelOnce},
		{"CancelAttempt", testCancelAttempt},
		{"Tenants", testTenants},
		{"Bounds", testBounds},
		{"Names", testNames},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, setup(t)) })
	}
}

// Timeout bounds everything that a test waits for.
const Timeout = time.Minute

// Context ends with the test, or after Timeout.
func Context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), Timeout)
	t.Cleanup(cancel)
	return ctx
}

// Eventually calls check until it returns nil.
func Eventually(t testing.TB, check func() error) {
	t.Helper()
	began := time.Now()
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		err := check()
		if err == nil {
			return
		}
		if time.Since(began) > Timeout {
			t.Fatalf("after %v: %v", Timeout, err)
		}
		time.Sleep(wait)
	}
}

// Begin begins a build of a tenant with an id.
func Begin(s records.Store, tenant, id string) records.Build {
	return s.Begin(records.Record{Tenant: tenant, ID: id, Began: time.Now(), Image: "registry.example.com/" + tenant + "/fn:1", ImageName: "registry.example.com/" + tenant + "/fn:1"}, func(string) {})
}

// Success is a verdict.
func Success() api.Record {
	return api.Record{Status: api.Success, Image: "registry.example.com/acme/fn:1", ImageName: "registry.example.com/acme/fn:1", Digest: "sha256:abc", Duration: 1.5, Tags: []string{"a", "b"}}
}

// Failure is a verdict.
func Failure(code api.Code) api.Record {
	return api.Record{Status: api.Failed, Error: "failed", Code: code}
}

// Known waits until a store knows a build, and what check wants to know of it.
func Known(t testing.TB, s records.Store, ref records.Ref, check func(records.Record) error) (rec records.Record) {
	t.Helper()
	Eventually(t, func() (err error) {
		if rec, err = s.Get(Context(t), ref); err != nil {
			return err
		}
		return check(rec)
	})
	return rec
}

// Numbered waits until a build's own process knows which attempt it is. Others may know before.
func Numbered(t testing.TB, build records.Build) {
	t.Helper()
	Eventually(t, func() error {
		if build.Record().Attempt == 0 {
			return errors.New("the build has no number")
		}
		return nil
	})
}

// Reached calls until the store can be reached, three times at most. A store has a few seconds for an
// answer, which a busy machine may need, and says ErrUnknown afterwards. unsure are other errors of
// which a later try may tell more: for Cancel, ErrOwnerUnreachable.
func Reached[T any](t testing.TB, call func() (T, error), unsure ...error) (v T, err error) {
	t.Helper()
	unsure = append(unsure, records.ErrUnknown)
	for try := 1; ; try++ {
		v, err = call()
		if try == 3 || !slices.ContainsFunc(unsure, func(e error) bool { return errors.Is(err, e) }) {
			return v, err
		}
		t.Logf("try %d: %v", try, err)
		time.Sleep(time.Second)
	}
}

// Stop is s.Cancel for a build that runs. It calls again if the owner has not answered in time: with
// another Once, since the one before may be used up. It changes c.Once to the one that counted.
func Stop(t testing.TB, s records.Store, c *records.Cancellation) (records.Record, error) {
	t.Helper()
	once := c.Once
	tries := 0
	return Reached(t, func() (records.Record, error) {
		if tries++; tries > 1 && once != "" {
			c.Once = fmt.Sprint(once, "-", tries)
		}
		return s.Cancel(Context(t), *c)
	}, records.ErrOwnerUnreachable)
}

// get is s.Get of a store that can be reached.
func get(t testing.TB, s records.Store, ref records.Ref) (records.Record, error) {
	t.Helper()
	return Reached(t, func() (records.Record, error) { return s.Get(Context(t), ref) })
}

// find is s.Find of a store that can be reached.
func find(t testing.TB, s records.Store, tenant, id, request string) (records.Record, error) {
	t.Helper()
	return Reached(t, func() (records.Record, error) { return s.Find(Context(t), tenant, id, request) })
}

// cancel is s.Cancel of a store that can be reached, without a build to stop.
func cancel(t testing.TB, s records.Store, c records.Cancellation) (records.Record, error) {
	t.Helper()
	return Reached(t, func() (records.Record, error) { return s.Cancel(Context(t), c) })
}

// everywhere is s.Everywhere of a store that can be reached.
func everywhere(t testing.TB, s records.Store, id string) ([]records.Record, error) {
	t.Helper()
	return Reached(t, func() ([]records.Record, error) { return s.Everywhere(Context(t), id) })
}

// Any is a check of Known that wants nothing more.
func Any(records.Record) error { return nil }

// Ended is a check of Known.
func Ended(r records.Record) error {
	if r.Running() {
		return errors.New("it still runs")
	}
	return nil
}

// ReadLog reads a log from the line after a given one, and checks that every number is there
// once and in order. It returns the lines that were not lost, by number, and how many were. It
// begins again if the store cannot be reached at first: several servers may be choosing who leads.
func ReadLog(t testing.TB, s records.Store, ref records.Ref, after uint64, wait bool) (lines map[uint64]string, lost uint64) {
	t.Helper()
	Eventually(t, func() (err error) {
		lines, lost, err = FollowLog(Context(t), s, ref, after, wait)
		if err != nil && (!errors.Is(err, records.ErrUnknown) || len(lines) > 0) {
			t.Errorf("following %+v from %d: %v", ref, after, err)
			err = nil
		}
		return err
	})
	return lines, lost
}

// FollowLog is ReadLog for a goroutine of its own.
func FollowLog(ctx context.Context, s records.Store, ref records.Ref, after uint64, wait bool) (lines map[uint64]string, lost uint64, err error) {
	lines = make(map[uint64]string)
	next := after + 1
	for line, err := range s.Follow(ctx, ref, after, wait) {
		switch {
		case err != nil:
			return lines, lost, err
		case line.N == 0:
			continue
		case line.N != next+max(line.Lost, 1)-1:
			return lines, lost, fmt.Errorf("line %d, %d lost, where %d comes next", line.N, line.Lost, next)
		case line.Lost > 0:
			lost += line.Lost
		default:
			lines[line.N] = line.Text
		}
		next = line.N + 1
	}
	return lines, lost, nil
}

func testTenants(t *testing.T, open Open) {
	a, b := open(t), open(t)
	for _, tenant := range []string{"acme", "other"} {
		build := Begin(a, tenant, "same")
		build.Log(tenant)
		Known(t, b, records.Ref{Tenant: tenant, ID: "same"}, Any)
		build.End(Success())
		Known(t, b, records.Ref{Tenant: tenant, ID: "same"}, Ended)
	}
	running := Begin(a, "acme", "running")
	Known(t, b, records.Ref{Tenant: "acme", ID: "running"}, Any)
	all, err := everywhere(t, b, "same")
	if err != nil || len(all) != 2 || all[0].Tenant == all[1].Tenant {
		t.Errorf("everywhere: %+v, %v", all, err)
	}
	if _, err := everywhere(t, b, "never"); !errors.Is(err, records.ErrNotFound) {
		t.Errorf("a build that never was, everywhere: %v", err)
	}
	if err := b.Forget(Context(t), "acme"); err != nil {
		t.Fatal(err)
	}
	for _, s := range []records.Store{a, b} {
		if _, err := get(t, s, records.Ref{Tenant: "acme", ID: "same"}); !errors.Is(err, records.ErrNotFound) {
			t.Errorf("a forgotten build: %v", err)
		}
		if _, err := get(t, s, records.Ref{Tenant: "other", ID: "same"}); err != nil {
			t.Errorf("the other tenant's build: %v", err)
		}
		if lines, _ := ReadLog(t, s, records.Ref{Tenant: "other", ID: "same"}, 0, true); lines[1] != "other" {
			t.Errorf("the other tenant's log is %v", lines)
		}
		if rec, err := get(t, s, records.Ref{Tenant: "acme", ID: "running"}); err != nil || !rec.Running() {
			t.Errorf("the running build: %+v, %v", rec, err)
		}
	}
	running.End(Success())
	Known(t, b, records.Ref{Tenant: "acme", ID: "running"}, Ended)
}

func testBounds(t *testing.T, open Open) {
	a, b := open(t), open(t)
	build := Begin(a, "acme", "huge")
	ref := records.Ref{Tenant: "acme", ID: "huge"}
	build.Log(strings.Repeat("ü", records.MaxLine), "", "after it")
	verdict := Failure(api.BuildFailed)
	verdict.Error = strings.Repeat("ü", 1<<20)
	for range 10000 {
		verdict.Warnings = append(verdict.Warnings, strings.Repeat("w", 100))
	}
	build.End(verdict)
	rec := Known(t, b, ref, Ended)
	if len(rec.Error) > 20<<10 || !strings.HasSuffix(rec.Error, "ü…") || len(rec.Warnings) > 200 {
		t.Errorf("the error has %d bytes and there are %d warnings", len(rec.Error), len(rec.Warnings))
	}
	lines, lost := ReadLog(t, b, ref, 0, true)
	if len(lines) != 3 || lost != 0 || len(lines[1]) > records.MaxLine || !strings.HasSuffix(lines[1], "ü…") || lines[2] != "" || lines[3] != "after it" {
		t.Errorf("%d lines, %d lost; the first has %d bytes, the others are %q and %q", len(lines), lost, len(lines[1]), lines[2], lines[3])
	}
}

// testNames has ids that mean something to a store: none is taken for another.
func testNames(t *testing.T, open Open) {
	a, b := open(t), open(t)
	names := []string{"a.b", "a", "*", ">", "a.>", "a b", "\x00", "ü", strings.Repeat("x", 4096), "a\nb", "$JS.API.>"}
	for i, id := range names {
		build := a.Begin(records.Record{Tenant: "acme", ID: id, Began: time.Now(), Request: fmt.Sprint(i)}, func(string) {})
		build.Log(fmt.Sprint(i))
		build.End(Success())
	}
	for i, id := range names {
		ref := records.Ref{Tenant: "acme", ID: id}
		Known(t, b, ref, func(r records.Record) error {
			if r.Request != fmt.Sprint(i) || r.Attempt != 1 {
				return fmt.Errorf("%.20q is %+v", id, r)
			}
			return Ended(r)
		})
		if lines, _ := ReadLog(t, b, ref, 0, true); lines[1] != fmt.Sprint(i) {
			t.Errorf("%.20q has the log %v", id, lines)
		}
	}
}
