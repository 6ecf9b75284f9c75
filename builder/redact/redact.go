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

// MaxLine is the length of the longest line that a Stream emits, in bytes. JSON makes at
// most six bytes of one, so that a line fits into the 60 KiB that a record may have.
const MaxLine = 8 << 10

const mask = "***"

// cutAt is where a line is cut that is too long. A cut through a match puts a mask on each
// side of it, so that a line can get two masks longer.
const cutAt = MaxLine - 2*len(mask)

// Redactor makes text safe and masks the secrets it was made with. It is
// immutable and may be used concurrently.
type Redactor struct {
	index *index
}

// New returns a Redactor that masks values, which may be nil.
//
// A value is masked if it has 8 bytes or more: a shorter one would hide text that is no
// secret. Each of its lines of 8 bytes or more is masked too. Lines of 4 bytes or more are
// masked if none of the value's lines has 8, or if carriage returns end them.
//
// They are masked as they are, in hex, and as the usual encoders escape them in URLs and JSON
// strings: with hex digits in either case, with and without an escaped slash, and in ASCII alone.
// They are also masked in base64 of both alphabets, and within a longer base64 text. Base64 that is
// wrapped at 64 or 76 columns is masked if it is that of the value alone. All this holds for the
// shortest values, up to 64 KiB together. Of the others, the lines are masked as they are, and the
// whole value in base64.
//
// A text of more than 256 bytes is masked in pieces of that size.
func New(values map[string][]byte) *Redactor {
	return &Redactor{index: newIndex(patterns(values))}
}

// Line returns s as one safe line, with spaces for newlines.
func (r *Redactor) Line(s string) string {
	clean, _ := sanitize(make([]byte, 0, len(s)), []byte(s), true)
	return string(r.index.mask(clean))
}

// Text returns s with each of its lines made safe.
func (r *Redactor) Text(s string) string {
	var b strings.Builder
	for line := range strings.SplitSeq(s, "\n") {
		b.WriteString(r.Line(line))
		b.WriteByte('\n')
	}
	text := b.String()
	return text[:len(text)-1]
}

// Stream returns a Stream that calls emit with each of its lines, without their ends.
func (r *Redactor) Stream(emit func(line string)) *Stream {
	return &Stream{index: r.index, emit: emit}
}

// Stream cuts what is written to it into safe lines of at most MaxLine bytes. It holds a
// line until its newline comes, until it is too long, or until Flush.
//
// Programs show progress by drawing over a line: "10%\r20%\r30%\ndone\n". A text that ends
// with a carriage return and no newline is a state, unless it is blank. A Stream holds the
// latest state only. It emits it when Draw is called, or before the next line. So it emits
// "20%", "30%" and "done" if nobody calls Draw, and "10%" too if Draw is called after it.
//
// Some programs write the carriage return at the beginning: "\r10%" and, a while later,
// "\r20%". Then a state's end comes with the next state. Settle makes a state of such a
// text before its end has come.
//
// A Stream keeps less than 30 KiB, whatever is written. It must not be used concurrently.
type Stream struct {
	index *index
	emit  func(line string)

	raw    []byte // the beginning of a rune or an escape sequence that has not ended
	line   []byte // the current line, sanitised but not masked
	hidden int    // first bytes of line that belong to a match that begins before the cut
	out    []byte // scratch

	drawn    bool // line began after a carriage return
	returned bool // line has ended with a carriage return
	cut      bool // the beginning of line was emitted because it was too long
	settled  bool // nothing was added to line since Settle
	whole    bool // the latest state is all of line

	state   string // the latest, masked, if waiting
	waiting bool
	partial bool // state is the beginning of line
}

// Write takes the next bytes. It never fails.
func (s *Stream) Write(p []byte) (int, error) {
	// p is taken in steps, which bounds raw and line.
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

// Flush emits the state that is held and the line that has not ended. The Stream can be
// used again.
func (s *Stream) Flush() { s.end(false) }

// Waiting says whether a state is held.
func (s *Stream) Waiting() bool { return s.waiting }

// Draw emits the state that is held, if one is.
func (s *Stream) Draw() {
	if s.waiting {
		s.emit(s.state)
	}
	s.drop()
}

// drop forgets the state that is held.
func (s *Stream) drop() { s.state, s.waiting, s.partial = "", false, false }

// Unsettled says whether Settle has something to do.
func (s *Stream) Unsettled() bool {
	return s.drawn && !s.returned && !s.cut && !s.settled && !blank(s.line)
}

// Settle makes a state of the line that has not ended, if it began after a carriage return.
// It is called when nothing has followed for a while. If the line ends as a secret's value
// begins, that end is left out. If more follows, the whole line counts again, as a state or
// as a line.
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

// hold makes a state of the first n bytes of the line, and says whether it did: blank ones
// make none.
func (s *Stream) hold(n int) bool {
	if blank(s.line[:n]) {
		return false
	}
	s.out, _ = s.index.appendMasked(s.out[:0], s.line, n, s.hidden)
	s.state, s.waiting, s.partial = string(s.out), true, false
	return true
}

func blank(line []byte) bool { return len(bytes.TrimSpace(line)) == 0 }

// add adds part, which has no end of a line, to the line. It emits the beginning of a line
// that is too long.
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
	// The line goes on so far beyond the cut that a match that begins before it can be
	// seen to its end.
	for len(s.line) >= cutAt+maxPattern {
		s.emitPart()
	}
}

// finish adds the beginning of a rune or an escape sequence to the line, as one that will
// not end.
func (s *Stream) finish() {
	s.line, _ = sanitize(s.line, s.raw, true)
	s.raw = s.raw[:0]
	for len(s.line) > cutAt {
		s.emitPart()
	}
}

// carriageReturn makes the line a state. If a newline follows, the line is a line after
// all.
func (s *Stream) carriageReturn() {
	s.finish()
	s.returned = true
	s.whole = s.whole || s.hold(len(s.line))
}

// end emits the state and then the line, and begins the next line.
func (s *Stream) end(newline bool) {
	s.finish()
	if !s.partial || s.whole {
		s.Draw()
	}
	s.drop()
	// After a carriage return, blank text is no line: it only ends what was drawn over.
	over := s.drawn || s.returned && !newline
	if !s.whole && (len(s.line) > 0 || newline) && !(over && blank(s.line)) {
		s.out, _ = s.index.appendMasked(s.out[:0], s.line, len(s.line), s.hidden)
		s.emit(string(s.out))
	}
	s.begin(false)
}

// begin begins a line. drawn is whether it begins after a carriage return.
func (s *Stream) begin(drawn bool) {
	s.line, s.hidden = s.line[:0], 0
	s.drawn = drawn
	s.returned, s.cut, s.settled, s.whole, s.partial = false, false, false, false, false
}

// emitPart emits the first cutAt bytes of the line, which must be longer, or up to three
// bytes fewer so that no rune is split.
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
