package function

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/go-units"
	"github.com/rs/zerolog"

	"handler/function/buildconfig"
	"handler/function/buildkit"
	"handler/function/hosts"
	"handler/function/payload"
	"handler/function/registry"
)

// Config is the function's configuration: its environment, and the names of
// its secrets' files. Each field says the variable it comes from; the
// README's table has the defaults.
type Config struct {
	BuildkitAddrs      []string // buildkit_addr: tcp://host:port or unix:///path, one or several
	BuildkitServerName string   // buildkit_server_name: in each daemon's certificate

	SecretsDir      string // secrets_dir
	PayloadSecret   string // payload_secret_file, a name in SecretsDir like those below
	BuildkitCA      string // buildkit_ca_file
	BuildkitCert    string // buildkit_cert_file
	BuildkitKey     string // buildkit_key_file
	RegistryConfig  string // registry_config_file
	BuildSecretsKey string // build_secrets_key_file
	GitCredentials  string // git_credentials_file

	MaxBuilds       int           // max_builds
	DaemonBuilds    int           // daemon_builds
	MaxUploads      int           // max_uploads
	QueueWait       time.Duration // queue_wait
	BuildTimeout    time.Duration // build_timeout
	PushTimeout     time.Duration // push_timeout
	StallTimeout    time.Duration // stall_timeout
	ShutdownTimeout time.Duration // shutdown_timeout
	UploadMinRate   int64         // upload_min_rate: bytes per second
	UploadGrace     time.Duration // upload_grace

	DefaultPlatform    string               // default_platform: empty is the daemon's own
	AllowedImages      []string             // allowed_images: repository prefixes; empty allows any
	DisableHMAC        bool                 // disable_hmac
	RequireTimestamp   bool                 // require_timestamp
	AllowSyntax        bool                 // allow_syntax
	AllowBasic         bool                 // allow_basic
	CreateRepositories bool                 // create_repositories
	TokenHosts         []registry.TokenHost // token_hosts
	TokenPaths         []registry.TokenPath // token_paths
	RegistryCA         map[string]string    // registry_ca: host=name in SecretsDir

	ImageCompression  buildkit.Compression // image_compression
	CacheRepository   reference.Named      // cache_repository: nil keeps no cache in a registry
	ContextRepository string               // context_repository: empty takes no contexts by digest
	ContextMaxAge     time.Duration        // context_max_age
	ContextHosts      []string             // context_hosts: of git contexts; empty refuses all

	Limits      payload.Limits // max_body_bytes, max_unpacked_bytes, max_entries, max_path_bytes, max_names_bytes, max_config_bytes, max_secrets_bytes
	SpoolMemory int64          // spool_memory_bytes
	SpoolBytes  int64          // max_spool_bytes
	TempDir     string         // temp_dir: empty is the system's

	LogLevel zerolog.Level // log_level

	// FallbackSecret keys isolation where there is no payload secret.
	FallbackSecret []byte
}

