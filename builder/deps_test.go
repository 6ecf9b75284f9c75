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

// imports says which of our packages each package may import. Data flows one way: request,
// verified payload, solve, records, reply. A package that is not here may import none of ours.
var imports = map[string][]string{
	".":        {"api", "buildconfig", "buildkit", "contexts", "hosts", "payload", "records", "records/jetstream", "records/memory", "redact", "registry", "repository", "server", "signature", "tenants"},
	"server":   {"api", "budget", "buildconfig", "fair", "isolation", "metrics", "page", "payload", "records", "redact", "reply", "sealed", "signature", "solve", "tenants"},
	"buildkit": {"api", "buildconfig", "buildkit/contextfs", "buildkit/pool", "buildkit/report", "buildkit/sources", "redact", "registry", "repository", "solve"},

	"cmd/tenant-forget": {"owned", "records/jetstream", "registry", "signature", "tenants"},

	"buildkit/contextfs": {"api", "payload"},
	"buildkit/pool":      {"api", "buildkit/report", "hosts", "placement", "solve"},
	"buildkit/report":    {"api", "redact", "solve"},
	"buildkit/sources":   {"api", "buildconfig", "hosts", "redact", "registry", "repository", "solve"},

	"records/jetstream":   {"api", "records", "records/batch"},
	"records/memory":      {"api", "records", "records/batch"},
	"records/recordstest": {"api", "records"},

	"solve":       {"buildconfig", "payload", "redact"},
	"metrics":     {"api", "records", "solve"},
	"reply":       {"api"},
	"payload":     {"api", "budget"},
	"buildconfig": {"api", "hosts", "repository"},
	"repository":  {"hosts"},
	"tenants":     {"api", "buildconfig", "hosts", "repository", "signature"},
	"sealed":      {"api"},
	"records":     {"api", "records/batch"},
	"registry":    {"api", "clouds", "hosts", "redact"},
	"contexts":    {"api", "owned"},
	"owned":       {"hosts"},
}

// reserved are prefixes of import paths that only some packages may import, and why. Of several
// prefixes of one path, the longest counts. "buildkit/..." is buildkit and every package below
// it.
var reserved = []struct {
	prefix string
	by     []string
	why    string
}{
	{"github.com/moby/buildkit", []string{"buildkit/..."}, "everything else can be read and tested without a daemon in mind"},
	{"github.com/tonistiigi/fsutil", []string{"buildkit", "buildkit/contextfs"}, "it is BuildKit's wire format"},
	{"github.com/moby/patternmatcher", []string{"buildkit/contextfs"}, "BuildKit decides what .dockerignore means"},
	{"google.golang.org/grpc", []string{"buildkit/..."}, "it is BuildKit's transport"},
	{"github.com/docker/", []string{"registry"}, "credentials are read in one place"},
	{"github.com/docker/go-units", []string{".", "tenants"}, "only the configuration and the file of tenants have sizes"},
	{"github.com/aws/", []string{"clouds"}, "the rest knows Docker's helpers by name"},
	{"github.com/awslabs/", []string{"clouds"}, "the rest knows Docker's helpers by name"},
	{"github.com/Azure/", []string{"clouds"}, "the rest knows Docker's helpers by name"},
	{"cloud.google.com/", []string{"clouds"}, "the rest knows Docker's helpers by name"},
	{"golang.org/x/oauth2", []string{"clouds"}, "the rest knows Docker's helpers by name"},
	{"github.com/google/go-containerregistry", []string{"contexts", "owned"}, "BuildKit pushes images"},
	{"github.com/google/go-containerregistry/pkg/authn", []string{"contexts", "owned", "registry"}, "it has the form of a login in which owned asks and registry answers"},
	{"github.com/nats-io/", []string{"records/jetstream"}, "everything else knows a store of records"},
	{"github.com/openfaas/go-sdk", []string{"sealed"}, "only its envelope of secrets belongs in the function"},
	{"github.com/openfaas/templates-sdk", []string{"server"}, "it has the form of a handler of small answers"},
	{"github.com/prometheus/", []string{"metrics"}, "the rest counts without knowing who scrapes"},
	{"go.yaml.in/yaml", []string{"tenants"}, "only the file of tenants is YAML"},
	{"archive/tar", []string{"payload"}, "two parsers could disagree about a signed tar"},
	{"crypto/hmac", []string{"signature", "isolation", "payload"}, "only signature signs; the others derive keys"},
}

