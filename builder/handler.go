// Package function is the builder as an OpenFaaS function: it reads the
// configuration, wires the parts together, and hands every request to them.
package function

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/buildkit"
	"handler/function/contexts"
	"handler/function/redact"
	"handler/function/registry"
	"handler/function/server"
)

// Version is what GET / and the log say this is.
const Version = "0.1.0"

// Handle serves every route of the builder.
func Handle(w http.ResponseWriter, r *http.Request) {
	s, err := service()
	if err != nil {
		if r.URL.Path == "/healthz" {
			// It serves, and starting it again would mend nothing.
			w.Write([]byte("ok\n"))
			return
		}
		server.Refuse(w, r, &api.Error{Code: api.NotReady, Msg: "the builder's configuration is wrong; its log says what"})
		return
	}
	s.ServeHTTP(w, r)
}

// service is made on the first request, which readiness probes send, and not
// in init: the template runs "go test" where there is no configuration. What it
// came to holds until a restart, as the environment does; secrets are read again
// when they change.
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
	// With one processor more, a body of 1 GiB is received in 0.95 of the time.
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 1)
	s, err := newServer(cfg, log)
	if err != nil {
		log.Error().Err(err).Msg("not serving")
		return nil, err
	}
	go func() {
		// of-watchdog passes SIGTERM on at once; the template then serves for
		// healthcheck_interval more and waits for the requests that run.
		term := make(chan os.Signal, 1)
		signal.Notify(term, syscall.SIGTERM)
		<-term
		log.Info().Msg("shutting down")
		s.Shutdown()
	}()
	return s, nil
})

func newServer(cfg *Config, log zerolog.Logger) (*server.Server, error) {
	registryCA := make(map[string]string)
	for host, name := range cfg.RegistryCA {
		registryCA[host] = cfg.Secret(name)
	}
	credentials := registry.New(registry.Config{
		File:               cfg.Secret(cfg.RegistryConfig),
		TokenHosts:         cfg.TokenHosts,
		TokenPaths:         cfg.TokenPaths,
		CAFiles:            registryCA,
		AllowBasic:         cfg.AllowBasic,
		CreateRepositories: cfg.CreateRepositories,
		Log:                log,
	})
	solver, err := buildkit.New(buildkit.Config{
		Addrs:           cfg.BuildkitAddrs,
		ServerName:      cfg.BuildkitServerName,
		CAFile:          cfg.Secret(cfg.BuildkitCA),
		CertFile:        cfg.Secret(cfg.BuildkitCert),
		KeyFile:         cfg.Secret(cfg.BuildkitKey),
		BuildTimeout:    cfg.BuildTimeout,
		PushTimeout:     cfg.PushTimeout,
		StallTimeout:    cfg.StallTimeout,
		DaemonBuilds:    cfg.DaemonBuilds,
		DefaultPlatform: cfg.DefaultPlatform,
		CacheRepository: cfg.CacheRepository,
		Compression:     cfg.ImageCompression,
		AllowSyntax:     cfg.AllowSyntax,
		Credentials:     credentials,
		Log:             log,
	})
	if err != nil {
		return nil, err
	}
	store, err := newContexts(cfg, credentials, log)
	if err != nil {
		return nil, err
	}
	s := server.New(server.Config{
		Solver:        solver,
		Contexts:      store,
		PayloadSecret: func() ([]byte, error) { return cfg.ReadSecret(cfg.PayloadSecret, false) },
		BuildSecretsKey: func() ([]byte, error) {
			key, err := cfg.ReadSecret(cfg.BuildSecretsKey, true)
			return bytes.TrimSpace(key), err
		},
		ContextHosts:     cfg.ContextHosts,
		GitCredentials:   func() ([]byte, error) { return cfg.ReadSecret(cfg.GitCredentials, true) },
		DisableHMAC:      cfg.DisableHMAC,
		RequireTimestamp: cfg.RequireTimestamp,
		FallbackSecret:   cfg.FallbackSecret,
		AllowedImages:    cfg.AllowedImages,
		OwnRepositories:  cfg.ownRepositories(),
		Limits:           cfg.Limits,
		SpoolMemory:      cfg.SpoolMemory,
		TempDir:          cfg.TempDir,
		SpoolBytes:       cfg.SpoolBytes,
		MaxBuilds:        cfg.MaxBuilds,
		MaxUploads:       cfg.MaxUploads,
		QueueWait:        cfg.QueueWait,
		BuildTimeout:     cfg.BuildTimeout,
		ShutdownTimeout:  cfg.ShutdownTimeout,
		UploadMinRate:    cfg.UploadMinRate,
		UploadGrace:      cfg.UploadGrace,
		Version:          Version,
		Log:              log,
	})
	log.Info().Str("version", Version).Strs("buildkit_addr", cfg.BuildkitAddrs).Int("max_builds", cfg.MaxBuilds).Msg("serving")
	if cfg.DisableHMAC {
		// At every start, whatever log_level is.
		log.Log().Str("level", "warn").Msg("disable_hmac is set: anybody who can reach this function can build and push")
	}
	for _, name := range shorterTimeouts(cfg, os.Getenv) {
		log.Warn().Str("variable", name).Str("value", os.Getenv(name)).Stringer("build_timeout", cfg.BuildTimeout).
			Msg("of-watchdog would cut a long build off before its verdict: set it above build_timeout")
	}
	return s, nil
}

// maxLogged bounds an error in the log: of-watchdog stops reading a function's
// output at a line of 64 KiB, and JSON can take six bytes for one.
const maxLogged = 8 << 10

// logged is err without what its URLs have that is secret.
func logged(err error) string {
	text := redact.URLs(err.Error())
	if len(text) > maxLogged {
		return strings.ToValidUTF8(text[:maxLogged], "") + " (cut)"
	}
	return text
}

// newContexts is nil without a repository for them.
func newContexts(cfg *Config, credentials *registry.Credentials, log zerolog.Logger) (server.Contexts, error) {
	if cfg.ContextRepository == "" {
		return nil, nil
	}
	store, err := contexts.New(contexts.Config{
		Repository: cfg.ContextRepository,
		MaxAge:     cfg.ContextMaxAge,
		Login: func(ctx context.Context, host, repository string) (authn.AuthConfig, error) {
			l, err := credentials.Login(ctx, host, repository)
			return authn.AuthConfig{Username: l.Username, Password: l.Password, IdentityToken: l.IdentityToken, RegistryToken: l.RegistryToken}, err
		},
		RootCAs: credentials.RootCAs,
		Log:     log,
	})
	if err != nil {
		return nil, err
	}
	// It deletes old contexts for as long as the process lives.
	go store.Run(context.Background())
	return store, nil
}

// shorterTimeouts are the variables of of-watchdog and the template whose
// timeouts end a build before its own does. Their defaults, 30 s, do too.
func shorterTimeouts(cfg *Config, getenv func(string) string) []string {
	var short []string
	for _, name := range []string{"write_timeout", "exec_timeout"} {
		// Zero is no timeout to exec_timeout; write_timeout cannot be zero.
		if d, err := parseDuration(getenv(name)); err != nil || d > 0 && d <= cfg.BuildTimeout {
			short = append(short, name)
		}
	}
	return short
}
