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
	signer signer // without HMAC, the zero one
}

// request is a Record.Request.
func (u *upload) request() string {
	sum, ok := u.SHA256()
	if !ok {
		return ""
	}
	return hex.EncodeToString(sum[:])
}

// drainWait is for how long net/http may read the rest of a body that is
// refused. A client that is still sending would see a reset otherwise; one that
// sends nothing must not keep its answer from being written.
const drainWait = 500 * time.Millisecond

// receive reads the body and checks its signature. opts says what the body is;
// its limits and places are set here. On success the caller closes the upload.
func (s *Server) receive(w http.ResponseWriter, r *http.Request, opts payload.Options) (_ *upload, err error) {
	rc := http.NewResponseController(w)
	defer func() {
		if err != nil {
			rc.SetReadDeadline(time.Now().Add(drainWait))
			return
		}
		// The server watches the connection for the client's leaving from now
		// on; a deadline left behind would look like that.
		rc.SetReadDeadline(time.Time{})
	}()
	var (
		keys   signature.Keys
		stamp  signature.Timestamp
		mac    signature.MAC
		macErr error
	)
	if keys, err = s.keys.now(); err != nil && !s.DisableHMAC {
		return nil, err
	}
	if !s.DisableHMAC {
		if stamp, err = s.timestamp(r); err != nil {
			return nil, err
		}
		mac, macErr = signature.Parse(r.Header.Values(api.SignatureHeader))
		if macErr != nil && opts.ContextOnly {
			return nil, unauthorized(macErr)
		}
	}
	a, err := s.intake.arrive(s.stopped, r.Body, rc)
	if err != nil {
		return nil, err
	}
	defer a.leave()

	start := time.Now()
	body := bufio.NewReaderSize(a, 16)
	if macErr != nil {
		// Only the text envelope carries its signature itself, and its first byte tells.
		if first, err := body.Peek(1); err != nil || first[0] != '{' {
			return nil, unauthorized(macErr)
		}
	}
	verifier := keys.Verifier(stamp)
	opts.Limits, opts.Dir, opts.InMemory, opts.Gate = s.Limits, s.TempDir, s.SpoolMemory, s.intake.gate
	opts.HeadSize, opts.Larger, opts.NoRoom = headSize, a.takeSlot, a.makeRoom
	opts.HeadMemory, opts.HeadDisk = s.intake.heads.Open(), a.headDisk
	opts.Memory, opts.Disk = s.intake.uploads.Open(), a.uploadDisk
	opts.ContentKey = s.isolationKey(keys).ContentKey()
	spool, err := payload.Receive(body, verifier, opts)
	if err != nil {
		return nil, bodyError(err)
	}
	s.metrics.Received(spool.Size(), time.Since(start))
	if s.DisableHMAC {
		spool.Charge(s.waiting, s.disk)
		return &upload{Spool: spool, keys: keys}, nil
	}
	if value, ok := spool.Signature(); ok {
		if value == "" && len(r.Header.Values(api.SignatureHeader)) > 0 {
			spool.Close()
			return nil, errHeaderIgnored
		}
		mac, macErr = signature.Parse([]string{value})
	}
	if macErr != nil {
		spool.Close()
		return nil, unauthorized(macErr)
	}
	key, ok := verifier.Verify(mac)
	if !ok {
		spool.Close()
		return nil, unauthorized(errors.New("no key made the signature"))
	}
	if ambiguous(verifier.Head()) {
		spool.Close()
		return nil, unauthorized(errors.New("the body reads like something else that is signed"))
	}
	spool.Charge(s.waiting, s.disk)
	return &upload{Spool: spool, keys: keys, signer: signer{key, stamp != ""}}, nil
}

func canceled(cause error) error {
	if e, ok := errors.AsType[*api.Error](cause); ok {
		return e
	}
	return &api.Error{Code: api.Canceled, Msg: "the client went away", Err: cause}
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
