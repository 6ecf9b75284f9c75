// Package buildconfig reads com.openfaas.docker.config and says what is wrong
// with it before anything is built.
package buildconfig

import (
	"bytes"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"

	"handler/function/api"
)

// Config is a build config that can be solved.
type Config struct {
	// BuildConfig is as it was sent, but for empty platforms, which are
	// dropped, and the others, which are normalised.
	api.BuildConfig

	// References are the image and then the tags, normalised: with a domain
	// and a tag. Empty when there is no image.
	References []reference.Named

	// Git is the context's, where it is in a repository.
	Git *Git

	// Warnings name what was ignored.
	Warnings []string
}

// Limits of one config, beside that of its bytes: what each of these costs is more
// than its length, and a message holds no more of the input than it needs.
const (
	maxKeys      = 256 // of an object whose unknown keys are named
	maxPlatforms = 64
	maxTags      = 128
	maxPlatform  = 255  // bytes
	maxPath      = 4096 // bytes, of a Dockerfile's path and of a repository's URL
)

// reserved begins the build arguments that change how the daemon builds, one
// tenant's cache and another's isolation included.
const reserved = "BUILDKIT_"

// Parse reads one JSON object, in UTF-8. A null, of a key or within one, is nothing at
// all. Every error is an *api.Error of code bad_config whose message names the key.
func Parse(data []byte) (*Config, error) {
	c := &Config{}
	err := errUTF16
	if !isUTF16(data) {
		err = c.object("", bytes.TrimPrefix(data, []byte(byteOrderMark)), c.fields())
	}
	if err != nil {
		return nil, bad(err, "reading %s: %v", api.ConfigFile, err)
	}
	if c.Frontend != "" {
		c.Warnings = append(c.Warnings, fmt.Sprintf("%s: ignoring %q: the Dockerfile frontend is always used", api.ConfigFile, "frontend"))
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Config) check() error {
	if c.Image == "" && !c.SkipPush {
		return bad(nil, "%s: %q is missing; it is required unless skipPush is true", api.ConfigFile, "image")
	}
	if n := len(c.Tags); n > maxTags {
		return bad(nil, "%s: %q has %d entries, over the limit of %d", api.ConfigFile, "tags", n, maxTags)
	}
	if n := len(c.Platforms); n > maxPlatforms {
		return bad(nil, "%s: %q has %d entries, over the limit of %d", api.ConfigFile, "platforms", n, maxPlatforms)
	}
	if c.Image == "" && len(c.Tags) > 0 {
		return bad(nil, "%s: %q need an image beside them", api.ConfigFile, "tags")
	}
	if c.Image != "" {
		for i, s := range append([]string{c.Image}, c.Tags...) {
			key := "image"
			if i > 0 {
				key = "tags"
			}
			named, err := parseReference(s)
			if err != nil {
				return bad(err, "%s: %q %.255q: %v", api.ConfigFile, key, s, err)
			}
			c.References = append(c.References, named)
		}
	}
	var list []string
	for _, p := range c.Platforms {
		if strings.TrimSpace(p) == "" {
			continue
		}
		if len(p) > maxPlatform {
			return bad(nil, "%s: %q %.255q: over %d bytes", api.ConfigFile, "platforms", p, maxPlatform)
		}
		spec, err := platforms.Parse(strings.TrimSpace(p))
		if err != nil {
			return bad(err, "%s: %q %q: not a platform such as \"linux/amd64\"", api.ConfigFile, "platforms", p)
		}
		if name := platforms.Format(platforms.Normalize(spec)); !slices.Contains(list, name) {
			list = append(list, name)
		}
	}
	c.Platforms = list
	for name := range c.BuildArgs {
		if strings.HasPrefix(strings.ToUpper(name), reserved) {
			return bad(nil, "%s: %q %.255q: names that begin with %s are reserved", api.ConfigFile, "buildArgs", name, reserved)
		}
		if name == "" || strings.ContainsAny(name, "=\x00") {
			return bad(nil, "%s: %q %.255q: not a name", api.ConfigFile, "buildArgs", name)
		}
	}
	if err := checkDockerfile(c.Dockerfile); err != nil {
		return bad(err, "%s: %q %.255q: %v", api.ConfigFile, "dockerfile", c.Dockerfile, err)
	}
	return c.checkContext()
}

func (c *Config) checkContext() error {
	if c.Context == nil {
		return nil
	}
	if (c.Context.Digest == "") == (c.Context.Git == "") {
		return bad(nil, "%s: %q needs either %q or %q", api.ConfigFile, "context", "digest", "git")
	}
	if text := c.Context.Git; text != "" {
		var err error
		if c.Git, err = parseGit(text); err != nil {
			return bad(err, "%s: %q %.255q: %v", api.ConfigFile, "context.git", text, err)
		}
	}
	if d := c.Context.Digest; d != "" && !ValidDigest(d) {
		return bad(nil, "%s: %q %.255q: not sha256: and 64 hex digits", api.ConfigFile, "context.digest", d)
	}
	return nil
}

// ValidDigest reports whether d is "sha256:" and 64 lower-case hex digits.
func ValidDigest(d string) bool {
	digits, ok := strings.CutPrefix(d, "sha256:")
	return ok && len(digits) == 64 && strings.Trim(digits, "0123456789abcdef") == ""
}

func checkDockerfile(name string) error {
	if name == "" {
		return nil
	}
	if len(name) > maxPath {
		return fmt.Errorf("over %d bytes", maxPath)
	}
	if path.IsAbs(name) || strings.ContainsAny(name, "\x00\\") {
		return errors.New("not a path inside the context")
	}
	if clean := path.Clean(name); clean == "." || clean == ".." || strings.HasPrefix(clean, "../") {
		return errors.New("not a path inside the context")
	}
	return nil
}

func bad(cause error, format string, args ...any) error {
	return &api.Error{Code: api.BadConfig, Msg: fmt.Sprintf(format, args...), Err: cause}
}
