package reply

import "fmt"

// maxLog bounds the log of an answer that does not stream, in bytes of JSON.
const maxLog = 1 << 20

// excerpt keeps the head and the tail of a log.
type excerpt struct {
	head, tail         []string
	headSize, tailSize int
	full               bool // the head is
	omitted            int  // lines between them
}

// lineSize is what a line takes in the log: itself, its quotes, a comma, its
// indentation and a newline.
func lineSize(s string) int { return size(s) + 8 }

func (e *excerpt) add(line string) {
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

func (e *excerpt) lines() []string {
	out := append([]string{}, e.head...)
	if e.omitted > 0 {
		out = append(out, fmt.Sprintf("… %d lines left out …", e.omitted))
	}
	return append(out, e.tail...)
}
