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

// maxWindow bounds the memory of a zstd decoder. RFC 8878 recommends to support as much, and
// zstd's levels up to 19 use no more.
const maxWindow = 8 << 20

// decompressor reads the tar in a body. Its errors are worded for the client.
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
			return nil, badTar(err, "reading gzip: %s", decompressError(err))
		}
		r.Multistream(false)
		return &decompressor{name: "gzip", r: &members{in: in, member: r}, close: func() {}}, nil
	case formZstd:
		// A concurrency of one means that the decoder starts no goroutines.
		r, err := zstd.NewReader(&frames{in: in}, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, badTar(err, "reading zstd: %s", decompressError(err))
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
	return n, badTar(err, "reading %s: %s", d.name, decompressError(err))
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

// errFollowed is for a compressed stream with something other than zeros after it.
var errFollowed = errors.New("something else follows")

// skipPadding skips zeros after a compressed stream: BSD's tar fills its last record with
// them. It returns io.EOF if in ends after them, and nil if another stream begins without
// any.
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

// frames passes on the frames of a zstd stream (RFC 8878, 3.1), without the padding after the
// last one. It only finds out where each frame ends. The decoder finds what is wrong inside.
type frames struct {
	in       *bufio.Reader
	left     int64 // bytes of the current part that are not passed on yet
	inFrame  bool  // the next part is a block of a frame
	checksum bool  // the frame ends with a checksum
	cut      bool  // the stream ends in the middle of a part's head
}

func (f *frames) Read(p []byte) (int, error) {
	for f.left == 0 {
		if f.cut {
			return 0, io.EOF
		}
		if err := f.nextPart(); err != nil {
			return 0, err
		}
	}
	n, err := f.in.Read(p[:min(int64(len(p)), f.left)])
	f.left -= int64(n)
	return n, err
}

// The bytes at the beginning of each part that tell its length.
const (
	blockHead     = 3
	frameHead     = 5
	skippableHead = 8
)

// nextPart sets left to the length of the next part: a frame's header, one of its blocks, or
// a skippable frame.
func (f *frames) nextPart() error {
	if f.inFrame {
		return f.readHead(blockHead, f.block)
	}
	if err := skipPadding(f.in); err != nil {
		return err
	}
	if b, _ := f.in.Peek(magicLen); len(b) == magicLen && b[0]&0xf0 == 0x50 {
		return f.readHead(skippableHead, func(head []byte) {
			f.left = skippableHead + int64(binary.LittleEndian.Uint32(head[4:]))
		})
	}
	return f.readHead(frameHead, f.frame)
}

// readHead calls part with the first size bytes of a part. If the stream ends before, the
// bytes that are there are passed on, for the decoder to complain about.
func (f *frames) readHead(size int, part func(head []byte)) error {
	head, err := f.in.Peek(size)
	switch err {
	case nil:
		part(head)
	case io.EOF:
		f.left, f.cut = int64(len(head)), true
	default:
		return err
	}
	return nil
}

// block reads the header of a block (RFC 8878, 3.1.1.2).
func (f *frames) block(head []byte) {
	header := int64(head[0]) | int64(head[1])<<8 | int64(head[2])<<16
	last, kind, size := header&1 != 0, header>>1&3, header>>3
	const repeated = 1 // one byte, size times
	if kind == repeated {
		size = 1
	}
	f.left = blockHead + size
	if last {
		f.inFrame = false
		if f.checksum {
			f.left += 4
		}
	}
}

// frame reads the header of a frame (RFC 8878, 3.1.1.1).
func (f *frames) frame(head []byte) {
	descriptor := head[4]
	contentSize, single, dictionary := descriptor>>6, descriptor>>5&1 != 0, descriptor&3
	f.left = frameHead + []int64{0, 1, 2, 4}[dictionary] + []int64{0, 2, 4, 8}[contentSize]
	if !single {
		f.left++ // the window
	} else if contentSize == 0 {
		f.left++ // the size of the content
	}
	f.inFrame, f.checksum = true, descriptor>>2&1 != 0
}
