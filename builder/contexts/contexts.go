// Package contexts keeps build contexts that are sent ahead of their builds, by
// digest, in a repository of an OCI registry: every installation has one, and
// every replica reaches it. A context is the one layer of a small image, whose
// tag keeps the registry from collecting it.
package contexts

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/rs/zerolog"

	"handler/function/api"
)

// Config says where contexts are kept. All fields are needed.
type Config struct {
	// Repository is such as registry.example.com/builder/contexts. Plain http is
	// spoken to loopback, and to a registry that is named with http:// before it.
	Repository string
	MaxAge     time.Duration // after which a context is deleted

	// Login is asked before each use of the registry.
	Login func(ctx context.Context, host, repository string) (authn.AuthConfig, error)
	// RootCAs check the registry's certificate; nil is the system's.
	RootCAs func(host string) (*x509.CertPool, error)

	Log zerolog.Logger
}

// Store is the repository.
type Store struct {
	cfg   Config
	repo  name.Repository
	plain bool
	stall time.Duration // stallTimeout, but in tests
}

// New checks cfg and asks nobody.
func New(cfg Config) (*Store, error) {
	s := &Store{cfg: cfg, stall: stallTimeout}
	text, plain := strings.CutPrefix(cfg.Repository, "http://")
	var opts []name.Option
	if plain {
		opts = append(opts, name.Insecure)
	}
	repo, err := name.NewRepository(text, append(opts, name.StrictValidation)...)
	if err != nil {
		return nil, fmt.Errorf("parsing context_repository: %w", err)
	}
	s.repo, s.plain = repo, plain || isLoopback(repo.RegistryStr())
	return s, nil
}

func isLoopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}

const (
	mediaType = "application/vnd.openfaas.builder.context.v1"
	created   = "org.opencontainers.image.created"

	requestTimeout  = time.Minute
	transferTimeout = 30 * time.Minute // of a context to the registry, or of a sweep
	stallTimeout    = time.Minute      // of a context on its way to a build, without a byte
)

// ownTag is what tag makes. Others in the repository, such as signatures, are not
// this Store's to delete.
var ownTag = regexp.MustCompile("^sha256-[0-9a-f]{64}$")

func (s *Store) tag(digest string) name.Tag {
	return s.repo.Tag("sha256-" + strings.TrimPrefix(digest, "sha256:"))
}

// options are for the requests of one call. close ends their connections.
func (s *Store) options(ctx context.Context) (opts []remote.Option, close func(), err error) {
	host := s.repo.RegistryStr()
	auth, err := s.cfg.Login(ctx, host, s.repo.RepositoryStr())
	if err != nil {
		return nil, nil, &api.Error{Code: api.RegistryFailed, Msg: "the credentials for the context registry cannot be read", Err: err}
	}
	roots, err := s.cfg.RootCAs(host)
	if err != nil {
		return nil, nil, err
	}
	t := remote.DefaultTransport.(*http.Transport).Clone()
	t.TLSClientConfig.RootCAs = roots
	t.ResponseHeaderTimeout = requestTimeout
	return []remote.Option{
		remote.WithContext(ctx),
		remote.WithAuth(authn.FromConfig(auth)),
		remote.WithTransport(&transportOf{t, s.plain}),
	}, t.CloseIdleConnections, nil
}

// transportOf refuses plain http where it was not asked for: the library tries it
// with every registry on a private address.
type transportOf struct {
	http.RoundTripper
	plain bool
}

func (t *transportOf) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !t.plain {
		return nil, fmt.Errorf("the registry is asked over plain http, and context_repository does not begin with http://")
	}
	return t.RoundTripper.RoundTrip(req)
}

// Has says that a context is there and will be for half of MaxAge yet, so that a
// build may wait in a queue for that long. Every error is an *api.Error.
func (s *Store) Has(ctx context.Context, digest string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	opts, done, err := s.options(ctx)
	if err != nil {
		return false, err
	}
	defer done()
	_, age, err := s.manifest(s.tag(digest), opts)
	if isMissing(err) {
		return false, nil
	}
	if err != nil {
		return false, registryError(err)
	}
	return age < s.cfg.MaxAge/2, nil
}

