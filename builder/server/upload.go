package server

import (
	"bufio"
	"encoding/hex"
	"errors"
	"net/http"
	"os"
	"time"

	"handler/function/api"
	"handler/function/payload"
	"handler/function/signature"
)

// upload is a body that has been received and whose signature has passed.
type upload struct {
	*payload.Spool
	keys   signature.Keys
	signer signer // zero without HMAC
}

// request is a Record.Request. It waits for the sum of the body.
func (u *upload) request() string {
	sum, ok := u.SHA256()
	if !ok {
		return ""
	}
	return hex.EncodeToString(sum[:])
}

// purpose is why a payload is received.
type purpose int

const (
	toBuild purpose = iota
	toJoin          // to build, or to join the build of an earlier delivery
	toStore         // a context that is sent ahead, for the registry
	toRead          // a context out of the registry, for a build
)

// payloadOptions says how to receive a payload. All Options of the server are made here.
// a is the arrival of a request's body; it is nil for a context from the registry, which
// is no stranger's.
func (s *Server) payloadOptions(why purpose, keys signature.Keys, a *arrival) payload.Options {
	opts := payload.Options{
		Limits:     s.Limits,
		Dir:        s.TempDir,
		InMemory:   s.SpoolMemory,
		ContentKey: s.isolationKey(keys).ContentKey(),
		// Two bodies are compared by their sums, and a context is named by its sum.
		SHA256:      why != toBuild,
		ContextOnly: why == toStore || why == toRead,
		Raw:         why == toStore,
	}
	if a == nil {
		opts.HeadDisk, opts.Disk = s.disk.Open(), s.disk.Open()
		return opts
	}
	opts.Gate = s.intake.gate
	opts.HeadSize, opts.Larger, opts.NoRoom = headSize, a.takeSlot, a.makeRoom
	opts.HeadMemory, opts.HeadDisk = s.intake.heads.Open(), a.headDisk
	opts.Memory, opts.Disk = s.intake.uploads.Open(), a.uploadDisk
	return opts
}

// drainWait is how long net/http may read the rest of a refused body. Without it a client
// that is still sending would see a reset in place of the answer. It is short, so that a
// client that has stopped sending gets its answer soon.
const drainWait = 500 * time.Millisecond

// receive reads the body and checks its signature. On success the caller must close the
// upload.
func (s *Server) receive(w http.ResponseWriter, r *http.Request, why purpose) (_ *upload, err error) {
	rc := http.NewResponseController(w)
	defer func() {
		if err != nil {
			rc.SetReadDeadline(time.Now().Add(drainWait))
			return
		}
		// From now on net/http watches the connection, to see whether the client
		// leaves. It would take a deadline for the client's leaving.
		rc.SetReadDeadline(time.Time{})
	}()
	claimed, err := s.readClaim(r, why)
	if err != nil {
		return nil, err
	}
	a, err := s.intake.arrive(s.stopped, r.Body, rc)
	if err != nil {
		return nil, err
	}
	defer a.leave()

	start := time.Now()
	// For Peek alone. A Read of 16 bytes or more goes past the buffer.
	body := bufio.NewReaderSize(a, 16)
	if claimed.macErr != nil {
		// A text envelope carries its signature inside. The first byte tells whether the
		// body is one.
		if first, err := body.Peek(1); err != nil || first[0] != '{' {
			return nil, unauthorized(claimed.macErr)
		}
	}
	verifier := claimed.keys.Verifier(claimed.stamp)
	spool, err := payload.Receive(body, verifier, s.payloadOptions(why, claimed.keys, a))
	if err != nil {
		return nil, bodyError(err)
	}
	s.metrics.Received(spool.Size(), time.Since(start))
	by, err := s.verifyBody(r, claimed, spool, verifier)
	if err != nil {
		spool.Close()
		return nil, err
	}
	spool.Charge(s.waiting, s.disk)
	return &upload{Spool: spool, keys: claimed.keys, signer: by}, nil
}

// claim is what a request says about its signature before its body is read.
type claim struct {
	keys   signature.Keys // that may have made it
	stamp  signature.Timestamp
	mac    signature.MAC
	macErr error // of the header; a text envelope can still have a signature inside
}

func (s *Server) readClaim(r *http.Request, why purpose) (c claim, err error) {
	c.keys, err = s.keys.current()
	if s.DisableHMAC {
		// The keys only isolate builds, and FallbackSecret takes the place of keys that
		// cannot be read.
		return c, nil
	}
	if err != nil {
		return c, err
	}
	if c.stamp, err = s.timestamp(r); err != nil {
		return c, err
	}
	c.mac, c.macErr = signature.Parse(r.Header.Values(api.SignatureHeader))
	if c.macErr != nil && why == toStore {
		return c, unauthorized(c.macErr) // a context is sent in no text envelope
	}
	return c, nil
}

// verifyBody finds the signer of a body that has been received. Without HMAC there is none.
func (s *Server) verifyBody(r *http.Request, c claim, spool *payload.Spool, verifier *signature.Verifier) (signer, error) {
	if s.DisableHMAC {
		return signer{}, nil
	}
	if value, ok := spool.Signature(); ok {
		if value == "" && len(r.Header.Values(api.SignatureHeader)) > 0 {
			return signer{}, errHeaderIgnored
		}
		c.mac, c.macErr = signature.Parse([]string{value})
	}
	if c.macErr != nil {
		return signer{}, unauthorized(c.macErr)
	}
	key, ok := verifier.Verify(c.mac)
	if !ok {
		return signer{}, unauthorized(errors.New("no key made the signature"))
	}
	if ambiguous(verifier.Head()) {
		return signer{}, unauthorized(errors.New("the body reads like something else that is signed"))
	}
	return signer{key, c.stamp != ""}, nil
}

func bodyError(err error) error {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return &api.Error{Code: api.SlowUpload, Msg: "the body came too slowly", Err: err}
	}
	return &api.Error{Code: api.BadBody, Msg: "the body ended too early", Err: err}
}
