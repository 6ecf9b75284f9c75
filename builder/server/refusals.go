package server

import (
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
)

// What is logged of requests that are refused before a signature has passed: anybody can
// send those, as fast as they like. The metrics count each.
const (
	refusalsLogged = 10 // in refusalPeriod
	refusalPeriod  = 5 * time.Second
)

// refusals bounds the lines about requests that nobody signed.
type refusals struct {
	mu     sync.Mutex
	until  time.Time // the end of the period
	logged int       // in it
	left   int       // out of it
}

// allow says whether a line may be logged. When the period ends, a line says on log how
// many were left out.
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

// countUnsigned counts a request that was refused before a signature had passed, and logs
// it if there is room in the log.
func (s *Server) countUnsigned(e *api.Error, id string) {
	id = strings.ToValidUTF8(id[:min(len(id), maxCallID)], "")
	s.metrics.Refused(e.Code)
	lines := &s.refusals
	if e.Code == api.Internal {
		lines = &s.defects // which strangers' refusals must not crowd out
	}
	if lines.allow(s.Log) {
		s.Log.WithLevel(levelOf(e)).Str("call_id", id).Str("code", string(e.Code)).AnErr("cause", e).Msg("request refused")
	}
}

func (r *refusals) report(log zerolog.Logger) {
	r.mu.Lock()
	left := r.left
	r.left, r.logged, r.until = 0, 0, time.Now().Add(refusalPeriod)
	r.mu.Unlock()
	log.Warn().Int("left_out", left).Dur("period_ms", refusalPeriod).Msg("requests refused and not logged")
}