// LoadConfig reads the environment through getenv. Its error names every
// variable that is wrong.
func LoadConfig(getenv func(string) string) (*Config, error) {
	e := &environment{getenv: getenv}
	c := &Config{
		BuildkitAddrs:      e.list("buildkit_addr", "tcp://buildkitd.openfaas:1234"),
		BuildkitServerName: e.text("buildkit_server_name", "buildkitd"),

		SecretsDir:      e.text("secrets_dir", "/var/openfaas/secrets"),
		PayloadSecret:   e.text("payload_secret_file", "payload-secret"),
		BuildkitCA:      e.text("buildkit_ca_file", "buildkit-ca"),
		BuildkitCert:    e.text("buildkit_cert_file", "buildkit-cert"),
		BuildkitKey:     e.text("buildkit_key_file", "buildkit-key"),
		RegistryConfig:  e.text("registry_config_file", "registry-config"),
		BuildSecretsKey: e.text("build_secrets_key_file", "build-secrets-key"),
		GitCredentials:  e.text("git_credentials_file", "git-credentials"),

		MaxBuilds:       int(e.number("max_builds", 4)),
		DaemonBuilds:    int(e.number("daemon_builds", 4)),
		MaxUploads:      int(e.number("max_uploads", 16)),
		QueueWait:       e.duration("queue_wait", 10*time.Minute),
		BuildTimeout:    e.duration("build_timeout", 15*time.Minute),
		PushTimeout:     e.duration("push_timeout", 5*time.Minute),
		StallTimeout:    e.duration("stall_timeout", 10*time.Minute),
		ShutdownTimeout: e.duration("shutdown_timeout", 20*time.Second),
		UploadMinRate:   e.size("upload_min_rate", 64*units.KiB),
		UploadGrace:     e.duration("upload_grace", 10*time.Second),

		DefaultPlatform:    e.text("default_platform", ""),
		AllowedImages:      e.repositories("allowed_images"),
		DisableHMAC:        e.boolean("disable_hmac", false),
		RequireTimestamp:   e.boolean("require_timestamp", false),
		AllowSyntax:        e.boolean("allow_syntax", false),
		AllowBasic:         e.boolean("allow_basic", true),
		CreateRepositories: e.boolean("create_repositories", false),
		TokenHosts:         parsed(e, "token_hosts", registry.ParseTokenHost),
		TokenPaths:         parsed(e, "token_paths", registry.ParseTokenPath),
		RegistryCA:         e.pairs("registry_ca"),

		ImageCompression:  e.compression("image_compression", "gzip"),
		CacheRepository:   e.repository("cache_repository"),
		ContextRepository: e.contextRepository("context_repository"),
		ContextMaxAge:     e.duration("context_max_age", 48*time.Hour),
		ContextHosts:      e.contextHosts("context_hosts"),

		Limits: payload.Limits{
			Body:     e.size("max_body_bytes", 512*units.MiB),
			Unpacked: e.size("max_unpacked_bytes", 2*units.GiB),
			Entries:  int(e.number("max_entries", 200_000)),
			Path:     int(e.size("max_path_bytes", 4096)),
			Names:    e.size("max_names_bytes", 32*units.MiB),
			Config:   e.size("max_config_bytes", units.MiB),
			Secrets:  e.size("max_secrets_bytes", 2*units.MiB),
		},
		SpoolMemory: e.size("spool_memory_bytes", 4*units.MiB),
		SpoolBytes:  e.size("max_spool_bytes", 8*units.GiB),
		TempDir:     e.text("temp_dir", os.TempDir()),

		LogLevel:       e.level("log_level", zerolog.InfoLevel),
		FallbackSecret: []byte(rand.Text()),
	}
	if err := errors.Join(e.errs...); err != nil {
		return nil, fmt.Errorf("reading the environment: %w", err)
	}
	return c, nil
}

// environment reads variables and gathers what is wrong with them.
type environment struct {
	getenv func(string) string
	errs   []error
}

func (e *environment) fail(name, value, want string) {
	e.errs = append(e.errs, fmt.Errorf("%s: %q is not %s", name, value, want))
}

func (e *environment) failed(name, value string, err error) {
	e.errs = append(e.errs, fmt.Errorf("%s: reading %q: %w", name, value, err))
}

func (e *environment) text(name, fallback string) string {
	if v := strings.TrimSpace(e.getenv(name)); v != "" {
		return v
	}
	return fallback
}

func (e *environment) number(name string, fallback int64) int64 {
	v := e.text(name, "")
	if v == "" {
		return fallback
	}
	n, err := strconv.ParseInt(v, 10, 32)
	if err != nil || n < 1 {
		e.fail(name, v, "a whole number above 0")
	}
	return n
}

// size takes bytes, plainly or with a unit of 1024s: "512MiB".
func (e *environment) size(name string, fallback int64) int64 {
	v := e.text(name, "")
	if v == "" {
		return fallback
	}
	n, err := units.RAMInBytes(v)
	if err != nil || n < 1 {
		e.fail(name, v, `a size such as "512MiB"`)
	}
	return n
}

// duration takes Go's form, or whole seconds as of-watchdog does.
func (e *environment) duration(name string, fallback time.Duration) time.Duration {
	v := e.text(name, "")
	if v == "" {
		return fallback
	}
	d, err := parseDuration(v)
	if err != nil || d <= 0 {
		e.fail(name, v, `a duration such as "15m"`)
	}
	return d
}

func parseDuration(v string) (time.Duration, error) {
	if n, err := strconv.ParseInt(v, 10, 32); err == nil {
		return time.Duration(n) * time.Second, nil
	}
	return time.ParseDuration(v)
}

func (e *environment) boolean(name string, fallback bool) bool {
	v := e.text(name, "")
	if v == "" {
		return fallback
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		e.fail(name, v, "true or false")
	}
	return b
}

func (e *environment) list(name string, fallback ...string) []string {
	var list []string
	for v := range strings.SplitSeq(e.getenv(name), ",") {
		if v = strings.TrimSpace(v); v != "" {
			list = append(list, v)
		}
	}
	if len(list) == 0 {
		return fallback
	}
	return list
}

// pairs takes "host=value,host=value".
func (e *environment) pairs(name string) map[string]string {
	m := make(map[string]string)
	for _, v := range e.list(name) {
		key, value, ok := strings.Cut(v, "=")
		if !ok || key == "" || value == "" || value != filepath.Base(value) {
			e.fail(name, v, "host=name of a secret")
			continue
		}
		host, err := hosts.Parse(key)
		if err != nil {
			e.failed(name, v, err)
			continue
		}
		if m[host.String()] != "" {
			e.fail(name, v, "the only entry of its host")
		}
		m[host.String()] = value
	}
	return m
}

