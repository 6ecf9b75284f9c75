// Package payload turns a request's body into what is to be built: it spools
// the body while it is hashed, decompressed and indexed, and serves the build
// context out of the spooled tar. Nothing is unpacked onto a file system.
package payload

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"runtime/debug"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"handler/function/api"
)

// Limits bound what a client may send. Zero lets nothing pass. An error names
// the limit by the function's setting.
type Limits struct {
	Body     int64 // bytes as they are sent
	Unpacked int64 // bytes of the tar, decompressed
	Config   int64 // bytes of com.openfaas.docker.config
	Secrets  int64 // bytes of com.openfaas.secrets
	Names    int64 // bytes of all paths and link targets together; apart from it, bytes of long extended headers
	Entries  int   // of the tar, and parent directories it leaves out
	Path     int   // bytes of one path or link target
}

// Options say how to receive a payload.
type Options struct {
	Limits Limits

	// Dir is where a payload goes that does not fit into memory.
	Dir string

	// Memory is how many bytes of a tar are kept in memory. A tar that is
	// larger lies in a file in Dir, which has no name.
	Memory int64

	// TimeKey keys the hashes that carry files' content in their times.
	TimeKey [32]byte

	// SHA256 has all of the body hashed while it arrives.
	SHA256 bool

	// ContextOnly is for a build context that is sent ahead: the tar holds
	// context/ and need hold nothing else, and is no text envelope.
	ContextOnly bool

	// Raw keeps the body as it was sent, for Spool.Raw, and not the tar in it.
	// The Context cannot be read then.
	Raw bool
}

// maxWindow bounds the memory of a zstd decoder. It is what RFC 8878 recommends
// to support, and what zstd's levels up to 19 use.
const maxWindow = 8 << 20

// Spool holds a payload that was received. Its signature may not have been
// checked yet.
type Spool struct {
	store    *store
	size     int64
	sum      hash.Hash // of the body; nil until it is asked for, if it is stored as sent
	envelope *envelope // nil but for the text form
	payload  *Payload
	err      error
}

// Payload is what a client sent, its form checked.
type Payload struct {
	Config  []byte   // nil if there is none, as with ContextOnly there may be
	Secrets []byte   // nil if there are none
	Context *Context // nil if there is none: the config may say where it is

	// Warnings name what was ignored.
	Warnings []string
}

// Receive reads body to its end, or until it is over the limit. Every byte that
// a signature is over is written to signed in order, by one goroutine: the body
// as sent or, from a text envelope, the decoded bytes of its tar.
//
// The errors it returns are those that a client may be told before its
// signature has passed: an *api.Error of code too_large when the body is over
// Limits.Body, and what body's Read returned. All others are held for
// [Spool.Payload]. The caller must close the Spool.
//
// Receive may not read for as long as the decompressor needs for what has come,
// so a caller who wants a minimum rate must count the time inside of Read only.
func Receive(body io.Reader, signed io.Writer, opts Options) (*Spool, error) {
	s := &Spool{store: &store{dir: opts.Dir, memory: opts.Memory}}
	if err := s.receive(body, signed, &opts); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Spool) receive(body io.Reader, signed io.Writer, opts *Options) error {
	in := newFanout()
	defer in.recycle()
	first := in.next()
	eof, err := s.fill(first, body, opts.Limits.Body)
	if err != nil {
		return err
	}

	// The goroutines end with the stream, and the stream with this function.
	var work sync.WaitGroup
	defer work.Wait()
	defer in.close()
	form := formOf(first.buf)
	if form == formEnvelope && opts.ContextOnly {
		form = formTar
	}
	// Of a plain tar what is stored is the body, which can be summed later: while it
	// arrives, the signature and the index need the processors.
	if form != formTar || opts.SHA256 {
		s.sum = sha256.New()
		copyTo(&work, in.tap(), s.sum)
	}
	if form == formEnvelope {
		s.envelope = &envelope{}
		t := in.tap()
		work.Go(func() {
			defer t.drain()
			s.hold(func() (*Payload, error) { return s.unwrap(t, signed, opts) })
		})
	} else {
		copyTo(&work, in.tap(), signed)
		s.unpack(&work, in, form, opts)
	}

	in.send(first)
	for !eof {
		c := in.next()
		if eof, err = s.fill(c, body, opts.Limits.Body); err != nil {
			return err
		}
		in.send(c)
	}
	in.close()
	work.Wait()

	if s.err == nil {
		s.hold(func() (*Payload, error) { return s.payload, s.store.finish() })
	}
	return nil
}

