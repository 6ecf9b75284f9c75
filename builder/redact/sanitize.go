package redact

import (
	"strings"
	"unicode/utf8"
)

const (
	esc = 0x1b
	bel = 0x07

	// maxSequence bounds an escape sequence. The longest in use are hyperlinks
	// (OSC 8), whose URLs terminals limit to 2,083 bytes. What is longer is no
	// sequence: its introducer is dropped and its text is shown.
	maxSequence = 4 << 10
)

// sanitize appends src to dst as valid UTF-8 without escape sequences, control
// characters other than tab, line and paragraph separators, and bidirectional
// controls, which let text read otherwise than it is. A newline becomes a space.
//
// Unless src is final, a rune or sequence that has begun but not ended is left
// out and returned as rest, which is a part of src.
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
		case c == esc:
			n, more := sequence(src[i:])
			if more && !final {
				return dst, src[i:]
			}
			i += max(n, 1)
		case c < utf8.RuneSelf:
			i++
		case !final && !utf8.FullRune(src[i:]):
			return dst, src[i:]
		default:
			r, size := utf8.DecodeRune(src[i:])
			if r < 0xa0 {
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
	switch {
	case r == 0x061c, r == 0x200e, r == 0x200f, r >= 0x2028 && r <= 0x202e, r >= 0x2066 && r <= 0x2069:
		return true
	}
	return false
}

// sequence returns the length of the escape sequence (ECMA-48) that src begins
// with, and 0 if there is none. more tells that src ends too early to say.
func sequence(src []byte) (n int, more bool) {
	var kind byte
	var i int
	switch {
	case src[0] == esc && len(src) == 1:
		return 0, true
	case src[0] == esc:
		kind, i = src[1], 2
	default:
		// A C1 control is short for ESC and a byte 0x40 lower; it is encoded as
		// 0xc2 and itself.
		kind, i = src[1]-0x40, 2
	}
	switch {
	case kind == '[':
		return finalByte(src, i, 0x30, 0x40)
	case strings.IndexByte("]PX^_", kind) >= 0:
		return controlString(src, i)
	case kind >= 0x20 && kind <= 0x2f:
		// A character set or the like: ESC ( B.
		return finalByte(src, i, 0x20, 0x30)
	case kind >= 0x30 && kind <= 0x7e:
		return i, false
	}
	return 0, false
}

// finalByte finds the end of a sequence whose bytes from i on are in [low, end) or
// [0x20, 0x30) up to one in [end, 0x7f).
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

// controlString finds the end of a string that ends with ST (ESC \ or U+009C)
// or, as xterm has it, BEL.
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
