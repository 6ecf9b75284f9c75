// Package registry holds the credentials of registries and turns them into
// short-lived tokens for one build at a time. It knows Docker's config.json,
// credential helpers and the distribution token protocol, not BuildKit.
package registry

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/credentials"
	"github.com/docker/cli/cli/config/types"
	"github.com/rs/zerolog"

	"handler/function/clouds"
	"handler/function/hosts"
)

// Config says where credentials come from and where they may go.
type Config struct {
	// File is a Docker config.json, read again when it changes. Empty or
	// absent: every registry is used without credentials.
	File string

	// TokenHosts are the token services that may have a private address or
	// speak plain http, each for its own registry. A token service is named by
	// the registry that a Dockerfile names, so every other must be public.
	TokenHosts []TokenHost

	// CAFiles are PEM files of further root CAs, by the registry's host as
	// image names have it. Each counts for the tokens of that registry alone.
	CAFiles map[string]string

	// AllowBasic lets the daemon have user name and password where a registry
	// asks for Basic authentication.
	AllowBasic bool

	// CreateRepositories lets Prepare make repositories that are missing, in ECR.
	CreateRepositories bool

	Log zerolog.Logger
}

// TokenHost is a registry and the host of its token service.
type TokenHost struct {
	registry string // as serverHost has it
	service  hosts.Host
}

// ParseTokenHost takes "registry=host", with or without ports, and "host" where the
// registry is its own token service. The registry is as image names have it. A
// service without a port has the port of its scheme.
func ParseTokenHost(s string) (TokenHost, error) {
	registry, service, ok := strings.Cut(s, "=")
	if !ok {
		service = registry
	}
	if _, err := hosts.Parse(registry); err != nil {
		return TokenHost{}, err
	}
	h, err := hosts.Parse(service)
	if err != nil {
		return TokenHost{}, err
	}
	return TokenHost{serverHost(registry), h}, nil
}

// Credentials are those of all registries.
type Credentials struct {
	cfg        Config
	tokenHosts map[TokenHost]bool
	caFiles    map[string]string
	clouds     *clouds.Clouds

	helperTimeout time.Duration

	mu      sync.Mutex
	raw     []byte // of the file that parsed last
	bad     []byte // of the file that did not parse, once logged
	current *configfile.ConfigFile
	logged  map[string]bool // helpers whose failure was logged for this file
}

// New reads nothing yet.
func New(cfg Config) *Credentials {
	c := &Credentials{
		cfg:           cfg,
		tokenHosts:    make(map[TokenHost]bool),
		caFiles:       make(map[string]string),
		helperTimeout: helperTimeout,
	}
	for _, h := range cfg.TokenHosts {
		c.tokenHosts[h] = true
	}
	for h, f := range cfg.CAFiles {
		c.caFiles[serverHost(h)] = f
	}
	c.clouds = clouds.New(clouds.Config{Client: c.registryClient, Log: cfg.Log})
	return c
}

// Docker Hub goes by three names: in image names, on the wire, and in
// config.json.
const (
	hubDomain = "docker.io"
	hubHost   = "registry-1.docker.io"
	hubIndex  = "index.docker.io"
	hubKey    = "https://index.docker.io/v1/"
)

// serverHost is the host that is asked for images of domain, in one form: an image
// name may have capitals in it, or the port of https.
func serverHost(domain string) string {
	h, err := hosts.Parse(domain)
	if err != nil {
		return lower(domain)
	}
	switch h = h.Without(hosts.DefaultPort("https")); h.String() {
	case hubDomain, hubIndex:
		return hubHost
	}
	return h.String()
}

// configKeys are the names that config.json may have for host, the one that a
// helper is asked for first.
func configKeys(host string) []string {
	switch host = lower(host); host {
	case hubDomain, hubHost, hubIndex:
		return []string{hubKey, hubDomain, hubIndex, hubHost}
	}
	keys := []string{host}
	// An image name may leave the port of https out.
	if h, port, err := net.SplitHostPort(host); err == nil && port == "443" {
		keys = append(keys, h)
	}
	return keys
}

// load is the config file as it is now. A file that does not parse leaves the
// last one in use that did: it may be half written.
func (c *Credentials) load() (*configfile.ConfigFile, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cfg.File == "" {
		return configfile.New(""), nil
	}
	raw, err := os.ReadFile(c.cfg.File)
	if errors.Is(err, fs.ErrNotExist) {
		raw, err = nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading registry config: %w", err)
	}
	if c.current != nil && bytes.Equal(raw, c.raw) {
		return c.current, nil
	}
	file := configfile.New(c.cfg.File)
	if err := file.LoadFromReader(bytes.NewReader(raw)); err != nil {
		err = fmt.Errorf("reading registry config: %w", err)
		if c.current == nil {
			return nil, err
		}
		if !bytes.Equal(raw, c.bad) {
			c.bad = raw
			c.cfg.Log.Error().Err(err).Msg("keeping the registry credentials read before")
		}
		return c.current, nil
	}
	c.raw, c.bad, c.current, c.logged = raw, nil, file, make(map[string]bool)
	return file, nil
}

// found is what lookup comes to.
type found struct {
	auth  types.AuthConfig
	renew time.Time // when to look again; zero is not before the next build

	// failed is why auth is empty where a cloud has nothing for a registry of
	// its own. It counts once the registry wants more than nothing: a cloud's
	// registries have public images too.
	failed error
}

