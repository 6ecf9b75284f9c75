package signature_test

import (
	"bytes"
	"encoding/hex"
	"slices"
	"strings"
	"testing"
	"time"

	"handler/function/signature"
)

func TestParseKeys(t *testing.T) {
	const one, two = "the first key, 1", "the-second-key-2"
	const first = "the-first-key--1"
	for _, tt := range []struct {
		name, file string
		want       []string
		list       bool
	}{
		{"empty", "", nil, false},
		{"white space", " \r\n\t\n", nil, false},
		{"short", "fifteen bytes..", nil, false},
		{"short but for white space", " fifteen bytes..\n", nil, false},
		{"one", "sixteen bytes...", []string{"sixteen bytes..."}, false},
		{"one with a newline", one + "\n", []string{one}, false},
		{"one, and spaces before it", " \t" + first + "\r\n\n", []string{first}, false},
		{"two lines", first + "\n" + two + "\n", []string{first, two, first + "\n" + two}, true},
		{"carriage returns", first + "\r\n" + two + "\r\n", []string{first, two, first + "\r\n" + two}, true},
		{"empty line between", first + "\n \n" + two, []string{first, two, first + "\n \n" + two}, true},
		{"the same twice", two + "\n" + two + "\n", []string{two, two + "\n" + two}, true},
		{"a comment", "# rotated on Monday\n" + two, []string{two, "# rotated on Monday\n" + two}, true},
		{"a comment at the end", two + "\n#", []string{two, two + "\n#"}, true},
		{"only comments", "# nothing is here yet\n", []string{"# nothing is here yet"}, false},
		{"a short line", two + "\nshort", []string{two + "\nshort"}, false},
		{"a line of fifteen", first + "\n" + two[:15], []string{first + "\n" + two[:15]}, false},
		{"a line with a space", one + "\n" + two, []string{one + "\n" + two}, false},
		{"a line with a control character", first + "\n" + two + "\x7f", []string{first + "\n" + two + "\x7f"}, false},
		{"a line beyond ASCII", first + "\n" + two + "\u00e9", []string{first + "\n" + two + "\u00e9"}, false},
		{"two short lines", "new\nold\n", nil, false},
		{"PEM", "-----BEGIN-EC-KEY-----\nMHcCAQEEIIrYSSNQFaA2Hwf1duRSxKtLYX5CB04fSeQ6tF1aY\n-----END-EC-KEY-----\n",
			[]string{"-----BEGIN-EC-KEY-----\nMHcCAQEEIIrYSSNQFaA2Hwf1duRSxKtLYX5CB04fSeQ6tF1aY\n-----END-EC-KEY-----"}, false},
		{"JSON", "{\n\"key\":\"0123456789abcdef\"\n}\n", []string{"{\n\"key\":\"0123456789abcdef\"\n}"}, false},
		{"JSON of one line", "{\"key\":\"01234567\"}", []string{"{\"key\":\"01234567\"}"}, false},
		{"YAML", "key: 0123456789abcdef\nold: 0123456789abcdef", []string{"key: 0123456789abcdef\nold: 0123456789abcdef"}, false},
		{"binary", "\x00\x01\n\xff\x80ab\n0123456789abcdef\n7\n", []string{"\x00\x01\n\xff\x80ab\n0123456789abcdef\n7"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			keys, list := signature.ParseKeys([]byte(tt.file))
			var got []string
			for _, k := range keys {
				got = append(got, string(k))
			}
			if !slices.Equal(got, tt.want) || list != tt.list {
				t.Errorf("got %q, list %v; want %q, %v", got, list, tt.want, tt.list)
			}
		})
	}
}

// FuzzParseKeys checks, for any file, that no line is a key that could be guessed from the
// file's form, and that the whole file is a key.
func FuzzParseKeys(f *testing.F) {
	for _, s := range []string{"", "the-first-key--1\nthe-second-key-2\n", "{\n}", "-----BEGIN\n# x\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		keys, _ := signature.ParseKeys(file)
		whole := bytes.TrimSpace(file)
		for _, k := range keys {
			if len(k) < signature.MinKey {
				t.Errorf("%q is a key", k)
			}
			if !bytes.Equal(k, whole) && (bytes.ContainsFunc(k, func(r rune) bool { return r < 0x21 || r > 0x7e }) || k[0] == '#' || bytes.HasPrefix(k, []byte("-----"))) {
				t.Errorf("%q is a key of a list", k)
			}
		}
		if len(whole) >= signature.MinKey && !slices.ContainsFunc(keys, func(k []byte) bool { return bytes.Equal(k, whole) }) {
			t.Errorf("the whole of %q is no key", whole)
		}
	})
}

