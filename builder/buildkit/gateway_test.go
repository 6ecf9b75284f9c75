package buildkit

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/buildkit/client/llb"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"handler/function/api"
	"handler/function/buildconfig"
	"handler/function/buildkit/contextfs"
	"handler/function/solve"
)

// gateways is a fake gateway. It shows the inputs of one build after the other, and then those of the
// last. An empty name is a build that has just gone.
type gateways struct {
	gateway.Client
	inputs []string
}

func (g *gateways) Inputs(context.Context) (map[string]llb.State, error) {
	name := g.inputs[0]
	if len(g.inputs) > 1 {
		g.inputs = g.inputs[1:]
	}
	if name == "" {
		return nil, errors.New("no such job")
	}
	return map[string]llb.State{name: llb.Scratch()}, nil
}

// TestAwaitGateway waits until the gateway is that of the own solve, or until the solve has ended.
func TestAwaitGateway(t *testing.T) {
	gone := errors.New("gone")
	for _, tt := range []struct {
		name     string
		inputs   []string
		answered time.Duration // 0 is never
		canceled time.Duration
		took     time.Duration
		want     error // errors.Is; nil is success
		fails    bool
	}{
		{"own", []string{"own"}, 0, 0, 0, nil, false},
		{"another's, then none, then own", []string{"other", "", "own"}, 0, 0, 2 * gatewayInterval, nil, false},
		{"another's, refused", []string{"other"}, time.Second, 0, time.Second, nil, true},
		{"another's, canceled", []string{"other"}, 0, time.Second, time.Second, gone, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				a := &attempt{answered: make(chan struct{})}
				if tt.answered > 0 {
					time.AfterFunc(tt.answered, func() { close(a.answered) })
				}
				if tt.canceled > 0 {
					time.AfterFunc(tt.canceled, func() { cancel(gone) })
				}
				start := time.Now()
				err := a.awaitGateway(ctx, &gateways{inputs: tt.inputs}, "own")
				if (err != nil) != tt.fails || tt.want != nil && !errors.Is(err, tt.want) || time.Since(start) != tt.took {
					t.Errorf("%v after %v", err, time.Since(start))
				}
			})
		})
	}
}

// bridge is the gateway of a fake daemon. At first it is that of another build.
type bridge struct {
	gatewayapi.UnimplementedLLBBridgeServer

	mu       sync.Mutex
	own      map[string]*pb.Definition // the inputs of the build that has the gateway
	asked    chan struct{}             // closed when the inputs have been asked for twice
	times    int
	sources  int           // how often a source was to be resolved
	returned chan struct{} // closed when a result has come
}

func (b *bridge) Ping(context.Context, *gatewayapi.PingRequest) (*gatewayapi.PongResponse, error) {
	return &gatewayapi.PongResponse{FrontendAPICaps: gatewayapi.Caps.All(), LLBCaps: pb.Caps.All()}, nil
}

func (b *bridge) Inputs(context.Context, *gatewayapi.InputsRequest) (*gatewayapi.InputsResponse, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.times++; b.times == 2 {
		close(b.asked)
	}
	return &gatewayapi.InputsResponse{Definitions: b.own}, nil
}

func (b *bridge) ResolveSourceMeta(context.Context, *gatewayapi.ResolveSourceMetaRequest) (*gatewayapi.ResolveSourceMetaResponse, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sources++
	return nil, status.Error(codes.Unknown, "fatal: not our ref")
}

func (b *bridge) Return(context.Context, *gatewayapi.ReturnRequest) (*gatewayapi.ReturnResponse, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-b.returned:
	default:
		close(b.returned)
	}
	return &gatewayapi.ReturnResponse{}, nil
}

// touched says whether anything but inputs has been asked for.
func (b *bridge) touched() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-b.returned:
		return true
	default:
		return b.sources > 0
	}
}

// TestGatewayOfAnother has the daemon refuse the Ref of a build with a git context, but only after
// the build has reached the gateway of the build that has the Ref. Nothing may come of that there.
// The second solve is accepted, and resolves its context at its own gateway.
func TestGatewayOfAnother(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		refusal error
		code    api.Code
		touched bool // by the second solve
	}{
		{"taken", status.Error(codes.Unknown, "failed to solve: job ID 1fx2ex0 exists"), api.BadContext, true},
		{"failed otherwise", status.Error(codes.Unknown, "process \"/bin/sh -c false\" did not complete successfully: exit code: 1"), api.BuildFailed, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d := newDaemon(t, "d")
			d.bridge.own = map[string]*pb.Definition{}
			d.refuse = func() error {
				<-d.bridge.asked
				if d.bridge.touched() {
					t.Error("the other build's gateway got a result")
				}
				return tt.refusal
			}
			c, err := buildconfig.Parse([]byte(`{"skipPush":true,"context":{"git":"https://git.example.com/app.git"}}`))
			if err != nil {
				t.Fatal(err)
			}
			req := request(t, nil, "r")
			req.Config, req.Name = c, solve.Name{Call: "1f", Body: "2e"}
			s := newSolver(t, d)
			_, _, err = s.solve(t.Context(), req, contextfs.New(sample), func(...string) {})
			if api.AsError(err).Code != tt.code || d.bridge.touched() != tt.touched {
				t.Errorf("ended with %v, touched %v", err, d.bridge.touched())
			}
		})
	}
}
