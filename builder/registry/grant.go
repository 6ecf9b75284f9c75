package registry

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/cli/cli/config/types"

	"handler/function/api"
)

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

// Basic is the user name and password for host, both empty when there are none
// that may be handed out. They are those for the first repository that this build
// pushes to there: the daemon asks by host alone, and keeps them for the build.
func (g *Grant) Basic(ctx context.Context, host string) (username, password string, err error) {
	f, err := g.auth(ctx, host, g.first[serverHost(host)])
	if err == nil {
		err = f.failed
	}
	if err != nil {
		return "", "", unreadable(host, err)
	}
	auth := f.auth
	// An identity token is for the token service alone.
	if auth.Username == "" || auth.Password == "" || auth.IdentityToken != "" {
		return "", "", nil
	}
	if !g.creds.cfg.AllowBasic {
		return "", "", &api.Error{
			Code: api.RegistryDenied,
			Msg:  fmt.Sprintf("registry %s: it asks for Basic authentication, which allow_basic=false forbids", host),
		}
	}
	return auth.Username, auth.Password, nil
}

// TokenRequest is a registry's Bearer challenge.
type TokenRequest struct {
	Host    string   // of the registry, as it is asked
	Realm   string   // URL of the token service
	Service string   // as the challenge names it
	Scopes  []string // such as "repository:library/alpine:pull"
}

// Token is a Bearer token.
type Token struct {
	Value    string
	IssuedAt time.Time
	Expires  time.Time
}

// Token answers a challenge with a token for the scopes that this build needs:
// to push where it pushes, and to pull. Every error is an *api.Error.
//
// None is handed out twice: the daemon keeps them, and asks again when the
// registry no longer takes the last one.
func (g *Grant) Token(ctx context.Context, req TokenRequest) (Token, error) {
	scopes, err := g.permit(req.Host, req.Scopes)
	if err != nil {
		return Token{}, err
	}
	realm, trusted, err := g.creds.checkRealm(req.Host, req.Realm)
	if err != nil {
		return Token{}, err
	}
	have, err := g.auth(ctx, req.Host, g.repository(req.Host, scopes))
	if err != nil {
		return Token{}, unreadable(req.Host, err)
	}
	auth := have.auth
	if auth.RegistryToken != "" {
		// It is good for as long, and for as much, as whoever made it meant it to be.
		if !g.creds.cfg.AllowBasic {
			return Token{}, &api.Error{
				Code: api.RegistryDenied,
				Msg:  fmt.Sprintf("registry %s: its credentials are a registry token, which allow_basic=false forbids", req.Host),
			}
		}
		now := time.Now()
		return Token{Value: auth.RegistryToken, IssuedAt: now, Expires: now.Add(defaultExpiry)}, nil
	}

	ctx, cancel := context.WithTimeout(ctx, tokenTimeout)
	defer cancel()
	f := &fetch{host: req.Host, realm: realm, service: req.Service, scopes: scopes, auth: auth}
	f.client, err = g.creds.client(req.Host, realm, trusted)
	if err != nil {
		return Token{}, err
	}
	defer f.client.CloseIdleConnections()
	tok, err := f.run(ctx)
	if e, ok := errors.AsType[*api.Error](err); ok && e.Code == api.RegistryDenied {
		if have.failed != nil {
			return Token{}, unreadable(req.Host, have.failed)
		}
		e.Msg += g.hint(req.Host)
	}
	return tok, err
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
