package repository

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/distribution/reference"

	"handler/function/hosts"
)

// patternPath is the part of a pattern after its host.
var patternPath = regexp.MustCompile(`^[a-z0-9._*-]+(/[a-z0-9._*-]+)*$`)

// ParsePattern normalises a pattern for Match. It takes "*", "host/path" and "*/path".
//
// A * in a part of a host is refused, since * is slashes too: "*.example.com/app" would match
// evil.example/a.example.com/app. A pattern that can match nothing, for it is not as names are
// when they are normalised, is refused as well.
func ParsePattern(text string) (string, error) {
	if text == "*" {
		return text, nil
	}
	host, path, _ := strings.Cut(text, "/")
	switch {
	case host == "*":
	case strings.Contains(host, "*"):
		return "", fmt.Errorf("%q has a * in its host: write the host out, or * for all of it", text)
	case !strings.ContainsAny(host, ".:") && host != "localhost":
		return "", fmt.Errorf(`%q does not begin with a host, such as "docker.io/library/alpine"`, text)
	}
	if !patternPath.MatchString(path) {
		return "", fmt.Errorf(`%q is not a pattern of repositories such as "ghcr.io/acme/*"`, text)
	}
	if host == "*" {
		return text, nil
	}
	h, err := hosts.Parse(host)
	if err != nil {
		return "", err
	}
	pattern := oneHub(h) + "/" + path
	if strings.Contains(path, "*") {
		return pattern, nil
	}
	named, err := reference.ParseNormalizedNamed(pattern)
	if err != nil {
		return "", fmt.Errorf("%q is not a repository", text)
	}
	if named.Name() != pattern {
		return "", fmt.Errorf("%q is written %q", text, named.Name())
	}
	return pattern, nil
}
