package payload

import (
	"bytes"
	"io"
)

// tarStream reads a tar. It counts and bounds the bytes.
type tarStream struct {
	r     io.Reader
	n     int64
	holes int64 // bytes of sparse files that are not in the stream
	limit int64 // of n and holes together

	// data is called after each read, with the part of the tar reader's buffer that was
	// filled.
	data func(p []byte)

	inHeaders bool  // headers are being read
	end       int64 // where the headers must end
	zeros     int64 // how many of the last bytes of the headers were zero
}

func (s *tarStream) beginHeaders(end int64) {
	s.inHeaders, s.end, s.zeros = true, end, 0
}

// left is how many more bytes are allowed.
func (s *tarStream) left() int64 { return s.limit - s.n - s.holes }

func (s *tarStream) tooLarge() error {
	return tooLarge("the tar is over the limit of %d bytes unpacked (max_unpacked_bytes)", s.limit)
}

func (s *tarStream) Read(p []byte) (int, error) {
	if s.inHeaders && s.n >= s.end {
		return 0, errHeaders
	}
	n, err := s.r.Read(p)
	if s.data != nil && n > 0 {
		s.data(p[:n])
	}
	s.n += int64(n)
	if s.inHeaders {
		if t := len(bytes.TrimRight(p[:n], "\x00")); t > 0 {
			s.zeros = int64(n - t)
		} else {
			s.zeros += int64(n)
		}
	}
	if s.left() < 0 {
		return n, s.tooLarge()
	}
	return n, err
}
