package sources

import (
	"bytes"
	"maps"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
)

// In finds the instruction of a Dockerfile that names the denied source. It is for ADD and for
// RUN with mounts, whose lines the daemon does not tell. args are the build's arguments. It
// returns nil if it finds no instruction. Example: it cannot find one with a variable that a
// base image sets.
//
// The Dockerfile is a stranger's, and the daemon may not have looked at it: forty times ENV A=$A$A
// make a value of a terabyte. So In reads no long Dockerfile, expands no long word, keeps no long
// value, and replaces nothing within a value, as ${A//x/y} does. An expanded word has at most
// maxWord/2 times maxValue bytes, 1 MiB.
func (d *Denial) In(name string, dockerfile []byte, args map[string]string) *errdefs.Source {
	if len(dockerfile) > maxText {
		return nil
	}
	ast, err := parser.Parse(bytes.NewReader(dockerfile))
	if err != nil {
		return nil
	}
	s := &search{denial: d, lex: shell.NewLex(ast.EscapeToken), given: args, global: make(variables)}
	s.vars = s.global
	for _, node := range ast.AST.Children {
		if slices.ContainsFunc(s.reads(node), s.is) {
			return &errdefs.Source{
				Info:   &pb.SourceInfo{Filename: name, Data: dockerfile},
				Ranges: []*pb.Range{{Start: &pb.Position{Line: int32(node.StartLine)}, End: &pb.Position{Line: int32(node.EndLine)}}},
			}
		}
	}
	return nil
}

// In bytes.
const (
	maxText  = 128 << 10 // of a Dockerfile: its tree takes up to 150 times its size
	maxWord  = 2 << 10   // that is expanded
	maxValue = 1 << 10   // of a variable
)

// variables is a shell.EnvGetter. It has no value over maxValue.
type variables map[string]string

func (v variables) Get(name string) (string, bool) {
	value, ok := v[name]
	return value, ok
}

func (v variables) Keys() []string { return slices.Collect(maps.Keys(v)) }

func (v variables) set(name, value string) {
	if delete(v, name); len(value) <= maxValue {
		v[name] = value
	}
}

// replaces says whether a word has a ${name/pattern/text} or ${name//pattern/text}.
func replaces(word string) bool {
	for {
		_, rest, ok := strings.Cut(word, "${")
		if !ok {
			return false
		}
		if word = strings.TrimLeft(rest, nameChars); strings.HasPrefix(word, "/") {
			return true
		}
	}
}

const nameChars = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_"

// search looks for a denied source in a Dockerfile.
type search struct {
	denial *Denial
	lex    *shell.Lex
	given  map[string]string // build arguments
	global variables         // before the first FROM
	vars   variables         // at the instruction that is looked at
}

// reads returns what an instruction may read from elsewhere, before variables are replaced. It
// learns the variables that the instruction sets.
func (s *search) reads(node *parser.Node) (words []string) {
	for n := node.Next; n != nil; n = n.Next {
		words = append(words, n.Value)
	}
	switch strings.ToLower(node.Value) {
	case "from":
		s.vars = make(variables)
	case "arg":
		s.define(words)
	case "env":
		// The parser gives a name, a value, and what is between them.
		for i := 0; i+1 < len(words); i += 3 {
			s.vars.set(words[i], s.expand(words[i+1]))
		}
	case "add":
		return words
	case "run":
		var from []string
		for _, flag := range node.Flags {
			for part := range strings.SplitSeq(strings.TrimPrefix(flag, "--mount="), ",") {
				if image, ok := strings.CutPrefix(part, "from="); ok {
					from = append(from, image)
				}
			}
		}
		return from
	}
	return nil
}

// define takes the words of an ARG, with or without a value. Without one, the value is that of
// the ARG before the first FROM.
func (s *search) define(words []string) {
	for _, word := range words {
		name, value, ok := strings.Cut(word, "=")
		if given, have := s.given[name]; have {
			s.vars.set(name, given)
		} else if ok {
			s.vars.set(name, s.expand(value))
		} else if value, ok := s.global[name]; ok {
			s.vars.set(name, value)
		}
	}
}

func (s *search) expand(word string) string {
	if len(word) > maxWord || replaces(word) {
		return word
	}
	out, _, err := s.lex.ProcessWord(word, s.vars)
	if err != nil {
		return word
	}
	return out
}

// is says whether a word of the Dockerfile names the denied source.
func (s *search) is(word string) bool {
	word = s.expand(word)
	if s.denial.Image == nil {
		return sameAddress(word, s.denial.Address)
	}
	ref, err := reference.ParseNormalizedNamed(word)
	return err == nil && sameImage(reference.TagNameOnly(ref), s.denial.Image)
}

// sameImage compares two images. A tag beside a digest means nothing, and is left out.
func sameImage(a, b reference.Named) bool {
	da, ok := a.(reference.Digested)
	db, ok2 := b.(reference.Digested)
	if ok && ok2 {
		return a.Name() == b.Name() && da.Digest() == db.Digest()
	}
	return a.String() == b.String()
}

// sameAddress compares a URL of the Dockerfile with what the daemon asked for: the same URL, or
// for a git repository the URL without its scheme, and perhaps without ".git".
func sameAddress(word, asked string) bool {
	rest, isGit := strings.CutPrefix(asked, "git://")
	if !isGit {
		return word == asked
	}
	plain := func(s string) string {
		if _, below, ok := strings.Cut(s, "://"); ok {
			s = below
		}
		s, fragment, _ := strings.Cut(s, "#")
		return strings.TrimSuffix(s, ".git") + "#" + fragment
	}
	return plain(word) == plain(rest)
}
