package payload

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"handler/function/api"
)

const blockSize = 64 << 10

// store keeps a tar: in memory up to a bound, beyond it in a file without a
// name. It is written first, by one goroutine, and then read by many.
type store struct {
	dir    string
	memory int64

	mu     sync.RWMutex
	blocks [][]byte // each but the last of blockSize
	size   int64
	file   *os.File
	buf    []byte // what is not yet in file
	err    error  // the first; sticky
	closed bool

	refused bool // nothing goes into a file any more
}

// Write returns an *api.Error.
func (s *store) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, storeError(os.ErrClosed)
	}
	if s.err != nil {
		return 0, s.err
	}
	n := len(p)
	if s.file == nil && s.size+int64(n) > s.memory {
		if s.refused {
			s.closed = true
			s.drop()
			return 0, storeError(os.ErrClosed)
		}
		s.err = s.moveToFile()
	}
	switch {
	case s.err != nil:
	case s.file == nil:
		s.writeMemory(p)
	default:
		s.err = s.writeFile(p)
	}
	if s.err != nil {
		s.drop()
		return 0, s.err
	}
	s.size += int64(n)
	return n, nil
}

func (s *store) writeMemory(p []byte) {
	for len(p) > 0 {
		last := len(s.blocks) - 1
		if last < 0 || len(s.blocks[last]) == blockSize {
			s.blocks = append(s.blocks, blocks.Get().(*[blockSize]byte)[:0])
			last++
		}
		b := s.blocks[last]
		n := min(len(p), blockSize-len(b))
		s.blocks[last] = append(b, p[:n]...)
		p = p[n:]
	}
}

func (s *store) moveToFile() error {
	f, err := os.CreateTemp(s.dir, "payload-")
	if err != nil {
		return storeError(err)
	}
	s.file = f
	// Without a name, the file is gone with the process, however that ends.
	if err := os.Remove(f.Name()); err != nil {
		return storeError(err)
	}
	for _, b := range s.blocks {
		if _, err := f.Write(b); err != nil {
			return storeError(err)
		}
	}
	s.freeBlocks()
	return nil
}

var blocks = sync.Pool{New: func() any { return new([blockSize]byte) }}

func (s *store) freeBlocks() {
	for _, b := range s.blocks {
		blocks.Put((*[blockSize]byte)(b[:blockSize]))
	}
	s.blocks = nil
}

// writeFile gathers what is small: a decompressed tar comes in pieces as small
// as a header.
func (s *store) writeFile(p []byte) error {
	if len(s.buf)+len(p) < blockSize {
		s.buf = append(s.buf, p...)
		return nil
	}
	if err := s.flush(); err != nil {
		return err
	}
	if len(p) < blockSize {
		s.buf = append(s.buf, p...)
		return nil
	}
	_, err := s.file.Write(p)
	return storeError(err)
}

func (s *store) flush() error {
	if len(s.buf) == 0 {
		return nil
	}
	_, err := s.file.Write(s.buf)
	s.buf = s.buf[:0]
	return storeError(err)
}

// finish makes all that was written readable.
func (s *store) finish() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil && s.file != nil {
		s.err = s.flush()
		s.buf = nil
	}
	return s.err
}

func (s *store) ReadAt(p []byte, off int64) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return 0, os.ErrClosed
	}
	if s.err != nil {
		return 0, s.err // nothing is left
	}
	if s.file != nil {
		return s.file.ReadAt(p, off)
	}
	var n int
	for n < len(p) && off < s.size {
		m := copy(p[n:], s.blocks[off/blockSize][off%blockSize:])
		n += m
		off += int64(m)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// refuse closes a store that has a file, or would need one. What is in memory is
// kept, and what follows as long as it fits.
func (s *store) refuse() {
	s.mu.Lock()
	s.refused = true
	inFile := s.file != nil
	s.mu.Unlock()
	if inFile {
		s.Close()
	}
}

// Close frees all. What was stored cannot be read any more.
func (s *store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	return s.drop()
}

func (s *store) drop() error {
	s.freeBlocks()
	s.buf = nil
	if s.file == nil {
		return nil
	}
	err := s.file.Close()
	s.file = nil
	return err
}

func storeError(err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("spooling payload: %w", err)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return &api.Error{Code: api.NoSpace, Msg: "the temporary directory is full", Err: err}
	}
	return api.AsError(err)
}
