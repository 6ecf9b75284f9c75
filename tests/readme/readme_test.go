// Package readme holds the README to the code.
package readme

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"handler/function"
	"handler/function/api"
)

// rows are those of every table of the README, as cells.
func rows(t *testing.T) [][]string {
	t.Helper()
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var all [][]string
	for line := range strings.Lines(string(text)) {
		line, ok := strings.CutPrefix(strings.TrimSpace(line), "| ")
		if !ok {
			continue
		}
		var cells []string
		for cell := range strings.SplitSeq(strings.TrimSuffix(line, "|"), "|") {
			cells = append(cells, strings.TrimSpace(cell))
		}
		all = append(all, cells)
	}
	if len(all) < 50 {
		t.Fatalf("only %d rows found", len(all))
	}
	return all
}

var quoted = regexp.MustCompile("`([^`]+)`")

// words are those of a cell in code quotes.
func words(cell string) []string {
	var list []string
	for _, m := range quoted.FindAllStringSubmatch(cell, -1) {
		list = append(list, m[1])
	}
	return list
}

// TestConfiguration has every variable in the tables, with its default.
func TestConfiguration(t *testing.T) {
	var asked []string
	defaults, err := function.LoadConfig(func(name string) string { asked = append(asked, name); return "" })
	if err != nil {
		t.Fatal(err)
	}
	named := make(map[string]string)
	for _, cells := range rows(t) {
		if len(cells) < 3 {
			continue
		}
		if names := words(cells[0]); len(names) == 1 && slices.Contains(asked, names[0]) {
			named[names[0]] = strings.Join(words(cells[1]), "")
			continue
		}
		// The secrets' table has the default first.
		files, names := words(cells[0]), words(cells[1])
		for i := range min(len(files), len(names)) {
			named[names[i]] = files[i]
		}
	}
	for _, name := range asked {
		if _, ok := named[name]; !ok {
			t.Errorf("%s is not in the README", name)
		}
	}
	documented, err := function.LoadConfig(func(name string) string { return named[name] })
	if err != nil {
		t.Fatal(err)
	}
	documented.FallbackSecret = defaults.FallbackSecret // random
	want, got := reflect.ValueOf(*defaults), reflect.ValueOf(*documented)
	for i := range want.NumField() {
		if !reflect.DeepEqual(want.Field(i).Interface(), got.Field(i).Interface()) {
			t.Errorf("%s is %v by default, and %v by the README", want.Type().Field(i).Name, want.Field(i), got.Field(i))
		}
	}
}

// TestCodes has every code in the table of statuses, with its own.
func TestCodes(t *testing.T) {
	codes := make(map[api.Code]bool) // whether the README names it
	file, err := parser.ParseFile(token.NewFileSet(), "../../builder/api/error.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if spec, ok := n.(*ast.ValueSpec); ok && spec.Type != nil && spec.Type.(*ast.Ident).Name == "Code" {
			value, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			codes[api.Code(value)] = false
		}
		return true
	})
	if len(codes) < 20 {
		t.Fatalf("only %d codes found", len(codes))
	}
	status := regexp.MustCompile(`^\d{3}(, \d{3})*$`)
	for _, cells := range rows(t) {
		if !status.MatchString(cells[0]) {
			continue
		}
		for _, word := range words(cells[1]) {
			code := api.Code(word)
			if _, ok := codes[code]; !ok {
				t.Errorf("the README names %s, which is no code", word)
			}
			codes[code] = true
			if s := strconv.Itoa(code.HTTPStatus()); !strings.Contains(cells[0], s) {
				t.Errorf("%s is %s, and %s by the README", word, s, cells[0])
			}
		}
	}
	for code, named := range codes {
		if !named && code != api.Canceled {
			t.Errorf("%s is not in the README", code)
		}
	}
}
