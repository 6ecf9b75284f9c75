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
	creds *Credentials
	// lent are other credentials than creds, for single repositories that the build pushes
	// to. A key is as those of pushes.
	lent map[string]*Credentials

	// pushes are the repositories that the build pushes to. A key is "host/name",
	// where the host is in serverHost's form and the name is the token service's; its
	// value is the repository's path as the image has it.
	pushes map[string]string
	// first is the first repository that the build pushes to at each host.
	first map[string]string

	mu    sync.Mutex
	auths map[login]*lookup
	// none and some are the hosts for which credentials were looked for in vain, and
	// those for which some were found. A host may be in both: the credentials may be
	// for one of its repositories alone.
	none, some map[string]bool
	// wanted is the repository that a token was for. A key is "host scope scope…".
	wanted map[string]string
	// other has a repository for each host: a challenge wanted the right to push there, and the
	// build does not push there.
	other map[string]string
}

// lookup is one look for credentials. It ends with the context of whoever has asked first.
type lookup struct {
	ctx context.Context
	get func() (found, error)
}

// login is one entry of somebody's credentials.
type login struct {
	of *Credentials
	source
}

// Grant makes the grant of a build that pushes to the given repositories and pulls
// from any other.
func (c *Credentials) Grant(pushes []reference.Named) *Grant {
	g := &Grant{
		creds:  c,
		lent:   make(map[string]*Credentials),
		pushes: make(map[string]string),
		first:  make(map[string]string),
		auths:  make(map[login]*lookup),
		none:   make(map[string]bool),
		some:   make(map[string]bool),
		wanted: make(map[string]string),
		other:  make(map[string]string),
	}
	for _, ref := range pushes {
		g.mayPush(ref)
	}
	return g
}

// mayPush returns the keys of ref in pushes.
func (g *Grant) mayPush(ref reference.Named) []string {
	host, repository := serverHost(reference.Domain(ref)), reference.Path(ref)
	if g.first[host] == "" {
		g.first[host] = repository
	}
	keys := []string{host + "/" + repository}
	g.pushes[keys[0]] = repository
	if name, ok := g.creds.tokenPath(host, repository); ok && g.pushes[host+"/"+name] == "" {
		keys = append(keys, host+"/"+name)
		g.pushes[keys[1]] = repository
	}
	return keys
}

// Lend lets the build push to one more repository, with the credentials c. They are for this
// repository alone. It must be called before the grant is used.
func (g *Grant) Lend(c *Credentials, ref reference.Named) {
	for _, key := range g.mayPush(ref) {
		g.lent[key] = c
	}
}

// owner returns the credentials that count for a repository.
func (g *Grant) owner(host, repository string) *Credentials {
	if c := g.lent[serverHost(host)+"/"+repository]; c != nil {
		return c
	}
	return g.creds
}

// Basic returns the user name and password for host. Both are empty if there are none, or only
// an identity token. The daemon names the host alone, and uses them for the whole build. So
// they are the credentials for the first repository that this build pushes to there. Lent
// credentials count only if the build has none of its own for this host.
func (g *Grant) Basic(ctx context.Context, host string) (username, password string, err error) {
	repository := g.first[serverHost(host)]
	if g.owner(host, repository) != g.creds {
		serves, err := g.creds.Serves(host)
		if err != nil {
			return "", "", err
		}
		if serves {
			repository = ""
		}
	}
	f, err := g.auth(ctx, host, repository)
	if err == nil {
		err = f.failed
	}
	if err != nil {
		return "", "", unreadable(host, err)
	}
	auth := f.auth
	// Only the token service may see an identity token.
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
	Host    string   // the registry's, as the daemon asks it
	Realm   string   // the token service's URL
	Service string   // the registry's name for itself
	Scopes  []string // such as "repository:library/alpine:pull"
}

// Token is a Bearer token.
type Token struct {
	Value    string
	IssuedAt time.Time
	Expires  time.Time
}

// Token answers a challenge with a token for those of its scopes that permit leaves.
// Every error is an *api.Error.
//
// Each call fetches a new token. The daemon keeps the one that it has, and asks again
// only when the registry no longer takes it.
func (g *Grant) Token(ctx context.Context, req TokenRequest) (Token, error) {
	scopes, err := g.permit(req.Host, req.Scopes)
	if err != nil {
		return Token{}, err
	}
	realm, trusted, err := g.creds.checkRealm(req.Host, req.Realm)
	if err != nil {
		return Token{}, err
	}
	repository := g.repository(req.Host, scopes)
	scopes = g.sharing(req.Host, repository, scopes)
	have, err := g.auth(ctx, req.Host, repository)
	if err != nil {
		return Token{}, unreadable(req.Host, err)
	}
	auth := have.auth
	if auth.RegistryToken != "" {
		// How long this token lives, and what it permits, was decided by whoever made
		// it: it may outlive the build and permit more than the build needs.
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

// auth returns the credentials for a repository at host. It looks them up once for
// each source, so that a build runs a helper once, and again when they are to be
// renewed.
func (g *Grant) auth(ctx context.Context, host, repository string) (found, error) {
	owner := g.owner(host, repository)
	for {
		file, err := owner.load()
		if err != nil {
			return found{}, err
		}
		src := login{owner, sourceOf(file, host, repository)}
		g.mu.Lock()
		l, shared := g.auths[src]
		if !shared {
			l = &lookup{ctx, sync.OnceValues(func() (found, error) { return owner.lookup(ctx, file, src.source) })}
			g.auths[src] = l
		}
		g.mu.Unlock()
		f, err := l.get()
		g.mu.Lock()
		stale := !f.renew.IsZero() && time.Now().After(f.renew)
		if err != nil || stale {
			// The next call looks again.
			if g.auths[src] == l {
				delete(g.auths, src)
			}
		} else if f.auth != (types.AuthConfig{}) || f.failed != nil {
			g.some[lower(host)] = true
		} else {
			g.none[lower(host)] = true
		}
		g.mu.Unlock()
		if shared && (err == nil && stale || err != nil && l.ctx.Err() != nil && ctx.Err() == nil) {
			continue
		}
		return f, err
	}
}

// Anonymous returns, in order, the hosts for which credentials were looked for and
// none were found, for any repository.
func (g *Grant) Anonymous() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	hosts := slices.Sorted(maps.Keys(g.none))
	return slices.DeleteFunc(hosts, func(host string) bool { return g.some[host] })
}
