// Package owned reaches the repositories that are the builder's own, where it keeps contexts
// and cache. It knows how a registry is asked, and how tags are removed there.
package owned

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"handler/function/hosts"
)

// Config says where a repository is. All fields are needed.
type Config struct {
	// Repository has the form registry.example.com/builder/contexts. The registry is
	// asked over plain http if it is on loopback, or if http:// is written before its
	// name.
	Repository string

	// Login returns the credentials for the repository. It is called before each use
	// of the registry.
	Login func(ctx context.Context, host, repository string) (authn.AuthConfig, error)
	// RootCAs returns the CAs that the registry's certificate is checked against. Nil
	// stands for the system's.
	RootCAs func(host string) (*x509.CertPool, error)
}

// Repository is one repository of a registry.
type Repository struct {
	name.Repository
	cfg       Config
	plainHTTP bool
}

// New checks cfg. It sends no request.
func New(cfg Config) (*Repository, error) {
	text, plainHTTP := strings.CutPrefix(cfg.Repository, "http://")
	var opts []name.Option
	if plainHTTP {
		opts = append(opts, name.Insecure)
	}
	repo, err := name.NewRepository(text, append(opts, name.StrictValidation)...)
	if err != nil {
		return nil, err
	}
	host, err := hosts.Parse(repo.RegistryStr())
	return &Repository{repo, cfg, plainHTTP || err == nil && host.IsLoopback()}, nil
}

// RequestTimeout is for the answer to one request.
const RequestTimeout = time.Minute

// ErrLogin means that the credentials for the repository cannot be read.
var ErrLogin = errors.New("the credentials cannot be read")

// Options returns the options for the requests of one call. close closes their idle
// connections. An error is ErrLogin, or one of Config.RootCAs.
func (r *Repository) Options(ctx context.Context) (opts []remote.Option, close func(), err error) {
	host := r.RegistryStr()
	auth, err := r.cfg.Login(ctx, host, r.RepositoryStr())
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrLogin, err)
	}
	roots, err := r.cfg.RootCAs(host)
	if err != nil {
		return nil, nil, err
	}
	t := remote.DefaultTransport.(*http.Transport).Clone()
	t.TLSClientConfig.RootCAs = roots
	t.ResponseHeaderTimeout = RequestTimeout
	return []remote.Option{
		remote.WithContext(ctx),
		remote.WithAuth(authn.FromConfig(auth)),
		remote.WithTransport(&httpGuard{t, r.plainHTTP}),
	}, t.CloseIdleConnections, nil
}

// httpGuard refuses plain http unless it is allowed: the library tries it with every
// registry on a private address.
type httpGuard struct {
	http.RoundTripper
	allowed bool
}

func (t *httpGuard) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !t.allowed {
		return nil, errors.New("the registry is asked over plain http, and its repository does not begin with http://")
	}
	return t.RoundTripper.RoundTrip(req)
}

// ErrNoDeletion means that the registry does not let the builder delete.
var ErrNoDeletion = errors.New("the registry deletes nothing")

// Delete deletes a manifest or a tag. It is no error if there is none. The error is
// ErrNoDeletion if the registry refuses every deletion.
func Delete(ref name.Reference, opts []remote.Option) error {
	err := remote.Delete(ref, opts...)
	switch status := StatusOf(err); {
	case status == http.StatusMethodNotAllowed, status == http.StatusUnauthorized, status == http.StatusForbidden, status == http.StatusNotImplemented:
		return fmt.Errorf("%w: %w", ErrNoDeletion, err)
	case status == http.StatusNotFound:
		return nil
	}
	return err
}

// StatusOf returns the status of the registry's answer, or 0 if err is about something else.
func StatusOf(err error) int {
	if e, ok := errors.AsType[*transport.Error](err); ok {
		return e.StatusCode
	}
	return 0
}

// IsMissing says whether the registry has answered that it has no such thing.
func IsMissing(err error) bool { return StatusOf(err) == http.StatusNotFound }
