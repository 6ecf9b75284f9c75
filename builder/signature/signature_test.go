package signature_test

import (
	"encoding/hex"
	"slices"
	"strings"
	"testing"

	"handler/function/signature"
)

func TestParseKeys(t *testing.T) {
	for _, tt := range []struct {
		name, file string
		want       []string
	}{
		{"empty", "", nil},
		{"white space", " \r\n\t\n", nil},
		{"one", "secret", []string{"secret"}},
		{"one with a newline", "secret\n", []string{"secret"}},
		{"two lines", "new\nold\n", []string{"new", "old", "new\nold"}},
		{"carriage returns", "new\r\nold\r\n", []string{"new", "old", "new\r\nold"}},
		{"empty line between", "new\n\nold", []string{"new", "old", "new\n\nold"}},
		{"the same twice", "key\nkey\n", []string{"key", "key\nkey"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for _, k := range signature.ParseKeys([]byte(tt.file)) {
				got = append(got, string(k))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// vectors are GitHub's documented example and RFC 4231's cases 1, 2 and 6.
var vectors = []struct{ key, body, mac string }{
	{"It's a Secret to Everybody", "Hello, World!", "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"},
	{strings.Repeat("\x0b", 20), "Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"},
	{"Jefe", "what do ya want for nothing?", "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"},
	{strings.Repeat("\xaa", 131), "Test Using Larger Than Block-Size Key - Hash Key First", "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"},
}

func TestVectors(t *testing.T) {
	for _, v := range vectors {
		if got := signature.Sign([]byte(v.key), []byte(v.body)); got != "sha256="+v.mac {
			t.Errorf("%q: signed %s, want %s", v.body, got, v.mac)
		}
		keys := signature.Keys{[]byte("another"), []byte(v.key)}
		verifier := keys.Verifier()
		for _, b := range []byte(v.body) {
			verifier.Write([]byte{b})
		}
		mac, err := signature.Parse([]string{"sha256=" + v.mac})
		if err != nil {
			t.Fatal(err)
		}
		if key, ok := verifier.Verify(mac); !ok || string(key) != v.key {
			t.Errorf("%q: verified with %q, %v", v.body, key, ok)
		}
		mac[31] ^= 1
		if key, ok := verifier.Verify(mac); ok || key != nil {
			t.Errorf("%q: a wrong MAC verified", v.body)
		}
	}
}

func TestNoKeysVerifyNothing(t *testing.T) {
	verifier := signature.ParseKeys(nil).Verifier()
	verifier.Write([]byte("body"))
	mac, err := signature.Parse([]string{signature.Sign(nil, []byte("body"))})
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
