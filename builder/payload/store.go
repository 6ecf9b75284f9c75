package payload

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"handler/function/api"
	"handler/function/budget"
)

const blockSize = 64 << 10

// store keeps a body or a tar: in memory up to a bound, beyond it in a file without
// a name. It is written first, by one goroutine, and then read by many.
type store struct {
	dir    string
	most   int64           // bytes in memory
	memory *budget.Account // which others take of too
	disk   *budget.Account // of the file's bytes, and of nothing else

	mu     sync.RWMutex
	direct bool         // nothing is gathered before it is written to the file
	noRoom func() error // is called where disk is spent, and returns nil to try again; may be nil

	blocks [][]byte // each but the last of blockSize
	taken  int64    // of memory, for the blocks
	size   int64
	file   *os.File
	buf    []byte // what is not yet in file
	err    error  // the first; sticky
	closed bool
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
	if s.file == nil && (s.size+int64(n) > s.most || !s.writeMemory(p)) {
		s.err = s.moveToFile()
	} else if s.file == nil {
		p = nil
	}
	if s.err == nil && len(p) > 0 {
		s.err = s.writeFile(p)
	}
	if s.err != nil {
		s.drop()
		return 0, s.err
	}
	s.size += int64(n)
	return n, nil
}

// writeMemory returns false, and has written nothing, where there is no memory for p.
func (s *store) writeMemory(p []byte) bool {
	if n := room(s.size+int64(len(p))) - s.taken; n > 0 {
		if !s.memory.Take(n) {
			return false
		}
		s.taken += n
	}
	for len(p) > 0 {
		last := len(s.blocks) - 1
		if last < 0 || len(s.blocks[last]) == blockSize {
			s.blocks = append(s.blocks, nil)
			last++
		}
		b := s.blocks[last]
		n := min(len(p), blockSize-len(b))
		if len(b)+n > cap(b) {
			b = append(newBlock(len(b)+n), b...)
		}
		s.blocks[last] = append(b, p[:n]...)
		p = p[n:]
	}
	return true
}

// room is what the blocks for n bytes take. A body that has just begun takes little: many
// never go on.
func room(n int64) int64 {
	for _, small := range []int64{4 << 10, 16 << 10} {
		if n <= small {
			return small
		}
	}
	return (n + blockSize - 1) / blockSize * blockSize
}

// newBlock is an empty block for n bytes or more.
func newBlock(n int) []byte {
	if size := room(int64(n)); size < blockSize {
		return make([]byte, 0, size)
	}
	return blocks.Get().(*[blockSize]byte)[:0]
}

// endHead says that no more waits for room are to come.
func (s *store) endHead() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noRoom = nil
}

// move has what is stored counted against other accounts, and ends the head.
func (s *store) move(memory, disk *budget.Account) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.memory
	switch {
	case s.err != nil:
		return s.err
	case s.file != nil:
		if s.err = s.takeRoom(disk, s.size); s.err != nil {
			s.drop()
			return s.err
		}
		s.disk.Give(s.size)
		s.disk = disk
	case memory.Take(s.taken):
		old.Give(s.taken)
		s.disk = disk
	default:
		s.disk = disk
		if s.err = s.moveToFile(); s.err != nil {
			s.drop()
			return s.err
		}
	}
	s.memory, s.direct, s.noRoom = memory, false, nil
	return nil
}

// moveToFile is called with s.mu held.
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
		if err := s.toFile(b); err != nil {
			return err
		}
	}
	s.freeBlocks()
	return nil
}

// spill moves what is in memory to the file.
func (s *store) spill() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil && !s.closed && s.file == nil {
		if s.err = s.moveToFile(); s.err != nil {
			s.drop()
		}
	}
	return s.err
}

// inMemory says that all of it is there.
func (s *store) inMemory() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.file == nil
}

var blocks = sync.Pool{New: func() any { return new([blockSize]byte) }}

func (s *store) freeBlocks() {
	for _, b := range s.blocks {
		if cap(b) == blockSize {
			blocks.Put((*[blockSize]byte)(b[:blockSize]))
		}
	}
	s.memory.Give(s.taken)
	s.blocks, s.taken = nil, 0
}

// writeFile gathers what is small: a decompressed tar comes in pieces as small
// as a header.
func (s *store) writeFile(p []byte) error {
	if s.direct {
		return s.toFile(p)
	}
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
	return s.toFile(p)
}

func (s *store) flush() error {
	if len(s.buf) == 0 {
		return nil
	}
	err := s.toFile(s.buf)
	s.buf = s.buf[:0]
	return err
}

// ErrNoRoom is of a body that finds its budget of the disk spent.
var ErrNoRoom = &api.Error{Code: api.NoSpace, Msg: "the requests that are being received or built take all the room that they may (max_spool_bytes)"}

func (s *store) toFile(p []byte) error {
	if err := s.takeRoom(s.disk, int64(len(p))); err != nil {
		return err
	}
	_, err := s.file.Write(p)
	return storeError(err)
}

// takeRoom takes n bytes of disk, when noRoom has made some.
func (s *store) takeRoom(disk *budget.Account, n int64) error {
	for !disk.Take(n) {
		if s.noRoom == nil {
			return ErrNoRoom
		}
		if err := s.noRoom(); err != nil {
			return err
		}
	}
	return nil
}

// finish makes all that was written readable.
func (s *store) finish() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil && s.file != nil {
		if s.err = s.flush(); s.err != nil {
			s.drop()
		}
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
	s.disk.Close()
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
