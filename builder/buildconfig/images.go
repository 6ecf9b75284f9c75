package buildconfig

import (
	"errors"
	"fmt"
	"slices"

	"github.com/distribution/reference"

	"handler/function/api"
	"handler/function/hosts"
	"handler/function/repository"
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

// Allow returns an error if a reference is outside all prefixes, which have the form of
// package repository. If there are no prefixes, every reference is allowed.
func (c *Config) Allow(prefixes []string) error {
	if len(prefixes) == 0 {
		return nil
	}
	return c.AllowWithin(prefixes)
}

// AllowWithin does what Allow does, but without prefixes no reference is allowed.
func (c *Config) AllowWithin(prefixes []string) error {
	for _, ref := range c.References {
		if !slices.ContainsFunc(prefixes, func(p string) bool { return repository.Within(ref.Name(), p) }) {
			return &api.Error{Code: api.ImageForbidden, Msg: fmt.Sprintf("image %q is not allowed here", ref.String())}
		}
	}
	return nil
}

// Deny returns an error if a reference is to one of the builder's own repositories, or to
// one below it: a build could write there what other builds read. own has normalised names.
func (c *Config) Deny(own []string) error {
	for _, ref := range c.References {
		if slices.ContainsFunc(own, func(o string) bool { return repository.MayBeWithin(ref.Name(), o) }) {
			return &api.Error{Code: api.ImageForbidden, Msg: fmt.Sprintf("image %q is in a repository of the builder's own", ref.String())}
		}
	}
	return nil
}
