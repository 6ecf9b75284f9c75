package buildkit

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/buildkit/client/llb"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
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
