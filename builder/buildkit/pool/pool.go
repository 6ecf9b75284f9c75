// Package pool knows the daemons that builds are placed on: their names, the connections to
// them, their health, how many builds they have, and what their histories say. It knows
// nothing of what is built.
//
// The builds of a repository go to the daemon that comes first in the repository's order,
// where their cache is. While that one has its share of builds, or is down, they go to the
// next. Replicas of the function agree on the order. They tell each other how many builds they
// have on each daemon. If they cannot, each daemon says how many it has.
package pool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"handler/function/solve"
)

// Config says which daemons there are.
type Config struct {
	// Addrs are tcp://host:port or unix:///path. A name with several addresses is
	// several daemons.
	Addrs      []string
	ServerName string // in the certificate of each daemon

	// CAFile, CertFile and KeyFile are PEM. They are read again when they change. All
	// empty, or a unix address: no TLS.
	CAFile, CertFile, KeyFile string

	// Once a daemon has this many Builds, further builds go to the next daemon. If all daemons
	// have this many, a build goes to the daemon with the fewest. Zero is no limit.
	Builds int

	// Seats counts what this process builds. Pools that may have daemons in common share it.
	// Nil is a count of the pool's own.
	Seats *Seats

	// Elsewhere tells how many builds other processes have on daemons, by the address, and
	// whether that is all of them. It must not wait. Where it is nil, or does not know of
	// all, the daemons are asked.
	Elsewhere func() (builds map[string]int, all bool)

	Log zerolog.Logger
}

// Pool is the daemons that builds are placed on, with one connection to each.
type Pool struct {
	cfg      Config
	targets  []target
	hadSRV   map[string]bool // by target's address: its daemons were SRV records. Only look uses it
	resolver resolver

	// ctx ends the probes, prunes and look-ups that run in the background. All of them have
	// ended when running is done.
	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	daemons []*Daemon
	looked  time.Time     // when the names were looked up last, with or without success
	known   bool          // a look-up has succeeded
	looking chan struct{} // closed when the look-up that runs has ended; nil without one
}

