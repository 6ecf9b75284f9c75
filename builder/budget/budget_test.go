package budget

import (
	"sync"
	"testing"
)

func TestAccount(t *testing.T) {
	whole := New(100)
	part := whole.Part(60)
	a, b, c := part.Open(), whole.Open(), part.Open()
	for _, step := range []struct {
		name        string
		do          func() bool
		want        bool
		part, whole int64 // used after it
	}{
		{"within both", func() bool { return a.Take(50) }, true, 50, 50},
		{"over the part", func() bool { return a.Take(11) }, false, 50, 50},
		{"the rest of the whole", func() bool { return b.Take(50) }, true, 50, 100},
		{"over the whole", func() bool { return a.Take(1) }, false, 50, 100},
		{"to the whole, which has it already", func() bool { return a.Move(whole) }, true, 0, 100},
		{"by force", func() bool { c.Must(30); return true }, true, 30, 130},
		{"after force", func() bool { return c.Take(1) }, false, 30, 130},
		{"some given back", func() bool { a.Give(40); return true }, true, 30, 90},
		{"to another without room", func() bool { return b.Move(New(49)) }, false, 30, 90},
		{"to no budget", func() bool { return b.Move(nil) }, true, 30, 40},
		{"without end", func() bool { return b.Take(1 << 40) }, true, 30, 40},
		{"closed", func() bool { a.Close(); c.Close(); return true }, true, 0, 0},
		{"closed again", func() bool { a.Close(); b.Close(); return true }, true, 0, 0},
	} {
		if got := step.do(); got != step.want {
			t.Errorf("%s: %v, want %v", step.name, got, step.want)
		}
		if part.Used() != step.part || whole.Used() != step.whole {
			t.Errorf("%s: %d of the part and %d of the whole are used, want %d and %d", step.name, part.Used(), whole.Used(), step.part, step.whole)
		}
	}
}

// TestMoveBetweenParts moves what takes most of a Budget from one part of it to another.
func TestMoveBetweenParts(t *testing.T) {
	whole := New(100)
	one := whole.Part(90)
	other, small := whole.Part(90).Part(80), whole.Part(79)
	a := one.Open()
	if a.Take(80); !a.Move(other) || whole.Used() != 80 || one.Used() != 0 || other.Used() != 80 || other.whole.Used() != 80 {
		t.Errorf("%d, %d and %d are used", whole.Used(), one.Used(), other.Used())
	}
	if a.Move(small) || small.Used() != 0 || other.Used() != 80 || whole.Used() != 80 || other.Left() != 0 {
		t.Errorf("without room: %d, %d and %d are used", whole.Used(), small.Used(), other.Used())
	}
	if a.Close(); whole.Used() != 0 || other.Used() != 0 || other.whole.Used() != 0 {
		t.Errorf("closed: %d and %d are used", whole.Used(), other.Used())
	}
}

// TestConcurrent has many accounts take, move and give at once. They must never have more
// than the limit, and nothing in the end.
func TestConcurrent(t *testing.T) {
	whole := New(1000)
	part := whole.Part(500)
	var work sync.WaitGroup
	for i := range 8 {
		work.Go(func() {
			for range 1000 {
				a := part.Open()
				for range i + 1 {
					a.Take(40)
				}
				if part.Used() > 500 || whole.Used() > 1000 {
					t.Error("more is used than there is")
				}
				a.Move(whole)
				a.Take(40)
				a.Close()
			}
		})
	}
	work.Wait()
	if part.Used() != 0 || whole.Used() != 0 {
		t.Errorf("%d and %d bytes are still used", part.Used(), whole.Used())
	}
}
