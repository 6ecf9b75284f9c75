package server

import (
	"context"
	"encoding/hex"
	"fmt"
	"time"

	"handler/function/api"
	"handler/function/records"
	"handler/function/reply"
)

// A queue may deliver a request again after its build has ended, or to a replica that does not
// run the build. Such a delivery is found in the store of records.

// recordTimeout bounds a question to the store for a build that would begin now. A store that
// cannot be reached answers at once.
const recordTimeout = time.Second

// maxRetold is how many redeliveries follow a build of another replica at once. Where there are several
// tenants, one has half of them.
const maxRetold = 8

const notFollowed = "w: the replica that runs this build cannot be followed: looking for it on its daemon"

// retell gives the flight the verdict of an earlier delivery. It waits for the verdict if the
// build runs on another replica, and passes on its log. It returns false if the build has to begin
// here.
func (s *Server) retell(f *flight, by signer) bool {
	ctx, stop := s.untilShutdown(f.ctx)
	defer stop()
	before, ok := s.earlier(ctx, f)
	if !ok {
		return false
	}
	if before.Running() {
		reader := by.reader(maxRetold)
		if !s.retold.Try(reader) {
			f.say(notFollowed)
			return false
		}
		defer s.retold.Release(reader.ID)
	}
	f.call.log.Info().Msg("build joined")
	s.metrics.Joined.Inc()
	f.setImage(before.Image)
	if before.Running() {
		return s.retellRunning(ctx, f, before)
	}
	verdict := before.Verdict()
	verdict.Duration = 0 // each caller has its own
	verdict.Log = s.excerpt(ctx, &before)
	f.end(verdict)
	return true
}

// earlier returns the record of an earlier delivery. Its verdict, now or when it comes, is the
// verdict of this delivery too.
func (s *Server) earlier(ctx context.Context, f *flight) (records.Record, bool) {
	ctx, cancel := context.WithTimeout(ctx, recordTimeout)
	defer cancel()
	r, err := s.Records.Find(ctx, f.owner, f.call.id, hex.EncodeToString(f.id.body[:]))
	switch {
	case err != nil:
		return r, false
	case r.Running() && s.flights.has(&r):
		return r, false // its last caller has left, and it is being cancelled
	}
	return r, true
}

// retellRunning follows a build of another replica.
func (s *Server) retellRunning(ctx context.Context, f *flight, r records.Record) bool {
	ref := records.Ref{Tenant: r.Tenant, ID: r.ID, Attempt: r.Attempt}
	var err error
	for line, e := range s.Records.Follow(ctx, ref, 0, true) {
		switch {
		case e != nil:
			err = e
		case line.Lost > 0:
			s.metrics.LogGaps.Inc()
			f.say(leftOut(line.Lost))
		case line.N > 0:
			f.say(line.Text)
		}
	}
	if err == nil {
		r, err = s.Records.Get(ctx, ref)
	}
	switch {
	case ctx.Err() != nil:
		f.end(failedRecord(api.AsError(canceled(context.Cause(ctx))), r.Image))
		return true
	case err != nil, r.Running():
		f.call.log.Warn().AnErr("cause", err).Msg("build not followed")
		f.say(notFollowed)
		return false
	case r.Code == api.Lost, r.Code == api.Canceled && !r.Final():
		// Its replica has died, or its own caller has left.
		f.say("w: the replica that ran this build has not ended it: building again")
		return false
	}
	verdict := r.Verdict()
	verdict.Duration = 0 // each caller has its own
	f.end(verdict)
	return true
}

// excerpt reads the log of a build that has ended, cut as in an answer that does not stream.
func (s *Server) excerpt(ctx context.Context, r *records.Record) []string {
	var e reply.Excerpt
	next := uint64(1)
	for line, err := range s.Records.Follow(ctx, records.Ref{Tenant: r.Tenant, ID: r.ID, Attempt: r.Attempt}, 0, false) {
		switch {
		case err != nil:
			s.Log.Warn().AnErr("cause", err).Str("call_id", r.ID).Msg("log not read")
		case line.Lost > 0:
			s.metrics.LogGaps.Inc()
			e.Add(leftOut(line.Lost))
		case line.N > 0:
			e.Add(line.Text)
		}
		next = max(next, line.N+1)
	}
	if next <= r.Lines {
		e.Add(leftOut(r.Lines - next + 1))
	}
	return e.Lines()
}

func leftOut(lines uint64) string { return fmt.Sprintf("… %d lines left out …", lines) }
