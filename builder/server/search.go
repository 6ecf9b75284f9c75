package server

import (
	"cmp"
	"context"
	"errors"
	"sync/atomic"

	"handler/function/api"
	"handler/function/buildconfig"
	"handler/function/payload"
	"handler/function/signature"
	"handler/function/tenants"
)

// askBody reads out of the body whose keys to try. A text envelope may name the tenant, which
// counts if no header does. If nothing names one, the image in the config tells. It returns
// these keys, and in again the MACs that they make of the body. again is nil if the keys were
// known before, so that the body need not be read.
//
// The body may be anybody's. It is read once or twice more, within the bounds that all such
// bodies share. A body that does not say whose it is gets the same 401 as one that nobody
// signed.
func (s *Server) askBody(ctx context.Context, a *arrival, c claim, spool *payload.Spool) (list []tenants.Candidate, again *signature.Verifier, err error) {
	name := spool.Tenant()
	named := c.file() && !c.named && name != ""
	if !named && !c.open {
		return nil, nil, nil
	}
	if err := spool.Stored(); err != nil {
		return nil, nil, err // which says nothing about anybody's key
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.stopped, func() { cancel(errShuttingDown) })()
	leave, err := s.intake.search(ctx, a, named || spool.Plain())
	if err != nil {
		return nil, nil, err
	}
	defer leave()

	if named {
		list = c.set.Named(name)
	} else {
		err = spool.FindConfig(ctx, func(config []byte) {
			if image, ok := buildconfig.Image(config); ok {
				list = c.set.OfImage(image.Name())
			}
		})
		if ctx.Err() != nil {
			return nil, nil, canceled(context.Cause(ctx))
		}
		if err != nil || list == nil {
			return nil, nil, c.unauthorized(cmp.Or(err, errUnnamed))
		}
	}
	again = keysOf(list).Verifier(c.stamp)
	if err := spool.WriteSigned(ctx, again); err != nil {
		if ctx.Err() != nil {
			return nil, nil, canceled(context.Cause(ctx))
		}
		return nil, nil, c.unauthorized(err)
	}
	return list, again, nil
}

// These bound the searches in bodies whose signatures have not passed. A stranger can send a
// small body that takes long to decompress. So compressed bodies and envelopes have slots and a
// line of their own, and cannot take those of plain tars, which faas-cli and go-sdk send.
const (
	plainSearches  = 8  // at once, of bodies up to headSize
	packedSearches = 2  // of bodies up to headSize that are compressed or in a text envelope
	largeSearches  = 1  // of such bodies over headSize
	packedLine     = 64 // such bodies that wait, of either size; plain tars take turns so fast that all may wait
)

// searches are the slots of all searches. A plain body over headSize needs none of them beside
// its upload slot.
type searches struct{ plain, packed, large searchSlots }

type searchSlots struct {
	slots
	line    int64 // how many may wait, or try to
	waiting atomic.Int64
}

func (s *searches) open() {
	s.plain.slots, s.plain.line = make(slots, plainSearches), 2*maxArrivals
	s.packed.slots, s.packed.line = make(slots, packedSearches), packedLine
	s.large.slots, s.large.line = make(slots, largeSearches), packedLine
}

// search takes a slot to search the body of a. The caller must call leave.
func (in *intake) search(ctx context.Context, a *arrival, plain bool) (leave func(), err error) {
	from := &in.searches.packed
	switch large := a.hasSlot(); {
	case plain && large:
		return func() {}, nil
	case plain:
		from = &in.searches.plain
	case large:
		from = &in.searches.large
	}
	busy := &api.Error{Code: api.Busy, Msg: "too many bodies are being searched for their tenant; name it in the header " + api.TenantHeader}
	defer from.waiting.Add(-1)
	if from.waiting.Add(1) > from.line {
		return nil, busy
	}
	switch err := from.acquire(ctx, uploadWait); {
	case err == nil:
		return from.release, nil
	case errors.Is(err, errFull):
		return nil, busy
	default:
		return nil, canceled(err)
	}
}
