// Package server answers the builder's routes. It receives a request, checks it, gives it
// to a Solver, and writes the result in the form that the client asked for. It does not
// know BuildKit.
//
// A request for a build goes through these files:
//
//   - server.go finds its route. call.go reads what kind of answer the caller wants.
//   - who.go finds the keys to try, and search.go looks for them in the body if nothing else
//     tells. keys.go reads the payload secret and the timestamp, and checks signatures of
//     requests without a body.
//   - upload.go receives the body and checks its signature. intake.go bounds all bodies before
//     their signatures, and shares.go each tenant's after that.
//   - flights.go finds the build that the call may join here, and retell.go one that another
//     replica runs or that has ended.
//   - build.go does the steps of the build. check.go compares it with what is allowed, slots.go
//     waits for its slot, contexts.go fetches its context, and isolate.go keeps it apart from
//     others.
//   - flight.go passes the log and the verdict to every call that waits, and to the store of
//     records. usage.go logs what the build has used.
//
// underway.go ends what a suspended tenant has under way. refuse.go answers where there is no
// build. builds.go, log.go and query.go answer requests about builds, contexts.go those about
// contexts, and about.go all others. lost.go finds out about builds whose replica has died.
package server

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/fair"
	"handler/function/metrics"
	"handler/function/page"
	"handler/function/payload"
	"handler/function/records"
	"handler/function/reply"
	"handler/function/solve"
)

// Solver builds. An error that the client may see is an *api.Error. Stats are set beside
// an error too.
type Solver interface {
	Solve(ctx context.Context, req *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error)
	// Find returns what the daemons of a pool remember of the last build whose solve.Name
	// has this Call. It returns nil if they remember none. pool is a solve.Tenant.Pool.
	Find(ctx context.Context, pool, call string) (*solve.Past, error)
	// Pushed returns the digest that a build has pushed whose replica has died, or nothing.
	// daemon and ref are what solve.Request.Placed was told last.
	Pushed(ctx context.Context, t *solve.Tenant, daemon, ref, image string) (digest string, err error)
	// Counted says whether Running counts the builds in a pool.
	Counted(pool string) bool
	// Running asks the daemons how many builds other processes have there, by the tenant's
	// id. It returns soon after ctx has ended.
	Running(ctx context.Context) func(tenant string) int
	// Daemons counts the daemons. It returns when ctx ends at the latest.
	Daemons(ctx context.Context) solve.Daemons
}

// Config of a Server. A field is needed unless its comment says what its zero value means.
type Config struct {
	Solver Solver

	// PayloadSecret reads the payload secret. It is called for each request, so that a
	// key can be rotated without a restart.
	PayloadSecret func() ([]byte, error)

	// Tenants says who may build. Nil stands for the only tenant, whose keys are the payload
	// secret's. With a file of tenants, the payload secret is the root of what isolates
	// builds, and lets nobody in.
	Tenants Tenants

	// TenantsStale says whether something is wrong with the file of tenants, so that it is not
	// what is in force. Nil leaves it out of the metrics.
	TenantsStale func() bool

	// MetricsTenants adds the ids of tenants to metrics, as labels. False leaves them out.
	MetricsTenants bool

	// BuildSecretsKey reads the private key for sealed build secrets. An empty key
	// means that no key is configured, and refuses sealed secrets.
	BuildSecretsKey func() ([]byte, error)

	// DisableHMAC lets anybody build. False wants a signature.
	DisableHMAC bool

	// RequireTimestamp refuses requests without X-Build-Timestamp. False takes them.
	RequireTimestamp bool

	// FallbackSecret takes the place of the payload secret in isolation. It is used
	// only if DisableHMAC is set and there is no payload secret.
	FallbackSecret []byte

	// Records keeps what is known of builds. Shutdown closes it.
	Records records.Store

	// Elsewhere is what other replicas have, if Records has the builds of all replicas. It
	// must not wait. Nil is for a store of this process alone.
	Elsewhere func() records.Load

	// Contexts keeps contexts that are sent ahead. Nil refuses them.
	Contexts Contexts

	// ContextHosts are the hosts that git contexts may come from. Empty refuses git
	// contexts.
	ContextHosts []string

	// GitCredentials reads the logins for ContextHosts, in the form of git's credential
	// store. Empty means that there are none.
	GitCredentials func() ([]byte, error)

	// DefaultPlatform is what the Solver builds for a request without platforms. Empty is
	// the daemon's own platform.
	DefaultPlatform string

	// AllowedImages are prefixes of the repositories that clients may push to,
	// normalised. Empty allows every repository.
	AllowedImages []string

	// OwnRepositories are the repositories that only the builder may push to,
	// normalised. Empty means that it has none.
	OwnRepositories []string

	Limits      payload.Limits
	SpoolMemory int64  // bytes of one body in memory
	TempDir     string // for the bytes of a body over SpoolMemory; empty is the system's
	SpoolBytes  int64  // bytes of all bodies in TempDir; bodies whose signature has not been checked have half of it

	MaxBuilds       int           // at once
	MaxUploads      int           // at once; a small body does not count
	QueueWait       time.Duration // of a streaming or queued caller, for a build slot
	BuildTimeout    time.Duration // for reading a context from the registry; the Solver has a timeout of its own
	ShutdownTimeout time.Duration // for builds to end after Shutdown
	UploadMinRate   int64         // bytes per second, averaged, after UploadGrace
	UploadGrace     time.Duration

	Version string
	Log     zerolog.Logger
}

