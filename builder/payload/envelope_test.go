package payload_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	"handler/function/api"

	"handler/function/payload"
)

func TestEnvelope(t *testing.T) {
	body := archive(file("context/x", strings.Repeat("some data ", 20_000)))
	text := base64.StdEncoding.EncodeToString([]byte(body))
	var lines, escaped strings.Builder
	for i := 0; i < len(text); i += 76 {
		lines.WriteString(text[i:min(i+76, len(text))] + "\r\n")
		escaped.WriteString(text[i:min(i+76, len(text))] + `\r\n`)
	}
	var unicode strings.Builder
	for i := range len(text) {
		fmt.Fprintf(&unicode, `\u%04X`, text[i])
	}
	unpadded := base64.StdEncoding.EncodeToString([]byte(body + "\x00"))
	tests := []struct {
		name      string
		body      string
		signature string
		signed    string
	}{
		{"plain", `{"signature":"sha256=ab","tar":"` + text + `"}`, "sha256=ab", body},
		{"tar first", `{"tar":"` + text + `","signature":"sha256=ab"}`, "sha256=ab", body},
		{"white space", "{ \n\t\"signature\" : \"sha256=ab\"\r\n, \"tar\" : \"" + text + "\" } \n", "sha256=ab", body},
		{"no signature", `{"tar":"` + text + `"}`, "", body},
		{"unknown keys", `{"a":1,"b":[1,-2.5e+3,{"tar":"x","tar":[[]]},[],{}],"tar":"` + text + `","c":null,"d":true,"e":"x\"\\\u0000\ud83d\ude00","signature":"s"}`, "s", body},
		{"escaped", `{"signat\u0075re":"sha256\u003dab\/\"\\\b\f\n\r\t","t\u0061r":"` + strings.ReplaceAll(text, "/", `\/`) + `"}`, "sha256=ab/\"\\\b\f\n\r\t", body},
		{"all escaped", `{"tar":"` + unicode.String() + `"}`, "", body},
		{"lines", `{"tar":"` + lines.String() + `"}`, "", body},
		{"escaped lines", `{"tar":"` + escaped.String() + `"}`, "", body},
		{"padded", `{"tar":"` + unpadded + `"}`, "", body + "\x00"},
		{"no padding", `{"tar":"` + strings.TrimRight(unpadded, "=") + `"}`, "", body + "\x00"},
		{"padding in lines", `{"tar":"` + strings.ReplaceAll(unpadded, "=", "\n=\n") + `"}`, "", body + "\x00"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			opts := testOptions(t)
			_, signed, err := receive(t, tt.body, opts)
			if err != nil {
				t.Fatal(err)
			}
			if signed != tt.signed {
				t.Errorf("signed are %d bytes, want %d", len(signed), len(tt.signed))
			}
			s, err := payload.Receive(strings.NewReader(tt.body), &bytes.Buffer{}, opts)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if got, ok := s.Signature(); got != tt.signature || !ok {
				t.Errorf("signature %q, %v; want %q", got, ok, tt.signature)
			}
		})
	}
}

