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
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/cli/cli/config/configfile"
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

	// TokenPaths are the registries whose token services name repositories by
	// other paths than images do.
	TokenPaths []TokenPath

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

// TokenPath is what a registry's token service has for a path of its images.
type TokenPath struct {
	host         string   // as serverHost has it
	image, token []string // segments that a repository begins with; none is every one
}

// ParseTokenPath takes "registry/path=path": of images at registry/path… the token
// service says path…. Either path may be empty: one is put before all names, or
// left out of them.
func ParseTokenPath(s string) (TokenPath, error) {
	image, token, ok := strings.Cut(s, "=")
	host, below, _ := strings.Cut(image, "/")
	if !ok {
		return TokenPath{}, errors.New("there is no = in it")
	}
	if _, err := hosts.Parse(host); err != nil {
		return TokenPath{}, err
	}
	p := TokenPath{host: serverHost(host)}
	var err error
	if p.image, err = pathSegments(below); err != nil {
		return TokenPath{}, err
	}
	if p.token, err = pathSegments(token); err != nil {
		return TokenPath{}, err
	}
	if slices.Equal(p.image, p.token) {
		return TokenPath{}, errors.New("both paths are the same")
	}
	return p, nil
}

func pathSegments(text string) ([]string, error) {
	if text = strings.Trim(text, "/"); text == "" {
		return nil, nil
	}
	if named, err := reference.ParseNormalizedNamed(hubDomain + "/x/" + text); err != nil || !reference.IsNameOnly(named) {
		return nil, fmt.Errorf("%q is not the path of a repository", text)
	}
	return strings.Split(text, "/"), nil
}

// tokenPath is how the token service of host names repository, where Config says
// that it has a name of its own for it.
func (c *Credentials) tokenPath(host, repository string) (string, bool) {
	segments := strings.Split(repository, "/")
	var longest *TokenPath
	for _, p := range c.cfg.TokenPaths {
		if p.host == host && len(p.image) <= len(segments) && slices.Equal(p.image, segments[:len(p.image)]) &&
			(longest == nil || len(p.image) > len(longest.image)) {
			longest = &p
		}
	}
	if longest == nil {
		return "", false
	}
	name := slices.Concat(longest.token, segments[len(longest.image):])
	return strings.Join(name, "/"), len(name) > 0
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

// byteOrderMark is what some editors write before UTF-8.
const byteOrderMark = "\uFEFF"

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

// Grant makes the grant of a build that pushes to the given repositories and pulls
// from any other.
func (c *Credentials) Grant(pushes []reference.Named) *Grant {
	g := &Grant{
		creds:  c,
		pushes: make(map[string]string),
		first:  make(map[string]string),
		auths:  make(map[source]func() (found, error)),
		none:   make(map[string]bool),
		some:   make(map[string]bool),
		wanted: make(map[string]string),
		other:  make(map[string]string),
	}
	for _, ref := range pushes {
		host, repository := serverHost(reference.Domain(ref)), reference.Path(ref)
		if g.first[host] == "" {
			g.first[host] = repository
		}
		g.pushes[host+"/"+repository] = repository
		if name, ok := c.tokenPath(host, repository); ok && g.pushes[host+"/"+name] == "" {
			g.pushes[host+"/"+name] = repository
		}
	}
	return g
}

// Grant is what one build may have of the credentials: user names, passwords and
// tokens, for the registries that it talks to. It may be used from many goroutines.
type Grant struct {
	creds  *Credentials
	pushes map[string]string // repositories, by server host, a slash and how token services name them
	first  map[string]string // the first of them at each server host

	mu     sync.Mutex
	auths  map[source]func() (found, error)
	none   map[string]bool   // hosts that nothing was found for
	some   map[string]bool   // hosts that something was found for: one repository's, not another's
	wanted map[string]string // by the server host and the scopes of a token: the repository it was for
	other  map[string]string // by server host: what its scope to push named instead of a repository
}

// auth is lookup once for each source, so that a build runs a helper once, but
// again when what it found has to be renewed.
func (g *Grant) auth(ctx context.Context, host, repository string) (found, error) {
	for {
		file, err := g.creds.load()
		if err != nil {
			return found{}, err
		}
		src := find(file, host, repository)
		g.mu.Lock()
		get, again := g.auths[src], true
		if get == nil {
			get, again = sync.OnceValues(func() (found, error) { return g.creds.lookup(ctx, file, src) }), false
			g.auths[src] = get
		}
		g.mu.Unlock()
		f, err := get()
		g.mu.Lock()
		stale := !f.renew.IsZero() && time.Now().After(f.renew)
		if err != nil || stale {
			// The next call asks again: the first caller may have gone away.
			delete(g.auths, src)
		} else if f.auth != (types.AuthConfig{}) || f.failed != nil {
			g.some[lower(host)] = true
		} else {
			g.none[lower(host)] = true
		}
		g.mu.Unlock()
		if again && stale && err == nil {
			continue
		}
		return f, err
	}
}

// Anonymous are the hosts that were asked for credentials and had none for any
// repository, in order.
func (g *Grant) Anonymous() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	hosts := slices.Sorted(maps.Keys(g.none))
	return slices.DeleteFunc(hosts, func(host string) bool { return g.some[host] })
}
