package buildkit

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"handler/function/api"
)

func TestLimits(t *testing.T) {
	for _, tt := range []struct {
		name string
		l    *limits
		push bool
		want error
	}{
		{"build", &limits{build: time.Millisecond, push: time.Hour}, false, errBuildTimeout},
		{"push", &limits{build: time.Hour, push: time.Millisecond}, true, errPushTimeout},
		{"push after a long build", &limits{build: 50 * time.Millisecond, push: time.Hour}, true, nil},
		{"silence", &limits{build: time.Hour, stall: time.Millisecond}, false, errStalled},
		{"none", &limits{}, true, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, stop := tt.l.start(t.Context())
				defer stop()
				if tt.push {
					tt.l.Pushing()
					tt.l.Pushing()
				}
				tt.l.Listening(true)
				time.Sleep(time.Second)
				synctest.Wait()
				if !errors.Is(context.Cause(ctx), tt.want) {
					t.Errorf("cause %v, want %v", context.Cause(ctx), tt.want)
				}
				if d := tt.l.pushed(); (d > 0) != tt.push {
					t.Errorf("pushed for %v", d)
				}
			})
		})
	}
}

// TestPushing: a push is told of once, and once more when the build has begun anew.
func TestPushing(t *testing.T) {
	var told []bool
	l := &limits{told: func(yes bool) { told = append(told, yes) }}
	_, stop := l.start(t.Context())
	defer stop()
	l.restart()
	l.Pushing()
	l.Pushing()
	l.restart()
	l.restart()
	l.Pushing()
	if want := []bool{true, false, true}; !slices.Equal(told, want) {
		t.Errorf("told %v, want %v", told, want)
	}
}

// TestPause: while a reader takes the progress of a solve that has ended, no limit passes. The next
// attempt has what was left.
func TestPause(t *testing.T) {
	for _, tt := range []struct {
		name  string
		early bool // the push begins before the pause
		late  bool // or during it
		left  time.Duration
		push  time.Duration // that pushed tells after the pause
		want  error
	}{
		{"building", false, false, 4 * time.Second, 0, errBuildTimeout},
		{"pushing", true, false, time.Second, time.Second, errPushTimeout},
		{"late word of a push", false, true, 2 * time.Second, 0, errPushTimeout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := &limits{build: 5 * time.Second, push: 2 * time.Second, stall: time.Second}
				ctx, stop := l.start(t.Context())
				defer stop()
				if tt.early {
					l.Pushing()
				}
				time.Sleep(time.Second)
				l.pause()
				l.Listening(true)
				time.Sleep(time.Hour)
				if tt.late {
					l.Pushing()
				}
				time.Sleep(time.Hour)
				l.resume()
				if got := l.pushed(); got != tt.push {
					t.Errorf("pushed for %v, want %v", got, tt.push)
				}
				l.Listening(false)
				time.Sleep(tt.left - time.Millisecond)
				if synctest.Wait(); ctx.Err() != nil {
					t.Fatalf("ended early, by %v", context.Cause(ctx))
				}
				time.Sleep(2 * time.Millisecond)
				if synctest.Wait(); context.Cause(ctx) != tt.want {
					t.Errorf("ended by %v, want %v", context.Cause(ctx), tt.want)
				}
			})
		})
	}
}

// TestPauseUnlimitedPush: a push without a limit does not count the time of a pause either.
func TestPauseUnlimitedPush(t *testing.T) {
	for _, late := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			l := &limits{build: time.Second}
			ctx, stop := l.start(t.Context())
			defer stop()
			if !late {
				l.Pushing()
				time.Sleep(time.Second)
			}
			for range 2 {
				l.pause()
				l.Pushing()
				time.Sleep(time.Minute)
				l.resume()
			}
			want := time.Second
			if late {
				want = 0
			}
			if got := l.pushed(); got != want {
				t.Errorf("late %v: pushed for %v, want %v", late, got, want)
			}
			time.Sleep(time.Hour)
			if synctest.Wait(); ctx.Err() != nil {
				t.Errorf("late %v: ended by %v", late, context.Cause(ctx))
			}
		})
	}
}

// TestSilence counts the silence of a daemon only while its next message is waited for.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &limits{stall: time.Second}
		ctx, stop := l.start(t.Context())
		defer stop()
		time.Sleep(time.Minute)
		for range 10 {
			l.Listening(true)
			time.Sleep(900 * time.Millisecond)
			l.Listening(false)
			time.Sleep(time.Minute)
		}
		if synctest.Wait(); ctx.Err() != nil {
			t.Errorf("ended: %v", context.Cause(ctx))
		}
		l.Listening(true)
		time.Sleep(1100 * time.Millisecond)
		if synctest.Wait(); context.Cause(ctx) != errStalled {
			t.Errorf("silent for more than a second: %v", context.Cause(ctx))
		}
	})
}

// TestLimitsAgain gives the second attempt all of the time, and forgets the first one's push.
func TestLimitsAgain(t *testing.T) {
	for _, tt := range []struct {
		name string
		l    *limits
		push bool // the second attempt's
		want error
	}{
		{"build", &limits{build: time.Second, push: time.Hour}, false, errBuildTimeout},
		{"push", &limits{build: time.Hour, push: time.Second}, true, errPushTimeout},
		{"no push timeout", &limits{build: time.Second}, false, errBuildTimeout},
		{"silence", &limits{stall: time.Second}, false, errStalled},
		{"no build timeout", &limits{push: time.Second}, false, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, stop := tt.l.start(t.Context())
				defer stop()
				tt.l.Pushing()
				time.Sleep(600 * time.Millisecond)
				tt.l.restart()
				tt.l.Listening(true)
				if tt.l.pushed() != 0 {
					t.Error("the push is still on")
				}
				if tt.push {
					tt.l.Pushing()
				}
				time.Sleep(600 * time.Millisecond)
				synctest.Wait()
				if ctx.Err() != nil {
					t.Errorf("ended by what the first attempt had left: %v", context.Cause(ctx))
				}
				time.Sleep(time.Second)
				synctest.Wait()
				if !errors.Is(context.Cause(ctx), tt.want) {
					t.Errorf("cause %v, want %v", context.Cause(ctx), tt.want)
				}
			})
		})
	}
}

func TestEnded(t *testing.T) {
	shutting := &api.Error{Code: api.ShuttingDown, Msg: "bye"}
	for _, tt := range []struct {
		cause error
		code  api.Code
	}{
		{errBuildTimeout, api.Deadline},
		{errPushTimeout, api.RegistryTimeout},
		{shutting, api.ShuttingDown},
		{fmt.Errorf("wrapped: %w", shutting), api.ShuttingDown},
		{context.DeadlineExceeded, api.Deadline},
		{nil, api.Canceled},
		{errors.New("client gone"), api.Canceled},
	} {
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(tt.cause)
		if err := (&limits{}).ended(ctx, ""); err.Code != tt.code {
			t.Errorf("%v: %v", tt.cause, err)
		}
	}
}
