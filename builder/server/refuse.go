package server

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/reply"
)

// To refuse a request is to answer it with an error in place of a build. This file has
// everything that does so.

var errShuttingDown = &api.Error{Code: api.ShuttingDown, Msg: "the builder is shutting down"}

// Refuse answers a request where there is no Server to answer it.
func Refuse(w http.ResponseWriter, r *http.Request, err *api.Error) {
	id, _ := nameCall(w, r)
	writeRefusal(w, r, err, reply.Options{ID: id})
}

// refuseSigned answers, counts and logs a request whose signature has passed. The log has no
// bound here: only somebody with a key can add to it.
func (s *Server) refuseSigned(w http.ResponseWriter, r *http.Request, by signer, err error, opts reply.Options) {
	e := s.countRefusal(by, err, opts.ID)
	writeRefusal(w, r, e, opts)
}

// countRefusal counts and logs a refusal of somebody whose signature has passed.
func (s *Server) countRefusal(by signer, err error, id string) *api.Error {
	e := api.AsError(err)
	s.metrics.Refused(by.tenantID(), e.Code)
	log := by.logTo(s.Log)
	log.WithLevel(levelOf(e)).Str("call_id", id).Str("code", string(e.Code)).AnErr("cause", e).Msg("request refused")
	return e
}

// refuseUnverified answers and counts a request whose signature has not passed, or that needs
// none. It logs the request if there is room in the log.
func (s *Server) refuseUnverified(w http.ResponseWriter, r *http.Request, err error, opts reply.Options) {
	e := api.AsError(err)
	s.metrics.Refused("", e.Code)
	lines := &s.refusals
	if e.Code == api.Internal {
		lines = &s.defects // strangers' refusals must not crowd out a defect
	}
	if lines.allow(s.Log) {
		s.Log.WithLevel(levelOf(e)).Str("call_id", opts.ID).Str("code", string(e.Code)).AnErr("cause", e).Msg("request refused")
	}
	writeRefusal(w, r, e, opts)
}

// writeRefusal writes the answer, and neither counts nor logs it.
func writeRefusal(w http.ResponseWriter, r *http.Request, err *api.Error, opts reply.Options) {
	opts.Text = isText(r)
	if r.Body != http.NoBody {
		opts.NotBefore = time.Now().Add(settle)
	}
	reply.New(w, reply.JSON, opts).Finish(failedRecord(err, ""))
}

// failedRecord tells of a request or a build that failed with err.
func failedRecord(err *api.Error, image string) api.Record {
	return api.Record{Status: api.Failed, Image: image, ImageName: image, Error: err.Msg, Code: err.Code}
}

// levelOf is error for a defect of the builder, and warn for everything else.
func levelOf(e *api.Error) zerolog.Level {
	if e.Code == api.Internal {
		return zerolog.ErrorLevel
	}
	return zerolog.WarnLevel
}

// canceled is the error of a call or build that ended because of cause.
func canceled(cause error) error {
	if e, ok := errors.AsType[*api.Error](cause); ok {
		return e
	}
	return &api.Error{Code: api.Canceled, Msg: "the client went away", Err: cause}
}

// because is err, unless ctx has ended. Then the client is told why ctx ended: err is only
// what a daemon or a registry said when it was interrupted.
func because(ctx context.Context, err error) error {
	if err == nil || ctx.Err() == nil {
		return err
	}
	why := api.AsError(canceled(context.Cause(ctx)))
	return &api.Error{Code: why.Code, Msg: why.Msg, Err: err}
}

// The log has at most this many lines about requests whose signature has not passed: anybody
// can send such requests, as fast as they like. The metrics count each.
const (
	refusalsLogged = 10 // in refusalPeriod
	refusalPeriod  = 5 * time.Second
)

// refusals bounds the log lines about requests whose signature has not passed.
type refusals struct {
	mu     sync.Mutex
	until  time.Time // the end of the period
	logged int       // lines logged in the period
	left   int       // lines left out of the log in the period
}

// allow says whether a line may be logged. At the end of the period a line on log says
// how many lines were left out.
func (r *refusals) allow(log zerolog.Logger) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := time.Now(); now.After(r.until) && r.left == 0 {
		r.until, r.logged = now.Add(refusalPeriod), 0
	}
	if r.logged < refusalsLogged {
		r.logged++
		return true
	}
	if r.left++; r.left == 1 {
		time.AfterFunc(time.Until(r.until), func() { r.report(log) })
	}
	return false
}

func (r *refusals) report(log zerolog.Logger) {
	r.mu.Lock()
	left := r.left
	r.left, r.logged, r.until = 0, 0, time.Now().Add(refusalPeriod)
	r.mu.Unlock()
	log.Warn().Int("left_out", left).Dur("period_ms", refusalPeriod).Msg("requests refused and not logged")
}
