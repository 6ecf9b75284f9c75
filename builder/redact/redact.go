// Package redact makes text from a build safe to show: it drops what could
// drive a terminal or break a line-based reader, and masks the values of build
// secrets. It guards against accidents. A Dockerfile that wants to give its
// secrets away can always encode them in a way nobody foresaw.
package redact

import (
	"bytes"
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
// more where it has no longer line, or where carriage returns end it), either as they are or as base64 in both
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

// Stream returns a Stream that hands its lines to emit, without their ends.
func (r *Redactor) Stream(emit func(line string)) *Stream {
	return &Stream{index: r.index, emit: emit}
}

// Stream cuts what is written to it into safe lines of at most MaxLine bytes. A
// line is held until its newline, until it is too long, or until Flush.
//
// A carriage return that no newline follows ends a state: a line that is drawn
// over. Of states only the latest is held, until Draw or the line after it. A
// blank one is none. What begins after a carriage return may be a state whose own
// comes with the next one: Settle makes one of it.
//
// A Stream keeps less than 30 KiB, whatever is written. It is not for concurrent
// use.
type Stream struct {
	index *index
	emit  func(line string)

	raw    []byte // the start of a rune or an escape sequence that has not ended
	line   []byte // the current line, clean but not masked
	hidden int    // leading bytes of line that are part of a match before the cut
	out    []byte // scratch

	drawn    bool // line began after a carriage return
	returned bool // line has ended with one
	cut      bool // line was too long
	settled  bool // line is as Settle saw it last
	whole    bool // the latest state is all of line

	state   string // the latest, masked, if waiting
	waiting bool
	partial bool // state is the beginning of line
}

// Write never fails.
func (s *Stream) Write(p []byte) (int, error) {
	// A step bounds what a single large p adds to raw and line.
	const step = 4 << 10
	n := len(p)
	for len(p) > 0 {
		if s.returned && p[0] != '\n' {
			s.begin(true)
		}
		part := p[:min(len(p), step)]
		end := bytes.IndexAny(part, "\r\n")
		if end >= 0 {
			part = part[:end]
		}
		if len(part) > 0 {
			s.add(part)
		}
		p = p[len(part):]
		switch {
		case end < 0:
			continue
		case p[0] == '\n':
			s.end(true)
		default:
			s.carriageReturn()
		}
		p = p[1:]
	}
	return n, nil
}

// Flush emits the state that is held and the line that has no end yet. The Stream
// can be used again.
func (s *Stream) Flush() { s.end(false) }

// Waiting says whether a state is held.
func (s *Stream) Waiting() bool { return s.waiting }

// Draw emits the state that is held, if there is one.
func (s *Stream) Draw() {
	if s.waiting {
		s.emit(s.state)
	}
	s.drop()
}

func (s *Stream) drop() { s.state, s.waiting, s.partial = "", false, false }

// Unsettled says whether Settle has something to do.
func (s *Stream) Unsettled() bool {
	return s.drawn && !s.returned && !s.cut && !s.settled && !blank(s.line)
}

// Settle makes a state of the line that has no end yet, if it draws over another:
// nothing may follow for long. What could be the start of a value is left out. If
// more follows, the line is a state, or a line, as a whole again.
func (s *Stream) Settle() {
	if !s.Unsettled() {
		return
	}
	s.settled = true
	n := len(s.line) - s.index.begun(s.line)
	if s.hold(n) {
		s.partial = true
		s.whole = n == len(s.line) && len(s.raw) == 0
	}
}

// hold makes a state of the first n bytes of the line, unless they are blank.
func (s *Stream) hold(n int) bool {
	if blank(s.line[:n]) {
		return false
	}
	s.out, _ = s.index.appendMasked(s.out[:0], s.line, n, s.hidden)
	s.state, s.waiting, s.partial = string(s.out), true, false
	return true
}

func blank(line []byte) bool { return len(bytes.TrimSpace(line)) == 0 }

// add takes part, which has no end of a line, and emits what makes the line too
// long.
func (s *Stream) add(part []byte) {
	s.settled, s.whole = false, false
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

// finish takes what has not ended as it is.
func (s *Stream) finish() {
	s.line, _ = sanitize(s.line, s.raw, true)
	s.raw = s.raw[:0]
	for len(s.line) > cutAt {
		s.emitPart()
	}
}

func (s *Stream) carriageReturn() {
	s.finish()
	s.returned = true
	s.whole = s.whole || s.hold(len(s.line))
}

func (s *Stream) end(newline bool) {
	s.finish()
	if !s.partial || s.whole {
		s.Draw()
	}
	s.drop()
	// Where a newline ends nothing but what was drawn over, there is no line.
	over := s.drawn || s.returned && !newline
	if !s.whole && (len(s.line) > 0 || newline) && !(over && blank(s.line)) {
		s.out, _ = s.index.appendMasked(s.out[:0], s.line, len(s.line), s.hidden)
		s.emit(string(s.out))
	}
	s.begin(false)
}

// begin begins a line, after a carriage return or not.
func (s *Stream) begin(drawn bool) {
	s.line, s.hidden = s.line[:0], 0
	s.drawn = drawn
	s.returned, s.cut, s.settled, s.whole, s.partial = false, false, false, false, false
}

// emitPart emits the first cutAt bytes of the line, which is longer, or up to
// three fewer so as not to split a rune.
func (s *Stream) emitPart() {
	if !s.partial {
		s.Draw()
	}
	s.drop()
	n := cutAt
	for !utf8.RuneStart(s.line[n]) {
		n--
	}
	s.out, s.hidden = s.index.appendMasked(s.out[:0], s.line, n, s.hidden)
	s.emit(string(s.out))
	s.line = append(s.line[:0], s.line[n:]...)
	s.cut = true
}
