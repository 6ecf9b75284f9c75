package buildkit

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/placement"
	"handler/function/solve"
)

// A pool is the daemons that builds are placed on. A repository's builds go to
// the daemon that comes first in their order, where their cache is, and to the
// next while that one is full or down. Replicas of the function agree on the
// order and share nothing else: how many builds a daemon has, it says itself.

const (
	// loadAge is for how long a daemon's own count of its builds is believed.
	loadAge     = time.Second
	loadTimeout = 2 * time.Second

	// probeMin and probeMax are how long a daemon that was lost is left alone: the
	// longer, the more often in turn.
	probeMin = time.Second
	probeMax = time.Minute

	// stallRest is how long a daemon whose build stalled is left alone.
	stallRest = 5 * time.Minute

	// pruneTimeout bounds one prune, and pruneWait how long a build waits for one
	// where there is no other daemon.
	pruneTimeout  = 2 * time.Minute
	pruneWait     = 10 * time.Second
	pruneInterval = 10 * time.Second
)

type pool struct {
	targets  []target
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

// health says whether a daemon gets builds, and how many it has.
type health struct {
	mu     sync.Mutex
	out    bool // it was lost, or a build stalled there; a probe brings it back
	losses int  // in turn
	full   bool // its disk was, and has not been pruned since

	mine   int       // builds that this process has there
	others int       // builds of others, as of asked
	asked  time.Time // when the daemon was

	pruning chan struct{} // holds one value while somebody prunes
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
		found, err := t.lookup(ctx, p.resolver)
		if err != nil {
			failed = errors.Join(failed, err)
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
// Where no daemon answers, all of them are tried again for as long as a restart
// takes. Errors are *api.Error: no_daemon or daemon_full; or ctx's cause.
func (p *pool) place(ctx context.Context, key placeKey, prefer, avoid *daemon) (*seat, error) {
	order := p.order(ctx, key)
	var fit []*daemon
	for _, d := range order {
		if d.fit() && d != avoid && d != prefer {
			fit = append(fit, d)
		}
	}
	if prefer != nil {
		if s, _ := p.offer(ctx, []*daemon{prefer}, order); s != nil {
			return s, nil
		}
	}
	s, err := p.offer(ctx, fit, order)
	for since := time.Now(); s == nil; {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if len(order) > 0 && !slices.ContainsFunc(order, func(d *daemon) bool { return !d.isFull() }) {
			return p.prunedSeat(ctx, order)
		}
		// One that was taken out may be back, and better than none.
		s, err = p.offer(ctx, slices.DeleteFunc(slices.Clone(order), (*daemon).isFull), order)
		if s != nil {
			break
		}
		if time.Since(since) > dialWindow-dialInterval {
			return nil, noDaemon(err)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(dialInterval):
		}
		order = p.order(ctx, key)
	}
	return s, nil
}

// offer is a seat on the first of the daemons that has less than its limit of
// builds, or on the one that has the fewest. Without a seat, err is of the last
// that did not answer. order is for telling why it is not the first.
func (p *pool) offer(ctx context.Context, daemons, order []*daemon) (s *seat, err error) {
	var least *daemon
	var fewest int
	for _, d := range daemons {
		c, e := d.acquire(ctx)
		var n int
		if e == nil && len(order) > 1 {
			if n, e = d.load(ctx, c); e != nil {
				d.release(c, true)
			}
		}
		if ctx.Err() != nil {
			if e == nil {
				d.release(c, false)
			}
			return nil, context.Cause(ctx)
		}
		if e != nil {
			err = e
			if !errors.Is(e, errClosed) {
				p.lose(d, e)
			}
			continue
		}
		if d.take(p.limit) || len(order) == 1 && d.take(0) {
			return &seat{c, d, choiceOf(d, order)}, nil
		}
		d.release(c, false)
		if least == nil || n < fewest {
			least, fewest = d, n
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
		if s, _ := p.offer(ctx, []*daemon{d}, order); s != nil {
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

// fit says whether d gets builds that could go elsewhere.
func (d *daemon) fit() bool {
	d.health.mu.Lock()
	defer d.health.mu.Unlock()
	return !d.health.out && !d.health.full
}

func (d *daemon) isFull() bool {
	d.health.mu.Lock()
	defer d.health.mu.Unlock()
	return d.health.full
}

// works notes that a build has ended there in an orderly way.
func (d *daemon) works() {
	d.health.mu.Lock()
	defer d.health.mu.Unlock()
	d.health.losses = 0
}

// take counts one more build of this process, if there are less than limit; zero
// is no limit.
func (d *daemon) take(limit int) bool {
	d.health.mu.Lock()
	defer d.health.mu.Unlock()
	if limit > 0 && d.health.mine+d.health.others >= limit {
		return false
	}
	d.health.mine++
	return true
}

// load is how many builds d has: its own count, of which a part are this
// process's, and what has been placed there since.
func (d *daemon) load(ctx context.Context, c *conn) (int, error) {
	h := &d.health
	h.mu.Lock()
	stale, mine := time.Since(h.asked) > loadAge, h.mine
	h.mu.Unlock()
	if stale {
		ctx, cancel := context.WithTimeout(ctx, loadTimeout)
		defer cancel()
		active, err := c.history(ctx, &controlapi.BuildHistoryRequest{ActiveOnly: true, EarlyExit: true})
		if err != nil {
			return 0, err
		}
		h.mu.Lock()
		h.others, h.asked = max(len(active)-mine, 0), time.Now()
		h.mu.Unlock()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.others + h.mine, nil
}

// lose takes a daemon that does not answer, or that broke a build off, out until
// it answers again.
func (p *pool) lose(d *daemon, cause error) {
	d.health.mu.Lock()
	d.health.losses++
	rest := min(probeMin<<min(d.health.losses-1, 10), probeMax)
	d.health.mu.Unlock()
	p.takeOut(d, rest, cause)
}

func (p *pool) takeOut(d *daemon, rest time.Duration, cause error) {
	d.health.mu.Lock()
	already := d.health.out
	d.health.out = true
	d.health.mu.Unlock()
	if already {
		return
	}
	p.log.Warn().Err(cause).Str("daemon", d.addr).Stringer("rest", rest).Msg("buildkitd taken out")
	p.start(func() {
		for {
			if !p.sleep(rest) {
				return
			}
			c, err := d.acquire(p.ctx)
			if err == nil {
				d.release(c, false)
				d.health.mu.Lock()
				d.health.out = false
				d.health.mu.Unlock()
				p.log.Info().Str("daemon", d.addr).Msg("buildkitd is back")
				return
			}
			if errors.Is(err, errClosed) {
				return
			}
			rest = min(max(rest, probeMin), 5*probeMin)
		}
	})
}

// fill takes a daemon whose disk is full out until something has been pruned
// there.
func (p *pool) fill(d *daemon, cause error) {
	d.health.mu.Lock()
	already := d.health.full
	d.health.full = true
	d.health.mu.Unlock()
	if already {
		return
	}
	p.log.Warn().Err(cause).Str("daemon", d.addr).Msg("buildkitd's disk is full: pruning")
	p.start(func() {
		for {
			err := p.prune(p.ctx, d)
			if err == nil || errors.Is(err, errClosed) {
				return
			}
			p.log.Warn().Err(err).Str("daemon", d.addr).Msg("pruning buildkitd failed")
			if !p.sleep(pruneInterval) {
				return
			}
		}
	})
}

// prune removes half of what d's cache holds: what was used longest ago goes
// first, and how much room is missing BuildKit does not tell.
func (p *pool) prune(ctx context.Context, d *daemon) error {
	ctx, cancel := context.WithTimeout(ctx, pruneTimeout)
	defer cancel()
	select {
	case d.health.pruning <- struct{}{}:
		defer func() { <-d.health.pruning }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if !d.isFull() {
		return nil
	}
	c, err := d.acquire(ctx)
	if err != nil {
		return err
	}
	defer d.release(c, false)
	records, err := c.client.DiskUsage(ctx)
	if err != nil {
		return err
	}
	var used, freed int64
	for _, r := range records {
		used += r.Size
	}
	removed := make(chan client.UsageInfo)
	counted := make(chan struct{})
	go func() {
		defer close(counted)
		for r := range removed {
			freed += r.Size
		}
	}()
	// Of a limit of zero BuildKit makes none.
	err = c.client.Prune(ctx, removed, client.WithKeepOpt(0, 0, max(used/2, 1), 0))
	close(removed)
	<-counted
	if err != nil {
		return err
	}
	d.health.mu.Lock()
	d.health.full = false
	d.health.mu.Unlock()
	p.log.Info().Str("daemon", d.addr).Int64("used_bytes", used).Int64("freed_bytes", freed).Msg("buildkitd pruned")
	return nil
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
// has just answered.
func (p *pool) each(ctx context.Context, f func(d *daemon, c *conn)) {
	var all sync.WaitGroup
	for _, d := range p.list(ctx) {
		d.health.mu.Lock()
		out := d.health.out
		d.health.mu.Unlock()
		if out {
			continue
		}
		all.Go(func() {
			c, err := d.acquire(ctx)
			if err != nil {
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

func newPool(targets []target, limit int, dial func(string) *daemon, log zerolog.Logger) *pool {
	p := &pool{targets: targets, resolver: net.DefaultResolver, limit: limit, dial: dial, log: log}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	// Until they are looked up: dialling a name says best what is wrong with it.
	var addrs []string
	for _, t := range targets {
		addrs = append(addrs, t.addr)
	}
	p.replace(addrs)
	return p
}

var errDaemonFull = &api.Error{Code: api.DaemonFull, Msg: "buildkitd has no space left on its disk"}
