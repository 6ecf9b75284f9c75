package records

import (
	"context"
	"iter"
	"time"

	"handler/function/records/batch"
)

// Followers counts the calls of a Store's Follow that run in this process. The channel holds a value
// for each, and has room for MaxFollowers.
type Followers chan struct{}

// NewFollowers makes Followers without any.
func NewFollowers() Followers { return make(Followers, MaxFollowers) }

// Follow returns the sequence of one follower. The sequence calls follow, which yields its lines
// with the Pacer. If MaxFollowers have begun and not ended, the sequence yields ErrBusy alone.
func (f Followers) Follow(follow func(*Pacer)) iter.Seq2[Line, error] {
	return func(yield func(Line, error) bool) {
		select {
		case f <- struct{}{}:
			defer func() { <-f }()
			follow(&Pacer{yield: yield, last: time.Now()})
		default:
			yield(Line{}, ErrBusy)
		}
	}
}

// Pacer yields the lines of one Follow. It has the rules that all stores share: after KeepAlive
// without a line it yields one with N 0, and it yields ErrSlow to a follower that took longer than
// SlowAfter for a line.
type Pacer struct {
	yield func(Line, error) bool
	last  time.Time // when a Line was last yielded
}

// Line yields a line. It returns false if it must be the last.
func (p *Pacer) Line(l Line) bool {
	began := time.Now()
	if !p.yield(l, nil) {
		return false
	}
	p.last = time.Now()
	if p.last.Sub(began) > SlowAfter {
		p.yield(Line{}, ErrSlow)
		return false
	}
	return true
}

// Batch yields the lines of a batch from number next on, after a gap if they begin later. It
// returns false if nothing must follow.
func (p *Pacer) Batch(lines *batch.Batch, next uint64) bool {
	if lines.First > next && !p.Line(Gap(next, lines.First-1)) {
		return false
	}
	for n, text := range lines.All() {
		if n >= next && !p.Line(Line{N: n, Text: text}) {
			return false
		}
	}
	return true
}

// Fail yields an error.
func (p *Pacer) Fail(err error) { p.yield(Line{}, err) }

// Tick yields a Line with N 0 if none has been yielded for KeepAlive. It returns false if nothing
// must follow.
func (p *Pacer) Tick() bool {
	return time.Since(p.last) < KeepAlive || p.Line(Line{})
}

// Wait waits until changed is closed. It returns false if nothing must follow: ctx has ended,
// and its error has been yielded.
func (p *Pacer) Wait(ctx context.Context, changed <-chan struct{}) bool {
	for {
		timer := time.NewTimer(KeepAlive - time.Since(p.last))
		select {
		case <-changed:
			timer.Stop()
			return true
		case <-ctx.Done():
			timer.Stop()
			p.Fail(context.Cause(ctx))
			return false
		case <-timer.C:
			if !p.Tick() {
				return false
			}
		}
	}
}
