package repository_test

import (
	"testing"

	"handler/function/repository"
)

func TestParsePattern(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"*", "*"},
		{"*/acme/app", "*/acme/app"},
		{"*/*", "*/*"},
		{"docker.io/library/*", "docker.io/library/*"},
		{"index.docker.io/library/*", "docker.io/library/*"},
		{"docker.io/library/alpine", "docker.io/library/alpine"},
		{"GHCR.io./acme*", "ghcr.io/acme*"},
		{"registry:5000/a-b/c_d.e", "registry:5000/a-b/c_d.e"},
		{"localhost/a", "localhost/a"},
		{"[::1]:5000/a", "[::1]:5000/a"},

		{"", ""},
		{"**", ""},
		{"*.example.com/app", ""},
		{"registry.*/app", ""},
		{"*example.com", ""},
		{"alpine", ""},
		{"library/*", ""},
		{"docker.io/alpine", ""}, // its name is docker.io/library/alpine
		{"ghcr.io", ""},
		{"ghcr.io/", ""},
		{"ghcr.io/acme/", ""},
		{"ghcr.io//acme", ""},
		{"ghcr.io/acme/app:1.2", ""},
		{"ghcr.io/acme/app@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", ""},
		{"ghcr.io/Acme/*", ""},
		{"ghcr.io/acme-", ""},
		{"https://ghcr.io/acme", ""},
		{"registry:05000/a", ""},
		{" ghcr.io/acme", ""},
	} {
		got, err := repository.ParsePattern(tt.text)
		if got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%q is %q, %v, want %q", tt.text, got, err, tt.want)
		}
		if err == nil && got != "*" && !repository.Match(got, got) {
			t.Errorf("%q does not match itself", got)
		}
	}
}
