package payload

import (
	"archive/tar"
	"bufio"
	"context"
	"fmt"
	"io"
	"math"
	"path"
	"sync"

	"handler/function/api"
)

// A search looks for the config in a body whose signature has not passed: it is the config's
// image that says whose keys are to be tried. Nobody has signed the body yet, so a search costs
// little more than the body did. It writes nothing to a disk. It keeps nothing but the config.
// It reads no data of a plain tar but the config's. It decompresses searchFactor bytes at most
// for each byte that was sent, or searchLeast bytes if that is more, and never more than the
// limit on a tar.
const (
	searchFactor = 64
	searchLeast  = 64 << 20
)

// The memory of a search, in bytes. TestSearchMemory compares these numbers with the runtime's.
const (
	skimSize   = 4 << 10   // of a plain tar that is read at once: more would read data in vain
	skimMemory = 512 << 10 // of the longest header, and of buffers
	zstdMemory = 12 << 20  // of a decoder with the largest window
	findFactor = 6         // of what looks into the config, for each byte of the config
)

var (
	errNoConfig = fmt.Errorf("searching %s: the tar holds none", api.ConfigFile)
	errTooFar   = fmt.Errorf("searching %s: it does not come early enough", api.ConfigFile)
)

// Plain says whether the body is a plain tar. A search of any other body needs a processor for
// longer than the body took to receive.
func (s *Spool) Plain() bool { return s.form == formTar }

// FindConfig calls found with the first config in the body. found may take six bytes of memory
// for each byte of the config: they are counted as the search's own. The caller bounds how many
// bodies are searched at once. The body is not checked further: what is wrong with it is for
// [Spool.Payload]. An error says why no config was found, or is ctx's cause.
//
// FindConfig must not be called concurrently with another method.
func (s *Spool) FindConfig(ctx context.Context, found func(config []byte)) error {
	if s.payload != nil {
		s.hand(s.payload.Config, found)
		return nil
	}
	return guard(func() error {
		p := &pace{ctx: ctx, gate: s.opts.Gate}
		defer p.rest()
		s.memory.Must(skimMemory)
		defer s.memory.Give(skimMemory)
		if s.form == formTar {
			raw := s.Raw()
			return s.skim(newSkimmed(&paced{r: raw, pace: p, left: math.MaxInt64}, raw, skimSize), found)
		}
		return s.searchPacked(p, found)
	})
}

// searchPacked searches a body that is compressed, or in a text envelope.
func (s *Spool) searchPacked(p *pace, found func([]byte)) error {
	var r io.Reader = bufio.NewReaderSize(&paced{r: s.Raw(), pace: p, left: math.MaxInt64}, readSize)
	f := s.form
	if f == formEnvelope {
		var end func()
		r, f, end = s.openEnvelope(r)
		defer end()
	}
	if f == formZstd {
		s.memory.Must(zstdMemory)
		defer s.memory.Give(zstdMemory)
	}
	d, err := newDecompressor(f, bufio.NewReaderSize(r, readSize))
	if err != nil {
		return err
	}
	defer d.Close()
	limit := min(max(searchFactor*s.size, searchLeast), s.opts.Limits.Unpacked)
	return s.skim(newSkimmed(&paced{r: d, pace: p, left: limit}, nil, readSize), found)
}

// skim reads the headers of a tar up to the config's.
func (s *Spool) skim(in *skimmed, found func([]byte)) error {
	limits := &s.opts.Limits
	tr := tar.NewReader(in)
	for entries := 0; entries < limits.Entries; {
		in.allowed = earlyHeaders + blockLen // with the end of the last entry
		hdr, err := tr.Next()
		if err == io.EOF {
			return errNoConfig
		}
		if err != nil {
			return err
		}
		if hdr.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		entries++
		if path.Clean(hdr.Name) != api.ConfigFile {
			continue
		}
		if !isFile(hdr) || hdr.Size > limits.Config {
			return fmt.Errorf("searching %s: it is no file, or over a limit", api.ConfigFile)
		}
		s.memory.Must(hdr.Size)
		defer s.memory.Give(hdr.Size)
		config := make([]byte, hdr.Size)
		in.allowed = hdr.Size
		if _, err := io.ReadFull(tr, config); err != nil {
			return err
		}
		s.hand(config, found)
		return nil
	}
	return errTooFar
}

