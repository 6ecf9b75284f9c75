package sealed_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/seal"
	"gopkg.in/yaml.v3"

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
	got, err := sealed.Open(t.Context(), append(private, '\n'), envelope(t, public, want))
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

// TestForms opens envelopes that people have edited or other versions of go-sdk have made.
func TestForms(t *testing.T) {
	public, private := keyPair(t)
	// Those that YAML has to put in quotes, and one as long as may be.
	want := map[string][]byte{
		"true": []byte("a"), "1e3": []byte("b"), "0x1F": []byte("c"), "null": []byte("d"), "2026-01-01": []byte("e"),
		strings.Repeat("l", 128): []byte("f"), "big": make([]byte, sealed.MaxValue), "_": nil,
	}
	plain := string(envelope(t, public, want))
	for name, text := range map[string]string{
		"as it is":        plain,
		"by two spaces":   strings.ReplaceAll(plain, "\n    ", "\n  "),
		"CRLF":            strings.ReplaceAll(plain, "\n", "\r\n"),
		"no last newline": strings.TrimSuffix(plain, "\n"),
		"comments":        "# one\n\n" + strings.ReplaceAll(plain, "secrets:\n", "secrets:\n  # two\n\n"),
		"quoted":          strings.Replace(plain, "version: v1", `version: "v1"`, 1),
		"secrets first":   plain[strings.Index(plain, "secrets:"):] + plain[:strings.Index(plain, "secrets:")],
		"a later key":     plain + "created: 2026-11-29T04:00:00Z\n",
		"a later text":    "comment: 'sealed by hand, in a hurry'\n" + plain,
	} {
		got, err := sealed.Open(t.Context(), private, []byte(text))
		if err != nil || !maps.EqualFunc(got, want, bytes.Equal) {
			t.Errorf("%s: %d secrets, %v", name, len(got), err)
		}
	}
	if got, err := sealed.Open(t.Context(), private, envelope(t, public, nil)); err != nil || len(got) != 0 {
		t.Errorf("without a secret: %v, %v", got, err)
	}
}

