// Package buildconfig reads com.openfaas.docker.config and says what is wrong
// with it before anything is built.
package buildconfig

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"

	"handler/function/api"
	"handler/function/hosts"
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

// byteOrderMark is what editors and shells put before UTF-8.
const byteOrderMark = "\ufeff"

var errUTF16 = errors.New("it is UTF-16, and UTF-8 is wanted")

// isUTF16 says whether data is, by its byte order mark, or because one half of its first
// character is zero: JSON begins with ASCII.
func isUTF16(data []byte) bool {
	if len(data) < 2 {
		return false
	}
	first, second := data[0], data[1]
	return first == 0xfe && second == 0xff || first == 0xff && second == 0xfe || (first == 0) != (second == 0)
}

// fields are the keys of the contract's table, each with what it is read into.
func (c *Config) fields() map[string]any {
	return map[string]any{
		"image":       &c.Image,
		"buildArgs":   &c.BuildArgs,
		"platforms":   &c.Platforms,
		"skipPush":    &c.SkipPush,
		"tags":        &c.Tags,
		"target":      &c.Target,
		"dockerfile":  &c.Dockerfile,
		"labels":      &c.Labels,
		"annotations": &c.Annotations,
		"noCache":     &c.NoCache,
		"pull":        &c.Pull,
		"context":     &c.Context,
		"frontend":    &c.Frontend,
	}
}

// object reads the object at path. A key that is not among fields, be it by its case
// alone, gets a warning.
func (c *Config) object(path string, data []byte, fields map[string]any) error {
	members, err := objectMembers(data)
	if err != nil {
		if path != "" {
			return fmt.Errorf("%q: %w", path, err)
		}
		return err
	}
	for _, m := range members {
		name := m.key
		if path != "" {
			name = path + "." + m.key
		}
		into, ok := fields[m.key]
		if !ok {
			c.Warnings = append(c.Warnings, fmt.Sprintf("%s: ignoring unknown key %.255q", api.ConfigFile, name))
			continue
		}
		if err := c.field(name, m.value, into); err != nil {
			return err
		}
	}
	return nil
}

func (c *Config) field(name string, value json.RawMessage, into any) error {
	if string(value) == "null" {
		return nil
	}
	switch into := into.(type) {
	case *string:
		return scalar(name, value, into, "a string")
	case *bool:
		return scalar(name, value, into, "true or false")
	case *[]string:
		return list(name, value, into)
	case *map[string]string:
		return table(name, value, into)
	case **api.ContextSource:
		if value[0] != '{' {
			return wrongType(name, kind(value[0]), "an object")
		}
		*into = &api.ContextSource{}
		return c.object(name, value, map[string]any{"digest": &(*into).Digest, "git": &(*into).Git})
	}
	return fmt.Errorf("%q: nothing reads a %T", name, into)
}

func scalar(name string, value json.RawMessage, into any, wanted string) error {
	if json.Unmarshal(value, into) != nil {
		return wrongType(name, kind(value[0]), wanted)
	}
	return nil
}

func list(name string, value json.RawMessage, into *[]string) error {
	if value[0] != '[' {
		return wrongType(name, kind(value[0]), "a list of strings")
	}
	var elements []*string
	if err := json.Unmarshal(value, &elements); err != nil {
		var kinds []kind
		json.Unmarshal(value, &kinds)
		for i, k := range kinds {
			if k.isNoText() {
				return wrongType(fmt.Sprintf("%s[%d]", name, i), k, "a string")
			}
		}
		return fmt.Errorf("%q: %w", name, err)
	}
	for _, s := range elements {
		if s != nil {
			*into = append(*into, *s)
		}
	}
	return nil
}

func table(name string, value json.RawMessage, into *map[string]string) error {
	if value[0] != '{' {
		return wrongType(name, kind(value[0]), "an object of strings")
	}
	var elements map[string]*string
	if json.Unmarshal(value, &elements) != nil {
		var kinds map[string]kind
		json.Unmarshal(value, &kinds)
		for _, key := range slices.Sorted(maps.Keys(kinds)) {
			if kinds[key].isNoText() {
				return wrongType(name+"."+key, kinds[key], "a string")
			}
		}
		// Of a key that stands twice the last value counts, also to kinds.
		return fmt.Errorf("%q: a key stands twice in it", name)
	}
	*into = make(map[string]string, len(elements))
	for key, s := range elements {
		if s != nil {
			(*into)[key] = *s
		}
	}
	return nil
}

// kind is the first byte of a JSON value, which tells its type. encoding/json's error
// does not say which element of a list or object has a wrong one.
type kind byte

func (k *kind) UnmarshalJSON(value []byte) error {
	*k = kind(value[0])
	return nil
}

func (k kind) isNoText() bool { return k != '"' && k != 'n' }

func (k kind) String() string {
	switch k {
	case '{':
		return "object"
	case '[':
		return "array"
	case '"':
		return "string"
	case 't', 'f':
		return "bool"
	}
	return "number"
}

func wrongType(name string, k kind, wanted string) error {
	return fmt.Errorf("%.255q is a JSON %s, not %s", name, k, wanted)
}

type member struct {
	key   string
	value json.RawMessage
}

// objectMembers are data's, in order. A key that stands twice is an error: two
// readers could take one each.
func objectMembers(data []byte) ([]member, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	tok, err := dec.Token()
	if err != nil {
		return nil, syntax(err)
	}
	if tok != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	var members []member
	seen := make(map[string]bool)
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return nil, syntax(err)
		}
		m := member{key: tok.(string)}
		if seen[m.key] {
			return nil, fmt.Errorf("key %.255q stands twice", m.key)
		}
		if len(members) == maxKeys {
			return nil, fmt.Errorf("over the limit of %d keys", maxKeys)
		}
		seen[m.key] = true
		if err := dec.Decode(&m.value); err != nil {
			return nil, syntax(err)
		}
		members = append(members, m)
	}
	if _, err := dec.Token(); err != nil {
		return nil, syntax(err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("more follows the JSON object")
	}
	return members, nil
}

func syntax(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the JSON ends too early")
	}
	return err
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

func bad(cause error, format string, args ...any) error {
	return &api.Error{Code: api.BadConfig, Msg: fmt.Sprintf(format, args...), Err: cause}
}
