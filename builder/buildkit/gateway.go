package buildkit

import (
	"context"
	"errors"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/identity"
)

// build has f build, with the gateway of a's own solve.
//
// BuildKit's client calls f beside the solve, and the daemon finds f's gateway by the Ref alone.
// While another replica's build has the Ref, this gateway is that build's. Whatever f returned would
// become the other build's result, or its error. So the solve has an input with a random name, and
// f is called once the gateway shows this input. Nothing reads the input. It is in no image, and not
// in the daemon's history.
func (a *attempt) build(ctx context.Context, opt client.SolveOpt, f gateway.BuildFunc, status chan *client.SolveStatus) (*client.SolveResponse, error) {
	mark := identity.NewID()
	opt.FrontendInputs = map[string]llb.State{mark: llb.Scratch().File(llb.Mkdir("/"+mark, 0o700))}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	return a.seat.Client().Build(ctx, opt, "", func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
		if err := a.awaitGateway(ctx, c, mark); err != nil {
			// The gateway may be the other build's. Without cancel, BuildKit's client would
			// return the error to it.
			a.foreign = true
			cancel()
			return nil, err
		}
		return f(ctx, c)
	}, status)
}

// gatewayInterval is the time between two questions for the gateway's inputs.
const gatewayInterval = 100 * time.Millisecond

// awaitGateway returns when the gateway shows the input mark. It fails if the solve's RPC or ctx ends
// before.
func (a *attempt) awaitGateway(ctx context.Context, c gateway.Client, mark string) error {
	for {
		inputs, err := c.Inputs(ctx)
		if _, own := inputs[mark]; own {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-a.answered:
			return errors.Join(errors.New("the solve ended before its gateway was there"), err)
		case <-time.After(gatewayInterval):
		}
	}
}
