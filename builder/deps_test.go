package function

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

const module = "handler/function"

// imports says which of our packages each may import. Data flows one way:
// request, verified payload, solve, records, reply. A package that is not here
// may import none of ours.
var imports = map[string][]string{
	".":        {"api", "buildconfig", "buildkit", "contexts", "hosts", "payload", "redact", "registry", "reply", "server"},
	"server":   {"api", "budget", "buildconfig", "isolation", "metrics", "page", "payload", "redact", "reply", "sealed", "signature", "solve"},
	"buildkit": {"api", "buildconfig", "buildkit/contextfs", "buildkit/pool", "buildkit/report", "redact", "registry", "solve"},

	"buildkit/contextfs": {"api", "payload"},
	"buildkit/pool":      {"api", "buildkit/report", "hosts", "placement", "solve"},
	"buildkit/report":    {"api", "redact", "solve"},

	"solve":       {"buildconfig", "payload", "redact"},
	"metrics":     {"api", "solve"},
	"reply":       {"api"},
	"payload":     {"api", "budget"},
	"buildconfig": {"api", "hosts"},
	"sealed":      {"api"},
	"registry":    {"api", "clouds", "hosts", "redact"},
	"contexts":    {"api"},
}

// reserved are modules that one package alone may import, and why.
var reserved = []struct{ module, by, why string }{
	{"github.com/moby/buildkit", "buildkit", "everything else can be read and tested without a daemon in mind"},
	{"github.com/tonistiigi/fsutil", "buildkit", "it is BuildKit's wire format"},
	{"github.com/moby/patternmatcher", "buildkit", "what .dockerignore means is BuildKit's to say"},
	{"google.golang.org/grpc", "buildkit", "it is BuildKit's transport"},
	{"github.com/docker/", "registry", "credentials are read in one place; go-units is the exception"},
	{"github.com/aws/", "clouds", "the rest knows Docker's helpers by name"},
	{"github.com/awslabs/", "clouds", "the rest knows Docker's helpers by name"},
	{"github.com/Azure/", "clouds", "the rest knows Docker's helpers by name"},
	{"cloud.google.com/", "clouds", "the rest knows Docker's helpers by name"},
	{"golang.org/x/oauth2", "clouds", "the rest knows Docker's helpers by name"},
	{"github.com/google/go-containerregistry", "contexts", "images are BuildKit's to push"},
	{"github.com/openfaas/go-sdk", "sealed", "the envelope is its only part that belongs in the function"},
	{"github.com/openfaas/templates-sdk", "server", "the plain endpoints are its only use"},
	{"github.com/prometheus/", "metrics", "the rest counts without knowing who scrapes"},
	{"archive/tar", "payload", "one parser, so that no two can disagree about a signed tar"},
	{"crypto/hmac", "signature", "elsewhere it derives keys; nobody else signs"},
}

var exceptions = map[string][]string{
	"github.com/docker/go-units":                       {".", "buildkit"},
	"github.com/google/go-containerregistry/pkg/authn": {"."},
	"crypto/hmac": {"buildkit", "isolation", "payload"},
}

// TestImports reads every Go file that is not a test.
func TestImports(t *testing.T) {
	seen := make(map[string]bool)
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		pkg := filepath.ToSlash(filepath.Dir(path))
		seen[pkg] = true
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range file.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if ours, ok := strings.CutPrefix(name, module+"/"); ok {
				if !slices.Contains(imports[pkg], ours) {
					t.Errorf("%s imports %s, which %s may not", path, name, pkg)
				}
				continue
			}
			for _, r := range reserved {
				if strings.HasPrefix(name, r.module) && pkg != r.by && !strings.HasPrefix(pkg, r.by+"/") && !slices.Contains(exceptions[name], pkg) {
					t.Errorf("%s imports %s, which only %s may: %s", path, name, r.by, r.why)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for pkg := range imports {
		if !seen[pkg] {
			t.Errorf("the table names %s, which is not there", pkg)
		}
	}
}

// TestPackageDocs wants one package comment, in one file, for each package.
func TestPackageDocs(t *testing.T) {
	docs := make(map[string]int)
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		docs[filepath.Dir(path)] += 0
		if file.Doc != nil {
			docs[filepath.Dir(path)]++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(docs) < 10 {
		t.Errorf("only %d packages found", len(docs))
	}
	for pkg, n := range docs {
		if n != 1 {
			t.Errorf("%s has %d package comments", pkg, n)
		}
	}
}
