package server

import (
	"context"
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
	rec, by, err := s.verdict(r)
	opts.Sign = by.sign
	if err != nil {
		writeRefusal(w, r, api.AsError(err), opts)
		return
	}
	status := http.StatusOK
	if rec.Status == api.InProgress {
		status = http.StatusAccepted
	}
	if err := reply.Object(w, status, rec, opts); err != nil {
		s.Log.Warn().AnErr("cause", err).Msg("answer not delivered")
	}
}

// verdict returns the signer of the request beside an error too.
func (s *Server) verdict(r *http.Request) (rec api.Record, by signer, err error) {
	by, err = s.signedBy(r, r.PathValue(segment))
	if err != nil {
		return rec, by, err
	}
	id := r.PathValue(segment)
	if !validCallID(id) {
		return rec, by, errNoBuild
	}
	if f := s.flights.find(by.key, id); f != nil {
		return f.now(), by, nil
	}
	keys, err := s.keys.now()
	if err != nil && !s.DisableHMAC {
		return rec, by, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), findTimeout)
	defer cancel()
	past, err := s.Solver.Find(ctx, s.isolationKey(keys).CallName(tenant, by.key, id))
	if err != nil {
		return rec, by, err
	}
	if past == nil {
		return rec, by, errNoBuild
	}
	return recordOf(past), by, nil
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
