package payload

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"sync"

	"handler/function/api"
	"handler/function/budget"
)

// readSize is how much of a stored body is read at once.
const readSize = 64 << 10

// Spool holds a body that was received. Its signature may not have been checked yet.
type Spool struct {
	opts     Options
	form     form
	size     int64
	raw      *store   // the body as it was sent
	tar      *store   // the unpacked tar; nil before it is unpacked, and for a plain tar
	envelope envelope // what a text envelope says beside the tar

	memory *budget.Account // HeadMemory, or Memory once the body is larger than a head
	unpack *budget.Budget  // of the disk, for the unpacked tar

	summed sync.Once
	sum    [sha256.Size]byte
	sumOK  bool

	payload *Payload // nil while there is no index
	err     error    // why there never will be an index
}

// readEnvelope writes the tar in a text envelope to w. It keeps what is beside the tar, and its
// error for [Spool.Payload]. size is the size of the text, or more.
func (s *Spool) readEnvelope(text io.Reader, size int64, w io.Writer) {
	s.hold(func() (*Payload, error) { return nil, s.envelope.read(text, size, w) })
}

// hold keeps what f returns, for [Spool.Payload]. It drops errMemory and errLater, because the
// index can be made later.
func (s *Spool) hold(f func() (*Payload, error)) {
	var p *Payload
	err := guard(func() (err error) { p, err = f(); return err })
	if errors.Is(err, errMemory) || errors.Is(err, errLater) {
		return
	}
	if err != nil {
		s.fail(err)
		return
	}
	s.payload = p
}

// fail keeps err for [Spool.Payload].
func (s *Spool) fail(err error) {
	s.dropIndex()
	s.err = err
}

func (s *Spool) dropIndex() {
	if s.payload != nil {
		s.memory.Give(s.payload.memory)
		s.payload = nil
	}
}

// guard turns a panic of f into an error: hostile bytes that make a decompressor panic must not
// end the builds of other clients.
func guard(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("reading payload: panic: %v\n%s", v, debug.Stack())
		}
	}()
	return f()
}

// Signature returns the signature in a text envelope, or "" if there is none in it. ok is false
// for the other forms, whose signature is in a header.
func (s *Spool) Signature() (value string, ok bool) {
	return s.envelope.signature, s.form == formEnvelope
}

// Tenant returns the tenant that a text envelope names, or "".
func (s *Spool) Tenant() string { return s.envelope.tenant }

// Charge moves everything that the Spool has taken to other budgets. A nil budget counts
// nothing. If disk has no room, Charge returns false and moves nothing. If memory has no room,
// the Spool drops its index. If there still is no room, it moves the body to the disk. Where
// that has no room either, it is Payload that fails.
func (s *Spool) Charge(memory, disk *budget.Budget) bool {
	if !s.raw.disk.Move(disk) {
		return false
	}
	s.unpack = disk
	s.chargeMemory(memory)
	return true
}

func (s *Spool) chargeMemory(memory *budget.Budget) {
	if s.memory.Move(memory) {
		return
	}
	s.dropIndex()
	if s.memory.Move(memory) {
		return
	}
	if err := s.raw.spill(); err != nil && s.err == nil {
		s.fail(err)
	}
	s.memory.Move(memory)
}

// Index makes an index, if it can do so at little cost: of a plain tar in memory, if there is
// memory for the index and the index costs no more than the body. It returns whether Payload
// has its result ready.
func (s *Spool) Index() bool {
	if s.payload == nil && s.err == nil && s.form == formTar && s.raw.inMemory() {
		s.hold(func() (*Payload, error) { return index(s.Raw(), s.raw, true, &s.opts, s.memory) })
	}
	return s.payload != nil || s.err != nil
}

// Payload returns what the body holds. It decompresses and indexes the body, unless that has
// been done. Its error is an *api.Error, for a client whose signature has passed. Payload,
// Index and Charge must not be called concurrently.
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

// open makes an index of the stored body.
func (s *Spool) open() (*Payload, error) {
	var r io.Reader = bufio.NewReaderSize(s.Raw(), readSize)
	f := s.form
	if f == formTar {
		return index(r, s.raw, false, &s.opts, s.memory)
	}
	if f == formEnvelope {
		var end func()
		r, f, end = s.openEnvelope(r)
		defer end()
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
	// From now on the body is needed for its sum alone.
	s.SHA256()
	s.raw.Close()
	s.tar = unpacked
	return p, nil
}

// openEnvelope returns what the text envelope has as its tar, and the form of it. The envelope has
// been read once before, for the signature. The caller must call end.
func (s *Spool) openEnvelope(text io.Reader) (inner io.Reader, f form, end func()) {
	pr, pw := io.Pipe()
	var work sync.WaitGroup
	work.Go(func() {
		pw.CloseWithError(guard(func() error { return new(envelope).read(text, s.size, pw) }))
	})
	b := bufio.NewReaderSize(pr, readSize)
	first, _ := b.Peek(magicLen) // without a byte it is a tar that is cut short
	return b, formOf(first), func() {
		pr.Close()
		work.Wait()
	}
}

// SHA256 returns the sum of the body as it was sent. ok is false if the body could not be
// stored. SHA256 may be called concurrently. After Close it returns the sum only if it has been
// called before.
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

// Stored returns an *api.Error if the body could not be stored, and so cannot be read once more.
func (s *Spool) Stored() error {
	s.raw.mu.RLock()
	defer s.raw.mu.RUnlock()
	return s.raw.err
}

// Raw reads the body as it was sent. After Payload only a plain tar can be read, or a body
// with Options.Raw.
func (s *Spool) Raw() *io.SectionReader { return io.NewSectionReader(s.raw, 0, s.size) }

// Size is the size of the body as it was sent, in bytes.
func (s *Spool) Size() int64 { return s.size }

// Close frees the memory and the files. After it the Context cannot be read. A second call does
// nothing.
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
