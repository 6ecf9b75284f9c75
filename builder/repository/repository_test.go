package repository_test

import (
	"testing"

	"handler/function/repository"
)

func TestParsePrefix(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"ghcr.io/acme", "ghcr.io/acme"},
		{"ghcr.io/acme/", "ghcr.io/acme"},
		{"ghcr.io", "ghcr.io"},
		{"localhost", "localhost"},
		{"registry:5000", "registry:5000"},
		{"acme", "docker.io/acme"},
		{"acme/app", "docker.io/acme/app"},
		{"docker.io/alpine", "docker.io/library/alpine"},
	} {
		if got, err := repository.ParsePrefix(tt.text); got != tt.want || err != nil {
			t.Errorf("%q: got %q, %v, want %q", tt.text, got, err, tt.want)
		}
	}
	for _, text := range []string{"", "/", "ghcr.io/Acme", "ghcr.io/acme:1", "ghcr.io/a@sha256:00", "host:0", "host:99999/x", "a b", "*"} {
		if got, err := repository.ParsePrefix(text); err == nil {
			t.Errorf("%q: got %q, want an error", text, got)
		}
	}
}

// TestWithin compares names that are written in several ways. sure is the result of Within,
// and possible that of MayBeWithin.
func TestWithin(t *testing.T) {
	for _, tt := range []struct {
		name, prefix   string
		sure, possible bool
	}{
		{"ghcr.io/acme/app", "ghcr.io/acme", true, true},
		{"ghcr.io/acme", "ghcr.io/acme", true, true},
		{"ghcr.io/acme2", "ghcr.io/acme", false, false},
		{"ghcr.io/ac", "ghcr.io/acme", false, false},
		{"ghcr.io/acme/app", "ghcr.io", true, true},
		{"GHCR.io/acme", "ghcr.io/acme", true, true},
		{"ghcr.io:443/acme", "ghcr.io/acme", true, true},
		{"ghcr.io/acme", "ghcr.io:443/acme", true, true},
		{"ghcr.io./acme", "ghcr.io/acme", true, true},
		{"ghcr.io:80/acme", "ghcr.io/acme", false, true},
		{"ghcr.io:5000/acme", "ghcr.io/acme", false, false},
		{"index.docker.io/library/alpine", "docker.io/library/alpine", true, true},
		{"registry-1.docker.io:443/acme/app", "docker.io/acme", true, true},
	} {
		if got := repository.Within(tt.name, tt.prefix); got != tt.sure {
			t.Errorf("Within(%q, %q) is %v", tt.name, tt.prefix, got)
		}
		if got := repository.MayBeWithin(tt.name, tt.prefix); got != tt.possible {
			t.Errorf("MayBeWithin(%q, %q) is %v", tt.name, tt.prefix, got)
		}
	}
}

func TestMatch(t *testing.T) {
	for _, tt := range []struct {
		name, pattern string
		want          bool
	}{
		{"docker.io/library/alpine", "docker.io/library/*", true},
		{"docker.io/library/a/b", "docker.io/library/*", true},
		{"docker.io/acme/alpine", "docker.io/library/*", false},
		{"docker.io/library", "docker.io/library/*", false},
		{"index.docker.io/library/alpine", "docker.io/library/*", true},
		{"ghcr.io:443/acme/app", "ghcr.io/acme/app", true},
		{"ghcr.io:80/acme/app", "ghcr.io/acme/app", false},
		{"ghcr.io/acme/app", "ghcr.io/acme", false},
		{"ghcr.io/acme/app", "*", true},
		{"ghcr.io/acme/app", "*/app", true},
		{"ghcr.io/acme/apps", "*/app", false},
		{"ghcr.io/acme/app-dev/x", "ghcr.io/*-dev*", true},
		{"ghcr.io/x/a-x", "ghcr.io/x*x", true},
		{"ghcr.io/x", "ghcr.io/x*x", false},
		{"evil.com/ghcr.io/acme/app", "ghcr.io/acme/*", false},
	} {
		if got := repository.Match(tt.name, tt.pattern); got != tt.want {
			t.Errorf("Match(%q, %q) is %v", tt.name, tt.pattern, got)
		}
	}
}
