// Package server answers the builder's routes. It takes a request apart,
// admits it, hands it to a Solver, and turns what comes back into the answer
// the client asked for. It does not know BuildKit.
package server

import (
	"context"
	"crypto/rand"
	"net/http"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/budget"
	"handler/function/metrics"
	"handler/function/page"
	"handler/function/payload"
	"handler/function/reply"
	"handler/function/solve"
)

// Solver builds. Its errors are *api.Error where the client may know the
// reason. Stats are set beside an error too.
type Solver interface {
	Solve(ctx context.Context, req *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error)
	// Find returns what is remembered of the last build whose solve.Name has this
	// Call, or nil.
	Find(ctx context.Context, call string) (*solve.Past, error)
	// Daemons counts the daemons, within ctx.
	Daemons(ctx context.Context) solve.Daemons
}

// Config is what a Server works with. Every field without "may be" is needed.
type Config struct {
	Solver Solver

	// PayloadSecret is the secret's content now. It is asked for with each
	// request, so that a rotated key needs no restart.
	PayloadSecret func() ([]byte, error)

	// BuildSecretsKey is the private key that build secrets are sealed to,
	// empty when none is configured.
	BuildSecretsKey func() ([]byte, error)

	// DisableHMAC builds what anybody sends.
	DisableHMAC bool

	// RequireTimestamp refuses requests that have no X-Build-Timestamp.
	RequireTimestamp bool

	// FallbackSecret stands in for the payload secret where isolation derives
	// its key, when DisableHMAC is set and there is no secret.
	FallbackSecret []byte

	// Contexts may be nil: then none are taken.
	Contexts Contexts

	// ContextHosts may have git contexts; empty allows none. GitCredentials are
	// those for them, in the form of git's credential store, empty when there are
	// none.
	ContextHosts   []string
	GitCredentials func() ([]byte, error)

	// AllowedImages are repository prefixes, normalised; empty allows any.
	AllowedImages []string

	// OwnRepositories are those that only the builder itself may write to,
	// normalised.
	OwnRepositories []string

	Limits      payload.Limits
	SpoolMemory int64  // bytes of a body kept in memory
	TempDir     string // where the rest of it goes
	SpoolBytes  int64  // of all bodies there together; half of it before their signatures have passed

	MaxBuilds       int
	MaxUploads      int
	QueueWait       time.Duration // that a streaming or queued caller waits for a build slot
	BuildTimeout    time.Duration // that a context sent ahead may take from the registry; the Solver has its own
	ShutdownTimeout time.Duration // that builds get after Shutdown
	UploadMinRate   int64         // bytes per second, averaged, after UploadGrace
	UploadGrace     time.Duration

	Version string
	Log     zerolog.Logger
}

// waitingMemory is what builds that wait for a slot keep in memory, all together, in
// bytes. What finds no room is read again from the disk when the slot is there.
const waitingMemory = 32 << 20

// tenant is the only one there is.
const tenant = "default"

// Server is the builder's http.Handler.
type Server struct {
	Config
	metrics           *metrics.Metrics
	routes            map[string]map[string]http.Handler
	keys              keyring
	intake            *intake
	disk              *budget.Budget // of all bodies
	waiting           *budget.Budget // of memory, for builds that wait for a slot
	builds            slots
	checks            slots // of contexts that are sent ahead
	flights           flights
	daemons           daemonCount
	refusals, defects refusals // logged

	// draining ends when Shutdown is called; stopped, when the time that builds
	// get after that is over.
	draining, stopped context.Context
	drain, stop       context.CancelFunc

	mu     sync.Mutex // guards active.Add against Shutdown's Wait
	active sync.WaitGroup
}

// New makes a Server. It starts nothing.
//
// # Errors
//
// A failed request is answered with an api.Record, or with plain text where the
// request's Content-Type was text/plain. api.Code.HTTPStatus decides its status.
// Once an answer streams its status is 200, and the last record says how the
// build ended.
func New(cfg Config) *Server {
	s := &Server{
		Config:  cfg,
		keys:    keyring{read: cfg.PayloadSecret, log: cfg.Log},
		disk:    budget.New(cfg.SpoolBytes),
		waiting: budget.New(waitingMemory),
		builds:  make(slots, cfg.MaxBuilds),
		checks:  make(slots, maxChecks),
		flights: flights{all: make(map[flightID]*flight)},
	}
	s.draining, s.drain = context.WithCancel(context.Background())
	s.stopped, s.stop = context.WithCancel(context.Background())
	s.intake = newIntake(s.draining, cfg.MaxUploads, cfg.UploadMinRate, cfg.UploadGrace, s.disk, cfg.SpoolBytes/2)
	s.daemons.count = cfg.Solver.Daemons
	s.metrics = metrics.New(s.daemons.get)

	build := http.HandlerFunc(s.serveBuild)
	s.routes = map[string]map[string]http.Handler{
		"/":      {http.MethodPost: build, http.MethodGet: page.Or(plain(description{s}))},
		"/build": {http.MethodPost: build},
		"/contexts/": {
			http.MethodHead: http.HandlerFunc(s.headContext),
			http.MethodPut:  http.HandlerFunc(s.putContext),
		},
		"/builds/":   {http.MethodGet: http.HandlerFunc(s.serveVerdict)},
		"/publickey": {http.MethodGet: plain(publicKey{s})},
		"/healthz":   {http.MethodGet: plain(health{})},
		"/ready":     {http.MethodGet: plain(readiness{s})},
		"/metrics":   {http.MethodGet: s.metrics.Handler()},
	}
	return s
}

