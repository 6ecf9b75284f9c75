// Package repository knows how repositories of images are written and compared. A name here
// is normalised, as docker does it: "alpine" is "docker.io/library/alpine". A prefix is such
// a name, or its beginning up to a slash: "ghcr.io/acme" is the prefix of ghcr.io/acme/app,
// and not of ghcr.io/acme2.
//
// One repository can have several names, since a registry's host can be written in several
// ways. What allows compares with [Within] and [Match], in which two names are the same only
// if they surely mean the same repository. What forbids compares with [MayBeWithin], in which
// they are the same if they may.
package repository

import (
	"fmt"
	"strings"

	"github.com/distribution/reference"

	"handler/function/hosts"
)

// ParsePrefix normalises a prefix. "acme" is docker.io/acme and everything below it, and
// "ghcr.io" is every repository there.
func ParsePrefix(text string) (string, error) {
	trimmed := strings.TrimSuffix(text, "/")
	if !strings.Contains(trimmed, "/") && (strings.ContainsAny(trimmed, ".:") || trimmed == "localhost") {
		_, err := hosts.Parse(trimmed)
		return trimmed, err
	}
	named, err := reference.ParseNormalizedNamed(trimmed)
	if err != nil || !reference.IsNameOnly(named) {
		return "", fmt.Errorf(`%q is not a repository prefix such as "ghcr.io/acme"`, text)
	}
	if _, err := hosts.Parse(reference.Domain(named)); err != nil {
		return "", err
	}
	if !strings.Contains(trimmed, "/") {
		// The reference library reads a single name as docker.io/library/name. As a
		// prefix it means the account of that name.
		return Hub + "/" + trimmed, nil
	}
	return named.Name(), nil
}

// Hub is Docker Hub's host in names of images.
const Hub = "docker.io"

// Within says whether name surely is prefix or below it.
func Within(name, prefix string) bool { return within(form(name, sure), form(prefix, sure)) }

// MayBeWithin says whether name may be prefix or below it.
func MayBeWithin(name, prefix string) bool {
	return within(form(name, possible), form(prefix, possible))
}

// Match says whether name surely matches pattern, in which each * is any text, slashes
// included. The host of a pattern must not have a * in it to be compared in its one form.
//
//	docker.io/library/*       docker.io/library/alpine, docker.io/library/a/b
//	registry.example.com/*    everything at registry.example.com, also written with :443
func Match(name, pattern string) bool {
	return match(form(name, sure), form(pattern, sure))
}

func match(text, pattern string) bool {
	first, rest, more := strings.Cut(pattern, "*")
	if !more {
		return text == pattern
	}
	text, ok := strings.CutPrefix(text, first)
	if !ok {
		return false
	}
	for {
		var piece string
		piece, rest, more = strings.Cut(rest, "*")
		if !more {
			return strings.HasSuffix(text, piece)
		}
		i := strings.Index(text, piece)
		if i < 0 {
			return false
		}
		text = text[i+len(piece):]
	}
}

// sure is the host as it is compared where equal names allow something. 443 is the port that
// a registry's host means without one.
func sure(h hosts.Host) string { return oneHub(h.Without(hosts.DefaultPort("https"))) }

// possible is the host as it is compared where equal names forbid something: a registry may
// be asked over http.
func possible(h hosts.Host) string {
	return oneHub(h.Without(hosts.DefaultPort("https"), hosts.DefaultPort("http")))
}

func oneHub(h hosts.Host) string {
	switch host := h.String(); host {
	case "registry-1.docker.io", "index.docker.io":
		return Hub
	default:
		return host
	}
}

// form returns name with its host in the given form. A name whose first segment is no host
// stays as it is.
func form(name string, of func(hosts.Host) string) string {
	host, path, below := strings.Cut(name, "/")
	h, err := hosts.Parse(host)
	if err != nil {
		return name
	}
	if !below {
		return of(h)
	}
	return of(h) + "/" + path
}

// within says whether name is prefix or is below it.
func within(name, prefix string) bool {
	return name == prefix || strings.HasPrefix(name, strings.TrimSuffix(prefix, "/")+"/")
}

// Host returns the host of a name or a prefix, in the form that is compared where equal names
// allow something.
func Host(name string) string {
	host, _, _ := strings.Cut(form(name, sure), "/")
	return host
}