// fill reads body until c is full or the body has ended.
func (s *Spool) fill(c *chunk, body io.Reader, limit int64) (eof bool, err error) {
	for len(c.buf) < cap(c.buf) {
		n, err := body.Read(c.buf[len(c.buf):cap(c.buf)])
		c.buf = c.buf[:len(c.buf)+n]
		s.size += int64(n)
		if s.size > limit {
			return false, tooLarge("the body is over the limit of %d bytes (max_body_bytes)", limit)
		}
		if err == io.EOF {
			return true, nil
		}
		if err != nil {
			return false, fmt.Errorf("reading body: %w", err)
		}
	}
	return false, nil
}

// copyTo writes the stream of t to w. A hash takes everything; what another
// writer makes of its error is its owner's business.
func copyTo(work *sync.WaitGroup, t *tap, w io.Writer) {
	work.Go(func() {
		defer t.drain()
		t.WriteTo(w)
	})
}

// unpack starts to spool and index a stream that is no envelope.
func (s *Spool) unpack(work *sync.WaitGroup, in *fanout, f form, opts *Options) {
	if opts.Raw && f != formTar {
		copyTo(work, in.tap(), s.store)
		t := in.tap()
		work.Go(func() {
			defer t.drain()
			s.hold(func() (*Payload, error) {
				d, err := newDecompressor(f, t)
				if err != nil {
					return nil, err
				}
				defer d.Close()
				return index(d, s.store, opts)
			})
		})
		return
	}
	if f == formTar {
		// What is stored is what was sent, so it need not pass through the
		// index.
		copyTo(work, in.tap(), s.store)
		t := in.tap()
		work.Go(func() {
			defer t.drain()
			s.hold(func() (*Payload, error) { return index(t, s.store, opts) })
		})
		return
	}
	t := in.tap()
	work.Go(func() {
		defer t.drain()
		s.hold(func() (*Payload, error) {
			d, err := newDecompressor(f, t)
			if err != nil {
				return nil, err
			}
			defer d.Close()
			return index(io.TeeReader(d, s.store), s.store, opts)
		})
	})
}

// unwrap reads a text envelope, and spools and indexes the tar in it.
func (s *Spool) unwrap(t *tap, signed io.Writer, opts *Options) (*Payload, error) {
	var (
		work     sync.WaitGroup
		out      = newFanout()
		payload  *Payload
		indexErr error
	)
	defer out.recycle()
	defer work.Wait()
	defer out.close()
	copyTo(&work, out.tap(), signed)
	inner := out.tap()
	work.Go(func() {
		defer inner.drain()
		payload, indexErr = guard(func() (*Payload, error) {
			inner.fill() // nothing at all is a tar that ends early
			d, err := newDecompressor(formOf(inner.rest), inner)
			if err != nil {
				return nil, err
			}
			defer d.Close()
			return index(io.TeeReader(d, s.store), s.store, opts)
		})
	})
	if err := s.envelope.read(t, out); err != nil {
		return nil, err
	}
	out.close()
	work.Wait()
	return payload, indexErr
}

// hold keeps what f returns for [Spool.Payload]. Of a payload that is refused,
// nothing more is stored but a body that is still to be summed, and that in memory.
func (s *Spool) hold(f func() (*Payload, error)) {
	s.payload, s.err = guard(f)
	if s.err != nil {
		s.payload = nil
		if s.sum != nil {
			s.store.Close()
		} else {
			s.store.refuse()
		}
	}
}

// guard turns a panic of f into an error: a decompressor that trips over
// hostile bytes must not take other clients' builds with it.
func guard(f func() (*Payload, error)) (p *Payload, err error) {
	defer func() {
		if v := recover(); v != nil {
			p, err = nil, fmt.Errorf("reading payload: panic: %v\n%s", v, debug.Stack())
		}
	}()
	return f()
}

