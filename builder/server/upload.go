package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
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
	keys signature.Keys
	key  []byte // that signed the body; nil without HMAC
}

// uploadWait is how long a caller that would come back waits for others' bodies to
// be received. It is short: bodies are.
const uploadWait = 30 * time.Second

// drainWait is for how long net/http may read the rest of a body that is
// refused. A client that is still sending would see a reset otherwise; one that
// sends nothing must not keep its answer from being written.
const drainWait = 500 * time.Millisecond

// receive reads the body and checks its signature. opts says what the body is;
// its limits and places are set here. On success the caller closes the upload.
func (s *Server) receive(w http.ResponseWriter, r *http.Request, c *call, opts payload.Options) (_ *upload, err error) {
	rc := http.NewResponseController(w)
	ended := make(chan struct{})
	keep := context.AfterFunc(s.stopped, func() {
		defer close(ended)
		rc.SetReadDeadline(time.Unix(0, 0))
	})
	defer func() {
		if !keep() {
			<-ended // its deadline is not to be the last
		}
		if err != nil {
			rc.SetReadDeadline(time.Now().Add(drainWait))
			return
		}
		// The server watches the connection for the client's leaving from now
		// on; a deadline left behind would look like that.
		rc.SetReadDeadline(time.Time{})
	}()
	keys, err := s.keys()
	if err != nil && !s.DisableHMAC {
		return nil, &api.Error{Code: api.NotReady, Msg: "the payload secret cannot be read", Err: err}
	}
	mac, macErr := signature.Parse(r.Header.Values(api.SignatureHeader))

	pace := &paced{body: r.Body, rc: rc, stopped: s.stopped, start: time.Now(), rate: s.UploadMinRate, grace: s.UploadGrace}
	body := bufio.NewReaderSize(pace, 16)
	if macErr != nil && !s.DisableHMAC {
		if opts.ContextOnly {
			return nil, unauthorized(macErr)
		}
		// Only the text envelope carries its signature itself. One byte tells,
		// and whoever does not send it gets no slot.
		if first, err := body.Peek(1); err != nil || first[0] != '{' {
			return nil, unauthorized(macErr)
		}
	}
	if err := s.take(r.Context(), c, s.uploads, uploadWait, fmt.Sprintf("%d bodies are being received, as many as may at once", s.MaxUploads)); err != nil {
		return nil, err
	}
	defer s.uploads.release()
	pace.start, pace.left = time.Now(), time.Time{}

	verifier := keys.Verifier()
	start := time.Now()
	opts.Limits, opts.Dir, opts.Memory = s.Limits, s.TempDir, s.SpoolMemory
	opts.TimeKey = s.isolationKey(keys).TimeKey(tenant)
	spool, err := payload.Receive(body, verifier, opts)
	if err != nil {
		return nil, bodyError(err)
	}
	s.metrics.Received(spool.Size(), time.Since(start))
	if s.DisableHMAC {
		return &upload{Spool: spool, keys: keys}, nil
	}
	if value, ok := spool.Signature(); ok {
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
	return &upload{Spool: spool, keys: keys, key: key}, nil
}

// unauthorized has one message for every cause: which it was helps only who
// tries keys.
func unauthorized(cause error) error {
	return &api.Error{
		Code: api.Unauthorized,
		Msg:  "the request is not signed with the payload secret",
		Err:  cause,
	}
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

// paced reads a body with a deadline that moves on as bytes come, so that a
// client slower than rate does not hold its upload slot. What passes between two
// reads is not the client's time.
type paced struct {
	body    io.Reader
	rc      *http.ResponseController
	stopped context.Context // its end puts the deadline into the past
	start   time.Time
	rate    int64 // bytes per second
	grace   time.Duration
	n       int64
	set     time.Time // the deadline that was
	left    time.Time // the last Read; zero before the first since start
}

func (p *paced) Read(b []byte) (int, error) {
	now := time.Now()
	if !p.left.IsZero() {
		p.start = p.start.Add(now.Sub(p.left))
	}
	defer func() { p.left = time.Now() }()
	deadline := p.start.Add(p.grace + time.Duration(float64(p.n)/float64(p.rate)*float64(time.Second)))
	// A fast client moves the deadline by far more than it uses up.
	if now.After(deadline) {
		return 0, os.ErrDeadlineExceeded
	} else if deadline.Sub(p.set) > p.grace/8 {
		if err := p.rc.SetReadDeadline(deadline); err != nil {
			return 0, err
		}
		p.set = deadline
	}
	// Asked after the deadline was set, which may have moved it out of the past.
	if p.stopped.Err() != nil {
		return 0, errShuttingDown
	}
	n, err := p.body.Read(b)
	p.n += int64(n)
	if err != nil && err != io.EOF && p.stopped.Err() != nil {
		err = errShuttingDown
	}
	return n, err
}
