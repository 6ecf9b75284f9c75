package buildkit

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/moby/buildkit/client"
	digest "github.com/opencontainers/go-digest"
	"github.com/tonistiigi/units"

	"handler/function/redact"
	"handler/function/solve"
)

// progress turns the daemon's status stream into the contract's log lines, and
// keeps of it what the outcome and the errors need. It is used by one goroutine
// at a time.
type progress struct {
	log       solve.Log
	redact    *redact.Redactor
	listening func(bool) // called around each message with whether the next one is waited for
	pushing   func()     // called for each status of a push, before it is logged

	vertices map[digest.Digest]*vertex
	order    []*vertex
	statuses map[statusKey]*client.VertexStatus
	streams  map[streamKey]*stream
	printed  map[digest.Digest]*printed
	drawing  []*stream // those that have, or may have, a state to draw

	transfer time.Duration // of what local sources took
	lines    []string      // of the current message
}

// vertex is what was last said of one; the daemon may report it more than once,
// and an exporter runs twice, to export and to push.
type vertex struct {
	name      string
	started   *time.Time
	completed *time.Time
	cached    bool
	canceled  bool
	noSpace   bool // its output said so, in the words of the C library or of Go
	unstarted bool // and in those of runc, for which there was none to start it
	streams   []streamKey
	tries     []try // those of a push that BuildKit makes again
}

// try is an answer that BuildKit takes for one that may change, as the lines of a
// push tell it: "error: unexpected status … 503 …" and then the registry's words.
type try struct {
	status int
	words  []string
}

// maxTries is more than BuildKit makes of all blobs that it pushes at once.
const maxTries = 64

// end is a line to print after the output that came with it.
type end struct {
	v    *vertex
	took time.Duration
	line string
}

// shortRun is what is not worth two lines.
const shortRun = 10 * time.Millisecond

type statusKey struct {
	vertex digest.Digest
	id     string
}

type streamKey struct {
	vertex digest.Digest
	stream int
}

// stream is one of the two that a step prints to.
type stream struct {
	*redact.Stream
	step    *printed
	written time.Time // the last time
	drew    time.Time // the last time
	listed  bool      // in progress.drawing
}

// drawEvery is between two states of one step that draws over a line: below four
// a second, also when they come a little late.
const drawEvery = 300 * time.Millisecond

// settleAfter is how long a line that is drawn, and has no end yet, stands before
// it is shown as it is.
const settleAfter = time.Second

// A failed step's error has the last that it printed, newlines included.
const (
	maxPrintedLines = 20
	maxPrinted      = 4 << 10
)

