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
	if !rec.Running() || rec.Attempt != 1 || !rec.Queued || rec.Request != "aa" || !rec.Began.Equal(began) || !rec.Ended.IsZero() || rec.ID != "call-1" || rec.Tenant != "acme" {
		t.Errorf("the record of a running build is %+v", rec)
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
		select {
		case by := <-told:
			if by != "k1" {
				t.Errorf("it was stopped by %q", by)
			}
		case <-time.After(Timeout):
			t.Fatal("its process has not been told")
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
