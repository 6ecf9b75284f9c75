package jetstream

import (
	"testing"

	js "github.com/nats-io/nats.go/jetstream"
)

// numbered is a message of a consumer.
type numbered struct {
	js.Msg
	n uint64
}

func (m numbered) Metadata() (*js.MsgMetadata, error) {
	return &js.MsgMetadata{Sequence: js.SequencePair{Consumer: m.n}}, nil
}

// TestMissed notices a message that the server has sent and that has not come.
func TestMissed(t *testing.T) {
	f := new(follower)
	for _, tt := range []struct {
		n    uint64
		want bool
	}{{1, false}, {2, false}, {4, true}} {
		if got := f.missed(numbered{n: tt.n}); got != tt.want {
			t.Errorf("message %d: %v", tt.n, got)
		}
	}
}
