package tenants

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

const (
	// maxFile bounds a file, in bytes. 1,000 full entries are 886 kB. A Secret of Kubernetes
	// holds 1 MiB.
	maxFile = 8 << 20
	// maxMarks bounds the values of a file, which take 200 MiB of memory at most while it is
	// read. 1,000 full entries have 76,000 marks, and take 30 MiB.
	maxMarks = 300_000
	// maxProblems is how many problems of the files are told, and maxProblem bounds the text
	// of one, in bytes.
	maxProblems = 20
	maxProblem  = 500
)

// problems are what is wrong with the files.
type problems struct {
	list []error
	more int // beyond list
}

func (p *problems) add(err error) {
	if len(p.list) < maxProblems {
		p.list = append(p.list, err)
	} else {
		p.more++
	}
}

func (p *problems) err() error {
	if p.more > 0 {
		return errors.Join(append(p.list, fmt.Errorf("and %d more", p.more))...)
	}
	return errors.Join(p.list...)
}

// value is a value in a file, with its place. A method that wants a form adds a problem if the value
// has another one. No problem quotes a value that may be a secret.
type value struct {
	file     string
	path     string // of keys, such as tenants.acme.keys[1].secret; empty is the file
	secret   bool   // an unknown key in it may be a secret
	node     *yaml.Node
	problems *problems
}

// wrong adds a problem with v.
func (v value) wrong(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if len(text) > maxProblem {
		text = strings.ToValidUTF8(text[:maxProblem], "") + " (cut)"
	}
	v.problems.add(fmt.Errorf("%s: line %d: %s: %s", v.file, v.node.Line, cmp.Or(v.path, "the file"), text))
}

// place is where v is, for a problem with another value.
func (v value) place() string { return fmt.Sprintf("%s: line %d", v.file, v.node.Line) }

// parse reads a file of YAML. ok is false if it is no YAML.
func parse(name string, data []byte, p *problems) (v value, ok bool) {
	v = value{file: name, node: &yaml.Node{Line: 1}, problems: p}
	if len(data) > maxFile {
		v.wrong("over %d bytes", maxFile)
		return v, false
	}
	if line, ok := printable(data); !ok {
		v.node.Line = line
		v.wrong("a byte that is no UTF-8, or a control character")
		return v, false
	}
	if marks := countMarks(data); marks > maxMarks {
		v.wrong("over %d values", maxMarks)
		return v, false
	}
	d := yaml.NewDecoder(bytes.NewReader(data))
	var document, second yaml.Node
	switch err := d.Decode(&document); {
	case errors.Is(err, io.EOF):
		v.wrong("there is nothing in it")
		return v, false
	case err != nil:
		v.node.Line, err = syntax(err)
		v.wrong("%v", err)
		return v, false
	}
	switch err := d.Decode(&second); {
	case err == nil:
		v.node = &second
		v.wrong("a second document: a file has one")
		return v, false
	case !errors.Is(err, io.EOF):
		v.node.Line, err = syntax(err)
		v.wrong("%v", err)
		return v, false
	}
	v.node = document.Content[0]
	return v, true
}

// printable returns the line of the first byte that YAML does not allow.
func printable(data []byte) (line int, ok bool) {
	line = 1
	for len(data) > 0 {
		r, n := utf8.DecodeRune(data)
		if r == utf8.RuneError && n == 1 || r < ' ' && r != '\t' && r != '\n' && r != '\r' || r == 0x7f {
			return line, false
		}
		if r == '\n' {
			line++
		}
		data = data[n:]
	}
	return line, true
}

// countMarks counts the marks between the values of a file. It counts at least half as many
// marks as there are values.
func countMarks(data []byte) int {
	marks := 0
	for _, c := range data {
		switch c {
		case ',', ':', '-', '?', '[', '{', '\n':
			marks++
		}
	}
	return marks
}

// Errors of the YAML library have their line in the text. One of them also quotes the file: the
// name of an anchor. YAML reads a secret that begins with * as such a name.
var (
	syntaxLine   = regexp.MustCompile(`^yaml: line (\d+): `)
	syntaxAnchor = regexp.MustCompile(`anchor '.*`)
)

// syntax splits an error of the YAML library.
func syntax(err error) (line int, cause error) {
	text := err.Error()
	line = 1
	if m := syntaxLine.FindStringSubmatch(text); m != nil {
		line, _ = strconv.Atoi(m[1])
		text = text[len(m[0]):]
	}
	text = strings.TrimPrefix(text, "yaml: ")
	if syntaxAnchor.MatchString(text) {
		text = "a value that begins with * needs quotes: aliases are not read"
	}
	return line, errors.New(text)
}

