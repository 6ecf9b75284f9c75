package server

import (
	"context"
	"net/http"
	"time"

	"handler/function/api"
	"handler/function/reply"
	"handler/function/solve"
)

// findTimeout bounds how long a verdict is looked for on the daemon.
const findTimeout = 30 * time.Second

// serveVerdict tells what came of a queued build: from memory, or, where another
// replica built it or this one has been restarted, from the daemon's history.
// The status is 200 for a verdict of either kind, and 202 for none yet.
func (s *Server) serveVerdict(w http.ResponseWriter, r *http.Request) {
	opts := reply.Options{ID: r.PathValue(segment), Start: time.Now()}
	if !validCallID(opts.ID) {
		opts.ID, _ = nameCall(w, r)
	}
	rec, by, err := s.verdict(r)
	opts.Sign = by.sign
	if err != nil {
		refuse(w, r, api.AsError(err), opts)
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

// verdict returns who signed the request beside an error too.
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

var errNoBuild = &api.Error{Code: api.NotFound, Msg: "no build of this call id is known: it has not been delivered yet, was not queued, or has been forgotten"}

// now is the flight's verdict, or how long it has been under way.
func (f *flight) now() api.Record {
	select {
	case <-f.done:
		return f.past()
	default:
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return api.Record{Status: api.InProgress, Image: f.image, ImageName: f.image, Duration: time.Since(f.call.start).Seconds()}
}

func recordOf(p *solve.Past) api.Record {
	rec := api.Record{Status: api.Success, Image: p.Image, ImageName: p.Image}
	switch {
	case p.Running:
		rec.Status = api.InProgress
		rec.Duration = time.Since(p.Began).Seconds()
		return rec
	case p.Err != nil:
		rec = failure(api.AsError(p.Err), p.Image)
	}
	rec.Digest = p.Outcome.Digest
	rec.Duration = p.Ended.Sub(p.Began).Seconds()
	return rec
}
