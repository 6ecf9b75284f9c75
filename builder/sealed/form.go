package sealed

import (
	"bytes"
	"strings"

	"handler/function/api"
)

const (
	// maxLines bounds the lines of an envelope, those of comments included: the time
	// that YAML takes grows with the square of a mapping's keys.
	maxLines = 512
	// maxScalar bounds an empty line, a comment, a key, and a value that is not a secret's,
	// in bytes.
	maxScalar = 1024
)

// base64Bytes are the bytes that a sealed value consists of.
const base64Bytes = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="

// checkForm refuses an envelope that is not of the form that seal.Seal writes. It reads
// it once, before YAML makes a tree of it: for 2 MiB of "- " the tree takes 190 MiB, and
// for 2 MiB of short keys minutes. An envelope is
//
//	key: scalar        # any number of these
//	secrets:           # or {}
//	    id: base64     # all indented alike
//
// in printable ASCII. A scalar is plain or in quotes, without escapes, and on one line.
// Keys that go-sdk does not know are allowed, since it ignores them. So are empty lines
// and lines of comments, anywhere.
func checkForm(envelope []byte) error {
	var f form
	lines := 0
	for line := range bytes.Lines(envelope) {
		if lines++; lines > maxLines {
			return bad(nil, "unsealing %s: over the limit of %d lines", api.SecretsFile, maxLines)
		}
		if !f.takes(bytes.TrimSuffix(bytes.TrimSuffix(line, []byte("\n")), []byte("\r"))) {
			return bad(nil, "unsealing %s: line %d is not in the form that faas-cli secret seal writes", api.SecretsFile, lines)
		}
	}
	return nil
}

// form is what the lines so far mean for the next one.
type form struct {
	inSecrets bool // the last key that is not indented was "secrets:"
	indent    int  // of the secrets, in spaces; 0 before the first
}

// takes reports whether line, which has no end of a line, may come next.
func (f *form) takes(line []byte) bool {
	if !isPrintable(line) {
		return false
	}
	text := bytes.TrimLeft(line, " ")
	if len(text) == 0 || text[0] == '#' {
		return len(line) <= maxScalar
	}
	key, value, ok := cutPair(text)
	if !ok || !isScalar(key) || len(key) > maxScalar {
		return false
	}
	if indent := len(line) - len(text); indent > 0 {
		return f.takesSecret(indent, value)
	}
	return f.takesPair(string(key), value)
}

// takesPair takes a key and a value that are not indented.
func (f *form) takesPair(key string, value []byte) bool {
	*f = form{inSecrets: key == "secrets" && len(value) == 0}
	switch {
	case len(value) == 0:
		return true
	case key == "secrets" && string(value) == "{}":
		return true
	default:
		return isScalar(value) && len(value) <= maxScalar
	}
}

// takesSecret takes a secret's value.
func (f *form) takesSecret(indent int, value []byte) bool {
	if !f.inSecrets || f.indent != 0 && indent != f.indent {
		return false
	}
	f.indent = indent
	return isScalar(value) && len(bytes.Trim(unquote(value), base64Bytes)) == 0
}

// isPrintable reports whether text is printable ASCII: YAML knows line breaks and
// encodings beyond it.
func isPrintable(text []byte) bool {
	return !bytes.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' })
}

// cutPair cuts "key: value" and "key:".
func cutPair(text []byte) (key, value []byte, ok bool) {
	key, value, ok = bytes.Cut(text, []byte(":"))
	value, spaced := bytes.CutPrefix(value, []byte(" "))
	value = bytes.Trim(value, " ")
	return key, value, ok && (spaced || len(value) == 0)
}

// isScalar reports whether YAML reads printable text as one scalar or refuses it: the
// text begins nothing else.
func isScalar(text []byte) bool {
	if len(text) == 0 {
		return false
	}
	switch c := text[0]; {
	case c == '"' || c == '\'':
		return len(text) > 1 && text[len(text)-1] == c && !bytes.ContainsAny(text[1:len(text)-1], `"'\`)
	case '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z':
		return true
	default:
		return strings.IndexByte("_./+", c) >= 0
	}
}

// unquote returns a scalar without its quotes.
func unquote(scalar []byte) []byte {
	if scalar[0] == '"' || scalar[0] == '\'' {
		return scalar[1 : len(scalar)-1]
	}
	return scalar
}