// route finds the handlers of a path, by method. A route that ends in a slash is
// that of every segment below it, and the segment is rest.
func (s *Server) route(path string) (methods map[string]http.Handler, rest string) {
	if i := strings.LastIndexByte(path, '/') + 1; i > 1 {
		if i == len(path) {
			return nil, ""
		}
		path, rest = path[:i], path[i:]
	}
	return s.routes[path], rest
}

// ServeHTTP matches paths as they are: there is nothing here to clean or
// redirect.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	r.Header = kept(r.Header)
	id, _ := nameCall(w, r)
	path := r.URL.Path
	if path == "" {
		path = "/"
	}
	methods, rest := s.route(path)
	if methods == nil {
		s.refuseUnsigned(w, r, id, &api.Error{Code: api.NotFound, Msg: "there is nothing at this path"})
		return
	}
	r.SetPathValue(segment, rest)
	h, ok := methods[r.Method]
	if !ok && r.Method == http.MethodHead {
		h, ok = methods[http.MethodGet]
	}
	if !ok {
		for m := range methods {
			w.Header().Add("Allow", m)
		}
		s.refuseUnsigned(w, r, id, &api.Error{Code: api.MethodNotAllowed, Msg: "this path does not take " + r.Method})
		return
	}
	h.ServeHTTP(w, r)
}

// readHeaders are those that anything here looks at, and Accept-Encoding, at which the
// metrics do.
var readHeaders = []string{
	api.SignatureHeader, api.TimestampHeader, api.CallIDHeader, api.CallbackHeader,
	"Accept", "Accept-Encoding", "Content-Type", "User-Agent",
}

// kept is h without all that nobody reads. A request lives as long as its body takes to
// come, and 16 KiB of short headers are 475 KiB in memory.
func kept(h http.Header) http.Header {
	few := make(http.Header, len(readHeaders))
	for _, name := range readHeaders {
		for _, value := range h.Values(name) {
			// Its own, not a part of all headers in one string.
			few.Add(name, strings.Clone(value))
		}
	}
	return few
}

// segment names a request's path value: the last segment of its path, where
// the route leaves it open.
const segment = "segment"

// maxCallID is longer than any id that a gateway makes.
const maxCallID = 128

// validCallID says that an answer can have id in it. Text answers have it on a line.
func validCallID(id string) bool {
	return id != "" && len(id) <= maxCallID && !strings.ContainsFunc(id, unicode.IsControl)
}

// nameCall returns the id of a request's build: the X-Call-Id that came with it, or one
// made here. The answer has it in its own X-Call-Id.
func nameCall(w http.ResponseWriter, r *http.Request) (id string, came bool) {
	id = r.Header.Get(api.CallIDHeader)
	if came = validCallID(id); !came {
		id = w.Header().Get(api.CallIDHeader)
	}
	if id == "" {
		id = rand.Text()
	}
	w.Header().Set(api.CallIDHeader, id)
	return id, came
}

// Refuse answers every request where there is no Server to do it.
func Refuse(w http.ResponseWriter, r *http.Request, err *api.Error) {
	id, _ := nameCall(w, r)
	refuse(w, r, err, reply.Options{ID: id})
}

// refuse answers a request that did not become a build.
func refuse(w http.ResponseWriter, r *http.Request, err *api.Error, opts reply.Options) {
	opts.Text = isText(r)
	if r.Body != http.NoBody {
		opts.NotBefore = time.Now().Add(settle)
	}
	reply.New(w, reply.JSON, opts).Finish(failure(err, ""))
}

// refuseUnsigned refuses and counts a request of which no signature is asked.
func (s *Server) refuseUnsigned(w http.ResponseWriter, r *http.Request, id string, err *api.Error) {
	s.countUnsigned(err, id)
	refuse(w, r, err, reply.Options{ID: id})
}

// settle is how long after the end of a body its answer may begin. A proxy made
// of Go's ReverseProxy, as of-watchdog and the gateway are, closes the body of a
// request when the answer begins; should it not yet have seen the end then, it
// drops the connection, and with it the build (https://go.dev/issue/40747).
const settle = 20 * time.Millisecond

func failure(err *api.Error, image string) api.Record {
	return api.Record{Status: api.Failed, Image: image, ImageName: image, Error: err.Msg, Code: err.Code}
}

// begin counts a build in, unless the server is shutting down.
func (s *Server) begin() (end func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining.Err() != nil {
		return nil, false
	}
	s.active.Add(1)
	return s.active.Done, true
}

// Shutdown refuses new builds, gives those that run ShutdownTimeout to end, then
// cancels them and waits until each has given its verdict.
func (s *Server) Shutdown() {
	s.mu.Lock()
	s.drain()
	s.mu.Unlock()
	timer := time.AfterFunc(s.ShutdownTimeout, s.stop)
	defer timer.Stop()
	s.active.Wait()
	s.stop()
}