// matches says whether a package is one of those that by names.
func matches(by, pkg string) bool {
	if parent, ok := strings.CutSuffix(by, "/..."); ok {
		return pkg == parent || strings.HasPrefix(pkg, parent+"/")
	}
	return pkg == by
}

// reservedFor returns the index in reserved of the longest prefix of an import path, or -1.
func reservedFor(path string) int {
	found := -1
	for i, r := range reserved {
		if strings.HasPrefix(path, r.prefix) && (found < 0 || len(r.prefix) > len(reserved[found].prefix)) {
			found = i
		}
	}
	return found
}

// TestImports reads every Go file that is not a test. It fails on an import that the tables
// forbid, and on an entry of the tables that no package uses.
func TestImports(t *testing.T) {
	used := make(map[string]bool) // "package import" of imports, and "prefix by" of reserved
	for path, names := range importsOfFiles(t) {
		pkg := filepath.ToSlash(filepath.Dir(path))
		for _, name := range names {
			if ours, ok := strings.CutPrefix(name, module+"/"); ok {
				if !slices.Contains(imports[pkg], ours) {
					t.Errorf("%s imports %s, which %s may not", path, name, pkg)
				}
				used[pkg+" "+ours] = true
				continue
			}
			i := reservedFor(name)
			if i < 0 {
				continue
			}
			r := reserved[i]
			allowed := false
			for _, by := range r.by {
				if matches(by, pkg) {
					allowed = true
					used[r.prefix+" "+by] = true
				}
			}
			if !allowed {
				t.Errorf("%s imports %s, which only %s may: %s", path, name, strings.Join(r.by, ", "), r.why)
			}
		}
	}
	for pkg, list := range imports {
		if len(list) == 0 {
			t.Errorf("imports has %s without an import", pkg)
		}
		for _, ours := range list {
			if !used[pkg+" "+ours] {
				t.Errorf("imports lets %s import %s, which it does not", pkg, ours)
			}
		}
	}
	for _, r := range reserved {
		for _, by := range r.by {
			if !used[r.prefix+" "+by] {
				t.Errorf("reserved lets %s import %s, which it does not", by, r.prefix)
			}
		}
	}
}

// importsOfFiles returns the import paths of every Go file that is not a test, by its path.
func importsOfFiles(t *testing.T) map[string][]string {
	t.Helper()
	all := make(map[string][]string)
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range file.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			all[path] = append(all[path], name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestTables tries what TestImports relies on.
func TestTables(t *testing.T) {
	for _, tt := range []struct {
		by, pkg string
		want    bool
	}{
		{"buildkit", "buildkit", true},
		{"buildkit", "buildkit/pool", false},
		{"buildkit/...", "buildkit", true},
		{"buildkit/...", "buildkit/pool", true},
		{"buildkit/...", "buildkits", false},
		{".", "server", false},
	} {
		if got := matches(tt.by, tt.pkg); got != tt.want {
			t.Errorf("%s matches %s: %v, want %v", tt.by, tt.pkg, got, tt.want)
		}
	}
	for path, want := range map[string]string{
		"github.com/docker/go-units":          "github.com/docker/go-units",
		"github.com/docker/cli/cli/config":    "github.com/docker/",
		"github.com/moby/buildkit/client/llb": "github.com/moby/buildkit",
		"github.com/distribution/reference":   "",
	} {
		got := ""
		if i := reservedFor(path); i >= 0 {
			got = reserved[i].prefix
		}
		if got != want {
			t.Errorf("%s is reserved by the prefix %q, want %q", path, got, want)
		}
	}
}

// TestPackageDocs wants exactly one package comment for each package.
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
