// Package contexts keeps the build contexts that are sent ahead of their builds, by
// digest. It keeps them in a repository of an OCI registry: every installation has a
// registry, and every replica reaches it. A context is the only layer of an image. The
// image's tag keeps the registry from collecting the layer as garbage.
//
// Each tenant has tags of its own. A context is there for a tenant only under the tenant's tag,
// even if the registry has the same layer from another tenant. A tenant is named by its id, or
// by "" where there is no file of tenants.
package contexts

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/owned"
)

// Config says where contexts are kept. All fields are needed.
type Config struct {
	// Repository has the form registry.example.com/builder/contexts. The registry is
	// asked over plain http if it is on loopback, or if http:// is written before its
	// name.
	Repository string
	MaxAge     time.Duration // after which a context is deleted

	// Login returns the credentials for the repository. It is called before each use
	// of the registry.
	Login func(ctx context.Context, host, repository string) (authn.AuthConfig, error)
	// RootCAs returns the CAs that the registry's certificate is checked against. Nil
	// stands for the system's. Its errors are *api.Error.
	RootCAs func(host string) (*x509.CertPool, error)

	Log zerolog.Logger
}

// Store keeps contexts in one repository.
type Store struct {
	cfg   Config
	repo  *owned.Repository
	stall time.Duration // stallTimeout, except in tests
}

// New checks cfg. It sends no request.
func New(cfg Config) (*Store, error) {
	repo, err := owned.New(owned.Config{Repository: cfg.Repository, Login: cfg.Login, RootCAs: cfg.RootCAs})
	if err != nil {
		return nil, fmt.Errorf("parsing context_repository: %w", err)
	}
	return &Store{cfg: cfg, repo: repo, stall: stallTimeout}, nil
}

const (
	mediaType = "application/vnd.openfaas.builder.context.v1"
	created   = "org.opencontainers.image.created"

	transferTimeout = 30 * time.Minute // of sending a context to the registry, and of a sweep
	stallTimeout    = time.Minute      // of reading a context: the longest time without a byte
)

// ownTag matches the tags that tag makes. A sweep leaves the others in the repository,
// such as those of signatures.
var ownTag = regexp.MustCompile("^([a-z0-9][a-z0-9-]{0,39}-)?sha256-[0-9a-f]{64}$")

// tag is where a tenant's context is kept:
//
//	t-7f3a9c0e2b41d8f6-sha256-9f86…08
//	sha256-9f86…08                       without a file of tenants
func (s *Store) tag(tenant, digest string) name.Tag {
	text := "sha256-" + strings.TrimPrefix(digest, "sha256:")
	if tenant != "" {
		text = tenant + "-" + text
	}
	return s.repo.Tag(text)
}

// options is owned.Repository.Options. Every error is an *api.Error.
func (s *Store) options(ctx context.Context) (opts []remote.Option, close func(), err error) {
	opts, done, err := s.repo.Options(ctx)
	if errors.Is(err, owned.ErrLogin) {
		err = &api.Error{Code: api.RegistryFailed, Msg: "the credentials for the context registry cannot be read", Err: err}
	}
	return opts, done, err
}

// Has says whether a context is there and stays for at least half of MaxAge, so that its
// build may wait in a queue for as long. Every error is an *api.Error.
func (s *Store) Has(ctx context.Context, tenant, digest string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, owned.RequestTimeout)
	defer cancel()
	opts, done, err := s.options(ctx)
	if err != nil {
		return false, err
	}
	defer done()
	_, age, err := s.manifest(s.tag(tenant, digest), opts)
	if owned.IsMissing(err) {
		return false, nil
	}
	if err != nil {
		return false, registryError(err)
	}
	return age < s.cfg.MaxAge/2, nil
}

// manifest returns the digest of a tag's manifest, and the age of its context.
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

// Put stores a context. If it is there already, its age begins anew. open returns a reader
// of its bytes, whose digest must be digest. It may be called more than once. Every error is
// an *api.Error.
func (s *Store) Put(ctx context.Context, tenant, digest string, size int64, open func() io.Reader) error {
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
	tag := s.tag(tenant, digest)
	old, _, _ := s.manifest(tag, opts)
	if err := remote.Write(tag, annotated, opts...); err != nil {
		return registryError(err)
	}
	if now, err := annotated.Digest(); err == nil && old != (v1.Hash{}) && old != now {
		// The old manifest has no tag now, and its layer is the new one's too. A
		// registry that does not delete it only keeps some bytes more.
		remote.Delete(s.repo.Digest(old.String()), opts...)
	}
	return nil
}

// layer is a context in the form in which go-containerregistry uploads it.
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

