package sealed

import (
	"bytes"
	"strings"

	"handler/function/api"
)

const (
	// maxLines of an envelope, with its comments: the time YAML takes grows with
	// the square of a mapping's keys.
	maxLines = 512
	// maxScalar is what a key or a comment may have, and a value that is not a
	// secret's, in bytes.
	maxScalar = 1024
)

// base64Bytes are those of a sealed value.
const base64Bytes = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="

// checkForm refuses an envelope that is not of the form in which seal.Seal writes
// it, in one pass, before YAML makes a tree of it: 2 MiB of "- " cost that 190 MiB,
// and 2 MiB of short keys minutes. An envelope is
//
//	key: scalar        # any number of these, of at most maxScalar bytes
//	secrets:           # or {}
//	    id: base64     # all indented alike
//
// in printable ASCII, where a scalar is plain or in quotes, without escapes, and on
// one line. Keys that go-sdk does not know it ignores, and so they may stand here.
// Empty lines and lines of a comment may be anywhere.
func checkForm(envelope []byte) error {
	lines, indent, inSecrets := 0, 0, false
	for line := range bytes.Lines(envelope) {
		if lines++; lines > maxLines {
			return bad(nil, "unsealing %s: over the limit of %d lines", api.SecretsFile, maxLines)
		}
		line = bytes.TrimSuffix(bytes.TrimSuffix(line, []byte("\n")), []byte("\r"))
		text := bytes.TrimLeft(line, " ")
		key, value, pair := bytes.Cut(text, []byte(":"))
		value, spaced := bytes.CutPrefix(value, []byte(" "))
		value = bytes.Trim(value, " ")
		depth := len(line) - len(text)

		// YAML has line breaks and encodings beyond ASCII.
		ok := !bytes.ContainsFunc(line, func(r rune) bool { return r < ' ' || r > '~' })
		switch {
		case len(text) == 0 || text[0] == '#':
			ok = ok && len(line) <= maxScalar
		case !ok || !pair || !isScalar(key) || len(key) > maxScalar || len(value) > 0 && !spaced:
			ok = false
		case depth == 0:
			inSecrets, indent = string(key) == "secrets" && len(value) == 0, 0
			ok = len(value) <= maxScalar && (len(value) == 0 || isScalar(value) || string(key) == "secrets" && string(value) == "{}")
		case !inSecrets || indent != 0 && depth != indent:
			ok = false
		default:
			indent = depth
			ok = isScalar(value) && len(bytes.Trim(unquote(value), base64Bytes)) == 0
		}
		if !ok {
			return bad(nil, "unsealing %s: line %d is not in the form that faas-cli secret seal writes", api.SecretsFile, lines)
		}
	}
	return nil
}

// isScalar reports whether YAML takes printable text for one scalar, or for an
// error: it begins nothing else.
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

// unquote leaves out the quotes of a scalar.
func unquote(scalar []byte) []byte {
	if scalar[0] == '"' || scalar[0] == '\'' {
		return scalar[1 : len(scalar)-1]
	}
	return scalar
}
