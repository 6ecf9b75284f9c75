package server

import (
	"bufio"
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"handler/function/api"
	"handler/function/budget"
	"handler/function/isolation"
	"handler/function/payload"
	"handler/function/signature"
	"handler/function/tenants"
)

// upload is a body that has been received and whose signature has passed.
type upload struct {
	*payload.Spool
	signer
	share  *share
	leave  func() // the share
	noRoom error  // the share has none for the body
}

// charge has the tenant's share of the disk hold the body, and memory everything else.
func (u *upload) charge(memory *budget.Budget) bool { return u.Charge(memory, u.share.disk) }

// Close frees what the body takes. It must be called once.
func (u *upload) Close() error {
	defer u.leave()
	return u.Spool.Close()
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
// is no stranger's. The caller then says which disk holds it.
func (s *Server) payloadOptions(why purpose, root isolation.Key, a *arrival) payload.Options {
	opts := payload.Options{
		Limits:     s.Limits,
		Dir:        s.TempDir,
		InMemory:   s.SpoolMemory,
		ContentKey: root.ContentKey(),
		// Two bodies are compared by their sums, and a context is named by its sum.
		SHA256:      why != toBuild,
		ContextOnly: why == toStore || why == toRead,
		Raw:         why == toStore,
	}
	if a == nil {
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

// discardBody reads a body that nobody wants, for drainWait at most. If it has not ended by then,
// net/http ends the connection after the answer. A client that waits for 100 Continue is not told to
// send.
func discardBody(w http.ResponseWriter, r *http.Request) {
	if r.Body == nil || r.Body == http.NoBody || r.Header.Get("Expect") != "" {
		return
	}
	rc := http.NewResponseController(w)
	rc.SetReadDeadline(time.Now().Add(drainWait))
	if _, err := io.CopyN(io.Discard, r.Body, 4<<10); err == io.EOF {
		rc.SetReadDeadline(time.Time{}) // from now on net/http watches for the client's leaving
	}
}

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
			return nil, claimed.unauthorized(claimed.macErr)
		}
	}
	verifier := keysOf(claimed.list).Verifier(claimed.stamp)
	spool, err := payload.Receive(body, verifier, s.payloadOptions(why, claimed.root, a))
	if err != nil {
		return nil, bodyError(err)
	}
	s.metrics.Received(spool.Size(), time.Since(start))
	by, err := s.verifyBody(r, a, claimed, spool, verifier)
	if err != nil {
		spool.Close()
		return nil, err
	}
	u := &upload{Spool: spool, signer: by}
	u.share, u.leave = s.shares.enter(by)
	if !u.charge(u.share.memory) {
		u.noRoom = s.shares.busy(payload.ErrNoRoom, u.share)
	}
	return u, nil
}

// claim is what a request says about its signature before its body is read.
type claim struct {
	roster
	list   []tenants.Candidate // whose keys may have made it
	open   bool                // the body has to say whose keys they are
	named  bool                // the header X-Build-Tenant names the tenant
	stamp  signature.Timestamp
	mac    signature.MAC
	macErr error // of the header; a text envelope can still have a signature inside
}

func (s *Server) readClaim(r *http.Request, why purpose) (c claim, err error) {
	c.roster, err = s.roster()
	if err != nil || s.DisableHMAC {
		return c, err
	}
	if c.stamp, err = s.timestamp(r); err != nil {
		return c, err
	}
	c.mac, c.macErr = signature.Parse(r.Header.Values(api.SignatureHeader))
	if c.macErr != nil && why == toStore {
		return c, c.unauthorized(c.macErr) // a context is sent in no text envelope
	}
	c.named = nameIn(r.Header) != ""
	list, ok := c.candidates(r)
	if !ok && why == toStore {
		return c, c.unauthorized(errUnnamed) // a context names no image
	}
	c.list, c.open = list, !ok
	return c, nil
}

// verifyBody finds the signer of a body that has been received. Without HMAC it is anybody.
func (s *Server) verifyBody(r *http.Request, a *arrival, c claim, spool *payload.Spool, verifier *signature.Verifier) (signer, error) {
	if s.DisableHMAC {
		return signer{roster: c.roster}, nil
	}
	if value, ok := spool.Signature(); ok {
		if value == "" && len(r.Header.Values(api.SignatureHeader)) > 0 {
			return signer{}, c.headerIgnored()
		}
		c.mac, c.macErr = signature.Parse([]string{value})
	}
	if c.macErr != nil {
		return signer{}, c.unauthorized(c.macErr)
	}
	if list, again, err := s.askBody(r.Context(), a, c, spool); err != nil {
		return signer{}, err
	} else if again != nil {
		c.list, verifier = list, again
	}
	place, ok := verifier.Verify(c.mac)
	if !ok {
		return signer{}, c.unauthorized(errNoMAC)
	}
	if ambiguous(verifier.Head()) {
		return signer{}, c.unauthorized(errors.New("the body reads like something else that is signed"))
	}
	return s.accept(c.roster, c.list[place], c.stamp != "")
}

// tooLarge returns an error if the body is over its tenant's own limit. Only somebody with a key
// of the tenant is told: the limit tells that there is such a tenant.
func (u *upload) tooLarge() error {
	if !u.file() || u.tenant.MaxBodyBytes == 0 || u.Size() <= u.tenant.MaxBodyBytes {
		return nil
	}
	return &api.Error{Code: api.TooLarge, Msg: fmt.Sprintf("the body is over the tenant's limit of %d bytes (max_body_bytes in the file of tenants)", u.tenant.MaxBodyBytes)}
}

// refused returns an error if the signer may not have done what it asks for with its body,
// whatever the body is for.
func (u *upload) refused() error { return cmp.Or(u.suspended(), u.tooLarge(), u.noRoom) }

func bodyError(err error) error {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return &api.Error{Code: api.SlowUpload, Msg: "the body came too slowly", Err: err}
	}
	return &api.Error{Code: api.BadBody, Msg: "the body ended too early", Err: err}
}
