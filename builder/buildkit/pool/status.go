package pool

import (
	"context"
	"strings"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"google.golang.org/grpc"
)

// statusSilence is how long a stream of statuses waits for a silent daemon once its context has
// ended. BuildKit's client ends the context five seconds after the last message of a solve that has
// ended. So such a solve waits for a silent daemon for ten seconds in all.
const statusSilence = 5 * time.Second

// statuses is a stream of a build's progress. The daemon keeps what nobody has received yet, also
// after the build has ended. The stream goes on until its own end, however slowly somebody reads
// it. Once over has ended, the daemon's silence ends the stream too.
type statuses struct {
	grpc.ClientStream
	over   context.Context
	stop   context.CancelFunc // ends the stream at once
	solves *solves            // nil for a build that another process has solved
}

// SendMsg asks for the progress of a build.
func (s statuses) SendMsg(m any) error {
	if r, ok := m.(*controlapi.StatusRequest); ok && s.solves != nil {
		s.solves.shows(r.Ref, s.stop)
	}
	return s.ClientStream.SendMsg(m)
}

// RecvMsg receives a message. The time between two calls is the reader's, and does not count as
// silence.
func (s statuses) RecvMsg(m any) error {
	received := make(chan struct{})
	forget := context.AfterFunc(s.over, func() {
		select {
		case <-received:
		case <-time.After(statusSilence):
			s.stop()
		}
	})
	err := s.ClientStream.RecvMsg(m)
	close(received)
	forget()
	if err != nil {
		s.stop()
	}
	return err
}

// ownEnd is the key that marks a context of sendStatuses. keepStatuses leaves its stream alone.
type ownEnd struct{}

// keepStatuses has BuildKit's client receive the progress of a solve to its end. The client gives
// up the stream once it has received nothing for five seconds after the solve
// (statusInactivityTimeout in its solve.go). But it also receives nothing while it hands a message
// on. A message can have 1 MiB of a log, and a slow reader may need longer for it. The rest of the
// log would be lost.
func (s *solves) keepStatuses(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	if method != controlapi.Control_Status_FullMethodName || ctx.Value(ownEnd{}) != nil {
		return streamer(ctx, desc, cc, method, opts...)
	}
	kept, stop := context.WithCancel(context.WithoutCancel(ctx))
	stream, err := streamer(kept, desc, cc, method, opts...)
	if err != nil {
		stop()
		return nil, err
	}
	return statuses{ClientStream: stream, over: ctx, stop: stop, solves: s}, nil
}

// solves are the solves that somebody has asked for on a connection, by their Refs. BuildKit's
// client calls the RPCs of one solve with contexts that have nothing in common, so only the Ref
// tells which belong together.
type solves struct {
	mu  sync.Mutex
	all map[string]*oneSolve
}

type oneSolve struct {
	answered func(taken bool)

	// Both guarded by solves.mu.
	taken bool
	stop  context.CancelFunc // ends the stream of its statuses; nil before there is one
}

// Await has answered called when the daemon has answered the solve with the given Ref. The progress
// may come later, because somebody reads it slowly. taken says that the daemon has refused the Ref,
// because it runs another build with it. The progress would be that build's, so it ends. The caller
// must call forget when the solve has ended, and must not use the seat for another solve before.
func (s *Seat) Await(ref string, answered func(taken bool)) (forget func()) {
	all := s.conn.solves
	all.mu.Lock()
	defer all.mu.Unlock()
	all.all[ref] = &oneSolve{answered: answered}
	return func() {
		all.mu.Lock()
		defer all.mu.Unlock()
		delete(all.all, ref)
	}
}

// shows notes how to end the stream of the statuses of a solve.
func (s *solves) shows(ref string, stop context.CancelFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	one := s.all[ref]
	switch {
	case one == nil:
	case one.taken:
		stop()
	default:
		one.stop = stop
	}
}

// tellAnswered calls the function of Await.
func (s *solves) tellAnswered(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoker(ctx, method, req, reply, cc, opts...)
	if r, ok := req.(*controlapi.SolveRequest); ok {
		s.answered(r.Ref, err)
	}
	return err
}

func (s *solves) answered(ref string, err error) {
	s.mu.Lock()
	one := s.all[ref]
	if one == nil {
		s.mu.Unlock()
		return
	}
	// The text is from BuildKit's solver/jobs.go.
	one.taken = err != nil && strings.Contains(err.Error(), "job ID "+ref+" exists")
	if one.taken && one.stop != nil {
		one.stop()
	}
	s.mu.Unlock()
	one.answered(one.taken)
}

// sendStatuses sends the progress of a build to updates, and closes updates. It returns at the
// end of the progress, or of ctx. Once over has ended, it waits no longer for a silent daemon.
func (c *conn) sendStatuses(ctx, over context.Context, ref string, updates chan<- *client.SolveStatus) {
	defer close(updates)
	ctx, stop := context.WithCancel(context.WithValue(ctx, ownEnd{}, true))
	defer stop()
	stream, err := c.client.ControlClient().Status(ctx, &controlapi.StatusRequest{Ref: ref})
	if err != nil {
		return
	}
	s := statuses{ClientStream: stream, over: over, stop: stop}
	for {
		resp := new(controlapi.StatusResponse)
		if s.RecvMsg(resp) != nil {
			return
		}
		updates <- client.NewSolveStatus(resp)
	}
}