// New dials nothing. Its error is about an address.
func New(cfg Config) (*Pool, error) {
	if cfg.Seats == nil {
		cfg.Seats = NewSeats()
	}
	p := &Pool{cfg: cfg, hadSRV: make(map[string]bool), resolver: net.DefaultResolver}
	var err error
	if p.targets, err = parseTargets(cfg.Addrs); err != nil {
		return nil, err
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	// Until the first look-up the names are the daemons. Dialling a name says best what
	// is wrong with it.
	p.replace(slices.Clone(cfg.Addrs))
	return p, nil
}

func parseTargets(addrs []string) ([]target, error) {
	var list []target
	for _, addr := range addrs {
		t, err := parseTarget(addr)
		if err != nil {
			return nil, fmt.Errorf("reading the address %q of buildkitd: %w", addr, err)
		}
		list = append(list, t)
	}
	if len(list) == 0 {
		return nil, errors.New("no address of buildkitd")
	}
	return list, nil
}

// Close closes each connection after its last build has left.
func (p *Pool) Close() error {
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

// list is the daemons that are known. Names that were looked up more than lookupAge ago are
// looked up again in the background. If it was more than lookupWait ago, list waits for the
// look-up. While names cannot be looked up, the known daemons stay.
func (p *Pool) list(ctx context.Context) []*Daemon {
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

// named says whether there is a name to look up.
func (p *Pool) named() bool {
	return slices.ContainsFunc(p.targets, func(t target) bool { return t.host != "" })
}

// look looks the names up, all at once. Only one look runs at a time.
func (p *Pool) look() {
	ctx, cancel := context.WithTimeout(p.ctx, lookupTimeout)
	defer cancel()
	type answer struct {
		addrs []string
		srv   bool
		err   error
	}
	answers := make([]answer, len(p.targets))
	var asking sync.WaitGroup
	for i, t := range p.targets {
		asking.Go(func() {
			a := &answers[i]
			a.addrs, a.srv, a.err = t.lookup(ctx, p.resolver, p.hadSRV[t.addr])
		})
	}
	asking.Wait()
	var addrs []string
	var failed error
	for i, a := range answers {
		failed = errors.Join(failed, a.err)
		if a.err == nil {
			p.hadSRV[p.targets[i].addr] = a.srv
		}
		addrs = append(addrs, a.addrs...)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.looking = nil
	if p.closed {
		return
	}
	if failed != nil {
		p.cfg.Log.Warn().Err(failed).Msg("keeping the buildkitds that are known")
	} else {
		p.replace(addrs)
		p.known = true
	}
	p.looked = time.Now()
}

// replace makes the daemons at addrs those of the pool. Daemons that stay keep their
// connections. Before the first look-up that succeeds there are only names, and nobody joins or
// leaves. The caller must hold p.mu, but for New.
func (p *Pool) replace(addrs []string) {
	slices.Sort(addrs)
	addrs = slices.Compact(addrs)
	var next []*Daemon
	for _, addr := range addrs {
		i := slices.IndexFunc(p.daemons, func(d *Daemon) bool { return d.addr == addr })
		if i >= 0 {
			next = append(next, p.daemons[i])
			continue
		}
		if p.known {
			p.cfg.Log.Info().Str("daemon", addr).Msg("a buildkitd joined")
		}
		next = append(next, newDaemon(addr, &p.cfg))
	}
	for _, d := range p.daemons {
		if !slices.Contains(next, d) {
			if p.known {
				p.cfg.Log.Info().Str("daemon", d.addr).Msg("a buildkitd left")
			}
			d.close()
		}
	}
	p.daemons = next
}

// each calls f for every daemon of list that is not out, for all of them at once, with a
// connection that has just answered. It returns the number of daemons that it left out.
func (p *Pool) each(ctx context.Context, list []*Daemon, f func(d *Daemon, c *conn)) int {
	var missed atomic.Int32
	var all sync.WaitGroup
	for _, d := range list {
		if d.health.isOut() {
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

// Count counts the daemons. It takes up to 9 s: 2 s for a look-up, and 7 s for a daemon that
// hangs.
func (p *Pool) Count(ctx context.Context) solve.Daemons {
	list := p.list(ctx)
	missed := p.each(ctx, list, func(*Daemon, *conn) {})
	count := solve.Daemons{Total: len(list), Reachable: len(list) - missed}
	for _, d := range list {
		if d.health.isFull() {
			count.Full++
		}
	}
	return count
}

// Natives are the daemons' own platforms, each once and sorted. A daemon that has never
// answered has none. For a lone daemon Natives asks nobody, and returns nil.
func (p *Pool) Natives(ctx context.Context) []string {
	list := p.list(ctx)
	if len(list) < 2 {
		return nil
	}
	natives, all := nativesOf(list)
	if !all {
		p.each(ctx, list, func(*Daemon, *conn) {}) // asks them
		natives, _ = nativesOf(p.list(ctx))
	}
	slices.Sort(natives)
	return slices.Compact(natives)
}

// nativesOf says with all whether every daemon has answered before.
func nativesOf(list []*Daemon) (natives []string, all bool) {
	for _, d := range list {
		if native := d.Native(); native != "" {
			natives = append(natives, native)
		}
	}
	return natives, len(natives) == len(list)
}

// Several says whether more than one daemon is known.
func (p *Pool) Several() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.daemons) > 1
}

// HasRoom says whether a daemon for the key, apart from one, has a disk that is not known to
// be full.
func (p *Pool) HasRoom(ctx context.Context, key Key, apart *Daemon) bool {
	return slices.ContainsFunc(p.order(ctx, key), func(d *Daemon) bool { return d != apart && !d.health.isFull() })
}
