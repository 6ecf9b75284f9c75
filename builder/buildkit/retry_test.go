package buildkit

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/buildkit/pool"
	"handler/function/buildkit/report"
	"handler/function/redact"
	"handler/function/solve"
)

// TestPolicy has attempts come to verdicts, and looks at when and where the next one is made.
func TestPolicy(t *testing.T) {
	one, two := new(pool.Daemon), new(pool.Daemon)
	fail := func(k verdictKind, code api.Code, at *pool.Daemon) verdict {
		return verdict{kind: k, daemon: at, err: &api.Error{Code: code, Msg: string(code), Err: errors.New("cause")}}
	}
	lost, full := fail(elsewhere, api.DaemonLost, one), fail(elsewhere, api.DaemonFull, one)
	busy := fail(later, api.RegistryFailed, two)
	denied := fail(failed, api.RegistryDenied, one)
	nowhere := fail(failed, api.NoDaemon, nil)
	built := verdict{kind: done, outcome: solve.Outcome{Digest: "d"}}
	another, held := verdict{kind: follow, daemon: one}, verdict{kind: taken, daemon: one}
	const (
		lostLine = "w: the connection to buildkitd was lost: building again"
		fullLine = "w: buildkitd has no space left on its disk: building on another"
		busyLine = "w: the registry takes no more requests for now: pushing again in "
	)
	for _, tt := range []struct {
		name     string
		verdicts []verdict
		at       []int   // seconds of each attempt
		last     earlier // what the last attempt is told
		lines    []string
		code     api.Code // "" for success
	}{
		{"built", []verdict{built}, []int{0}, earlier{}, nil, ""},
		{"failed", []verdict{denied}, []int{0}, earlier{}, nil, api.RegistryDenied},
		{"lost once", []verdict{lost, built}, []int{0, 0}, earlier{avoid: one}, []string{lostLine}, ""},
		{"lost twice", []verdict{lost, fail(elsewhere, api.DaemonLost, two)}, []int{0, 0}, earlier{avoid: one}, []string{lostLine}, api.DaemonLost},
		{"full, then lost", []verdict{full, fail(elsewhere, api.DaemonLost, two)}, []int{0, 0}, earlier{avoid: one}, []string{fullLine}, api.DaemonLost},
		{"lost, then nowhere", []verdict{lost, nowhere}, []int{0, 0}, earlier{avoid: one}, []string{lostLine}, api.NoDaemon},
		{"busy", []verdict{busy, busy, busy, built}, []int{0, 2, 7, 22}, earlier{prefer: two, built: two}, []string{busyLine + "2s", busyLine + "5s", busyLine + "15s"}, ""},
		{"busy too often", []verdict{busy, busy, busy, busy}, []int{0, 2, 7, 22}, earlier{prefer: two, built: two}, []string{busyLine + "2s", busyLine + "5s", busyLine + "15s"}, api.RegistryFailed},
		{"busy, lost", []verdict{busy, lost, built}, []int{0, 2, 2}, earlier{avoid: one}, []string{busyLine + "2s", lostLine}, ""},
		{"busy, lost, busy", []verdict{busy, lost, busy, built}, []int{0, 2, 2, 7}, earlier{avoid: one, prefer: two, built: two}, []string{busyLine + "2s", lostLine, busyLine + "5s"}, ""},
		{"followed", []verdict{another, another, built}, []int{0, 0, 0}, earlier{prefer: one}, nil, ""},
		{"followed too often", slices.Repeat([]verdict{another}, maxRefs+1), slices.Repeat([]int{0}, maxRefs+1), earlier{prefer: one}, nil, api.Internal},
		{"Ref taken, followed", []verdict{held, held, held, another, built}, []int{0, 0, 1, 1, 1}, earlier{prefer: one}, nil, ""},
		{"Ref taken for too long", slices.Repeat([]verdict{held}, 2*maxRefs+1), halves(2*maxRefs + 1), earlier{prefer: one}, nil, api.Internal},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var lines []string
				r := newTestRun(func(l ...string) { lines = append(lines, l...) })
				start := time.Now()
				var at []int
				var last earlier
				outcome, err := r.repeat(t.Context(), func(_ context.Context, e earlier) verdict {
					at, last = append(at, int(time.Since(start).Seconds())), e
					if len(at) > len(tt.verdicts) {
						t.Fatalf("attempt %d", len(at))
					}
					return tt.verdicts[len(at)-1]
				})
				if !slices.Equal(at, tt.at) || last != tt.last || !slices.Equal(lines, tt.lines) {
					t.Errorf("attempts at %v, lines %q", at, lines)
				}
				switch {
				case tt.code == "":
					if err != nil || outcome.Digest != "d" {
						t.Errorf("%+v, %v", outcome, err)
					}
				case err == nil || api.AsError(err).Code != tt.code:
					t.Errorf("%v", err)
				}
			})
		})
	}
}

