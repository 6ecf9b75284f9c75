package payload

import (
	"maps"
	"slices"
	"testing"
)

// exampleContext has a file for each time, with a content of its own.
func exampleContext(times map[string]int64) *Context {
	c := &Context{sums: []contentSum{}}
	for i, path := range slices.Sorted(maps.Keys(times)) {
		c.entries = append(c.entries, Entry{Path: path, ModTime: times[path], inode: int32(i)})
		c.sums = append(c.sums, contentSum{path[0]})
	}
	return c
}

func (c *Context) times() map[string]int64 {
	times := make(map[string]int64)
	for _, e := range c.entries {
		times[e.Path] = e.ModTime
	}
	return times
}

// TestExampleTimes has the numbers of SetTimes' comment.
func TestExampleTimes(t *testing.T) {
	sent := map[string]int64{"a": 4, "b": 4, "c": 5, "d": 12}
	c := exampleContext(sent)
	checkSlots(t, c, map[int64][2]int64{
		4:  {0, 250_000_000},
		5:  {250_000_000, 500_000_000},
		12: {500_000_000, 1_000_000_000},
	})
	want := map[string]int64{"a": 189_007_645, "b": 189_007_645, "c": 431_258_557, "d": 838_916_568}
	c.SetTimes([32]byte{})
	if got := c.times(); !maps.Equal(got, want) {
		t.Errorf("the new times are %v, want %v", got, want)
	}

	c = exampleContext(sent)
	c.sums[1][0]++
	c.SetTimes([32]byte{})
	if got := c.times(); got["a"] == want["a"] || got["b"] != got["a"] || got["c"] != want["c"] || got["d"] != want["d"] {
		t.Errorf("the new times are %v after a change of b", got)
	}

	delete(sent, "c")
	c = exampleContext(sent)
	checkSlots(t, c, map[int64][2]int64{4: {0, 500_000_000}, 12: {500_000_000, 1_000_000_000}})
	c.SetTimes([32]byte{})
	if got := c.times(); got["a"] == want["a"] || got["d"] != want["d"] {
		t.Errorf("the new times are %v without c", got)
	}
}

// TestExampleOfLeastWidth has the numbers of the comments of leastWidth and appendGroups.
func TestExampleOfLeastWidth(t *testing.T) {
	for n, want := range map[int]int64{3: 15_625_000, 4: 15_625_000, 9: 3_906_250, 10: 3_906_250, 16: 3_906_250, 257: 122_070, 512: 122_070} {
		if got := leastWidth(n); got != want {
			t.Errorf("%d files: %d ns, want %d", n, got, want)
		}
	}
	times := make(map[string]int64)
	for i := range 10 {
		times[string(rune('a'+i))] = 1 << i
	}
	checkSlots(t, exampleContext(times), map[int64][2]int64{
		1:   {0, 3_906_250},
		2:   {3_906_250, 7_812_500},
		4:   {7_812_500, 11_718_750},
		8:   {11_718_750, 15_625_000},
		16:  {15_625_000, 31_250_000},
		32:  {31_250_000, 62_500_000},
		64:  {62_500_000, 125_000_000},
		128: {125_000_000, 250_000_000},
		256: {250_000_000, 500_000_000},
		512: {500_000_000, 1_000_000_000},
	})
}

// checkSlots wants the groups of a context to be those of want's times, with its slots.
func checkSlots(t *testing.T, c *Context, want map[int64][2]int64) {
	t.Helper()
	got := make(map[int64][2]int64)
	for _, g := range groupsOf(c.entries) {
		got[g.files[0].time] = [2]int64{g.from, g.to}
	}
	if !maps.Equal(got, want) {
		t.Errorf("the slots are %v, want %v", got, want)
	}
}
