package reply

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"unicode/utf8"

	"handler/function/api"
)

// Bounds of a record and its parts, in bytes of JSON.
const (
	// maxRecord bounds a line of a stream, with its newline. A client that reads with a
	// bufio.Scanner, as go-sdk does, stops without an error at 64 KiB.
	maxRecord = 60 << 10

	// maxLines bounds the log of one record of a stream. So it bounds each line too.
	maxLines = maxRecord - 3*maxWord - maxKeys

	maxError = 24 << 10
	maxWord  = 1 << 10 // each of id, image (twice), code, digest, commit, request
	maxList  = 8 << 10 // each of tags, platforms, warnings
	maxKeys  = 1 << 10 // all keys of a record, with its status and duration
)

// The last record of a stream has no log. This does not compile if its parts together can be
// larger than maxRecord.
const _ uint = maxRecord - maxError - 7*maxWord - 3*maxList - maxKeys

// encode appends v to b as one line of JSON.
func encode(b *bytes.Buffer, v any, indent string) {
	e := json.NewEncoder(b)
	e.SetEscapeHTML(false)
	e.SetIndent("", indent)
	if err := e.Encode(v); err != nil {
		// Strings and finite numbers can always be encoded.
		panic(err)
	}
}

// size returns how many bytes s takes as a JSON string without its quotes. For control
// characters it counts more than some of them take.
func size(s string) int {
	n := 0
	for i := 0; i < len(s); {
		k, length := runeSize(s[i:])
		n += k
		i += length
	}
	return n
}

// runeSize returns the size in JSON and the length in bytes of the first rune
// of s.
func runeSize(s string) (size, length int) {
	switch c := s[0]; {
	case c < ' ':
		return len(`\u0000`), 1
	case c == '"' || c == '\\':
		return 2, 1
	case c < utf8.RuneSelf:
		return 1, 1
	}
	r, length := utf8.DecodeRuneInString(s)
	if r == utf8.RuneError && length == 1 || r == '\u2028' || r == '\u2029' {
		return len(`\u0000`), length
	}
	return length, length
}

// split cuts s in two at the end of a rune. The first part is the longest with a size of at
// most limit.
func split(s string, limit int) (head, tail string) {
	n := 0
	for i := 0; i < len(s); {
		k, length := runeSize(s[i:])
		if n += k; n > limit {
			return s[:i], s[i:]
		}
		i += length
	}
	return s, ""
}

// Parts cuts a line into parts that each fit into a record of a stream. Most lines are one part.
func Parts(line string) []string {
	var parts []string
	for {
		// The 3 are the quotes and the comma.
		head, tail := split(line, maxLines-3)
		if parts = append(parts, head); tail == "" {
			return parts
		}
		line = tail
	}
}

// Bounded returns rec with every part but the log within its bound, and the duration rounded to
// milliseconds.
func Bounded(rec api.Record) api.Record {
	rec.Duration = milliseconds(rec.Duration)
	return bounded(rec)
}

// lastPart returns the longest end of s with a size of at most limit.
func lastPart(s string, limit int) string {
	n := 0
	i := len(s)
	for i > 0 {
		_, length := utf8.DecodeLastRuneInString(s[:i])
		k, _ := runeSize(s[i-length : i])
		if n += k; n > limit {
			break
		}
		i -= length
	}
	return s[i:]
}

// shorten cuts s to a size of at most limit. It cuts the middle, and leaves a mark there: an
// error begins with the step that failed, and often ends with the reason.
func shorten(s string, limit int) string {
	// A byte takes six at most.
	if len(s) <= limit/6 || size(s) <= limit {
		return s
	}
	const markSize = 64
	half := (limit - markSize) / 2
	head, _ := split(s, half)
	tail := lastPart(s[len(head):], half)
	return fmt.Sprintf("%s … (%d bytes cut) … %s", head, len(s)-len(head)-len(tail), tail)
}

// shortenList cuts list to a size of at most limit. The last entry then says how many were
// cut.
func shortenList(list []string, limit int) []string {
	const markSize = 64
	var out []string
	left := limit - markSize
	for i, s := range list {
		s = shorten(s, maxWord)
		// Quotes, a comma and the indentation of the JSON form.
		left -= size(s) + 8
		if left < 0 {
			return append(out, fmt.Sprintf("… (%d more)", len(list)-i))
		}
		out = append(out, s)
	}
	return out
}

// bounded returns rec with every part but the log within its bound.
func bounded(rec api.Record) api.Record {
	rec.ID = shorten(rec.ID, maxWord)
	rec.Image = shorten(rec.Image, maxWord)
	rec.ImageName = rec.Image
	rec.Code = api.Code(shorten(string(rec.Code), maxWord))
	rec.Digest = shorten(rec.Digest, maxWord)
	rec.Commit = shorten(rec.Commit, maxWord)
	rec.Request = shorten(rec.Request, maxWord)
	rec.Error = shorten(rec.Error, maxError)
	rec.Tags = shortenList(rec.Tags, maxList)
	rec.Platforms = shortenList(rec.Platforms, maxList)
	rec.Warnings = shortenList(rec.Warnings, maxList)
	return rec
}

// milliseconds rounds a number of seconds to milliseconds.
func milliseconds(seconds float64) float64 {
	return math.Round(seconds*1000) / 1000
}
