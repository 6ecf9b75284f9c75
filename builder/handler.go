// Package function is the builder as an OpenFaaS function: it reads the
// configuration, wires the parts together, and hands every request to them.
package function

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/buildkit"
	"handler/function/contexts"
	"handler/function/records"
	"handler/function/records/jetstream"
	"handler/function/records/memory"
	"handler/function/redact"
	"handler/function/registry"
	"handler/function/server"
	"handler/function/signature"
	"handler/function/tenants"
)

// Version is in the answer of GET / and in the log.
const Version = "0.1.0"

// Handle serves every route of the builder.
func Handle(w http.ResponseWriter, r *http.Request) {
	s, err := service()
	if err != nil {
		if r.URL.Path == "/healthz" {
			// A restart would not fix the configuration.
			w.Write([]byte("ok\n"))
			return
		}
		server.Refuse(w, r, &api.Error{Code: api.NotReady, Msg: "the builder's configuration is wrong; its log says where"})
		return
	}
	s.ServeHTTP(w, r)
}

// service makes the Server on the first request, which is a readiness probe, and not in init:
// the template runs "go test" without a configuration. Its result, good or bad, holds until
// the process is restarted, because the environment does not change before. Secrets are read
// again when they change.
var service = sync.OnceValues(func() (*server.Server, error) {
	// Milliseconds: seconds are too coarse to follow one build.
	zerolog.TimeFieldFormat = "2006-01-02T15:04:05.000Z07:00"
	zerolog.ErrorMarshalFunc = func(err error) any { return logged(err) }
	log := zerolog.New(os.Stderr).With().Timestamp().Logger()
	cfg, err := LoadConfig(os.Getenv)
	if err != nil {
		log.Error().Err(err).Msg("not serving")
		return nil, err
	}
	log = log.Level(cfg.LogLevel)
	// A goroutine that writes to a file keeps its processor until the runtime notices.
	// With one processor more, a body of 1 GiB is received in 0.95 of the time. This call ends
	// the runtime's own updates: a CPU limit that changes later is not noticed. Kubernetes
	// starts a new container for a new limit, unless it resizes a pod in place.
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 1)
	s, err := newServer(cfg, log)
	if err != nil {
		log.Error().Err(err).Msg("not serving")
		return nil, err
	}
	logStart(cfg, log)
	onSIGTERM(func() {
		log.Info().Msg("shutting down")
		s.Shutdown()
	})
	return s, nil
})

// onSIGTERM has f called at the first SIGTERM that comes after onSIGTERM has returned. of-watchdog
// passes SIGTERM on at once. The template then serves for another healthcheck_interval, and waits for
// running requests.
func onSIGTERM(f func()) {
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	go func() {
		<-term
		f()
	}()
}

