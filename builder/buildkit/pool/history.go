package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/status"
)

// historyTimeout bounds one look into a history: the daemon reads all of it from its disk.
// loadTimeout is for the running builds alone, which the daemon has in memory.
const (
	historyTimeout = 30 * time.Second
	loadTimeout    = 2 * time.Second

	// recordInterval is between two questions for the record of a build that another process began.
	recordInterval = 3 * time.Second
)

// Record is a build in a daemon's history.
type Record struct {
	Ref    string // by which the build was solved
	Image  string // the first reference that it was to push, normalised
	Digest string // of its result; empty without one

	Began, Ended time.Time // Ended is zero while the build runs

	Err error // of a build that failed; its code is grpcerrors.Code's
}

// Running says that the build has not ended.
func (r *Record) Running() bool { return r.Ended.IsZero() }

// Succeeded says that the build has ended and has a result.
func (r *Record) Succeeded() bool { return !r.Running() && r.Err == nil && r.Digest != "" }

func recordOf(r *controlapi.BuildHistoryRecord) *Record {
	record := &Record{Ref: r.Ref, Began: r.CreatedAt.AsTime()}
	if len(r.Exporters) > 0 {
		record.Image, _, _ = strings.Cut(r.Exporters[0].Attrs["name"], ",")
	}
	if r.CompletedAt == nil {
		return record
	}
	record.Ended = r.CompletedAt.AsTime()
	// The history keeps the descriptor of what the exporter made, and not its response. The
	// results are a map: without a result, the digest is empty.
	record.Digest = r.GetResult().GetResults()[0].GetDigest()
	if r.Error != nil {
		record.Err = grpcerrors.FromGRPC(status.FromProto(r.Error).Err())
	}
	return record
}

// Record is the daemon's record of the build with the given Ref, or nil.
func (s *Seat) Record(ctx context.Context, ref string) (*Record, error) {
	return s.conn.record(ctx, ref)
}

// RecordAt is the record that the daemon at an address has of the build with the given Ref. It is nil
// if there is no such record, or no such daemon in the pool any more.
func (p *Pool) RecordAt(ctx context.Context, addr, ref string) (*Record, error) {
	for _, d := range p.list(ctx) {
		if d.addr != addr {
			continue
		}
		c, err := d.acquire(ctx)
		if err != nil {
			return nil, err
		}
		defer d.release(c, false)
		return c.record(ctx, ref)
	}
	return nil, nil
}

func (c *conn) record(ctx context.Context, ref string) (*Record, error) {
	var record *Record
	err := c.history(ctx, &controlapi.BuildHistoryRequest{Ref: ref, EarlyExit: true}, func(r *controlapi.BuildHistoryRecord) {
		if record == nil {
			record = recordOf(r)
		}
	})
	return record, err
}

var errEnded = errors.New("the build has ended")

// Watch sends the progress of a build that another process began to updates, and returns
// when the build has ended and all progress is sent. It closes updates. It calls solved when the
// build has ended. It fails if the daemon goes away before.
//
// A daemon whose disk is full has no record of the build's end, and tells nobody of it
// (Queue.Update in BuildKit's history/buildhistory.go). So Watch also asks for the record, once the
// progress has ended.
func (s *Seat) Watch(ctx context.Context, ref string, updates chan<- *client.SolveStatus, solved func()) error {
	over, end := context.WithCancel(context.Background())
	defer end()
	sending, stop := context.WithCancel(ctx)
	defer stop()
	listening, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var sent sync.WaitGroup
	sent.Go(func() {
		s.conn.sendStatuses(sending, over, ref, updates)
		if s.conn.untilEnded(listening, ref) {
			cancel(errEnded)
		}
	})
	err := s.conn.listen(listening, &controlapi.BuildHistoryRequest{Ref: ref}, func(r *controlapi.BuildHistoryRecord) error {
		if r.CompletedAt == nil {
			return nil
		}
		return errEnded
	})
	cancel(nil)
	if errors.Is(err, errEnded) || context.Cause(listening) == errEnded {
		solved()
		end()
		sent.Wait()
		return nil
	}
	stop()
	sent.Wait()
	if err == nil {
		return errors.New("reading the build history: it ended before the build")
	}
	return err
}

