package server

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/buildconfig"
	"handler/function/payload"
	"handler/function/redact"
	"handler/function/reply"
	"handler/function/sealed"
	"handler/function/solve"
)

// call is one request for a build.
type call struct {
	id     string
	start  time.Time
	form   reply.Form
	queued bool // a queue delivered it
	named  bool // its id came with it
	log    zerolog.Logger
}

// waits says that the caller waits for a slot: it would not come back. Anybody can say
// so: it counts once the signature has passed.
func (c *call) waits() bool { return c.form != reply.JSON || c.queued }

// joins says that the call may be a second delivery.
func (c *call) joins() bool { return c.queued && c.named }

func (s *Server) newCall(w http.ResponseWriter, r *http.Request) *call {
	c := &call{
		start: time.Now(),
		form:  reply.Accept(r.Header),
		// The CE worker takes a 429 for the build's answer and drops it.
		queued: r.Header.Get(api.CallbackHeader) != "" || strings.Contains(r.UserAgent(), "queue-worker"),
	}
	c.id, c.named = nameCall(w, r)
	c.log = s.Log.With().Str("call_id", c.id).Logger()
	return c
}

func (s *Server) serveBuild(w http.ResponseWriter, r *http.Request) {
	c := s.newCall(w, r)
	end, ok := s.begin()
	if !ok {
		s.refuse(w, r, c, errShuttingDown, nil)
		return
	}
	defer end()

	body, err := s.receive(w, r, payload.Options{SHA256: c.joins()})
	if err != nil {
		s.refuse(w, r, c, err, nil)
		return
	}
	out := reply.New(w, c.form, reply.Options{ID: c.id, Start: c.start, NotBefore: time.Now().Add(settle), Text: isText(r), Sign: body.signer.sign})
	// The signature has passed. From here on a stream says in its last record
	// what went wrong: go-sdk shows no body of a status other than 200.
	out.Begin()

	// Not the request's context: the build is that of all who wait for it.
	f := &flight{call: c, done: make(chan struct{})}
	f.ctx, f.cancel = context.WithCancelCause(context.Background())
	if c.joins() {
		// Of a body that could not be stored nothing says whether another is the same.
		if sum, ok := body.SHA256(); ok {
			f.id = flightID{key: string(body.signer.key), call: c.id, body: sum}
		}
	}
	f, seat, run := s.flights.begin(f, out)
	if run {
		s.active.Add(1)
		go s.fly(f, body)
	} else {
		body.Close()
		c.log.Info().Msg("build joined")
		s.metrics.Joined.Inc()
	}
	if err := out.Finish(f.wait(r.Context(), seat)); err != nil {
		c.log.Warn().AnErr("cause", err).Msg("answer not delivered")
	}
}

// fly builds, and gives the flight its verdict. It ends soon after it has.
func (s *Server) fly(f *flight, body *upload) {
	defer s.active.Done()
	defer f.cancel(nil)
	b := &build{flight: f, body: body, mask: redact.New(nil)}
	b.log = f.call.log.With().Int64("bytes", body.Size()).Logger()

	// Nothing needs the sum before the verdict, and it takes its time of a large body.
	b.hashed = make(chan struct{})
	b.aside.Go(func() {
		defer close(b.hashed)
		b.sha256 = body.request()
	})
	outcome, stats, err := s.build(b)
	rec := api.Record{Image: b.image, ImageName: b.image, Status: api.Success}
	if err != nil {
		e := api.AsError(err)
		rec = failure(e, b.image)
		rec.Error = b.mask.Text(rec.Error)
	} else {
		rec.Digest, rec.Commit, rec.Tags, rec.Platforms = outcome.Digest, outcome.Commit, outcome.Tags, outcome.Platforms
	}
	for _, warning := range outcome.Warnings {
		rec.Warnings = append(rec.Warnings, b.mask.Line(warning))
	}
	<-b.hashed
	rec.Request = b.sha256
	took := time.Since(f.call.start)
	s.metrics.Built(rec.Status, rec.Code, took, stats)
	f.end(rec)
	s.flights.end(f)
	b.aside.Wait()
	body.Close()
	s.logEnd(b, rec, stats, took, err)
}