// TestCost bounds what envelopes of up to 2 MiB allocate and how long they take: those of the
// right form allocate at most 32 MiB, others 4 MiB.
func TestCost(t *testing.T) {
	const size = 2 << 20
	public, private := keyPair(t)
	_, other := keyPair(t)
	values := map[string][]byte{"a": make([]byte, sealed.MaxValue), "b": make([]byte, sealed.MaxValue), "c": make([]byte, sealed.MaxValue)}
	good := envelope(t, public, values)
	head := string(good[:bytes.Index(good, []byte("secrets:"))])
	fill := func(unit string) string { return strings.Repeat(unit, (size-len(head)-64)/len(unit)) }
	keys := func(format string) string {
		var b strings.Builder
		for i := 0; b.Len() < size-len(head)-64; i++ {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	for _, tt := range []struct {
		name, text string
		private    []byte
		formed     bool
	}{
		{"the largest", string(good), private, true},
		{"another key", string(good), other, true},
		{"nested lists", head + "x: " + fill("["), private, false},
		{"lists side by side", head + "x: [" + fill("[],") + "]", private, false},
		{"a block of items", head + fill("-\n"), private, false},
		{"nested items", head + fill("- "), private, false},
		{"keys", head + keys("%x:\n"), private, false},
		{"secrets", head + "secrets:\n" + keys(" %x:\n"), private, false},
		{"secrets of one byte", head + "secrets:\n" + keys(" %x: a\n"), private, false},
		{"items of a secret", head + "secrets:\n  a:\n" + fill("  -\n"), private, false},
		{"anchors", head + "x: [" + fill("&a a,") + "]", private, false},
		{"one long text", head + "x: " + fill("a "), private, false},
		{"one long secret", head + "secrets:\n  a: " + fill("a "), private, false},
		{"one long key", head + fill("a ") + ": x", private, false},
		{"a text of many lines", head + "x:\n" + fill(" a\n"), private, false},
		{"one long comment", head + "# " + fill("a "), private, false},
		{"one long empty line", head + fill(" "), private, false},
		{"comments", head + fill("#\n"), private, false},
		{"empty lines", head + fill("\n"), private, false},
		{"UTF-16", "\xff\xfe" + fill("[\x00"), private, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if len(tt.text) > size {
				t.Fatalf("%d bytes", len(tt.text))
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			start := cpuTime(t)
			_, err := sealed.Open(t.Context(), tt.private, []byte(tt.text))
			took := cpuTime(t) - start
			runtime.ReadMemStats(&after)
			// The text's copy, which the test makes, is in it.
			limit := uint64(4 << 20)
			if tt.formed {
				limit = 32 << 20
			} else if took > 30*time.Second {
				t.Errorf("took %s", took)
			}
			if got := after.TotalAlloc - before.TotalAlloc; got > limit {
				t.Errorf("%d KiB allocated", got>>10)
			}
			if opens := tt.formed && bytes.Equal(tt.private, private); (err == nil) != opens {
				t.Errorf("error %v", err)
			}
		})
	}
}

// cpuTime returns the processor time that this process has used. Unlike the clock, it is the
// same on a busy machine.
func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		t.Fatal(err)
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// TestTurn checks that an envelope waits while another one is opened, until its turn comes or
// its context ends.
func TestTurn(t *testing.T) {
	public, private := keyPair(t)
	good := envelope(t, public, map[string][]byte{"token": []byte("value")})
	release := sealed.Hold()
	ctx, cancel := context.WithCancelCause(t.Context())
	canceled, opened := make(chan error, 1), make(chan error, 1)
	for ctx, done := range map[context.Context]chan error{ctx: canceled, t.Context(): opened} {
		go func() {
			_, err := sealed.Open(ctx, private, good)
			done <- err
		}()
	}
	gone := errors.New("gone")
	time.AfterFunc(100*time.Millisecond, func() { cancel(gone) })
	if err := <-canceled; err != gone {
		t.Errorf("canceled: %v", err)
	}
	if len(opened) > 0 {
		t.Error("opened beside another one")
	}
	release()
	if err := <-opened; err != nil {
		t.Error(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	public, private := keyPair(t)
	_, other := keyPair(t)
	good := envelope(t, public, map[string][]byte{"token": []byte("value")})
	plus := func(more string) []byte { return slices.Concat(good, []byte(more)) }
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
		{"an id longer than a simple key", private, envelope(t, public, map[string][]byte{strings.Repeat("a", 129): nil})},
		{"a secret twice", private, plus(string(good[bytes.LastIndex(good, []byte("    ")):]))},
		{"an escape", private, bytes.Replace(good, []byte("v1"), []byte(`"v\x31"`), 1)},
		{"a nested key", private, plus("x:\n    y: z\n")},
		{"a list", private, plus("x: [y]\n")},
		{"a line break of Unicode", private, slices.Concat([]byte("# \u0085x: [y]\n"), good)},
		{"a carriage return", private, slices.Concat([]byte("# \rx: [y]\n"), good)},
		{"an anchor", private, plus("x: &y z\n")},
		{"aliases without end", private, []byte("a: &a [x,x,x,x,x,x,x,x,x,x]\n" + bomb())},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := sealed.Open(t.Context(), tt.private, tt.envelope)
			if e, ok := errors.AsType[*api.Error](err); !ok || e.Code != api.BadSecrets {
				t.Errorf("error %v, want bad_secrets", err)
			}
			if got != nil {
				t.Error("secrets beside an error")
			}
		})
	}
}

// bomb returns nine levels of ten aliases each, which YAML would make 10⁹ of.
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

// TestDerive: each id and each name has a key of its own, which is the same each time, opens
// what was sealed to its public half, and nothing else.
func TestDerive(t *testing.T) {
	_, private := keyPair(t)
	_, other := keyPair(t)
	derive := func(f func([]byte, string) ([]byte, error), private []byte, text string) []byte {
		t.Helper()
		key, err := f(private, text)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	keys := [][]byte{
		private, derive(sealed.Derive, private, "t-1"), derive(sealed.Derive, private, "t-2"),
		derive(sealed.Decoy, private, "t-1"), derive(sealed.Decoy, private, "t-2"), derive(sealed.Derive, other, "t-1"),
	}
	if again := derive(sealed.Derive, append(private, '\n'), "t-1"); !bytes.Equal(again, keys[1]) {
		t.Error("a key changes")
	}
	for i, sealer := range keys {
		public, err := sealed.Public(sealer)
		if err != nil {
			t.Fatal(err)
		}
		text := envelope(t, []byte(public.PublicKey), map[string][]byte{"token": []byte("value")})
		for j, opener := range keys {
			if values, err := sealed.Open(t.Context(), opener, text); (err == nil) != (i == j) || err == nil && string(values["token"]) != "value" {
				t.Errorf("sealed to %d, opened with %d: %v", i, j, err)
			}
		}
	}
	if key, err := sealed.Derive([]byte("short"), "t-1"); err == nil || key != nil {
		t.Errorf("of what is no key: %q, %v", key, err)
	}
}

// FuzzForm has YAML read what checkForm accepts. It must be one mapping of scalars, with at
// most one other mapping in it.
func FuzzForm(f *testing.F) {
	public, _ := keyPair(f)
	f.Add(envelope(f, public, map[string][]byte{"token": []byte("value"), "1": nil}))
	f.Add([]byte("a: b\nsecrets: {}\n\"c\": 'd'\n# e\n"))
	f.Add([]byte(bomb()))
	f.Fuzz(func(t *testing.T, data []byte) {
		if sealed.CheckForm(data) != nil {
			return
		}
		var root yaml.Node
		if yaml.Unmarshal(data, &root) != nil || root.Kind == 0 {
			return
		}
		mappings := 0
		var look func(n *yaml.Node, depth int)
		look = func(n *yaml.Node, depth int) {
			switch {
			case n.Anchor != "" || n.Alias != nil || depth > 2:
				t.Errorf("%q has an anchor, an alias or depth %d", data, depth)
			case n.Kind == yaml.MappingNode:
				mappings++
			case n.Kind != yaml.ScalarNode:
				t.Errorf("%q has a node of kind %d", data, n.Kind)
			}
			for _, child := range n.Content {
				look(child, depth+1)
			}
		}
		look(root.Content[0], 0)
		if mappings > 2 {
			t.Errorf("%q has %d mappings", data, mappings)
		}
	})
}

func FuzzOpen(f *testing.F) {
	public, private := keyPair(f)
	f.Add(envelope(f, public, map[string][]byte{"token": []byte("value")}))
	f.Add([]byte("version: v1\nalgorithm: nacl/box\npublic_key: \"\"\nsecrets: {}\n"))
	f.Add([]byte(bomb()))
	f.Fuzz(func(t *testing.T, data []byte) {
		values, err := sealed.Open(t.Context(), private, data)
		if err != nil && values != nil {
			t.Error("secrets beside an error")
		}
	})
}
