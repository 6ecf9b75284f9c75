package buildkit

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"handler/function/api"
	"handler/function/buildkit/pool"
	"handler/function/solve"
)

// pools are the shared pool, and those that the file of tenants names.
type pools struct {
	cfg    pool.Config // of each, but for its Addrs
	shared *pool.Pool

	mu     sync.Mutex
	closed bool
	named  map[string]*namedPool
}

// namedPool is closed once it is no longer named and its last user has left it.
type namedPool struct {
	*pool.Pool
	addrs []string
	users int  // guarded by pools.mu
	gone  bool // no name leads to it; guarded by pools.mu
}

// newPools dials nothing. Its error is about an address.
func newPools(cfg pool.Config) (*pools, error) {
	cfg.Seats = pool.NewSeats()
	shared, err := pool.New(cfg)
	if err != nil {
		return nil, err
	}
	return &pools{cfg: cfg, shared: shared, named: make(map[string]*namedPool)}, nil
}

// set makes the named pools those with the given addresses. A pool whose addresses stay keeps
// its connections. Its error is about addresses; the pools with such an address are left out.
func (ps *pools) set(addrs map[string][]string) error {
	ps.mu.Lock()
	if ps.closed {
		ps.mu.Unlock()
		return nil
	}
	var unused []*namedPool
	for name, p := range ps.named {
		if !slices.Equal(p.addrs, addrs[name]) {
			delete(ps.named, name)
			if p.gone = true; p.users == 0 {
				unused = append(unused, p)
			}
		}
	}
	var failed error
	for name, list := range addrs {
		if ps.named[name] != nil {
			continue
		}
		cfg := ps.cfg
		cfg.Addrs, cfg.Log = list, cfg.Log.With().Str("pool", name).Logger()
		p, err := pool.New(cfg)
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("making the pool %q: %w", name, err))
			continue
		}
		ps.named[name] = &namedPool{Pool: p, addrs: slices.Clone(list)}
	}
	ps.mu.Unlock()
	for _, p := range unused {
		p.Close()
	}
	return failed
}

// use returns the pool of a name, or the shared one for an empty name. The caller must call
// leave. The error is an *api.Error, no_daemon.
func (ps *pools) use(name string) (p *pool.Pool, leave func(), err error) {
	if name == "" {
		return ps.shared, func() {}, nil
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	n := ps.named[name]
	if n == nil {
		return nil, nil, &api.Error{Code: api.NoDaemon, Msg: "no buildkitd can be reached", Err: fmt.Errorf("there is no pool %q", name)}
	}
	n.users++
	return n.Pool, func() { ps.leave(n) }, nil
}

func (ps *pools) leave(p *namedPool) {
	ps.mu.Lock()
	p.users--
	last := p.gone && p.users == 0
	ps.mu.Unlock()
	if last {
		p.Close()
	}
}

// all are the pools that a build could use now. The caller must call leave.
func (ps *pools) all() (list []*pool.Pool, leave func()) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	named := slices.Collect(maps.Values(ps.named))
	list = []*pool.Pool{ps.shared}
	for _, p := range named {
		p.users++
		list = append(list, p.Pool)
	}
	return list, func() {
		for _, p := range named {
			ps.leave(p)
		}
	}
}

// close closes each connection after its last build has left.
func (ps *pools) close() error {
	ps.mu.Lock()
	ps.closed = true
	named := ps.named
	ps.named = nil
	ps.mu.Unlock()
	err := ps.shared.Close()
	for _, p := range named {
		err = errors.Join(err, p.Close())
	}
	return err
}

// SetPools makes the named pools of daemons those with the given addresses, which have the form
// of Config.Addrs. All are reached with the same TLS files. If a pool goes, the builds that run
// on it still end there. The error is about addresses; pools with such an address are left out.
func (s *Solver) SetPools(addrs map[string][]string) error { return s.pools.set(addrs) }

// Seats are the places that builds of this process, and their parts, have on daemons, by the
// address. They include the places on daemons that have left their pool.
func (s *Solver) Seats() map[string]int { return s.pools.cfg.Seats.All() }

// Daemons counts the daemons of all pools. It takes up to 9 s when one no longer answers.
func (s *Solver) Daemons(ctx context.Context) solve.Daemons {
	list, leave := s.pools.all()
	defer leave()
	counts := make([]solve.Daemons, len(list))
	var asking sync.WaitGroup
	for i, p := range list {
		asking.Go(func() { counts[i] = p.Count(ctx) })
	}
	asking.Wait()
	var sum solve.Daemons
	for _, c := range counts {
		sum.Total += c.Total
		sum.Reachable += c.Reachable
		sum.Full += c.Full
	}
	return sum
}