// newServer makes the packages out of their parts of cfg, and connects them.
func newServer(cfg *Config, log zerolog.Logger) (*server.Server, error) {
	r := cfg.Registry
	r.File, r.Log = cfg.Secret(cfg.RegistryConfig), log
	r.CAFiles = make(map[string]string)
	for host, name := range cfg.RegistryCA {
		r.CAFiles[host] = cfg.Secret(name)
	}
	credentials := registry.New(r)

	b := cfg.Buildkit
	b.CAFile, b.CertFile, b.KeyFile = cfg.Secret(cfg.BuildkitCA), cfg.Secret(cfg.BuildkitCert), cfg.Secret(cfg.BuildkitKey)
	b.Credentials, b.Log = credentials, log
	var shared *sharedRecords // nil without NATS
	if cfg.NATSURL != "" {
		b.Elsewhere = func() (map[string]int, bool) {
			load := shared.Elsewhere()
			return load.Daemons, load.Complete
		}
	}
	solver, err := buildkit.New(b)
	if err != nil {
		return nil, err
	}

	s := cfg.Server
	s.Solver, s.Version, s.Log = solver, Version, log
	if s.Contexts, err = newContexts(cfg, credentials, log); err != nil {
		return nil, err
	}
	s.PayloadSecret = func() ([]byte, error) { return cfg.ReadSecret(cfg.PayloadSecret, false) }
	if cfg.NATSURL == "" {
		s.Records = memory.New(memory.Default)
	} else {
		if shared, err = newRecords(cfg, solver.Seats, log); err != nil {
			return nil, err
		}
		s.Records, s.Elsewhere, s.PayloadSecret = shared.Store, shared.Elsewhere, shared.payloadSecret
	}
	s.BuildSecretsKey = func() ([]byte, error) {
		key, err := cfg.ReadSecret(cfg.BuildSecretsKey, true)
		return bytes.TrimSpace(key), err
	}
	s.GitCredentials = func() ([]byte, error) { return cfg.ReadSecret(cfg.GitCredentials, true) }
	s.FallbackSecret = cfg.FallbackSecret
	s.OwnRepositories = cfg.ownRepositories()
	directory, err := newTenants(cfg, s.PayloadSecret, log)
	if err != nil {
		return nil, err
	}
	if directory != nil {
		s.Tenants, s.TenantsStale = directory, directory.Stale
		directory.BeforeChange(func(set *tenants.Set) {
			if err := solver.SetPools(set.Pools); err != nil {
				log.Error().Err(err).Msg("a pool of the tenants cannot be used")
			}
		})
	}
	srv := server.New(s)
	if shared != nil {
		shared.server.Store(srv)
	}
	if directory != nil {
		directory.OnChange(srv.TenantsChanged)
		// It follows the files for as long as the process lives.
		go directory.Run(context.Background())
	}
	return srv, nil
}

// sharedRecords are records in NATS, sealed with keys that are derived from the payload secret.
type sharedRecords struct {
	*jetstream.Store
	cfg    *Config
	log    zerolog.Logger
	server atomic.Pointer[server.Server] // is asked what became of a build

	mu  sync.Mutex
	sum [sha256.Size]byte // of the payload secret whose keys the store has
}

// newRecords connects in the background. daemons is a jetstream.Options.Daemons.
func newRecords(cfg *Config, daemons func() map[string]int, log zerolog.Logger) (*sharedRecords, error) {
	r := &sharedRecords{cfg: cfg, log: log}
	var access jetstream.Access
	for name, path := range map[string]*string{cfg.NATSCredential: &access.Credential, cfg.NATSCA: &access.CA} {
		if _, err := os.Stat(cfg.Secret(name)); err == nil {
			*path = cfg.Secret(name)
		}
	}
	var err error
	r.Store, err = jetstream.Open(jetstream.Options{
		URL:  cfg.NATSURL,
		NATS: access.Options(),
		// Nobody is let in before the payload secret has been read.
		Roots:    [][]byte{cfg.FallbackSecret},
		Replicas: cfg.NATSReplicas,
		Daemons:  daemons,
		Ask:      r.ask,
		Problem:  func(err error) { log.Warn().Err(err).Msg("the store of records is in trouble") },
	})
	if err != nil {
		return nil, fmt.Errorf("nats_url: %w", err)
	}
	r.payloadSecret() // with disable_hmac it need not be there
	return r, nil
}

// ask is a jetstream.Options.Ask. Before there is a Server, nobody knows what became of a build.
func (r *sharedRecords) ask(ctx context.Context, rec records.Record) records.Record {
	if s := r.server.Load(); s != nil {
		return s.Became(ctx, rec)
	}
	return rec
}

