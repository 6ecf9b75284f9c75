package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/payload"
	"handler/function/records"
	"handler/function/redact"
	"handler/function/reply"
	"handler/function/solve"
)

// serveBuild receives a body, and then waits for the build of it: a new build, or one that
// an earlier delivery of the same request has begun.
func (s *Server) serveBuild(w http.ResponseWriter, r *http.Request) {
	c := s.newCall(w, r)
	end, ok := s.begin()
	if !ok {
		discardBody(w, r)
		s.refuseUnverified(w, r, errShuttingDown, c.answer())
		return
	}
	defer end()

	purpose := toBuild
	if c.mayJoin() {
		purpose = toJoin
	}
	body, err := s.receive(w, r, purpose)
	if err != nil {
		s.refuseUnverified(w, r, err, c.answer())
		return
	}
	opts := c.answer()
	opts.NotBefore, opts.Text, opts.Sign = time.Now().Add(settle), isText(r), body.sign
	out := reply.New(w, c.form, opts)
	// The signature has passed. From here on the last record of a stream tells what went
	// wrong: go-sdk shows no body of a status other than 200.
	out.Begin()
	c.log = body.logTo(c.log)
	if err := body.refused(); err != nil {
		s.refuseBuild(c, body, err, out)
		return
	}

	f, me, first := s.flights.begin(newFlight(c, body), out)
	if first {
		s.active.Add(1)
		go s.run(f, body)
	} else {
		body.Close()
		c.log.Info().Msg("build joined")
		s.metrics.Joined.Inc()
	}
	if err := out.Finish(f.wait(r.Context(), me)); err != nil {
		c.log.Warn().AnErr("cause", err).Msg("answer not delivered")
	}
}

// refuseBuild gives a call that may not build its only record.
func (s *Server) refuseBuild(c *call, body *upload, err error, out *reply.Writer) {
	rec := failedRecord(s.countRefusal(body.signer, err, c.id), "")
	rec.Request = body.request()
	body.Close()
	if err := out.Finish(rec); err != nil {
		c.log.Warn().AnErr("cause", err).Msg("answer not delivered")
	}
}

// job is the work for one flight, from its body to its verdict.
type job struct {
	*flight
	body  *upload
	log   zerolog.Logger
	aside sync.WaitGroup // goroutines beside the job; they end soon after it

	waited time.Duration // for its slot
	slot   time.Time     // when it got one; zero before
	built  time.Duration // with its slot, but for the push
}

// result is how a job ended.
type result struct {
	outcome solve.Outcome // its warnings are set beside an error too
	stats   solve.Stats
	mask    *redact.Redactor // for everything that is said about the job
	kept    *redact.Redactor // for what is kept in its record, beside mask
	err     error
}

