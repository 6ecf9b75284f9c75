package jetstream

import (
	"context"
	"maps"
	"math/rand/v2"
	"time"

	js "github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"handler/function/api"
	"handler/function/records/batch"
)

// The sweep finds builds whose process has died, and writes down that they are lost. All
// processes sweep; the stream takes one lost record of a build.
//
// A process that was only frozen, or cut off, stores the running records of its builds again when it
// goes on, with a later turn. A lost record of an earlier turn does not count. When the build ends, its
// verdict is above both.

// seen is a running record that a sweep has found.
type seen struct {
	owner, build string
	first        time.Time // it was found
	missing      time.Time // since when the owner's heartbeats do not name the build; zero while they do
	buried       time.Time // when a verdict or a lost record was found or written last; zero before
	unreadable   bool
}

func (s *Store) sweep() {
	known := make(map[string]*seen) // by subject
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	last := time.Now()
	s.mu.Lock()
	s.since = last
	s.mu.Unlock()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-ticker.C:
		}
		// A process that was frozen has heard nobody. The others need not be dead.
		now := time.Now()
		if now.Sub(last) > 2*sweepEvery {
			s.mu.Lock()
			s.since = now
			s.mu.Unlock()
		}
		if err := s.sweepOnce(known); err != nil && s.ctx.Err() == nil {
			s.failed(s.ctx, err)
		}
		last = time.Now()
	}
}

func (s *Store) sweepOnce(known map[string]*seen) error {
	s.mu.Lock()
	st, healthy := s.streams, s.problem == nil && time.Since(s.through) <= 2*beatEvery
	s.mu.Unlock()
	if st == nil || !healthy {
		return nil
	}
	ctx, cancel := s.request()
	defer cancel()
	info, err := st.records.Info(ctx, js.WithSubjectFilter("builder.rec.*.*.*.*."+running))
	if err != nil {
		return err
	}
	maps.DeleteFunc(known, func(subject string, _ *seen) bool {
		_, there := info.State.Subjects[subject]
		return !there
	})
	if err := s.seeAll(ctx, st, info.State.Subjects, known); err != nil {
		return err
	}
	r := s.ring.Load()
	var all []grave
	for subject, k := range known {
		if p, _, ok := r.parse(subject); ok && !k.unreadable && s.isDead(k) && time.Since(k.buried) > keepRunning {
			all = append(all, grave{p, k})
		}
	}
	return s.buryAll(st, all)
}

// seeAll reads the running records that are not known, up to maxSee. The next sweep reads others.
func (s *Store) seeAll(ctx context.Context, st *streams, subjects map[string]uint64, known map[string]*seen) error {
	r, own, fresh := s.ring.Load(), s.ownSubjects(), 0
	for subject := range subjects {
		p, _, ok := r.parse(subject)
		if !ok || own[subject] || known[subject] != nil {
			continue // it is for a key that this process lacks, or needs no look
		}
		if fresh++; fresh > maxSee {
			return nil
		}
		k, err := s.see(ctx, st, p)
		if err != nil {
			return err
		}
		known[subject] = k
	}
	return nil
}

// maxSee is how many records one sweep reads for the first time.
const maxSee = 500

// ownSubjects are the running records of this process's builds, and of those that it has ended
// and will remove.
func (s *Store) ownSubjects() map[string]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	own := make(map[string]bool)
	for _, all := range s.builds {
		for _, b := range all {
			if b.place.key != nil {
				own[b.place.record(running)] = true
			}
		}
	}
	for _, p := range s.purges {
		own[p.subject] = true
	}
	return own
}

// buryAll buries builds side by side: a process that dies leaves many, and a daemon may be slow to
// say what became of one.
func (s *Store) buryAll(st *streams, all []grave) error {
	if len(all) == 0 {
		return nil
	}
	// Of several processes one is the first, and the others need not ask a daemon.
	time.Sleep(rand.N(500 * time.Millisecond))
	var burying errgroup.Group
	burying.SetLimit(maxBurying)
	// All of them together have this time: a daemon that hangs must not make others wait.
	asked, done := context.WithTimeout(s.ctx, askFor)
	defer done()
	for _, g := range all {
		burying.Go(func() error {
			return s.bury(asked, st, g)
		})
	}
	return burying.Wait()
}

// grave is a build whose process has died.
type grave struct {
	place
	seen *seen
}

// maxBurying is how many builds a process buries at once.
const maxBurying = 64

