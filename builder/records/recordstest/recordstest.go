// Package recordstest holds every store of records to the contract of records.Store. A store's
// tests call Run.
package recordstest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
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
		{"Attempts", testAttempts},
		{"Find", testFind},
		{"List", testList},
		{"Pages", testPages},
		{"Follow", testFollow},
		{"LongLog", testLongLog},
		{"Followers", testFollowers},
		{"Cancel", testCancel},
		{"Tenants", testTenants},
		{"Load", testLoad},
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
// once and in order. It returns the lines that were not lost, by number, and how many were.
func ReadLog(t testing.TB, s records.Store, ref records.Ref, after uint64, wait bool) (lines map[uint64]string, lost uint64) {
	t.Helper()
	lines, lost, err := FollowLog(Context(t), s, ref, after, wait)
	if err != nil {
		t.Errorf("following %+v from %d: %v", ref, after, err)
	}
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

func testLife(t *testing.T, open Open) {
	a, b := open(t), open(t)
	began := time.Now().Add(-time.Second).Round(time.Millisecond)
	build := a.Begin(records.Record{Tenant: "acme", ID: "call-1", Began: began, Queued: true, Request: "aa"}, func(string) {})
	ref := records.Ref{Tenant: "acme", ID: "call-1"}
	build.Log("v: one", "l: two")
	build.Update(func(r *records.Record) {
		r.Image, r.ImageName = "registry.example.com/fn", "registry.example.com/fn"
		r.Status, r.Lines, r.Tenant, r.ID = api.Failed, 99, "other", "other" // not its to change
	})
	rec := Known(t, b, ref, func(r records.Record) error {
		if r.Image == "" {
			return errors.New("no image yet")
		}
		return nil
	})
	if !rec.Running() || rec.Attempt != 1 || !rec.Queued || rec.Request != "aa" || !rec.Began.Equal(began) || !rec.Ended.IsZero() || rec.ID != "call-1" || rec.Tenant != "acme" {
		t.Errorf("the record of a running build is %+v", rec)
	}
	build.Log("s: three")
	build.End(Success())
	for i, s := range []records.Store{a, b} {
		rec = Known(t, s, ref, Ended)
		want := records.Record{Tenant: "acme", ID: "call-1", Attempt: 1, Began: began, Ended: rec.Ended, Lines: 3, Queued: true, Request: "aa"}
		want.SetVerdict(Success())
		rec.Began = began // the location may differ
		if fmt.Sprintf("%+v", rec) != fmt.Sprintf("%+v", want) {
			t.Errorf("process %d has the record\n%+v, want\n%+v", i, rec, want)
		}
		if rec.Ended.Before(began) || time.Since(rec.Ended) > Timeout {
			t.Errorf("it ended at %v", rec.Ended)
		}
		lines, lost := ReadLog(t, s, ref, 0, true)
		if lost != 0 || len(lines) != 3 || lines[1] != "v: one" || lines[2] != "l: two" || lines[3] != "s: three" {
			t.Errorf("process %d has the log %v, %d lost", i, lines, lost)
		}
	}

	build.Log("too late")
	build.End(Failure(api.BuildFailed))
	build.Update(func(r *records.Record) { r.Image = "too late" })
	time.Sleep(200 * time.Millisecond)
	if rec = Known(t, b, ref, Any); rec.Status != api.Success || rec.Lines != 3 || rec.Image == "too late" {
		t.Errorf("after its end the record became %+v", rec)
	}
	for _, s := range []records.Store{a, b} {
		if _, err := s.Get(Context(t), records.Ref{Tenant: "acme", ID: "call-2"}); !errors.Is(err, records.ErrNotFound) {
			t.Errorf("a build that never was: %v", err)
		}
		if _, _, err := FollowLog(Context(t), s, records.Ref{Tenant: "acme", ID: "call-2"}, 0, true); !errors.Is(err, records.ErrNotFound) {
			t.Errorf("following a build that never was: %v", err)
		}
	}
}

func testAttempts(t *testing.T, open Open) {
	a, b := open(t), open(t)
	ref := records.Ref{Tenant: "acme", ID: "again"}
	for n, s := range []records.Store{a, b, a} {
		build := Begin(s, "acme", "again")
		rec := Known(t, b, ref, func(r records.Record) error {
			if r.Attempt != n+1 {
				return fmt.Errorf("attempt %d, want %d", r.Attempt, n+1)
			}
			return nil
		})
		if !rec.Running() {
			t.Errorf("attempt %d is %+v", n+1, rec)
		}
		build.Log(fmt.Sprintf("attempt %d", n+1))
		if n < 2 {
			build.End(Failure(api.NoDaemon))
			Known(t, b, ref, Ended)
		}
	}
	for n := 1; n <= 3; n++ {
		ref.Attempt = n
		rec := Known(t, b, ref, Any)
		if rec.Attempt != n || rec.Running() != (n == 3) {
			t.Errorf("attempt %d is %+v", n, rec)
		}
		if n < 3 {
			if lines, _ := ReadLog(t, b, ref, 0, true); lines[1] != fmt.Sprintf("attempt %d", n) {
				t.Errorf("attempt %d has the log %v", n, lines)
			}
		}
	}
	ref.Attempt = 4
	if _, err := b.Get(Context(t), ref); !errors.Is(err, records.ErrNotFound) {
		t.Errorf("attempt 4: %v", err)
	}

	// Many at once get numbers of their own.
	const many = 8
	var wg sync.WaitGroup
	builds := make([]records.Build, many)
	for i := range many {
		wg.Go(func() { builds[i] = Begin([]records.Store{a, b}[i%2], "acme", "race") })
	}
	wg.Wait()
	Eventually(t, func() error {
		var got []int
		for _, build := range builds {
			got = append(got, build.Record().Attempt)
		}
		slices.Sort(got)
		for i, n := range got {
			if n != i+1 {
				return fmt.Errorf("the attempts are %d", got)
			}
		}
		return nil
	})
}

func testFind(t *testing.T, open Open) {
	a, b := open(t), open(t)
	for _, tt := range []struct {
		name   string
		end    func(records.Build)
		stop   string // who asks for its end
		shared bool   // a redelivery is answered with it
	}{
		{"running", nil, "", true},
		{"success", func(b records.Build) { b.End(Success()) }, "", true},
		{"failed", func(b records.Build) { b.End(Failure(api.BuildFailed)) }, "", true},
		{"no daemon", func(b records.Build) { b.End(Failure(api.NoDaemon)) }, "", false},
		{"busy", func(b records.Build) { b.End(Failure(api.Busy)) }, "", false},
		{"its caller left", func(b records.Build) { b.End(Failure(api.Canceled)) }, "", false},
		{"stopped", func(b records.Build) { b.End(Failure(api.Canceled)) }, "k1", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			build := a.Begin(records.Record{Tenant: "acme", ID: tt.name, Began: time.Now(), Request: "body"}, func(string) {})
			ref := records.Ref{Tenant: "acme", ID: tt.name}
			Known(t, b, ref, Any)
			if tt.stop != "" {
				if _, err := b.Cancel(Context(t), records.Cancellation{Ref: ref, By: tt.stop}); err != nil {
					t.Fatal(err)
				}
			}
			if tt.end != nil {
				tt.end(build)
				Known(t, b, ref, Ended)
			}
			for i, s := range []records.Store{a, b} {
				rec, err := s.Find(Context(t), "acme", tt.name, "body")
				if tt.shared && (err != nil || rec.Request != "body" || rec.Attempt != 1) {
					t.Errorf("process %d finds %+v, %v", i, rec, err)
				}
				if !tt.shared && !errors.Is(err, records.ErrNotFound) {
					t.Errorf("process %d finds %+v, %v, want none", i, rec, err)
				}
				for _, other := range [][2]string{{"acme", "other body"}, {"other", "body"}} {
					if rec, err := s.Find(Context(t), other[0], tt.name, other[1]); !errors.Is(err, records.ErrNotFound) {
						t.Errorf("%q finds %+v, %v", other, rec, err)
					}
				}
			}
		})
	}

	// A later attempt with another body does not hide the one that is asked for.
	Begin(b, "acme", "success")
	Known(t, a, records.Ref{Tenant: "acme", ID: "success", Attempt: 2}, Any)
	if rec, err := b.Find(Context(t), "acme", "success", "body"); err != nil || rec.Attempt != 1 {
		t.Errorf("behind a later attempt it finds %+v, %v", rec, err)
	}
}

