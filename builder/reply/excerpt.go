package reply

import "fmt"

// maxLog bounds the log of an answer that does not stream, in bytes of JSON.
const maxLog = 1 << 20

// Excerpt keeps the head and the tail of a log, 1 MiB of JSON together. The zero
// Excerpt is empty.
type Excerpt struct {
	head, tail         []string
	headSize, tailSize int
	full               bool // the head is
	omitted            int  // lines between them
}

// lineSize is what a line takes in the log: itself, its quotes, a comma, its
// indentation and a newline.
func lineSize(s string) int { return size(s) + 8 }

// Add takes one line. One that is too long for a record is kept in parts.
func (e *Excerpt) Add(line string) {
	for more := true; more; more = line != "" {
		var part string
		part, line = split(line, maxLines)
		e.add(part)
	}
}

// Size is of what is kept, in bytes of JSON.
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
		// The array may outlive the slice's start for long.
		e.tail[drop] = ""
		drop++
	}
	e.tail = e.tail[drop:]
	e.omitted += drop
}

// Lines is what was kept, with the number of lines that were not in their place.
func (e *Excerpt) Lines() []string {
	out := append([]string{}, e.head...)
	if e.omitted > 0 {
		out = append(out, fmt.Sprintf("… %d lines left out …", e.omitted))
	}
	return append(out, e.tail...)
}