// build is what it takes to give a flight its verdict.
type build struct {
	*flight
	body *upload
	mask *redact.Redactor
	log  zerolog.Logger

	timeKey [32]byte          // for the context's times
	hidden  map[string][]byte // what mask is to keep out of sight

	sha256 string // the verdict's Request, once hashed is closed
	hashed chan struct{}
	aside  sync.WaitGroup // what goes on beside the build and ends soon after it
}

// build does the work between the signature and the verdict. Its Outcome has
// warnings also beside an error.
func (s *Server) build(b *build) (outcome solve.Outcome, stats solve.Stats, err error) {
	defer func() {
		if p := recover(); p != nil {
			// A stream without a verdict reads as a success.
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	if err := s.admit(b); err != nil {
		return outcome, stats, err
	}
	defer s.builds.release()
	s.metrics.InFlight.Inc()
	defer s.metrics.InFlight.Dec()
	defer context.AfterFunc(s.stopped, func() { b.cancel(errShuttingDown) })()

	// What has a slot need not share its memory any more.
	b.body.Charge(nil, s.disk)
	req, warnings, err := s.request(b)
	outcome.Warnings = warnings
	if err != nil {
		return outcome, stats, err
	}
	b.mask = redact.New(b.hidden)
	req.Mask = b.mask
	started := time.Now()
	b.aside.Go(func() {
		<-b.hashed
		b.log.Info().Str("sha256", b.sha256).Str("image", b.image).Bool("queued", b.call.queued).Time("started", started).Msg("build started")
	})
	if source := req.Config.Context; source != nil && source.Digest != "" {
		spool, p, err := s.fetchContext(b, source.Digest)
		if err != nil {
			return outcome, stats, because(b.ctx, err)
		}
		defer spool.Close()
		req.Context = p.Context
		warnings = append(warnings, p.Warnings...)
		outcome.Warnings = warnings
	}
	req.Context.SetTimes(b.timeKey)
	solved, stats, err := s.Solver.Solve(b.ctx, req, b.say)
	solved.Warnings = append(warnings, solved.Warnings...)
	return solved, stats, because(b.ctx, err)
}

// because is err, or why ctx ended, whatever that made a daemon or a registry say.
func because(ctx context.Context, err error) error {
	if err == nil || ctx.Err() == nil {
		return err
	}
	why := api.AsError(canceled(context.Cause(ctx)))
	return &api.Error{Code: why.Code, Msg: why.Msg, Err: err}
}

// request checks what the client asks for.
func (s *Server) request(b *build) (*solve.Request, []string, error) {
	p, err := b.body.Payload()
	if err != nil {
		return nil, nil, err
	}
	cfg, err := buildconfig.Parse(p.Config)
	if err != nil {
		return nil, p.Warnings, err
	}
	b.setImage(cfg.Image)
	switch {
	case cfg.Context == nil && p.Context == nil:
		return nil, p.Warnings, payload.ErrNoContext
	case cfg.Context != nil && p.Context != nil:
		return nil, p.Warnings, &api.Error{Code: api.BadConfig, Msg: fmt.Sprintf("%s: %q is set, and the tar holds a context of its own", api.ConfigFile, "context")}
	}
	warnings := append(p.Warnings, cfg.Warnings...)
	if err := cfg.Allow(s.AllowedImages); err != nil {
		return nil, warnings, err
	}
	if err := cfg.Deny(s.OwnRepositories); err != nil {
		return nil, warnings, err
	}
	if err := cfg.AllowContext(s.ContextHosts); err != nil {
		return nil, warnings, err
	}
	req := &solve.Request{ID: b.call.id, Config: cfg, Context: p.Context}
	if p.Secrets != nil {
		private, err := s.BuildSecretsKey()
		if err != nil {
			return nil, warnings, fmt.Errorf("reading the build-secrets key: %w", err)
		}
		if len(private) == 0 {
			return nil, warnings, &api.Error{Code: api.BadSecrets, Msg: fmt.Sprintf("the tar holds %s, but no build-secrets key is configured here", api.SecretsFile)}
		}
		if req.Secrets, err = sealed.Open(b.ctx, private, p.Secrets); err != nil {
			return nil, warnings, because(b.ctx, err)
		}
	}
	hidden := maps.Clone(req.Secrets)
	if cfg.Git != nil {
		req.Context = new(payload.Context)
		file, err := s.GitCredentials()
		if err != nil {
			return nil, warnings, fmt.Errorf("reading the git credentials: %w", err)
		}
		if user, password, ok := cfg.Git.GitCredentials(file); ok {
			basic := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
			req.GitAuthorization = "Basic " + basic
			if hidden == nil {
				hidden = make(map[string][]byte)
			}
			// No id of a secret has a line break.
			hidden["git\npassword"], hidden["git\nbasic"] = []byte(password), []byte(basic)
		}
	}
	b.hidden = hidden

	key := s.isolationKey(b.body.keys)
	repository := rand.Text() // without an image nothing says which builds are one another's
	if len(cfg.References) > 0 {
		repository = cfg.References[0].Name()
	}
	b.timeKey = key.TimeKey(tenant, repository)
	req.SharedKey = key.SharedKey(tenant, repository)
	req.Hostname = key.Hostname(tenant, req.Secrets)
	req.CacheMountNS = key.CacheMountNS(tenant)
	if b.named() {
		req.Name = solve.Name{
			Call: key.CallName(tenant, b.body.signer.key, b.id.call),
			Body: key.BodyName(tenant, b.id.body),
		}
	}
	return req, warnings, nil
}

// admit takes a build slot. If there is none, what is wrong with the request is said
// before the wait for one, as far as it can be seen without decompressing anything.
// Nothing of it is kept meanwhile but the stored body and, if there is room, its index.
func (s *Server) admit(b *build) error {
	start := time.Now()
	if s.builds.acquire(b.ctx, 0) == nil {
		s.metrics.Waited(time.Since(start))
		return nil
	}
	if b.body.Index() {
		if _, _, err := s.request(b); err != nil {
			return err
		}
		b.mask = redact.New(nil)
	}
	full := &api.Error{Code: api.Busy, Msg: fmt.Sprintf("%d builds are running, as many as may at once", s.MaxBuilds)}
	var wait time.Duration
	if b.call.waits() {
		wait, full.Code = s.QueueWait, api.QueueTimeout
		full.Msg += ", and queue_wait has passed"
	}
	s.metrics.Waiting.Inc()
	err := s.take(b.ctx, s.builds, wait, full)
	s.metrics.Waiting.Dec()
	s.metrics.Waited(time.Since(start))
	return err
}

var errShuttingDown = &api.Error{Code: api.ShuttingDown, Msg: "the builder is shutting down"}

// refuse answers and logs a request that did not become a build. body is nil unless its
// signature has passed.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, c *call, err error, body *upload) {
	e := api.AsError(err)
	if body == nil {
		s.countUnsigned(e, c.id)
	} else {
		s.metrics.Refused(e.Code)
		c.log.WithLevel(levelOf(e)).Str("code", string(e.Code)).AnErr("cause", e).Msg("request refused")
	}
	opts := reply.Options{ID: c.id, Start: c.start}
	if body != nil {
		opts.Sign, opts.Request = body.signer.sign, body.request()
	}
	refuse(w, r, e, opts)
}

// levelOf is warn for what may happen, and error for a defect here.
func levelOf(e *api.Error) zerolog.Level {
	if e.Code == api.Internal {
		return zerolog.ErrorLevel
	}
	return zerolog.WarnLevel
}

func (s *Server) logEnd(b *build, rec api.Record, stats solve.Stats, took time.Duration, err error) {
	event := b.log.Info()
	if rec.Code == api.Internal {
		event = b.log.Error()
	}
	event.
		Str("sha256", b.sha256).
		Str("image", b.image).
		Str("digest", rec.Digest).
		Str("commit", rec.Commit).
		Str("outcome", string(rec.Status)).
		Str("code", string(rec.Code)).
		Dur("duration_ms", took).
		Int("steps", stats.Steps).
		Int("cached_steps", stats.Cached).
		Int("attempts", stats.Attempts).
		Str("daemon", stats.Daemon).
		Str("choice", string(stats.Choice)).
		Int64("context_sent_bytes", stats.Sent)
	if err != nil {
		event.AnErr("cause", errors.New(b.mask.Text(err.Error())))
	}
	event.Msg("build ended")
}