// printed is of one step, both streams.
type printed struct {
	lines    []string // the last, masked
	size     int      // with their newlines
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

func newProgress(log solve.Log, r *redact.Redactor, listening func(bool), pushing func()) *progress {
	return &progress{
		log:       log,
		redact:    r,
		listening: listening,
		pushing:   pushing,
		vertices:  make(map[digest.Digest]*vertex),
		statuses:  make(map[statusKey]*client.VertexStatus),
		streams:   make(map[streamKey]*stream),
		printed:   make(map[digest.Digest]*printed),
	}
}

// drain takes every message, also when the log is slow: a solve does not end
// before its status channel has been read. What has waited to be drawn is when ch
// is closed. Once ctx has ended nobody reads what steps print: a daemon may have much of
// it left, and the build holds its slot until the last has come.
func (p *progress) drain(ctx context.Context, ch <-chan *client.SolveStatus) {
	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	for open := true; open; {
		var s *client.SolveStatus
		select {
		case s, open = <-ch:
		case <-timer.C:
		}
		// A client that reads slowly is not the daemon's silence. What is drawn by
		// the timer follows a sign of the daemon's by a second or so.
		p.listening(false)
		if s != nil {
			if ctx.Err() != nil {
				s.Logs = nil
			}
			p.handle(s)
		}
		if !open {
			for _, st := range p.streams {
				st.Flush()
			}
		}
		timer.Stop()
		if wait := p.draw(); wait > 0 {
			timer.Reset(wait)
		}
		p.send()
		p.listening(true)
	}
}

// draw prints what is due of lines that are drawn over. It returns how long to
// wait for what is due next, or 0.
func (p *progress) draw() time.Duration {
	now := time.Now()
	var next time.Time
	sooner := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	// Who drew last comes after the other stream of its step.
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

func (p *progress) send() {
	if len(p.lines) > 0 {
		p.log(p.lines...)
		p.lines = nil
	}
}

func (p *progress) line(format string, args ...any) {
	p.lines = append(p.lines, fmt.Sprintf(format, args...))
}

func (p *progress) handle(s *client.SolveStatus) {
	for _, st := range s.Statuses {
		if isPush(st.ID) {
			p.pushing()
			break
		}
	}
	var ended []end
	for _, v := range s.Vertexes {
		known := p.vertices[v.Digest]
		if known == nil {
			known = &vertex{}
			p.vertices[v.Digest] = known
			p.order = append(p.order, known)
		}
		started := v.Started != nil && !sameTime(known.started, v.Started)
		completed := v.Started != nil && v.Completed != nil && (started || !sameTime(known.completed, v.Completed))
		known.name, known.cached = v.Name, v.Cached
		known.started, known.completed = v.Started, v.Completed
		known.canceled = isCanceled(v)
		name := timestamp(v.Started) + " " + p.redact.Line(v.Name)
		if started {
			again := false
			// It may have ended and begun again since the last message: every
			// local source does so at once, and is shown as one.
			ended = slices.DeleteFunc(ended, func(e end) bool {
				if e.v != known {
					return false
				}
				if again = e.took < shortRun; !again {
					p.line("%s", e.line)
				}
				return true
			})
			// One that came from the cache takes no time: its end says all.
			if !again && !(completed && v.Cached) {
				p.line("v: %s", name)
			}
		}
		if completed {
			took := max(v.Completed.Sub(*v.Started), 0)
			ended = append(ended, end{known, took, "v: " + name + ending(v, took)})
		}
	}
	for _, st := range s.Statuses {
		p.status(st)
	}
	for _, l := range s.Logs {
		p.output(l)
	}
	for _, e := range ended {
		for _, key := range e.v.streams {
			p.streams[key].Flush()
		}
		p.line("%s", e.line)
	}
	for _, w := range s.Warnings {
		p.warning(w)
	}
}

func ending(v *client.Vertex, took time.Duration) string {
	text := fmt.Sprintf(" %.2fs", took.Seconds())
	switch {
	case v.Cached:
		return " CACHED"
	case isCanceled(v):
		return text + " CANCELED"
	case v.Error != "":
		return text + " ERROR"
	}
	return text
}

// status prints a status when it begins and when it ends, not what is between:
// a pull or a push reports every few kilobytes.
func (p *progress) status(st *client.VertexStatus) {
	key := statusKey{st.Vertex, st.ID}
	known := p.statuses[key]
	p.statuses[key] = st
	began := known == nil || known.Completed != nil && st.Completed == nil
	ended := st.Completed != nil && (known == nil || !sameTime(known.Completed, st.Completed))
	text := p.redact.Line(strings.TrimSuffix(st.ID, ":"))
	if began {
		p.line("s: %s %s", timestamp(startOf(st)), text)
	}
	if !ended {
		return
	}
	size := ""
	if n := max(st.Total, st.Current); n > 0 {
		size = fmt.Sprintf(" %.2f", units.Bytes(n))
	}
	took := max(st.Completed.Sub(*startOf(st)), 0)
	if strings.HasPrefix(st.ID, "transferring ") {
		p.transfer += took
	}
	p.line("s: %s %s%s %.2fs", timestamp(startOf(st)), text, size, took.Seconds())
}

func startOf(st *client.VertexStatus) *time.Time {
	if st.Started != nil {
		return st.Started
	}
	return &st.Timestamp
}

func (p *progress) output(l *client.VertexLog) {
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

func (p *progress) newStream(key streamKey) *stream {
	step := p.printed[key.vertex]
	if step == nil {
		step = &printed{}
		p.printed[key.vertex] = step
	}
	v := p.vertices[key.vertex]
	if v != nil {
		v.streams = append(v.streams, key)
	}
	return &stream{step: step, Stream: p.redact.Stream(func(line string) {
		p.line("l: %s", line)
		step.add(line)
		// The C library begins it with a capital, Go and runc do not. Every line
		// passes here: no regexp.
		if v != nil && strings.Contains(line, "o space left on device") {
			v.noSpace = true
			v.unstarted = v.unstarted || strings.HasPrefix(line, "runc run failed: ")
		}
		if v != nil && isExport(v.name) {
			v.try(line)
		}
	})}
}

func (v *vertex) try(line string) {
	switch n := len(v.tries); {
	case strings.HasPrefix(line, "error: "):
		if n < maxTries {
			v.tries = append(v.tries, try{status: statusIn(line)})
		}
	case n == 0, strings.HasPrefix(line, "retrying in "), line == severalErrors:
	default:
		v.tries[n-1].words = append(v.tries[n-1].words, line)
	}
}

// troubled says whether a push was answered with a status of 5xx and the words of
// text.
func (p *progress) troubled(text string) bool {
	text = p.redact.Line(text)
	for _, v := range p.order {
		for _, t := range v.tries {
			said := func(words string) bool { return strings.Contains(text, words) }
			if t.status >= 500 && slices.ContainsFunc(t.words, said) {
				return true
			}
		}
	}
	return false
}

func (p *progress) warning(w *client.VertexWarning) {
	text := p.redact.Line(string(w.Short))
	if w.URL != "" {
		text += " (" + p.redact.Line(w.URL) + ")"
	}
	p.line("w: %s", text)
}

// warn prints one of our own.
func (p *progress) warn(text string) {
	p.line("w: %s", p.redact.Line(text))
	p.send()
}

// counts are the steps of the Dockerfile, as far as they were reached.
func (p *progress) counts() (steps, cached int) {
	for _, v := range p.order {
		if v.started == nil || !isStep(v.name) {
			continue
		}
		steps++
		if v.cached {
			cached++
		}
	}
	return steps, cached
}

// running is the name of what has not ended, or not by itself: a step sooner
// than what BuildKit adds, and the one begun last.
func (p *progress) running() string {
	name := ""
	for _, v := range slices.Backward(p.order) {
		if v.started == nil || v.completed != nil && !v.canceled {
			continue
		}
		if isStep(v.name) {
			return p.redact.Line(v.name)
		}
		if name == "" {
			name = p.redact.Line(v.name)
		}
	}
	return name
}

// name is that of the vertex with the given digest, or empty.
func (p *progress) name(d string) string {
	if v := p.vertices[digest.Digest(d)]; v != nil {
		return p.redact.Line(v.name)
	}
	return ""
}

// lastPrinted is the end of what the vertex with the given digest printed, masked.
func (p *progress) lastPrinted(d string) string {
	step := p.printed[digest.Digest(d)]
	if step == nil {
		return ""
	}
	return strings.Trim(strings.Join(step.lines, "\n"), "\n")
}

// noSpace says whether the vertex with the given digest ran out of disk.
func (p *progress) noSpace(d string) bool {
	v := p.vertices[digest.Digest(d)]
	return v != nil && v.noSpace
}

// unstarted says whether there was no disk to start the vertex with the given
// digest, if its output can be believed.
func (p *progress) unstarted(d string) bool {
	v := p.vertices[digest.Digest(d)]
	return v != nil && v.unstarted
}

// isStep tells the steps of a Dockerfile from what BuildKit adds.
func isStep(name string) bool {
	return strings.HasPrefix(name, "[") && !strings.HasPrefix(name, "[internal]") && !strings.HasPrefix(name, "[auth]")
}

func isExport(name string) bool { return strings.HasPrefix(name, "exporting to ") }

func isPush(status string) bool { return strings.HasPrefix(status, "pushing ") }

func isCanceled(v *client.Vertex) bool {
	return strings.HasSuffix(v.Error, "context canceled")
}

func sameTime(a, b *time.Time) bool {
	return a == b || a != nil && b != nil && a.Equal(*b)
}

func timestamp(t *time.Time) string {
	if t == nil {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05Z")
}
