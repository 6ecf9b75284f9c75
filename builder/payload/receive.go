package payload

import (
	"crypto/sha256"
	"fmt"
	"io"
	"sync"
)

// Receive stores a body as it was sent, to its end or until it is over the limit. It writes to
// signed every byte that a signature signs, in order, from one goroutine at a time: the body,
// or, for a text envelope, the decoded tar in it. signed is a hash, whose Write does not fail.
//
// A plain tar larger than HeadSize is indexed while it arrives, if there is memory for the
// index. Nothing is decompressed.
//
// An error of Receive may be told to a client whose signature has not passed: an *api.Error
// with the code too_large if the body is over Limits.Body, one with the code no_space if there
// is no room for its head, or what Larger or the body's Read returned. All other errors wait
// for [Spool.Payload]. The caller must close the Spool.
//
// Receive may stop reading while the index catches up. A caller that demands a minimum rate
// must count only the time inside of Read.
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
			s.readEnvelope(s.Raw(), s.size, signed)
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

// headPiece is the memory of a body that has not sent anything, in bytes.
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

// stream receives the rest of a body after its head.
func (s *Spool) stream(rest io.Reader, signed io.Writer) error {
	in := newFanout(s.opts.Memory, s.opts.Gate)
	defer in.recycle()
	// Deferred calls run in reverse: the stream is closed, then its goroutines end.
	var work sync.WaitGroup
	defer work.Wait()
	defer in.close()
	head := s.size
	var heads sync.WaitGroup // taps that have not read all of the head yet
	// tap calls read with the whole body, in a goroutine. The rest of the body is read only
	// after every tap has read the head out of the store: a store that finds no room for
	// the rest drops the head.
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
		tap(func(r io.Reader) { s.readEnvelope(r, readSize, signed) })
	} else {
		copyTo(&work, in.tap(), signed)
	}
	if s.form == formTar {
		tap(func(r io.Reader) {
			s.hold(func() (*Payload, error) { return index(r, s.raw, true, &s.opts, s.memory) })
		})
	}
	// A plain tar is summed later unless the caller needs its sum: while it arrives, the
	// signature and the index need the processors.
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
		// This must come before send: send enters the gate, which other bodies wait for.
		if err := s.waitForRoom(); err != nil {
			return err
		}
		in.send(c)
	}
	in.close()
	work.Wait()
	// An error of the store replaces every other error, which may be its result.
	if err := s.raw.finish(); err != nil {
		s.fail(err)
	}
	return nil
}

// waitForRoom waits until there is room on the disk for everything that has been read, or until
// NoRoom ends the body. Another body may still take the room before the store does. Then the
// store has an error.
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

// follower is the rest of a body after its head.
type follower struct {
	rest  *tap
	begin func() // called before each read
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

// copyTo writes the stream of t to w, in a goroutine. It drops the error of w: a hash has none,
// and a store keeps its error.
func copyTo(work *sync.WaitGroup, t *tap, w io.Writer) {
	work.Go(func() {
		defer t.drain()
		t.WriteTo(w)
	})
}
