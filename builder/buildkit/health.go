package buildkit

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
)

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

	// roomBytes is what a daemon must be able to write not to be full.
	roomBytes   = 1 << 20
	roomTimeout = 10 * time.Second
)

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

// isFull says whether the daemon's disk is, which an error alone cannot: what runc
// says where it has no room to start a step is in the step's output, and a step can
// say the same. The daemon has to write a file.
func (c *conn) isFull(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, roomTimeout)
	defer cancel()
	data := make([]byte, roomBytes)
	rand.Read(data) // so that no cache has it, and no file system makes it less
	def, err := llb.Scratch().File(llb.Mkfile("room", 0o600, data), llb.WithCustomName("[internal] write a file")).Marshal(ctx)
	if err != nil {
		return false
	}
	_, err = c.client.Solve(ctx, def, client.SolveOpt{Internal: true}, nil)
	return err != nil && saysFull(err)
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
	// What running builds hold is not pruned, and others may fill the disk too.
	if c.isFull(ctx) {
		return fmt.Errorf("its disk is full after %d of %d bytes were removed", freed, used)
	}
	d.health.mu.Lock()
	d.health.full = false
	d.health.mu.Unlock()
	p.log.Info().Str("daemon", d.addr).Int64("used_bytes", used).Int64("freed_bytes", freed).Msg("buildkitd pruned")
	return nil
}
