package function

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/go-units"
	"github.com/rs/zerolog"

	"handler/function/buildconfig"
	"handler/function/buildkit"
	"handler/function/contexts"
	"handler/function/hosts"
	"handler/function/payload"
	"handler/function/registry"
	"handler/function/repository"
	"handler/function/server"
	"handler/function/tenants"
)

// Config is the function's configuration. Buildkit, Registry, Contexts and Server configure the
// packages of these names; newServer adds their secrets, their logs, and the packages that they
// need. The comment of each field names its variables. CONFIGURATION.md has the defaults.
type Config struct {
	// default_platform, allow_syntax, from_unasked, cache_repository, image_compression,
	// buildkit_addr, buildkit_server_name, build_timeout, push_timeout, stall_timeout,
	// daemon_builds
	Buildkit buildkit.Config

	// allow_basic, create_repositories, token_hosts, token_paths, registry_mirrors
	Registry registry.Config

	// context_repository (empty refuses contexts that are sent ahead), context_max_age
	Contexts contexts.Config

	// disable_hmac, require_timestamp, default_platform, allowed_images, context_hosts,
	// metrics_tenants, max_builds, max_uploads, queue_wait, build_timeout, shutdown_timeout,
	// upload_min_rate, upload_grace, max_body_bytes, max_unpacked_bytes, max_entries,
	// max_path_bytes, max_names_bytes, max_config_bytes, max_secrets_bytes,
	// spool_memory_bytes, max_spool_bytes, temp_dir
	Server server.Config

	SecretsDir      string            // secrets_dir
	PayloadSecret   string            // payload_secret_file: a name in SecretsDir, as all below
	BuildkitCA      string            // buildkit_ca_file
	BuildkitCert    string            // buildkit_cert_file
	BuildkitKey     string            // buildkit_key_file
	RegistryConfig  string            // registry_config_file
	RegistryCA      map[string]string // registry_ca: by host
	BuildSecretsKey string            // build_secrets_key_file
	GitCredentials  string            // git_credentials_file

	// NATS keeps the records of builds. Without an address they are in this process's memory.
	NATSURL        string // nats_url
	NATSReplicas   int    // nats_replicas: of each stream that this process creates
	NATSCredential string // nats_credential_file
	NATSCA         string // nats_ca_file

	// TenantsFiles are names in SecretsDir too: tenants_file. Nil is defaultTenants, which
	// need not be there.
	TenantsFiles []string

	LogLevel zerolog.Level // log_level

	// FallbackSecret is random. It keys isolation if there is no payload secret.
	FallbackSecret []byte
}

