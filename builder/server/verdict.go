package server

import (
	"context"
	"errors"
	"net/http"
	"time"

	"handler/function/api"
	"handler/function/reply"
	"handler/function/solve"
)

// findTimeout bounds the search for a verdict on the daemons.
const findTimeout = 30 * time.Second

var errNoBuild = &api.Error{Code: api.NotFound, Msg: "no build of this call id is known: it has not been delivered yet, was not queued, or has been forgotten"}

// serveVerdict tells how a queued build ended. It looks in memory, and then in the history
// of the daemons: another replica may have built it, or this one may have been restarted.
// The status is 200 for a verdict, a success or a failure, and 202 for a build that has
// none yet.
func (s *Server) serveVerdict(w http.ResponseWriter, r *http.Request) {
	opts := reply.Options{ID: r.PathValue(segment), Start: time.Now()}
	if !validCallID(opts.ID) {
		opts.ID, _ = nameCall(w, r)
	}
	by, err := s.signedBy(r)
	if err != nil {
		s.refuseUnverified(w, r, err, opts)
		return
	}
	opts.Sign = by.sign
	rec, err := s.verdict(r, by)
	if errors.Is(err, errNoBuild) {
		writeRefusal(w, r, errNoBuild, opts) // an answer like any other: clients ask until there is a build
		return
	}
	if err != nil {
		s.refuseSigned(w, r, by, because(r.Context(), err), opts)
		return
	}
	status := http.StatusOK
	if rec.Status == api.InProgress {
		status = http.StatusAccepted
	}
	if err := reply.Object(w, status, rec, opts); err != nil {
		log := by.logTo(s.Log)
		log.Warn().AnErr("cause", err).Msg("answer not delivered")
	}
}

// verdict returns the verdict that a request asks for. Its error is errNoBuild if there is none.
func (s *Server) verdict(r *http.Request, by signer) (api.Record, error) {
	id := r.PathValue(segment)
	if !validCallID(id) {
		return api.Record{}, errNoBuild
	}
	if err := by.suspended(); err != nil {
		return api.Record{}, err
	}
	if f := s.flights.find(by, id); f != nil {
		return f.current(), nil
	}
	ctx, cancel := context.WithTimeout(r.Context(), findTimeout)
	defer cancel()
	past, err := s.Solver.Find(ctx, by.pool(), by.root.CallName(by.id(), by.ownKey(), id))
	if err != nil {
		return api.Record{}, err
	}
	if past == nil {
		return api.Record{}, errNoBuild
	}
	return recordOf(past), nil
}

// record is the verdict. Its text is masked.
func (res *result) record(image string) api.Record {
	rec := api.Record{Image: image, ImageName: image, Status: api.Success}
	if res.err != nil {
		rec = failedRecord(api.AsError(res.err), image)
		rec.Error = res.mask.Text(rec.Error)
	} else {
		rec.Digest, rec.Commit, rec.Tags, rec.Platforms = res.outcome.Digest, res.outcome.Commit, res.outcome.Tags, res.outcome.Platforms
	}
	for _, warning := range res.outcome.Warnings {
		rec.Warnings = append(rec.Warnings, res.mask.Line(warning))
	}
	return rec
}

// recordOf tells of a build that a daemon remembers.
func recordOf(p *solve.Past) api.Record {
	rec := api.Record{Status: api.Success, Image: p.Image, ImageName: p.Image}
	switch {
	case p.Running:
		rec.Status = api.InProgress
		rec.Duration = time.Since(p.Began).Seconds()
		return rec
	case p.Err != nil:
		rec = failedRecord(api.AsError(p.Err), p.Image)
	}
	rec.Digest = p.Outcome.Digest
	rec.Duration = p.Ended.Sub(p.Began).Seconds()
	return rec
}
