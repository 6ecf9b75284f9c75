package jetstream

import (
	"fmt"
	"time"

	"handler/function/records"
)

// A server may answer, and take nothing: its disk is full. Then the store lacks the builds of this
// time. So each process says in its heartbeat whether it has such builds. While one has, the others
// answer ErrUnknown, and not ErrNotFound, for a build that they do not find.

// wrote notes whether the store takes what it is given.
func (b *build) wrote(err error) {
	s := b.store
	s.mu.Lock()
	s.refused = err
	was := b.behind()
	b.failed = err != nil
	changed := b.behind() != was
	s.mu.Unlock()
	if changed {
		s.beatSoon()
	}
	if err != nil {
		s.tell(fmt.Errorf("writing to NATS: %w", err))
	}
}

// behind says whether the store has refused the build's first record, or its verdict. The caller
// has the store's mu.
func (b *build) behind() bool {
	st := b.store.streams
	return b.failed && (b.ended != nil || b.epoch.IsZero() || st != nil && !b.epoch.Equal(st.epoch))
}

// othersBehind says whether another process has a build that is behind.
func (s *Store) othersBehind() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.heard {
		if p.behind && time.Since(p.heard) <= grace {
			return true
		}
	}
	return false
}

// notFound is the error for a build that is neither here nor in the store.
func (s *Store) notFound() error {
	if s.othersBehind() {
		return fmt.Errorf("%w: it does not take what another process writes", records.ErrUnknown)
	}
	return records.ErrNotFound
}
