package sealed_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/openfaas/go-sdk/seal"

	"handler/function/api"
	"handler/function/sealed"
)

func keyPair(t testing.TB) (public, private []byte) {
	public, private, err := seal.GenerateKeyPair()
	if err != nil {
		t.Fatal(err)
	}
	return public, private
}

func envelope(t testing.TB, public []byte, values map[string][]byte) []byte {
	data, err := seal.Seal(public, values)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestOpen(t *testing.T) {
	public, private := keyPair(t)
	want := map[string][]byte{"token": []byte("s3cret"), "pip.conf": {}, "BIN": {0, 1, 255}}
	got, err := sealed.Open(append(private, '\n'), envelope(t, public, want))
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(want) {
		t.Errorf("got %d secrets, want %d", len(got), len(want))
	}
	for id := range want {
		if !bytes.Equal(got[id], want[id]) {
			t.Errorf("%s: got %q, want %q", id, got[id], want[id])
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	public, private := keyPair(t)
	_, other := keyPair(t)
	good := envelope(t, public, map[string][]byte{"token": []byte("value")})
	many := make(map[string][]byte)
	for i := range sealed.MaxSecrets + 1 {
		many[fmt.Sprint("s", i)] = nil
	}
	for _, tt := range []struct {
		name     string
		private  []byte
		envelope []byte
	}{
		{"another key", other, good},
		{"empty", private, nil},
		{"not YAML", private, []byte("\x00")},
		{"another version", private, bytes.Replace(good, []byte("v1"), []byte("v2"), 1)},
		{"another algorithm", private, bytes.Replace(good, []byte("nacl/box"), []byte("none"), 1)},
		{"cut", private, good[:len(good)-8]},
		{"a path as an id", private, envelope(t, public, map[string][]byte{"../../etc/passwd": nil})},
		{"a newline in an id", private, envelope(t, public, map[string][]byte{"a\nb": nil})},
		{"an empty id", private, envelope(t, public, map[string][]byte{"": nil})},
		{"too many", private, envelope(t, public, many)},
		{"too large", private, envelope(t, public, map[string][]byte{"big": make([]byte, sealed.MaxValue+1)})},
		{"aliases without end", private, []byte("a: &a [x,x,x,x,x,x,x,x,x,x]\n" + bomb())},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := sealed.Open(tt.private, tt.envelope)
			if e, ok := errors.AsType[*api.Error](err); !ok || e.Code != api.BadSecrets {
				t.Errorf("error %v, want bad_secrets", err)
			}
			if got != nil {
				t.Error("secrets beside an error")
			}
		})
	}
}

// bomb is nine levels of ten aliases each.
func bomb() string {
	var b strings.Builder
	for c := 'b'; c < 'k'; c++ {
		fmt.Fprintf(&b, "%c: &%c [%s]\n", c, c, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*%c,", c-1), 10), ","))
	}
	return b.String()
}

func TestPublic(t *testing.T) {
	public, private := keyPair(t)
	got, err := sealed.Public(append(private, '\n'))
	if err != nil {
		t.Fatal(err)
	}
	id, err := seal.DeriveKeyID(public)
	if err != nil {
		t.Fatal(err)
	}
	if want := (sealed.PublicKey{KeyID: id, Algorithm: "nacl/box", PublicKey: string(public)}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for _, bad := range []string{"", "x", "AAAA"} {
		if got, err := sealed.Public([]byte(bad)); err == nil || got != (sealed.PublicKey{}) {
			t.Errorf("%q: got %+v, %v", bad, got, err)
		}
	}
}

func FuzzOpen(f *testing.F) {
	public, private := keyPair(f)
	f.Add(envelope(f, public, map[string][]byte{"token": []byte("value")}))
	f.Add([]byte("version: v1\nalgorithm: nacl/box\npublic_key: \"\"\nsecrets: {}\n"))
	f.Add([]byte(bomb()))
	f.Fuzz(func(t *testing.T, data []byte) {
		values, err := sealed.Open(private, data)
		if err != nil && values != nil {
			t.Error("secrets beside an error")
		}
	})
}
