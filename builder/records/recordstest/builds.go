package recordstest

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"handler/function/api"
	"handler/function/records"
)

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
	if !rec.Began.Equal(began) {
		t.Errorf("the build began at %v, and not at %v", rec.Began, began)
	}
	rec.Began, rec.Lines = began, 0 // the location may differ, and the number of lines yet
	want := records.Record{
		Tenant: "acme", ID: "call-1", Attempt: 1, Image: "registry.example.com/fn", ImageName: "registry.example.com/fn",
		Status: api.InProgress, Began: began, Queued: true, Request: "aa",
	}
	if fmt.Sprintf("%+v", rec) != fmt.Sprintf("%+v", want) {
		t.Errorf("the record of a running build is\n%+v, want\n%+v", rec, want)
	}
	Known(t, b, ref, func(r records.Record) error {
		if r.Lines != 2 {
			return fmt.Errorf("%d lines so far", r.Lines)
		}
		return nil
	})
	build.Log("s: three")
	build.End(Success())
	for i, s := range []records.Store{a, b} {
		rec = Known(t, s, ref, Ended)
		want.Ended, want.Lines = rec.Ended, 3
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
}

func testAfterEnd(t *testing.T, open Open) {
	a, b := open(t), open(t)
	build, ref := Begin(a, "acme", "call-1"), records.Ref{Tenant: "acme", ID: "call-1"}
	build.Log("l: one")
	build.End(Success())
	Known(t, b, ref, Ended)
	build.Log("too late")
	build.End(Failure(api.BuildFailed))
	build.Update(func(r *records.Record) { r.Image = "too late" })
	time.Sleep(200 * time.Millisecond)
	if rec := Known(t, b, ref, Any); rec.Status != api.Success || rec.Lines != 1 || rec.Image == "too late" {
		t.Errorf("after its end the record became %+v", rec)
	}
}

func testNever(t *testing.T, open Open) {
	for _, s := range []records.Store{open(t), open(t)} {
		if _, err := get(t, s, records.Ref{Tenant: "acme", ID: "call-2"}); !errors.Is(err, records.ErrNotFound) {
			t.Errorf("a build that never was: %v", err)
		}
		if _, err := Reached(t, func() (map[uint64]string, error) {
			lines, _, err := FollowLog(Context(t), s, records.Ref{Tenant: "acme", ID: "call-2"}, 0, true)
			return lines, err
		}); !errors.Is(err, records.ErrNotFound) {
			t.Errorf("following a build that never was: %v", err)
		}
		if _, err := cancel(t, s, records.Cancellation{Ref: records.Ref{Tenant: "acme", ID: "call-2"}}); !errors.Is(err, records.ErrNotFound) {
			t.Errorf("stopping a build that never was: %v", err)
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
	if _, err := get(t, b, ref); !errors.Is(err, records.ErrNotFound) {
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
			Numbered(t, build)
			if tt.stop != "" {
				if _, err := Stop(t, b, &records.Cancellation{Ref: ref, By: tt.stop}); err != nil {
					t.Fatal(err)
				}
			}
			if tt.end != nil {
				tt.end(build)
				Known(t, b, ref, Ended)
			}
			for i, s := range []records.Store{a, b} {
				rec, err := find(t, s, "acme", tt.name, "body")
				if tt.shared && (err != nil || rec.Request != "body" || rec.Attempt != 1) {
					t.Errorf("process %d finds %+v, %v", i, rec, err)
				}
				if !tt.shared && !errors.Is(err, records.ErrNotFound) {
					t.Errorf("process %d finds %+v, %v, want none", i, rec, err)
				}
				for _, other := range [][2]string{{"acme", "other body"}, {"other", "body"}} {
					if rec, err := find(t, s, other[0], tt.name, other[1]); !errors.Is(err, records.ErrNotFound) {
						t.Errorf("%q finds %+v, %v", other, rec, err)
					}
				}
			}
		})
	}
}

// testFindEarlier: a later attempt with another body does not hide the one that is asked for.
func testFindEarlier(t *testing.T, open Open) {
	a, b := open(t), open(t)
	first := a.Begin(records.Record{Tenant: "acme", ID: "call-1", Began: time.Now(), Request: "body"}, func(string) {})
	Known(t, b, records.Ref{Tenant: "acme", ID: "call-1"}, Any)
	first.End(Success())
	Known(t, b, records.Ref{Tenant: "acme", ID: "call-1"}, Ended)
	Begin(b, "acme", "call-1")
	Known(t, a, records.Ref{Tenant: "acme", ID: "call-1", Attempt: 2}, Any)
	if rec, err := find(t, b, "acme", "call-1", "body"); err != nil || rec.Attempt != 1 {
		t.Errorf("behind a later attempt it finds %+v, %v", rec, err)
	}
}

func testCancel(t *testing.T, open Open) {
	a, b := open(t), open(t)
	cancelFrom(t, "stop-0", a, a, b)
	cancelFrom(t, "stop-1", b, a, b)
}

