package pool

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
)

const (
	// stallRest is how long a daemon whose build stalled is left alone.
	stallRest = 5 * time.Minute

	// probeInterval is the longest time between two probes. Only the rest before the first
	// probe can be longer.
	probeInterval = 5 * time.Second

	// pruneTimeout bounds one prune. pruneWait is how long a build waits for prunes where all
	// daemons are full.
	pruneTimeout  = 2 * time.Minute
	pruneWait     = 10 * time.Second
	pruneInterval = 10 * time.Second

	// A daemon that cannot write roomBytes is full.
	roomBytes   = 1 << 20
	roomTimeout = 10 * time.Second
)

// start runs f, unless the pool is closed. f has to end with p.ctx.
func (p *Pool) start(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		p.running.Go(f)
	}
}

// sleep returns false when the pool was closed meanwhile.
func (p *Pool) sleep(d time.Duration) bool {
	select {
	case <-p.ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// lose takes out a daemon that does not answer or that broke a build off. Until it answers a
// probe, it gets a build only if no other daemon takes the build, or if Place is to prefer it. A
// daemon that has left the pool is not lost.
func (p *Pool) lose(d *Daemon, cause error) {
	if errors.Is(cause, errClosed) {
		return
	}
	if rest, already := d.health.lose(); !already {
		p.probe(d, rest, cause)
	}
}

// MarkStalled takes a daemon out for stallRest, because one of its builds made no progress. A
// daemon that is out already stays out for as long as before.
func (p *Pool) MarkStalled(d *Daemon, cause error) {
	if already := d.health.setOut(true); !already {
		p.probe(d, stallRest, cause)
	}
}

// probe asks d, which is out, after rest, and then again until it answers.
func (p *Pool) probe(d *Daemon, rest time.Duration, cause error) {
	p.cfg.Log.Warn().Err(cause).Str("daemon", d.addr).Stringer("rest", rest).Msg("buildkitd taken out")
	p.start(func() {
		for p.sleep(rest) {
			c, err := d.acquire(p.ctx)
			if err == nil {
				d.release(c, false)
				d.health.setOut(false)
				p.cfg.Log.Info().Str("daemon", d.addr).Msg("buildkitd is back")
				return
			}
			if errors.Is(err, errClosed) {
				return
			}
			rest = min(rest, probeInterval)
		}
	})
}

// MarkFull has a daemon pruned whose disk is full. Until a prune has made room, the daemon gets a
// build only if Place is to prefer it.
func (p *Pool) MarkFull(d *Daemon, cause error) {
	if d.health.setFull(true) {
		return
	}
	p.cfg.Log.Warn().Err(cause).Str("daemon", d.addr).Msg("buildkitd's disk is full: pruning")
	p.start(func() {
		for {
			err := p.prune(p.ctx, d)
			if err == nil || errors.Is(err, errClosed) {
				return
			}
			p.cfg.Log.Warn().Err(err).Str("daemon", d.addr).Msg("pruning buildkitd failed")
			if !p.sleep(pruneInterval) {
				return
			}
		}
	})
}

// downError is of a daemon that does not answer.
type downError struct{ err error }

func (e *downError) Error() string { return e.err.Error() }
func (e *downError) Unwrap() error { return e.err }

// prune removes half of d's cache, the part that was used longest ago. BuildKit does not
// tell how much room is missing. prune fails unless the daemon can write afterwards. Its
// error is a *downError if the daemon does not answer, or ends meanwhile.
func (p *Pool) prune(ctx context.Context, d *Daemon) error {
	ctx, cancel := context.WithTimeout(ctx, pruneTimeout)
	defer cancel()
	select {
	case d.health.pruning <- struct{}{}:
		defer func() { <-d.health.pruning }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if !d.health.isFull() {
		return nil // somebody else has pruned
	}
	c, err := d.acquire(ctx)
	switch {
	case ctx.Err() != nil:
		if err == nil {
			d.release(c, false)
		}
		return context.Cause(ctx)
	case err != nil:
		return &downError{err}
	}
	defer d.release(c, false)
	used, freed, err := c.pruneHalf(ctx)
	if err == nil {
		// Running builds keep what they use, and other programs may fill the disk too.
		if err = c.tryWrite(ctx); err != nil {
			err = fmt.Errorf("writing after %d of %d bytes were removed: %w", freed, used, err)
		}
	}
	switch {
	case grpcerrors.Code(err) == codes.Unavailable:
		return &downError{err}
	case err != nil:
		return err
	}
	d.health.setFull(false)
	p.cfg.Log.Info().Str("daemon", d.addr).Int64("used_bytes", used).Int64("freed_bytes", freed).Msg("buildkitd pruned")
	return nil
}

// pruneHalf returns the size of the cache before, and how much of it was removed, in bytes.
func (c *conn) pruneHalf(ctx context.Context) (used, freed int64, err error) {
	records, err := c.client.DiskUsage(ctx)
	if err != nil {
		return 0, 0, err
	}
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
	// BuildKit takes a size of 0 as no limit.
	err = c.client.Prune(ctx, removed, client.WithKeepOpt(0, 0, max(used/2, 1), 0))
	close(removed)
	<-counted
	return used, freed, err
}

// tryWrite has the daemon write a file of roomBytes, to find out whether its disk is full. A
// failed step does not prove it: runc's message about a full disk is in the step's output,
// where any step can print it.
func (c *conn) tryWrite(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, roomTimeout)
	defer cancel()
	data := make([]byte, roomBytes)
	rand.Read(data) // no cache has it, and no file system compresses it
	def, err := llb.Scratch().File(llb.Mkfile("room", 0o600, data), llb.WithCustomName("[internal] write a file")).Marshal(ctx)
	if err != nil {
		return err
	}
	_, err = c.client.Solve(ctx, def, client.SolveOpt{Internal: true}, nil)
	return err
}