// LoadConfig reads the environment through getenv. Its error names every variable with a wrong
// value.
func LoadConfig(getenv func(string) string) (*Config, error) {
	e := &environment{getenv: getenv}
	buildTimeout := e.duration("build_timeout", 15*time.Minute)
	c := &Config{
		Buildkit: buildkit.Config{
			Addrs:           e.list("buildkit_addr", "tcp://buildkitd.openfaas:1234"),
			ServerName:      e.text("buildkit_server_name", "buildkitd"),
			BuildTimeout:    buildTimeout,
			PushTimeout:     e.duration("push_timeout", 5*time.Minute),
			StallTimeout:    e.duration("stall_timeout", 10*time.Minute),
			DaemonBuilds:    int(e.number("daemon_builds", 4)),
			DefaultPlatform: e.text("default_platform", ""),
			CacheRepository: e.repository("cache_repository"),
			Compression:     e.compression("image_compression", "gzip"),
			AllowSyntax:     e.boolean("allow_syntax", false),
			Unasked:         parsed(e, "from_unasked", repository.ParsePattern),
		},
		Registry: registry.Config{
			TokenHosts:         parsed(e, "token_hosts", registry.ParseTokenHost),
			TokenPaths:         parsed(e, "token_paths", registry.ParseTokenPath),
			Mirrors:            parsed(e, "registry_mirrors", registry.ParseMirror),
			AllowBasic:         e.boolean("allow_basic", true),
			CreateRepositories: e.boolean("create_repositories", false),
		},
		Contexts: contexts.Config{
			Repository: e.contextRepository("context_repository"),
			MaxAge:     e.duration("context_max_age", 48*time.Hour),
		},
		Server: server.Config{
			DisableHMAC:      e.boolean("disable_hmac", false),
			RequireTimestamp: e.boolean("require_timestamp", false),
			DefaultPlatform:  e.text("default_platform", ""),
			AllowedImages:    parsed(e, "allowed_images", repository.ParsePrefix),
			ContextHosts:     e.contextHosts("context_hosts"),
			MetricsTenants:   e.boolean("metrics_tenants", false),
			MaxBuilds:        int(e.number("max_builds", 4)),
			MaxUploads:       int(e.number("max_uploads", 16)),
			QueueWait:        e.duration("queue_wait", 10*time.Minute),
			BuildTimeout:     buildTimeout,
			ShutdownTimeout:  e.duration("shutdown_timeout", 20*time.Second),
			UploadMinRate:    e.size("upload_min_rate", 64*units.KiB),
			UploadGrace:      e.duration("upload_grace", 10*time.Second),
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
		},

		SecretsDir:      e.text("secrets_dir", "/var/openfaas/secrets"),
		PayloadSecret:   e.text("payload_secret_file", "payload-secret"),
		BuildkitCA:      e.text("buildkit_ca_file", "buildkit-ca"),
		BuildkitCert:    e.text("buildkit_cert_file", "buildkit-cert"),
		BuildkitKey:     e.text("buildkit_key_file", "buildkit-key"),
		RegistryConfig:  e.text("registry_config_file", "registry-config"),
		RegistryCA:      e.secretsByHost("registry_ca"),
		BuildSecretsKey: e.text("build_secrets_key_file", "build-secrets-key"),
		GitCredentials:  e.text("git_credentials_file", "git-credentials"),
		TenantsFiles:    e.secrets("tenants_file"),
		NATSURL:         e.text("nats_url", ""),
		NATSReplicas:    int(e.number("nats_replicas", 1)),
		NATSCredential:  e.text("nats_credential_file", "nats-credential"),
		NATSCA:          e.text("nats_ca_file", "nats-ca"),

		LogLevel:       e.level("log_level", zerolog.InfoLevel),
		FallbackSecret: []byte(rand.Text()),
	}
	if c.Server.DisableHMAC && len(c.TenantsFiles) > 0 {
		e.errs = append(e.errs, fmt.Errorf("tenants_file: %w", errTenantsUnsigned))
	}
	if err := errors.Join(e.errs...); err != nil {
		return nil, fmt.Errorf("reading the environment: %w", err)
	}
	return c, nil
}

// errTenantsUnsigned keeps a file of tenants from being ignored.
var errTenantsUnsigned = errors.New("with disable_hmac nobody knows whose a request is: remove one of the two")

// environment reads variables, and gathers the errors of all of them.
type environment struct {
	getenv func(string) string
	errs   []error
}

func (e *environment) wrong(name, value, want string) {
	e.errs = append(e.errs, fmt.Errorf("%s: %q is not %s", name, value, want))
}

func (e *environment) unreadable(name, value string, err error) {
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
		e.wrong(name, v, "a whole number from 1 to 2147483647")
	}
	return n
}

// size reads a number of bytes, or a number with a unit, such as "512MiB".
func (e *environment) size(name string, fallback int64) int64 {
	v := e.text(name, "")
	if v == "" {
		return fallback
	}
	n, err := units.RAMInBytes(v)
	if err != nil || n < 1 {
		e.wrong(name, v, `a size such as "512MiB"`)
	}
	return n
}

