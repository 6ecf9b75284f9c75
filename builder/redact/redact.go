// Package redact makes text from a build safe to show: it drops what could
// drive a terminal or break a line-based reader, and masks the values of build
// secrets. It guards against accidents. A Dockerfile that wants to give its
// secrets away can always encode them in a way nobody foresaw.
package redact

import (
	"strings"
	"unicode/utf8"
)

// MaxLine is the longest line a Stream emits, in bytes. JSON escapes a byte as
// six at most, which keeps a line within the 60 KiB that a record may have.
const MaxLine = 8 << 10

const mask = "***"

// cutAt leaves room for the two masks that a cut can add to a line, where it
// goes through a match.
const cutAt = MaxLine - 2*len(mask)

// Redactor makes text safe and masks the secrets it was made with. It is
// immutable and may be used concurrently.
type Redactor struct {
	index *index
}

// New returns a Redactor that masks values, which may be nil. A value shorter
// than 8 bytes is not masked: it would blot out text that is no secret.
//
// Masked are the value itself and each line of it of 8 bytes and more (of 4 and
// more where it has no longer line), either as they are or as base64 in both
// alphabets, also inside a longer base64 text and wrapped at 64 or 76 columns.
// So are their forms in hex, URLs and JSON strings, for the shortest values up
// to 64 KiB in all; of longer ones, the lines have no base64 of their own. Text
// longer than 256 bytes is matched in pieces of that size.
func New(values map[string][]byte) *Redactor {
	return &Redactor{index: newIndex(patterns(values))}
}

// Line returns s as one safe line. Newlines become spaces.
func (r *Redactor) Line(s string) string {
	clean, _ := sanitize(make([]byte, 0, len(s)), []byte(s), true)
	return string(r.index.mask(clean))
}

// Text returns s with its newlines kept and each of its lines made safe.
func (r *Redactor) Text(s string) string {
	var b strings.Builder
	for line := range strings.SplitSeq(s, "\n") {
		b.WriteString(r.Line(line))
		b.WriteByte('\n')
	}
	text := b.String()
	return text[:len(text)-1]
}

// Stream returns a Stream that hands its lines to emit, without their newlines.
func (r *Redactor) Stream(emit func(line string)) *Stream {
	return &Stream{index: r.index, emit: emit}
}

// Stream cuts what is written to it into safe lines of at most MaxLine bytes. A
// line is held until its newline, until it is too long, or until Flush. It
// keeps less than 20 KiB, whatever is written. It is not for concurrent use.
type Stream struct {
	index *index
	emit  func(line string)

	raw    []byte // the start of a rune or an escape sequence that has not ended
	line   []byte // the current line, clean but not masked
	hidden int    // leading bytes of line that are part of a match before the cut
	out    []byte // scratch
}

// Write never fails.
func (s *Stream) Write(p []byte) (int, error) {
	// A step bounds what a single large p adds to raw and line.
	const step = 4 << 10
	n := len(p)
	for len(p) > 0 {
		part := p[:min(len(p), step)]
		newline := false
		for i, c := range part {
			if c == '\n' {
				part, newline = part[:i], true
				break
			}
		}
		p = p[len(part):]
		s.add(part)
		if newline {
			p = p[1:]
			s.end(true)
		}
	}
	return n, nil
}

// Flush emits the line that has no newline yet, if there is one. The Stream can
// be used again.
func (s *Stream) Flush() {
	s.end(false)
}

// add takes part, which has no newline, and emits what makes the line too long.
func (s *Stream) add(part []byte) {
	src := part
	if len(s.raw) > 0 {
		s.raw = append(s.raw, part...)
		src = s.raw
	}
	var rest []byte
	s.line, rest = sanitize(s.line, src, false)
	s.raw = append(s.raw[:0], rest...)
	// A match that begins before the cut must be seen to its end.
	for len(s.line) >= cutAt+maxPattern {
		s.emitPart()
	}
}

func (s *Stream) end(newline bool) {
	s.line, _ = sanitize(s.line, s.raw, true)
	s.raw = s.raw[:0]
	for len(s.line) > cutAt {
		s.emitPart()
	}
	if len(s.line) > 0 || newline {
		s.out, _ = s.index.appendMasked(s.out[:0], s.line, len(s.line), s.hidden)
		s.emit(string(s.out))
	}
	s.line, s.hidden = s.line[:0], 0
}

// emitPart emits the first cutAt bytes of the line, which is longer, or up to
// three fewer so as not to split a rune.
func (s *Stream) emitPart() {
	n := cutAt
	for !utf8.RuneStart(s.line[n]) {
		n--
	}
	s.out, s.hidden = s.index.appendMasked(s.out[:0], s.line, n, s.hidden)
	s.emit(string(s.out))
	s.line = append(s.line[:0], s.line[n:]...)
}
