package reply

import "fmt"

// maxLog bounds the log of a whole answer, in bytes of JSON.
const maxLog = 1 << 20

// Excerpt keeps the first and the last lines of a log, 1 MiB of JSON together. The zero
// Excerpt is empty.
type Excerpt struct {
	head, tail         []string
	headSize, tailSize int
	full               bool // whether head takes no more lines
	omitted            int  // lines left out between head and tail
}

// lineSize is what a line takes in the log of a whole answer, with its quotes, comma,
// indentation and newline.
func lineSize(s string) int { return size(s) + 8 }

// Add adds one line. A line that is too long for a record is kept in parts.
func (e *Excerpt) Add(line string) {
	for _, part := range Parts(line) {
		e.add(part)
	}
}

// Size is how much is kept, in bytes of JSON.
func (e *Excerpt) Size() int { return e.headSize + e.tailSize }

func (e *Excerpt) add(line string) {
	const half = maxLog/2 - 64 // the mark's share
	n := lineSize(line)
	if !e.full && e.headSize+n <= half {
		e.head = append(e.head, line)
		e.headSize += n
		return
	}
	e.full = true
	e.tail = append(e.tail, line)
	e.tailSize += n
	drop := 0
	for e.tailSize > half {
		e.tailSize -= lineSize(e.tail[drop])
		// The array may keep the line in memory for long.
		e.tail[drop] = ""
		drop++
	}
	e.tail = e.tail[drop:]
	e.omitted += drop
}

// Lines returns the lines that are kept. Between head and tail, a line says how many were
// left out.
func (e *Excerpt) Lines() []string {
	out := append([]string{}, e.head...)
	if e.omitted > 0 {
		out = append(out, fmt.Sprintf("… %d lines left out …", e.omitted))
	}
	return append(out, e.tail...)
}
