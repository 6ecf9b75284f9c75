// Package payload turns a request's body into what is to be built: it spools
// the body while it is hashed, decompresses and indexes it once its signature has
// passed, and serves the build context out of the spooled tar. Nothing is unpacked
// onto a file system.
package payload

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"sync"

	"handler/function/api"
	"handler/function/budget"
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

	// InMemory is how many bytes of a body, or of the tar in it, are kept in
	// memory. What is larger lies in a file in Dir, which has no name.
	InMemory int64

	// HeadSize is how much of a body is taken in by itself, in one goroutine and
	// little memory. Larger is called once, before what is larger goes on as a
	// stream; its error ends the body. It may be nil.
	HeadSize int64
	Larger   func() error

	// NoRoom is called where HeadDisk, or later Disk, is spent. Receive tries again when
	// it returns nil; its error ends the body. It may be nil, which ends the body too.
	NoRoom func() error

	// HeadMemory and HeadDisk are what a body takes until Larger is called, Memory
	// and Disk what it takes afterwards. The Spool closes all four. A nil one counts
	// nothing.
	HeadMemory, HeadDisk, Memory, Disk *budget.Account

	// Gate is what all bodies share that are received as streams. It may be nil.
	Gate Gate

	// ContentKey keys the hashes of files' contents.
	ContentKey [32]byte

	// SHA256 has all of the body hashed while it arrives.
	SHA256 bool

	// ContextOnly is for a build context that is sent ahead: the tar holds
	// context/ and need hold nothing else, and is no text envelope.
	ContextOnly bool

	// Raw keeps the body as it was sent, for Spool.Raw, and not the tar in it.
	// The Context cannot be read then.
	Raw bool
}

// readSize is how much of a stored body is read at once.
const readSize = 64 << 10

// Spool holds a body that was received. Its signature may not have been checked
// yet.
type Spool struct {
	opts      Options
	form      form
	size      int64
	raw       *store // the body as it was sent
	tar       *store // what was unpacked of it; nil for a plain tar, and before that
	signature string // of an envelope

	memory *budget.Account // HeadMemory, or Memory of what is larger
	unpack *budget.Budget  // of the disk, for what is unpacked

	summed sync.Once
	sum    [sha256.Size]byte
	sumOK  bool

	payload *Payload // nil while there is no index
	err     error    // why there is none and will be none
}

// Payload is what a client sent, its form checked.
type Payload struct {
	Config  []byte   // nil if there is none, as with ContextOnly there may be
	Secrets []byte   // nil if there are none
	Context *Context // nil if there is none: the config may say where it is

	// Warnings name what was ignored.
	Warnings []string

	memory int64 // bytes that the index has taken
}

// Receive takes in a body to its end, or until it is over the limit. The body is stored
// as it was sent. Every byte that a signature is over is written to signed, in order and
// by one goroutine at a time: the body or, from a text envelope, the decoded bytes of its
// tar. signed is a hash: its Write does not fail.
//
// A plain tar that is larger than HeadSize is indexed meanwhile, as far as there is
// memory for the index. Nothing is decompressed.
//
// The errors that it returns may be told before the signature has passed: an *api.Error
// of code too_large when the body is over Limits.Body, one of code no_space when there is
// no room for its head, and what Larger and body's Read returned. All others are held for
// [Spool.Payload]. The caller must close the Spool.
//
// Receive may not read for as long as the index needs for what has come, so a caller
// who wants a minimum rate must count the time inside of Read only.
func Receive(body io.Reader, signed io.Writer, opts Options) (*Spool, error) {
	s := &Spool{opts: opts, memory: opts.HeadMemory}
	s.raw = &store{dir: opts.Dir, most: opts.InMemory, memory: opts.HeadMemory, disk: opts.HeadDisk, noRoom: opts.NoRoom, direct: true}
	if err := s.receive(body, signed); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Spool) receive(body io.Reader, signed io.Writer) error {
	whole, err := s.readHead(body, signed)
	if err != nil {
		return err
	}
	if whole {
		s.raw.endHead()
		if s.form == formEnvelope {
			s.hold(func() (*Payload, error) { return nil, s.readEnvelope(s.Raw(), s.size, signed) })
		}
		return nil
	}
	if s.opts.Larger != nil {
		if err := s.opts.Larger(); err != nil {
			return err
		}
	}
	s.memory = s.opts.Memory
	if err := s.raw.move(s.opts.Memory, s.opts.Disk); err != nil {
		return err
	}
	return s.stream(body, signed)
}

