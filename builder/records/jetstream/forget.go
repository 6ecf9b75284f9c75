package jetstream

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	js "github.com/nats-io/nats.go/jetstream"
)

// Forgotten says what Forget has found of a tenant.
type Forgotten struct {
	Removed int // builds that had ended
	Running int // builds that are left, because they run
}

// Forget removes all that NATS has of a tenant's builds that have ended, for a program that is not
// a replica: it sends no heartbeat, finds no build lost, and creates no stream. The subjects of a
// tenant are hashes with the keys of Options.Roots, so it finds no builds of other roots. Only
// URL, NATS, Roots and Problem of opts count.
func Forget(ctx context.Context, opts Options, tenant string) (Forgotten, error) {
	if err := checkURL(opts.URL); err != nil {
		return Forgotten{}, err
	}
	r, err := newRing(opts.Roots, nil)
	if err != nil {
		return Forgotten{}, err
	}
	conn, err := nats.Connect(opts.URL, append([]nats.Option{nats.Name("function-builder tenant-forget"), nats.Timeout(10 * time.Second)}, opts.NATS...)...)
	if err != nil {
		return Forgotten{}, fmt.Errorf("connecting to NATS: %w", err)
	}
	defer conn.Close()
	j, err := js.New(conn)
	if err != nil {
		return Forgotten{}, err
	}
	st := &streams{js: j}
	for name, stream := range map[string]*js.Stream{RecordStream: &st.records, LogStream: &st.logs} {
		err := briefly(ctx, func(ctx context.Context) (err error) {
			*stream, err = j.Stream(ctx, name)
			return err
		})
		if errors.Is(err, js.ErrStreamNotFound) {
			return Forgotten{}, nil // replicas create both at once
		}
		if err != nil {
			return Forgotten{}, fmt.Errorf("looking for stream %s: %w", name, err)
		}
	}
	s := &Store{opts: opts} // it runs nothing
	s.ring.Store(r)
	return s.removeTenant(ctx, st, tenant, nil)
}

func (s *Store) Forget(ctx context.Context, tenant string) error {
	st, err := s.current()
	if err != nil {
		return err
	}
	own := make(map[place]bool) // the tenant's builds that this process has
	s.mu.Lock()
	for n, all := range s.builds {
		for _, b := range all {
			if n.tenant == tenant {
				own[b.place] = true
			}
		}
	}
	s.mu.Unlock()
	if _, err := s.removeTenant(ctx, st, tenant, own); err != nil {
		return s.failed(ctx, err)
	}
	return nil
}

// removeTenant removes what there is of a tenant with each key of the ring.
func (s *Store) removeTenant(ctx context.Context, st *streams, tenant string, own map[place]bool) (f Forgotten, err error) {
	r := s.ring.Load()
	for _, k := range r.keys {
		if err := s.removeUnder(ctx, st, r, k.id+"."+k.tenant(tenant), own, &f); err != nil {
			return f, fmt.Errorf("removing the records of a tenant: %w", err)
		}
	}
	return f, nil
}

// removeUnder removes everything below a tenant's subject but own places, and builds of other
// processes that run.
func (s *Store) removeUnder(ctx context.Context, st *streams, r *ring, tenant string, own map[place]bool, f *Forgotten) error {
	// The logs first: a build has a record before it has a log, so a log that is found here and
	// has no record below is one whose record was dropped.
	logs, err := subjects(ctx, st.logs, "builder.log."+tenant+".*.*")
	if err != nil {
		return err
	}
	found, err := subjects(ctx, st.records, "builder.rec."+tenant+".*.*.*")
	if err != nil {
		return err
	}
	all := make(map[place]*attempt)
	for subject := range found {
		p, kind, ok := r.parse(subject)
		if !ok {
			continue
		}
		if all[p] == nil {
			all[p] = &attempt{p, make(map[string]bool)}
		}
		all[p].kinds[kind] = true
	}
	for p, a := range all {
		delete(logs, p.log())
		runs := own[p]
		if !runs && !a.kinds[ended] {
			if runs, err = s.runs(ctx, st, a); err != nil {
				return err
			}
		}
		if runs {
			f.Running++
			continue
		}
		// First the log: a build whose record is left is found again.
		if err := purgeSubject(ctx, st.logs, p.log()); err != nil {
			return err
		}
		if err := purgeSubject(ctx, st.records, p.base()+".*"); err != nil {
			return err
		}
		f.Removed++
	}
	for subject := range logs {
		if err := purgeSubject(ctx, st.logs, subject); err != nil {
			return err
		}
	}
	return nil
}

// runs says whether an attempt without a verdict runs.
func (s *Store) runs(ctx context.Context, st *streams, a *attempt) (runs bool, err error) {
	err = briefly(ctx, func(ctx context.Context) error {
		r, err := s.resolve(ctx, st, a)
		runs = r != nil && r.Record.Running()
		return err
	})
	return runs, err
}

// subjects are those of a stream's messages that match a filter.
func subjects(ctx context.Context, stream js.Stream, filter string) (found map[string]uint64, err error) {
	err = briefly(ctx, func(ctx context.Context) error {
		info, err := stream.Info(ctx, js.WithSubjectFilter(filter))
		if err == nil {
			found = info.State.Subjects
		}
		return err
	})
	return found, err
}

func purgeSubject(ctx context.Context, stream js.Stream, subject string) error {
	return briefly(ctx, func(ctx context.Context) error { return stream.Purge(ctx, js.WithPurgeSubject(subject)) })
}

// briefly bounds what f waits for.
func briefly(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	return f(ctx)
}