// manifest returns a tag's manifest and its age.
func (s *Store) manifest(tag name.Tag, opts []remote.Option) (v1.Hash, time.Duration, error) {
	desc, err := remote.Get(tag, opts...)
	if err != nil {
		return v1.Hash{}, 0, err
	}
	img, err := desc.Image()
	if err != nil {
		return v1.Hash{}, 0, err
	}
	m, err := img.Manifest()
	if err != nil {
		return v1.Hash{}, 0, err
	}
	at, err := time.Parse(time.RFC3339Nano, m.Annotations[created])
	if err != nil {
		return v1.Hash{}, 0, fmt.Errorf("reading the time of %s: %w", tag, err)
	}
	return desc.Digest, time.Since(at), nil
}

// Put stores a context whose bytes open reads, or makes one that is there young
// again. What open reads must have the digest. Every error is an *api.Error.
func (s *Store) Put(ctx context.Context, digest string, size int64, open func() io.Reader) error {
	ctx, cancel := context.WithTimeout(ctx, transferTimeout)
	defer cancel()
	opts, done, err := s.options(ctx)
	if err != nil {
		return err
	}
	defer done()
	hash, err := v1.NewHash(digest)
	if err != nil {
		return &api.Error{Code: api.BadContext, Msg: fmt.Sprintf("%q is no digest", digest), Err: err}
	}
	img, err := mutate.AppendLayers(empty.Image, &layer{hash: hash, size: size, open: open})
	if err != nil {
		return err
	}
	annotated := mutate.Annotations(img, map[string]string{created: time.Now().UTC().Format(time.RFC3339Nano)}).(v1.Image)
	old, _, _ := s.manifest(s.tag(digest), opts)
	if err := remote.Write(s.tag(digest), annotated, opts...); err != nil {
		return registryError(err)
	}
	if now, err := annotated.Digest(); err == nil && old != (v1.Hash{}) && old != now {
		// Its blobs are the new one's too. Whether this may be deleted is the
		// registry's choice.
		remote.Delete(s.repo.Digest(old.String()), opts...)
	}
	return nil
}

// layer is a context as go-containerregistry uploads it.
type layer struct {
	hash v1.Hash
	size int64
	open func() io.Reader
}

func (l *layer) Digest() (v1.Hash, error)             { return l.hash, nil }
func (l *layer) DiffID() (v1.Hash, error)             { return l.hash, nil }
func (l *layer) Compressed() (io.ReadCloser, error)   { return io.NopCloser(l.open()), nil }
func (l *layer) Uncompressed() (io.ReadCloser, error) { return io.NopCloser(l.open()), nil }
func (l *layer) Size() (int64, error)                 { return l.size, nil }
func (l *layer) MediaType() (types.MediaType, error)  { return mediaType, nil }

// Open streams a context within ctx, and no longer than its registry sends
// something every minute. The caller checks what it reads, and closes it. Every
// error of Open is an *api.Error. So are those of Read that ctx's cause or silence
// made; others are the transport's.
func (s *Store) Open(ctx context.Context, digest string) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	opts, done, err := s.options(ctx)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	r := &stream{ctx: ctx, stall: s.stall}
	r.silence = time.AfterFunc(s.stall, func() {
		cancel(&api.Error{Code: api.RegistryTimeout, Msg: fmt.Sprintf("the registry of contexts has sent nothing for %v", s.stall)})
	})
	r.end = func() { r.silence.Stop(); cancel(nil); done() }
	l, err := remote.Layer(s.repo.Digest(digest), opts...)
	if err == nil {
		r.body, err = l.Compressed()
	}
	if err != nil {
		err = r.because(err)
		r.end()
		if isMissing(err) {
			return nil, &api.Error{Code: api.BadContext, Msg: fmt.Sprintf("the context %s has not been sent here, or has been deleted", digest), Err: err}
		}
		return nil, registryError(err)
	}
	return r, nil
}

// stream is a context on its way.
type stream struct {
	body    io.ReadCloser
	ctx     context.Context
	stall   time.Duration
	silence *time.Timer // ends ctx when it fires
	end     func()
}

