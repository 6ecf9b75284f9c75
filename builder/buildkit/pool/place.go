package pool

import (
	"context"
	"errors"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/moby/buildkit/client"

	"handler/function/api"
	"handler/function/buildkit/report"
	"handler/function/placement"
	"handler/function/solve"
)

// Key says where a build belongs.
type Key struct {
	Cache  string // the daemons are ordered by it
	Native string // the daemons' own platform; empty is any
}

// Seat is a build's place on a daemon. Its holder must give it up once, by Leave, Worked or
// Lost.
type Seat struct {
	Daemon *Daemon
	Choice solve.Choice

	pool *Pool
	conn *conn
	end  <-chan struct{} // closed when a transport to the daemon has ended since conn answered
}

func (p *Pool) newSeat(d *Daemon, c *conn, end <-chan struct{}, order []*Daemon) *Seat {
	return &Seat{Daemon: d, Choice: choiceOf(d, order), pool: p, conn: c, end: end}
}

// Client is the connection's. It must not be used after the seat has been given up.
func (s *Seat) Client() *client.Client { return s.conn.client }

// Broke says whether a solve failed with err because the connection ended. It may wait for a
// second.
func (s *Seat) Broke(err error) bool { return report.ConnectionLost(err, s.end) }

// CannotWrite has the daemon write a file, and says whether its disk is too full for it.
func (s *Seat) CannotWrite(ctx context.Context) bool {
	err := s.conn.tryWrite(ctx)
	return err != nil && report.SaysFull(err)
}

// Leave gives the seat up.
func (s *Seat) Leave() { s.give(false) }

// Worked gives the seat up after a build that ended in an orderly way, whatever it came to.
func (s *Seat) Worked() {
	s.give(false)
	s.Daemon.health.worked()
}

// Lost gives the seat up with its connection. Until the daemon answers again, it gets builds
// only where no other takes them.
func (s *Seat) Lost(cause error) {
	s.give(true)
	s.pool.lose(s.Daemon, cause)
}

func (s *Seat) give(failed bool) {
	s.Daemon.health.give()
	s.Daemon.release(s.conn, failed)
}

var errDaemonFull = &api.Error{Code: api.DaemonFull, Msg: "buildkitd has no space left on its disk"}

func noDaemon(cause error) error {
	return &api.Error{Code: api.NoDaemon, Msg: "no buildkitd can be reached", Err: cause}
}

// Place finds a seat for a build. prefer, unless it is nil, is tried before all others, however
// many builds it has and whatever is known of its health. avoid is tried after all others.
//
// Where no daemon answers, Place tries all of them again for as long as a restart takes. It
// waits for this long at most, however many daemons hang:
//
//   - for one that hangs: keptTimeout + checkTimeout = 7 s the first time, then checkTimeout
//   - without an avoid: 7 s for the first daemon, 7 s for all others, 5 s for all again: 19 s
//   - with an avoid: 7 s for all at once, because the lost build has waited for keepalive; 10 s if
//     daemons begin to hang meanwhile
//   - in addition: 2 s for a look-up, 7 s for a prefer that hangs, loadTimeout = 2 s for the first
//     daemon that is slow to count its builds, loadTimeout for all others together, and 7 s if the
//     daemon with the fewest builds hangs after it has counted them
//   - where all disks are full: pruneWait = 10 s for prunes, twice without an avoid, and the times
//     above for each daemon that has been pruned
//
// # Errors
//
// An error is an *api.Error, no_daemon or daemon_full, or ctx's cause.
func (p *Pool) Place(ctx context.Context, key Key, prefer, avoid *Daemon) (*Seat, error) {
	order := p.order(ctx, key)
	if prefer != nil {
		if s, _ := p.offer(ctx, order, []*Daemon{prefer}, nil, false); s != nil {
			return s, nil
		}
	}
	since := time.Now()
	for again := avoid != nil; ; again = true {
		fit, rest := candidates(order, avoid)
		var s *Seat
		var err error
		if len(fit)+len(rest) > 0 {
			s, err = p.offer(ctx, order, fit, rest, again)
		} else {
			s, err = p.prunedSeat(ctx, order)
		}
		switch {
		case s != nil:
			return s, nil
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err == errDaemonFull:
			return nil, err
		case again && time.Since(since) > dialWindow-dialInterval:
			return nil, noDaemon(err)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(dialInterval):
		}
		order = p.order(ctx, key)
	}
}

// order is the daemons of the key's platform, in the order of its cache. Where no daemon has
// the platform any more, it is all of them.
func (p *Pool) order(ctx context.Context, key Key) []*Daemon {
	list := p.list(ctx)
	if key.Native != "" {
		other := func(d *Daemon) bool { return d.Native() != key.Native }
		if some := slices.DeleteFunc(slices.Clone(list), other); len(some) > 0 {
			list = some
		}
	}
	byAddr := make(map[string]*Daemon)
	var addrs []string
	for _, d := range list {
		byAddr[d.addr] = d
		addrs = append(addrs, d.addr)
	}
	order := make([]*Daemon, 0, len(addrs))
	for _, addr := range placement.Order(key.Cache, addrs) {
		order = append(order, byAddr[addr])
	}
	return order
}

// candidates are the daemons of order that are not full. Those in rest are out, or to be
// avoided: they may be back, and are better than none.
func candidates(order []*Daemon, avoid *Daemon) (fit, rest []*Daemon) {
	var last []*Daemon // avoid, if it is there
	for _, d := range order {
		switch {
		case d.health.isFull():
		case d == avoid:
			last = append(last, d)
		case d.health.isOut():
			rest = append(rest, d)
		default:
			fit = append(fit, d)
		}
	}
	return fit, append(rest, last...)
}

