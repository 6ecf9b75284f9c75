// Package report reads what a daemon says of a solve: its progress, which becomes the
// contract's log lines, and its errors, which become the contract's codes and messages. It
// asks no daemon anything.
package report

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

// Watch is told of the signs that a Progress sees.
type Watch interface {
	// Listening says whether the daemon's next message is waited for, or not any more.
	Listening(yes bool)
	// Pushing is called for each message about a push, before its lines are logged.
	Pushing()
}

// Progress turns the status messages of one solve into the contract's log lines. It keeps
// the parts of them that the build's outcome and a Failure need. One goroutine at a time
// may use it.
type Progress struct {
	log   solve.Log
	mask  *redact.Redactor
	watch Watch

	vertices map[digest.Digest]*vertex
	order    []*vertex
	statuses map[statusKey]*client.VertexStatus
	streams  map[streamKey]*stream
	printed  map[digest.Digest]*printed
	drawing  []*stream // streams that have, or may have, a state to draw

	transfer time.Duration
	pushing  bool     // a push has begun
	lines    []string // of the current message
}

// vertex is the last state that the daemon told of one. The daemon may tell of it more than
// once, and an exporter runs twice, to export and to push.
type vertex struct {
	name      string
	started   *time.Time
	completed *time.Time
	cached    bool
	canceled  bool
	noSpace   bool // its output said that the disk is full, in words of the C library or of Go
	unstarted bool // its output said in runc's words that there was no room to start it
	streams   []streamKey
	answers   []answer // of a registry to a push that BuildKit then repeated
}

type statusKey struct {
	vertex digest.Digest
	id     string
}

// NewProgress returns the Progress of a solve that has not begun. Its lines go to log, and
// mask makes them safe.
func NewProgress(log solve.Log, mask *redact.Redactor, watch Watch) *Progress {
	return &Progress{
		log:      log,
		mask:     mask,
		watch:    watch,
		vertices: make(map[digest.Digest]*vertex),
		statuses: make(map[statusKey]*client.VertexStatus),
		streams:  make(map[streamKey]*stream),
		printed:  make(map[digest.Digest]*printed),
	}
}

// Drain takes messages until ch is closed, even while the log is slow: BuildKit's client
// returns from a solve only after its status channel has been read. When ch is closed,
// lines that wait to be drawn are logged.
//
// Once ctx has ended, Drain ignores the output of steps. The daemon may have much of it
// left, and the build holds its slot until the last message has come.
func (p *Progress) Drain(ctx context.Context, ch <-chan *client.SolveStatus) {
	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	p.watch.Listening(true)
	for open := true; open; {
		var s *client.SolveStatus
		select {
		case s, open = <-ch:
		case <-timer.C:
		}
		// While a slow client takes its lines, the daemon is not silent. Lines that the
		// timer draws follow a message of the daemon by about a second.
		p.watch.Listening(false)
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
		p.watch.Listening(open)
	}
}

func (p *Progress) send() {
	if len(p.lines) > 0 {
		p.log(p.lines...)
		p.lines = nil
	}
}

func (p *Progress) line(format string, args ...any) {
	p.lines = append(p.lines, fmt.Sprintf(format, args...))
}

// handle makes the lines of one message. The end of a vertex comes after the output that
// came with it.
func (p *Progress) handle(s *client.SolveStatus) {
	if slices.ContainsFunc(s.Statuses, func(st *client.VertexStatus) bool { return isPush(st.ID) }) {
		p.pushing = true
		p.watch.Pushing()
	}
	var ends []end
	for _, v := range s.Vertexes {
		ends = p.vertex(v, ends)
	}
	for _, st := range s.Statuses {
		p.status(st)
	}
	for _, l := range s.Logs {
		p.output(l)
	}
	for _, e := range ends {
		for _, key := range e.v.streams {
			p.streams[key].Flush()
			delete(p.streams, key) // what it holds has no other bound than the number of steps
		}
		e.v.streams = nil
		p.line("%s", e.line)
	}
	for _, w := range s.Warnings {
		p.warning(w)
	}
}

// end is the line about the end of a vertex.
type end struct {
	v    *vertex
	took time.Duration
	line string
}

// shortRun is a run that is not worth two lines.
const shortRun = 10 * time.Millisecond

// vertex takes the state v in. It prints the vertex's beginning, and returns ends with its
// end, if it has ended.
func (p *Progress) vertex(v *client.Vertex, ends []end) []end {
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
	name := timestamp(v.Started) + " " + p.mask.Line(v.Name)
	if started {
		again := false
		// The vertex may have ended and begun again within one message. Every local
		// source does so at once: its two runs are shown as one.
		ends = slices.DeleteFunc(ends, func(e end) bool {
			if e.v != known {
				return false
			}
			if again = e.took < shortRun; !again {
				p.line("%s", e.line)
			}
			return true
		})
		// A cached vertex takes no time. The line about its end is enough.
		if !again && !(completed && v.Cached) {
			p.line("v: %s", name)
		}
	}
	if completed {
		took := max(v.Completed.Sub(*v.Started), 0)
		ends = append(ends, end{known, took, "v: " + name + ending(v, took)})
	}
	return ends
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

// status prints the beginning and the end of a status. Between them, a pull or a push
// reports every few kilobytes.
func (p *Progress) status(st *client.VertexStatus) {
	key := statusKey{st.Vertex, st.ID}
	known := p.statuses[key]
	p.statuses[key] = st
	began := known == nil || known.Completed != nil && st.Completed == nil
	ended := st.Completed != nil && (known == nil || !sameTime(known.Completed, st.Completed))
	text := p.mask.Line(strings.TrimSuffix(st.ID, ":"))
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

func (p *Progress) warning(w *client.VertexWarning) {
	text := p.mask.Line(string(w.Short))
	if w.URL != "" {
		text += " (" + p.mask.Line(w.URL) + ")"
	}
	p.line("w: %s", text)
}

// Counts returns how many steps of the Dockerfile were reached, and how many of them came
// from the cache.
func (p *Progress) Counts() (steps, cached int) {
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

// Transfer is how long the daemon took to receive local sources.
func (p *Progress) Transfer() time.Duration { return p.transfer }

// Pushing says whether a push has begun.
func (p *Progress) Pushing() bool { return p.pushing }

// Running is the name of the vertex that had not ended by itself and began last, or empty.
// A step of the Dockerfile comes before a vertex that BuildKit adds.
func (p *Progress) Running() string {
	name := ""
	for _, v := range slices.Backward(p.order) {
		if v.started == nil || v.completed != nil && !v.canceled {
			continue
		}
		if isStep(v.name) {
			return p.mask.Line(v.name)
		}
		if name == "" {
			name = p.mask.Line(v.name)
		}
	}
	return name
}

// find is the vertex with the digest d, or nil. A nil Progress has none.
func (p *Progress) find(d string) *vertex {
	if p == nil {
		return nil
	}
	return p.vertices[digest.Digest(d)]
}

// name is the name of the vertex with the digest d, or empty.
func (p *Progress) name(d string) string {
	if v := p.find(d); v != nil {
		return p.mask.Line(v.name)
	}
	return ""
}

// noSpace says whether the vertex with the digest d ran out of disk.
func (p *Progress) noSpace(d string) bool {
	v := p.find(d)
	return v != nil && v.noSpace
}

// unstarted says whether there was no disk to start the vertex with the digest d. It
// believes the vertex's output.
func (p *Progress) unstarted(d string) bool {
	v := p.find(d)
	return v != nil && v.unstarted
}

// isStep tells the steps of a Dockerfile from the vertices that BuildKit adds.
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