// see reads a running record for the first time.
func (s *Store) see(ctx context.Context, st *streams, p place) (*seen, error) {
	run, err := s.read(ctx, st, p, running)
	if err != nil {
		return nil, err
	}
	if run == nil {
		return &seen{unreadable: true}, nil
	}
	return &seen{owner: run.Owner, build: run.Build, first: time.Now()}, nil
}

// isDead says whether the process of a running record has died, or no longer has the build.
func (s *Store) isDead(k *seen) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k.owner == s.process {
		return !s.has(k.build) && time.Since(k.first) > grace
	}
	since := k.first
	if s.since.After(since) {
		since = s.since
	}
	p := s.heard[k.owner]
	if p == nil {
		return time.Since(since) > grace
	}
	if p.heard.After(since) {
		since = p.heard
	}
	if time.Since(since) > grace {
		return true
	}
	if p.builds[k.build] {
		k.missing, k.buried = time.Time{}, time.Time{}
		return false
	}
	// It is alive without the build: the build has just ended, or its record could not be stored.
	if k.missing.IsZero() {
		k.missing = time.Now()
	}
	return time.Since(k.missing) > grace
}

// has says whether this process has a build. The caller has s.mu.
func (s *Store) has(id string) bool {
	for _, all := range s.builds {
		for _, b := range all {
			if b.id == id {
				return true
			}
		}
	}
	return false
}

// bury writes down that a build is lost, if it has no verdict, and removes the running record
// of one that has. A daemon is asked until asked ends.
func (s *Store) bury(asked context.Context, st *streams, g grave) error {
	ctx, cancel := s.request()
	defer cancel()
	p := g.place
	run, err := s.read(ctx, st, p, running)
	if err != nil {
		return err
	}
	if run == nil {
		g.seen.unreadable = true
		return nil
	}
	if run.Build != g.seen.build {
		// The stream was lost, and another build has the place.
		*g.seen = seen{owner: run.Owner, build: run.Build, first: time.Now()}
		return nil
	}
	verdict, err := s.read(ctx, st, p, ended)
	if err != nil {
		return err
	}
	mark, err := s.read(ctx, st, p, lost)
	if err != nil {
		return err
	}
	if verdict != nil || mark != nil && mark.Turn >= run.Turn {
		if time.Since(run.time) < keepRunning {
			g.seen.buried = time.Now()
			return nil
		}
		return st.records.Purge(ctx, js.WithPurgeSubject(p.record(running)))
	}
	if !run.Record.Running() {
		// The stream was lost and the build had ended, so its first record has the verdict.
		_, err := s.putOnce(p, ended, run, 0)
		return err
	}
	rec := run.Record
	rec.Status, rec.Code = api.Failed, api.Lost
	rec.Error = "the process that ran the build has died"
	rec.Ended, rec.Building = time.Now(), false
	if rec.Ended.Before(rec.Began) { // by the clock of its process
		rec.Ended = rec.Began
	}
	rec.Duration = rec.Ended.Sub(rec.Began).Seconds()
	if s.opts.Ask != nil {
		rec = s.opts.Ask(asked, rec)
	}
	rec.Tenant, rec.ID, rec.Attempt = run.Record.Tenant, run.Record.ID, run.Record.Attempt
	rec.Bound()
	if n, err := s.logged(ctx, st, p); err == nil {
		rec.Lines = max(rec.Lines, n)
	}
	out := stored{Record: rec, Daemon: rec.Daemon, Ref: rec.Ref, Owner: run.Owner, Build: run.Build, Turn: run.Turn, Order: run.Order}
	seq := uint64(0)
	if mark != nil {
		seq = mark.seq
	}
	// To ask a daemon took seconds, and the process may be back.
	if !s.isDead(g.seen) {
		return nil
	}
	err = s.putLost(p, &out, seq)
	if err == nil {
		g.seen.buried = time.Now()
	}
	return err
}

// logged returns how many lines of a build have been stored.
func (s *Store) logged(ctx context.Context, st *streams, p place) (uint64, error) {
	subject := p.log()
	msg, err := st.logs.GetLastMsgForSubject(ctx, subject)
	if err != nil {
		return 0, err
	}
	plain, err := open(p.key.logAEAD(subject), subject, msg.Data)
	if err != nil {
		return 0, errForged
	}
	lines, err := batch.Parse(plain)
	if err != nil {
		return 0, err
	}
	return lines.Next() - 1, nil
}

// putLost stores a lost record if seq is still the sequence of the last one; 0 is for none.
func (s *Store) putLost(p place, r *stored, seq uint64) error {
	first, err := s.putOnce(p, lost, r, seq)
	if first {
		s.mu.Lock()
		s.lost++
		s.mu.Unlock()
	}
	return err
}