// payloadSecret is a server.Config.PayloadSecret. Whenever the secret changes, the store gets its
// keys: records stay readable while the old line is in the file.
func (r *sharedRecords) payloadSecret() ([]byte, error) {
	file, err := r.cfg.ReadSecret(r.cfg.PayloadSecret, false)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(file)
	r.mu.Lock()
	defer r.mu.Unlock()
	keys, _ := signature.ParseKeys(file)
	if sum == r.sum || len(keys) == 0 {
		return file, nil
	}
	if err := r.SetRoots(keys); err != nil {
		r.log.Error().Err(err).Msg("records keep their old keys")
		return file, nil
	}
	r.sum = sum
	return file, nil
}

// newTenants returns nil if nobody signs. A file of tenants is an error then.
func newTenants(cfg *Config, payloadSecret func() ([]byte, error), log zerolog.Logger) (*tenants.Directory, error) {
	t := tenants.Config{
		Needed:        len(cfg.TenantsFiles) > 0,
		PayloadSecret: payloadSecret,
		AllowedImages: cfg.Server.AllowedImages,
		Daemons:       cfg.Buildkit.Addrs,
		Log:           log,
	}
	names := cfg.TenantsFiles
	if !t.Needed {
		names = []string{defaultTenants}
	}
	for _, name := range names {
		t.Files = append(t.Files, cfg.Secret(name))
	}
	if !cfg.Server.DisableHMAC {
		return tenants.Open(t), nil
	}
	for _, path := range t.Files {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("looking for %q: %w", path, cmp.Or(err, errTenantsUnsigned))
		}
	}
	return nil, nil
}

// newContexts returns nil if no repository is configured for contexts.
func newContexts(cfg *Config, credentials *registry.Credentials, log zerolog.Logger) (server.Contexts, error) {
	c := cfg.Contexts
	if c.Repository == "" {
		return nil, nil
	}
	c.Login, c.RootCAs, c.Log = credentials.Login, credentials.RootCAs, log
	store, err := contexts.New(c)
	if err != nil {
		return nil, err
	}
	// It deletes old contexts for as long as the process lives.
	go store.Run(context.Background())
	return store, nil
}

// logStart logs what the builder is, and warns of what is dangerous in its configuration.
func logStart(cfg *Config, log zerolog.Logger) {
	log.Info().Str("version", Version).Strs("buildkit_addr", cfg.Buildkit.Addrs).Int("max_builds", cfg.Server.MaxBuilds).Msg("serving")
	if cfg.Server.DisableHMAC {
		// At every start, whatever log_level is.
		log.Log().Str("level", "warn").Msg("disable_hmac is set: anybody who can reach this function can build and push")
	}
	for _, name := range shorterTimeouts(cfg.Server.BuildTimeout, os.Getenv) {
		log.Warn().Str("variable", name).Str("value", os.Getenv(name)).Stringer("build_timeout", cfg.Server.BuildTimeout).
			Msg("of-watchdog would cut a long build off before its verdict: set it above the sum of timeouts that stack.yml explains")
	}
}

// shorterTimeouts returns the variables of of-watchdog and the template whose timeouts would
// end a build before buildTimeout does. Their defaults of 30 s would. A timeout a little above
// buildTimeout is not named, though a build that waits for a slot, or moves to another daemon,
// takes longer: stack.yml has the sum.
func shorterTimeouts(buildTimeout time.Duration, getenv func(string) string) []string {
	var short []string
	for _, name := range []string{"write_timeout", "exec_timeout"} {
		// An exec_timeout of zero is no timeout; write_timeout cannot be zero.
		if d, err := tenants.ParseDuration(getenv(name)); err != nil || d > 0 && d <= buildTimeout {
			short = append(short, name)
		}
	}
	return short
}

// maxLogged bounds an error in the log, in bytes. of-watchdog stops reading the function's output
// at a line of 64 KiB, and one byte can take six in JSON.
const maxLogged = 8 << 10

// logged is the text of err without the secrets in its URLs.
func logged(err error) string {
	text := redact.URLs(err.Error())
	if len(text) > maxLogged {
		return strings.ToValidUTF8(text[:maxLogged], "") + " (cut)"
	}
	return text
}