func TestBadEnvelope(t *testing.T) {
	text := base64.StdEncoding.EncodeToString([]byte(archive()))
	tests := []struct{ name, body, says string }{
		{"only a brace", `{`, "cut short"},
		{"empty", `{}`, `no key "tar"`},
		{"no tar", `{"signature":"sha256=ab"}`, `no key "tar"`},
		{"tar of another case", `{"Tar":"` + text + `"}`, `no key "tar"`},
		{"tar twice", `{"tar":"` + text + `","tar":"` + text + `"}`, `"tar" is there twice`},
		{"tar twice, once escaped", `{"tar":"` + text + `","\u0074ar":"` + text + `"}`, `"tar" is there twice`},
		{"signature twice", `{"signature":"a","signature":"b","tar":"` + text + `"}`, `"signature" is there twice`},
		{"unknown key twice", `{"a":1,"a":1,"tar":"` + text + `"}`, `"a" is there twice`},
		{"many keys", `{` + manyMembers(100) + `"tar":"` + text + `"}`, "more than 64 keys"},
		{"tar is no string", `{"tar":["` + text + `"]}`, `"tar": '[' where a string should begin`},
		{"tar is null", `{"tar":null}`, `"tar"`},
		{"signature is no string", `{"signature":1,"tar":"` + text + `"}`, `"signature"`},
		{"signature is huge", `{"signature":"` + strings.Repeat("a", 2000) + `","tar":"` + text + `"}`, "over 1024 bytes"},
		{"not base64", `{"tar":"a*b="}`, "not base64"},
		{"base64 for URLs", `{"tar":"_-__"}`, "not base64"},
		{"a space in base64", `{"tar":"AA AA"}`, "not base64"},
		{"a tab in base64", "{\"tar\":\"AA\tAA\"}", `'\t' in a string`},
		{"base64 cut to 1 character", `{"tar":"` + text[:5] + `"}`, "not base64"},
		{"padding too long", `{"tar":"AAAA===="}`, "padding"},
		{"padding of a whole", `{"tar":"AAAA="}`, "padding"},
		{"padding too short", `{"tar":"AA="}`, "padding"},
		{"padding in the middle", `{"tar":"AA==AAAA"}`, "after its padding"},
		{"only padding", `{"tar":"="}`, "padding"},
		{"text after it", `{"tar":"` + text + `"} x`, "something else follows"},
		{"another after it", `{"tar":"` + text + `"}{}`, "something else follows"},
		{"zeros after it", `{"tar":"` + text + `"}` + "\x00", "something else follows"},
		{"cut in tar", `{"tar":"` + text[:100], "cut short"},
		{"cut after tar", `{"tar":"` + text + `"`, "cut short"},
		{"cut in an escape", `{"tar":"AAAA\u00`, "cut short"},
		{"comma at the end", `{"tar":"` + text + `",}`, "where a string should begin"},
		{"no comma", `{"tar":"` + text + `" "a":1}`, "where ',' or '}' should be"},
		{"no colon", `{"tar" "` + text + `"}`, "where ':' should be"},
		{"key without quotes", `{tar:"` + text + `"}`, "where a string should begin"},
		{"single quotes", `{'tar':'` + text + `'}`, "where a string should begin"},
		{"a bad escape", `{"tar":"\x41AAA"}`, "after a backslash"},
		{"a bad code point", `{"tar":"\u00g1AAA"}`, `after \u`},
		{"a control character in a key", "{\"a\nb\":1,\"tar\":\"" + text + `"}`, "in a string"},
		{"a number that is none", `{"a":01,"tar":"` + text + `"}`, "no JSON value"},
		{"a word that is none", `{"a":nil,"tar":"` + text + `"}`, "no JSON value"},
		{"no value", `{"a":,"tar":"` + text + `"}`, "no JSON value"},
		{"a long number", `{"a":` + strings.Repeat("1", 2000) + `,"tar":"` + text + `"}`, "over 1024 bytes"},
		{"a comma at the end of an array", `{"a":[1,],"tar":"` + text + `"}`, "no JSON value"},
		{"no comma in an array", `{"a":[1 2],"tar":"` + text + `"}`, "where ',' or ']' should be"},
		{"nested deep", `{"a":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `,"tar":"` + text + `"}`, "nested"},
		{"objects nested deep", `{"a":` + strings.Repeat(`{"a":`, 100), "nested"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := receive(t, tt.body, testOptions(t))
			if code(err) != api.BadEnvelope || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%s %v; want %s, %q", code(err), err, api.BadEnvelope, tt.says)
			}
		})
	}
	// Envelopes are not nested: an envelope holds a tar.
	if _, _, err := receive(t, enveloped(enveloped(archive())), testOptions(t)); code(err) != api.BadTar {
		t.Errorf("an envelope in an envelope: %v", err)
	}
}

func manyMembers(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `"k%d":0,`, i)
	}
	return b.String()
}
