package records

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	js "github.com/nats-io/nats.go/jetstream"

	"handler/function/api"
	"handler/function/records"
	"handler/function/records/jetstream"
	"handler/function/records/recordstest"
	"handler/function/tests/stack"
)

// stranger is in the builder's account of NATS, and has no key.
type stranger struct {
	t    *testing.T
	conn *nats.Conn
	js   js.JetStream
	mu   sync.Mutex
	all  []*nats.Msg // that it has heard
}

func newStranger(t *testing.T, servers []*stack.NATS) *stranger {
	t.Helper()
	x := &stranger{t: t}
	var err error
	if x.conn, err = nats.Connect(urls(servers), patient); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(x.conn.Close)
	if x.js, err = js.New(x.conn); err != nil {
		t.Fatal(err)
	}
	if _, err := x.conn.Subscribe(">", func(m *nats.Msg) {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.all = append(x.all, m)
	}); err != nil {
		t.Fatal(err)
	}
	if err := x.conn.Flush(); err != nil {
		t.Fatal(err)
	}
	return x
}

// heard returns what came for subjects with these ends.
func (x *stranger) heard(prefix, suffix string) (found []*nats.Msg) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, m := range x.all {
		if strings.HasPrefix(m.Subject, prefix) && strings.HasSuffix(m.Subject, suffix) {
			found = append(found, m)
		}
	}
	return found
}

// send publishes a payload, as if it had been there first.
func (x *stranger) send(subject string, data []byte) {
	x.t.Helper()
	if err := x.conn.Publish(subject, data); err != nil {
		x.t.Fatal(err)
	}
	if err := x.conn.Flush(); err != nil {
		x.t.Fatal(err)
	}
}

// base is the subject of a record without its kind.
func base(m *nats.Msg) string { return m.Subject[:len(m.Subject)-2] }

