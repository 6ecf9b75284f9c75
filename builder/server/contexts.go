package server

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"handler/function/api"
	"handler/function/buildconfig"
	"handler/function/payload"
	"handler/function/reply"
)

// Contexts keeps build contexts that are sent ahead of their builds. Every error
// is an *api.Error, but for those of what Open reads, which need not be.
type Contexts interface {
	Has(ctx context.Context, digest string) (bool, error)
	Put(ctx context.Context, digest string, size int64, open func() io.Reader) error
	Open(ctx context.Context, digest string) (io.ReadCloser, error)
}

// contextDigest is the path's, of a request that may ask for it.
func (s *Server) contextDigest(r *http.Request) (string, error) {
	if s.Contexts == nil {
		return "", &api.Error{Code: api.NotFound, Msg: "no contexts are taken here: context_repository is not set"}
	}
	digest := r.PathValue(segment)
	if !buildconfig.ValidDigest(digest) {
		return "", &api.Error{Code: api.BadContext, Msg: fmt.Sprintf("%q is not sha256: and 64 hex digits", digest)}
	}
	return digest, nil
}

// headContext says with 200 or 404 whether a context is there.
func (s *Server) headContext(w http.ResponseWriter, r *http.Request) {
	id, _ := nameCall(w, r)
	by, err := s.signedBy(r, id)
	var digest string
	if err == nil {
		digest, err = s.contextDigest(r)
	}
	var there bool
	if err == nil {
		there, err = s.Contexts.Has(r.Context(), digest)
	}
	if err == nil && !there {
		err = &api.Error{Code: api.NotFound, Msg: "this context is not here"}
	}
	if err != nil {
		refuse(w, r, api.AsError(err), reply.Options{ID: id, Sign: by.sign})
		return
	}
	w.WriteHeader(http.StatusOK)
}

// putContext takes a context in: 201, or 200 if it was there. It is read and
// checked as a build's is, and reaches the registry only after its signature has
// passed.
func (s *Server) putContext(w http.ResponseWriter, r *http.Request) {
	c := s.newCall(w, r)
	end, ok := s.begin()
	if !ok {
		s.refuse(w, r, c, errShuttingDown, nil)
		return
	}
	defer end()
	body, err := s.receive(w, r, payload.Options{SHA256: true, ContextOnly: true, Raw: true})
	if err != nil {
		s.refuse(w, r, c, err, nil)
		return
	}
	defer body.Close()
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	defer context.AfterFunc(s.stopped, func() { cancel(errShuttingDown) })()
	digest, err := s.contextDigest(r)
	var there bool
	if err == nil {
		there, err = s.storeContext(ctx, digest, body)
	}
	if err != nil {
		s.refuse(w, r, c, because(ctx, err), body)
		return
	}
	c.log.Info().Str("context", digest).Int64("bytes", body.Size()).Bool("there", there).Msg("context received")
	status := http.StatusCreated
	if there {
		status = http.StatusOK
	}
	answer := struct {
		Digest  string `json:"digest"`
		Bytes   int64  `json:"bytes"`
		ID      string `json:"id"`
		Request string `json:"request"`
	}{digest, body.Size(), c.id, body.request()}
	opts := reply.Options{NotBefore: time.Now().Add(settle), Sign: body.signer.sign}
	if err := reply.Value(w, status, answer, opts); err != nil {
		c.log.Warn().AnErr("cause", err).Msg("answer not delivered")
	}
}

// maxChecks is how many contexts that are sent ahead are decompressed and indexed at once.
const maxChecks = 2

func (s *Server) storeContext(ctx context.Context, digest string, body *upload) (there bool, err error) {
	if err := s.checkContext(ctx, body); err != nil {
		return false, err
	}
	if err := checkDigest(body.Spool, digest); err != nil {
		return false, err
	}
	if there, err := s.Contexts.Has(ctx, digest); there || err != nil {
		return there, err
	}
	return false, s.Contexts.Put(ctx, digest, body.Size(), func() io.Reader { return body.Raw() })
}

// checkContext reads a context as the build that names it will.
func (s *Server) checkContext(ctx context.Context, body *upload) error {
	full := &api.Error{Code: api.QueueTimeout, Msg: "other contexts are being checked, and queue_wait has passed"}
	if err := s.take(ctx, s.checks, s.QueueWait, full); err != nil {
		return err
	}
	defer s.checks.release()
	body.Charge(nil, s.disk)
	_, err := body.Payload()
	// The index is not needed while the registry takes the context in.
	body.Charge(s.waiting, s.disk)
	return err
}

func checkDigest(spool *payload.Spool, want string) error {
	sum, _ := spool.SHA256()
	if got := "sha256:" + hex.EncodeToString(sum[:]); got != want {
		return &api.Error{Code: api.BadContext, Msg: fmt.Sprintf("the context is %s, not %s", got, want)}
	}
	return nil
}

// fetchContext reads a context that was sent ahead, checks it, and indexes it as
// one that came with its build. The caller closes the Spool.
func (s *Server) fetchContext(b *build, digest string) (*payload.Spool, *payload.Payload, error) {
	if s.Contexts == nil {
		return nil, nil, &api.Error{Code: api.BadContext, Msg: "no contexts are kept here: context_repository is not set"}
	}
	ctx, cancel := context.WithTimeoutCause(b.ctx, s.BuildTimeout, &api.Error{
		Code: api.RegistryTimeout, Msg: fmt.Sprintf("the registry has not sent the context within build_timeout, %v", s.BuildTimeout),
	})
	defer cancel()
	stream, err := s.Contexts.Open(ctx, digest)
	if err != nil {
		return nil, nil, err
	}
	defer stream.Close()
	spool, err := payload.Receive(stream, io.Discard, payload.Options{
		Limits:      s.Limits,
		Dir:         s.TempDir,
		InMemory:    s.SpoolMemory,
		HeadDisk:    s.disk.Open(),
		Disk:        s.disk.Open(),
		ContentKey:  s.isolationKey(b.body.keys).ContentKey(),
		SHA256:      true,
		ContextOnly: true,
	})
	if err != nil {
		if e, ok := errors.AsType[*api.Error](err); ok {
			return nil, nil, e
		}
		if strings.Contains(err.Error(), "error verifying") {
			// The registry's client compares too, and has no type for it.
			return nil, nil, &api.Error{Code: api.BadContext, Msg: fmt.Sprintf("what the registry holds is not %s", digest), Err: err}
		}
		return nil, nil, &api.Error{Code: api.RegistryFailed, Msg: "the context cannot be read from the registry", Err: err}
	}
	if err := checkDigest(spool, digest); err != nil {
		spool.Close()
		return nil, nil, err
	}
	spool.Charge(nil, s.disk)
	p, err := spool.Payload()
	if err != nil {
		spool.Close()
		return nil, nil, err
	}
	return spool, p, nil
}
