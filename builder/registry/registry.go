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
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"

	"handler/function/api"
	"handler/function/clouds"
	"handler/function/hosts"
)

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
	if err := file.LoadFromReader(bytes.NewReader(bytes.TrimPrefix(raw, []byte(byteOrderMark)))); err != nil {
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

// byteOrderMark is what some editors write before UTF-8.
const byteOrderMark = "\uFEFF"

// found is what lookup comes to.
type found struct {
	auth  types.AuthConfig
	renew time.Time // when to look again; zero is not before the next build

	// failed is why auth is empty where a cloud has nothing for a registry of
	// its own. It counts once the registry wants more than nothing: a cloud's
	// registries have public images too.
	failed error
}

// lookup gets what src says. Nothing there is no error. A helper named for this
// registry must work; a global one that does not leaves what the file itself holds.
func (c *Credentials) lookup(ctx context.Context, file *configfile.ConfigFile, src source) (found, error) {
	if src.own {
		return c.askHelper(ctx, src.helper, src.server)
	}
	var failed error
	if src.helper != "" {
		f, err := c.askHelper(ctx, src.helper, src.server)
		if err == nil && f.auth != (types.AuthConfig{}) {
			return f, nil
		}
		if ctx.Err() != nil {
			return found{}, context.Cause(ctx)
		}
		failed = err
	}
	if src.key != "" {
		if failed != nil {
			c.logHelper(file, src.helper, failed)
		}
		return found{auth: file.AuthConfigs[src.key]}, nil
	}
	if clouds.Has(src.helper) {
		if failed != nil {
			c.cfg.Log.Warn().AnErr("error", errors.Unwrap(failed)).Msg("going on without credentials")
		}
		return found{failed: failed}, nil
	}
	if failed != nil {
		c.logHelper(file, src.helper, failed)
	}
	return found{}, nil
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

// Login is what is configured for a registry, all of it empty if nothing is.
type Login struct {
	Username, Password           string
	IdentityToken, RegistryToken string
}

// Login finds what is configured for a repository that the function itself uses.
func (c *Credentials) Login(ctx context.Context, host, repository string) (Login, error) {
	file, err := c.load()
	if err != nil {
		return Login{}, err
	}
	f, err := c.lookup(ctx, file, find(file, host, repository))
	if err == nil {
		err = f.failed
	}
	auth := f.auth
	return Login{auth.Username, auth.Password, auth.IdentityToken, auth.RegistryToken}, err
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
		if find(file, host, reference.Path(ref)).helper != "ecr-login" {
			continue
		}
		if err := c.clouds.CreateRepository(ctx, host, reference.Path(ref)); err != nil {
			return cloudError(ctx, err, host, fmt.Sprintf("creating repository %q", reference.Path(ref)))
		}
	}
	return nil
}

func unreadable(host string, err error) error {
	if _, ok := errors.AsType[*api.Error](err); ok {
		return err
	}
	return &api.Error{Code: api.RegistryFailed, Msg: fmt.Sprintf("registry %s: its credentials cannot be read; the builder's log has the cause", host), Err: err}
}

// RootCAs are those that a registry's certificate is checked against: nil is the
// system's.
func (c *Credentials) RootCAs(host string) (*x509.CertPool, error) {
	return c.roots(host, &url.URL{Host: host})
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

func lower(s string) string { return strings.ToLower(s) }
