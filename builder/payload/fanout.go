package payload

import (
	"io"
	"sync"
	"sync/atomic"

	"handler/function/budget"
)

const (
	// chunkSize is large, because passing a chunk on takes time from the hash. With
	// chunks of 256 KiB, 1 GiB takes 1.1 times as long.
	chunkSize = 1 << 20
	// maxChunks bounds how far the reader of a body may be ahead of the slowest tap, and
	// with it the memory of an upload. At the end of the body everybody waits for that
	// tap: the index needs 0.1 s for 8 MiB of headers.
	maxChunks = 10
	// A stream has its first minChunks even if the memory is spent, because it needs two
	// to go on. These chunks are small.
	minChunks = 2
	smallSize = 256 << 10
)

// chunk is a piece of a stream. The taps share it until the last of them releases it.
type chunk struct {
	buf  []byte
	refs atomic.Int32
}

// fanout passes one stream on to several taps without copying it. Each tap has a goroutine.
type fanout struct {
	memory *budget.Account
	gate   Gate
	taps   []*tap
	free   chan *chunk
	made   int   // chunks
	taken  int64 // bytes of memory
	closed bool
}

// chunks are used again, as blocks are: memory that is new to the process costs more than
// everything else that is done with a small body. The garbage collector empties the pools.
var (
	chunks      = sync.Pool{New: func() any { return &chunk{buf: make([]byte, 0, chunkSize)} }}
	smallChunks = sync.Pool{New: func() any { return &chunk{buf: make([]byte, 0, smallSize)} }}
)

func newFanout(memory *budget.Account, gate Gate) *fanout {
	return &fanout{memory: memory, gate: gate, free: make(chan *chunk, maxChunks)}
}

// Gate bounds how many chunks all its streams together work on at once. Without it, the
// goroutines of many fast bodies would take the processors: a build gives its processor up a
// hundred times, and would wait seconds to have it back. A nil Gate bounds nothing.
type Gate chan struct{}

// NewGate returns a Gate for n chunks.
func NewGate(n int) Gate { return make(Gate, n) }

func (g Gate) enter() {
	if g != nil {
		g <- struct{}{}
	}
}

func (g Gate) leave() {
	if g != nil {
		<-g
	}
}

// tap adds a reader of the whole stream. All taps must be added before the first send. Each
// must be read or drained to its end: a tap that stops holds up all others.
func (f *fanout) tap() *tap {
	// There is room for every chunk, so a send never blocks.
	t := &tap{in: make(chan *chunk, maxChunks), free: f.free, gate: f.gate}
	f.taps = append(f.taps, t)
	return t
}

// next returns an empty chunk to fill. If no further chunk can be made, it waits for one to be
// released.
func (f *fanout) next() *chunk {
	select {
	case c := <-f.free:
		return f.grow(c)
	default:
	}
	switch {
	case f.made < minChunks:
		f.memory.Must(smallSize)
		return f.add(&smallChunks, smallSize)
	case f.made < maxChunks && f.memory.Take(chunkSize):
		return f.add(&chunks, chunkSize)
	}
	return f.grow(<-f.free)
}

// grow replaces a small chunk by a large one, if there is memory for it.
func (f *fanout) grow(c *chunk) *chunk {
	const more = chunkSize - smallSize
	if cap(c.buf) == chunkSize || !f.memory.Take(more) {
		return c
	}
	f.taken += more
	smallChunks.Put(c)
	return chunks.Get().(*chunk)
}

func (f *fanout) add(from *sync.Pool, size int64) *chunk {
	f.made++
	f.taken += size
	return from.Get().(*chunk)
}

// send gives c to every tap, once the gate is open.
func (f *fanout) send(c *chunk) {
	f.gate.enter()
	c.refs.Store(int32(len(f.taps)))
	for _, t := range f.taps {
		t.in <- c
	}
}

// close ends the stream: the taps read io.EOF after the last chunk. A second call does nothing.
func (f *fanout) close() {
	if f.closed {
		return
	}
	f.closed = true
	for _, t := range f.taps {
		close(t.in)
	}
}

// recycle frees the chunks. All taps must have ended.
func (f *fanout) recycle() {
	f.memory.Give(f.taken)
	f.made, f.taken = 0, 0
	for {
		select {
		case c := <-f.free:
			if cap(c.buf) == smallSize {
				smallChunks.Put(c)
			} else {
				chunks.Put(c)
			}
		default:
			return
		}
	}
}

// tap is one reader of a fanout.
type tap struct {
	in   chan *chunk
	free chan<- *chunk
	gate Gate
	c    *chunk
	rest []byte // of c
}

// fill makes rest non-empty. It returns io.EOF when the stream has ended.
func (t *tap) fill() error {
	for len(t.rest) == 0 {
		t.release()
		c, ok := <-t.in
		if !ok {
			return io.EOF
		}
		t.c, t.rest = c, c.buf
	}
	return nil
}

func (t *tap) release() {
	if t.c == nil {
		return
	}
	if t.c.refs.Add(-1) == 0 {
		t.c.buf = t.c.buf[:0]
		t.free <- t.c
		t.gate.leave()
	}
	t.c, t.rest = nil, nil
}

func (t *tap) Read(p []byte) (int, error) {
	if err := t.fill(); err != nil {
		return 0, err
	}
	n := copy(p, t.rest)
	t.rest = t.rest[n:]
	return n, nil
}

func (t *tap) WriteTo(w io.Writer) (int64, error) {
	var n int64
	for {
		if err := t.fill(); err == io.EOF {
			return n, nil
		}
		m, err := w.Write(t.rest)
		n += int64(m)
		t.rest = t.rest[m:]
		if err != nil {
			return n, err
		}
	}
}

// drain reads the rest of the stream and drops it.
func (t *tap) drain() {
	for t.fill() == nil {
		t.rest = nil
	}
}
