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

// store keeps a body or a tar: in memory if it is small, otherwise in a file without a name.
// First one goroutine writes it, and then many may read it.
type store struct {
	dir    string
	most   int64           // bytes in memory
	memory *budget.Account // others draw on it too
	disk   *budget.Account // for the bytes of the file, and nothing else

	mu     sync.RWMutex
	direct bool         // write to the file at once, without gathering small pieces
	noRoom func() error // called when disk is spent; nil to try again; may be nil

	blocks [][]byte // each but the last has blockSize bytes
	taken  int64    // bytes of memory, for the blocks
	size   int64
	file   *os.File
	buf    []byte // bytes that are not in file yet
	err    error  // the first error, for all later calls
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

// writeMemory writes p to memory. If there is no memory for p, it writes nothing and returns
// false.
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

// room is the memory of the blocks for n bytes. The first block begins small, because many
// bodies begin and never go on.
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

// endHead says that the body was no larger than a head. From then on the store does not wait
// for room.
func (s *store) endHead() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noRoom = nil
}

// move says that the body is larger than a head. It moves the bytes that are stored to other
// accounts.
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

// moveToFile moves the blocks to a new file. The caller must hold s.mu.
func (s *store) moveToFile() error {
	f, err := os.CreateTemp(s.dir, "payload-")
	if err != nil {
		return storeError(err)
	}
	s.file = f
	// A file without a name disappears when the process ends, in whatever way.
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

// spill moves everything to the file.
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

// inMemory says whether everything is in memory.
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

// writeFile gathers small pieces before it writes them: a decompressed tar comes in pieces as
// small as a header.
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

func (s *store) toFile(p []byte) error {
	if err := s.takeRoom(s.disk, int64(len(p))); err != nil {
		return err
	}
	_, err := s.file.Write(p)
	return storeError(err)
}

// takeRoom takes n bytes of disk. It calls noRoom until there is room.
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

// finish must be called after the last Write and before the first ReadAt. It writes the pieces
// that were gathered.
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
		return 0, s.err // drop has freed everything
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

// Close frees everything. Nothing can be read after it.
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