// untilEnded waits until the daemon no longer runs a build. It returns false if ctx ends before.
func (c *conn) untilEnded(ctx context.Context, ref string) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(recordInterval):
		}
		if record, err := c.record(ctx, ref); err == nil && (record == nil || !record.Running()) {
			return true
		}
	}
}

// Found is a record, and the daemon that has it.
type Found struct {
	*Record
	Daemon *Daemon
}

// Search returns the records of all daemons whose Ref begins with prefix. Its error says
// that some daemons could not be asked. The records of the others are returned beside it.
func (p *Pool) Search(ctx context.Context, prefix string) ([]Found, error) {
	var mu sync.Mutex
	var found []Found
	var failed error
	missed := p.each(ctx, p.list(ctx), func(d *Daemon, c *conn) {
		var mine []Found
		err := c.history(ctx, &controlapi.BuildHistoryRequest{EarlyExit: true}, func(r *controlapi.BuildHistoryRecord) {
			if strings.HasPrefix(r.Ref, prefix) {
				mine = append(mine, Found{recordOf(r), d})
			}
		})
		mu.Lock()
		defer mu.Unlock()
		found = append(found, mine...)
		failed = errors.Join(failed, err)
	})
	if missed > 0 {
		failed = errors.Join(failed, fmt.Errorf("%d cannot be reached", missed))
	}
	return found, failed
}

// Counts says whether the daemons have to be asked how many builds they have. They count only
// builds of which they keep a record.
func (p *Pool) Counts() bool {
	_, all := p.elsewhere()
	return p.Several() && !all
}

// elsewhere is Config.Elsewhere.
func (p *Pool) elsewhere() (builds map[string]int, all bool) {
	if p.cfg.Elsewhere == nil {
		return nil, false
	}
	return p.cfg.Elsewhere()
}

// load is how many builds d has. If all other processes have told theirs, their sum counts.
// Otherwise load asks the daemon, if its last count is stale, and takes the higher of both numbers.
// The daemon's can be too low: it keeps no record of a build that began while all had told.
func (p *Pool) load(ctx context.Context, d *Daemon, c *conn) (int, error) {
	builds, all := p.elsewhere()
	if !all && d.health.stale() {
		if _, err := d.count(ctx, c); err != nil {
			return 0, err
		}
	}
	return d.health.told(builds[d.addr], all), nil
}

var errSlowCount = errors.New("buildkitd was too slow to count its builds")

// count asks d how many builds run there, and returns the tags of the builds of tenants. Its error
// is errSlowCount if d takes longer than loadTimeout, as a busy daemon may.
func (d *Daemon) count(ctx context.Context, c *conn) (map[Tags]bool, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, loadTimeout, errSlowCount)
	defer cancel()
	mine, active, tags := d.health.mine(), 0, make(map[Tags]bool)
	err := c.history(ctx, &controlapi.BuildHistoryRequest{ActiveOnly: true, EarlyExit: true}, func(r *controlapi.BuildHistoryRecord) {
		active++
		if t, ok := tagsOf(r.Ref); ok {
			tags[t] = true
		}
	})
	if err != nil && context.Cause(ctx) == errSlowCount {
		return nil, errSlowCount
	}
	if err != nil {
		return nil, err
	}
	d.health.count(active, mine)
	return tags, nil
}

// history calls f for each record that matches req, those of running builds included.
func (c *conn) history(ctx context.Context, req *controlapi.BuildHistoryRequest, f func(*controlapi.BuildHistoryRecord)) error {
	ctx, cancel := context.WithTimeout(ctx, historyTimeout)
	defer cancel()
	return c.listen(ctx, req, func(r *controlapi.BuildHistoryRecord) error {
		f(r)
		return nil
	})
}

// listen calls f for each record until the stream ends, or f returns an error.
func (c *conn) listen(ctx context.Context, req *controlapi.BuildHistoryRequest, f func(*controlapi.BuildHistoryRecord) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.client.ControlClient().ListenBuildHistory(ctx, req)
	if err != nil {
		return fmt.Errorf("reading the build history: %w", err)
	}
	for {
		event, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the build history: %w", err)
		}
		if event.Record == nil || event.Type == controlapi.BuildHistoryEventType_DELETED {
			continue
		}
		if err := f(event.Record); err != nil {
			return err
		}
	}
}
