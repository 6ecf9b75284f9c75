package readme

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestPackages holds the table of packages to the function's folders. Each package imports
// only packages below it in the table.
func TestPackages(t *testing.T) {
	const module = "handler/function/"
	folder := filepath.Join(root, "builder")
	var named []string
	for _, table := range tables(t, "builder/README.md", "package", "knows") {
		for _, row := range table.Rows {
			named = append(named, Words(row[0])...)
		}
	}
	imports := make(map[string][]string)
	err := filepath.WalkDir(folder, func(path string, _ fs.DirEntry, err error) error {
		dir, relErr := filepath.Rel(folder, filepath.Dir(path))
		if err != nil || relErr != nil || dir == "." || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		pkg := filepath.ToSlash(dir)
		if imports[pkg] == nil {
			imports[pkg] = []string{}
		}
		for _, spec := range file.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if ours, ok := strings.CutPrefix(name, module); ok {
				imports[pkg] = append(imports[pkg], ours)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	var packages []string
	for pkg, list := range imports {
		packages = append(packages, pkg)
		for _, imported := range list {
			if slices.Index(named, imported) <= slices.Index(named, pkg) {
				t.Errorf("%s imports %s, which is not below it in the table", pkg, imported)
			}
		}
	}
	same(t, "package", "builder/README.md", packages, named)
}
