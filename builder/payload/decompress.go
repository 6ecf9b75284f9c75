package payload

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// maxWindow bounds the memory of a zstd decoder. It is what RFC 8878 recommends
// to support, and what zstd's levels up to 19 use.
const maxWindow = 8 << 20

// decompressor reads what f holds, and words its errors for the client.
type decompressor struct {
	name  string
	r     io.Reader
	close func()
}

func newDecompressor(f form, in *bufio.Reader) (*decompressor, error) {
	switch f {
	case formGzip:
		r, err := gzip.NewReader(in)
		if err != nil {
			return nil, refuse(err, "reading gzip: %s", decompressError(err))
		}
		r.Multistream(false)
		return &decompressor{name: "gzip", r: &members{in: in, member: r}, close: func() {}}, nil
	case formZstd:
		// One at a time means no goroutines.
		r, err := zstd.NewReader(&frames{in: in}, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, refuse(err, "reading zstd: %s", decompressError(err))
		}
		return &decompressor{name: "zstd", r: r, close: r.Close}, nil
	default:
		return &decompressor{name: "tar", r: in, close: func() {}}, nil
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
	case errors.Is(err, errFollowed) || errors.Is(err, gzip.ErrHeader) || errors.Is(err, zstd.ErrMagicMismatch):
		return "something else follows it"
	case errors.Is(err, gzip.ErrChecksum) || errors.Is(err, zstd.ErrCRCMismatch):
		return "its checksum is wrong"
	}
	return "it is corrupt"
}

// errFollowed is of a compressed stream with something else than zeros after it.
var errFollowed = errors.New("something else follows")

// skipPadding reads the zeros that lie between the end of a compressed stream and that
// of in: BSD's tar fills its last record with them. It returns io.EOF at that end,
// and nil where another stream begins.
func skipPadding(in *bufio.Reader) error {
	if b, err := in.Peek(1); err != nil || b[0] != 0 {
		return err
	}
	for {
		if _, err := in.Peek(1); err != nil {
			return err
		}
		b, _ := in.Peek(in.Buffered())
		if len(bytes.TrimLeft(b, "\x00")) > 0 {
			return errFollowed
		}
		in.Discard(len(b))
	}
}

// members reads a gzip stream to its end, member by member.
type members struct {
	in     *bufio.Reader
	member *gzip.Reader
}

func (m *members) Read(p []byte) (int, error) {
	for {
		n, err := m.member.Read(p)
		if err != io.EOF {
			return n, err
		}
		if n > 0 {
			return n, nil
		}
		if err := skipPadding(m.in); err != nil {
			return 0, err
		}
		if b, _ := m.in.Peek(2); formOf(b) != formGzip {
			return 0, errFollowed
		}
		if err := m.member.Reset(m.in); err != nil {
			return 0, err
		}
		m.member.Multistream(false)
	}
}

// frames passes on the frames of a zstd stream (RFC 8878, 3.1) without the padding
// behind the last. It knows where each ends, and leaves to the decoder what is wrong
// with one.
type frames struct {
	in      *bufio.Reader
	left    int64 // bytes to pass on
	blocks  bool  // a block comes next, not a frame
	summed  bool  // the frame ends with a checksum
	flushed bool  // what is left of a stream that ends too early is passed on
}

func (f *frames) Read(p []byte) (int, error) {
	for f.left == 0 {
		if f.flushed {
			return 0, io.EOF
		}
		if err := f.next(); err != nil {
			return 0, err
		}
	}
	n, err := f.in.Read(p[:min(int64(len(p)), f.left)])
	f.left -= int64(n)
	return n, err
}

// next finds out how many bytes the next part has.
func (f *frames) next() error {
	if !f.blocks {
		if err := skipPadding(f.in); err != nil {
			return err
		}
	}
	// A part's first bytes say how long it is.
	const blockHead, frameHead, skippableHead = 3, 5, 8
	head := frameHead
	if f.blocks {
		head = blockHead
	} else if b, _ := f.in.Peek(magicLen); len(b) == magicLen && b[0]&0xf0 == 0x50 {
		head = skippableHead
	}
	b, err := f.in.Peek(head)
	if err == io.EOF {
		f.left, f.flushed = int64(len(b)), true
		return nil
	}
	if err != nil {
		return err
	}
	switch head {
	case blockHead:
		n := int64(b[0]) | int64(b[1])<<8 | int64(b[2])<<16
		f.left = blockHead + n>>3
		if n>>1&3 == 1 { // one byte, repeated
			f.left = blockHead + 1
		}
		if n&1 != 0 {
			f.blocks = false
			if f.summed {
				f.left += 4
			}
		}
	case frameHead:
		descriptor := b[4]
		single := descriptor>>5&1 != 0
		f.left = frameHead + []int64{0, 1, 2, 4}[descriptor&3] + []int64{0, 2, 4, 8}[descriptor>>6]
		if !single {
			f.left++ // the window
		} else if descriptor>>6 == 0 {
			f.left++ // the size of the content
		}
		f.blocks, f.summed = true, descriptor>>2&1 != 0
	case skippableHead:
		f.left = skippableHead + int64(binary.LittleEndian.Uint32(b[4:]))
	}
	return nil
}
