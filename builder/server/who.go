package server

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/isolation"
	"handler/function/signature"
	"handler/function/tenants"
)

// Tenants says who may build. Package tenants reads it from a file.
type Tenants interface {
	// Current returns all tenants as they are now. A nil Set, or one without a file, stands
	// for the only tenant, whose keys are the payload secret's. Every error is an *api.Error.
	Current() (*tenants.Set, error)
}

// roster is who may sign at one time.
type roster struct {
	set  *tenants.Set  // nil without HMAC
	root isolation.Key // of everything that isolates builds, whoever signs
}

// fileOfTenants returns the Set of the file of tenants. It is nil if there is no file.
func (s *Server) fileOfTenants() (*tenants.Set, error) {
	if s.Tenants == nil || s.DisableHMAC {
		return nil, nil
	}
	set, err := s.Tenants.Current()
	if err != nil || set == nil || !set.File {
		return nil, err
	}
	return set, nil
}

// staleTenants is a metrics.Config.Stale.
func (s *Server) staleTenants() func() (stale, ok bool) {
	if s.TenantsStale == nil {
		return nil
	}
	return func() (stale, ok bool) {
		set, err := s.fileOfTenants()
		return s.TenantsStale(), set != nil || err != nil
	}
}

// roster reads the payload secret, and the tenants if there is a file of them. With a file the
// payload secret is the root of isolation, and lets nobody in.
func (s *Server) roster() (roster, error) {
	keys, only, err := s.keys.current()
	if s.DisableHMAC {
		// FallbackSecret takes the place of keys that cannot be read.
		return roster{root: s.isolationKey(keys)}, nil
	}
	if err != nil {
		return roster{}, err
	}
	set, err := s.fileOfTenants()
	switch {
	case err != nil:
		return roster{}, err
	case set == nil:
		set = only
	case len(keys) == 0:
		// FallbackSecret would isolate as well, but no replica shares it, and no restart
		// keeps it.
		return roster{}, &api.Error{Code: api.NotReady, Msg: noKey}
	}
	return roster{set, s.isolationKey(keys)}, nil
}

// file says whether there is a file of tenants.
func (r roster) file() bool { return r.set != nil && r.set.File }

// unauthorized has one message for every cause. A cause would help somebody who tries keys or
// names of tenants.
func (r roster) unauthorized(cause error) error {
	msg := "the request is not signed with the payload secret"
	if r.file() {
		msg = "the request is not signed with a key of a tenant of this builder; name your tenant in the header " + api.TenantHeader
	}
	return &api.Error{Code: api.Unauthorized, Msg: msg, Err: cause}
}

var (
	errNoMAC   = errors.New("no key made the signature")
	errUnnamed = errors.New("the request does not say whose it is, and there are too many keys to try")
)

// named returns the keys of the tenant that a request names: in a header or, if it has none, by
// the host that it was sent to. ok is false if it names none.
func (r roster) named(h http.Header, host string) (list []tenants.Candidate, ok bool) {
	if name := nameIn(h); name != "" {
		return r.set.Named(name), true
	}
	// A proxy adds its own host behind the one that the client asked for.
	first, _, _ := strings.Cut(h.Get(forwardedHost), ",")
	for _, text := range []string{strings.TrimSpace(first), host} {
		if list, ok := r.set.AtHost(text); ok {
			return list, true
		}
	}
	return nil, false
}

// nameIn returns the tenant that headers name, or "". Several names are joined to one that no
// tenant has.
func nameIn(h http.Header) string { return strings.Join(h.Values(api.TenantHeader), ", ") }

// forwardedHost is the header in which the gateway passes on the host of a request.
const forwardedHost = "X-Forwarded-Host"

// candidates returns the keys that are tried for a request before its body is read. ok is false
// if only the body can tell whose keys to try.
func (r roster) candidates(req *http.Request) (list []tenants.Candidate, ok bool) {
	if r.file() {
		if list, ok := r.named(req.Header, req.Host); ok {
			return list, true
		}
	}
	return r.set.All()
}

// unnamed returns the keys that are tried if nothing can tell the tenant of a request. They are
// decoys, and take as long to try as a tenant's keys.
func (r roster) unnamed() []tenants.Candidate { return r.set.Named("") }

