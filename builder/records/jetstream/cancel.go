package jetstream

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	js "github.com/nats-io/nats.go/jetstream"

	"handler/function/records"
)

// order is a request to the owner of a build. Build tells it from all other builds, so that an
// order that is sent again does nothing: this build has been ended already.
type order struct {
	Tenant string `json:"tenant"`
	ID     string `json:"id"`
	Build  string `json:"build"`
	By     string `json:"by"`
	Nonce  string `json:"nonce"` // comes back in the answer
}

// answer is the owner's.
type answer struct {
	Nonce string `json:"nonce"`
	Told  bool   `json:"told"` // false: it does not have this build, or no longer
}

func (s *Store) Cancel(ctx context.Context, c records.Cancellation) (records.Record, error) {
	own, err := s.ownTarget(c.Ref)
	if err != nil {
		return records.Record{}, err
	}
	if own != nil && c.Attempt != 0 {
		return s.cancelOwn(ctx, own, c)
	}
	r, err := s.get(ctx, c.Ref)
	if own != nil && (err != nil || r.Build == own.id) {
		return s.cancelOwn(ctx, own, c)
	}
	if err != nil {
		return records.Record{}, err
	}
	// Once is used up even if the build has ended. Otherwise the same cancellation, sent again, could
	// end a later attempt.
	if err := s.use(ctx, c.Once, cancelFor); err != nil {
		return records.Record{}, err
	}
	if !r.Record.Running() {
		return r.Record, nil
	}
	return s.cancelOther(ctx, r, c)
}

// ownTarget returns this process's build that a Ref names, or nil. It fails for a build that has no
// number yet: it may be the attempt that is meant.
func (s *Store) ownTarget(ref records.Ref) (*build, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	own := s.local(ref.Tenant, ref.ID, ref.Attempt)
	if own == nil {
		if b := s.local(ref.Tenant, ref.ID, 0); b != nil && b.rec.Attempt == 0 {
			return nil, fmt.Errorf("%w: the build has no number yet", records.ErrUnknown)
		}
	}
	return own, nil
}

// cancelOther ends a build of another process.
func (s *Store) cancelOther(ctx context.Context, r *stored, c records.Cancellation) (records.Record, error) {
	err := s.order(ctx, r, c.By)
	if errors.Is(err, errNotThere) {
		// It ended meanwhile, or its verdict is on the way.
		c.Attempt = r.Record.Attempt
		if r, err = s.get(ctx, c.Ref); err == nil && r.Record.Running() {
			err = records.ErrOwnerUnreachable
		}
	}
	if err != nil {
		return records.Record{}, err
	}
	return r.Record, nil
}

// cancelOwn ends a build of this process. It needs no store, but asks it whether Once was used.
func (s *Store) cancelOwn(ctx context.Context, b *build, c records.Cancellation) (records.Record, error) {
	if err := s.use(ctx, c.Once, readOwn); err != nil && !errors.Is(err, records.ErrUnknown) {
		return records.Record{}, err
	}
	b.stop(c.By)
	return b.Record(), nil
}

// stop ends a build. It returns false if it had ended.
func (b *build) stop(by string) bool {
	s := b.store
	s.mu.Lock()
	if b.ended != nil {
		s.mu.Unlock()
		return false
	}
	if b.rec.CanceledBy == "" {
		b.rec.CanceledBy, b.dirty = by, true
		b.poke()
	}
	s.mu.Unlock()
	b.cancel(by)
	return true
}

// use uses a Cancellation.Once up.
//
// # Errors
//
// ErrUsed. ErrUnknown if it was not used by this process, and the store cannot say whether by
// another.
func (s *Store) use(ctx context.Context, once string, wait time.Duration) error {
	if once == "" {
		return nil
	}
	s.mu.Lock()
	first := s.used.Use(once)
	s.mu.Unlock()
	if !first {
		return records.ErrUsed
	}
	st, err := s.current()
	if err != nil {
		return err
	}
	asked, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	k := s.ring.Load().keys[0]
	subject := k.once(once)
	msg := &nats.Msg{Subject: subject, Data: seal(k.records, subject, nil)}
	_, err = st.js.PublishMsg(asked, msg, js.WithExpectLastSequencePerSubject(0), js.WithRetryAttempts(0))
	if isConflict(err) {
		return records.ErrUsed
	}
	if err != nil {
		return s.failed(ctx, err)
	}
	return nil
}

var errNotThere = errors.New("the process does not have the build")

// order tells the owner of a build to end it.
func (s *Store) order(ctx context.Context, r *stored, by string) error {
	k := r.at.key
	o := order{r.Record.Tenant, r.Record.ID, r.Build, by, rand.Text()}
	text, err := json.Marshal(o)
	if err != nil {
		return err
	}
	subject := k.cancel(r.Owner)
	asked, cancel := context.WithTimeout(ctx, cancelFor)
	defer cancel()
	msg, err := s.conn.Load().RequestWithContext(asked, subject, seal(k.control, subject, text))
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		// No responders: its process has died. Otherwise it is frozen or cut off.
		return fmt.Errorf("%w: %w", records.ErrOwnerUnreachable, err)
	}
	plain, err := open(k.control, subject+".answer", msg.Data)
	if err != nil {
		return fmt.Errorf("%w: %w", records.ErrOwnerUnreachable, errForged)
	}
	var a answer
	if err := json.Unmarshal(plain, &a); err != nil || a.Nonce != o.Nonce {
		return fmt.Errorf("%w: %w", records.ErrOwnerUnreachable, errForged)
	}
	if !a.Told {
		return errNotThere
	}
	return nil
}

// listen subscribes to what other processes say.
func (s *Store) listen(conn *nats.Conn) error {
	if _, err := conn.Subscribe(beatSubjects, s.hear); err != nil {
		return err
	}
	_, err := conn.Subscribe("builder.cancel.*."+s.process, s.obey)
	return err
}

// openMessage reads into v what another process has said, with the key of an id. It returns the key.
func (s *Store) openMessage(msg *nats.Msg, id string, v any) (k *key, ok bool) {
	if k = s.ring.Load().byID[id]; k == nil {
		return nil, false
	}
	plain, err := open(k.control, msg.Subject, msg.Data)
	if err != nil {
		s.tell(errForged)
		return nil, false
	}
	return k, json.Unmarshal(plain, v) == nil
}

// obey ends a build of this process for another process.
func (s *Store) obey(msg *nats.Msg) {
	var o order
	k, ok := s.openMessage(msg, strings.Split(msg.Subject, ".")[2], &o)
	if !ok {
		return
	}
	a := answer{Nonce: o.Nonce}
	s.mu.Lock()
	var found *build
	for _, b := range s.builds[name{o.Tenant, o.ID}] {
		if b.id == o.Build {
			found = b
		}
	}
	s.mu.Unlock()
	if found != nil {
		a.Told = found.stop(o.By)
	}
	text, err := json.Marshal(a)
	if err != nil {
		return
	}
	msg.Respond(seal(k.control, msg.Subject+".answer", text))
}
