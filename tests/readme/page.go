// Package readme reads the pages of the repository. Its tests hold them to the code,
// in both directions: a page names all that is there, and nothing else.
package readme

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"unicode"
)

// Page is one Markdown file, taken apart.
type Page struct {
	Path     string // from the repository, with slashes
	Lines    int
	Headings []Heading
	Tables   []Table
	Spans    []string // code in the text, without the backquotes
	Links    []Link
	Blocks   []Block // fenced code
}

// Heading is one line that begins with "#".
type Heading struct {
	Level  int
	Anchor string // as GitHub makes it of the text
}

// Table is one table.
type Table struct {
	Section string // the anchor of the heading above it
	Header  []string
	Rows    [][]string // of cells, as Markdown
}

// Link is one link to a place in the repository or elsewhere.
type Link struct {
	Target  string
	Section string // the anchor of the heading above it; empty before the first of level 2
}

// Block is a fenced block of code.
type Block struct {
	Language string
	Text     string
}

// Pages reads every page of the repository, which is at root.
func Pages(root string) ([]*Page, error) {
	var pages []*Page
	for _, pattern := range []string{"*.md", "*/*.md"} {
		paths, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			text, err := os.ReadFile(path)
			if err != nil {
				return nil, err
			}
			name, err := filepath.Rel(root, path)
			if err != nil {
				return nil, err
			}
			page, err := Parse(filepath.ToSlash(name), string(text))
			if err != nil {
				return nil, err
			}
			pages = append(pages, page)
		}
	}
	return pages, nil
}

var (
	fence   = regexp.MustCompile("^ *```([a-z]*)$")
	heading = regexp.MustCompile(`^(#+) (.*)$`)
	divider = regexp.MustCompile(`^\|( *:?-+:? *\|)+$`)
	span    = regexp.MustCompile("`([^`]+)`")
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
)

// Parse takes the text of a page apart. It knows the Markdown that the pages here use.
func Parse(path, text string) (*Page, error) {
	p := &Page{Path: path}
	section := ""
	anchors := make(map[string]int) // how often each has been there
	var block *Block
	var table *Table
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		p.Lines++
		if m := fence.FindStringSubmatch(line); m != nil {
			if block != nil {
				p.Blocks = append(p.Blocks, *block)
				block = nil
			} else {
				block = &Block{Language: m[1]}
			}
			continue
		}
		if block != nil {
			block.Text += line + "\n"
			continue
		}
		if m := heading.FindStringSubmatch(line); m != nil {
			anchor := anchorOf(m[2])
			anchors[anchor]++
			if n := anchors[anchor] - 1; n > 0 {
				anchor = fmt.Sprint(anchor, "-", n)
			}
			p.Headings = append(p.Headings, Heading{Level: len(m[1]), Anchor: anchor})
			if len(m[1]) > 1 {
				section = anchor
			}
		}
		for _, m := range span.FindAllStringSubmatch(line, -1) {
			p.Spans = append(p.Spans, m[1])
		}
		// Code may hold what looks like a link. Its backquotes stay, for the text of links.
		for _, m := range link.FindAllStringSubmatch(span.ReplaceAllString(line, "``"), -1) {
			p.Links = append(p.Links, Link{Target: m[1], Section: section})
		}
		switch {
		case !strings.HasPrefix(line, "|"):
			if table != nil {
				p.Tables = append(p.Tables, *table)
				table = nil
			}
		case table == nil:
			table = &Table{Section: section, Header: cells(line)}
		case !divider.MatchString(line):
			table.Rows = append(table.Rows, cells(line))
		}
	}
	if block != nil {
		return nil, fmt.Errorf("reading %s: a block of code has no end", path)
	}
	if table != nil {
		p.Tables = append(p.Tables, *table)
	}
	return p, nil
}

func cells(line string) []string {
	var list []string
	for cell := range strings.SplitSeq(strings.TrimSuffix(strings.TrimPrefix(line, "|"), "|"), "|") {
		list = append(list, strings.TrimSpace(cell))
	}
	return list
}

// anchorOf is what GitHub makes of a heading's text: small letters, digits, "-" and "_",
// and a "-" for each space.
func anchorOf(text string) string {
	return strings.Map(func(r rune) rune {
		switch r = unicode.ToLower(r); {
		case r == ' ':
			return '-'
		case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
			return r
		}
		return -1
	}, text)
}

// Words are the pieces of code in a cell or a line.
func Words(cell string) []string {
	var list []string
	for _, m := range span.FindAllStringSubmatch(cell, -1) {
		list = append(list, m[1])
	}
	return list
}
