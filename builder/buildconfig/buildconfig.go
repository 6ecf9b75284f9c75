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
	// BuildConfig is what was sent. Platforms are in their one form, each of them
	// once, and without empty ones.
	api.BuildConfig

	// References are the image and then the tags, normalised: with a domain
	// and a tag. There are none if there is no image.
	References []reference.Named

	// Git is where the context is in a git repository. Nil if it is not in one.
	Git *Git

	// Warnings name what was ignored.
	Warnings []string
}

// Limits of one config, beside the limit of its bytes. A key, a platform or a tag costs
// more than its bytes do, and a message that quotes a path must not grow without end.
const (
	maxKeys      = 256 // of an object; each unknown one makes a warning
	maxPlatforms = 64
	maxTags      = 128
	maxPlatform  = 255  // bytes
	maxPath      = 4096 // bytes, of a Dockerfile's path and of a repository's URL
)

// reserved is how the names of those build arguments begin that change how the daemon
// builds: which cache it uses, and what isolates one tenant from another.
const reserved = "BUILDKIT_"

// Parse reads one JSON object in UTF-8 and checks it. A key whose value is null counts as
// absent, and so does a null in a list or an object. Every error is an *api.Error of code
// bad_config whose message names the key.
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

// check checks what was read, normalises it, and fills References and Git. It returns the
// first thing that is wrong.
func (c *Config) check() error {
	for _, check := range []func() error{
		c.checkLists, c.readReferences, c.normalisePlatforms, c.checkBuildArgs, c.checkDockerfile, c.checkContext,
	} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

// checkLists checks which of the image and its lists are there, and how long they are.
func (c *Config) checkLists() error {
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
		return bad(nil, "%s: %q is set without %q", api.ConfigFile, "tags", "image")
	}
	return nil
}

// readReferences parses the image and the tags.
func (c *Config) readReferences() error {
	if c.Image == "" {
		return nil
	}
	for i, s := range append([]string{c.Image}, c.Tags...) {
		key := "image"
		if i > 0 {
			key = "tags"
		}
		ref, err := parseReference(s)
		if err != nil {
			return bad(err, "%s: %q %.255q: %v", api.ConfigFile, key, s, err)
		}
		c.References = append(c.References, ref)
	}
	return nil
}

// normalisePlatforms brings each platform into its one form, and drops empty ones and those
// that are there twice.
func (c *Config) normalisePlatforms() error {
	var normal []string
	for _, p := range c.Platforms {
		if strings.TrimSpace(p) == "" {
			continue
		}
		if len(p) > maxPlatform {
			return bad(nil, "%s: %q %.255q: over %d bytes", api.ConfigFile, "platforms", p, maxPlatform)
		}
		name, err := NormalPlatform(p)
		if err != nil {
			return bad(err, "%s: %q %q: not a platform such as \"linux/amd64\"", api.ConfigFile, "platforms", p)
		}
		if !slices.Contains(normal, name) {
			normal = append(normal, name)
		}
	}
	c.Platforms = normal
	return nil
}

// NormalPlatform brings a platform into its one form, such as "linux/amd64".
func NormalPlatform(text string) (string, error) {
	spec, err := platforms.Parse(strings.TrimSpace(text))
	if err != nil {
		return "", err
	}
	return platforms.Format(platforms.Normalize(spec)), nil
}

// AllowPlatforms returns an error if a platform is not among those allowed, which are in their
// one form. If none are given, every platform is allowed. A config that asks for no platform
// gets preferred, if it is allowed, or else the first that is allowed.
func (c *Config) AllowPlatforms(allowed []string, preferred string) error {
	if len(allowed) == 0 {
		return nil
	}
	if len(c.Platforms) == 0 {
		name, err := NormalPlatform(preferred)
		if err != nil || !slices.Contains(allowed, name) {
			name = allowed[0]
		}
		c.Platforms = []string{name}
	}
	for _, p := range c.Platforms {
		if !slices.Contains(allowed, p) {
			return &api.Error{Code: api.PlatformForbidden, Msg: fmt.Sprintf("platform %q is not allowed here; allowed are %s", p, strings.Join(allowed, ", "))}
		}
	}
	return nil
}

func (c *Config) checkBuildArgs() error {
	for name := range c.BuildArgs {
		if strings.HasPrefix(strings.ToUpper(name), reserved) {
			return bad(nil, "%s: %q %.255q: names that begin with %s are reserved", api.ConfigFile, "buildArgs", name, reserved)
		}
		if name == "" || strings.ContainsAny(name, "=\x00") {
			return bad(nil, "%s: %q %.255q: not a name", api.ConfigFile, "buildArgs", name)
		}
	}
	return nil
}

func (c *Config) checkDockerfile() error {
	if c.Dockerfile == "" {
		return nil
	}
	if err := checkPath(c.Dockerfile); err != nil {
		return bad(err, "%s: %q %.255q: %v", api.ConfigFile, "dockerfile", c.Dockerfile, err)
	}
	return nil
}

// checkPath wants the path of a file inside the context.
func checkPath(name string) error {
	if len(name) > maxPath {
		return fmt.Errorf("over %d bytes", maxPath)
	}
	clean := path.Clean(name)
	if path.IsAbs(name) || strings.ContainsAny(name, "\x00\\") || clean == "." || clean == ".." || strings.HasPrefix(clean, "../") {
		return errors.New("not a path inside the context")
	}
	return nil
}

// checkContext checks where the context is, and parses a git one.
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

func bad(cause error, format string, args ...any) error {
	return &api.Error{Code: api.BadConfig, Msg: fmt.Sprintf(format, args...), Err: cause}
}