func keysOf(list []tenants.Candidate) signature.Keys {
	keys := make(signature.Keys, len(list))
	for i, c := range list {
		keys[i] = c.Key.Secret
	}
	return keys
}

// signer is who signed a request. The answer is signed in the same way. Without HMAC a signer
// has neither a tenant nor a key, and its answers are not signed. An operator has a key and no
// tenant.
type signer struct {
	roster
	tenant   *tenants.Tenant
	key      tenants.Key
	stamped  bool // with a timestamp
	operator bool
}

// accept makes a signer of the candidate whose key made a signature. With a file of tenants it
// looks the key up once more. A body can take long to come, and the key may have ended or been
// revoked meanwhile: then accept refuses it.
func (s *Server) accept(r roster, c tenants.Candidate, stamped bool) (signer, error) {
	if !r.file() {
		return signer{roster: r, tenant: c.Tenant, key: c.Key, stamped: stamped}, nil
	}
	if c.Tenant == nil {
		return signer{}, r.unauthorized(errNoMAC)
	}
	now, err := s.roster()
	if err != nil {
		return signer{}, err
	}
	if t := now.set.ByID(c.Tenant.ID); t != nil {
		for _, key := range t.Keys {
			if bytes.Equal(key.Secret, c.Key.Secret) && key.Valid(time.Now()) {
				return signer{roster: now, tenant: t, key: key, stamped: stamped}, nil
			}
		}
	}
	return signer{}, r.unauthorized(errors.New("the key that made the signature has ended"))
}

// acceptOperator makes a signer of an operator's key, if it is valid.
func (s *Server) acceptOperator(r roster, key tenants.Key, stamped bool) (signer, error) {
	if !key.Valid(time.Now()) {
		return signer{}, r.unauthorized(errors.New("the operator's key has ended"))
	}
	return signer{roster: r, key: key, stamped: stamped, operator: true}, nil
}

// sign is a reply.Options.Sign.
func (g signer) sign(h http.Header, body []byte) {
	if g.key.Secret == nil {
		return
	}
	var t signature.Timestamp
	if g.stamped {
		t = signature.Now()
		h.Set(api.TimestampHeader, string(t))
	}
	h.Set(api.SignatureHeader, signature.Sign(g.key.Secret, t, body))
}

// id is the tenant's id, in everything that keeps builds apart.
func (g signer) id() string {
	if g.tenant == nil {
		return tenants.DefaultID
	}
	return g.tenant.ID
}

// owner is whose builds the signer sees, in the store of records. With a file of tenants it is the
// tenant. Without it each key has its own builds.
func (g signer) owner() string {
	if g.file() || g.key.Secret == nil {
		return g.id()
	}
	sum := sha256.Sum256(append([]byte("owner of builds\x00"), g.key.Secret...))
	return g.id() + "." + hex.EncodeToString(sum[:16])
}

// tenantID is the tenant's id if there is a file of tenants, and "" otherwise.
func (g signer) tenantID() string {
	if !g.file() || g.operator {
		return ""
	}
	return g.tenant.ID
}

// pool is the name of the tenant's pool of daemons; "" is the shared one.
func (g signer) pool() string {
	if !g.file() {
		return ""
	}
	return g.tenant.Pool
}

// ownKey, with the tenant's id, tells the builds of one signer from those of others. All keys
// of a tenant of the file are one signer. Without the file, each key is a signer.
func (g signer) ownKey() []byte {
	if g.file() {
		return nil
	}
	return g.key.Secret
}

// logTo returns log with the signer's ids, if there is a file of tenants.
func (g signer) logTo(log zerolog.Logger) zerolog.Logger {
	switch {
	case g.operator:
		return log.With().Str("operator", g.key.ID).Logger()
	case !g.file():
		return log
	}
	return log.With().Str("tenant", g.tenant.ID).Str("key", g.key.ID).Logger()
}

var errSuspended = &api.Error{Code: api.Suspended, Msg: "this tenant is suspended; the operator of the builder can say why"}

// suspended returns an error if the signer's tenant may do nothing for now.
func (g signer) suspended() error {
	if g.file() && !g.operator && g.tenant.Suspended {
		return errSuspended
	}
	return nil
}
