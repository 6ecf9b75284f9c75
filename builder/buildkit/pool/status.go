package pool

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/grpcerrors"
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

// solves are the solves of Await on one connection, by their Refs. BuildKit's client asks for the
// progress of a solve with a context that has nothing in common with the caller's, so only the Ref
// tells which solve a stream of statuses belongs to.
type solves struct {
	mu  sync.Mutex
	all map[string]*oneSolve
}

// oneSolve is also the value of its key in the context of the solve's RPC.
type oneSolve struct {
	answered func(error)

	mu   sync.Mutex
	over bool               // nobody wants its statuses any more
	stop context.CancelFunc // ends the stream of its statuses; nil before there is one
}

type oneSolveKey struct{}

// ErrTaken says that another build has the Ref: one on the same connection, or one for which the
// daemon has refused the Ref.
var ErrTaken = errors.New("another build has the Ref")

// Await is for one solve, which must have the given Ref and the context that Await returns.
//
//   - answered is called when the solve's RPC has ended, with its error. The progress may come
//     later, because somebody reads it slowly. answered is not called if there is no such RPC.
//   - If the error is ErrTaken, the progress would be that of the other build, so it ends.
//   - After ctx has ended, the progress ends within statusSilence.
//
// The caller must call forget when the solve has ended. If err is ErrTaken, there must be no solve.
func (s *Seat) Await(ctx context.Context, ref string, answered func(error)) (solving context.Context, forget func(), err error) {
	one, all := &oneSolve{answered: answered}, s.conn.solves
	all.mu.Lock()
	defer all.mu.Unlock()
	// A queue may deliver a build twice at once. The Ref alone would not tell their progress apart.
	if all.all[ref] != nil {
		return nil, nil, ErrTaken
	}
	all.all[ref] = one
	ended := make(chan struct{})
	unhook := context.AfterFunc(ctx, func() {
		select {
		case <-ended:
		case <-time.After(statusSilence):
			one.end()
		}
	})
	return context.WithValue(ctx, oneSolveKey{}, one), func() {
		unhook()
		close(ended)
		all.mu.Lock()
		defer all.mu.Unlock()
		delete(all.all, ref)
	}, nil
}

// shows notes how to end the stream of the statuses of a solve.
func (s *solves) shows(ref string, stop context.CancelFunc) {
	s.mu.Lock()
	one := s.all[ref]
	s.mu.Unlock()
	if one == nil {
		return
	}
	one.mu.Lock()
	defer one.mu.Unlock()
	if one.stop = stop; one.over {
		stop()
	}
}

// end ends the stream of the statuses, also if it is still to begin.
func (o *oneSolve) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.over = true; o.stop != nil {
		o.stop()
	}
}

// tellAnswered calls the function of Await.
func tellAnswered(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoker(ctx, method, req, reply, cc, opts...)
	r, isSolve := req.(*controlapi.SolveRequest)
	one, _ := ctx.Value(oneSolveKey{}).(*oneSolve)
	if !isSolve || one == nil {
		return err
	}
	// The text is from BuildKit's solver/jobs.go.
	if err != nil && strings.Contains(err.Error(), "job ID "+r.Ref+" exists") {
		one.end()
		one.answered(ErrTaken)
	} else {
		one.answered(grpcerrors.FromGRPC(err))
	}
	return err
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
