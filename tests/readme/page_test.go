package readme

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// root is the repository.
const root = "../.."

// all returns every page, by its path.
func all(t *testing.T) map[string]*Page {
	t.Helper()
	list, err := Pages(root)
	if err != nil {
		t.Fatal(err)
	}
	pages := make(map[string]*Page)
	for _, p := range list {
		pages[p.Path] = p
	}
	for _, path := range []string{
		"README.md", "builder/README.md", "builder/API.md", "builder/CONFIGURATION.md", "builder/DEPLOY.md",
		"buildkit/README.md", "template/README.md", "tests/README.md",
	} {
		if pages[path] == nil {
			t.Fatalf("%s is missing", path)
		}
	}
	return pages
}

// tables returns the tables of a page that have this header. There is one at least.
func tables(t *testing.T, path string, header ...string) []Table {
	t.Helper()
	var found []Table
	for _, table := range all(t)[path].Tables {
		if slices.Equal(table.Header, header) {
			found = append(found, table)
		}
	}
	if len(found) == 0 {
		t.Fatalf("%s has no table of %q", path, header)
	}
	for _, table := range found {
		for _, row := range table.Rows {
			if len(row) != len(header) {
				t.Fatalf("%s: a row of %d cells, want %d: %q", path, len(row), len(header), row)
			}
		}
	}
	return found
}

func TestParse(t *testing.T) {
	got, err := Parse("a.md", "# A `b`\n\n- [c](#d) and [`e`](f.md#g), `[h](i)`\n\n## D/e, f\n\n| k | |\n| --- | --- |\n| `l` | m `n` |\n\n```bash\n# no heading\n[o](p)\n```\n\n## D/e, f\n[q](r)\n")
	if err != nil {
		t.Fatal(err)
	}
	want := &Page{
		Path:     "a.md",
		Lines:    17,
		Headings: []Heading{{1, "a-b"}, {2, "de-f"}, {2, "de-f-1"}},
		Tables:   []Table{{"de-f", []string{"k", ""}, [][]string{{"`l`", "m `n`"}}}},
		Spans:    []string{"b", "e", "[h](i)", "l", "n"},
		Links:    []Link{{"#d", ""}, {"f.md#g", ""}, {"r", "de-f-1"}},
		Blocks:   []Block{{"bash", "# no heading\n[o](p)\n"}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if _, err := Parse("a.md", "```bash\n"); err == nil {
		t.Error("a block without an end is no error")
	}
}

// TestLength keeps README.md a first page.
func TestLength(t *testing.T) {
	const most = 150
	if n := all(t)["README.md"].Lines; n > most {
		t.Errorf("README.md has %d lines, over %d", n, most)
	}
}

// TestContents has a list of its parts at the beginning of every long page.
func TestContents(t *testing.T) {
	const short = 150 // lines
	for path, page := range all(t) {
		if page.Lines <= short {
			continue
		}
		for _, h := range page.Headings {
			if h.Level == 2 && !slices.Contains(page.Links, Link{Target: "#" + h.Anchor}) {
				t.Errorf("%s: its contents lack #%s", path, h.Anchor)
			}
		}
	}
}

// TestLinks follows every link that does not leave the repository.
func TestLinks(t *testing.T) {
	pages := all(t)
	followed := 0
	for path, page := range pages {
		for _, l := range page.Links {
			if strings.Contains(l.Target, "://") {
				continue
			}
			followed++
			file, anchor, hasAnchor := strings.Cut(l.Target, "#")
			target := path
			if file != "" {
				target = filepath.ToSlash(filepath.Join(filepath.Dir(path), file))
			}
			info, err := os.Stat(filepath.Join(root, target))
			if err != nil {
				t.Errorf("%s: %s leads nowhere: %v", path, l.Target, err)
				continue
			}
			if info.IsDir() {
				target += "/README.md"
			}
			if !hasAnchor {
				continue
			}
			if pages[target] == nil || !slices.ContainsFunc(pages[target].Headings, func(h Heading) bool { return h.Anchor == anchor }) {
				t.Errorf("%s: %s leads to no heading", path, l.Target)
			}
		}
	}
	if followed < 50 {
		t.Errorf("only %d links found", followed)
	}
}

var (
	targetLine = regexp.MustCompile(`(?m)^([a-z0-9-]+):`)
	// A command of make, in code: its target, and the variables after it.
	makeCommand = regexp.MustCompile(`(?m)(?:^ *|&& |[A-Z]=\S* )make ([a-z][a-z0-9-]*)((?: [A-Z_]+=\S*)*)`)
	makeSetting = regexp.MustCompile(`([A-Z_]+)=`)
)

// TestMake has every command of make in the pages in the Makefile, and its variables
// there or in a script that it starts.
func TestMake(t *testing.T) {
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	var targets []string
	for _, m := range targetLine.FindAllStringSubmatch(string(makefile), -1) {
		targets = append(targets, m[1])
	}
	text := string(makefile)
	for _, pattern := range []string{"buildkit/*.sh", "tests/*.sh"} {
		scripts, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil || len(scripts) == 0 {
			t.Fatalf("looking for scripts: %q, %v", scripts, err)
		}
		for _, script := range scripts {
			content, err := os.ReadFile(script)
			if err != nil {
				t.Fatal(err)
			}
			text += string(content)
		}
	}
	found := 0
	for path, page := range all(t) {
		code := slices.Clone(page.Spans)
		for _, b := range page.Blocks {
			if b.Language == "bash" {
				code = append(code, b.Text)
			}
		}
		for _, m := range makeCommand.FindAllStringSubmatch(strings.Join(code, "\n"), -1) {
			found++
			if !slices.Contains(targets, m[1]) {
				t.Errorf("%s: make has no target %s", path, m[1])
			}
			for _, v := range makeSetting.FindAllStringSubmatch(m[2], -1) {
				if !regexp.MustCompile(`\b` + v[1] + `\b`).MatchString(text) {
					t.Errorf("%s: make %s: nothing reads %s", path, m[1], v[1])
				}
			}
		}
	}
	if found < 20 {
		t.Errorf("only %d commands of make found", found)
	}
}

// TestDirectories has every directory of tests/ in the table of tests/README.md. The data of
// tests is not listed, and each command has a row of its own.
func TestDirectories(t *testing.T) {
	const page = "tests/README.md"
	var there, named []string
	for _, pattern := range []string{"*", "cmd/*"} {
		paths, err := filepath.Glob(filepath.Join(root, "tests", pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			name, err := filepath.Rel(filepath.Join(root, "tests"), path)
			if err != nil {
				t.Fatal(err)
			}
			if info.IsDir() && name != "cmd" && name != "testdata" {
				there = append(there, filepath.ToSlash(name))
			}
		}
	}
	for _, row := range tables(t, page, "", "")[0].Rows {
		for _, word := range Words(row[0]) {
			if !strings.Contains(word, ".") {
				named = append(named, strings.TrimSuffix(word, "/"))
			}
		}
	}
	same(t, "directory", page, there, named)
}