// duration reads a duration as the file of tenants has it.
func (e *environment) duration(name string, fallback time.Duration) time.Duration {
	v := e.text(name, "")
	if v == "" {
		return fallback
	}
	d, err := tenants.ParseDuration(v)
	if err != nil || d <= 0 {
		e.wrong(name, v, `a duration such as "15m"`)
	}
	return d
}

func (e *environment) boolean(name string, fallback bool) bool {
	v := e.text(name, "")
	if v == "" {
		return fallback
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		e.wrong(name, v, "true or false")
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

// secretsByHost reads "host=name,host=name", with names of secrets.
func (e *environment) secretsByHost(name string) map[string]string {
	m := make(map[string]string)
	for _, v := range e.list(name) {
		key, value, ok := strings.Cut(v, "=")
		if !ok || key == "" || value == "" || value != filepath.Base(value) {
			e.wrong(name, v, "host=name of a secret")
			continue
		}
		host, err := hosts.Parse(key)
		if err != nil {
			e.unreadable(name, v, err)
			continue
		}
		if m[host.String()] != "" {
			e.wrong(name, v, "the only entry of its host")
		}
		m[host.String()] = value
	}
	return m
}

// secrets reads a list of names of secrets.
func (e *environment) secrets(name string) []string {
	list := e.list(name)
	for i, v := range list {
		if v != filepath.Base(v) || v == "." || v == ".." || slices.Contains(list[:i], v) {
			e.wrong(name, v, "the name of a secret, or is there twice")
		}
	}
	return list
}

// parsed reads a list, and parses each entry.
func parsed[T any](e *environment, name string, parse func(string) (T, error)) []T {
	var list []T
	for _, v := range e.list(name) {
		one, err := parse(v)
		if err != nil {
			e.unreadable(name, v, err)
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
			e.unreadable(name, v, err)
		}
	}
	return list
}

// repository reads a repository without a tag. It returns nil if the variable is not set.
func (e *environment) repository(name string) reference.Named {
	v := e.text(name, "")
	if v == "" {
		return nil
	}
	named, err := reference.ParseNormalizedNamed(v)
	if err != nil || !reference.IsNameOnly(named) {
		e.wrong(name, v, `a repository such as "ghcr.io/acme/cache"`)
		return nil
	}
	if _, err := hosts.Parse(reference.Domain(named)); err != nil {
		e.unreadable(name, v, err)
	}
	return named
}

// contextRepository reads a repository that may begin with "http://". It checks only the host:
// contexts.New checks everything else.
func (e *environment) contextRepository(name string) string {
	v := e.text(name, "")
	if host, _, ok := strings.Cut(strings.TrimPrefix(v, "http://"), "/"); ok {
		if _, err := hosts.Parse(host); err != nil {
			e.unreadable(name, v, err)
		}
	}
	return v
}

func (e *environment) compression(name, fallback string) buildkit.Compression {
	v := e.text(name, fallback)
	c, err := buildkit.ParseCompression(v)
	if err != nil {
		e.wrong(name, v, `gzip or zstd, or with a level, such as "gzip:6"`)
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
		e.wrong(name, v, "a level such as info")
	}
	return level
}

// ownRepositories are the repositories where the builder keeps its cache and its contexts,
// normalised. A name that the reference library does not read is left out: no image can have
// it.
func (c *Config) ownRepositories() []string {
	var own []string
	if c.Buildkit.CacheRepository != nil {
		own = append(own, c.Buildkit.CacheRepository.Name())
	}
	if named, err := reference.ParseNormalizedNamed(strings.TrimPrefix(c.Contexts.Repository, "http://")); err == nil {
		own = append(own, named.Name())
	}
	return own
}

// defaultTenants is the name of the file of tenants where no other is named.
const defaultTenants = "tenants"

// Secret is the path of a secret's file.
func (c *Config) Secret(name string) string { return filepath.Join(c.SecretsDir, name) }

// maxSecret bounds a secret's file. The largest is a Docker config with many registries.
const maxSecret = 1 << 20

// ReadSecret reads a secret. An optional secret that does not exist is empty.
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
