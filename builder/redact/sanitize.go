package redact

import (
	"strings"
	"unicode/utf8"
)

const (
	esc = 0x1b
	bel = 0x07

	// maxSequence bounds an escape sequence, in bytes. The longest in use are
	// hyperlinks (OSC 8), whose URLs terminals limit to 2,083 bytes. Of a longer one,
	// the introducer is dropped and the text is shown.
	maxSequence = 4 << 10
)

// sanitize appends src to dst as valid UTF-8 without what a reader does not see: escape
// sequences, control characters but tab, separators of lines and paragraphs, and the
// controls of text direction, by which text is read otherwise than it is. A newline
// becomes a space.
//
// If src ends within a rune or an escape sequence and is not final, that beginning is left
// out. It is returned as rest, a part of src.
func sanitize(dst, src []byte, final bool) (clean, rest []byte) {
	for i := 0; i < len(src); {
		c := src[i]
		switch {
		case c >= ' ' && c < 0x7f || c == '\t':
			dst = append(dst, c)
			i++
		case c == '\n':
			dst = append(dst, ' ')
			i++
		case c < utf8.RuneSelf && c != esc:
			i++
		case !final && !utf8.FullRune(src[i:]):
			return dst, src[i:]
		default:
			r, size := utf8.DecodeRune(src[i:])
			if r < 0xa0 { // ESC, or a C1 control
				n, more := sequence(src[i:])
				if more && !final {
					return dst, src[i:]
				}
				size = max(n, size)
			} else if !deceptive(r) {
				dst = utf8.AppendRune(dst, r)
			}
			i += size
		}
	}
	return dst, nil
}

// deceptive reports whether r is a line or paragraph separator or has the
// Unicode property Bidi_Control.
func deceptive(r rune) bool {
	return r == 0x061c || r == 0x200e || r == 0x200f || r >= 0x2028 && r <= 0x202e || r >= 0x2066 && r <= 0x2069
}

// sequence returns the length of the escape sequence (ECMA-48) that src begins with, and 0
// if there is none. With more, src ends too early to know. src must begin with ESC or with
// a C1 control in UTF-8.
func sequence(src []byte) (n int, more bool) {
	if len(src) == 1 {
		return 0, true
	}
	kind := src[1]
	if src[0] != esc {
		// A C1 control is encoded as 0xc2 and itself. It is short for ESC and the byte
		// that is 0x40 lower.
		kind -= 0x40
	}
	const rest = 2 // where the bytes after the introducer begin
	switch {
	case kind == '[':
		return finalByte(src, rest, 0x30, 0x40)
	case strings.IndexByte("]PX^_", kind) >= 0:
		return controlString(src, rest)
	case kind >= 0x20 && kind <= 0x2f:
		// A character set or the like: ESC ( B.
		return finalByte(src, rest, 0x20, 0x30)
	case kind >= 0x30 && kind <= 0x7e:
		return rest, false
	}
	return 0, false
}

// finalByte returns the length of a sequence that ends with a byte in [end, 0x7f). The bytes
// before it, from i on, must be in [low, end) or in [0x20, 0x30). The results are
// sequence's.
func finalByte(src []byte, i int, low, end byte) (n int, more bool) {
	for ; i < len(src) && i < maxSequence; i++ {
		switch c := src[i]; {
		case c >= end && c < 0x7f:
			return i + 1, false
		case c < 0x20 || c >= 0x7f || c >= 0x30 && c < low:
			return 0, false
		}
	}
	return 0, i < maxSequence
}

// controlString returns the length of a sequence that ends with ST (ESC \ or U+009C) or, as
// in xterm, with BEL. The results are sequence's.
func controlString(src []byte, i int) (n int, more bool) {
	for ; i < len(src) && i < maxSequence; i++ {
		switch c := src[i]; {
		case c == bel:
			return i + 1, false
		case c == '\n':
			return 0, false
		case (c == esc || c == 0xc2) && i+1 == len(src):
			return 0, true
		case c == esc && src[i+1] == '\\', c == 0xc2 && src[i+1] == 0x9c:
			return i + 2, false
		case c == esc:
			return 0, false
		}
	}
	return 0, i < maxSequence
}