// Open returns a reader of a context. Reading ends when ctx does, and when the registry has
// sent nothing for a minute. The caller must compare what it reads with the digest, and
// close the reader.
//
// Every error of Open is an *api.Error. So is an error of Read because of the minute, or
// because of ctx if its cause is one. Other errors of Read are the transport's.
func (s *Store) Open(ctx context.Context, tenant, digest string) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	opts, done, err := s.options(ctx)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	r := &transfer{ctx: ctx, stall: s.stall}
	r.silence = time.AfterFunc(s.stall, func() {
		cancel(&api.Error{Code: api.RegistryTimeout, Msg: fmt.Sprintf("the registry of contexts has sent nothing for %v", s.stall)})
	})
	r.end = func() { r.silence.Stop(); cancel(nil); done() }
	if tenant != "" {
		// The layer may be another tenant's. The tag says that it is this one's too.
		_, _, err = s.manifest(s.tag(tenant, digest), opts)
	}
	var l v1.Layer
	if err == nil {
		l, err = remote.Layer(s.repo.Digest(digest), opts...)
	}
	if err == nil {
		r.body, err = l.Compressed()
	}
	if err != nil {
		err = r.because(err)
		r.end()
		if owned.IsMissing(err) {
			return nil, &api.Error{Code: api.BadContext, Msg: fmt.Sprintf("the context %s has not been sent here, or has been deleted", digest), Err: err}
		}
		return nil, registryError(err)
	}
	return r, nil
}

// transfer is a context that is read from the registry.
type transfer struct {
	body    io.ReadCloser
	ctx     context.Context
	stall   time.Duration
	silence *time.Timer // ends ctx when it fires
	end     func()
}

func (t *transfer) Read(p []byte) (int, error) {
	t.silence.Reset(t.stall)
	n, err := t.body.Read(p)
	// The time until the next Read is the reader's, not the registry's.
	t.silence.Stop()
	return n, t.because(err)
}

// because returns err or, if the transfer's context was ended by an *api.Error, that with
// err as its cause.
func (t *transfer) because(err error) error {
	if why, ok := errors.AsType[*api.Error](context.Cause(t.ctx)); ok && err != nil && err != io.EOF {
		return &api.Error{Code: why.Code, Msg: why.Msg, Err: err}
	}
	return err
}

func (t *transfer) Close() error {
	err := t.body.Close()
	t.end()
	return err
}

// Run deletes contexts older than MaxAge, until ctx ends: every hour or so, and once a day
// if the registry does not let it.
func (s *Store) Run(ctx context.Context) {
	for {
		wait := min(time.Hour, s.cfg.MaxAge/2)
		n, err := s.sweep(ctx)
		if n > 0 {
			s.cfg.Log.Info().Int("contexts", n).Msg("old contexts deleted")
		}
		if errors.Is(err, owned.ErrNoDeletion) {
			wait = 24 * time.Hour
			s.cfg.Log.Warn().Err(err).Msg("contexts are not deleted")
		} else if err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn().Err(err).Msg("deleting old contexts")
		}
		// Replicas that start together must not all ask at once.
		wait += rand.N(wait/4 + 1)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// sweep deletes contexts older than MaxAge. If some cannot be read or deleted, it goes on
// with the others, and its error has their number and the first failure.
func (s *Store) sweep(ctx context.Context) (deleted int, err error) {
	ctx, cancel := context.WithTimeout(ctx, transferTimeout)
	defer cancel()
	opts, done, err := s.options(ctx)
	if err != nil {
		return 0, err
	}
	defer done()
	tags, err := remote.List(s.repo.Repository, opts...)
	if owned.IsMissing(err) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("listing contexts: %w", err)
	}
	var failed int
	var first error
	for _, t := range tags {
		if !ownTag.MatchString(t) {
			continue
		}
		digest, age, err := s.manifest(s.repo.Tag(t), opts)
		if owned.IsMissing(err) {
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
		err = owned.Delete(s.repo.Digest(digest.String()), opts)
		if errors.Is(err, owned.ErrNoDeletion) {
			return deleted, err
		}
		if err != nil {
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

// registryError makes err of a request one for the client.
func registryError(err error) error {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	switch status := owned.StatusOf(err); {
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return &api.Error{Code: api.RegistryDenied, Msg: "the registry of contexts refuses the builder", Err: err}
	case status == http.StatusTooManyRequests, status == http.StatusRequestTimeout:
	// A TLS server answers plain http with 400, and the library tries plain http if it
	// does not know the server's CA. Hence 400 is no refusal.
	case status > 400 && status < 500:
		return &api.Error{Code: api.RegistryDenied, Msg: fmt.Sprintf("the registry of contexts refuses this with status %d", status), Err: err}
	}
	return &api.Error{Code: api.RegistryFailed, Msg: "the registry of contexts cannot be used now", Err: err}
}