// ids are of a page.
func ids(p records.Page) (list []string) {
	for _, r := range p.Builds {
		list = append(list, r.ID)
	}
	return list
}

func testList(t *testing.T, open Open) {
	a, b := open(t), open(t)
	builds := make(map[string]records.Build)
	for i, id := range []string{"one", "two", "three", "four"} {
		s := []records.Store{a, b}[i%2]
		builds[id] = s.Begin(records.Record{Tenant: "acme", ID: id, Began: time.Now().Add(-time.Duration(i) * time.Hour), Image: []string{"reg.example.com/fn:1", "reg.example.com/fn2"}[i/2]}, func(string) {})
		Known(t, a, records.Ref{Tenant: "acme", ID: id}, Any)
		Known(t, b, records.Ref{Tenant: "acme", ID: id}, Any)
	}
	Begin(a, "other", "foreign")
	Known(t, b, records.Ref{Tenant: "other", ID: "foreign"}, Any)
	builds["one"].End(api.Record{Status: api.Success, Image: "reg.example.com/fn:1"})
	Known(t, b, records.Ref{Tenant: "acme", ID: "one"}, Ended)
	builds["three"].End(api.Record{Status: api.Failed, Image: "reg.example.com/fn2", Code: api.Deadline})
	Known(t, b, records.Ref{Tenant: "acme", ID: "three"}, Ended)

	for _, tt := range []struct {
		name string
		q    records.Query
		want []string
	}{
		{"all, in the order of their beginnings, whatever clocks and ends say", records.Query{Tenant: "acme", Limit: 50}, []string{"four", "three", "two", "one"}},
		{"an operator", records.Query{Operator: true, Limit: 50}, []string{"foreign", "four", "three", "two", "one"}},
		{"the other tenant", records.Query{Tenant: "other", Limit: 50}, []string{"foreign"}},
		{"nobody", records.Query{Limit: 50}, nil},
		{"running", records.Query{Tenant: "acme", Limit: 50, Status: api.InProgress}, []string{"four", "two"}},
		{"failed", records.Query{Tenant: "acme", Limit: 50, Status: api.Failed}, []string{"three"}},
		{"an image", records.Query{Tenant: "acme", Limit: 50, Image: "reg.example.com/fn:1"}, []string{"two", "one"}},
		{"a repository", records.Query{Tenant: "acme", Limit: 50, Image: "reg.example.com/fn"}, []string{"two", "one"}},
		{"an image that ended well", records.Query{Tenant: "acme", Limit: 50, Image: "reg.example.com/fn", Status: api.Success}, []string{"one"}},
		{"no limit is one", records.Query{Tenant: "acme"}, []string{"four"}},
	} {
		for i, s := range []records.Store{a, b} {
			page, err := s.List(Context(t), tt.q)
			if err != nil || !slices.Equal(ids(page), tt.want) || !page.Complete {
				t.Errorf("%s: process %d lists %q, complete %v, %v; want %q", tt.name, i, ids(page), page.Complete, err, tt.want)
			}
		}
	}
	if _, err := a.List(Context(t), records.Query{Tenant: "acme", Before: "x"}); err == nil {
		t.Error("a Before that is none gives no error")
	}
}

