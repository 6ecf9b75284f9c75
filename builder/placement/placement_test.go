package placement

import (
	"fmt"
	"slices"
	"testing"
)

const keys = 3000

func nodes(n int) []string {
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf("tcp://buildkitd-%d:1234", i))
	}
	return list
}

func TestOrder(t *testing.T) {
	a, b := nodes(5), nodes(5)
	slices.Reverse(b)
	firsts := make(map[string]int)
	for i := range keys {
		key := fmt.Sprint("repository ", i)
		order := Order(key, a)
		if !slices.Equal(order, Order(key, b)) {
			t.Fatal("the order of the nodes counts")
		}
		if sorted := slices.Sorted(slices.Values(order)); !slices.Equal(sorted, a) {
			t.Fatalf("%q is not every node once", order)
		}
		firsts[order[0]]++
	}
	for node, n := range firsts {
		if n < keys/5*8/10 || n > keys/5*12/10 {
			t.Errorf("%s is first for %d keys of %d", node, n, keys)
		}
	}
	if got := Order("key", nil); len(got) != 0 {
		t.Errorf("of no nodes: %q", got)
	}
}

// TestNodeLeaves checks that the keys of the nodes that stay keep their node, and that the
// keys of the one that leaves are spread over the others.
func TestNodeLeaves(t *testing.T) {
	all := nodes(4)
	gone := all[2]
	rest := slices.Delete(slices.Clone(all), 2, 3)
	taken := make(map[string]int)
	for i := range keys {
		key := fmt.Sprint("repository ", i)
		before, after := Order(key, all), Order(key, rest)
		if before[0] != gone && after[0] != before[0] {
			t.Fatalf("%q moved from %s to %s", key, before[0], after[0])
		}
		if before[0] == gone {
			if after[0] != before[1] {
				t.Fatalf("%q went to %s, and %s is next in order", key, after[0], before[1])
			}
			taken[after[0]]++
		}
	}
	for _, node := range rest {
		if taken[node] < keys/4/3*7/10 {
			t.Errorf("%s took %d", node, taken[node])
		}
	}
}