func TestTimestamp(t *testing.T) {
	now := time.Unix(1795915276, 999_000_000)
	for _, tt := range []struct {
		name   string
		values []string
		want   signature.Timestamp
		ok     bool
	}{
		{"none", nil, "", true},
		{"now", []string{"1795915276"}, "1795915276", true},
		{"as early as can be", []string{"1795914976"}, "1795914976", true},
		{"too early", []string{"1795914975"}, "", false},
		{"as late as can be", []string{"1795915576"}, "1795915576", true},
		{"too late", []string{"1795915577"}, "", false},
		{"zeros before it", []string{"01795915276"}, "01795915276", true},
		{"empty", []string{""}, "", false},
		{"two", []string{"1795915276", "1795915276"}, "", false},
		{"two in one", []string{"1795915276,1795915276"}, "", false},
		{"a sign", []string{"+1795915276"}, "", false},
		{"a space", []string{" 1795915276"}, "", false},
		{"milliseconds", []string{"1795915276999"}, "", false},
		{"a fraction", []string{"1795915276.5"}, "", false},
		{"a date", []string{"Sun, 29 Nov 2026 03:52:22 GMT"}, "", false},
		{"over an int64", []string{"9223372036854775808"}, "", false},
		{"the largest", []string{"9223372036854775807"}, "", false},
		{"long", []string{strings.Repeat("1", 10_000)}, "", false},
	} {
		got, err := signature.ParseTimestamp(tt.values, now)
		if got != tt.want || (err == nil) != tt.ok || err != nil && len(err.Error()) > 200 {
			t.Errorf("%s: %q, %v", tt.name, got, err)
		}
	}

	// What is signed is the timestamp, a full stop, and the message.
	key := []byte("It's a Secret to Everybody")
	if a, b := signature.Sign(key, "1795915276", []byte("body")), signature.Sign(key, "", []byte("1795915276.body")); a != b {
		t.Errorf("signed %s, want %s", a, b)
	}
	mac, err := signature.Parse([]string{signature.Sign(key, "1795915276", []byte("body"))})
	if err != nil {
		t.Fatal(err)
	}
	for _, t2 := range []signature.Timestamp{"", "1795915277", "01795915276"} {
		if _, ok := (signature.Keys{key}).Verify(mac, t2, []byte("body")); ok {
			t.Errorf("verified with the timestamp %q", t2)
		}
	}
	if _, ok := (signature.Keys{key}).Verify(mac, "1795915276", []byte("body")); !ok {
		t.Error("not verified with its timestamp")
	}
	for message, want := range map[string]string{"1.x": "x", "1795915276..x": ".x", "1.": "", "1795915276": "-", ".x": "-", "x": "-", "": "-", "1x.": "-"} {
		rest, found := signature.CutTimestamp([]byte(message))
		if !found && string(rest) != message {
			t.Errorf("%q: %q is left of what has no timestamp", message, rest)
		}
		if found && string(rest) != want || !found && want != "-" {
			t.Errorf("%q: %q, %v", message, rest, found)
		}
	}
}

// vectors are the example in GitHub's documentation and cases 1, 2 and 6 of RFC 4231.
var vectors = []struct{ key, body, mac string }{
	{"It's a Secret to Everybody", "Hello, World!", "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"},
	{strings.Repeat("\x0b", 20), "Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"},
	{"Jefe", "what do ya want for nothing?", "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"},
	{strings.Repeat("\xaa", 131), "Test Using Larger Than Block-Size Key - Hash Key First", "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"},
}

func TestVectors(t *testing.T) {
	for _, v := range vectors {
		if got := signature.Sign([]byte(v.key), "", []byte(v.body)); got != "sha256="+v.mac {
			t.Errorf("%q: signed %s, want %s", v.body, got, v.mac)
		}
		keys := signature.Keys{[]byte("another"), []byte(v.key)}
		verifier := keys.Verifier("")
		for _, b := range []byte(v.body) {
			verifier.Write([]byte{b})
		}
		mac, err := signature.Parse([]string{"sha256=" + v.mac})
		if err != nil {
			t.Fatal(err)
		}
		if place, ok := verifier.Verify(mac); !ok || place != 1 {
			t.Errorf("%q: verified with key %d, %v", v.body, place, ok)
		}
		mac[31] ^= 1
		if place, ok := verifier.Verify(mac); ok || place != -1 {
			t.Errorf("%q: a wrong MAC verified", v.body)
		}
	}
}

func TestNoKeysVerifyNothing(t *testing.T) {
	keys, _ := signature.ParseKeys(nil)
	verifier := keys.Verifier("")
	verifier.Write([]byte("body"))
	mac, err := signature.Parse([]string{signature.Sign(nil, "", []byte("body"))})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := verifier.Verify(mac); ok {
		t.Error("a body signed with the empty key verified")
	}
}

func TestParse(t *testing.T) {
	good := "sha256=" + strings.Repeat("0f", 32)
	for _, tt := range []struct {
		name   string
		values []string
		ok     bool
	}{
		{"good", []string{good}, true},
		{"upper case digits", []string{"sha256=" + strings.Repeat("0F", 32)}, true},
		{"none", nil, false},
		{"empty", []string{""}, false},
		{"twice", []string{good, good}, false},
		{"two in one", []string{good + "," + good}, false},
		{"sha1", []string{"sha1=" + strings.Repeat("0f", 20)}, false},
		{"sha1 of the right length", []string{"sha1=" + strings.Repeat("0f", 32)}, false},
		{"no prefix", []string{strings.Repeat("0f", 32)}, false},
		{"prefix in upper case", []string{"SHA256=" + strings.Repeat("0f", 32)}, false},
		{"short", []string{good[:len(good)-2]}, false},
		{"long", []string{good + "0f"}, false},
		{"not hex", []string{good[:len(good)-1] + "g"}, false},
		{"white space", []string{" " + good}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			mac, err := signature.Parse(tt.values)
			if (err == nil) != tt.ok {
				t.Fatalf("error %v, want ok %v", err, tt.ok)
			}
			if err != nil && mac != (signature.MAC{}) {
				t.Error("a MAC beside an error")
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add("sha256=" + strings.Repeat("0f", 32))
	f.Add("sha1=" + strings.Repeat("0f", 20))
	f.Add("")
	f.Fuzz(func(t *testing.T, header string) {
		mac, err := signature.Parse([]string{header})
		if err != nil {
			if mac != (signature.MAC{}) {
				t.Error("a MAC beside an error")
			}
			return
		}
		if back := "sha256=" + hex.EncodeToString(mac[:]); !strings.EqualFold(back, header) {
			t.Errorf("%q came back as %q", header, back)
		}
	})
}
