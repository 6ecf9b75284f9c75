package jetstream

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	js "github.com/nats-io/nats.go/jetstream"
)

// natsOptions are those of the connection.
func (s *Store) natsOptions() []nats.Option {
	return append([]nats.Option{
		nats.Name("function-builder"),
		nats.Timeout(2 * time.Second),
		nats.RetryOnFailedConnect(true),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(500 * time.Millisecond),
		nats.ReconnectJitter(500*time.Millisecond, 500*time.Millisecond),
		// What cannot be sent now is tried again by the one who sent it.
		nats.ReconnectBufSize(-1),
		// nats.go finds by pings that a connection hangs. Heartbeats mostly find it sooner.
		nats.PingInterval(5 * time.Second),
		nats.MaxPingsOutstanding(1),
		// While a write to a frozen server hangs, the connection is locked.
		nats.FlusherTimeout(2 * time.Second),
		nats.IgnoreAuthErrorAbort(),
		nats.ReconnectHandler(func(*nats.Conn) { s.suspect(); s.beatSoon() }),
		nats.ConnectHandler(func(*nats.Conn) { s.suspect(); s.beatSoon() }),
		nats.ClosedHandler(func(*nats.Conn) { s.suspect() }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { s.tell(err) }),
	}, s.opts.NATS...)
}

// tell passes a problem on to the operator, sometimes.
func (s *Store) tell(err error) {
	s.mu.Lock()
	tell := s.opts.Problem != nil && time.Since(s.told) > time.Minute
	if tell {
		s.told = time.Now()
	}
	s.mu.Unlock()
	if tell {
		s.opts.Problem(err)
	}
}

// manage connects, and keeps track of the streams.
func (s *Store) manage() {
	conn := s.connect()
	if conn == nil {
		return
	}
	// Streams that were found are looked at now and then. While no build writes, nothing else
	// notices that a server has lost them.
	const look, again = 10 * time.Second, 500 * time.Millisecond
	for timer := time.NewTimer(0); ; {
		select {
		case <-s.ctx.Done():
			return
		case <-timer.C:
		case <-s.trouble:
		}
		wait := look
		if conn.IsClosed() {
			// nats.go closes a connection for good when the server sends an error that nats.go
			// does not know. Example: a message is over a max_payload that the operator has
			// lowered.
			if conn = s.connect(); conn == nil {
				return
			}
		}
		if err := s.look(conn); err != nil {
			s.down(err)
			wait = again
		}
		timer.Reset(wait)
		select { // whoever suspects something: two looks a second at most
		case <-s.ctx.Done():
			return
		case <-time.After(again):
		}
	}
}

// connect returns the connection, which may not be there yet, or nil if the store is closed.
func (s *Store) connect() *nats.Conn {
	for {
		conn, err := nats.Connect(s.opts.URL, s.natsOptions()...)
		if err == nil {
			if err = s.listen(conn); err == nil {
				s.conn.Store(conn)
				return conn
			}
			conn.Close()
		}
		// A file of a credential is not there, or is wrong. It may be there later.
		s.down(fmt.Errorf("connecting to NATS: %w", err))
		select {
		case <-s.ctx.Done():
			return nil
		case <-time.After(5 * time.Second):
		}
	}
}

// connected returns the connection while it has a server, or else nil. Its caller must not have
// s.mu.
func (s *Store) connected() *nats.Conn {
	if conn := s.conn.Load(); conn != nil && conn.IsConnected() {
		return conn
	}
	return nil
}

// look finds the streams.
func (s *Store) look(conn *nats.Conn) error {
	if !conn.IsConnected() {
		return fmt.Errorf("connecting to NATS: %w", orElse(conn.LastError(), nats.ErrDisconnected))
	}
	found, err := s.find(conn)
	if err == nil {
		s.found(found)
	}
	return err
}

func orElse(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// down notes why the store cannot be used now. The streams that were found last stay.
func (s *Store) down(err error) {
	s.mu.Lock()
	s.problem = err
	s.mu.Unlock()
	s.tell(err)
}

// found notes the streams and wakes the writers. A writer sees by the epoch whether a server has lost
// the stream that has its build.
func (s *Store) found(st *streams) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.problem = nil
	s.streams = st
	close(s.up)
	s.up = make(chan struct{})
	for _, all := range s.builds {
		for _, b := range all {
			b.poke()
		}
	}
}

// find looks the streams up, and creates those that are not there.
func (s *Store) find(conn *nats.Conn) (*streams, error) {
	ctx, cancel := context.WithTimeout(s.ctx, writeTimeout)
	defer cancel()
	j, err := js.New(conn)
	if err != nil {
		return nil, err
	}
	st := &streams{js: j}
	if st.records, err = s.stream(ctx, j, js.StreamConfig{
		Name: RecordStream, Subjects: []string{recordSubjects}, MaxBytes: s.opts.RecordBytes, MaxMsgsPerSubject: 1,
	}); err != nil {
		return nil, err
	}
	if st.logs, err = s.stream(ctx, j, js.StreamConfig{
		Name: LogStream, Subjects: []string{logSubjects}, MaxBytes: s.opts.LogBytes, MaxMsgsPerSubject: -1,
	}); err != nil {
		return nil, err
	}
	st.epoch, st.logEpoch = st.records.CachedInfo().Created, st.logs.CachedInfo().Created
	if max := st.records.CachedInfo().Config.MaxMsgsPerSubject; max != 1 {
		return nil, fmt.Errorf("using stream %s: it keeps %d messages of a subject, not 1", RecordStream, max)
	}
	return st, nil
}

// stream returns a stream. A stream that exists keeps the limits that the operator gave it. So stream
// looks it up first, and creates it only if it is not there. To create an existing stream makes the
// server reserve its bytes a second time, and the server may refuse. A stream is never a key-value
// bucket: a full bucket refuses what is new.
func (s *Store) stream(ctx context.Context, j js.JetStream, cfg js.StreamConfig) (js.Stream, error) {
	found, err := j.Stream(ctx, cfg.Name)
	if !errors.Is(err, js.ErrStreamNotFound) {
		if err != nil {
			err = fmt.Errorf("looking for stream %s: %w", cfg.Name, err)
		}
		return found, err
	}
	cfg.Description = "function builder"
	cfg.Storage, cfg.Discard, cfg.Retention = js.FileStorage, js.DiscardOld, js.LimitsPolicy
	cfg.MaxAge, cfg.Replicas, cfg.MaxMsgs, cfg.MaxConsumers = s.opts.Age, s.opts.Replicas, -1, -1
	cfg.Duplicates = min(2*time.Minute, cfg.MaxAge)
	found, err = j.CreateStream(ctx, cfg)
	if errors.Is(err, js.ErrStreamNameAlreadyInUse) {
		found, err = j.Stream(ctx, cfg.Name) // another replica was quicker
	}
	if err != nil {
		return nil, fmt.Errorf("creating stream %s: %w", cfg.Name, err)
	}
	return found, nil
}
