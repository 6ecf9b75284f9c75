package buildkit

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/placement"
	"handler/function/solve"
)

// A pool is the daemons that builds are placed on. A repository's builds go to
// the daemon that comes first in their order, where their cache is, and to the
// next while that one is full or down. Replicas of the function agree on the
// order and share nothing else: how many builds a daemon has, it says itself.

type pool struct {
	targets  []target
	hadSRV   map[string]bool // by target's address: its daemons were SRV records. Used by look, which runs once at a time
	resolver resolver
	limit    int // builds at once on a daemon before others spill to the next
	dial     func(addr string) *daemon
	log      zerolog.Logger

	// ctx ends probes and prunes; all of them have ended when running is done.
	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	daemons []*daemon
	looked  time.Time     // when the names were
	looking chan struct{} // closed when they have been; nil while they are not
}

func newPool(targets []target, limit int, dial func(string) *daemon, log zerolog.Logger) *pool {
	p := &pool{targets: targets, hadSRV: make(map[string]bool), resolver: net.DefaultResolver, limit: limit, dial: dial, log: log}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	// Until they are looked up: dialling a name says best what is wrong with it.
	var addrs []string
	for _, t := range targets {
		addrs = append(addrs, t.addr)
	}
	p.replace(addrs)
	return p
}

// seat is a build's place on a daemon. It must be given up.
type seat struct {
	*conn
	daemon *daemon
	choice solve.Choice
}

