package jetstream

import (
	"bytes"
	"strings"
	"testing"
)

func mustRing(t *testing.T, roots ...string) *ring {
	t.Helper()
	var list [][]byte
	for _, r := range roots {
		list = append(list, []byte(r))
	}
	r, err := newRing(list, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestSeal opens payloads where they belong, and nowhere else.
func TestSeal(t *testing.T) {
	r := mustRing(t, "one root", "another root")
	k, other := r.keys[0], r.keys[1]
	p := place{k, k.tenant("acme"), k.call("id"), 1}
	text := []byte("what nobody else reads")
	subject := p.record(ended)
	sealed := seal(k.records, subject, text)
	if bytes.Contains(sealed, text[:8]) {
		t.Error("the text can be read")
	}
	if plain, err := open(k.records, subject, sealed); err != nil || !bytes.Equal(plain, text) {
		t.Errorf("where it belongs it opens as %q, %v", plain, err)
	}
	q := p
	q.attempt = 2
	for what, opened := range map[string]func() ([]byte, error){
		"another kind":    func() ([]byte, error) { return open(k.records, p.record(lost), sealed) },
		"another attempt": func() ([]byte, error) { return open(k.records, q.record(ended), sealed) },
		"another purpose": func() ([]byte, error) { return open(k.control, subject, sealed) },
		"another root":    func() ([]byte, error) { return open(other.records, subject, sealed) },
		"a log":           func() ([]byte, error) { return open(k.logAEAD(p.log()), subject, sealed) },
		"a changed byte": func() ([]byte, error) {
			return open(k.records, subject, append(bytes.Clone(sealed[:len(sealed)-1]), sealed[len(sealed)-1]^1))
		},
		"a cut":   func() ([]byte, error) { return open(k.records, subject, sealed[:len(sealed)-1]) },
		"nothing": func() ([]byte, error) { return open(k.records, subject, nil) },
	} {
		if plain, err := opened(); err == nil {
			t.Errorf("%s opens it as %q", what, plain)
		}
	}
	if bytes.Equal(sealed, seal(k.records, subject, text)) {
		t.Error("the same text is sealed the same way twice")
	}
}

// TestRing keeps the key of a root, and none twice.
func TestRing(t *testing.T) {
	r, after := mustRing(t, "old"), mustRing(t, "new", "old", "new")
	if len(after.keys) != 2 || after.keys[0].id == r.keys[0].id || after.byID[r.keys[0].id] == nil {
		t.Fatalf("%d keys", len(after.keys))
	}
	p := place{r.keys[0], r.keys[0].tenant("acme"), r.keys[0].call("id"), 3}
	got, kind, ok := after.parse(p.record(lost))
	if !ok || kind != lost || got.base() != p.base() {
		t.Errorf("an old record is at %q, %s, %v", got.base(), kind, ok)
	}
	if plain, err := open(got.key.records, p.record(lost), seal(p.key.records, p.record(lost), []byte("x"))); err != nil || string(plain) != "x" {
		t.Errorf("an old record opens as %q, %v", plain, err)
	}
	if again, err := newRing([][]byte{[]byte("newer"), []byte("old")}, r); err != nil || again.keys[1] != r.keys[0] {
		t.Errorf("a line that stays has another key, %v", err)
	}
	if _, err := newRing(nil, nil); err == nil {
		t.Error("a ring without a root is no error")
	}
	for _, subject := range []string{
		"", "builder.rec", p.base(), p.record("x"), p.record(ended) + ".x", p.log(),
		strings.Replace(p.record(ended), ".3.", ".0.", 1), strings.Replace(p.record(ended), ".3.", ".x.", 1),
		strings.Replace(p.record(ended), p.key.id, "0000", 1), p.key.once("x"),
	} {
		if got, _, ok := after.parse(subject); ok {
			t.Errorf("%q is the place %q", subject, got.base())
		}
	}
}

// TestNames has names that differ in what they name, and are safe in subjects.
func TestNames(t *testing.T) {
	k, other := mustRing(t, "one").keys[0], mustRing(t, "other").keys[0]
	seen := make(map[string]bool)
	for _, name := range []string{
		k.tenant("a"), k.tenant("b"), k.tenant(""), k.call("a"), k.call("b"), k.call("a.b"), k.call("*"), other.tenant("a"), other.call("a"),
	} {
		if seen[name] || strings.ContainsAny(name, ".*> \n") || len(name) < 20 {
			t.Errorf("%q comes twice, or is no token", name)
		}
		seen[name] = true
	}
}
