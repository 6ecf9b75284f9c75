package redact

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	// minValue is the length from which a value is masked, and a line of a value, in
	// bytes.
	minValue = 8
	// minPattern is the length from which a line is masked if its value has only lines
	// shorter than minValue. A password of 7 bytes with a newline is such a value.
	minPattern = 4
	// maxPattern is how long a pattern can be. A Stream must see as much of a line
	// beyond a cut. If only a part of a long value is printed, up to as much of it can
	// be shown.
	maxPattern = 256
	// maxEncoded is how many bytes of values are also masked in hex, URLs and JSON, and
	// by the base64 of each line. These forms take up to a hundred times the value's
	// size; the others take ten times.
	maxEncoded = 64 << 10
)

// patterns returns the texts to mask, each of minPattern to maxPattern bytes. They are in
// no order, and some may be there twice.
func patterns(values map[string][]byte) []string {
	// The shortest values come first. They are passwords and tokens, which are put into
	// URLs and JSON more often than long values are.
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

// addValue adds the patterns of one value. The forms that addEncoded adds, and the base64
// of each line, are among them only with allForms.
func (ps *patternSet) addValue(v []byte, allForms bool) {
	ps.addLines(v)
	for _, text := range encodedTexts(v, allForms) {
		ps.addBase64(text)
		if allForms {
			ps.addEncoded(text)
		}
	}
}

// addLines adds each line of v as it is, if it is long enough. If none is, it adds the
// short ones.
func (ps *patternSet) addLines(v []byte) {
	var short [][]byte
	long := false
	for line := range linesOf(v) {
		for state := range statesOf(line) {
			ps.addText(state)
		}
		if text := longText(line); text != nil {
			ps.addText(text)
			long = true
		} else {
			short = append(short, bytes.TrimSpace(line))
		}
	}
	if !long {
		for _, text := range short {
			ps.addText(text)
		}
	}
}

// encodedTexts returns the texts whose encodings are masked: v and, with allForms, its
// lines.
func encodedTexts(v []byte, allForms bool) [][]byte {
	texts := [][]byte{v}
	// A shell's $(cat …) drops newlines at the end.
	if t := bytes.TrimRight(v, "\r\n"); len(t) < len(v) && len(t) >= minValue {
		texts = append(texts, t)
	}
	if !allForms {
		return texts
	}
	for line := range linesOf(v) {
		for state := range statesOf(line) {
			if len(state) >= minValue {
				texts = append(texts, state)
			}
		}
		text := longText(line)
		if text == nil {
			continue
		}
		if len(line) < len(v) {
			texts = append(texts, line)
		}
		if len(text) < len(line) {
			texts = append(texts, text)
		}
	}
	return texts
}

// linesOf yields the lines of v without their ends.
func linesOf(v []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for line := range bytes.SplitSeq(v, []byte("\n")) {
			if !yield(bytes.TrimSuffix(line, []byte("\r"))) {
				return
			}
		}
	}
}

// statesOf yields what stands between the carriage returns of a line, without the space
// around it: a Stream shows it as lines. It yields nothing if there is no carriage return.
func statesOf(line []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		if bytes.IndexByte(line, '\r') < 0 {
			return
		}
		for state := range bytes.SplitSeq(line, []byte("\r")) {
			if !yield(bytes.TrimSpace(state)) {
				return
			}
		}
	}
}

// longText returns the text by which a line is masked: without the space around it or, if
// it is too short then, with it. It is nil if the line is too short for both.
func longText(line []byte) []byte {
	trimmed := bytes.TrimSpace(line)
	switch {
	case len(trimmed) >= minValue:
		return trimmed
	case len(line) >= minValue && len(trimmed) > 0:
		return line
	}
	return nil
}

// addText adds a text as sanitize shows it. Its first and last bytes may become one rune
// or one escape sequence with what is printed around it: the text is added without such
// bytes too.
func (ps *patternSet) addText(text []byte) {
	whole, _ := sanitize(nil, text, true)
	ps.addPieces(string(whole), minPattern)
	inner := text
	for len(inner) > 0 && !utf8.RuneStart(inner[0]) {
		inner = inner[1:]
	}
	inside, _ := sanitize(nil, inner, false)
	if len(inside) < len(whole) {
		ps.addPieces(string(inside), minPattern)
	}
}

// addBase64 adds what is v's in the base64 of every text that has v in it. A character of
// base64 has 6 bits. So the characters depend on how many bytes are before v, modulo 3, and
// the first and the last can have bits of what is around v. They are left out. Example: the
// base64 of "x"+v begins with two characters that have bits of x, and the patterns begin
// with the third.
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
			// What follows is v's own base64: its end, with and without padding, and
			// its lines where it is wrapped.
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

// addEncoded adds the forms that v has in hex, URLs and JSON. For most values, those of
// URLs and JSON are all the same.
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
	for _, f := range forms[2:] {
		forms = append(forms, lowerEscapes(f)) // .NET's UrlEncode
	}
	for _, html := range []bool{false, true} {
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(html)
		if e.Encode(string(v)) == nil {
			text := b.String()[1 : b.Len()-2]
			for _, f := range []string{text, inASCII(text, `\u%04x`), inASCII(text, `\u%04X`)} {
				forms = append(forms, f, strings.ReplaceAll(f, "/", `\/`)) // the second is PHP's json_encode
			}
		}
	}
	slices.Sort(forms)
	for _, f := range slices.Compact(forms) {
		ps.addText([]byte(f))
	}
}

// percent is an escape of a URL.
var percent = regexp.MustCompile(`%[0-9A-F]{2}`)

func lowerEscapes(s string) string { return percent.ReplaceAllStringFunc(s, strings.ToLower) }

// inASCII writes the runes of a JSON string that are not ASCII in an escape, as Python's json.dumps
// does.
func inASCII(s, escape string) string {
	var b strings.Builder
	for _, r := range s {
		switch hi, lo := utf16.EncodeRune(r); {
		case r < utf8.RuneSelf:
			b.WriteRune(r)
		case hi != utf8.RuneError:
			fmt.Fprintf(&b, escape+escape, hi, lo)
		default:
			fmt.Fprintf(&b, escape, r)
		}
	}
	return b.String()
}

// unreserved turns back what url.QueryEscape escapes and RFC 2396 does not.
var unreserved = strings.NewReplacer("%21", "!", "%27", "'", "%28", "(", "%29", ")", "%2A", "*")

// addPieces adds s in pieces of at most maxPattern bytes, if it has least bytes or more.
// The last piece overlaps the one before it, so that it is not short.
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
