package repository_test

import (
	"testing"

	"handler/function/repository"
)

// TestIndex compares an index of one prefix with the functions that compare with one prefix.
func TestIndex(t *testing.T) {
	names := []string{
		"ghcr.io/acme", "ghcr.io/acme/app", "ghcr.io/acme2", "ghcr.io", "GHCR.io:443/acme", "ghcr.io:80/acme/app", "ghcr.io.",
		"docker.io/acme", "index.docker.io/acme/app", "registry:5000/a/b/c", "registry:5000/a", "_/a",
	}
	for _, prefix := range names {
		var x repository.Index[string]
		x.Add(prefix, prefix)
		for _, name := range names {
			if got, ok := x.Within(name); ok != repository.Within(name, prefix) || ok && got != prefix {
				t.Errorf("%q within %q: %q %v", name, prefix, got, ok)
			}
			if got, ok := x.MayBeWithin(name); ok != repository.MayBeWithin(name, prefix) || ok && got != prefix {
				t.Errorf("%q may be within %q: %q %v", name, prefix, got, ok)
			}
		}
	}
	var x repository.Index[int]
	if _, ok := x.Within("ghcr.io/acme"); ok {
		t.Error("an empty index has a prefix")
	}
	for i, prefix := range []string{"ghcr.io", "ghcr.io/acme/app", "ghcr.io/acme"} {
		x.Add(prefix, i)
	}
	for name, want := range map[string]int{"ghcr.io/acme/app/debug": 1, "ghcr.io/acme/ap": 2, "ghcr.io/acme": 2, "ghcr.io/a": 0} {
		if got, ok := x.Within(name); !ok || got != want {
			t.Errorf("%q is within prefix %d, want %d", name, got, want)
		}
	}
}