// waitingMemory bounds the memory of all builds that wait for a slot together, in bytes.
// A build that finds no room keeps its body on the disk, and makes its index again once it
// has a slot.
const waitingMemory = 32 << 20

// Server is the builder's http.Handler.
//
// # Errors
//
// The answer to a failed request is an api.Record, or plain text if the Content-Type of
// the request was text/plain. api.Code.HTTPStatusFor decides the status. A stream has the
// status 200 whatever happens later: its last record says how the build ended.
type Server struct {
	Config
	metrics           *metrics.Metrics
	routes            map[string]map[string]http.Handler
	keys              keyring
	intake            *intake
	shares            *shares // of the disk for all bodies, and of memory for those that wait for a slot
	builds            *fair.Slots
	underway          underway
	contextSlots      *fair.Slots // for contexts on their way to the registry
	flights           flights
	followers         *fair.Slots // clients that read a log
	lists             *fair.Slots // lists of builds, until they are written
	excerpts          *fair.Slots // logs in records, until they are written
	finds             *fair.Slots // questions to daemons about builds
	retold            *fair.Slots // redeliveries that follow another replica's build
	daemons           daemonCount
	refusals, defects refusals

	// draining ends when Shutdown is called. stopped ends ShutdownTimeout later, or when all
	// builds have ended. closed ends after that, when the last lines of logs have been read.
	draining, stopped, closed context.Context
	drain, stop, close        context.CancelFunc

	mu     sync.Mutex // keeps active.Add out of Shutdown's Wait
	active sync.WaitGroup
}

// New makes a Server. It starts nothing.
func New(cfg Config) *Server {
	s := &Server{
		Config:       cfg,
		keys:         keyring{read: cfg.PayloadSecret, log: cfg.Log},
		shares:       newShares(waitingMemory, cfg.SpoolBytes),
		builds:       fair.New(cfg.MaxBuilds),
		underway:     underway{all: make(map[*work]bool)},
		contextSlots: fair.New(maxContextSlots),
		flights:      flights{named: make(map[flightID]*flight), all: make(map[*flight]bool)},
		followers:    fair.New(maxLogs),
		lists:        fair.New(maxLists),
		excerpts:     fair.New(maxExcerpts),
		finds:        fair.New(maxFinds),
		retold:       fair.New(maxRetold),
	}
	s.draining, s.drain = context.WithCancel(context.Background())
	s.stopped, s.stop = context.WithCancel(context.Background())
	s.closed, s.close = context.WithCancel(context.Background())
	s.intake = newIntake(s.draining, s.shares.disk, intakeLimits{
		uploads: cfg.MaxUploads, rate: cfg.UploadMinRate, grace: cfg.UploadGrace, spool: cfg.SpoolBytes / 2,
	})
	s.builds.Elsewhere = s.countElsewhere
	s.daemons.count = cfg.Solver.Daemons
	s.metrics = metrics.New(metrics.Config{Daemons: s.daemons.get, Records: cfg.Records.Stats, Tenants: cfg.MetricsTenants, Stale: s.staleTenants()})

	type methods = map[string]http.Handler
	s.routes = map[string]methods{
		"/": {
			http.MethodPost: http.HandlerFunc(s.serveBuild),
			http.MethodGet:  page.Or(s.adapt(description{s})),
		},
		"/build":  {http.MethodPost: http.HandlerFunc(s.serveBuild)},
		"/builds": {http.MethodGet: http.HandlerFunc(s.serveBuilds)},
		"/builds/*": {
			http.MethodGet:    http.HandlerFunc(s.serveRecord),
			http.MethodDelete: http.HandlerFunc(s.serveStop),
		},
		"/builds/*/log": {http.MethodGet: http.HandlerFunc(s.serveLog)},
		"/contexts/*": {
			http.MethodHead: http.HandlerFunc(s.serveHasContext),
			http.MethodPut:  http.HandlerFunc(s.servePutContext),
		},
		"/publickey": {http.MethodGet: s.adapt(publicKey{s})},
		"/healthz":   {http.MethodGet: s.adapt(health{})},
		"/ready":     {http.MethodGet: s.adapt(readiness{s})},
		"/metrics":   {http.MethodGet: s.metrics.Handler()},
	}
	return s
}

