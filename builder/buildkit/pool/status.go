package pool

import (
	"context"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"google.golang.org/grpc"
)

// statusSilence is how long a stream of statuses waits for a silent daemon once its build is over.
// BuildKit's client says so five seconds after the last message of a solve. A solve that has ended
// therefore waits for a silent daemon for ten seconds in all.
const statusSilence = 5 * time.Second

// statuses is a stream of a build's progress. The daemon keeps what nobody has received yet, also
// after the build has ended. The stream goes on until its own end, however slowly somebody reads
// it. Once over has ended, the daemon's silence ends the stream too.
type statuses struct {
	grpc.ClientStream
	over context.Context
	stop context.CancelFunc // ends the stream at once
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
func keepStatuses(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	if method != controlapi.Control_Status_FullMethodName || ctx.Value(ownEnd{}) != nil {
		return streamer(ctx, desc, cc, method, opts...)
	}
	kept, stop := context.WithCancel(context.WithoutCancel(ctx))
	stream, err := streamer(kept, desc, cc, method, opts...)
	if err != nil {
		stop()
		return nil, err
	}
	return statuses{ClientStream: stream, over: ctx, stop: stop}, nil
}

// solved is the key of a function in a context.
type solved struct{}

// WithSolved has f called when the daemon has answered the solve whose context it returns. The
// progress may come later, because somebody reads it slowly.
func WithSolved(ctx context.Context, f func()) context.Context {
	return context.WithValue(ctx, solved{}, f)
}

// tellSolved calls the function of WithSolved.
func tellSolved(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoker(ctx, method, req, reply, cc, opts...)
	if f, ok := ctx.Value(solved{}).(func()); ok && method == controlapi.Control_Solve_FullMethodName {
		f()
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