// list is the daemons there are, as far as is known: what is older than lookupAge is
// looked up again meanwhile, and what is older than lookupWait before it returns.
// While the names cannot be looked up, it is those there were.
func (p *pool) list(ctx context.Context) []*daemon {
	p.mu.Lock()
	age := time.Since(p.looked)
	if p.looking == nil && age > lookupAge && !p.closed && p.named() {
		done := make(chan struct{})
		p.looking = done
		p.running.Go(func() {
			defer close(done)
			p.look()
		})
	}
	looking := p.looking
	p.mu.Unlock()
	if looking != nil && age > lookupWait {
		select {
		case <-looking:
		case <-ctx.Done():
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.daemons)
}

// named says whether there is anything to look up.
func (p *pool) named() bool {
	return slices.ContainsFunc(p.targets, func(t target) bool { return t.host != "" })
}

// look looks the names up.
func (p *pool) look() {
	ctx, cancel := context.WithTimeout(p.ctx, lookupTimeout)
	defer cancel()
	var addrs []string
	var failed error
	for _, t := range p.targets {
		found, srv, err := t.lookup(ctx, p.resolver, p.hadSRV[t.addr])
		if err != nil {
			failed = errors.Join(failed, err)
		} else {
			p.hadSRV[t.addr] = srv
		}
		addrs = append(addrs, found...)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.looking = nil
	if p.closed {
		return
	}
	if failed != nil {
		p.log.Warn().Err(failed).Msg("keeping the buildkitds that are known")
	} else {
		p.replace(addrs)
	}
	p.looked = time.Now()
}

// replace keeps the daemons that are still there. It holds p.mu.
func (p *pool) replace(addrs []string) {
	// At first there is no more than a name.
	known := !p.looked.IsZero()
	slices.Sort(addrs)
	addrs = slices.Compact(addrs)
	var next []*daemon
	for _, addr := range addrs {
		i := slices.IndexFunc(p.daemons, func(d *daemon) bool { return d.addr == addr })
		if i >= 0 {
			next = append(next, p.daemons[i])
			continue
		}
		if known {
			p.log.Info().Str("daemon", addr).Msg("a buildkitd joined")
		}
		next = append(next, p.dial(addr))
	}
	for _, d := range p.daemons {
		if !slices.Contains(next, d) {
			if known {
				p.log.Info().Str("daemon", d.addr).Msg("a buildkitd left")
			}
			d.close()
		}
	}
	p.daemons = next
}

// placeKey is what a build is placed by.
type placeKey struct {
	cache  string // daemons are ordered by it
	native string // their platform; empty is any
}

// order is the daemons of the key's platform in the order of its cache, or all
// of them where none has that platform any more.
func (p *pool) order(ctx context.Context, key placeKey) []*daemon {
	list := p.list(ctx)
	if key.native != "" {
		other := func(d *daemon) bool { return d.native() != key.native }
		if some := slices.DeleteFunc(slices.Clone(list), other); len(some) > 0 {
			list = some
		}
	}
	byAddr := make(map[string]*daemon)
	var addrs []string
	for _, d := range list {
		byAddr[d.addr] = d
		addrs = append(addrs, d.addr)
	}
	order := make([]*daemon, 0, len(addrs))
	for _, addr := range placement.Order(key.cache, addrs) {
		order = append(order, byAddr[addr])
	}
	return order
}

// place finds a daemon for a build with the given key. prefer, if it is not nil,
// is tried before all others, however many builds it has; avoid after all
// others.
//
// Where no daemon answers, all of them are tried again, for as long as a restart
// takes. However many of them hang, that is 19 s at most; and 7 s if there is an
// avoid, where the build has waited for keepalive already. Errors are *api.Error:
// no_daemon or daemon_full; or ctx's cause.
func (p *pool) place(ctx context.Context, key placeKey, prefer, avoid *daemon) (*seat, error) {
	order := p.order(ctx, key)
	if prefer != nil {
		if s, _ := p.offer(ctx, order, []*daemon{prefer}, nil, false); s != nil {
			return s, nil
		}
	}
	since := time.Now()
	for again := avoid != nil; ; again = true {
		var fit, rest []*daemon
		for _, d := range order {
			switch {
			case d.isFull():
			case d == avoid, !d.fit():
				// It may be back, and better than none.
				rest = append(rest, d)
			default:
				fit = append(fit, d)
			}
		}
		s, err := p.offer(ctx, order, fit, rest, again)
		switch {
		case s != nil:
			return s, nil
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case len(order) > 0 && !slices.ContainsFunc(order, func(d *daemon) bool { return !d.isFull() }):
			return p.prunedSeat(ctx, order)
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

// offer is a seat on the first of the fit daemons that has less than its limit of
// builds, or on the one that has the fewest, or else on the first of the rest that
// answers. They are asked in turn until one does not answer, and from then on, or
// if atOnce is set from the beginning, all at once. Without a seat, err is of the
// last that did not answer. order is for telling why it is not the first.
func (p *pool) offer(ctx context.Context, order, fit, rest []*daemon, atOnce bool) (s *seat, err error) {
	ctx, cancel := context.WithCancel(ctx)
	all := slices.Concat(fit, rest)
	answers := make([]chan answer, len(all)) // those not taken yet
	defer func() {
		cancel()
		for i, ch := range answers {
			if ch != nil {
				if a := <-ch; a.err == nil {
					all[i].release(a.conn, false)
				}
			}
		}
	}()
	var least *daemon
	var fewest int
	for i, d := range all {
		if i >= len(fit) && least != nil {
			break
		}
		for j := i; j == i || j < len(all) && (atOnce || err != nil); j++ {
			if answers[j] == nil {
				answers[j] = all[j].ask(ctx, len(order) > 1)
			}
		}
		a := <-answers[i]
		answers[i] = nil
		if ctx.Err() != nil {
			if a.err == nil {
				d.release(a.conn, false)
			}
			return nil, context.Cause(ctx)
		}
		if a.err != nil {
			err = a.err
			if !errors.Is(err, errClosed) {
				p.lose(d, err)
			}
			continue
		}
		if d.take(p.limit) || len(order) == 1 && d.take(0) {
			return &seat{a.conn, d, choiceOf(d, order)}, nil
		}
		d.release(a.conn, false)
		if least == nil || a.builds < fewest {
			least, fewest = d, a.builds
		}
	}
	if least == nil {
		return nil, err
	}
	c, err := least.acquire(ctx)
	if err != nil {
		return nil, err
	}
	least.take(0)
	return &seat{c, least, choiceOf(least, order)}, nil
}

// answer is a daemon's to being asked for a seat.
type answer struct {
	conn   *conn // to be released, if err is nil
	builds int   // if they were to be counted
	err    error
}

// ask sends one answer, soon after ctx has ended at the latest.
func (d *daemon) ask(ctx context.Context, count bool) chan answer {
	ch := make(chan answer, 1)
	go func() {
		var a answer
		a.conn, a.err = d.acquire(ctx)
		if a.err == nil && count {
			if a.builds, a.err = d.load(ctx, a.conn); a.err != nil {
				d.release(a.conn, ctx.Err() == nil)
			}
		}
		ch <- a
	}()
	return ch
}

// choiceOf says why a build is on d and not on the first of its order.
func choiceOf(d *daemon, order []*daemon) solve.Choice {
	switch {
	case len(order) == 0 || d == order[0]:
		return solve.First
	case order[0].fit():
		return solve.Full
	}
	return solve.Down
}

// prunedSeat is a seat on the first daemon whose disk has been made room on. All
// of them were full.
func (p *pool) prunedSeat(ctx context.Context, order []*daemon) (*seat, error) {
	waiting, cancel := context.WithTimeout(ctx, pruneWait)
	defer cancel()
	for _, d := range order {
		if p.prune(waiting, d) != nil {
			continue
		}
		if s, _ := p.offer(ctx, order, []*daemon{d}, nil, false); s != nil {
			return s, nil
		}
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return nil, errDaemonFull
}

// give gives a seat up. A connection that failed is not kept.
func (s *seat) give(failed bool) {
	s.daemon.health.mu.Lock()
	s.daemon.health.mine--
	s.daemon.health.mu.Unlock()
	s.daemon.release(s.conn, failed)
}

// start runs f until the pool is closed.
func (p *pool) start(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		p.running.Go(f)
	}
}

func (p *pool) sleep(d time.Duration) bool {
	select {
	case <-p.ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// each calls f at once for every daemon that is not out, with a connection that
// has just answered. It returns how many it was not called for.
func (p *pool) each(ctx context.Context, f func(d *daemon, c *conn)) int {
	var missed atomic.Int32
	var all sync.WaitGroup
	for _, d := range p.list(ctx) {
		d.health.mu.Lock()
		out := d.health.out
		d.health.mu.Unlock()
		if out {
			missed.Add(1)
			continue
		}
		all.Go(func() {
			c, err := d.acquire(ctx)
			if err != nil {
				missed.Add(1)
				if ctx.Err() == nil {
					p.lose(d, err)
				}
				return
			}
			defer d.release(c, false)
			f(d, c)
		})
	}
	all.Wait()
	return int(missed.Load())
}

// several says whether there is more than one daemon, as far as is known.
func (p *pool) several() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.daemons) > 1
}

// hasRoom says whether any daemon's disk is not known to be full.
func (p *pool) hasRoom(ctx context.Context) bool {
	return slices.ContainsFunc(p.list(ctx), func(d *daemon) bool { return !d.isFull() })
}

func (p *pool) close() error {
	p.mu.Lock()
	p.closed = true
	daemons := p.daemons
	p.mu.Unlock()
	p.cancel()
	p.running.Wait()
	var errs []error
	for _, d := range daemons {
		errs = append(errs, d.close())
	}
	return errors.Join(errs...)
}

var errDaemonFull = &api.Error{Code: api.DaemonFull, Msg: "buildkitd has no space left on its disk"}
