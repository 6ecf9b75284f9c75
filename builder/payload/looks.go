package payload

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
)

// sniffLen is how many bytes of a stream tell what it looks like. http.DetectContentType looks
// at as many.
const sniffLen = 512

// tarWanted ends an error about a stream that is no tar.
const tarWanted = "a tar is wanted, plain or compressed with gzip or zstd"

// beginning keeps the first sniffLen bytes of a stream.
type beginning struct {
	r    io.Reader
	head []byte
}

func (b *beginning) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if len(b.head) < sniffLen {
		b.head = append(b.head, p[:min(n, sniffLen-len(b.head))]...)
	}
	return n, err
}

// noTar returns an error that names what the stream is instead of a tar. It returns nil if the
// beginning of the stream does not tell.
func (x *indexer) noTar(cause error) error {
	if x.count > 0 {
		return nil
	}
	if what := looksLike(x.start.head); what != "" {
		return badTar(cause, "reading tar: this looks like %s; %s", what, tarWanted)
	}
	return nil
}

// types are the results of http.DetectContentType for what people send by mistake.
var types = map[string]string{
	"text/html":                    "HTML",
	"text/xml":                     "XML",
	"application/pdf":              "a PDF",
	"application/zip":              "a zip archive",
	"application/x-rar-compressed": "a rar archive",
	"application/x-gzip":           "something that was compressed twice",
}

// magics are the first bytes of formats that http.DetectContentType does not know.
var magics = []struct{ prefix, what string }{
	{"BZh", "bzip2"},
	{"\xfd7zXZ\x00", "xz"},
	{"\x5d\x00\x00", "lzma"},
	{"LZIP", "lzip"},
	{"\x04\x22\x4d\x18", "lz4"},
	{"\x02\x21\x4c\x18", "lz4"}, // its older frame
	{"\x1f\x9d", "compress (.Z)"},
	{"\x78\x01", "zlib"},
	{"\x78\x5e", "zlib"},
	{"\x78\x9c", "zlib"},
	{"\x78\xda", "zlib"},
	{"7z\xbc\xaf\x27\x1c", "a 7z archive"},
	{"PK\x05\x06", "a zip archive without entries"},
	{"07070", "a cpio archive"},
	{"\x28\xb5\x2f\xfd", "something that was compressed twice"},
	// From a client that reads a file as text: some bytes have become U+FFFD, or every
	// byte has become a character.
	{"\x1f\ufffd", "gzip that was sent as text"},
	{"\x1f\u008b", "gzip that was sent as text"},
	{"\x28\ufffd/\ufffd", "zstd that was sent as text"},
	{"\x28\u00b5/\u00fd", "zstd that was sent as text"},
}

var (
	multipart = regexp.MustCompile(`(?is)^--\S+\r\n.*Content-Disposition: *form-data`)

	// A parser directive, or the first instruction after comments and empty lines. FROM is
	// a common word, so its whole line must have the form of the instruction.
	dockerfile = regexp.MustCompile(`(?i)^(# *(syntax|escape|check) *=|(\s*(#.*)?\n)*[ \t]*(ARG[ \t]+\w+(=|\s|$)|FROM[ \t]+(--platform=\S+[ \t]+)?\S+([ \t]+AS([ \t]+\S+)?)?[ \t]*\r?(\n|\\|$)))`)

	// A header's mode, owner and group without the NULs after them, and its magic.
	lostNULs = regexp.MustCompile(`[0-7 ]{18}.*ustar`)

	jsonText = regexp.MustCompile(`^\s*(\{\s*["}]|\[\s*[]\[{"0-9])`)
)

// looksLike says what a stream that is no tar looks like, from its first bytes. It returns "" if
// they do not tell. It quotes at most 32 characters of head.
func looksLike(head []byte) string {
	switch {
	case isUTF16(head):
		return "UTF-16 text"
	case multipart.Match(head):
		return "a multipart form; the body has to be the tar itself"
	case bytes.IndexByte(head, 0) < 0 && lostNULs.Match(head):
		return "a tar that lost bytes on its way, as with curl's --data in place of --data-binary"
	case isText(head):
		return textLooksLike(bytes.TrimPrefix(head, []byte("\ufeff")))
	case len(head) > 262 && string(head[257:262]) == "ustar":
		return ""
	}
	for _, m := range magics {
		if bytes.HasPrefix(head, []byte(m.prefix)) {
			return m.what
		}
	}
	mime, _, _ := strings.Cut(http.DetectContentType(head), ";")
	switch what := types[mime]; {
	case what != "":
		return what
	case mime == "application/octet-stream":
		return ""
	case strings.HasPrefix(mime, "image/"):
		return fmt.Sprintf("an image (%s)", mime)
	}
	return "a file of type " + mime
}

// isText says whether every byte of b can be in a text.
func isText(b []byte) bool {
	// The full stop keeps the first bytes of b from being taken for another type.
	return len(b) > 0 && strings.HasPrefix(http.DetectContentType(append([]byte("."), b...)), "text/plain")
}

// isUTF16 says whether b begins with a byte order mark of UTF-16, or with ASCII characters in
// UTF-16, which have a zero in each pair of bytes.
func isUTF16(b []byte) bool {
	if bytes.HasPrefix(b, []byte("\xfe\xff")) || bytes.HasPrefix(b, []byte("\xff\xfe")) {
		return true
	}
	const characters = 8
	zeros := [2]int{}
	n := min(len(b)/2, characters)
	for i := range 2 * n {
		if b[i] == 0 {
			zeros[i%2]++
		}
	}
	return n > 1 && (zeros == [2]int{n, 0} || zeros == [2]int{0, n})
}

func textLooksLike(text []byte) string {
	mime, _, _ := strings.Cut(http.DetectContentType(text), ";")
	switch what := types[mime]; {
	case what != "":
		return what
	case len(bytes.TrimSpace(text)) == 0:
		return "white space"
	case bytes.HasPrefix(text, []byte("#!")):
		return "a script"
	case dockerfile.Match(text):
		return "a Dockerfile"
	case jsonText.Match(text):
		return "JSON"
	}
	return fmt.Sprintf("plain text that begins with %.32q", text)
}
