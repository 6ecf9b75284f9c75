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
	"github.com/google/go-containerregistry/pkg/authn"

	"handler/function/api"
	"handler/function/clouds"
	"handler/function/hosts"
)

// Credentials are those of all registries.
type Credentials struct {
	cfg        Config
	tokenHosts map[TokenHost]bool
	caFiles    map[string]string   // by host in serverHost's form
	mirrors    map[string]*url.URL // by host in serverHost's form
	clouds     *clouds.Clouds
	proven     *proven

	// fixed is the whole config where it is not a file; nil where it is.
	fixed *configfile.ConfigFile

	helperTimeout time.Duration

	mu      sync.Mutex
	raw     []byte // the content that parsed last
	bad     []byte // the content that last did not parse, and was logged
	current *configfile.ConfigFile
	logged  map[string]bool // helpers whose failure was logged since current was read
}

// New reads nothing yet.
func New(cfg Config) *Credentials {
	c := &Credentials{
		cfg:           cfg,
		tokenHosts:    make(map[TokenHost]bool),
		caFiles:       make(map[string]string),
		mirrors:       make(map[string]*url.URL),
		helperTimeout: helperTimeout,
		proven:        &proven{seen: make(map[string]bool)},
	}
	for _, h := range cfg.TokenHosts {
		c.tokenHosts[h] = true
	}
	for h, f := range cfg.CAFiles {
		c.caFiles[serverHost(h)] = f
	}
	for _, m := range cfg.Mirrors {
		c.mirrors[m.host] = m.where
	}
	c.clouds = clouds.New(clouds.Config{Client: c.registryClient, Log: cfg.Log})
	return c
}

// Of makes the credentials of somebody else out of a Docker config.json: of its "auths"
// alone. A helper would be a program, or the identity, of this installation. Where
// credentials may go, and which CAs are known, is as with c. Without a config there are no
// credentials.
func (c *Credentials) Of(config []byte) (*Credentials, error) {
	file := configfile.New("")
	if len(config) > 0 {
		if err := file.LoadFromReader(bytes.NewReader(config)); err != nil {
			return nil, fmt.Errorf("reading a registry config: %w", err)
		}
	}
	file.CredentialsStore, file.CredentialHelpers = "", nil
	return &Credentials{
		cfg: c.cfg, tokenHosts: c.tokenHosts, caFiles: c.caFiles, mirrors: c.mirrors, clouds: c.clouds,
		proven: c.proven, helperTimeout: c.helperTimeout, fixed: file,
	}, nil
}

// load returns the config file as it is now. If it does not parse, or is empty, it may be half
// written: the last one that parsed stays in use. A file that is gone has no credentials.
func (c *Credentials) load() (*configfile.ConfigFile, error) {
	if c.fixed != nil {
		return c.fixed, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cfg.File == "" {
		return configfile.New(""), nil
	}
	raw, err := os.ReadFile(c.cfg.File)
	gone := errors.Is(err, fs.ErrNotExist)
	if gone {
		raw, err = nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading registry config: %w", err)
	}
	if c.current != nil && bytes.Equal(raw, c.raw) {
		return c.current, nil
	}
	file := configfile.New(c.cfg.File)
	err = file.LoadFromReader(bytes.NewReader(bytes.TrimPrefix(raw, []byte(byteOrderMark))))
	if err == nil && len(raw) == 0 && !gone && c.current != nil {
		err = errors.New("it is empty")
	}
	if err != nil {
		err = fmt.Errorf("reading registry config: %w", err)
		if c.current == nil {
			return nil, err
		}
		if c.bad == nil || !bytes.Equal(raw, c.bad) {
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

// found is the result of lookup.
type found struct {
	auth  types.AuthConfig // empty if there are no credentials
	renew time.Time        // when to look again; zero is at the next build

	// failed is why auth is empty where a cloud's helper failed for one of the
	// cloud's own registries. It becomes an error only when the registry wants
	// credentials: such a registry has public images too.
	failed error
}

// lookup gets the credentials that src points to. It is no error if there are none. A
// helper that is named for this registry must work. If the global one fails, the
// credentials in the file itself count.
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

// logHelper logs that helper failed, once for each content of the file.
func (c *Credentials) logHelper(file *configfile.ConfigFile, helper string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current != file || c.logged[helper] {
		return
	}
	c.logged[helper] = true
	c.cfg.Log.Warn().Err(err).Str("credsStore", helper).Msg("using the credentials in the registry config itself")
}

// Login returns what is configured for a repository that the function itself uses. All of it is
// empty if nothing is.
func (c *Credentials) Login(ctx context.Context, host, repository string) (authn.AuthConfig, error) {
	file, err := c.load()
	if err != nil {
		return authn.AuthConfig{}, err
	}
	f, err := c.lookup(ctx, file, sourceOf(file, host, repository))
	if err == nil {
		err = f.failed
	}
	auth := f.auth
	return authn.AuthConfig{Username: auth.Username, Password: auth.Password, IdentityToken: auth.IdentityToken, RegistryToken: auth.RegistryToken}, err
}

// Prepare is called before a build with the repositories that it pushes to. It creates
// those that are missing, if they are in ECR and Config.CreateRepositories is set, with
// the credentials that the helper ecr-login uses. Its error is an *api.Error, or the
// context's cause.
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
		if sourceOf(file, host, reference.Path(ref)).helper != "ecr-login" {
			continue
		}
		if err := c.clouds.CreateRepository(ctx, host, reference.Path(ref)); err != nil {
			return cloudError(ctx, err, host, fmt.Sprintf("creating repository %q", reference.Path(ref)))
		}
	}
	return nil
}

// unreadable makes err, of looking up the credentials for host, one for the client.
func unreadable(host string, err error) error {
	if _, ok := errors.AsType[*api.Error](err); ok {
		return err
	}
	return &api.Error{Code: api.RegistryFailed, Msg: fmt.Sprintf("registry %s: its credentials cannot be read; the builder's log has the cause", host), Err: err}
}

// RootCAs returns the CAs that the certificate of a registry is checked against. Nil
// stands for the system's.
func (c *Credentials) RootCAs(host string) (*x509.CertPool, error) {
	return c.roots(host, &url.URL{Host: host})
}

// Docker Hub goes by several names.
const (
	hubDomain = "docker.io"                   // in image names
	hubHost   = "registry-1.docker.io"        // serves the images
	hubIndex  = "index.docker.io"             // in old image names
	hubKey    = "https://index.docker.io/v1/" // in config.json, as docker writes it
)

// serverHost returns the one form of the host that serves the images of domain: in lower
// case, without the port of https, and with one name for Docker Hub.
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
