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

// Contexts keeps build contexts that are sent ahead of their builds. Every error of its
// methods is an *api.Error. The errors of the stream that Open returns need not be.
//
// tenant is the id of the tenant whose context it is, or "" without a file of tenants. A
// context of one tenant is not there for another.
type Contexts interface {
	Has(ctx context.Context, tenant, digest string) (bool, error)
	Put(ctx context.Context, tenant, digest string, size int64, open func() io.Reader) error
	Open(ctx context.Context, tenant, digest string) (io.ReadCloser, error)
}

var errNoContext = &api.Error{Code: api.NotFound, Msg: "this context is not here"}

// contextDigest returns the digest in the path of a request.
func (s *Server) contextDigest(r *http.Request) (string, error) {
	if s.Contexts == nil {
		return "", &api.Error{Code: api.NotFound, Msg: "this builder keeps no contexts: context_repository is not set"}
	}
	digest := r.PathValue(segment)
	if !buildconfig.ValidDigest(digest) {
		return "", &api.Error{Code: api.BadContext, Msg: fmt.Sprintf("%q is not sha256: and 64 hex digits", digest)}
	}
	return digest, nil
}

// serveHasContext says with 200 or 404 whether a context is there.
func (s *Server) serveHasContext(w http.ResponseWriter, r *http.Request) {
	id, _ := nameCall(w, r)
	opts := reply.Options{ID: id}
	by, err := s.signedBy(r)
	if err != nil {
		s.refuseUnverified(w, r, err, opts)
		return
	}
	opts.Sign = by.sign
	there, err := s.hasContext(r, by)
	switch {
	case err != nil:
		s.refuseSigned(w, r, by, because(r.Context(), err), opts)
	case !there:
		writeRefusal(w, r, errNoContext, opts) // an answer like any other
	default:
		w.WriteHeader(http.StatusOK)
	}
}

func (s *Server) hasContext(r *http.Request, by signer) (bool, error) {
	if err := by.suspended(); err != nil {
		return false, err
	}
	digest, err := s.contextDigest(r)
	if err != nil {
		return false, err
	}
	return s.Contexts.Has(r.Context(), by.tenantID(), digest)
}

// servePutContext stores a context: 201, or 200 if it was there already. The context is
// checked as in a build. It reaches the registry only after its signature has passed.
func (s *Server) servePutContext(w http.ResponseWriter, r *http.Request) {
	c := s.newCall(w, r)
	end, ok := s.begin()
	if !ok {
		discardBody(w, r)
		s.refuseUnverified(w, r, errShuttingDown, c.answer())
		return
	}
	defer end()
	body, err := s.receive(w, r, toStore)
	if err != nil {
		s.refuseUnverified(w, r, err, c.answer())
		return
	}
	defer body.Close()
	c.log = body.logTo(c.log)
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	defer context.AfterFunc(s.stopped, func() { cancel(errShuttingDown) })()
	defer s.working(body.tenantID(), cancel)()
	var digest string
	var there bool
	if err = body.refused(); err == nil {
		digest, err = s.contextDigest(r)
	}
	if err == nil {
		there, err = s.storeContext(ctx, digest, body)
	}
	if err != nil {
		opts := c.answer()
		opts.Sign, opts.Request = body.sign, body.request()
		s.refuseSigned(w, r, body.signer, s.shares.busy(because(ctx, err), body.share), opts)
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
	opts := reply.Options{NotBefore: time.Now().Add(settle), Sign: body.sign}
	if err := reply.Value(w, status, answer, opts); err != nil {
		c.log.Warn().AnErr("cause", err).Msg("answer not delivered")
	}
}

// maxContextSlots is how many contexts for the registry are decompressed and indexed at once. Where
// there are several tenants, one has half of them.
const maxContextSlots = 2

func (s *Server) storeContext(ctx context.Context, digest string, body *upload) (there bool, err error) {
	if err := s.checkContext(ctx, body); err != nil {
		return false, err
	}
	if err := checkDigest(body.Spool, digest); err != nil {
		return false, err
	}
	if there, err := s.Contexts.Has(ctx, body.tenantID(), digest); there || err != nil {
		return there, err
	}
	return false, s.Contexts.Put(ctx, body.tenantID(), digest, body.Size(), func() io.Reader { return body.Raw() })
}

// checkContext reads a context in the same way as a build reads it later.
func (s *Server) checkContext(ctx context.Context, body *upload) error {
	reader := body.reader(maxContextSlots)
	waiting, stop := s.untilShutdown(ctx)
	defer stop()
	switch err := s.contextSlots.Acquire(waiting, reader, s.QueueWait); {
	case waiting.Err() != nil && err != nil:
		return canceled(context.Cause(waiting))
	case err != nil:
		return &api.Error{Code: api.QueueTimeout, Msg: "other contexts are being checked, and queue_wait has passed"}
	}
	defer s.contextSlots.Release(reader.ID)
	body.charge(nil)
	_, err := body.Payload()
	// The registry needs only the body, so the index can go if others need its memory.
	body.charge(body.share.memory)
	return err
}

func checkDigest(spool *payload.Spool, want string) error {
	sum, _ := spool.SHA256()
	if got := "sha256:" + hex.EncodeToString(sum[:]); got != want {
		return &api.Error{Code: api.BadContext, Msg: fmt.Sprintf("the context is %s, not %s", got, want)}
	}
	return nil
}

// fetchContext reads a context out of the registry. It is checked and indexed like a
// context in a build's body. The caller must close the Spool.
func (s *Server) fetchContext(j *job, digest string) (*payload.Spool, *payload.Payload, error) {
	if s.Contexts == nil {
		return nil, nil, &api.Error{Code: api.BadContext, Msg: "this builder keeps no contexts: context_repository is not set"}
	}
	limit := s.buildTimeout(j.body.signer)
	ctx, cancel := context.WithTimeoutCause(j.ctx, limit, &api.Error{
		Code: api.RegistryTimeout, Msg: fmt.Sprintf("the registry has not sent the context within build_timeout, %v", limit),
	})
	defer cancel()
	stream, err := s.Contexts.Open(ctx, j.body.tenantID(), digest)
	if err != nil {
		return nil, nil, err
	}
	defer stream.Close()
	opts, disk := s.payloadOptions(toRead, j.body.root, nil), j.body.share.disk
	opts.HeadDisk, opts.Disk = disk.Open(), disk.Open()
	spool, err := payload.Receive(stream, io.Discard, opts)
	if err != nil {
		if e, ok := errors.AsType[*api.Error](err); ok {
			return nil, nil, e
		}
		if strings.Contains(err.Error(), "error verifying") {
			// The registry's client compares the digest too. Its error has no type.
			return nil, nil, &api.Error{Code: api.BadContext, Msg: fmt.Sprintf("the registry holds a context that is not %s", digest), Err: err}
		}
		return nil, nil, &api.Error{Code: api.RegistryFailed, Msg: "the context cannot be read from the registry", Err: err}
	}
	if err := checkDigest(spool, digest); err != nil {
		spool.Close()
		return nil, nil, err
	}
	spool.Charge(nil, disk)
	p, err := spool.Payload()
	if err != nil {
		spool.Close()
		return nil, nil, err
	}
	return spool, p, nil
}