// halves are n times, half a second apart, in whole seconds.
func halves(n int) (at []int) {
	for i := range n {
		at = append(at, i/2)
	}
	return at
}

// TestNowhereElse tells why a build had to move when no other daemon can be reached.
func TestNowhereElse(t *testing.T) {
	none := verdict{err: &api.Error{Code: api.NoDaemon, Msg: "none"}}
	for moved, want := range map[api.Code]string{"": "none", api.DaemonLost: "lost while building", api.DaemonFull: "no space left"} {
		if err := final(none, moved); !strings.Contains(api.AsError(err).Msg, want) {
			t.Errorf("after %q: %v", moved, err)
		}
	}
}

func newTestRun(log solve.Log) *run {
	mask := redact.New(nil)
	r := &run{Solver: &Solver{cfg: Config{Log: zerolog.Nop()}}, plan: &plan{req: &solve.Request{}, mask: mask}, warn: warner(log, mask), limits: &limits{}}
	r.progress = report.NewProgress(log, mask, r.limits)
	return r
}

// TestPolicyEnds has the context end during an attempt, and during the wait for the next.
func TestPolicyEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := &api.Error{Code: api.Canceled, Msg: "gone"}
		for _, tt := range []struct {
			after time.Duration
			took  time.Duration // by each attempt
			kind  verdictKind
			want  time.Duration
		}{
			{time.Second, 3 * time.Second, failed, 3 * time.Second},
			{time.Second, 0, later, time.Second},
		} {
			ctx, cancel := context.WithCancelCause(t.Context())
			time.AfterFunc(tt.after, func() { cancel(gone) })
			start := time.Now()
			_, err := newTestRun(func(...string) {}).repeat(ctx, func(context.Context, earlier) verdict {
				time.Sleep(tt.took)
				return verdict{kind: tt.kind, err: &api.Error{Code: api.RegistryFailed, Msg: "busy"}}
			})
			if err != gone || time.Since(start) != tt.want {
				t.Errorf("%v after %v", err, time.Since(start))
			}
		}
	})
}

// TestPast reads the records of a history for a client.
func TestPast(t *testing.T) {
	began, ended := time.Unix(1, 0), time.Unix(2, 0)
	for _, tt := range []struct {
		name   string
		record pool.Record
		want   *solve.Past
		code   api.Code
	}{
		{"running", pool.Record{Image: "r/x:1", Began: began}, &solve.Past{Running: true, Image: "r/x:1", Began: began}, ""},
		{"built", pool.Record{Digest: "d", Began: began, Ended: ended}, &solve.Past{Outcome: solve.Outcome{Digest: "d"}, Began: began, Ended: ended}, ""},
		{"canceled", pool.Record{Began: began, Ended: ended, Err: context.Canceled}, nil, ""},
		{"failed", pool.Record{Began: began, Ended: ended, Err: errors.New(`process "/bin/sh -c echo secret" did not complete successfully: exit code: 1`)},
			&solve.Past{Began: began, Ended: ended}, api.BuildFailed},
		{"not pushed", pool.Record{Began: began, Ended: ended, Err: errors.New("failed to push r/x:1: unexpected status from POST request to https://r/: 500 Internal Server Error")},
			&solve.Past{Began: began, Ended: ended}, api.RegistryFailed},
	} {
		got := past(&tt.record)
		if got == nil || tt.want == nil {
			if got != tt.want {
				t.Errorf("%s: %+v", tt.name, got)
			}
			continue
		}
		err := got.Err
		got.Err = nil
		if got.Running != tt.want.Running || got.Image != tt.want.Image || got.Outcome.Digest != tt.want.Outcome.Digest || !got.Began.Equal(began) || !got.Ended.Equal(tt.want.Ended) {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
		switch {
		case tt.code == "" && err != nil, tt.code != "" && (err == nil || api.AsError(err).Code != tt.code):
			t.Errorf("%s: %v", tt.name, err)
		case err != nil && strings.Contains(err.Error(), "secret"):
			t.Errorf("%s: the command is told: %v", tt.name, err)
		}
	}
}

// TestLogTo: a line about a tenant's build says whose it is, and with which key it was signed.
func TestLogTo(t *testing.T) {
	for want, tenant := range map[string]*solve.Tenant{
		`{"level":"warn","call_id":"call","message":"m"}`:                           nil,
		`{"level":"warn","call_id":"call","tenant":"t-1","key":"k1","message":"m"}`: {ID: "t-1", Key: "k1"},
	} {
		var b strings.Builder
		p := &plan{req: &solve.Request{ID: "call", Tenant: tenant}}
		p.logTo(zerolog.New(&b)).Warn().Msg("m")
		if got := strings.TrimSpace(b.String()); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}
