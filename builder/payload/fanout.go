package payload

import (
	"io"
	"sync"
	"sync/atomic"
)

const (
	chunkSize = 256 << 10
	// maxChunks bounds how far the reader of a stream may be ahead of the
	// slowest of those that work on it, and so the memory of an upload.
	maxChunks = 8
)

// chunk is a piece of a stream, shared by the taps until the last has let go.
type chunk struct {
	buf  []byte
	refs atomic.Int32
}

// fanout passes one stream on to several taps, each read by its own goroutine,
// without copying it for each.
type fanout struct {
	taps   []*tap
	free   chan *chunk
	made   int
	cur    *chunk // what Write fills
	closed bool
}

// chunks and blocks are used again: memory that is new to the process costs more
// than all that is done with a small body. The collector empties them.
var chunks = sync.Pool{New: func() any { return &chunk{buf: make([]byte, 0, chunkSize)} }}

func newFanout() *fanout {
	return &fanout{free: make(chan *chunk, maxChunks)}
}

// tap adds a reader of the whole stream. All must be there before the first
// send, and each must be read or drained to its end: what one leaves holds up
// all.
func (f *fanout) tap() *tap {
	// With room for every chunk there is, a send never blocks.
	t := &tap{in: make(chan *chunk, maxChunks), free: f.free}
	f.taps = append(f.taps, t)
	return t
}

// next is an empty chunk to fill. It waits for one once maxChunks are in use.
func (f *fanout) next() *chunk {
	select {
	case c := <-f.free:
		return c
	default:
	}
	if f.made < maxChunks {
		f.made++
		return chunks.Get().(*chunk)
	}
	return <-f.free
}

// send hands c to every tap.
func (f *fanout) send(c *chunk) {
	c.refs.Store(int32(len(f.taps)))
	for _, t := range f.taps {
		t.in <- c
	}
}

// Write sends p by the chunk. It never fails.
func (f *fanout) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		if f.cur == nil {
			f.cur = f.next()
		}
		m := min(len(p), cap(f.cur.buf)-len(f.cur.buf))
		f.cur.buf = append(f.cur.buf, p[:m]...)
		p = p[m:]
		if len(f.cur.buf) == cap(f.cur.buf) {
			f.send(f.cur)
			f.cur = nil
		}
	}
	return n, nil
}

// close ends the stream: the taps read io.EOF after what was sent and written.
// A second call does nothing.
func (f *fanout) close() {
	if f.closed {
		return
	}
	f.closed = true
	if f.cur != nil {
		f.send(f.cur)
		f.cur = nil
	}
	for _, t := range f.taps {
		close(t.in)
	}
}

// recycle lets go of the chunks, after all taps have ended.
func (f *fanout) recycle() {
	for {
		select {
		case c := <-f.free:
			chunks.Put(c)
		default:
			return
		}
	}
}

// tap reads a stream that a fanout passes on.
type tap struct {
	in   chan *chunk
	free chan<- *chunk
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

// ReadByte keeps the decompressors from wrapping a tap in a buffer.
func (t *tap) ReadByte() (byte, error) {
	if err := t.fill(); err != nil {
		return 0, err
	}
	b := t.rest[0]
	t.rest = t.rest[1:]
	return b, nil
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

// drain lets the rest of the stream pass by.
func (t *tap) drain() {
	for t.fill() == nil {
		t.rest = nil
	}
}
