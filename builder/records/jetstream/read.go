package jetstream

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	js "github.com/nats-io/nats.go/jetstream"

	"handler/function/records"
)

// stored is a record in the store.
type stored struct {
	Record   records.Record `json:"r"`
	Building bool           `json:"building,omitempty"`
	Daemon   string         `json:"daemon,omitempty"`
	Ref      string         `json:"ref,omitempty"`
	Owner    string         `json:"owner"` // the process
	Build    string         `json:"build"` // what tells it from all other builds
	Turn     int            `json:"turn"`  // a lost record counts, unless the running one has a later turn
	Order    uint64         `json:"order"` // of the build in lists; 0 in its first record: the message's sequence

	at   place
	seq  uint64    // of its message
	time time.Time // of its message, by the server's clock
}

// errForged is a payload that was not sealed for the place where it is.
var errForged = errors.New("opening a payload: it was not sealed for its subject")

// unseal reads the plain text of a record's message.
func unseal(p place, subject string, data []byte, seq uint64) (order uint64, text []byte, err error) {
	plain, err := open(p.key.records, subject, data)
	if err != nil || len(plain) < 8 {
		return 0, nil, errForged
	}
	if order = binary.BigEndian.Uint64(plain); order == 0 {
		order = seq
	}
	return order, plain[8:], nil
}

// decode reads a record.
func decode(p place, order uint64, text []byte) (*stored, error) {
	r := &stored{at: p}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("reading a record: %w", err)
	}
	r.Order = order
	r.Record.Building, r.Record.Daemon, r.Record.Ref = r.Building, r.Daemon, r.Ref
	return r, nil
}

// read returns a record of one kind, or nil if there is none.
func (s *Store) read(ctx context.Context, st *streams, p place, kind string) (*stored, error) {
	subject := p.record(kind)
	msg, err := st.records.GetLastMsgForSubject(ctx, subject)
	if errors.Is(err, js.ErrMsgNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	order, text, err := unseal(p, subject, msg.Data, msg.Sequence)
	if err != nil {
		s.tell(err)
		return nil, nil
	}
	r, err := decode(p, order, text)
	if err != nil {
		s.tell(err)
		return nil, nil
	}
	r.seq, r.time = msg.Sequence, msg.Time
	return r, nil
}

// attempt is one that has a record, of these kinds.
type attempt struct {
	place place
	kinds map[string]bool
}

// attempts returns those of a call id, the latest first. If tenant is nil, they are of all
// tenants.
func (s *Store) attempts(ctx context.Context, st *streams, tenant *string, id string) ([]*attempt, error) {
	r := s.ring.Load()
	found := make(map[place]*attempt)
	for _, k := range r.keys {
		of := "*"
		if tenant != nil {
			of = k.tenant(*tenant)
		}
		info, err := st.records.Info(ctx, js.WithSubjectFilter("builder.rec."+k.id+"."+of+"."+k.call(id)+".*.*"))
		if err != nil {
			return nil, err
		}
		for subject := range info.State.Subjects {
			p, kind, ok := r.parse(subject)
			if !ok {
				continue
			}
			if found[p] == nil {
				found[p] = &attempt{p, make(map[string]bool)}
			}
			found[p].kinds[kind] = true
		}
	}
	list := make([]*attempt, 0, len(found))
	for _, a := range found {
		list = append(list, a)
	}
	slices.SortFunc(list, func(a, b *attempt) int { return b.place.attempt - a.place.attempt })
	return list, nil
}

// latest returns the number of the latest attempt of a build, or 0.
func (s *Store) latest(ctx context.Context, st *streams, n name) (int, error) {
	list, err := s.attempts(ctx, st, &n.tenant, n.id)
	if err != nil || len(list) == 0 {
		return 0, err
	}
	return list[0].place.attempt, nil
}

// resolve returns the record of an attempt, or nil if none of its kinds can be read. A verdict
// holds whatever else there is.
func (s *Store) resolve(ctx context.Context, st *streams, a *attempt) (*stored, error) {
	kinds := make(map[string]*stored)
	for _, kind := range []string{ended, lost, running} {
		if !a.kinds[kind] {
			continue
		}
		r, err := s.read(ctx, st, a.place, kind)
		if err != nil {
			return nil, err
		}
		if kind == ended && r != nil {
			return r, nil
		}
		kinds[kind] = r
	}
	return settle(kinds[lost], kinds[running]), nil
}

// settle returns the record that holds while there is no verdict.
func settle(mark, run *stored) *stored {
	if mark != nil && (run == nil || mark.Turn >= run.Turn) {
		return mark
	}
	return run
}

// timed bounds what a reader waits for.
func timed(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, readTimeout)
}

