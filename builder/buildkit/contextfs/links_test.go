package contextfs

import (
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tonistiigi/fsutil"

	"handler/function/payload"
)

// chain is n symlinks, each of which leads to the next and adds more to the path, and a file.
func chain(n int, more string) *memory {
	m := new(memory)
	for i := range n {
		m.add(fmt.Sprintf("s%05d -> s%05d%s", i, i+1, more), 0, "")
	}
	m.add(fmt.Sprintf("s%05d", n), 0o644, "x")
	return m
}

// patterns are n patterns that match all symlinks of TestFilter, and are not alike.
func patterns(n int) (list []string) {
	for i := range n {
		list = append(list, "l"+strings.Repeat("*", i+1))
	}
	return list
}

// TestFilter refuses what would take fsutil too long, and nothing that a context has in practice.
func TestFilter(t *testing.T) {
	wide := &memory{}
	for i := range 2000 {
		wide.entries = append(wide.entries, payload.Entry{Path: fmt.Sprintf("l%04d", i), Mode: 0o777 | fs.ModeSymlink, Linkname: "l0000"})
	}
	lengthy := new(memory)
	for i := range 1000 {
		target := fmt.Sprintf("%d/%s", i, strings.Repeat("x", maxPath-10))
		lengthy.entries = append(lengthy.entries, payload.Entry{Path: fmt.Sprintf("l%04d", i), Mode: 0o777 | fs.ModeSymlink, Linkname: target})
	}
	large := new(memory)
	large.entries = append(large.entries, payload.Entry{Path: "d", Mode: 0o755 | fs.ModeDir})
	for i := range 20_000 {
		large.entries = append(large.entries, payload.Entry{Path: fmt.Sprintf("d/%05d", i), Mode: 0o644})
	}
	long := new(memory)
	long.add("a -> "+strings.Repeat("x/", maxPath/2-1)+"b", 0, "")
	longer := new(memory)
	longer.add("a -> "+strings.Repeat("x/", maxPath/2+1), 0, "")
	circle := new(memory)
	for _, link := range []string{"a -> b/x", "b -> a/y", "c -> c", "d -> d/d"} {
		circle.add(link, 0, "")
	}
	for _, tt := range []struct {
		name    string
		m       *memory
		paths   []string
		refused string
	}{
		{"nothing", sample(), nil, ""},
		{"files, links and patterns", sample(), []string{"Dockerfile", "*", "*/*", "none/x", "/", ".", "a\\*"}, ""},
		{"a chain", chain(200, ""), []string{"s00000"}, ""},
		{"the end of a long chain", chain(400, ""), []string{"s00390"}, ""},
		{"a long chain", chain(400, ""), []string{"Dockerfile", "s00000"}, "too many symlinks"},
		{"a long chain by a pattern", chain(400, ""), []string{"s00000*"}, "too many symlinks"},
		{"a chain that grows", chain(25_000, "/x"), []string{"s00000"}, "too many symlinks"},
		{"a chain that grows fast", chain(250, "/"+strings.Repeat("x/", 1000)), []string{"s00000"}, "over 4096 bytes"},
		{"a long path", long, []string{"a"}, ""},
		{"a longer path", longer, []string{"a"}, "over 4096 bytes"},
		{"circles", circle, []string{"a", "b", "c", "d", "c/x", "*"}, ""},
		{"many to one", wide, []string{"*", "l*"}, ""},
		{"many patterns", wide, slices.Repeat([]string{"*z"}, maxSteps/2000+1), "match too many entries"},
		{"many results", wide, patterns(maxResolved/2000 + 1), "too many symlinks match"},
		{"long results", lengthy, patterns(5), "too many symlinks match"},
		{"a long path of the Dockerfile", sample(), []string{strings.Repeat("x/", maxPath)}, "over 4096 bytes"},
		{"patterns beside a large directory", large, slices.Repeat([]string{"*.json"}, 1000), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := New(tt.m)
			defer f.Close()
			start := time.Now()
			err := f.Filter("context", &fsutil.FilterOpt{FollowPaths: tt.paths})
			if took := time.Since(start); took > time.Minute {
				t.Errorf("it took %v", took)
			}
			if refused := f.Refused(); refused != err && (err != nil || refused != nil) {
				t.Errorf("refused %v, and said %v", refused, err)
			}
			if tt.refused != "" {
				if err == nil || !strings.Contains(err.Error(), tt.refused) {
					t.Errorf("got %v, want %q", err, tt.refused)
				}
				return
			}
			if err != nil {
				t.Error(err)
			}
			if _, err := fsutil.FollowLinks(f, tt.paths); err != nil {
				t.Errorf("fsutil: %v", err)
			}
		})
	}
}