// cancelFrom has one of two processes, a and b, end a build of a.
func cancelFrom(t *testing.T, id string, from, a, b records.Store) {
	t.Helper()
	ref := records.Ref{Tenant: "acme", ID: id}
	told := make(chan string, 9)
	build := a.Begin(records.Record{Tenant: "acme", ID: id, Began: time.Now()}, func(by string) { told <- by })
	Known(t, b, ref, func(r records.Record) error {
		if r.Attempt != 1 {
			return errors.New("no attempt yet")
		}
		return nil
	})
	Numbered(t, build)
	for _, other := range []records.Ref{{Tenant: "acme", ID: id, Attempt: 2}, {Tenant: "other", ID: id}} {
		if _, err := cancel(t, from, records.Cancellation{Ref: other, By: "k1"}); !errors.Is(err, records.ErrNotFound) {
			t.Errorf("stopping %+v: %v", other, err)
		}
	}
	c := records.Cancellation{Ref: ref, By: "k1", Once: "signature-" + id}
	if rec, err := Stop(t, from, &c); err != nil || !rec.Running() || rec.Attempt != 1 {
		t.Fatalf("stopping a running build: %+v, %v", rec, err)
	}
	select {
	case by := <-told:
		if by != "k1" {
			t.Errorf("it was stopped by %q", by)
		}
	case <-time.After(Timeout):
		t.Fatal("its process has not been told")
	}
	before := len(told) // of tries whose answers were late
	for _, again := range []records.Store{a, b} {
		if _, err := cancel(t, again, c); !errors.Is(err, records.ErrUsed) {
			t.Errorf("the same cancellation again: %v", err)
		}
	}
	if len(told) != before {
		t.Errorf("the owner was told again, by %q", <-told)
	}
	build.End(Failure(api.Canceled))
	for _, s := range []records.Store{a, b} {
		wantStopped(t, s, ref)
	}
}

// wantStopped wants a build to have been stopped by k1, and another request to stop it to change
// nothing.
func wantStopped(t *testing.T, s records.Store, ref records.Ref) {
	t.Helper()
	rec := Known(t, s, ref, Ended)
	if rec.CanceledBy != "k1" || rec.Code != api.Canceled || !rec.Final() {
		t.Errorf("the stopped build is %+v", rec)
	}
	rec, err := cancel(t, s, records.Cancellation{Ref: ref, By: "k2"})
	if err != nil || rec.Running() || rec.CanceledBy != "k1" {
		t.Errorf("stopping an ended build: %+v, %v", rec, err)
	}
}

// testCancelOnce: a cancellation that has found an ended build does not end a later attempt. One that
// has found no build can be repeated.
func testCancelOnce(t *testing.T, open Open) {
	a, b := open(t), open(t)
	ref := records.Ref{Tenant: "acme", ID: "call-1"}
	// Several, since a try that finds a build and is answered late is used up.
	var early []records.Cancellation
	for i := range 3 {
		early = append(early, records.Cancellation{Ref: ref, By: "k1", Once: fmt.Sprint("early-", i)})
		if _, err := cancel(t, b, early[i]); !errors.Is(err, records.ErrNotFound) {
			t.Errorf("stopping a build before it begins: %v", err)
		}
	}
	Begin(a, "acme", "call-1").End(Success())
	Known(t, b, ref, Ended)
	late := records.Cancellation{Ref: ref, By: "k1", Once: "late"}
	if rec, err := Stop(t, b, &late); err != nil || rec.Running() {
		t.Errorf("stopping an ended build: %+v, %v", rec, err)
	}
	Begin(a, "acme", "call-1")
	for _, s := range []records.Store{a, b} {
		Known(t, s, records.Ref{Tenant: "acme", ID: "call-1", Attempt: 2}, Any)
		if rec, err := cancel(t, s, late); !errors.Is(err, records.ErrUsed) {
			t.Errorf("stopping a later attempt with the same cancellation: %+v, %v", rec, err)
		}
	}
	tries := 0
	if rec, err := Reached(t, func() (records.Record, error) {
		tries++
		return b.Cancel(Context(t), early[tries-1])
	}, records.ErrOwnerUnreachable); err != nil || !rec.Running() {
		t.Errorf("stopping it with one that has found nothing before: %+v, %v", rec, err)
	}
}

// testCancelAttempt ends the first of two attempts: the second one goes on.
func testCancelAttempt(t *testing.T, open Open) {
	a, b := open(t), open(t)
	first := Begin(a, "acme", "twice")
	Known(t, b, records.Ref{Tenant: "acme", ID: "twice"}, Any)
	Numbered(t, first)
	first.End(Failure(api.NoDaemon))
	Known(t, b, records.Ref{Tenant: "acme", ID: "twice"}, Ended)
	Begin(b, "acme", "twice")
	Known(t, a, records.Ref{Tenant: "acme", ID: "twice", Attempt: 2}, Any)
	rec, err := cancel(t, a, records.Cancellation{Ref: records.Ref{Tenant: "acme", ID: "twice", Attempt: 1}, By: "k1"})
	if err != nil || rec.Running() || rec.Attempt != 1 {
		t.Errorf("stopping the first of two attempts: %+v, %v", rec, err)
	}
}
