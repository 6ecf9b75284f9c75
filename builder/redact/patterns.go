package redact

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"maps"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"
)

const (
	// minValue is the shortest value, and the shortest line of one, that is
	// masked for itself.
	minValue = 8
	// minPattern is the shortest line that is masked where a value of minValue
	// bytes has only short ones, as a password of 7 bytes and a newline has.
	minPattern = 4
	// maxPattern bounds how much of a line a Stream must see beyond a cut, and
	// how much of a long value can be shown when only a part of it is printed.
	maxPattern = 256
	// maxEncoded is how many bytes of values are looked for in hex, URLs and JSON
	// too, and by each line's own base64. These forms take up to a hundred times
	// the value's size; the others take ten.
	maxEncoded = 64 << 10
)

// patterns returns the texts to mask, each of minPattern to maxPattern bytes,
// in no order and some of them twice.
func patterns(values map[string][]byte) []string {
	// The shortest come first: passwords and tokens, which end up in URLs and
	// JSON more often than what is long.
	sorted := slices.SortedFunc(maps.Values(values), func(a, b []byte) int {
		return cmp.Or(cmp.Compare(len(a), len(b)), bytes.Compare(a, b))
	})
	var ps patternSet
	budget := maxEncoded
	for _, v := range sorted {
		if len(v) < minValue || len(bytes.TrimSpace(v)) == 0 {
			continue
		}
		budget -= len(v)
		ps.addValue(v, budget >= 0)
	}
	return ps
}

type patternSet []string

func (ps *patternSet) addValue(v []byte, allForms bool) {
	sources := [][]byte{v}
	// A shell's $(cat …) drops trailing newlines.
	if t := bytes.TrimRight(v, "\r\n"); len(t) < len(v) && len(t) >= minValue {
		sources = append(sources, t)
	}
	var short [][]byte
	long := false
	for line := range bytes.SplitSeq(v, []byte("\n")) {
		line = bytes.TrimSuffix(line, []byte("\r"))
		trimmed := bytes.TrimSpace(line)
		if bytes.IndexByte(line, '\r') >= 0 {
			sources = ps.addReturned(sources, line, allForms)
		}
		switch {
		case len(trimmed) >= minValue:
			ps.addText(trimmed)
		case len(line) >= minValue && len(trimmed) > 0:
			ps.addText(line)
		default:
			short = append(short, trimmed)
			continue
		}
		long = true
		if allForms && len(line) < len(v) {
			sources = append(sources, line)
		}
		if allForms && len(trimmed) < len(line) && len(trimmed) >= minValue {
			sources = append(sources, trimmed)
		}
	}
	if !long {
		for _, line := range short {
			ps.addText(line)
		}
	}
	for _, s := range sources {
		ps.addBase64(s)
		if allForms {
			ps.addEncoded(s)
		}
	}
}

// addReturned adds the parts of a line between its carriage returns, which a
// Stream takes for lines, and returns sources with those to encode.
func (ps *patternSet) addReturned(sources [][]byte, line []byte, allForms bool) [][]byte {
	for part := range bytes.SplitSeq(line, []byte("\r")) {
		part = bytes.TrimSpace(part)
		ps.addText(part)
		if allForms && len(part) >= minValue {
			sources = append(sources, part)
		}
	}
	return sources
}

// addText adds a line as it looks when it has been sanitised. Its first and
// last bytes can be part of a rune or a sequence with what is printed around
// it: the line is added without them too.
func (ps *patternSet) addText(line []byte) {
	whole, _ := sanitize(nil, line, true)
	ps.addPieces(string(whole), minPattern)
	inner := line
	for len(inner) > 0 && !utf8.RuneStart(inner[0]) {
		inner = inner[1:]
	}
	part, _ := sanitize(nil, inner, false)
	if len(part) < len(whole) {
		ps.addPieces(string(part), minPattern)
	}
}

// addBase64 adds what the base64 of any text that v is a part of has of v
// alone. It depends on how many bytes before v the text has, modulo 3: by two
// or three characters' worth of bits, the first and the last are shared.
func (ps *patternSet) addBase64(v []byte) {
	for _, enc := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding} {
		for before := range 3 {
			padded := append(make([]byte, before, before+len(v)), v...)
			s := enc.EncodeToString(padded)
			from := (before*8 + 5) / 6
			to := len(padded) * 8 / 6
			ps.addPieces(s[from:to], minValue)
			if before > 0 {
				continue
			}
			// The end of v's own base64, with and without padding.
			raw := strings.TrimRight(s, "=")
			ps.addPiece(s[max(0, len(s)-maxPattern):], minValue)
			ps.addPiece(raw[max(0, len(raw)-maxPattern):], minValue)
			for _, columns := range []int{64, 76} {
				for i := 0; len(s) > columns && i < len(s); i += columns {
					line := s[i:min(i+columns, len(s))]
					ps.addPiece(line, minValue)
					ps.addPiece(line[:min(len(line), max(0, to-i))], minValue)
				}
			}
		}
	}
}

// addEncoded adds the forms that v has inside other texts. Most values have but
// one in all of them.
func (ps *patternSet) addEncoded(v []byte) {
	h := hex.EncodeToString(v)
	query := url.QueryEscape(string(v))
	component := strings.ReplaceAll(query, "+", "%20")
	forms := []string{
		h,
		strings.ToUpper(h),
		query,
		component,
		strings.ReplaceAll(component, "%2F", "/"), // Python's quote
		unreserved.Replace(component),             // JavaScript's encodeURIComponent
		url.PathEscape(string(v)),
	}
	for _, html := range []bool{false, true} {
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(html)
		if e.Encode(string(v)) == nil {
			forms = append(forms, b.String()[1:b.Len()-2])
		}
	}
	for i, f := range forms {
		if i > 0 && f == forms[i-1] {
			continue
		}
		ps.addText([]byte(f))
	}
}

// unreserved undoes what url.QueryEscape does beyond RFC 2396.
var unreserved = strings.NewReplacer("%21", "!", "%27", "'", "%28", "(", "%29", ")", "%2A", "*")

// addPieces adds s in pieces of at most maxPattern bytes, of which the last
// overlaps the one before it so as not to be short.
func (ps *patternSet) addPieces(s string, least int) {
	for len(s) > maxPattern {
		n := runeStart(s, maxPattern)
		ps.addPiece(s[:n], least)
		if rest := len(s) - n; rest < maxPattern {
			from := len(s) - maxPattern
			for !utf8.RuneStart(s[from]) {
				from++
			}
			n = from
		}
		s = s[n:]
	}
	ps.addPiece(s, least)
}

func (ps *patternSet) addPiece(s string, least int) {
	if len(s) >= least && len(strings.TrimSpace(s)) > 0 {
		*ps = append(*ps, s)
	}
}

// runeStart returns the last start of a rune in s at or before i.
func runeStart(s string, i int) int {
	for !utf8.RuneStart(s[i]) {
		i--
	}
	return i
}
