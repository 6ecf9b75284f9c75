package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"handler/function/api"
	"handler/function/fair"
	"handler/function/records"
	"handler/function/reply"
)

// maxLogs is how many logs clients read at once. The store has more followers: redeliveries that
// follow another replica's build, and verdicts that have a log.
const maxLogs = 32

var errFollowers = &api.Error{Code: api.Busy, Msg: fmt.Sprintf("%d logs of a replica may be read at once, and half of them by one tenant where there are several", maxLogs)}

// reader is who reads logs, of which most are read at once. With a file of tenants, one of them has
// half of these.
func (g signer) reader(most int) fair.Tenant {
	t := fair.Tenant{ID: g.id()}
	if g.file() {
		t.Most = most / 2
	}
	return t
}

// lastEventID is the header in which a client of server-sent events names the last one that it has.
const lastEventID = "Last-Event-Id"

// serveLog writes the log of a build, from its beginning or after a line, and at the end the
// record. Its client is no caller of the build: a client that is slow or leaves does not affect
// the build.
func (s *Server) serveLog(w http.ResponseWriter, r *http.Request) {
	q := s.ask(w, r, signedNeeds{timestamp: true}, "after", "follow", "attempt")
	if q == nil {
		return
	}
	after, wait, err := q.logQuery()
	if err != nil {
		s.refuse(w, q, err)
		return
	}
	reader := q.by.reader(maxLogs)
	if !s.followers.Try(reader) {
		s.refuse(w, q, errFollowers)
		return
	}
	defer s.followers.Release(reader.ID)
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	defer context.AfterFunc(s.closed, func() { cancel(errShuttingDown) })()

	ref, err := s.logged(q)
	if err != nil {
		s.refuse(w, q, logError(err))
		return
	}
	out := reply.NewEvents(w, reply.Accept(r.Header))
	err = s.writeLog(ctx, q, out, ref, after, wait)
	switch {
	case err == nil:
		err = out.Close()
	case out.Cancel():
		s.refuse(w, q, logError(err))
		return
	}
	// net/http ends the context of a request whose answer it cannot write.
	if slow := errors.Is(err, reply.ErrSlow) || errors.Is(err, records.ErrSlow); slow || err != nil && ctx.Err() == nil {
		// The client takes a stream without a record for one that was cut off.
		log := q.by.logTo(s.Log)
		log.Warn().Str("call_id", q.opts.ID).AnErr("cause", err).Msg("log cut off")
	}
}

// logError is err for the client.
func logError(err error) error {
	switch {
	case errors.Is(err, records.ErrNotFound):
		return errNoBuild
	case errors.Is(err, records.ErrBusy):
		return errFollowers
	}
	return err
}

// logged names the attempt whose log a question is about: a later one may begin while it is read.
// Its caller must not have begun an answer: an answer in events has the status 200.
func (s *Server) logged(q *question) (records.Ref, error) {
	ref, err := s.ref(q)
	if err != nil {
		return ref, err
	}
	ctx, cancel := context.WithTimeout(q.r.Context(), readTimeout)
	defer cancel()
	for {
		rec, err := s.Records.Get(ctx, ref)
		if ref.Attempt = rec.Attempt; err != nil || ref.Attempt > 0 {
			return ref, err
		}
		select { // it has just begun
		case <-ctx.Done():
			return ref, errUnknown
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// writeLog writes lines until there are no more, and then the record.
func (s *Server) writeLog(ctx context.Context, q *question, out *reply.Events, ref records.Ref, after uint64, wait bool) error {
	for line, err := range s.Records.Follow(ctx, ref, after, wait) {
		switch {
		case err != nil:
		case line.N == 0:
			err = out.Beat()
		default:
			if line.Lost > 0 {
				s.metrics.LogGaps.Inc()
			}
			err = out.Send(strconv.FormatUint(line.N, 10), line)
		}
		if err != nil {
			return err
		}
	}
	rec, err := s.Records.Get(ctx, ref)
	if err != nil {
		return err
	}
	return out.Send("", q.by.shown(rec))
}

// logQuery reads the query of a log, and the header of a client that connects again.
func (q *question) logQuery() (after uint64, wait bool, err error) {
	text, from := q.query.text("after"), "after"
	if id := q.r.Header.Get(lastEventID); id != "" {
		text, from = id, "Last-Event-ID"
	}
	if text != "" {
		if after, err = strconv.ParseUint(text, 10, 63); err != nil {
			return 0, false, badQuery("%s %.40q is not the number of a line", from, text)
		}
	}
	switch text := q.query.text("follow"); text {
	case "", "0":
	case "1":
		wait = true
	default:
		return 0, false, badQuery("follow=%.40q is neither 1 nor 0", text)
	}
	return after, wait, nil
}
