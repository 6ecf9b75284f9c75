package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/buildconfig"
	"handler/function/redact"
	"handler/function/reply"
	"handler/function/sealed"
	"handler/function/signature"
	"handler/function/solve"
)

// build is one request on its way to a verdict.
type build struct {
	id     string
	start  time.Time
	form   reply.Form
	queued bool // a queue delivered it
	image  string
	mask   *redact.Redactor
	log    zerolog.Logger
}

func (b *build) waits() bool { return b.form != reply.JSON || b.queued }

func (s *Server) serveBuild(w http.ResponseWriter, r *http.Request) {
	b := &build{
		id:    callID(r),
		start: time.Now(),
		form:  reply.Accept(r.Header),
		// The CE worker takes a 429 for the build's answer and drops it.
		queued: r.Header.Get(api.CallbackHeader) != "" || strings.Contains(r.UserAgent(), "queue-worker"),
		mask:   redact.New(nil),
	}
	b.log = s.Log.With().Str("call_id", b.id).Logger()

	end, ok := s.begin()
	if !ok {
		s.refuse(w, r, b, errShuttingDown)
		return
	}
	defer end()

	body, err := s.receive(w, r)
	if err != nil {
		s.refuse(w, r, b, err)
		return
	}
	defer body.Close()

	opts := reply.Options{Start: b.start, NotBefore: time.Now().Add(settle), Text: isText(r)}
	if body.key != nil {
		opts.Signer = func(answer []byte) string { return signature.Sign(body.key, answer) }
	}
	out := reply.New(w, b.form, opts)
	// The signature has passed. From here on a stream says in its last record
	// what went wrong: go-sdk shows no body of a status other than 200.
	out.Begin()
	sum := body.SHA256()
	b.log = b.log.With().Str("sha256", hex.EncodeToString(sum[:])).Int64("bytes", body.Size()).Logger()

	outcome, stats, err := s.build(r, b, body, out)
	rec := api.Record{Image: b.image, ImageName: b.image, Status: api.Success}
	if err != nil {
		e := api.AsError(err)
		rec = failure(e, b.image)
		rec.Error = b.mask.Text(rec.Error)
	} else {
		rec.Digest, rec.Tags, rec.Platforms = outcome.Digest, outcome.Tags, outcome.Platforms
	}
	for _, warning := range outcome.Warnings {
		rec.Warnings = append(rec.Warnings, b.mask.Line(warning))
	}
	sendErr := out.Finish(rec)
	s.metrics.Built(rec.Status, rec.Code, time.Since(b.start), stats)
	s.logEnd(b, rec, stats, err, sendErr)
}

