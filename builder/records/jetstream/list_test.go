package jetstream

import (
	"slices"
	"testing"
)

// TestFilters: a scan asks for all records until it has seen that most are others', and from then on
// for its tenant's alone, of which all are its own.
func TestFilters(t *testing.T) {
	k, err := newKey([]byte("root"))
	if err != nil {
		t.Fatal(err)
	}
	sc := &scan{tenants: map[*key]string{k: k.tenant("acme")}}
	for i, step := range []struct {
		read, own int
		want      []string
	}{
		{0, 0, nil},
		{460, 230, nil},
		{460 + 1840, 240, []string{"builder.rec." + k.id + "." + k.tenant("acme") + ".*.*.*"}},
		{460 + 1840, 5000, []string{"builder.rec." + k.id + "." + k.tenant("acme") + ".*.*.*"}},
	} {
		sc.read, sc.own = step.read, step.own
		if got := sc.filters(); !slices.Equal(got, step.want) {
			t.Errorf("step %d asks for %q, want %q", i, got, step.want)
		}
	}
}
