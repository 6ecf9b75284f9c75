package buildkit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"handler/function/api"
	"handler/function/redact"
	"handler/function/solve"
)

// A build with a name has a Ref made of it, so that another replica, or this
// one after a restart, finds it in the daemon's history: what came of it, or
// that it runs. BuildKit takes no Ref twice, so each further attempt has the
// next number.

// maxRefs bounds the attempts at one name that are looked for.
const maxRefs = 20

func refOf(name solve.Name, attempt int) string {
	return refPrefix(name) + strconv.Itoa(attempt)
}

func refPrefix(name solve.Name) string { return name.Call + "x" + name.Body + "x" }

// historyTimeout bounds a look into the history: the daemon reads it from its
// disk, all of it.
const historyTimeout = 30 * time.Second

// recall looks for what the daemon knows of the build's name. It returns an
// Outcome when an attempt has succeeded, after having waited for one that runs,
// and otherwise the Ref of the next.
func (b *build) recall(ctx context.Context, at *seat) (*solve.Outcome, string, error) {
	for n := 0; n < maxRefs; {
		ref := refOf(b.req.Name, n)
		records, err := at.history(ctx, &controlapi.BuildHistoryRequest{Ref: ref, EarlyExit: true})
		if err != nil {
			return nil, "", err
		}
		switch {
		case len(records) == 0:
			return nil, ref, nil
		case isRunning(records[0]):
			b.progress.warn("this build runs already: following it")
			b.followed = true
			if err := b.follow(ctx, at.conn, ref); err != nil {
				return nil, "", err
			}
			b.limits.again()
		case succeeded(records[0]):
			outcome := b.outcome(at.daemon, digestOf(records[0]))
			return &outcome, "", nil
		default:
			n++
		}
	}
	// A queue that tries as often as that gets each of its attempts.
	return nil, identity.NewID(), nil
}

// errRunsAlready is what a solve comes to whose Ref another replica has just
// taken.
var errRunsAlready = errors.New("another replica runs this build")

func runsAlready(err error, ref string) bool {
	return strings.Contains(err.Error(), "job ID "+ref+" exists")
}

// follow shows the progress of a build that another replica began, until the
// daemon has recorded its end.
func (b *build) follow(ctx context.Context, c *conn, ref string) error {
	// Ended by the record: the stream of a build's status may be the later one.
	watching, stop := context.WithCancel(ctx)
	var shown sync.WaitGroup
	defer shown.Wait()
	defer stop()
	updates := make(chan *client.SolveStatus)
	shown.Go(func() { b.progress.drain(ctx, updates) })
	shown.Go(func() {
		defer close(updates)
		stream, err := c.client.ControlClient().Status(watching, &controlapi.StatusRequest{Ref: ref})
		for err == nil {
			var resp *controlapi.StatusResponse
			if resp, err = stream.Recv(); err == nil {
				updates <- client.NewSolveStatus(resp)
			}
		}
	})
	ended := errors.New("the build has ended")
	err := c.listen(ctx, &controlapi.BuildHistoryRequest{Ref: ref}, func(r *controlapi.BuildHistoryRecord) error {
		if isRunning(r) {
			return nil
		}
		return ended
	})
	if errors.Is(err, ended) {
		return nil
	}
	return err
}

func isRunning(r *controlapi.BuildHistoryRecord) bool { return r.CompletedAt == nil }

func succeeded(r *controlapi.BuildHistoryRecord) bool {
	return !isRunning(r) && r.Error == nil && digestOf(r) != ""
}

// digestOf is of what the one exporter of a build made. Its response is not
// recorded, its descriptor is.
func digestOf(r *controlapi.BuildHistoryRecord) string {
	return r.GetResult().GetResults()[0].GetDigest()
}

// history returns the records that match, those of running builds among them.
func (c *conn) history(ctx context.Context, req *controlapi.BuildHistoryRequest) ([]*controlapi.BuildHistoryRecord, error) {
	ctx, cancel := context.WithTimeout(ctx, historyTimeout)
	defer cancel()
	var records []*controlapi.BuildHistoryRecord
	err := c.listen(ctx, req, func(r *controlapi.BuildHistoryRecord) error {
		records = append(records, r)
		return nil
	})
	return records, err
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

// Find returns what the daemons remember of the call's builds, the latest of
// them, or nil. An error is an *api.Error, no_daemon: one that may know cannot be
// asked.
func (s *Solver) Find(ctx context.Context, call string) (*solve.Past, error) {
	var mu sync.Mutex
	var last *controlapi.BuildHistoryRecord
	var failed error
	missed := s.pool.each(ctx, func(_ *daemon, c *conn) {
		records, err := c.history(ctx, &controlapi.BuildHistoryRequest{EarlyExit: true})
		mu.Lock()
		defer mu.Unlock()
		failed = errors.Join(failed, err)
		for _, r := range records {
			if strings.HasPrefix(r.Ref, call+"x") && (last == nil || r.CreatedAt.AsTime().After(last.CreatedAt.AsTime())) {
				last = r
			}
		}
	})
	if last != nil {
		if p := past(last); p != nil {
			return p, nil
		}
	}
	if missed > 0 {
		failed = errors.Join(failed, fmt.Errorf("%d cannot be reached", missed))
	}
	if failed != nil {
		return nil, &api.Error{Code: api.NoDaemon, Msg: "a buildkitd that may know of the build cannot be asked", Err: failed}
	}
	return nil, nil
}

// elsewhere is the daemon of a pool that knows the build's name: where it runs,
// or else has succeeded. It is nil of a build without a name.
func (b *build) elsewhere(ctx context.Context) *daemon {
	if !b.named() || !b.solver.pool.several() {
		return nil
	}
	var mu sync.Mutex
	var running, done *daemon
	b.solver.pool.each(ctx, func(d *daemon, c *conn) {
		records, err := c.history(ctx, &controlapi.BuildHistoryRequest{EarlyExit: true})
		if err != nil {
			return // the daemon that the build is placed on is asked again
		}
		mu.Lock()
		defer mu.Unlock()
		for _, r := range records {
			switch {
			case !strings.HasPrefix(r.Ref, refPrefix(b.req.Name)):
			case isRunning(r):
				running = d
			case succeeded(r):
				done = d
			}
		}
	})
	return cmp.Or(running, done)
}

// command is a step's, as it stands in the error of its exit code.
var command = regexp.MustCompile(`process "(?:[^"\\]|\\.)*" did not complete successfully: `)

// past reads a record. A build that was cancelled has come to nothing: its
// function stopped, say, and the next delivery builds again.
func past(r *controlapi.BuildHistoryRecord) *solve.Past {
	p := &solve.Past{Running: isRunning(r), Began: r.CreatedAt.AsTime()}
	for _, e := range r.Exporters {
		p.Image, _, _ = strings.Cut(e.Attrs["name"], ",")
	}
	if p.Running {
		return p
	}
	p.Ended = r.CompletedAt.AsTime()
	if r.Error == nil {
		p.Outcome.Digest = digestOf(r)
	} else {
		err := grpcerrors.FromGRPC(status.FromProto(r.Error).Err())
		if grpcerrors.Code(err) == codes.Canceled {
			return nil
		}
		// Nothing masks here, where the secrets are not known. BuildKit puts none of
		// their values into errors of its own, but a step's command may have one.
		err = errors.New(command.ReplaceAllString(err.Error(), ""))
		p.Err = (&failure{
			err: err, redact: redact.New(nil), step: func(string) string { return "" },
			pushing: pushed.MatchString(unquoted(err.Error())),
		}).classify()
	}
	return p
}