// testPages pages through a list while builds begin and end: none is left out, none comes twice.
func testPages(t *testing.T, open Open) {
	a, b := open(t), open(t)
	const n = 25
	var builds []records.Build
	var want []string
	for i := range n {
		id := fmt.Sprintf("build-%d", i)
		builds = append(builds, Begin(a, "acme", id))
		Known(t, b, records.Ref{Tenant: "acme", ID: id}, Any)
		want = append(want, id)
	}
	slices.Reverse(want)
	var got []string
	q := records.Query{Tenant: "acme", Limit: 4}
	for i := 0; ; i++ {
		page, err := b.List(Context(t), q)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, ids(page)...)
		if page.Next == "" {
			break
		}
		if len(page.Builds) != 4 {
			t.Fatalf("page %d has %d builds and a next one", i, len(page.Builds))
		}
		q.Before = page.Next
		Begin(a, "acme", fmt.Sprintf("later-%d", i))
		builds[n-1-len(got)].End(Success()) // the next page's first
		Known(t, b, records.Ref{Tenant: "acme", ID: want[len(got)]}, Ended)
	}
	if !slices.Equal(got, want) {
		t.Errorf("the pages have %q, want %q", got, want)
	}
}

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

	// Without waiting it ends at the latest line of a running build.
	build = Begin(a, "acme", "short")
	ref.ID = "short"
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

	// A follower that leaves cancels nothing.
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