// lookup returns the records that there are of a call id, the latest attempt first. If latest is
// true, older ones may be missing. If ref.Attempt is not 0, lookup looks for this attempt alone.
// Records of this process's own builds are as they are in memory.
func (s *Store) lookup(ctx context.Context, ref records.Ref, latest bool) ([]*stored, error) {
	mine := s.mine(ref)
	wait := readTimeout
	if len(mine) > 0 {
		wait = readOwn
	}
	st, err := s.current()
	if err == nil {
		asked, cancel := context.WithTimeout(ctx, wait)
		defer cancel()
		var found []*stored
		if found, err = s.merge(asked, st, ref, mine, latest); err == nil {
			return found, nil
		}
		err = s.failed(ctx, err)
	}
	if len(mine) > 0 && ctx.Err() == nil {
		return mine, nil
	}
	return nil, err
}

// merge adds what the store has to this process's own records.
func (s *Store) merge(ctx context.Context, st *streams, ref records.Ref, mine []*stored, latest bool) ([]*stored, error) {
	all, err := s.attempts(ctx, st, &ref.Tenant, ref.ID)
	if err != nil {
		return nil, err
	}
	var found []*stored
	for _, a := range all {
		// An own build that has no number yet is the latest of all.
		for len(mine) > 0 && (mine[0].Record.Attempt == 0 || mine[0].Record.Attempt >= a.place.attempt) {
			found, mine = append(found, mine[0]), mine[1:]
		}
		if latest && len(found) > 0 {
			return found, nil
		}
		is := func(r *stored) bool { return r.at == a.place }
		if ref.Attempt != 0 && ref.Attempt != a.place.attempt || slices.ContainsFunc(found, is) {
			continue
		}
		r, err := s.resolve(ctx, st, a)
		if err != nil {
			return nil, err
		}
		if r != nil {
			found = append(found, r)
		}
	}
	return append(found, mine...), nil
}

// mine returns this process's own builds that a Ref names, the latest first.
func (s *Store) mine(ref records.Ref) []*stored {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []*stored
	for _, b := range slices.Backward(s.builds[name{ref.Tenant, ref.ID}]) {
		if ref.Attempt == 0 || b.rec.Attempt == ref.Attempt {
			r := b.record()
			r.at = b.place
			found = append(found, &r)
		}
	}
	return found
}

func (s *Store) Get(ctx context.Context, ref records.Ref) (records.Record, error) {
	r, err := s.get(ctx, ref)
	if err != nil {
		return records.Record{}, err
	}
	if r.Record.Running() && r.Owner != s.process {
		// The running record is not stored again for each line.
		if st, err := s.current(); err == nil {
			asked, cancel := context.WithTimeout(ctx, readOwn)
			defer cancel()
			if n, err := s.logged(asked, st, r.at); err == nil {
				r.Record.Lines = max(r.Record.Lines, n)
			}
		}
	}
	return r.Record, nil
}

func (s *Store) get(ctx context.Context, ref records.Ref) (*stored, error) {
	found, err := s.lookup(ctx, ref, true)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, s.notFound()
	}
	return found[0], nil
}

func (s *Store) Find(ctx context.Context, tenant, id, request string) (records.Record, error) {
	all, err := s.lookup(ctx, records.Ref{Tenant: tenant, ID: id}, false)
	if err != nil {
		return records.Record{}, err
	}
	for _, r := range all {
		if r.Record.Request == request && (r.Record.Running() || r.Record.Final()) {
			return r.Record, nil
		}
	}
	return records.Record{}, s.notFound()
}

func (s *Store) Everywhere(ctx context.Context, id string) ([]records.Record, error) {
	latest := make(map[string]records.Record) // by tenant
	err := s.everywhere(ctx, id, latest)
	s.mu.Lock()
	for n, all := range s.builds {
		if n.id != id {
			continue
		}
		for _, b := range all {
			if there, ok := latest[n.tenant]; !ok || b.rec.Attempt == 0 || b.rec.Attempt >= there.Attempt {
				latest[n.tenant] = b.rec
			}
		}
	}
	s.mu.Unlock()
	switch {
	case len(latest) > 0 && ctx.Err() == nil:
		return slices.Collect(maps.Values(latest)), nil
	case err != nil:
		return nil, err
	}
	return nil, s.notFound()
}

// everywhere collects what the store has.
func (s *Store) everywhere(ctx context.Context, id string, latest map[string]records.Record) error {
	st, err := s.current()
	if err != nil {
		return err
	}
	asked, cancel := timed(ctx)
	defer cancel()
	all, err := s.attempts(asked, st, nil, id)
	if err != nil {
		return s.failed(ctx, err)
	}
	for _, a := range all {
		r, err := s.resolve(asked, st, a)
		if err != nil {
			return s.failed(ctx, err)
		}
		if r == nil {
			continue
		}
		if there, ok := latest[r.Record.Tenant]; !ok || r.Record.Attempt > there.Attempt {
			latest[r.Record.Tenant] = r.Record
		}
	}
	return nil
}
