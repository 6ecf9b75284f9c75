package report

import (
	"slices"
	"strings"
	"time"

	"github.com/moby/buildkit/client"
	digest "github.com/opencontainers/go-digest"

	"handler/function/redact"
)

// drawEvery is the time between two states of a step that draws over a line. At most four
// fall into one second, as the contract says.
const drawEvery = 300 * time.Millisecond

// settleAfter is how long a drawn line without an end stands before it is shown as it is.
const settleAfter = time.Second

type streamKey struct {
	vertex digest.Digest
	stream int
}

// stream is one of the two streams that a step prints to.
type stream struct {
	*redact.Stream
	step    *printed
	written time.Time // the last time
	drew    time.Time // the last time
	listed  bool      // in Progress.drawing
}

// A failed step's error quotes the last lines that the step printed.
const (
	maxPrintedLines = 20
	maxPrinted      = 4 << 10 // bytes, newlines included
)

// printed is the end of what one step printed, on both streams.
type printed struct {
	lines    []string // masked
	size     int      // bytes, newlines included
	drawNext time.Time
}

func (p *printed) add(line string) {
	const mark = "… "
	if len(line) >= maxPrinted {
		line = mark + strings.ToValidUTF8(line[len(line)-maxPrinted+len(mark)+1:], "")
	}
	p.lines = append(p.lines, line)
	p.size += len(line) + 1
	drop := max(0, len(p.lines)-maxPrintedLines)
	for _, line := range p.lines[:drop] {
		p.size -= len(line) + 1
	}
	for ; p.size > maxPrinted; drop++ {
		p.size -= len(p.lines[drop]) + 1
	}
	p.lines = slices.Delete(p.lines, 0, drop)
}

// output takes a piece of a step's output in.
func (p *Progress) output(l *client.VertexLog) {
	key := streamKey{l.Vertex, l.Stream}
	st := p.streams[key]
	if st == nil {
		st = p.newStream(key)
		p.streams[key] = st
	}
	st.Write(l.Data)
	st.written = time.Now()
	if !st.listed && (st.Waiting() || st.Unsettled()) {
		st.listed = true
		p.drawing = append(p.drawing, st)
	}
}

func (p *Progress) newStream(key streamKey) *stream {
	step := p.printed[key.vertex]
	if step == nil {
		step = &printed{}
		p.printed[key.vertex] = step
	}
	v := p.vertices[key.vertex]
	if v != nil {
		v.streams = append(v.streams, key)
	}
	return &stream{step: step, Stream: p.mask.Stream(func(line string) {
		p.line("l: %s", line)
		step.add(line)
		// The C library begins with a capital, Go and runc do not. Every line passes
		// here, so that a regexp would be too slow.
		if v != nil && strings.Contains(line, "o space left on device") {
			v.noSpace = true
			v.unstarted = v.unstarted || strings.HasPrefix(line, "runc run failed: ")
		}
		if v != nil && isExport(v.name) {
			v.pushLine(line)
		}
	})}
}

// draw prints the lines that are drawn over and due. It returns how long to wait for the
// next that will be due, or 0.
func (p *Progress) draw() time.Duration {
	now := time.Now()
	var next time.Time
	sooner := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	// The stream that drew last comes after the other stream of its step.
	slices.SortStableFunc(p.drawing, func(a, b *stream) int { return a.drew.Compare(b.drew) })
	p.drawing = slices.DeleteFunc(p.drawing, func(st *stream) bool {
		if st.Unsettled() && now.Sub(st.written) >= settleAfter {
			st.Settle()
		}
		switch {
		case !st.Waiting():
		case now.Before(st.step.drawNext):
			sooner(st.step.drawNext)
		default:
			st.Draw()
			st.drew, st.step.drawNext = now, now.Add(drawEvery)
		}
		if st.Unsettled() {
			sooner(st.written.Add(settleAfter))
		}
		st.listed = st.Waiting() || st.Unsettled()
		return !st.listed
	})
	if next.IsZero() {
		return 0
	}
	return next.Sub(now)
}

// lastPrinted is the end of what the vertex with the digest d printed, masked.
func (p *Progress) lastPrinted(d string) string {
	if p == nil || p.printed[digest.Digest(d)] == nil {
		return ""
	}
	return strings.Trim(strings.Join(p.printed[digest.Digest(d)].lines, "\n"), "\n")
}

// answer is a registry's answer that BuildKit takes for one that may change. The lines of a
// push tell of it: first "error: unexpected status … 503 …", then the registry's words.
type answer struct {
	status int
	words  []string
}

// maxAnswers is more than BuildKit gets for all blobs that it pushes at once.
const maxAnswers = 64

// severalErrors begins what BuildKit makes of an answer with more than one error.
const severalErrors = "errors:"

// pushLine takes in a line that v, an exporter, printed.
func (v *vertex) pushLine(line string) {
	switch n := len(v.answers); {
	case strings.HasPrefix(line, "error: "):
		if n < maxAnswers {
			v.answers = append(v.answers, answer{status: statusIn(line)})
		}
	case n == 0, line == "", strings.HasPrefix(line, "retrying in "), line == severalErrors:
	default:
		v.answers[n-1].words = append(v.answers[n-1].words, line)
	}
}

// answered5xx says whether a registry answered a push with a status of 5xx and with the
// words of text.
func (p *Progress) answered5xx(text string) bool {
	text = p.mask.Line(text)
	said := func(words string) bool { return strings.Contains(text, words) }
	for _, v := range p.order {
		for _, a := range v.answers {
			if a.status >= 500 && slices.ContainsFunc(a.words, said) {
				return true
			}
		}
	}
	return false
}