// Signature is the one that a text envelope holds, "" when it holds none. ok is
// false for the other forms, whose signature is in a header.
func (s *Spool) Signature() (value string, ok bool) {
	if s.envelope == nil {
		return "", false
	}
	return s.envelope.signature, true
}

// SHA256 is of the body as it was sent. It is not known of a plain tar over
// Options.Memory that was refused, unless Options asked for it. It must not be
// called concurrently, nor after Close.
func (s *Spool) SHA256() (sum [sha256.Size]byte, ok bool) {
	if s.sum == nil {
		h := sha256.New()
		if n, err := io.Copy(h, s.Raw()); err != nil || n != s.size {
			return sum, false
		}
		s.sum = h
	}
	s.sum.Sum(sum[:0])
	return sum, true
}

// Raw reads the body as it was sent, if Options asked for that.
func (s *Spool) Raw() *io.SectionReader { return io.NewSectionReader(s.store, 0, s.size) }

// ErrNoContext is of a tar without a context whose config names none.
var ErrNoContext = &api.Error{Code: api.BadTar, Msg: fmt.Sprintf("reading tar: it holds no directory %q", api.ContextDir)}

// Size is of the body as it was sent, in bytes.
func (s *Spool) Size() int64 { return s.size }

// Payload is what the body holds. Its error, always an *api.Error, is for a
// client whose signature has passed.
func (s *Spool) Payload() (*Payload, error) {
	if s.err != nil {
		return nil, api.AsError(s.err)
	}
	return s.payload, nil
}

// Close frees the memory or the file. The Context cannot be read after it. A
// second call does nothing.
func (s *Spool) Close() error { return s.store.Close() }

// form is how a body holds its tar.
type form int

const (
	formTar form = iota
	formGzip
	formZstd
	formEnvelope
)

// formOf looks at the first bytes of a stream.
func formOf(b []byte) form {
	switch {
	case bytes.HasPrefix(b, []byte("{")):
		return formEnvelope
	case bytes.HasPrefix(b, []byte("\x1f\x8b")):
		return formGzip
	case bytes.HasPrefix(b, []byte("\x28\xb5\x2f\xfd")):
		return formZstd
	case len(b) >= 4 && b[0]&0xf0 == 0x50 && string(b[1:4]) == "\x2a\x4d\x18":
		// A skippable frame: pzstd begins with one.
		return formZstd
	}
	return formTar
}

// decompressor reads what f holds, and words its errors for the client.
type decompressor struct {
	name  string
	r     io.Reader
	close func()
}

func newDecompressor(f form, t *tap) (*decompressor, error) {
	switch f {
	case formGzip:
		r, err := gzip.NewReader(t)
		if err != nil {
			return nil, refuse(err, "reading gzip: %s", decompressError(err))
		}
		return &decompressor{name: "gzip", r: r, close: func() {}}, nil
	case formZstd:
		// One at a time means no goroutines.
		r, err := zstd.NewReader(t, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, refuse(err, "reading zstd: %s", decompressError(err))
		}
		return &decompressor{name: "zstd", r: r, close: r.Close}, nil
	default:
		return &decompressor{name: "tar", r: t, close: func() {}}, nil
	}
}

func (d *decompressor) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	switch {
	case err == nil || err == io.EOF:
		return n, err
	case errors.Is(err, zstd.ErrWindowSizeExceeded) || errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return n, tooLarge("the zstd window is over the limit of %d bytes", maxWindow)
	}
	return n, refuse(err, "reading %s: %s", d.name, decompressError(err))
}

func (d *decompressor) Close() { d.close() }

func decompressError(err error) string {
	switch {
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return "it is cut short"
	case errors.Is(err, gzip.ErrHeader) || errors.Is(err, zstd.ErrMagicMismatch):
		return "something else follows it"
	case errors.Is(err, gzip.ErrChecksum) || errors.Is(err, zstd.ErrCRCMismatch):
		return "its checksum is wrong"
	}
	return "it is corrupt"
}

func refuse(cause error, format string, args ...any) error {
	return &api.Error{Code: api.BadTar, Msg: fmt.Sprintf(format, args...), Err: cause}
}

func tooLarge(format string, args ...any) error {
	return &api.Error{Code: api.TooLarge, Msg: fmt.Sprintf(format, args...)}
}
