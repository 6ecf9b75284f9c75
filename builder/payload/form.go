package payload

import (
	"archive/tar"
	"bytes"
	"errors"
)

// form is how a body holds its tar.
type form int

const (
	formTar form = iota
	formGzip
	formZstd
	formEnvelope
)

// magicLen is how many bytes formOf looks at.
const magicLen = 4

// formOf looks at the first bytes of a stream.
func formOf(b []byte) form {
	switch {
	case bytes.HasPrefix(b, []byte("{")):
		return formEnvelope
	case bytes.HasPrefix(b, []byte("\x1f\x8b")):
		return formGzip
	case bytes.HasPrefix(b, []byte("\x28\xb5\x2f\xfd")):
		return formZstd
	case len(b) >= 4 && b[0]&0xf0 == 0x50 && string(b[1:4]) == "\x2a\x4d\x18":
		// A skippable frame: pzstd begins with one.
		return formZstd
	}
	return formTar
}

// IsBody says whether b may begin a body, in any of its forms. To recognise a tar it needs
// 512 bytes.
func IsBody(b []byte) bool {
	if formOf(b) != formTar {
		return true
	}
	_, err := tar.NewReader(bytes.NewReader(b)).Next()
	return len(b) >= blockLen && !errors.Is(err, tar.ErrHeader)
}