// build does a job. It calls one function for each step, in the order of a build's life.
func (s *Server) build(j *job) (res result) {
	res.mask, res.kept = redact.New(nil), redact.New(nil)
	defer func() {
		if p := recover(); p != nil {
			// faas-cli takes a stream without a verdict for a success.
			res.err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	if res.err = s.admit(j); res.err != nil {
		return res
	}
	defer s.builds.Release(j.body.id())
	j.slot = time.Now()
	j.record.Update(func(r *records.Record) { r.Building = true })
	s.metrics.InFlight.Inc()
	defer s.metrics.InFlight.Dec()
	defer context.AfterFunc(s.stopped, func() { j.cancel(errShuttingDown) })()

	// A body with a slot no longer shares the memory of bodies that wait for one.
	j.body.charge(nil)
	sp, err := s.check(j)
	res.outcome.Warnings = sp.warnings
	if err != nil {
		res.err = err
		return res
	}
	res.mask, res.kept = sp.mask(), sp.arguments()
	isolation := s.isolate(j, &sp)
	j.logStart()

	files, err := s.findContext(j, &sp)
	if err != nil {
		res.err = because(j.ctx, err)
		return res
	}
	defer files.close()
	res.outcome.Warnings = append(res.outcome.Warnings, files.warnings...)
	files.SetTimes(isolation.timeKey)

	solved, stats, err := s.Solver.Solve(j.ctx, &solve.Request{
		ID:               j.call.id,
		Config:           sp.config,
		Context:          files.Context,
		GitAuthorization: sp.git.authorization(),
		Secrets:          sp.secrets,
		Mask:             res.mask,
		SharedKey:        isolation.sharedKey,
		Hostname:         isolation.hostname,
		CacheMountNS:     isolation.cacheMountNS,
		Name:             isolation.name,
		Tenant:           s.solveTenant(j.body.signer),
		Placed: func(daemon, ref string) {
			j.record.Update(func(r *records.Record) { r.Daemon, r.Ref = daemon, ref })
		},
		Pushing: j.setPushing,
	}, j.say)
	solved.Warnings = append(res.outcome.Warnings, solved.Warnings...)
	res.outcome, res.stats, res.err = solved, stats, because(j.ctx, err)
	return res
}

// admit takes a build slot for a job. If none is free, admit checks the spec before the
// wait, so that the client is told of an error at once. It does so only if the body has an
// index without being decompressed. During the wait the job keeps the stored body and, if
// there is room, the index; everything else is read again after the wait.
func (s *Server) admit(j *job) error {
	// A process that shuts down begins no build, even if a slot is free: the body may have
	// come since.
	if s.draining.Err() != nil {
		return errShuttingDown
	}
	start, tenant := time.Now(), s.fairTenant(j.body.signer)
	waited := func() {
		j.waited = time.Since(start)
		s.metrics.Waited(j.waited)
	}
	if s.builds.Try(tenant) {
		waited()
		return nil
	}
	if j.body.Index() {
		if _, err := s.check(j); err != nil {
			return err
		}
	}
	var wait time.Duration
	if j.call.waits() {
		wait = s.QueueWait
	}
	ctx, stop := s.untilShutdown(j.ctx)
	defer stop()
	s.metrics.Waiting.Inc()
	defer s.metrics.Waiting.Dec()
	defer waited()
	if err := s.builds.Acquire(ctx, tenant, wait); err != nil {
		return s.noSlot(err, tenant, j.call.waits())
	}
	return nil
}

// openContext is a build context that can be read until it is closed.
type openContext struct {
	*payload.Context
	warnings []string
	close    func()
}

// findContext returns the build context of a spec: from the body, or from the registry. For a
// context in git it returns an empty one, because the daemon reads it.
func (s *Server) findContext(j *job, sp *spec) (openContext, error) {
	source := sp.config.Context
	switch {
	case source == nil:
		return openContext{Context: sp.context, close: func() {}}, nil
	case source.Digest == "":
		return openContext{Context: new(payload.Context), close: func() {}}, nil
	}
	spool, p, err := s.fetchContext(j, source.Digest)
	if err != nil {
		return openContext{}, err
	}
	return openContext{p.Context, p.Warnings, func() { spool.Close() }}, nil
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

func (j *job) logStart() {
	started := time.Now()
	// The sum of a large body takes a while, and the build need not wait for it.
	j.aside.Go(func() {
		j.log.Info().Str("sha256", j.body.request()).Str("image", j.image).Bool("queued", j.call.queued).Time("started", started).Msg("build started")
	})
}

func (j *job) logEnd(rec api.Record, res result, took time.Duration) {
	event := j.log.Info()
	if rec.Code == api.Internal {
		event = j.log.Error()
	}
	event.
		Str("sha256", rec.Request).
		Str("image", j.image).
		Str("digest", rec.Digest).
		Str("commit", rec.Commit).
		Str("outcome", string(rec.Status)).
		Str("code", string(rec.Code)).
		Dur("duration_ms", took).
		Int("steps", res.stats.Steps).
		Int("cached_steps", res.stats.Cached).
		Int("attempts", res.stats.Attempts).
		Str("daemon", res.stats.Daemon).
		Str("choice", string(res.stats.Choice)).
		Int64("context_sent_bytes", res.stats.Sent)
	if res.err != nil {
		event.AnErr("cause", errors.New(res.mask.Text(res.err.Error())))
	}
	event.Msg("build ended")
}
