package redact

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestLine(t *testing.T) {
	for _, tc := range []struct {
		name, in, want string
	}{
		{"empty", "", ""},
		{"plain", "go build ./...", "go build ./..."},
		{"tab", "a\tb", "a\tb"},
		{"newlines", "a\nb\r\nc", "a b c"},
		{"carriage return", "10%\r20%\r", "10%20%"},
		{"NUL, backspace, DEL", "a\x00b\bc\x7fd", "abcd"},
		{"C1", "a\u0085b\u0090", "ab"},
		{"not ASCII", "größe 日本 🙂", "größe 日本 🙂"},
		{"invalid UTF-8", "a\xffb\xc3(\xe2\x82", "a\ufffdb\ufffd(\ufffd\ufffd"},
		{"surrogate", "\xed\xa0\x80", "\ufffd\ufffd\ufffd"},
		{"separators", "a\u2028b\u2029c", "abc"},
		{"bidirectional controls", "a\u202eb\u2066c\u200fd\u061ce", "abcde"},
		{"colour", "\x1b[1;31mred\x1b[0m", "red"},
		{"cursor", "a\x1b[2K\x1b[1Gb", "ab"},
		{"private mode", "\x1b[?25lx", "x"},
		{"title", "\x1b]0;title\x07x", "x"},
		{"hyperlink", "\x1b]8;;http://h\x1b\\text\x1b]8;;\x1b\\", "text"},
		{"character set", "\x1b(Bx", "x"},
		{"two bytes", "\x1b7x\x1bM", "x"},
		{"device control string", "\x1bPq#0\x1b\\x", "x"},
		{"C1 CSI", "\u009b31mx", "x"},
		{"C1 OSC", "\u009d0;title\u009cx", "x"},
		{"sequence without end", "\x1b[31", "[31"},
		{"title without end", "\x1b]0;title", "]0;title"},
		{"sequence cut by a control", "\x1b[3\x01mx", "[3mx"},
		{"title over two lines", "\x1b]0;a\nb\x07", "]0;a b"},
		{"escape at the end", "a\x1b", "a"},
		{"long title", "\x1b]0;" + strings.Repeat("a", 5000) + "\x07", "]0;" + strings.Repeat("a", 5000)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := New(nil).Line(tc.in); got != tc.want {
				t.Errorf("Line(%q) = %q, want %q", tc.in, got, tc.want)
			}
		})
	}
}