// lookup finds what is configured for host. Nothing configured is no error. A
// helper named for this host alone must work; a global one that does not leaves
// what the file itself holds.
func (c *Credentials) lookup(ctx context.Context, host string) (found, error) {
	file, err := c.load()
	if err != nil {
		return found{}, err
	}
	keys := configKeys(host)
	helper, global := helperFor(file, host)
	if helper != "" && !global {
		return c.askHelper(ctx, helper, keys[0])
	}
	var failed error
	if helper != "" {
		f, err := c.askHelper(ctx, helper, keys[0])
		if err == nil && f.auth != (types.AuthConfig{}) {
			return f, nil
		}
		if ctx.Err() != nil {
			return found{}, context.Cause(ctx)
		}
		failed = err
	}
	store := credentials.NewFileStore(file)
	for _, key := range keys {
		auth, err := store.Get(key)
		if err != nil {
			return found{}, err
		}
		if auth.Username != "" || auth.IdentityToken != "" || auth.RegistryToken != "" {
			if failed != nil {
				c.logHelper(file, helper, failed)
			}
			return found{auth: auth}, nil
		}
	}
	if clouds.Has(helper) {
		if failed != nil {
			c.cfg.Log.Warn().AnErr("error", errors.Unwrap(failed)).Msg("going on without credentials")
		}
		return found{failed: failed}, nil
	}
	if failed != nil {
		c.logHelper(file, helper, failed)
	}
	return found{}, nil
}

// helperFor is the helper to ask for host, and whether it is the global one. A
// cloud's is not asked for hosts of others.
func helperFor(file *configfile.ConfigFile, host string) (name string, global bool) {
	for _, key := range configKeys(host) {
		if name := file.CredentialHelpers[key]; name != "" {
			return name, false
		}
	}
	name = file.CredentialsStore
	if clouds.Has(name) && !clouds.Owns(name, host) {
		return "", true
	}
	return name, true
}

// Prepare makes the repositories that are missing, where Config says so: those
// that a build is to push to, in ECR, by the same credentials as ecr-login's.
// It is for before the build; its errors are an *api.Error or the context's.
func (c *Credentials) Prepare(ctx context.Context, pushes []reference.Named) error {
	if !c.cfg.CreateRepositories {
		return nil
	}
	for _, ref := range pushes {
		host := serverHost(reference.Domain(ref))
		file, err := c.load()
		if err != nil {
			return unreadable(host, err)
		}
		if helper, _ := helperFor(file, host); helper != "ecr-login" {
			continue
		}
		if err := c.clouds.CreateRepository(ctx, host, reference.Path(ref)); err != nil {
			return cloudError(ctx, err, host, fmt.Sprintf("creating repository %q", reference.Path(ref)))
		}
	}
	return nil
}

// Login is what is configured for a registry, all of it empty if nothing is.
type Login struct {
	Username, Password           string
	IdentityToken, RegistryToken string
}

// Login finds what is configured for a registry that the function itself uses.
func (c *Credentials) Login(ctx context.Context, host string) (Login, error) {
	f, err := c.lookup(ctx, serverHost(host))
	if err == nil {
		err = f.failed
	}
	auth := f.auth
	return Login{auth.Username, auth.Password, auth.IdentityToken, auth.RegistryToken}, err
}

// RootCAs are those that a registry's certificate is checked against: nil is the
// system's.
func (c *Credentials) RootCAs(host string) (*x509.CertPool, error) {
	return c.roots(host, &url.URL{Host: host})
}

// logHelper says once for each content of the file that helper failed.
func (c *Credentials) logHelper(file *configfile.ConfigFile, helper string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current != file || c.logged[helper] {
		return
	}
	c.logged[helper] = true
	c.cfg.Log.Warn().Err(err).Str("credsStore", helper).Msg("using the credentials in the registry config itself")
}

// Build are the credentials as one build may use them: it pushes to the given
// repositories and pulls from any other. It may be used from many goroutines.
func (c *Credentials) Build(pushes []reference.Named) *Build {
	b := &Build{
		creds:  c,
		pushes: make(map[string]bool),
		auths:  make(map[string]func() (found, error)),
		none:   make(map[string]bool),
	}
	for _, ref := range pushes {
		b.pushes[serverHost(reference.Domain(ref))+"/"+reference.Path(ref)] = true
	}
	return b
}

// Build answers for one build.
type Build struct {
	creds  *Credentials
	pushes map[string]bool // by server host, a slash and the repository

	mu    sync.Mutex
	auths map[string]func() (found, error)
	none  map[string]bool // hosts that nothing was found for
}

// auth is lookup once for each host, so that a build runs a helper once, but
// again when what it found has to be renewed.
func (b *Build) auth(ctx context.Context, host string) (found, error) {
	for {
		b.mu.Lock()
		get, again := b.auths[host], true
		if get == nil {
			get, again = sync.OnceValues(func() (found, error) { return b.creds.lookup(ctx, host) }), false
			b.auths[host] = get
		}
		b.mu.Unlock()
		f, err := get()
		b.mu.Lock()
		stale := !f.renew.IsZero() && time.Now().After(f.renew)
		if err != nil || stale {
			// The next call asks again: the first caller may have gone away.
			delete(b.auths, host)
		} else if f.auth == (types.AuthConfig{}) && f.failed == nil {
			b.none[host] = true
		}
		b.mu.Unlock()
		if again && stale && err == nil {
			continue
		}
		return f, err
	}
}

// Anonymous are the hosts that were asked for credentials and had none, in
// order.
func (b *Build) Anonymous() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Sorted(maps.Keys(b.none))
}
