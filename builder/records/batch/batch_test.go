package batch_test

import (
	"slices"
	"strings"
	"testing"

	"handler/function/records/batch"
)

func TestBatch(t *testing.T) {
	b := batch.New(17)
	lines := []string{"l: one", "", "l: " + strings.Repeat("ü", 300)}
	for _, line := range lines {
		if !b.Fits(line) {
			t.Fatalf("no room for %.10q", line)
		}
		b.Add(line)
	}
	if b.Next() != 20 {
		t.Errorf("the next line has number %d, want 20", b.Next())
	}
	if b.Fits(strings.Repeat("x", batch.Size)) {
		t.Error("a line as long as a batch fits beside others")
	}
	got, err := batch.Parse(b.AppendTo(nil))
	if err != nil {
		t.Fatal(err)
	}
	n, texts := uint64(17), []string(nil)
	for at, text := range got.All() {
		if at != n {
			t.Errorf("line %d has number %d", n, at)
		}
		n, texts = n+1, append(texts, text)
	}
	if !slices.Equal(texts, lines) || got.Count != 3 {
		t.Errorf("%d lines %q, want %q", got.Count, texts, lines)
	}
}

// FuzzParse holds that what is read is written again as it was, and that an error comes alone.
func FuzzParse(f *testing.F) {
	b := batch.New(3)
	b.Add("a line")
	b.Add("")
	f.Add(b.AppendTo(nil))
	f.Add([]byte{1, 200, 1})
	f.Add([]byte{0})
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := batch.Parse(data)
		if err != nil {
			if b != nil {
				t.Error("a batch beside an error")
			}
			return
		}
		again := batch.New(b.First)
		for n, line := range b.All() {
			if n != again.Next() {
				t.Fatalf("line %d where %d comes next", n, again.Next())
			}
			again.Add(line)
		}
		if again.Count != b.Count {
			t.Errorf("%d lines, and %d when they are read", b.Count, again.Count)
		}
		if back, err := batch.Parse(again.AppendTo(nil)); err != nil || back.Count != b.Count {
			t.Errorf("what was written again is not read: %v", err)
		}
	})
}