// offer returns a seat on the first of these daemons:
//
//  1. the first in fit with fewer builds than the limit,
//  2. the one in fit that has the fewest; one that is too slow to count them comes last,
//  3. the first in rest that answers.
//
// It asks them one after the other. Once a daemon has not answered, or was too slow to count, it
// asks all that are left at once. If atOnce is set, it does so from the beginning. Without a seat,
// err is from the last daemon that did not answer. order is the whole order, for the seat's Choice.
func (p *Pool) offer(ctx context.Context, order, fit, rest []*Daemon, atOnce bool) (s *Seat, err error) {
	ctx, cancel := context.WithCancel(ctx)
	several := len(order) > 1
	q := &inquiry{pool: p, daemons: slices.Concat(fit, rest), count: several, atOnce: atOnce}
	q.answers = make([]chan answer, len(q.daemons))
	defer q.end()
	defer cancel()
	var least *Daemon // of those that answered and have their limit
	var fewest int
	for i, d := range q.daemons {
		if i >= len(fit) && least != nil {
			break
		}
		a := q.answer(ctx, i)
		if ctx.Err() != nil {
			a.release()
			return nil, context.Cause(ctx)
		}
		if a.err != nil {
			err, q.atOnce = a.err, true
			p.lose(d, err)
			continue
		}
		// A lone daemon takes every build.
		if a.builds < math.MaxInt && d.health.take(p.cfg.Builds) || !several && d.health.take(0) {
			return p.newSeat(d, a.conn, a.end, order), nil
		}
		a.release()
		if a.builds == math.MaxInt {
			q.atOnce = true
		}
		if least == nil || a.builds < fewest {
			least, fewest = d, a.builds
		}
	}
	if least == nil {
		return nil, err
	}
	c, err := least.acquire(ctx)
	if err != nil {
		return nil, err // it has just gone; Place asks again
	}
	end := c.ends.next()
	least.health.take(0)
	return p.newSeat(least, c, end, order), nil
}

// inquiry asks daemons for a seat.
type inquiry struct {
	pool    *Pool
	daemons []*Daemon
	answers []chan answer // nil before the daemon is asked, and after its answer is taken
	count   bool          // the builds of each daemon
	atOnce  bool          // ask all daemons that are left at once
}

// answer is from a daemon that was asked for a seat.
type answer struct {
	daemon *Daemon
	conn   *conn           // must be released if err is nil
	end    <-chan struct{} // closed when a transport of conn has ended since conn answered
	builds int             // where they are counted; math.MaxInt if the daemon was too slow to count them
	err    error
}

func (a answer) release() {
	if a.err == nil {
		a.daemon.release(a.conn, false)
	}
}

// answer waits for the daemon at i. After ctx has ended, the answer comes soon. A daemon that has
// answered may have ended while another one was waited for. It is asked again.
func (q *inquiry) answer(ctx context.Context, i int) answer {
	last := i
	if q.atOnce {
		last = len(q.daemons) - 1
	}
	for j := i; j <= last; j++ {
		if q.answers[j] == nil {
			q.answers[j] = q.pool.ask(ctx, q.daemons[j], q.count)
		}
	}
	a := <-q.answers[i]
	q.answers[i] = nil
	if a.err == nil && isClosed(a.end) {
		a.release()
		a = <-q.pool.ask(ctx, a.daemon, q.count)
	}
	return a
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// end releases the answers that nobody has taken. ctx has ended before.
func (q *inquiry) end() {
	for _, ch := range q.answers {
		if ch != nil {
			(<-ch).release()
		}
	}
}

// ask sends one answer.
func (p *Pool) ask(ctx context.Context, d *Daemon, count bool) chan answer {
	ch := make(chan answer, 1)
	go func() {
		a := answer{daemon: d}
		if a.conn, a.err = d.acquire(ctx); a.err == nil {
			a.end = a.conn.ends.next()
		}
		if a.err == nil && count {
			a.builds, a.err = p.load(ctx, d, a.conn)
			if errors.Is(a.err, errSlowCount) {
				a.builds, a.err = math.MaxInt, nil
			}
			if a.err != nil {
				d.release(a.conn, ctx.Err() == nil)
			}
		}
		ch <- a
	}()
	return ch
}

// choiceOf says why a build is on d and not on the first of its order. Busy stands for every reason
// but the first daemon's health: that daemon has its share of builds or was too slow to count them,
// or the build was to prefer d, or to avoid the first.
func choiceOf(d *Daemon, order []*Daemon) solve.Choice {
	switch {
	case len(order) == 0 || d == order[0]:
		return solve.First
	case order[0].health.isFit():
		return solve.Busy
	}
	return solve.Down
}

// prunedSeat is a seat on the first daemon whose disk has room after a prune. All disks in
// order were full. Its error is errDaemonFull if one of the daemons answers and has no room, or has
// not been pruned within pruneWait.
func (p *Pool) prunedSeat(ctx context.Context, order []*Daemon) (s *Seat, err error) {
	waiting, cancel := context.WithTimeout(ctx, pruneWait)
	// All at once, so that a daemon that hangs takes none of the others' time.
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	pruned := make([]chan error, len(order))
	for i, d := range order {
		pruned[i] = make(chan error, 1)
		asking.Go(func() { pruned[i] <- p.prune(waiting, d) })
	}
	full := false
	for i, d := range order {
		if err = <-pruned[i]; err == nil {
			if s, err = p.offer(ctx, order, []*Daemon{d}, nil, false); s != nil {
				return s, nil
			}
			continue // it has room, and has just gone
		}
		_, down := errors.AsType[*downError](err)
		full = full || !down
	}
	if full {
		return nil, errDaemonFull
	}
	return nil, err
}
