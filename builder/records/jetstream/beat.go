package jetstream

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	js "github.com/nats-io/nats.go/jetstream"

	"handler/function/records"
)

// Heartbeats. Each says which builds a process has, and how many of which tenant and on which
// daemon. They are in no stream: what was true before a process died is of no use.

// heartbeat is one of them.
type heartbeat struct {
	N       uint64         `json:"n"`  // rises; a heartbeat whose N is no higher is an old one, sent again
	At      time.Time      `json:"at"` // by the sender's clock
	Builds  []string       `json:"builds"`
	Behind  bool           `json:"behind,omitempty"` // as build.behind says of one of Builds
	Tenants map[string]int `json:"tenants"`          // as in records.Load
	Daemons map[string]int `json:"daemons"`          // as in records.Load
}

// oldBeat is how old a heartbeat may be. A process that has just begun cannot tell an old heartbeat
// that somebody sends again from a new one, so old ones are dropped. If the clock of a process is
// wrong by more than oldBeat, the others find its builds lost: so oldBeat is long.
const oldBeat = 10 * time.Minute

// peer is another process.
type peer struct {
	n       uint64
	heard   time.Time
	builds  map[string]bool
	behind  bool
	tenants map[string]int
	daemons map[string]int
}

// beatSoon sends a heartbeat before its time: a build has begun or ended.
func (s *Store) beatSoon() {
	select {
	case s.beatWake <- struct{}{}:
	default:
	}
}

// beat sends heartbeats, and watches whether they get through.
func (s *Store) beat() {
	const soon = 50 * time.Millisecond // heartbeats of builds that begin together are one
	ticker := time.NewTicker(beatEvery)
	defer ticker.Stop()
	for {
		select {
		case <-s.ctx.Done():
			s.sendBeat(true)
			return
		case <-ticker.C:
		case <-s.beatWake:
			select {
			case <-s.ctx.Done():
			case <-time.After(soon):
			}
		}
		s.heartbeat()
	}
}

// heartbeat sends one, and notes whether it got through.
func (s *Store) heartbeat() {
	sent := s.sendBeat(false)
	conn := s.connected()
	s.mu.Lock()
	defer s.mu.Unlock()
	gap := time.Since(s.through) > 2*beatEvery
	switch {
	case sent && gap:
		// This process was frozen or cut off. It has not heard the others, and they may have
		// found its builds lost.
		s.since = time.Now()
		s.claimAll()
		fallthrough
	case sent:
		s.through = time.Now()
	case gap:
		// The server does not answer. Another one may.
		if conn != nil {
			s.problem = errors.New("NATS does not answer")
			go conn.ForceReconnect()
		}
	}
	maps.DeleteFunc(s.heard, func(_ string, p *peer) bool { return time.Since(p.heard) > 2*oldBeat })
}

// claimAll stores each running record again with a later turn. A lost record that another process has
// stored, or stores soon, is then of an earlier turn and does not count. The caller must hold s.mu.
func (s *Store) claimAll() {
	for _, all := range s.builds {
		for _, b := range all {
			b.turn++
			b.dirty = true
			b.poke()
		}
	}
}

// sendBeat sends one heartbeat, for all keys: a replica that has not read the new root secret yet
// hears it too. It returns false if it is not certain that the server has it.
func (s *Store) sendBeat(last bool) bool {
	conn := s.connected()
	h := heartbeat{At: time.Now(), Builds: []string{}, Tenants: make(map[string]int)}
	if s.opts.Daemons != nil && !last {
		h.Daemons = s.opts.Daemons()
	}
	s.mu.Lock()
	s.beats++
	h.N = s.beats
	for n, all := range s.builds {
		for _, b := range all {
			h.Builds = append(h.Builds, b.id)
			h.Behind = h.Behind || b.behind()
			if b.ended == nil && b.rec.Building && !last {
				h.Tenants[n.tenant]++
			}
		}
	}
	s.mu.Unlock()
	if conn == nil {
		return false
	}
	text, err := json.Marshal(h)
	if err != nil {
		return false
	}
	for _, k := range s.ring.Load().keys {
		subject := k.beat(s.process)
		if conn.Publish(subject, seal(k.control, subject, text)) != nil {
			return false
		}
	}
	// Close flushes the last one.
	return last || conn.FlushTimeout(beatEvery) == nil
}

// Elsewhere is the sum of the other processes' latest heartbeats. It needs no streams. It never
// waits.
func (s *Store) Elsewhere() records.Load {
	load := records.Load{Tenants: make(map[string]int), Daemons: make(map[string]int)}
	s.mu.Lock()
	defer s.mu.Unlock()
	// Whoever lives has been heard within beatEvery.
	load.Complete = time.Since(s.through) <= 2*beatEvery && time.Since(s.since) > beatEvery
	for _, p := range s.heard {
		if time.Since(p.heard) > grace {
			continue
		}
		load.Others++
		for t, n := range p.tenants {
			load.Tenants[t] += n
		}
		for d, n := range p.daemons {
			load.Daemons[d] += n
		}
	}
	return load
}

// hear notes another process's heartbeat. To one that it has not heard before, or not for a while, it
// answers with its own: a process that has just begun, or has just found the server again, would
// otherwise know nothing for beatEvery.
func (s *Store) hear(msg *nats.Msg) {
	f := strings.Split(msg.Subject, ".")
	if len(f) != 4 || f[3] == s.process {
		return
	}
	var h heartbeat
	if _, ok := s.openMessage(msg, f[2], &h); !ok || time.Since(h.At).Abs() > oldBeat {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.heard[f[3]]
	if p == nil {
		p = &peer{}
		s.heard[f[3]] = p
	}
	if h.N <= p.n {
		return
	}
	if time.Since(p.heard) > 2*beatEvery {
		s.beatSoon()
		if p.n > 0 {
			// Neither has heard the other, as when servers of a cluster lose each other. It may
			// have found the builds of this process lost.
			s.claimAll()
		}
	}
	p.n, p.heard, p.tenants, p.daemons = h.N, time.Now(), h.Tenants, h.Daemons
	p.behind = h.Behind
	p.builds = make(map[string]bool, len(h.Builds))
	for _, id := range h.Builds {
		p.builds[id] = true
	}
}

// purge is a running record that can be removed once due has passed.
type purge struct {
	subject string
	epoch   time.Time // of the stream that has the record
	due     time.Time
}

// purging purges now and then. It is apart from beat: a slow server must not delay a heartbeat.
func (s *Store) purging() {
	ticker := time.NewTicker(beatEvery)
	defer ticker.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-ticker.C:
			s.purge(time.Now())
		}
	}
}

// purge removes the running records of builds that have ended: a list reads one record less. It
// waits for keepRunning, because a build that looks for a free attempt must see it.
func (s *Store) purge(now time.Time) {
	s.mu.Lock()
	i := slices.IndexFunc(s.purges, func(p purge) bool { return p.due.After(now) })
	if i < 0 {
		i = len(s.purges)
	}
	due := s.purges[:min(i, 256)]
	s.purges = s.purges[len(due):]
	st := s.streams
	s.mu.Unlock()
	if st == nil {
		return
	}
	for _, p := range due {
		if !p.epoch.Equal(st.epoch) {
			continue // the stream was lost, and the subject may be another build's
		}
		ctx, cancel := context.WithTimeout(s.ctx, time.Second)
		err := st.records.Purge(ctx, js.WithPurgeSubject(p.subject))
		cancel()
		if err != nil {
			return // whoever sweeps next finds the others
		}
	}
}
