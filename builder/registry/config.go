package registry

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/rs/zerolog"

	"handler/function/hosts"
)

// Config says where credentials come from and where they may go.
type Config struct {
	// File is a Docker config.json, read again when it changes. Empty or
	// absent: every registry is used without credentials.
	File string

	// TokenHosts are the token services that may have a private address or
	// speak plain http, each for its own registry. A token service is named by
	// the registry that a Dockerfile names, so every other must be public.
	TokenHosts []TokenHost

	// TokenPaths are the registries whose token services name repositories by
	// other paths than images do.
	TokenPaths []TokenPath

	// CAFiles are PEM files of further root CAs, by the registry's host as
	// image names have it. Each counts for the tokens of that registry alone.
	CAFiles map[string]string

	// AllowBasic lets the daemon have user name and password where a registry
	// asks for Basic authentication.
	AllowBasic bool

	// CreateRepositories lets Prepare make repositories that are missing, in ECR.
	CreateRepositories bool

	Log zerolog.Logger
}

// TokenHost is a registry and the host of its token service.
type TokenHost struct {
	registry string // as serverHost has it
	service  hosts.Host
}

// ParseTokenHost takes "registry=host", with or without ports, and "host" where the
// registry is its own token service. The registry is as image names have it. A
// service without a port has the port of its scheme.
func ParseTokenHost(s string) (TokenHost, error) {
	registry, service, ok := strings.Cut(s, "=")
	if !ok {
		service = registry
	}
	if _, err := hosts.Parse(registry); err != nil {
		return TokenHost{}, err
	}
	h, err := hosts.Parse(service)
	if err != nil {
		return TokenHost{}, err
	}
	return TokenHost{serverHost(registry), h}, nil
}

// TokenPath is what a registry's token service has for a path of its images.
type TokenPath struct {
	host         string   // as serverHost has it
	image, token []string // segments that a repository begins with; none is every one
}

// ParseTokenPath takes "registry/path=path": of images at registry/path… the token
// service says path…. Either path may be empty: one is put before all names, or
// left out of them.
func ParseTokenPath(s string) (TokenPath, error) {
	image, token, ok := strings.Cut(s, "=")
	host, below, _ := strings.Cut(image, "/")
	if !ok {
		return TokenPath{}, errors.New("there is no = in it")
	}
	if _, err := hosts.Parse(host); err != nil {
		return TokenPath{}, err
	}
	p := TokenPath{host: serverHost(host)}
	var err error
	if p.image, err = pathSegments(below); err != nil {
		return TokenPath{}, err
	}
	if p.token, err = pathSegments(token); err != nil {
		return TokenPath{}, err
	}
	if slices.Equal(p.image, p.token) {
		return TokenPath{}, errors.New("both paths are the same")
	}
	return p, nil
}

func pathSegments(text string) ([]string, error) {
	if text = strings.Trim(text, "/"); text == "" {
		return nil, nil
	}
	if named, err := reference.ParseNormalizedNamed(hubDomain + "/x/" + text); err != nil || !reference.IsNameOnly(named) {
		return nil, fmt.Errorf("%q is not the path of a repository", text)
	}
	return strings.Split(text, "/"), nil
}

// tokenPath is how the token service of host names repository, where Config says
// that it has a name of its own for it.
func (c *Credentials) tokenPath(host, repository string) (string, bool) {
	segments := strings.Split(repository, "/")
	var longest *TokenPath
	for _, p := range c.cfg.TokenPaths {
		if p.host == host && len(p.image) <= len(segments) && slices.Equal(p.image, segments[:len(p.image)]) &&
			(longest == nil || len(p.image) > len(longest.image)) {
			longest = &p
		}
	}
	if longest == nil {
		return "", false
	}
	name := slices.Concat(longest.token, segments[len(longest.image):])
	return strings.Join(name, "/"), len(name) > 0
}