// TestHostile has somebody in the account who has heard everything, and sends it again, elsewhere,
// or changed. Readers see the truth.
func TestHostile(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{})
	a, b := opened(t, servers, nil), opened(t, servers, nil)
	x := newStranger(t, servers)
	stopped := make(chan string, 9)
	begin := func(id string) records.Build {
		build := a.Begin(records.Record{Tenant: "canary-tenant", ID: id, Began: time.Now(), Image: "registry.example.com/canary-image"}, func(by string) { stopped <- by })
		build.Log("canary-line of " + id)
		build.Update(func(r *records.Record) { r.Daemon, r.Ref, r.Building = "tcp://canary-daemon:1234", "canary-ref", true })
		return build
	}
	ref := func(id string) records.Ref { return records.Ref{Tenant: "canary-tenant", ID: id} }
	good, bad, open := begin("canary-good"), begin("canary-bad"), begin("canary-open")
	for _, id := range []string{"canary-good", "canary-bad", "canary-open"} {
		recordstest.Known(t, b, ref(id), func(r records.Record) error {
			if !r.Building {
				return errors.New("not updated")
			}
			return nil
		})
		recordstest.Eventually(t, func() error {
			if lines, _ := recordstest.ReadLog(t, b, ref(id), 0, false); len(lines) != 1 {
				return errors.New("no log yet")
			}
			return nil
		})
	}
	stop := records.Cancellation{Ref: ref("canary-bad"), By: "canary-key", Once: "canary-signature"}
	if _, err := recordstest.Stop(t, b, &stop); err != nil {
		t.Fatal(err)
	}
	select {
	case <-stopped:
	case <-time.After(recordstest.Timeout):
		t.Fatal("its process has not been told to stop it")
	}
	for len(stopped) > 0 { // by tries whose answers were late
		<-stopped
	}
	verdict := recordstest.Success()
	verdict.Image, verdict.ImageName = "registry.example.com/canary-image", "registry.example.com/canary-image"
	good.End(verdict)
	recordstest.Known(t, b, ref("canary-good"), isSuccess)
	bad.End(recordstest.Failure(api.BuildFailed))
	recordstest.Known(t, b, ref("canary-bad"), recordstest.Ended)
	good.Update(func(*records.Record) {})

	var ends []*nats.Msg
	recordstest.Eventually(t, func() error {
		if ends = x.heard("builder.rec.", ".e"); len(ends) != 2 {
			return fmt.Errorf("it has heard %d verdicts", len(ends))
		}
		return nil
	})
	success, failure := ends[0], ends[1]
	for _, tt := range []struct {
		name string
		do   func()
	}{
		{"all records again", func() {
			for _, m := range x.heard("builder.rec.", ".b") {
				x.send(m.Subject, m.Data)
			}
		}},
		{"all lines again", func() {
			for _, m := range x.heard("builder.log.", "") {
				x.send(m.Subject, m.Data)
			}
		}},
		{"a success moved to the failed build", func() { x.send(base(failure)+".e", success.Data); x.send(failure.Subject, failure.Data) }},
		{"a success moved to a running build", func() {
			for _, m := range x.heard("builder.rec.", ".b") {
				if base(m) != base(success) && base(m) != base(failure) {
					x.send(base(m)+".e", success.Data)
					x.send(base(m)+".l", success.Data)
					x.send(base(m)+".l", m.Data)
				}
			}
		}},
		{"a forged loss", func() { x.send(base(success)+".l", []byte(`{"r":{"status":"failed"}}`)) }},
		{"the order to stop again", func() {
			for _, m := range x.heard("builder.cancel.", "") {
				x.send(m.Subject, m.Data)
				x.send(m.Subject, []byte("{}"))
			}
		}},
		{"garbage", func() {
			for _, m := range x.heard("builder.", "") {
				if strings.HasPrefix(m.Subject, "builder.log.") || strings.HasPrefix(m.Subject, "builder.beat.") {
					x.send(m.Subject, []byte("garbage"))
					x.send(m.Subject, nil)
				}
			}
		}},
		{"heartbeats again", func() {
			for _, m := range x.heard("builder.beat.", "") {
				x.send(m.Subject, m.Data)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.do()
			for i, s := range []records.Store{a, b} {
				for id, check := range map[string]func(records.Record) error{
					"canary-good": isSuccess, "canary-open": isRunning, "canary-bad": func(r records.Record) error {
						if r.Code != api.BuildFailed || r.CanceledBy != "canary-key" {
							return fmt.Errorf("it is %+v", r)
						}
						return nil
					}} {
					rec, err := recordstest.Reached(t, func() (records.Record, error) { return s.Get(recordstest.Context(t), ref(id)) })
					if err == nil {
						err = check(rec)
					}
					if err != nil {
						t.Errorf("process %d, %s: %v", i, id, err)
					}
					if lines, lost := recordstest.ReadLog(t, s, ref(id), 0, false); len(lines) != 1 || lost != 0 || lines[1] != "canary-line of "+id {
						t.Errorf("process %d: the log of %s is %v, %d lost", i, id, lines, lost)
					}
				}
				page, err := s.List(recordstest.Context(t), records.Query{Operator: true, Limit: 10})
				states := make(map[string]api.Status)
				for _, r := range page.Builds {
					states[r.ID] = r.Status
				}
				if err != nil || len(page.Builds) != 3 || states["canary-good"] != api.Success || states["canary-bad"] != api.Failed || states["canary-open"] != api.InProgress {
					t.Errorf("process %d lists %v, %v", i, states, err)
				}
			}
			if len(stopped) != 0 {
				t.Errorf("a build was stopped by %q", <-stopped)
			}
		})
	}
	stop.Ref = ref("canary-open")
	if _, err := recordstest.Reached(t, func() (records.Record, error) { return b.Cancel(recordstest.Context(t), stop) }); !errors.Is(err, records.ErrUsed) {
		t.Errorf("a signature that was used: %v", err)
	}

	// What was forged in the place of a verdict does not keep the verdict away.
	open.End(recordstest.Success())
	recordstest.Known(t, b, ref("canary-open"), isSuccess)

	// The owner is gone, and the stranger answers for it, also with what the owner has answered
	// before.
	begin("canary-other")
	recordstest.Known(t, b, ref("canary-other"), isRunning)
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	a.Close(ctx)
	answers := [][]byte{[]byte(`{"told":true}`), {}}
	for _, m := range x.heard("_INBOX.", "") {
		if len(m.Data) > 0 && len(m.Data) < 200 && !json.Valid(m.Data) { // the server's own answers are JSON
			answers = append(answers, m.Data)
		}
	}
	if len(answers) < 3 {
		t.Error("it has heard no answer of the owner")
	}
	for _, answer := range answers {
		sub, err := x.conn.Subscribe("builder.cancel.>", func(m *nats.Msg) { m.Respond(answer) })
		if err != nil {
			t.Fatal(err)
		}
		x.conn.Flush()
		other := records.Cancellation{Ref: ref("canary-other"), By: "k"}
		if rec, err := recordstest.Reached(t, func() (records.Record, error) { return b.Cancel(recordstest.Context(t), other) }); !errors.Is(err, records.ErrOwnerUnreachable) {
			t.Errorf("an answer of %d bytes was taken for the owner's: %+v, %v", len(answer), rec, err)
		}
		sub.Unsubscribe()
	}

	// Nor do heartbeats that are sent again keep its build alive, also for who has not heard them
	// before.
	opened(t, servers, nil)
	beats := x.heard("builder.beat.", "")
	recordstest.Known(t, b, ref("canary-other"), func(r records.Record) error {
		for _, m := range beats {
			x.send(m.Subject, m.Data)
		}
		return isLost(r)
	})

	// Nothing can be read without the key.
	time.Sleep(100 * time.Millisecond)
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.all) < 20 {
		t.Errorf("it has heard %d messages only", len(x.all))
	}
	for _, m := range x.all {
		for _, part := range [][]byte{[]byte(m.Subject), m.Data, fmt.Append(nil, m.Header)} {
			if bytes.Contains(part, []byte("canary")) || bytes.Contains(part, []byte("in_progress")) || bytes.Contains(part, root) {
				t.Errorf("a message on %s shows %q", m.Subject, part)
			}
		}
	}
}