// build does the work between the signature and the verdict. Its Outcome has
// warnings also beside an error.
func (s *Server) build(r *http.Request, b *build, body *upload, out *reply.Writer) (outcome solve.Outcome, stats solve.Stats, err error) {
	defer func() {
		if p := recover(); p != nil {
			// A stream without a verdict reads as a success.
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	req, warnings, err := s.request(b, body)
	outcome.Warnings = warnings
	if err != nil {
		return outcome, stats, err
	}
	out.SetImage(b.image)

	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	if err := s.admit(ctx, b); err != nil {
		return outcome, stats, err
	}
	defer s.builds.release()
	s.metrics.InFlight.Inc()
	defer s.metrics.InFlight.Dec()
	defer context.AfterFunc(s.stopped, func() { cancel(errShuttingDown) })()

	b.log.Info().Str("image", b.image).Bool("queued", b.queued).Msg("build started")
	log := func(lines ...string) {
		if err := out.Log(ctx, lines...); err != nil {
			cancel(canceled(err))
		}
	}
	solved, stats, err := s.Solver.Solve(ctx, req, log)
	solved.Warnings = append(warnings, solved.Warnings...)
	if err != nil && ctx.Err() != nil {
		// Whatever the daemon called it, this is why it ended.
		why := api.AsError(canceled(context.Cause(ctx)))
		err = &api.Error{Code: why.Code, Msg: why.Msg, Err: err}
	}
	return solved, stats, err
}

// request checks what the client asks for.
func (s *Server) request(b *build, body *upload) (*solve.Request, []string, error) {
	p, err := body.Payload()
	if err != nil {
		return nil, nil, err
	}
	cfg, err := buildconfig.Parse(p.Config)
	if err != nil {
		return nil, p.Warnings, err
	}
	b.image = cfg.Image
	warnings := append(p.Warnings, cfg.Warnings...)
	if err := cfg.Allow(s.AllowedImages); err != nil {
		return nil, warnings, err
	}
	req := &solve.Request{ID: b.id, Config: cfg, Context: p.Context}
	if p.Secrets != nil {
		private, err := s.BuildSecretsKey()
		if err != nil {
			return nil, warnings, fmt.Errorf("reading the build-secrets key: %w", err)
		}
		if len(private) == 0 {
			return nil, warnings, &api.Error{Code: api.BadSecrets, Msg: fmt.Sprintf("the tar holds %s, but no build-secrets key is configured here", api.SecretsFile)}
		}
		if req.Secrets, err = sealed.Open(private, p.Secrets); err != nil {
			return nil, warnings, err
		}
		b.mask = redact.New(req.Secrets)
	}
	req.Mask = b.mask

	key := s.isolationKey(body.keys)
	repository := rand.Text() // without an image nothing says which builds are one another's
	if len(cfg.References) > 0 {
		repository = cfg.References[0].Name()
	}
	req.SharedKey = key.SharedKey(tenant, repository)
	req.Hostname = key.Hostname(tenant, req.Secrets)
	req.CacheMountNS = key.CacheMountNS(tenant)
	return req, warnings, nil
}

// admit takes a build slot.
func (s *Server) admit(ctx context.Context, b *build) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Waiting longer than the process lives is of no use.
	defer context.AfterFunc(s.draining, func() { cancel(errShuttingDown) })()

	var wait time.Duration
	if b.waits() {
		wait = s.QueueWait
	}
	start := time.Now()
	s.metrics.Waiting.Inc()
	err := s.builds.acquire(ctx, wait)
	s.metrics.Waiting.Dec()
	s.metrics.Waited(time.Since(start))
	if err != nil {
		return busy(err, fmt.Sprintf("%d builds are running, as many as may at once", s.MaxBuilds))
	}
	return nil
}

var errShuttingDown = &api.Error{Code: api.ShuttingDown, Msg: "the builder is shutting down"}

// refuse answers and logs a request that did not become a build.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, b *build, err error) {
	e := api.AsError(err)
	s.metrics.Refused(e.Code)
	event := b.log.Warn()
	if e.Code == api.Internal {
		event = b.log.Error()
	}
	event.Str("code", string(e.Code)).AnErr("cause", cut(e)).Msg("request refused")
	refuse(w, r, e)
}

func (s *Server) logEnd(b *build, rec api.Record, stats solve.Stats, err, sendErr error) {
	event := b.log.Info()
	if rec.Code == api.Internal {
		event = b.log.Error()
	}
	event.
		Str("image", b.image).
		Str("digest", rec.Digest).
		Str("outcome", string(rec.Status)).
		Str("code", string(rec.Code)).
		Dur("duration_ms", time.Since(b.start)).
		Int("steps", stats.Steps).
		Int("cached_steps", stats.Cached).
		Int("attempts", stats.Attempts).
		Int64("context_sent_bytes", stats.Sent)
	if err != nil {
		event.AnErr("cause", cut(errors.New(b.mask.Text(err.Error()))))
	}
	if sendErr != nil {
		event.AnErr("reply", cut(sendErr))
	}
	event.Msg("build ended")
}

// maxLogged bounds an error in the log: of-watchdog stops reading a function's
// output at a line of 64 KiB, and JSON can take six bytes for one.
const maxLogged = 8 << 10

func cut(err error) error {
	if text := err.Error(); len(text) > maxLogged {
		return errors.New(strings.ToValidUTF8(text[:maxLogged], "") + " (cut)")
	}
	return err
}

// maxCallID is longer than any id that a gateway makes.
const maxCallID = 128

func callID(r *http.Request) string {
	if id := r.Header.Get(api.CallIDHeader); id != "" && len(id) <= maxCallID {
		return id
	}
	return rand.Text()
}