func TestText(t *testing.T) {
	r := New(map[string][]byte{"key": []byte("first line of it\nsecond line of it\n")})
	in := "building:\n\x1b[31m>>> RUN echo first line of it\r\n\n  second line of it\n"
	want := "building:\n>>> RUN echo ***\n\n  ***\n"
	if got := r.Text(in); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestMask(t *testing.T) {
	const token = "s3cr3t/value+1?&<é>"
	html, _ := json.Marshal(token)
	inBase64 := func(before, after string) string {
		return base64.StdEncoding.EncodeToString([]byte(before + token + after))
	}
	long := strings.Repeat("0123456789abcdefghijklmnopqrstuvwxyz!", 40) + "end"
	long64 := base64.StdEncoding.EncodeToString([]byte(long))
	pem := "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG\n9w0BAQEF\nAAS=\n-----END KEY-----\n"
	for _, tc := range []struct {
		name, value, in, want string
	}{
		{"alone", token, token, "***"},
		{"inside", token, "a" + token + "b", "a***b"},
		{"twice", token, token + " " + token, "*** ***"},
		{"adjacent", token, token + token, "***"},
		{"overlapping", "abcabcab", "xabcabcabcabx", "x***x"},
		{"split by escape codes", token, "s3cr\x1b[1m3t/val\x1b[0mue+1?&\x00<é>", "***"},
		{"first byte missing", token, token[1:], token[1:]},
		{"7 bytes", "1234567", "1234567", "1234567"},
		{"8 bytes", "12345678", "12345678", "***"},
		{"7 bytes and a newline", "hunter2\n", "pass=hunter2", "pass=***"},
		{"spaces alone", "          ", "a             b", "a             b"},
		{"indented line", "key:\n    password", "password", "***"},
		{"carriage returns", "password1\r\npassword2\r\n", "password1 password2", "*** ***"},
		{"lines", pem, "l: MIIEvQIBADANBgkqhkiG", "l: ***"},
		{"short line of a long value", pem, "AAS=", "AAS="},
		{"lines in JSON", pem, `{"key":"` + strings.ReplaceAll(pem, "\n", `\n`) + `"}`, `{"key":"***"}`},
		{"escape code in the value", "pass\x1b[1mword", "pass\x1b[1mword", "***"},
		{"control characters in the value", "pass\x01word", "pass\x01word", "***"},
		{"invalid UTF-8 in the value", "\xff\xfepassword\xff", "\xff\xfepassword\xff", "***"},
		{"continuation of a rune before", "\x82\xacpassword", "\xe2\x82\xacpassword", "€***"},
		{"short but for a continuation", "\x82\xacsecret", "\xe2\x82\xacsecret", "€***"},
		{"hex", token, "x" + hex.EncodeToString([]byte(token)), "x***"},
		{"upper hex", token, strings.ToUpper(hex.EncodeToString([]byte(token))), "***"},
		{"query", token, "?q=" + url.QueryEscape(token) + "&x", "?q=***&x"},
		{"path", token, "/" + url.PathEscape(token) + "/", "/***/"},
		{"space in a component", "pass word (1)", "pass%20word%20(1)", "***"},
		{"component", "pass/word (1)", "pass%2Fword%20(1)", "***"},
		{"component in lower case", "pass/word (1)", "pass%2fword%20(1)", "***"},
		{"query in lower case", "pass/word (1)", "pass%2fword+%281%29", "***"},
		{"JSON of PHP", "abcd/efgh+ijkl", `"abcd\/efgh+ijkl"`, `"***"`},
		{"JSON in ASCII", "pässwort1", `"p\u00e4sswort1"`, `"***"`},
		{"JSON in ASCII, in upper case", "pässwort1", `"p\u00E4sswort1"`, `"***"`},
		{"JSON in ASCII of two units", "pa😀sswort", `"pa\ud83d\ude00sswort"`, `"***"`},
		{"JSON of PHP in ASCII", "pä/sswort1", `"p\u00e4\/sswort1"`, `"***"`},
		{"quote", "pass/word (1)", "pass/word%20%281%29", "***"},
		{"JSON", token, string(html), `"***"`},
		{"JSON quotes", `pass"word\`, `"pass\"word\\"`, `"***"`},
		{"base64", token, inBase64("", ""), "***"},
		{"raw base64", token, strings.TrimRight(inBase64("", ""), "="), "***"},
		{"base64 without the value's newline", token + "\n", inBase64("", ""), "***"},
		{"base64 of a line", "user\n" + token, inBase64("", ""), "***"},
		{"base64 at 1", token, inBase64("a", "b"), "YX***Yg=="},
		{"base64 at 2", token, inBase64("ab", "c"), "YWJ***mM="},
		{"URL base64", "\xff\xfe\xfdpassword", "__79cGFzc3dvcmQ=", "***"},
		{"long", long, "a" + long + "b", "a***b"},
		{"short last piece", strings.Repeat("0123456789", 26)[:maxPattern+3], strings.Repeat("0123456789", 26)[:maxPattern+3], "***"},
		{"long base64", long, long64, "***"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := New(map[string][]byte{"id": []byte(tc.value)})
			if got := r.Line(tc.in); got != tc.want {
				t.Errorf("Line(%q) = %q, want %q", tc.in, got, tc.want)
			}
		})
	}
	for _, columns := range []int{64, 76} {
		r := New(map[string][]byte{"id": []byte(long)})
		for line := range slices.Chunk([]byte(long64), columns) {
			// Less than 8 characters are left to be seen.
			if got := r.Line(string(line)); got != "***" && len(line) >= minValue {
				t.Errorf("base64 at %d columns: got %q for %q", columns, got, line)
			}
		}
	}
}

func TestMaskBudget(t *testing.T) {
	value := func(c string, n int) []byte { return []byte(strings.Repeat(c, n) + "\nanother line " + c) }
	r := New(map[string][]byte{"a": value("abc", 12000), "b": value("xyz", 12000), "c": value("short", 3)})
	for _, tc := range []struct{ in, want string }{
		{"another line xyz", "***"},
		{hex.EncodeToString(value("short", 3)), "***"},
		{base64.StdEncoding.EncodeToString([]byte("another line short")), "***"},
		{hex.EncodeToString(value("abc", 12000)), "***"},
		// Beyond the budget, and shown to be so.
		{hex.EncodeToString([]byte("another line xyz")), hex.EncodeToString([]byte("another line xyz"))},
		{hex.EncodeToString(value("xyz", 100)), hex.EncodeToString(value("xyz", 100))},
		{base64.StdEncoding.EncodeToString([]byte("another line xyz")), base64.StdEncoding.EncodeToString([]byte("another line xyz"))},
		{base64.StdEncoding.EncodeToString(value("xyz", 12000)), "***"},
	} {
		if got := r.Line(tc.in); got != tc.want {
			t.Errorf("got %.100q for %.100q, want %q", got, tc.in, tc.want)
		}
	}
}

// TestMaskMany compares the index with a simple search. Its patterns are beginnings, ends and
// parts of each other.
func TestMaskMany(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	word := func(n int) string {
		b := make([]byte, n)
		for i := range b {
			b[i] = "ab"[rnd.IntN(2)]
		}
		return string(b)
	}
	for range 2000 {
		var ps []string
		for range 1 + rnd.IntN(8) {
			ps = append(ps, word(4+rnd.IntN(6)))
		}
		text := word(40)
		hidden := make([]bool, len(text))
		for _, p := range ps {
			for i := range text {
				if strings.HasPrefix(text[i:], p) {
					for j := range p {
						hidden[i+j] = true
					}
				}
			}
		}
		var want strings.Builder
		for i := range text {
			if !hidden[i] {
				want.WriteByte(text[i])
			} else if i == 0 || !hidden[i-1] {
				want.WriteString(mask)
			}
		}
		if got := newIndex(slices.Clone(ps)).mask([]byte(text)); string(got) != want.String() {
			t.Fatalf("patterns %q in %q: got %q, want %q", ps, text, got, want.String())
		}
	}
}

func collect(r *Redactor, chunks ...string) []string {
	var lines []string
	s := r.Stream(func(line string) { lines = append(lines, line) })
	for _, c := range chunks {
		s.Write([]byte(c))
	}
	s.Flush()
	return lines
}

func TestStream(t *testing.T) {
	const token = "correct horse"
	r := New(map[string][]byte{"id": []byte(token)})
	dots := strings.Repeat(".", cutAt)
	for _, tc := range []struct {
		name   string
		chunks []string
		want   []string
	}{
		{"nothing", nil, nil},
		{"lines", []string{"a\nb\n"}, []string{"a", "b"}},
		{"blank lines", []string{"\n\na\n\n"}, []string{"", "", "a", ""}},
		{"line in chunks", []string{"a", "b", "\n"}, []string{"ab"}},
		{"no newline at the end", []string{"a\nb"}, []string{"a", "b"}},
		{"CRLF", []string{"a\r", "\nb\r\n"}, []string{"a", "b"}},
		{"rune in chunks", []string{"\xe2", "\x82", "\xac\n"}, []string{"€"}},
		{"rune without end", []string{"\xe2\x82", "\n"}, []string{"\ufffd\ufffd"}},
		{"sequence in chunks", []string{"a\x1b", "[3", "1mb\n"}, []string{"ab"}},
		{"sequence without end", []string{"a\x1b[3", "\nb\n"}, []string{"a[3", "b"}},
		{"value in chunks", []string{"x cor", "rect h", "orse y\n"}, []string{"x *** y"}},
		{"cut", []string{dots, ".", "\n"}, []string{dots, "."}},
		{"as long as can be", []string{dots + "\n"}, []string{dots}},
		{"value across a cut", []string{dots[6:] + token + "\n"}, []string{dots[6:] + "***", "***"}},
		{"value across a cut in chunks", []string{dots[6:] + "corr", "ect ho", "rse.\n"}, []string{dots[6:] + "***", "***."}},
		{"value across a cut of many", []string{dots[6:] + token + dots + "\n"}, []string{dots[6:] + "***", "***" + dots[7:], dots[:7]}},
		{"value at a cut", []string{dots + token + "\n"}, []string{dots, "***"}},
		{"rune across a cut", []string{dots[1:] + "€\n"}, []string{dots[1:], "€"}},
		{"more after a flush", []string{dots + "a\n", "b\n"}, []string{dots, "a", "b"}},
		{"drawn over", []string{"1%\r2%\r", "3%\r\nover\n"}, []string{"3%", "over"}},
		{"drawn over, returns first", []string{"\r1%\r2%", "\r3%\nover\n"}, []string{"2%", "3%", "over"}},
		{"drawn over by another line", []string{"1%\r2%\rover\n"}, []string{"2%", "over"}},
		{"drawn over at the end", []string{"1%\r2%\r"}, []string{"2%"}},
		{"drawn over at the end, returns first", []string{"\r1%\r2%"}, []string{"1%", "2%"}},
		{"wiped", []string{"1%\r      \r2%\r\x1b[K\r", "\n"}, []string{"2%"}},
		{"wiped at the end", []string{"1%\r      \r"}, []string{"1%"}},
		{"blank lines with CRLF", []string{"\r\n \r", "\n\r", "\na\r\n"}, []string{"", " ", "", "a"}},
		{"CR CRLF", []string{"a\r\r\n", "b\r\r", "\n"}, []string{"a", "b"}},
		{"title before a return", []string{"\x1b]0;a\r\x07b\n"}, []string{"]0;a", "b"}},
		{"value in chunks, drawn over", []string{"1\rx cor", "rect h", "orse y\r", "z\n"}, []string{"x *** y", "z"}},
		{"value across a cut, drawn over", []string{"1\r" + dots[6:] + "corr", "ect ho", "rse.\r"}, []string{"1", dots[6:] + "***", "***."}},
		{"too long, drawn over", []string{dots + "a\r", "\n", dots + "b\rc\n"}, []string{dots, "a", dots, "b", "c"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := collect(r, tc.chunks...); !slices.Equal(got, tc.want) {
				t.Errorf("got %.300q, want %.300q", got, tc.want)
			}
		})
	}
}

// TestStreamLive checks that a line is emitted when its newline comes, and not later.
func TestStreamLive(t *testing.T) {
	var lines []string
	s := New(map[string][]byte{"id": []byte("correct horse")}).Stream(func(line string) { lines = append(lines, line) })
	s.Write([]byte("the correct\nand"))
	if !slices.Equal(lines, []string{"the correct"}) {
		t.Errorf("got %q before the second line's end", lines)
	}
	s.Flush()
	s.Flush()
	if !slices.Equal(lines, []string{"the correct", "and"}) {
		t.Errorf("got %q", lines)
	}
}

// TestStreamStates draws and settles between the chunks that are written.
func TestStreamStates(t *testing.T) {
	r := New(map[string][]byte{"id": []byte("correct horse"), "parts": []byte("return\rto sender\rpart")})
	const draw, settle = "draw", "settle"
	for _, tc := range []struct {
		name   string
		chunks []string // written, or what is done
		want   []string
	}{
		{"latest", []string{"1%\r2%\r", draw, draw, "3%\r", draw}, []string{"2%", "3%"}},
		{"none yet", []string{"1%", settle, draw, "\r\n"}, []string{"1%"}},
		{"its newline later", []string{"1%\r", draw, "\nover\n"}, []string{"1%", "over"}},
		{"returns first", []string{"\r1%", draw, "\r2%", draw, "\n"}, []string{"1%", "2%"}},
		{"settled", []string{"\r1%", settle, settle, draw, "\r2%", draw, settle, draw, "\n"}, []string{"1%", "2%"}},
		{"settled, its newline later", []string{"\r1%", settle, "\n"}, []string{"1%"}},
		{"settled, then longer", []string{"\r1%", settle, draw, " of 2", settle, draw, " MB\r", draw}, []string{"1%", "1% of 2", "1% of 2 MB"}},
		{"settled, not drawn, then longer", []string{"\r1%", settle, " of 2 MB\n"}, []string{"1% of 2 MB"}},
		{"settled over a state", []string{"0%\r1%", settle, draw}, []string{"1%"}},
		{"settled, and again", []string{"\r1%", settle, draw, "\r1%", settle, draw, "\r", draw}, []string{"1%", "1%"}},
		{"settled while blank", []string{"1%\r  ", settle, draw}, []string{"1%"}},
		{"settled in a rune", []string{"\r1\xe2\x82", settle, draw, "\xac\r", draw}, []string{"1", "1€"}},
		{"settled after a newline", []string{"\r1%\n2%", settle, draw}, []string{"1%", "2%"}},
		{"settled when too long", []string{"\r" + strings.Repeat(".", cutAt+maxPattern), settle, draw}, []string{strings.Repeat(".", cutAt), strings.Repeat(".", maxPattern)}},
		{"value at the end", []string{"\rx correct horse", settle, draw, "\n"}, []string{"x ***"}},
		{"value that has begun", []string{"\rx correct", settle, draw, " horse\n"}, []string{"x ", "x ***"}},
		{"value that has begun, and does not go on", []string{"\rx correct", settle, draw, "\n"}, []string{"x ", "x correct"}},
		{"value with returns", []string{"return\r", draw, "to sender\r", draw, "part\n"}, []string{"***", "***", "***"}},
		{"value with returns in base64", []string{base64.StdEncoding.EncodeToString([]byte("to sender")) + "\n"}, []string{"***"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var lines []string
			s := r.Stream(func(line string) { lines = append(lines, line) })
			for _, c := range tc.chunks {
				switch c {
				case draw:
					s.Draw()
				case settle:
					s.Settle()
				default:
					s.Write([]byte(c))
				}
				if c == draw && s.Waiting() || c == settle && s.Unsettled() {
					t.Errorf("not done: %s", c)
				}
			}
			s.Flush()
			if !slices.Equal(lines, tc.want) {
				t.Errorf("got %.300q, want %.300q", lines, tc.want)
			}
		})
	}
}

func TestBegun(t *testing.T) {
	ix := newIndex([]string{"abcdefgh", "abcdxy", "cdefz", "abcdefghij"})
	for text, want := range map[string]int{
		"": 0, "abc": 0, "xabcd": 4, "abcdefgh": 8, "abcdefghij": 0, "abcdx": 5, "abcdxy": 0, "abcdez": 0, "abcdef": 6, "xcdef": 4,
	} {
		if got := ix.begun([]byte(text)); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
	var none *index
	if none.begun([]byte("abcdef")) != 0 {
		t.Error("something begins with nothing")
	}
}

func TestStreamMemory(t *testing.T) {
	r := New(map[string][]byte{"id": bytes.Repeat([]byte("long"), 10000)})
	for _, in := range []string{"x", "\x1b]0;", "\xe2", "\xff", "long", "\x00", "\x1b[", "\x1b]\x1b\\", "x\r", "\r", strings.Repeat("x", 5000) + "\r"} {
		s := r.Stream(func(line string) {
			if len(line) > MaxLine {
				t.Errorf("%q: line of %d bytes", in, len(line))
			}
		})
		s.Write([]byte("\x1b]"))
		s.Write(bytes.Repeat([]byte(in), 1<<20/len(in)))
		if held := cap(s.raw) + cap(s.line) + cap(s.out) + len(s.state); held > 80<<10 {
			t.Errorf("%q: a stream holds %d bytes", in, held)
		}
	}
}

func FuzzRedactor(f *testing.F) {
	f.Add([]byte("s3cr3t/value"), []byte("a "), []byte(" b"), uint64(1), false)
	f.Add([]byte("two lines of\nsome length\n"), []byte("\x1b[1m"), []byte("\x1b[0m"), uint64(2), false)
	f.Add([]byte("\xffbinary\x00 value"), []byte("\xe2\x82"), []byte("\xac"), uint64(3), false)
	f.Add(bytes.Repeat([]byte("long value "), 100), []byte("\u202e"), []byte("\r\n"), uint64(4), true)
	f.Add([]byte("\xa8\xad000000"), []byte("\xee"), []byte("0"), uint64(3), true)
	f.Add([]byte("returned\rto a sender"), []byte("\r"), []byte("\r"), uint64(6), false)
	f.Add([]byte("aaaaaaaaa"), []byte("aaa"), []byte("aa"), uint64(5), true)
	f.Fuzz(func(t *testing.T, value, prefix, suffix []byte, seed uint64, pad bool) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		r := New(map[string][]byte{"id": value})

		std := base64.StdEncoding.EncodeToString
		text := slices.Concat(prefix, value, suffix)
		text = slices.Concat(text, []byte(std(value)), suffix, []byte(std(text)), prefix,
			[]byte(base64.URLEncoding.EncodeToString(value)))
		if pad {
			// Somewhere around the cut.
			text = slices.Concat(bytes.Repeat([]byte{'.'}, cutAt-rnd.IntN(len(text)+1)%cutAt), text)
		}

		// One line at a time, so that what a cut parted can be joined.
		ends := func(c rune) bool { return c == '\n' || c == '\r' }
		for line := range bytes.FieldsFuncSeq(text, ends) {
			var joined strings.Builder
			s := r.Stream(func(out string) {
				if len(out) > MaxLine {
					t.Fatalf("line of %d bytes", len(out))
				}
				joined.WriteString(out)
			})
			for len(line) > 0 {
				n := 1 + rnd.IntN(min(len(line), 1+rnd.IntN(len(line))))
				s.Write(line[:n])
				line = line[n:]
			}
			s.Write([]byte("\n"))
			checkSafe(t, joined.String())
			checkMasked(t, value, joined.String())
		}

		// As it is drawn.
		check := func(out string) {
			checkSafe(t, out)
			checkMasked(t, value, out)
		}
		s := r.Stream(check)
		for rest := text; len(rest) > 0; {
			n := 1 + rnd.IntN(len(rest))
			s.Write(rest[:n])
			rest = rest[n:]
			if rnd.IntN(2) == 0 {
				s.Settle()
			}
			s.Draw()
		}
		s.Flush()

		for out := range strings.SplitSeq(r.Text(string(text)), "\n") {
			checkSafe(t, out)
			checkMasked(t, value, out)
		}
		checkSafe(t, r.Line(string(text)))
	})
}

func checkSafe(t *testing.T, s string) {
	t.Helper()
	if !utf8.ValidString(s) {
		t.Fatalf("not UTF-8: %q", s)
	}
	for _, c := range s {
		if c != '\t' && (unicode.IsControl(c) || unicode.In(c, unicode.Zl, unicode.Zp, unicode.Bidi_Control)) {
			t.Fatalf("%U in %q", c, s)
		}
	}
}

// checkMasked does not use the patterns. It looks for the value's lines as they are, and for
// words of base64 that decode to a text with the value in it.
func checkMasked(t *testing.T, value []byte, s string) {
	t.Helper()
	// A mask between two parts of a text can, by chance, complete a value that
	// has asterisks. Nothing is given away.
	if len(value) < minValue || bytes.IndexByte(value, '*') >= 0 || len(bytes.TrimSpace(value)) == 0 {
		return
	}
	ends := func(c rune) bool { return c == '\n' || c == '\r' }
	for line := range bytes.FieldsFuncSeq(value, ends) {
		line = bytes.TrimSpace(line)
		// What is not UTF-8 can be whole runes only with bytes around it.
		if len(line) >= minValue && utf8.Valid(line) && strings.Contains(s, string(line)) {
			t.Fatalf("%q is in %q", line, s)
		}
	}
	for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		last2 := "+/"
		if enc == base64.RawURLEncoding {
			last2 = "-_"
		}
		other := func(c rune) bool {
			return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune(last2, c)
		}
		for word := range strings.FieldsFuncSeq(s, other) {
			for skip := range min(4, len(word)) {
				part := word[skip:]
				if len(part)%4 == 1 {
					part = part[:len(part)-1]
				}
				if d, err := enc.DecodeString(part); err == nil && bytes.Contains(d, value) {
					t.Fatalf("base64 of %q is in %q", value, s)
				}
			}
		}
	}
}

func BenchmarkStream(b *testing.B) {
	var log bytes.Buffer
	for i := range 1000 {
		fmt.Fprintf(&log, "\x1b[32m#%d\x1b[0m Get:%d http://deb.debian.org/debian bookworm/main amd64 libc6 amd64 2.36-9+deb12u%d [2,758 kB]\n", i, i, i)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	values := func(n, size int) map[string][]byte {
		m := make(map[string][]byte)
		for i := range n {
			v := make([]byte, size)
			for j := range v {
				v[j] = byte(rnd.Uint32())
			}
			m[fmt.Sprint(i)] = []byte(hex.EncodeToString(v))
		}
		return m
	}
	indented := map[string][]byte{"json": []byte(strings.Repeat("        \"http://deb.debian.org/\": 1,\n", 1000))}
	for _, bc := range []struct {
		name   string
		values map[string][]byte
	}{
		{"none", nil},
		{"one", values(1, 20)},
		{"1000 patterns", values(90, 20)},
		{"2 MiB", values(16, 64<<10)},
		{"hits", indented},
	} {
		b.Run(bc.name, func(b *testing.B) {
			r := New(bc.values)
			if r.index != nil {
				b.ReportMetric(float64(len(r.index.patterns)), "patterns")
			}
			s := r.Stream(func(string) {})
			b.SetBytes(int64(log.Len()))
			b.ReportAllocs()
			for b.Loop() {
				s.Write(log.Bytes())
			}
		})
	}
}

func BenchmarkNew(b *testing.B) {
	v := make([]byte, 2<<20)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range v {
		v[i] = byte(rnd.Uint32())
	}
	for _, size := range []int{40, 64 << 10, 2 << 20} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			values := make(map[string][]byte)
			for part := range slices.Chunk(v[:size], 64<<10) {
				values[fmt.Sprint(len(values))] = part
			}
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			var r *Redactor
			for b.Loop() {
				r = New(values)
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/(1<<20), "MiB")
			runtime.KeepAlive(r)
		})
	}
}
