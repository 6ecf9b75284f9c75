package buildconfig

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"unicode/utf8"

	"github.com/distribution/reference"

	"handler/function/api"
)

// byteOrderMark is what some editors and shells write before UTF-8.
const byteOrderMark = "\ufeff"

var errUTF16 = errors.New("it is UTF-16 and has to be UTF-8")

// isUTF16 says whether data is UTF-16. It has a byte order mark then, or one half of its
// first character is zero, since JSON begins with ASCII.
func isUTF16(data []byte) bool {
	if len(data) < 2 {
		return false
	}
	first, second := data[0], data[1]
	return first == 0xfe && second == 0xff || first == 0xff && second == 0xfe || (first == 0) != (second == 0)
}

// fields returns the keys that a config may have, each with what its value is read into.
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

// object reads the object at path into fields. For a key that is not among them, it adds a
// warning. Case matters.
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

// field reads value, of the key that messages call name, into a pointer from fields.
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

// scalar reads a string or a bool. wanted says which, in the error.
func scalar(name string, value json.RawMessage, into any, wanted string) error {
	if json.Unmarshal(value, into) != nil {
		return wrongType(name, kind(value[0]), wanted)
	}
	return nil
}

// list reads a list of strings without its nulls.
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

// table reads an object of strings without its nulls.
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
		// Every value in kinds is good, since kinds has the last value of a key that is
		// there twice. An earlier one is not.
		return fmt.Errorf("%q: a key is in it twice", name)
	}
	*into = make(map[string]string, len(elements))
	for key, s := range elements {
		if s != nil {
			(*into)[key] = *s
		}
	}
	return nil
}

// kind is the first byte of a JSON value, which tells its type. A list or an object is read
// into kinds when an element has the wrong type: encoding/json's error does not say which.
type kind byte

func (k *kind) UnmarshalJSON(value []byte) error {
	*k = kind(value[0])
	return nil
}

// isNoText says whether k is neither a string nor null.
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

// wrongType is the error of a key whose value is of kind k.
func wrongType(name string, k kind, wanted string) error {
	return fmt.Errorf("%.255q is a JSON %s, not %s", name, k, wanted)
}

// member is one key of a JSON object with its value.
type member struct {
	key   string
	value json.RawMessage
}

// objectMembers returns the members of the JSON object data, in order. It is an error if a
// key is there twice: another reader could take the other value.
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
			return nil, fmt.Errorf("key %.255q is there twice", m.key)
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

// Image returns the image of a config, normalised, and nothing else. It does not look at the rest
// of the config, which may be wrong. ok is false if there is no image that can be read, and if
// data is not UTF-8: encoding/json replaces each such byte by three, in several copies. Image
// allocates about six times the bytes of a long config.
func Image(data []byte) (image reference.Named, ok bool) {
	if !utf8.Valid(data) {
		return nil, false
	}
	dec := json.NewDecoder(bytes.NewReader(bytes.TrimPrefix(data, []byte(byteOrderMark))))
	if tok, err := dec.Token(); err != nil || tok != json.Delim('{') {
		return nil, false
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, false
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return nil, false
		}
		if key != "image" {
			continue
		}
		var text string
		if json.Unmarshal(value, &text) != nil || text == "" {
			return nil, false
		}
		image, err = parseReference(text)
		return image, err == nil
	}
	return nil, false
}

// syntax is err of the JSON decoder in words for the client.
func syntax(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the JSON ends too early")
	}
	return err
}