// hand calls found, and counts the memory that it may take.
func (s *Spool) hand(config []byte, found func([]byte)) {
	n := findFactor * int64(len(config))
	s.memory.Must(n)
	defer s.memory.Give(n)
	found(config)
}

// skimmed is a tar of which little more than the headers is read. A tar.Reader skips the data
// of an entry with Seek. It reads headers with Read.
type skimmed struct {
	r       *bufio.Reader
	under   io.Reader // what r reads
	seeker  io.Seeker // moves under; nil if it can only be read
	at      int64
	allowed int64 // bytes that Read may still return
}

func newSkimmed(under io.Reader, seeker io.Seeker, size int) *skimmed {
	return &skimmed{r: bufio.NewReaderSize(under, size), under: under, seeker: seeker}
}

func (k *skimmed) Read(p []byte) (int, error) {
	if k.allowed == 0 && len(p) > 0 {
		return 0, errHeaders
	}
	n, err := k.r.Read(p[:min(int64(len(p)), k.allowed)])
	k.at += int64(n)
	k.allowed -= int64(n)
	return n, err
}

// Seek goes forward by n bytes. A tar.Reader asks for nothing else.
func (k *skimmed) Seek(n int64, _ int) (int64, error) {
	if ahead := n - int64(k.r.Buffered()); k.seeker != nil && ahead > 0 {
		if _, err := k.seeker.Seek(ahead, io.SeekCurrent); err != nil {
			return -1, err
		}
		k.r.Reset(k.under)
	} else if _, err := k.r.Discard(int(n)); err != nil {
		return -1, err
	}
	k.at += n
	return k.at, nil
}

// WriteSigned reads the stored body once more, and writes what Receive wrote to signed. An
// error is ctx's cause, the store's, or that of a text envelope.
//
// WriteSigned must not be called concurrently with another method.
func (s *Spool) WriteSigned(ctx context.Context, w io.Writer) error {
	return guard(func() error {
		p := &pace{ctx: ctx, gate: s.opts.Gate}
		defer p.rest()
		size := min(s.size, readSize)
		s.memory.Must(size)
		defer s.memory.Give(size)
		r := &paced{r: s.Raw(), pace: p, left: math.MaxInt64}
		if s.form == formEnvelope {
			return new(envelope).read(r, size, w)
		}
		// The structs hide WriteTo and ReadFrom, which would not use the buffer.
		_, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r}, make([]byte, max(size, 1)))
		return err
	})
}

// pace lets work on one body through the gate, a piece of chunkSize bytes at a time.
type pace struct {
	ctx  context.Context
	gate Gate

	mu     sync.Mutex
	inside bool
	left   int // bytes of the piece
}

// begin enters the gate for a piece, unless one has begun. Its error is the cause of ctx.
func (p *pace) begin() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.inside {
		return nil
	}
	if p.ctx.Err() != nil {
		return context.Cause(p.ctx)
	}
	p.gate.enter()
	p.inside, p.left = true, chunkSize
	return nil
}

// done counts n bytes. It leaves the gate at the end of a piece.
func (p *pace) done(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.left -= n; p.left <= 0 {
		p.leave()
	}
}

// rest leaves the gate.
func (p *pace) rest() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.leave()
}

func (p *pace) leave() {
	if p.inside {
		p.inside = false
		p.gate.leave()
	}
}

// paced reads r at a pace, up to left bytes.
type paced struct {
	r    io.Reader
	pace *pace
	left int64
}

func (r *paced) Read(b []byte) (int, error) {
	if r.left <= 0 {
		return 0, errTooFar
	}
	if err := r.pace.begin(); err != nil {
		return 0, err
	}
	n, err := r.r.Read(b[:min(int64(len(b)), chunkSize, r.left)])
	r.left -= int64(n)
	r.pace.done(n)
	return n, err
}