// TestRoots has the root secret replaced: what was stored before is there while the old line is in
// the file, also for a build that has gone on meanwhile.
func TestRoots(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{})
	roots := func(lines ...string) func(*jetstream.Options) {
		return func(o *jetstream.Options) {
			o.Roots = nil
			for _, l := range lines {
				o.Roots = append(o.Roots, []byte(l))
			}
		}
	}
	list := func(lines ...string) (all [][]byte) {
		for _, l := range lines {
			all = append(all, []byte(l))
		}
		return all
	}
	a, b := opened(t, servers, roots("old")), opened(t, servers, roots("old"))
	done := recordstest.Begin(a, "acme", "done")
	done.Log("a line")
	done.End(recordstest.Success())
	across := recordstest.Begin(a, "acme", "across")
	across.Log("before")
	recordstest.Known(t, b, records.Ref{Tenant: "acme", ID: "done"}, isSuccess)
	recordstest.Known(t, b, records.Ref{Tenant: "acme", ID: "across"}, isRunning)

	if err := a.SetRoots(list("new", "old")); err != nil {
		t.Fatal(err)
	}
	across.Log("after")
	fresh := recordstest.Begin(a, "acme", "done") // a second attempt, under the new key
	time.Sleep(18 * time.Second)                  // b has not read the secret yet, and must not think a dead
	recordstest.Known(t, b, records.Ref{Tenant: "acme", ID: "across"}, isRunning)
	if err := b.SetRoots(list("new", "old")); err != nil {
		t.Fatal(err)
	}
	if rec := recordstest.Known(t, b, records.Ref{Tenant: "acme", ID: "done"}, isRunning); rec.Attempt != 2 {
		t.Errorf("under the new key it is attempt %d", rec.Attempt)
	}
	recordstest.Known(t, b, records.Ref{Tenant: "acme", ID: "done", Attempt: 1}, isSuccess)
	across.End(recordstest.Success())
	fresh.End(recordstest.Success())
	recordstest.Known(t, b, records.Ref{Tenant: "acme", ID: "across"}, isSuccess)
	if lines, _ := recordstest.ReadLog(t, b, records.Ref{Tenant: "acme", ID: "across"}, 0, true); len(lines) != 2 {
		t.Errorf("the log is %v", lines)
	}
	recordstest.Eventually(t, func() error {
		page, err := b.List(recordstest.Context(t), records.Query{Tenant: "acme", Limit: 10})
		if err == nil && len(page.Builds) != 3 {
			err = fmt.Errorf("the list has %d builds", len(page.Builds))
		}
		return err
	})
	recordstest.Known(t, b, records.Ref{Tenant: "acme", ID: "done", Attempt: 2}, isSuccess)

	c := opened(t, servers, roots("new"))
	recordstest.Known(t, c, records.Ref{Tenant: "acme", ID: "done"}, isSuccess)
	if _, err := recordstest.Reached(t, func() (records.Record, error) {
		return c.Get(recordstest.Context(t), records.Ref{Tenant: "acme", ID: "across"})
	}); !errors.Is(err, records.ErrNotFound) {
		t.Errorf("without the old line: %v", err)
	}
	time.Sleep(15 * time.Second) // nor does it find lost what it cannot read
	if n := a.Stats().Lost + b.Stats().Lost + c.Stats().Lost; n != 0 {
		t.Errorf("%d builds were found lost", n)
	}
}