func (s *stream) Read(p []byte) (int, error) {
	s.silence.Reset(s.stall)
	n, err := s.body.Read(p)
	// What follows is the reader's time.
	s.silence.Stop()
	return n, s.because(err)
}

// because is err, or why this Store ended the transfer.
func (s *stream) because(err error) error {
	if why, ok := errors.AsType[*api.Error](context.Cause(s.ctx)); ok && err != nil && err != io.EOF {
		return &api.Error{Code: why.Code, Msg: why.Msg, Err: err}
	}
	return err
}

func (s *stream) Close() error {
	err := s.body.Close()
	s.end()
	return err
}

// errNoDeletion is of a registry that keeps everything.
var errNoDeletion = errors.New("the registry deletes nothing")

// Run deletes what is too old, now and then, until ctx ends.
func (s *Store) Run(ctx context.Context) {
	for {
		wait := min(time.Hour, s.cfg.MaxAge/2)
		n, err := s.sweep(ctx)
		if n > 0 {
			s.cfg.Log.Info().Int("contexts", n).Msg("old contexts deleted")
		}
		if errors.Is(err, errNoDeletion) {
			wait = 24 * time.Hour
			s.cfg.Log.Warn().Err(err).Msg("contexts are not deleted")
		} else if err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn().Err(err).Msg("deleting old contexts")
		}
		// Replicas that start together shall not all ask at once.
		wait += rand.N(wait/4 + 1)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// sweep deletes what is too old. Its error tells what could not be.
func (s *Store) sweep(ctx context.Context) (deleted int, err error) {
	ctx, cancel := context.WithTimeout(ctx, transferTimeout)
	defer cancel()
	opts, done, err := s.options(ctx)
	if err != nil {
		return 0, err
	}
	defer done()
	tags, err := remote.List(s.repo, opts...)
	if isMissing(err) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("listing contexts: %w", err)
	}
	// One that the registry fails at does not keep the others.
	var failed int
	var first error
	for _, t := range tags {
		if !ownTag.MatchString(t) {
			continue
		}
		digest, age, err := s.manifest(s.repo.Tag(t), opts)
		if isMissing(err) {
			continue
		}
		if ctx.Err() != nil {
			return deleted, context.Cause(ctx)
		}
		if err != nil {
			failed++
			first = cmp.Or(first, fmt.Errorf("reading %s: %w", t, err))
			continue
		}
		if age < s.cfg.MaxAge {
			continue
		}
		err = remote.Delete(s.repo.Digest(digest.String()), opts...)
		switch status := statusOf(err); {
		case status == http.StatusMethodNotAllowed, status == http.StatusUnauthorized, status == http.StatusForbidden, status == http.StatusNotImplemented:
			return deleted, fmt.Errorf("%w: %w", errNoDeletion, err)
		case err != nil && !isMissing(err):
			failed++
			first = cmp.Or(first, fmt.Errorf("deleting %s: %w", t, err))
			continue
		}
		deleted++
	}
	if failed > 0 {
		return deleted, fmt.Errorf("%d failed, the first of them: %w", failed, first)
	}
	return deleted, nil
}

func statusOf(err error) int {
	if e, ok := errors.AsType[*transport.Error](err); ok {
		return e.StatusCode
	}
	return 0
}

func isMissing(err error) bool { return statusOf(err) == http.StatusNotFound }

func registryError(err error) error {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	switch status := statusOf(err); {
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return &api.Error{Code: api.RegistryDenied, Msg: "the registry of contexts refuses the builder", Err: err}
	case status == http.StatusTooManyRequests, status == http.StatusRequestTimeout:
	// 400 is what a TLS server says to plain HTTP, which is tried where its CA is not
	// known.
	case status > 400 && status < 500:
		return &api.Error{Code: api.RegistryDenied, Msg: fmt.Sprintf("the registry of contexts refuses this with status %d", status), Err: err}
	}
	return &api.Error{Code: api.RegistryFailed, Msg: "the registry of contexts cannot be used now", Err: err}
}
