package registry

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/rs/zerolog"

	"handler/function/hosts"
)

// Config says where credentials come from and where they may go.
type Config struct {
	// File is a Docker config.json. It is read again when it changes. Without a
	// file, every registry is used without credentials.
	File string

	// TokenHosts are the token services that may have a private address or
	// speak plain http, each for its own registry. All others must be public: a
	// Dockerfile names the registry, and the registry names its token service.
	TokenHosts []TokenHost

	// TokenPaths are the repositories for which a token service has another path
	// than images have.
	TokenPaths []TokenPath

	// CAFiles are PEM files of root CAs that count beside the system's, by host. With
	// a registry's host, written as in image names, they count for that registry and
	// its token service; with a token service's host, for that service.
	CAFiles map[string]string

	// AllowBasic lets the daemon have what is good for longer than a build: user
	// name and password where a registry asks for Basic authentication, and a
	// registry token.
	AllowBasic bool

	// Mirrors say where the function itself asks for the images of a host that only the
	// daemon reaches by its name.
	Mirrors []Mirror

	// CreateRepositories lets Prepare create missing repositories in ECR.
	CreateRepositories bool

	Log zerolog.Logger
}

// TokenHost is a registry and the host of its token service.
type TokenHost struct {
	registry string // in serverHost's form
	service  hosts.Host
}

// ParseTokenHost takes "registry=host", with or without ports, and "host" where the
// registry is its own token service. The registry is written as in image names. A
// token service without a port has its scheme's.
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

// Mirror is a registry's host and the place where the function asks for its images.
type Mirror struct {
	host  string   // in serverHost's form
	where *url.URL // scheme and host
}

// ParseMirror takes "host=where", with the host as in image names. where is "host:port",
// which is asked over https, or "http://host:port".
func ParseMirror(s string) (Mirror, error) {
	host, where, ok := strings.Cut(s, "=")
	if !ok {
		return Mirror{}, errors.New("there is no = in it")
	}
	if _, err := hosts.Parse(host); err != nil {
		return Mirror{}, err
	}
	scheme := "https"
	if rest, ok := strings.CutPrefix(where, "http://"); ok {
		scheme, where = "http", rest
	}
	at, err := hosts.Parse(strings.TrimPrefix(where, "https://"))
	if err != nil {
		return Mirror{}, err
	}
	return Mirror{serverHost(host), &url.URL{Scheme: scheme, Host: at.String()}}, nil
}

// TokenPath says that a registry's token service has another beginning for the names of
// some repositories than images have.
type TokenPath struct {
	host    string   // in serverHost's form
	image   []string // first segments of the image's path; none for every image
	service []string // the token service's instead of them; may be none
}

// ParseTokenPath takes "registry/path=path". With "registry/local=prod", the token
// service says "prod/app" for the image "registry/local/app". Either path may be empty:
// with "registry=prod" it says "prod/local/app", and with "registry/local=" it says "app".
func ParseTokenPath(s string) (TokenPath, error) {
	image, service, ok := strings.Cut(s, "=")
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
	if p.service, err = pathSegments(service); err != nil {
		return TokenPath{}, err
	}
	if slices.Equal(p.image, p.service) {
		return TokenPath{}, errors.New("both paths are the same")
	}
	return p, nil
}

// pathSegments splits the path of a repository, or the beginning of one.
func pathSegments(text string) ([]string, error) {
	if text = strings.Trim(text, "/"); text == "" {
		return nil, nil
	}
	if named, err := reference.ParseNormalizedNamed(hubDomain + "/x/" + text); err != nil || !reference.IsNameOnly(named) {
		return nil, fmt.Errorf("%q is not the path of a repository", text)
	}
	return strings.Split(text, "/"), nil
}

// tokenPath returns the name that the token service of host has for repository, if an
// entry of Config.TokenPaths is for it. The entry with the longest path counts.
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
	name := slices.Concat(longest.service, segments[len(longest.image):])
	return strings.Join(name, "/"), len(name) > 0
}