// route finds the handlers of a path, by method. The second segment of a path is anything where a
// route has a star, and is the value of name then: "/builds/*/log" serves /builds/42/log, and
// neither /builds//log nor /builds/4/2/log.
func (s *Server) route(path string) (methods map[string]http.Handler, name string) {
	parts := strings.SplitN(path, "/", 4) // the first is empty
	if len(parts) < 3 {
		return s.routes[path], ""
	}
	if name = parts[2]; name == "" {
		return nil, ""
	}
	parts[2] = "*"
	return s.routes[strings.Join(parts, "/")], name
}

// ServeHTTP matches a path as it is, without cleaning it.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	r.Header = kept(r.Header)
	id, _ := nameCall(w, r)
	path := r.URL.Path
	if path == "" {
		path = "/"
	}
	methods, name := s.route(path)
	h, ok := methods[r.Method]
	if !ok && r.Method == http.MethodHead {
		h, ok = methods[http.MethodGet]
	}
	// Only handlers of POST and PUT read a body. For the others, net/http would wait for the body until
	// read_timeout.
	if !ok || r.Method != http.MethodPost && r.Method != http.MethodPut {
		discardBody(w, r)
	}
	if methods == nil {
		s.refuseUnverified(w, r, &api.Error{Code: api.NotFound, Msg: "there is nothing at this path"}, reply.Options{ID: id})
		return
	}
	r.SetPathValue(segment, name)
	if !ok {
		for m := range methods {
			w.Header().Add("Allow", m)
		}
		s.refuseUnverified(w, r, &api.Error{Code: api.MethodNotAllowed, Msg: "this path does not take " + r.Method}, reply.Options{ID: id})
		return
	}
	h.ServeHTTP(w, r)
}

// readHeaders are the headers that this package reads, and Accept-Encoding, which the
// metrics' handler reads.
var readHeaders = []string{
	api.SignatureHeader, api.TimestampHeader, api.TenantHeader, api.CallIDHeader, api.CallbackHeader, forwardedHost,
	"Accept", "Accept-Encoding", "Content-Type", "Expect", lastEventID, "User-Agent",
}

// kept is h without the headers that nobody reads. Headers stay in memory until the body
// has come, and 16 KiB of short headers take 475 KiB there.
func kept(h http.Header) http.Header {
	few := make(http.Header, len(readHeaders))
	for _, name := range readHeaders {
		for _, value := range h.Values(name) {
			// A substring would keep all headers in memory.
			few.Add(name, strings.Clone(value))
		}
	}
	return few
}

// segment names a path value of a request: the segment of its path that a route's star stands for.
const segment = "segment"

// settle is the least time between the end of a body and the beginning of its answer.
// of-watchdog and the gateway are made of Go's ReverseProxy, which closes the body of a
// request when the answer begins. If it has not yet seen the end of the body by then, it
// drops the connection, and with it the build (https://go.dev/issue/40747).
const settle = 20 * time.Millisecond

// begin counts a call, so that Shutdown waits for it. It fails after Shutdown. The caller
// must call end.
func (s *Server) begin() (end func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining.Err() != nil {
		return nil, false
	}
	s.active.Add(1)
	return s.active.Done, true
}

// Shutdown refuses new builds, and waits until every running build has its verdict. Builds
// that have not ended within ShutdownTimeout are cancelled.
func (s *Server) Shutdown() {
	s.mu.Lock()
	s.drain()
	s.mu.Unlock()
	timer := time.AfterFunc(s.ShutdownTimeout, s.stop)
	defer timer.Stop()
	s.active.Wait()
	s.stop()
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	s.lastLines(ctx)
	s.close()
	if err := s.Records.Close(ctx); err != nil {
		s.Log.Error().Err(err).Msg("records are not stored")
	}
}

// closeTimeout bounds what Shutdown waits for once all builds have ended.
const closeTimeout = 3 * time.Second

// lastLines waits until the logs of this replica's builds have been read to their ends, or for a
// third of closeTimeout. Logs of other replicas' builds may go on for longer.
func (s *Server) lastLines(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, closeTimeout/3)
	defer cancel()
	for range maxLogs { // with all of them, none is left to read
		if s.followers.Acquire(ctx, fair.Tenant{}, closeTimeout) != nil {
			return
		}
	}
}
