package server

import (
	"crypto/rand"

	"handler/function/api"
	"handler/function/solve"
)

// logUsage logs what a build of a tenant has used, once for each verdict, whatever log_level is. The
// line has the same keys for every build, with zeros for what a build did not reach. Its id is no
// other verdict's: any caller can choose a call id again. There is no line without a file of
// tenants.
func (j *job) logUsage(rec api.Record, stats solve.Stats) {
	if !j.body.file() {
		return
	}
	// The call's log has the call id, the tenant and the key.
	j.call.log.Log().Str("level", "info").
		Str("id", rand.Text()).
		Str("image", rec.Image).
		Str("digest", rec.Digest).
		Strs("platforms", rec.Platforms).
		Str("outcome", string(rec.Status)).
		Int64("received_bytes", j.body.Size()).
		Int64("context_sent_bytes", stats.Sent).
		Int64("pushed_bytes", stats.Pushed).
		Float64("waited_seconds", j.waited.Seconds()).
		Float64("built_seconds", j.built.Seconds()).
		Float64("pushed_seconds", stats.Push.Seconds()).
		Int("steps", stats.Steps).
		Int("cached_steps", stats.Cached).
		Msg("usage")
}