func testCancel(t *testing.T, open Open) {
	a, b := open(t), open(t)
	for i, from := range []records.Store{a, b} {
		id := fmt.Sprintf("stop-%d", i)
		ref := records.Ref{Tenant: "acme", ID: id}
		told := make(chan string, 9)
		build := a.Begin(records.Record{Tenant: "acme", ID: id, Began: time.Now()}, func(by string) { told <- by })
		Known(t, b, ref, func(r records.Record) error {
			if r.Attempt != 1 {
				return errors.New("no attempt yet")
			}
			return nil
		})
		if _, err := from.Cancel(Context(t), records.Cancellation{Ref: records.Ref{Tenant: "acme", ID: id, Attempt: 2}, By: "k1"}); !errors.Is(err, records.ErrNotFound) {
			t.Errorf("stopping an attempt that is not: %v", err)
		}
		if _, err := from.Cancel(Context(t), records.Cancellation{Ref: records.Ref{Tenant: "other", ID: id}, By: "k1"}); !errors.Is(err, records.ErrNotFound) {
			t.Errorf("stopping another tenant's build: %v", err)
		}
		c := records.Cancellation{Ref: ref, By: "k1", Once: "signature-" + id}
		began := time.Now()
		rec, err := from.Cancel(Context(t), c)
		if err != nil || !rec.Running() || rec.Attempt != 1 {
			t.Fatalf("stopping a running build: %+v, %v", rec, err)
		}
		if by := <-told; by != "k1" {
			t.Errorf("it was stopped by %q", by)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("its owner was told after %v", took)
		}
		for _, again := range []records.Store{a, b} {
			if _, err := again.Cancel(Context(t), c); !errors.Is(err, records.ErrUsed) {
				t.Errorf("the same cancellation again: %v", err)
			}
		}
		if len(told) != 0 {
			t.Errorf("the owner was told again, by %q", <-told)
		}
		build.End(Failure(api.Canceled))
		for _, s := range []records.Store{a, b} {
			rec = Known(t, s, ref, Ended)
			if rec.CanceledBy != "k1" || rec.Code != api.Canceled || !rec.Final() {
				t.Errorf("the stopped build is %+v", rec)
			}
			if rec, err := s.Cancel(Context(t), records.Cancellation{Ref: ref, By: "k2"}); err != nil || rec.Running() || rec.CanceledBy != "k1" {
				t.Errorf("stopping an ended build: %+v, %v", rec, err)
			}
		}
	}
	if _, err := b.Cancel(Context(t), records.Cancellation{Ref: records.Ref{Tenant: "acme", ID: "never"}}); !errors.Is(err, records.ErrNotFound) {
		t.Errorf("stopping a build that never was: %v", err)
	}

	// A cancellation of an earlier attempt does not reach a later one.
	first := Begin(a, "acme", "twice")
	Known(t, b, records.Ref{Tenant: "acme", ID: "twice"}, Any)
	first.End(Failure(api.NoDaemon))
	Known(t, b, records.Ref{Tenant: "acme", ID: "twice"}, Ended)
	Begin(b, "acme", "twice")
	Known(t, a, records.Ref{Tenant: "acme", ID: "twice", Attempt: 2}, Any)
	rec, err := a.Cancel(Context(t), records.Cancellation{Ref: records.Ref{Tenant: "acme", ID: "twice", Attempt: 1}, By: "k1"})
	if err != nil || rec.Running() || rec.Attempt != 1 {
		t.Errorf("stopping the first of two attempts: %+v, %v", rec, err)
	}
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
	all, err := b.Everywhere(Context(t), "same")
	if err != nil || len(all) != 2 || all[0].Tenant == all[1].Tenant {
		t.Errorf("everywhere: %+v, %v", all, err)
	}
	if _, err := b.Everywhere(Context(t), "never"); !errors.Is(err, records.ErrNotFound) {
		t.Errorf("a build that never was, everywhere: %v", err)
	}
	if err := b.Forget(Context(t), "acme"); err != nil {
		t.Fatal(err)
	}
	for _, s := range []records.Store{a, b} {
		if _, err := s.Get(Context(t), records.Ref{Tenant: "acme", ID: "same"}); !errors.Is(err, records.ErrNotFound) {
			t.Errorf("a forgotten build: %v", err)
		}
		if _, err := s.Get(Context(t), records.Ref{Tenant: "other", ID: "same"}); err != nil {
			t.Errorf("the other tenant's build: %v", err)
		}
		if lines, _ := ReadLog(t, s, records.Ref{Tenant: "other", ID: "same"}, 0, true); lines[1] != "other" {
			t.Errorf("the other tenant's log is %v", lines)
		}
		if rec, err := s.Get(Context(t), records.Ref{Tenant: "acme", ID: "running"}); err != nil || !rec.Running() {
			t.Errorf("the running build: %+v, %v", rec, err)
		}
	}
	running.End(Success())
	Known(t, b, records.Ref{Tenant: "acme", ID: "running"}, Ended)
}

func testLoad(t *testing.T, open Open) {
	a, b := open(t), open(t)
	one := Begin(a, "acme", "one")
	Begin(a, "acme", "two")
	three := Begin(b, "other", "three")
	one.Update(func(r *records.Record) { r.Building, r.Daemon = true, "tcp://one:1234" })
	three.Update(func(r *records.Record) { r.Building, r.Daemon = true, "tcp://one:1234" })
	load := func(s records.Store) string {
		l := s.Load()
		return fmt.Sprint(l.Tenants, l.Daemons)
	}
	want := "map[acme:{1 1} other:{1 0}] map[tcp://one:1234:2]"
	for _, s := range []records.Store{a, b} {
		Eventually(t, func() error {
			if got := load(s); got != want {
				return fmt.Errorf("the load is %s, want %s", got, want)
			}
			return nil
		})
	}
	one.End(Success())
	want = "map[acme:{0 1} other:{1 0}] map[tcp://one:1234:1]"
	for _, s := range []records.Store{a, b} {
		Eventually(t, func() error {
			if got := load(s); got != want {
				return fmt.Errorf("the load is %s, want %s", got, want)
			}
			return nil
		})
	}
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