// headPiece is what a body has of memory that stands still before it has sent anything,
// in bytes.
const headPiece = 8 << 10

// readHead reads the body to its end, or until it is larger than HeadSize.
func (s *Spool) readHead(body io.Reader, signed io.Writer) (whole bool, err error) {
	buf := make([]byte, headPiece)
	n := 0
	for n < magicLen && err == nil {
		var m int
		m, err = body.Read(buf[n:])
		n += m
	}
	if s.form = formOf(buf[:n]); s.form == formEnvelope && s.opts.ContextOnly {
		s.form = formTar
	}
	for {
		if s.size += int64(n); s.size > s.opts.Limits.Body {
			return false, s.bodyTooLarge()
		}
		if _, full := s.raw.Write(buf[:n]); full != nil {
			return false, full
		}
		if s.form != formEnvelope {
			signed.Write(buf[:n])
		}
		switch {
		case err == io.EOF:
			return true, nil
		case err != nil:
			return false, fmt.Errorf("reading body: %w", err)
		case s.size > s.opts.HeadSize:
			return false, nil
		}
		n, err = body.Read(buf)
	}
}

// stream takes in what follows the head.
func (s *Spool) stream(rest io.Reader, signed io.Writer) error {
	in := newFanout(s.opts.Memory, s.opts.Gate)
	defer in.recycle()
	// The goroutines end with the stream, and the stream with this function.
	var work sync.WaitGroup
	defer work.Wait()
	defer in.close()
	head := s.size
	var heads sync.WaitGroup // that are still to be read
	// tap has read be called with all of the body, the head first. The head is read
	// before anything follows it: a store that has no room later keeps nothing.
	tap := func(read func(io.Reader)) {
		t := in.tap()
		heads.Add(1)
		follow := &follower{rest: t, begin: sync.OnceFunc(heads.Done)}
		work.Go(func() {
			defer t.drain()
			defer follow.begin()
			read(io.MultiReader(io.NewSectionReader(s.raw, 0, head), follow))
		})
	}
	copyTo(&work, in.tap(), s.raw)
	if s.form == formEnvelope {
		tap(func(r io.Reader) {
			s.hold(func() (*Payload, error) { return nil, s.readEnvelope(r, readSize, signed) })
		})
	} else {
		copyTo(&work, in.tap(), signed)
	}
	if s.form == formTar {
		tap(func(r io.Reader) {
			s.hold(func() (*Payload, error) { return index(r, s.raw, true, &s.opts, s.memory) })
		})
	}
	// A plain tar can be summed later: while it arrives, the signature and the index
	// need the processors.
	if s.form != formTar || s.opts.SHA256 {
		tap(func(r io.Reader) {
			sum := sha256.New()
			if n, err := io.Copy(sum, r); err == nil && n >= head {
				s.summed.Do(func() { s.sumOK = len(sum.Sum(s.sum[:0])) == len(s.sum) })
			}
		})
	}

	heads.Wait()
	for eof := false; !eof; {
		c := in.next()
		var err error
		if eof, err = s.fill(c, rest); err != nil {
			return err
		}
		// Before the chunk has its turn at the gate, which others wait for.
		if err := s.waitForRoom(); err != nil {
			return err
		}
		in.send(c)
	}
	in.close()
	work.Wait()
	// What else went wrong may come from that.
	if err := s.raw.finish(); err != nil {
		s.refuse(err)
	}
	return nil
}