// parsed is a list of what parse takes.
func parsed[T any](e *environment, name string, parse func(string) (T, error)) []T {
	var list []T
	for _, v := range e.list(name) {
		one, err := parse(v)
		if err != nil {
			e.failed(name, v, err)
			continue
		}
		list = append(list, one)
	}
	return list
}

func (e *environment) contextHosts(name string) []string {
	list := e.list(name)
	for _, v := range list {
		if _, _, err := buildconfig.ContextHost(v); err != nil {
			e.failed(name, v, err)
		}
	}
	return list
}

// repositories takes prefixes of repositories, normalised as an image's name
// is: "acme" is docker.io/acme... and "ghcr.io" alone is every one there.
func (e *environment) repositories(name string) []string {
	var list []string
	for _, v := range e.list(name) {
		trimmed := strings.TrimSuffix(v, "/")
		if !strings.Contains(trimmed, "/") && (strings.ContainsAny(trimmed, ".:") || trimmed == "localhost") {
			if _, err := hosts.Parse(trimmed); err != nil {
				e.failed(name, v, err)
			}
			list = append(list, trimmed)
			continue
		}
		named, err := reference.ParseNormalizedNamed(trimmed)
		if err != nil || !reference.IsNameOnly(named) {
			e.fail(name, v, `a repository prefix such as "ghcr.io/acme"`)
			continue
		}
		if _, err := hosts.Parse(reference.Domain(named)); err != nil {
			e.failed(name, v, err)
		}
		prefix := named.Name()
		if !strings.Contains(trimmed, "/") {
			// A name alone is docker.io/library/name to the reference library,
			// but as a prefix people mean the account.
			prefix = "docker.io/" + trimmed
		}
		list = append(list, prefix)
	}
	return list
}

// repository takes one, without a tag; nil where the variable is not set.
func (e *environment) repository(name string) reference.Named {
	v := e.text(name, "")
	if v == "" {
		return nil
	}
	named, err := reference.ParseNormalizedNamed(v)
	if err != nil || !reference.IsNameOnly(named) {
		e.fail(name, v, `a repository such as "ghcr.io/acme/cache"`)
		return nil
	}
	if _, err := hosts.Parse(reference.Domain(named)); err != nil {
		e.failed(name, v, err)
	}
	return named
}

// contextRepository takes one that may have "http://" before it. What else is wrong
// with it the store says that is made of it.
func (e *environment) contextRepository(name string) string {
	v := e.text(name, "")
	if host, _, ok := strings.Cut(strings.TrimPrefix(v, "http://"), "/"); ok {
		if _, err := hosts.Parse(host); err != nil {
			e.failed(name, v, err)
		}
	}
	return v
}

func (e *environment) compression(name, fallback string) buildkit.Compression {
	v := e.text(name, fallback)
	c, err := buildkit.ParseCompression(v)
	if err != nil {
		e.fail(name, v, `gzip or zstd, or with a level, such as "gzip:6"`)
	}
	return c
}

func (e *environment) level(name string, fallback zerolog.Level) zerolog.Level {
	v := e.text(name, "")
	if v == "" {
		return fallback
	}
	level, err := zerolog.ParseLevel(v)
	if err != nil {
		e.fail(name, v, "a level such as info")
	}
	return level
}

// ownRepositories are those that the builder keeps things of its own in,
// normalised. One that the reference library does not take no image can name.
func (c *Config) ownRepositories() []string {
	var own []string
	if c.CacheRepository != nil {
		own = append(own, c.CacheRepository.Name())
	}
	if named, err := reference.ParseNormalizedNamed(strings.TrimPrefix(c.ContextRepository, "http://")); err == nil {
		own = append(own, named.Name())
	}
	return own
}

// Secret is the path of a secret's file.
func (c *Config) Secret(name string) string { return filepath.Join(c.SecretsDir, name) }

// maxSecret bounds a secret's file: a Docker config of many registries is the
// largest.
const maxSecret = 1 << 20

// ReadSecret reads a secret as it is now. With optional, one that does not
// exist is empty.
func (c *Config) ReadSecret(name string, optional bool) ([]byte, error) {
	f, err := os.Open(c.Secret(name))
	if optional && errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err != nil {
		return nil, fmt.Errorf("reading secret %q: %w", name, err)
	}
	if len(data) > maxSecret {
		return nil, fmt.Errorf("reading secret %q: over %d bytes", name, maxSecret)
	}
	return data, nil
}
