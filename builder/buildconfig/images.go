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

// maxDomain is the length that DNS allows for a name, rounded up. The reference library
// bounds the rest of a reference, 255 bytes of path and 128 of tag, but only after it has
// matched the whole text: so the whole is bounded before.
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

// Allow returns an error if a reference is outside all prefixes. A prefix is a normalised
// repository such as "docker.io/library/app", or the beginning of one, such as
// "ghcr.io/acme": it allows ghcr.io/acme/app but not ghcr.io/acme2. If there are no
// prefixes, every reference is allowed.
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

// Deny returns an error if a reference is to one of the builder's own repositories, or to
// one below it: a build could write there what other builds read. own has normalised names.
func (c *Config) Deny(own []string) error {
	for _, ref := range c.References {
		if slices.ContainsFunc(own, func(o string) bool { return within(canonical(ref.Name()), canonical(o)) }) {
			return &api.Error{Code: api.ImageForbidden, Msg: fmt.Sprintf("image %q is in a repository of the builder's own", ref.String())}
		}
	}
	return nil
}

// canonical returns one name for all normalised names that may mean one repository. It is
// without the ports of http and https, and Docker Hub's host is docker.io.
func canonical(name string) string {
	return onHost(name, func(h hosts.Host) string {
		switch host := h.Without(hosts.DefaultPort("https"), hosts.DefaultPort("http")).String(); host {
		case "registry-1.docker.io", "index.docker.io":
			return "docker.io"
		default:
			return host
		}
	})
}

// onHost returns name with its host in the given form. A name whose first segment is no
// host stays as it is.
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

// within says whether name is prefix or is below it.
func within(name, prefix string) bool {
	return name == prefix || strings.HasPrefix(name, strings.TrimSuffix(prefix, "/")+"/")
}