// waitForRoom waits until there is room on the disk for all that has been read, or NoRoom
// ends the body. Another may take that room first: the store then has an error.
func (s *Spool) waitForRoom() error {
	if s.opts.NoRoom == nil || s.size <= s.opts.InMemory && s.raw.inMemory() {
		return nil
	}
	for {
		missing := s.size - s.opts.Disk.Taken()
		if missing <= 0 {
			return nil
		}
		if s.opts.Disk.Take(missing) {
			s.opts.Disk.Give(missing)
			return nil
		}
		if err := s.opts.NoRoom(); err != nil {
			return err
		}
	}
}

// follower is what follows the head of a body.
type follower struct {
	rest  *tap
	begin func() // is called before it is read
}

func (f *follower) Read(p []byte) (int, error) {
	f.begin()
	return f.rest.Read(p)
}

// fill reads body until c is full or the body has ended.
func (s *Spool) fill(c *chunk, body io.Reader) (eof bool, err error) {
	for len(c.buf) < cap(c.buf) {
		n, err := body.Read(c.buf[len(c.buf):cap(c.buf)])
		c.buf = c.buf[:len(c.buf)+n]
		s.size += int64(n)
		if s.size > s.opts.Limits.Body {
			return false, s.bodyTooLarge()
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

func (s *Spool) bodyTooLarge() error {
	return tooLarge("the body is over the limit of %d bytes (max_body_bytes)", s.opts.Limits.Body)
}

// copyTo writes the stream of t to w. A hash takes everything, and a store remembers
// its error.
func copyTo(work *sync.WaitGroup, t *tap, w io.Writer) {
	work.Go(func() {
		defer t.drain()
		t.WriteTo(w)
	})
}

// readEnvelope writes the tar in a text envelope to w, and keeps the signature. size is
// the text's, or what is enough for all.
func (s *Spool) readEnvelope(text io.Reader, size int64, w io.Writer) error {
	e := &envelope{}
	err := e.read(text, size, w)
	s.signature = e.signature
	return err
}

// hold keeps what f returns for [Spool.Payload]. That there is no index yet, for want of
// memory or of a signature, is nothing to tell: it can be made later.
func (s *Spool) hold(f func() (*Payload, error)) {
	p, err := guard(f)
	if errors.Is(err, errMemory) || errors.Is(err, errLater) {
		return
	}
	if err != nil {
		s.refuse(err)
		return
	}
	s.payload = p
}

func (s *Spool) refuse(err error) {
	s.dropIndex()
	s.err = err
}

func (s *Spool) dropIndex() {
	if s.payload != nil {
		s.memory.Give(s.payload.memory)
		s.payload = nil
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
	return s.signature, s.form == formEnvelope
}

// Charge has what the Spool takes counted against other budgets from now on; a nil one
// counts nothing. The disk's account has to be of disk already, or of a part of it. What
// finds no room in memory is let go, an index first, or moved to the disk.
func (s *Spool) Charge(memory, disk *budget.Budget) {
	s.unpack = disk
	s.raw.disk.Move(disk)
	if s.memory.Move(memory) {
		return
	}
	s.dropIndex()
	if s.memory.Move(memory) {
		return
	}
	if err := s.raw.spill(); err != nil && s.err == nil {
		s.refuse(err)
	}
	s.memory.Move(memory)
}

// Index makes the index of a plain tar that lies in memory, if there is none yet, there is
// memory for it, and it costs no more than what was sent. It returns whether Payload has
// its answer ready.
func (s *Spool) Index() bool {
	if s.payload == nil && s.err == nil && s.form == formTar && s.raw.inMemory() {
		s.hold(func() (*Payload, error) { return index(s.Raw(), s.raw, true, &s.opts, s.memory) })
	}
	return s.payload != nil || s.err != nil
}

// Payload is what the body holds: it is decompressed and indexed now, if it is not
// yet. Its error, always an *api.Error, is for a client whose signature has passed.
// Payload, Index and Charge must not be called concurrently.
func (s *Spool) Payload() (*Payload, error) {
	if s.payload == nil && s.err == nil {
		s.hold(s.open)
	}
	if s.err == nil && s.payload == nil {
		s.err = errMemory
	}
	if s.err != nil {
		return nil, api.AsError(s.err)
	}
	return s.payload, nil
}

// open reads what is stored.
func (s *Spool) open() (*Payload, error) {
	var r io.Reader = bufio.NewReaderSize(s.Raw(), readSize)
	f := s.form
	if f == formTar {
		return index(r, s.raw, false, &s.opts, s.memory)
	}
	if f == formEnvelope {
		inner, end := s.openEnvelope(r)
		defer end()
		b := bufio.NewReaderSize(inner, readSize)
		first, _ := b.Peek(magicLen) // nothing at all is a tar that ends early
		r, f = b, formOf(first)
	}
	d, err := newDecompressor(f, bufio.NewReaderSize(r, readSize))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	if s.opts.Raw {
		return index(d, nil, false, &s.opts, s.memory)
	}
	unpacked := &store{dir: s.opts.Dir, most: s.opts.InMemory, memory: s.memory, disk: s.unpack.Open()}
	p, err := index(io.TeeReader(d, unpacked), unpacked, false, &s.opts, s.memory)
	if err == nil {
		err = unpacked.finish()
	}
	if err != nil {
		unpacked.Close()
		return nil, err
	}
	// The sum is all that the body is needed for from now on.
	s.SHA256()
	s.raw.Close()
	s.tar = unpacked
	return p, nil
}

// openEnvelope reads the tar in the text envelope r. It has been read once, while it
// was received. end must be called.
func (s *Spool) openEnvelope(r io.Reader) (tar io.Reader, end func()) {
	pr, pw := io.Pipe()
	var work sync.WaitGroup
	work.Go(func() {
		_, err := guard(func() (*Payload, error) { return nil, s.readEnvelope(r, s.size, pw) })
		pw.CloseWithError(err)
	})
	return pr, func() {
		pr.Close()
		work.Wait()
	}
}

// SHA256 is of the body as it was sent. ok is false where it could not be stored. It
// may be called concurrently, but not after Close.
func (s *Spool) SHA256() (sum [sha256.Size]byte, ok bool) {
	s.summed.Do(func() {
		h := sha256.New()
		if n, err := io.Copy(h, s.Raw()); err == nil && n == s.size {
			h.Sum(s.sum[:0])
			s.sumOK = true
		}
	})
	return s.sum, s.sumOK
}

// Raw reads the body as it was sent. Of a body that is no plain tar it can be read
// after Payload with Options.Raw alone.
func (s *Spool) Raw() *io.SectionReader { return io.NewSectionReader(s.raw, 0, s.size) }

// ErrNoContext is of a tar without a context whose config names none.
var ErrNoContext = &api.Error{Code: api.BadTar, Msg: fmt.Sprintf("reading tar: it holds no directory %q", api.ContextDir)}

// Size is of the body as it was sent, in bytes.
func (s *Spool) Size() int64 { return s.size }

// Close frees the memory and the files. The Context cannot be read after it. A
// second call does nothing.
func (s *Spool) Close() error {
	err := s.raw.Close()
	if s.tar != nil {
		err = errors.Join(err, s.tar.Close())
	}
	s.dropIndex()
	for _, a := range []*budget.Account{s.opts.HeadMemory, s.opts.HeadDisk, s.opts.Memory, s.opts.Disk} {
		a.Close()
	}
	return err
}

// form is how a body holds its tar.
type form int

const (
	formTar form = iota
	formGzip
	formZstd
	formEnvelope
)

// magicLen is how many bytes formOf looks at.
const magicLen = 4

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

// IsBody says that b may begin a body, in any of its forms. To tell a tar it needs
// 512 bytes.
func IsBody(b []byte) bool {
	if formOf(b) != formTar {
		return true
	}
	_, err := tar.NewReader(bytes.NewReader(b)).Next()
	return len(b) >= blockLen && !errors.Is(err, tar.ErrHeader)
}

func refuse(cause error, format string, args ...any) error {
	return &api.Error{Code: api.BadTar, Msg: fmt.Sprintf(format, args...), Err: cause}
}

func tooLarge(format string, args ...any) error {
	return &api.Error{Code: api.TooLarge, Msg: fmt.Sprintf(format, args...)}
}
