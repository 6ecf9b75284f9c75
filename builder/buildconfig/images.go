package buildconfig

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/distribution/reference"

	"handler/function/api"
	"handler/function/hosts"
)

// maxDomain is what DNS allows a name with a port, rounded up. The reference
// library bounds the rest of a reference, 255 bytes of path and 128 of tag, but
// only when it has matched the whole.
const (
	maxDomain    = 255
	maxReference = maxDomain + len("/") + 255 + len(":") + 128
)

// parseReference normalises s as docker does: "alpine" is
// docker.io/library/alpine:latest.
func parseReference(s string) (reference.Named, error) {
	if len(s) > maxReference {
		return nil, fmt.Errorf("over %d bytes", maxReference)
	}
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return nil, err
	}
	if _, ok := named.(reference.Digested); ok {
		return nil, errors.New("a digest cannot be pushed to")
	}
	if len(reference.Domain(named)) > maxDomain {
		return nil, fmt.Errorf("the registry's name is over %d bytes", maxDomain)
	}
	if _, err := hosts.Parse(reference.Domain(named)); err != nil {
		return nil, err
	}
	return reference.TagNameOnly(named), nil
}

// Allow refuses every reference outside prefixes: repositories such as
// "ghcr.io/acme" or "docker.io/library/app", normalised, and compared segment
// by segment. No prefixes allow any.
func (c *Config) Allow(prefixes []string) error {
	if len(prefixes) == 0 {
		return nil
	}
	for _, ref := range c.References {
		name := onHost(ref.Name(), hosts.Host.String)
		if !slices.ContainsFunc(prefixes, func(p string) bool { return within(name, onHost(p, hosts.Host.String)) }) {
			return &api.Error{Code: api.ImageForbidden, Msg: fmt.Sprintf("image %q is not allowed here", ref.String())}
		}
	}
	return nil
}

// Deny refuses every reference to one of the builder's own repositories, normalised,
// or to one below it: what is built could write there what other builds read.
func (c *Config) Deny(own []string) error {
	for _, ref := range c.References {
		if slices.ContainsFunc(own, func(o string) bool { return within(place(ref.Name()), place(o)) }) {
			return &api.Error{Code: api.ImageForbidden, Msg: fmt.Sprintf("image %q is in a repository of the builder's own", ref.String())}
		}
	}
	return nil
}

// place is a normalised name by the place that it means: with the one form of its
// host, and without a usual port or Docker Hub's further names.
func place(name string) string {
	return onHost(name, func(h hosts.Host) string {
		switch host := h.Without(hosts.DefaultPort("https"), hosts.DefaultPort("http")).String(); host {
		case "registry-1.docker.io", "index.docker.io":
			return "docker.io"
		default:
			return host
		}
	})
}

// onHost is name with its host, as far as it is one, written as form has it.
func onHost(name string, form func(hosts.Host) string) string {
	host, path, below := strings.Cut(name, "/")
	h, err := hosts.Parse(host)
	if err != nil {
		return name
	}
	if !below {
		return form(h)
	}
	return form(h) + "/" + path
}

func within(name, prefix string) bool {
	return name == prefix || strings.HasPrefix(name, strings.TrimSuffix(prefix, "/")+"/")
}
