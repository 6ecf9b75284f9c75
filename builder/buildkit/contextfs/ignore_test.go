package contextfs

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"handler/function/api"
)

func TestCheckSent(t *testing.T) {
	odd := func(files map[string]string) *memory {
		m := &memory{}
		for _, dir := range []string{"run", "fixtures", "d\xff", "docker"} {
			m.add(dir+"/", 0o755, "")
		}
		m.add("run/agent", 0o644|fs.ModeNamedPipe, "")
		m.add("fixtures/caf\xe9", 0o644, "x")
		m.add("fixtures/plain", 0o644, "x")
		m.add("fixtures/link -> caf\xe9", 0, "")
		m.add("d\xff/f", 0o644, "x")
		m.add("disk", 0o644|fs.ModeDevice, "")
		for name, content := range files {
			m.add(name, 0o644, content)
		}
		return m
	}
	// Every odd entry, left out.
	const all = "run\nfixtures/caf*\n**/link\nd?\ndisk\n"
	for _, tt := range []struct {
		name       string
		files      map[string]string
		dockerfile string
		want       string // of the error, "" for none
	}{
		{"no .dockerignore", nil, "", `"context/disk": a device`},
		{"an empty one", map[string]string{".dockerignore": ""}, "", `"context/disk": a device`},
		{"all", map[string]string{".dockerignore": all}, "", ""},
		{"a byte order mark and comments", map[string]string{".dockerignore": "\ufeff/run/\r\n# x\n" + strings.TrimPrefix(all, "run\n")}, "", ""},
		{"all but a FIFO", map[string]string{".dockerignore": strings.Replace(all, "run", "ran", 1)}, "", `"context/run/agent": a FIFO`},
		{"all but a name", map[string]string{".dockerignore": strings.Replace(all, "fixtures/caf*", "", 1)}, "", `"context/fixtures/caf\xe9": a path that is not UTF-8`},
		{"all but a link", map[string]string{".dockerignore": strings.Replace(all, "**/link", "", 1)}, "", `"context/fixtures/link": a symlink to a path that is not UTF-8`},
		{"all but a directory", map[string]string{".dockerignore": strings.Replace(all, "d?", "d?/*", 1)}, "", `"context/d\xff": a path that is not UTF-8`},
		{"an exception", map[string]string{".dockerignore": all + "!run/agent\n"}, "", `"context/run/agent": a FIFO`},
		{"an exception of something else", map[string]string{".dockerignore": all + "!run/other\n"}, "", ""},
		{"everything but one", map[string]string{".dockerignore": "*\n!fixtures/plain\n"}, "", ""},
		{"the Dockerfile's own", map[string]string{"Dockerfile.dockerignore": all}, "", ""},
		{"the Dockerfile's own comes first", map[string]string{"Dockerfile.dockerignore": all, ".dockerignore": ""}, "", ""},
		{"an empty one of the Dockerfile comes first", map[string]string{"Dockerfile.dockerignore": "", ".dockerignore": all}, "", "a device, and Dockerfile.dockerignore does not"},
		{"another Dockerfile's", map[string]string{"docker/prod.dockerignore": all, ".dockerignore": ""}, "docker/prod", ""},
		{"another Dockerfile's is not asked", map[string]string{"docker/prod.dockerignore": all}, "", "a device, and .dockerignore does not"},
		{"of another Dockerfile without one", map[string]string{".dockerignore": all}, "docker/prod", ""},
		{"a bad pattern is the frontend's to refuse", map[string]string{".dockerignore": "[\n"}, "", ""},
	} {
		f := New(odd(tt.files))
		err := f.CheckSent(t.Context(), tt.dockerfile)
		if tt.want == "" {
			if err != nil {
				t.Errorf("%s: %v", tt.name, err)
			}
		} else if err == nil || api.AsError(err).Code != api.BadTar || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), ".dockerignore") {
			t.Errorf("%s: %v, want %s", tt.name, err, tt.want)
		}

		// Whatever CheckSent found, no odd entry is sent.
		dir := t.TempDir()
		if err := transfer(t, f, dir); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		var names []string
		filepath.WalkDir(dir, func(p string, d fs.DirEntry, _ error) error {
			if !d.IsDir() {
				names = append(names, strings.TrimPrefix(p, dir+"/"))
			}
			return nil
		})
		if len(names) != 1+len(tt.files) {
			t.Errorf("%s: %q were sent", tt.name, names)
		}
	}
	if err := New(sample()).CheckSent(t.Context(), ""); err != nil {
		t.Error(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := New(odd(nil)).CheckSent(ended, ""); err != nil {
		t.Error(err)
	}
}

// TestIgnoreThroughLinks: the file may be a symlink, and so may a directory above it.
func TestIgnoreThroughLinks(t *testing.T) {
	m := &memory{}
	m.add("real/", 0o755, "")
	m.add("real/list", 0o644, "fifo\n")
	m.add("dir -> real/../real", 0, "")
	m.add(".dockerignore -> /dir/list", 0, "")
	m.add("fifo", 0o644|fs.ModeNamedPipe, "")
	if err := New(m).CheckSent(t.Context(), ""); err != nil {
		t.Error(err)
	}
	m = &memory{}
	m.add(".dockerignore -> ../../loop", 0, "")
	m.add("loop -> .dockerignore", 0, "")
	m.add("fifo", 0o644|fs.ModeNamedPipe, "")
	if err := New(m).CheckSent(t.Context(), ""); err == nil {
		t.Error("a loop of symlinks leaves something out")
	}
}

// TestHardLinkToOdd: a file that is sent may be a hard link to one whose name cannot be.
func TestHardLinkToOdd(t *testing.T) {
	m := &memory{}
	m.add("a\xff", 0o644, "content")
	m.add("b => a\xff", 0o644, "")
	m.add("c => a\xff", 0o644, "")
	dir := t.TempDir()
	if err := transfer(t, New(m), dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"b", "c"} {
		if data, err := os.ReadFile(filepath.Join(dir, name)); string(data) != "content" || err != nil {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
}

// TestSolveRefusesOdd: no daemon is asked before.

// TestLargeIgnore does not read an ignore file over its limit, and then refuses a FIFO.
func TestLargeIgnore(t *testing.T) {
	for size, refused := range map[int]bool{maxIgnore: false, maxIgnore + 1: true} {
		m := new(memory)
		m.add("fifo", 0o644|fs.ModeNamedPipe, "")
		m.add(".dockerignore", 0o644, "fifo\n#"+strings.Repeat("x", size-6))
		f := New(m)
		err := f.CheckSent(t.Context(), "")
		if refused != (err != nil) || refused && !strings.Contains(err.Error(), `"context/fifo"`) {
			t.Errorf("%d bytes: %v", size, err)
		}
		f.Close()
	}
}