// plain says whether v is a value of that kind. Aliases, anchors, tags and empty values are problems:
// this package does not read them.
func (v value) plain(kind yaml.Kind, want string) bool {
	switch {
	case v.node.Kind == yaml.AliasNode:
		v.wrong("aliases are not read: write the value out")
	case v.node.Anchor != "":
		v.wrong("anchors are not read")
	case v.node.Style&yaml.TaggedStyle != 0:
		v.wrong("tags are not read")
	case v.node.Kind == yaml.ScalarNode && v.node.Tag == "!!null":
		v.wrong("there is no value: want %s", want)
	case v.node.Kind != kind:
		v.wrong("want %s", want)
	default:
		return true
	}
	return false
}

// scalar is the text of a value with one of the tags.
func (v value) scalar(want string, tags ...string) (string, bool) {
	if !v.plain(yaml.ScalarNode, want) {
		return "", false
	}
	for _, tag := range tags {
		if v.node.Tag == tag {
			return v.node.Value, true
		}
	}
	if tags[0] == "!!str" {
		want += " in quotes"
	}
	v.wrong("want %s", want)
	return "", false
}

// text is a text that is not empty.
func (v value) text() (string, bool) {
	s, ok := v.scalar("text", "!!str")
	if ok && s == "" {
		v.wrong("there is no text in it")
		return "", false
	}
	return s, ok
}

// entries calls see with each key of a mapping and its value. Both have the path of the
// mapping: see adds the key, unless it may be a secret in a wrong place.
func (v value) entries(see func(key, v value)) {
	if !v.plain(yaml.MappingNode, "keys with values") {
		return
	}
	lines := make(map[string]int)
	for i := 0; i < len(v.node.Content); i += 2 {
		key, one := v, v
		key.node, one.node = v.node.Content[i], v.node.Content[i+1]
		if key.node.Tag == "!!merge" {
			key.wrong("merge keys are not read: write the values out")
			continue
		}
		name, ok := key.scalar("a key that is text", "!!str")
		if !ok {
			continue
		}
		if line := lines[name]; line > 0 {
			key.wrong("a key is there twice: it is in line %d too", line)
			continue
		}
		lines[name] = key.node.Line
		see(key, one)
	}
}

// keyForm is the form of an unknown key that a problem names. It is shorter than a signature
// key may be: a secret beside a colon without a space, such as {secret:"…"}, is read as a key.
var keyForm = regexp.MustCompile(`^[a-z_]{1,15}$`)

// object calls the func of each key. Every other key is a problem. has are the keys that are
// there.
func (v value) object(fields map[string]func(value)) (has map[string]bool) {
	has = make(map[string]bool)
	v.entries(func(key, one value) {
		name := key.node.Value
		if field, ok := fields[name]; ok {
			has[name] = true
			field(one.at(name))
			return
		}
		if keyForm.MatchString(name) && !v.secret {
			key = key.at(name)
		}
		key.wrong("there is no such key: the keys are %s", strings.Join(slices.Sorted(maps.Keys(fields)), ", "))
	})
	return has
}

// at adds a key to the path of v.
func (v value) at(key string) value {
	if v.path == "" {
		v.path = key
	} else {
		v.path += "." + key
	}
	return v
}

// list calls see with each value of a list.
func (v value) list(see func(value)) {
	if !v.plain(yaml.SequenceNode, "a list") {
		return
	}
	for i, node := range v.node.Content {
		one := v
		one.node, one.path = node, fmt.Sprintf("%s[%d]", v.path, i)
		see(one)
	}
}

// each calls see with each text of a list of texts.
func (v value) each(see func(one value, text string)) {
	v.list(func(one value) {
		if text, ok := one.text(); ok {
			see(one, text)
		}
	})
}

// texts reads a list of texts, each with parse. Its result is not nil. Two texts of one meaning
// are a problem.
func (v value) texts(parse func(string) (string, error)) []string {
	list := []string{}
	lines := make(map[string]int)
	v.each(func(one value, text string) {
		parsed, err := parse(text)
		if err != nil {
			one.wrong("%v", err)
			return
		}
		if line := lines[parsed]; line > 0 {
			one.wrong("it is in line %d too", line)
			return
		}
		lines[parsed] = one.node.Line
		list = append(list, parsed)
	})
	return list
}
