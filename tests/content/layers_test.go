package content_test

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"handler/function/tests/stack"
)

// tree writes a context of everything that a file system has and an image can
// hold into dir.
func tree(t *testing.T, dir string) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// Directories get their modes and times last: writing into them changes those.
	type directory struct {
		path string
		mode fs.FileMode
		time time.Time
	}
	var dirs []directory
	mkdir := func(name string, mode fs.FileMode, at time.Time) {
		t.Helper()
		p := filepath.Join(dir, name)
		check(os.MkdirAll(p, 0o755))
		dirs = append(dirs, directory{p, mode, at})
	}
	write := func(name, text string, mode fs.FileMode, at time.Time) {
		t.Helper()
		p := filepath.Join(dir, name)
		check(os.MkdirAll(filepath.Dir(p), 0o755))
		check(os.WriteFile(p, []byte(text), 0o600))
		check(os.Chmod(p, mode))
		check(os.Chtimes(p, at, at))
	}
	symlink := func(target, name string, at time.Time) {
		t.Helper()
		p := filepath.Join(dir, name)
		check(os.MkdirAll(filepath.Dir(p), 0o755))
		check(os.Symlink(target, p))
		ts, err := unix.TimeToTimespec(at)
		check(err)
		check(unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
	}
	link := func(target, name string) {
		t.Helper()
		p := filepath.Join(dir, name)
		check(os.MkdirAll(filepath.Dir(p), 0o755))
		check(os.Link(filepath.Join(dir, target), p))
	}

	// Times.
	write("times/whole", "x", 0o644, longAgo)
	write("times/nano", "x", 0o644, longAgo.Add(123_456_789))
	write("times/almost", "x", 0o644, longAgo.Add(999_999_999))
	write("times/equal-1", "1", 0o644, longAgo.Add(5))
	write("times/equal-2", "2", 0o644, longAgo.Add(5))
	write("times/epoch", "x", 0o644, time.Unix(0, 0))
	write("times/before", "x", 0o644, time.Unix(-5, 250_000_000))
	write("times/late", "x", 0o644, time.Unix(4_200_000_000, 1))
	mkdir("times", 0o755, longAgo.Add(999_999_999))

	// Modes.
	for _, mode := range []fs.FileMode{0, 0o400, 0o644, 0o664, 0o755, 0o777, 0o111} {
		write(fmt.Sprintf("modes/%04o", mode), "x", mode, longAgo)
	}
	write("modes/setuid", "x", 0o755|fs.ModeSetuid, longAgo)
	write("modes/setgid", "x", 0o755|fs.ModeSetgid, longAgo)
	write("modes/sticky", "x", 0o644|fs.ModeSticky, longAgo)
	write("modes/all", "x", 0o777|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky, longAgo)
	mkdir("modes/closed", 0o700, longAgo)
	mkdir("modes/setgid-dir", 0o775|fs.ModeSetgid, longAgo)
	mkdir("modes/tmp", 0o777|fs.ModeSticky, longAgo)

	// Links.
	write("links/real", "real", 0o644, longAgo)
	symlink("real", "links/to-real", longAgo.Add(7))
	symlink("nowhere", "links/dangling", longAgo)
	symlink("self", "links/self", longAgo)
	symlink("b", "links/a", longAgo)
	symlink("a", "links/b", longAgo)
	symlink("/etc/passwd", "links/absolute", longAgo)
	symlink("../../../../etc/passwd", "links/up", longAgo)
	symlink("..", "links/parent", longAgo)
	symlink("sub", "links/dir", longAgo)
	symlink("with space \u00e9\n", "links/odd", longAgo)
	symlink(strings.Repeat("t/", 150)+"end", "links/long", longAgo)
	write("links/m-hard", "hard", 0o640, longAgo.Add(11))
	link("links/m-hard", "links/a-hard")
	link("links/m-hard", "links/z-hard")
	link("links/m-hard", "links/sub/hard")
	link("links/m-hard", "aa/hard")
	write("links/void", "", 0o644, longAgo)
	link("links/void", "links/void-too")

	// Names.
	for _, name := range []string{
		" leading", "trailing ", "a b", "tab\there", "new\nline", "-rf", "--help", ".hidden", "...", "#hash", "%41", "*", "a*b?[c]",
		"'quote\"", "$HOME", "`x`", "a:b", "a=b", "\u00e9", "e\u0301", "\u65e5\u672c\u8a9e", "\U0001f40b", "\u202eevil", "CON", "sub.d", "sub-d", "sub", "sub d",
		strings.Repeat("n", 100), strings.Repeat("n", 101), strings.Repeat("n", 255), strings.Repeat("\u00e9", 127),
	} {
		if strings.HasPrefix(name, "sub") {
			write("names/"+name+"/inside", name, 0o644, longAgo) // '/' sorts before all else
			continue
		}
		write("names/"+name, name, 0o644, longAgo)
	}
	deep := strings.Repeat("a-directory-of-thirty-letters/", 12)
	write("names/"+deep+"file", "deep", 0o644, longAgo)
	link("names/"+deep+"file", "names/"+deep+"same")

	// Sizes.
	mkdir("sizes/empty/empty/empty", 0o755, longAgo.Add(1))
	for _, n := range []int{0, 1, 511, 512, 513, 4096, 32<<10 - 1, 32 << 10, 32<<10 + 1} {
		write(fmt.Sprintf("sizes/%d", n), strings.Repeat("x", n), 0o644, longAgo)
	}
	big := make([]byte, 9<<20+1)
	rand.Read(big)
	write("sizes/big", string(big), 0o644, longAgo)

	// What is left out, and what is not.
	write(".dockerignore", "# a comment\n*.log\n!keep.log\nignored/**\n!ignored/deep/kept\n**/*.tmp\n!**/keep.tmp\nlinks/up\n/names/sub.d\nempty-ignored\n!links\n", 0o644, longAgo)
	for _, name := range []string{"a.log", "keep.log", "ignored/x", "ignored/deep/x", "ignored/deep/kept", "x.tmp", "sub/x.tmp", "sub/keep.tmp", "sub/a.log"} {
		write(name, name, 0o644, longAgo)
	}
	mkdir("empty-ignored", 0o755, longAgo)

	check(filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && !slices.ContainsFunc(dirs, func(x directory) bool { return x.path == p }) {
			dirs = append(dirs, directory{p, 0o755, longAgo.Add(42)})
		}
		return err
	}))
	slices.SortFunc(dirs, func(a, b directory) int { return strings.Compare(b.path, a.path) })
	for _, d := range dirs {
		check(os.Chmod(d.path, d.mode))
		check(os.Chtimes(d.path, d.time, d.time))
	}
}

// gnuTar packs parent/context and the config with GNU tar. list, if not nil, is
// the order of the names; tar follows it to the letter.
func gnuTar(t *testing.T, parent string, c config, list []string) []byte {
	t.Helper()
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(parent, "com.openfaas.docker.config"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "tar", "--format=posix", "-C", parent, "-cf", "-", ".")
	if list != nil {
		cmd = exec.CommandContext(t.Context(), "tar", "--format=posix", "-C", parent, "--no-recursion", "--null", "--verbatim-files-from", "--files-from=-", "-cf", "-")
		cmd.Stdin = strings.NewReader(strings.Join(list, "\x00") + "\x00")
	}
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("packing with tar: %v\n%s", err, errs.String())
	}
	return out
}

// TestLayers builds one directory with buildctl and, packed by tar, with the
// function, both without a cache. Every layer has the same digest.
func TestLayers(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	parent := t.TempDir()
	dir := filepath.Join(parent, "context")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	tree(t, dir)
	var reversed []string
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(parent, p)
		reversed = append(reversed, rel)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	reversed = append(reversed, "com.openfaas.docker.config", "context/Dockerfile")
	slices.Reverse(reversed)

	for i, tt := range []struct{ name, dockerfile string }{
		{"all", "FROM scratch\nCOPY . /\n"},
		{"directories", "FROM scratch\nCOPY links /\nCOPY names /\nCOPY times /\nCOPY modes /\nCOPY sizes /\n"},
		{"single files", "FROM scratch\nCOPY times/nano times/almost links/a-hard names/-rf /\nCOPY links/z-hard /hard\nCOPY [\"names/a b\", \"names/\u65e5\u672c\u8a9e\", \"/\"]\nCOPY modes/setuid modes/all sizes/big /\n"},
		{"wildcards", "FROM scratch\nCOPY *.log /\nCOPY names/*b* /\nCOPY links/*hard /\nCOPY modes/0[46]* /\n"},
		{"through symlinks", "FROM scratch\nCOPY links/to-real /\nCOPY links/dir/hard /\nCOPY links/dir /\n"},
		{"changed on the way", "FROM scratch\nCOPY --chown=7:8 times /\nCOPY --chmod=0640 modes /\nCOPY --link sizes/513 /\nCOPY --exclude=*hard links /\n"},
		{"two stages", "FROM scratch AS one\nCOPY links /\nFROM scratch\nCOPY --from=one /a-hard /z-hard /to-real /\nCOPY --from=one / /\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(tt.dockerfile), 0o644); err != nil {
				t.Fatal(err)
			}
			for _, p := range []string{filepath.Join(dir, "Dockerfile"), dir} {
				if err := os.Chtimes(p, longAgo, longAgo); err != nil {
					t.Fatal(err)
				}
			}
			// A directory on the daemon that files were synced to before may have the
			// time of that.
			if out, err := s.Buildkitd.Buildctl(ctx, "prune", "--filter=type==source.local").CombinedOutput(); err != nil {
				t.Fatalf("pruning: %v\n%s", err, out)
			}
			ref := s.Registry.Image(fmt.Sprintf("layers%d:buildctl", i))
			out, err := s.Buildkitd.Buildctl(ctx, "build", "--no-cache", "--frontend=dockerfile.v0",
				"--local=context="+dir, "--local=dockerfile="+dir, "--output=type=image,push=true,compression=gzip,compression-level=1,name="+ref).CombinedOutput()
			if err != nil {
				t.Fatalf("building with buildctl: %v\n%s", err, out)
			}
			want := stack.MustPull(t, ctx, ref)
			for _, order := range []string{"in tar's order", "backwards"} {
				var list []string
				if order == "backwards" {
					list = reversed
				}
				c := config{"image": s.Registry.Image(fmt.Sprintf("layers%d:function", i)), "noCache": true}
				built := f.MustBuild(t, ctx, gnuTar(t, parent, c, list))
				if log := strings.Join(built.Log, "\n"); strings.Contains(log, "CACHED") {
					t.Errorf("%s: not built anew:\n%s", order, log)
				}
				got, err := pull(ctx, built)
				if err != nil {
					t.Fatal(err)
				}
				compareLayers(t, order, got, want)
			}
		})
	}
	// The tree was there to be copied: a .dockerignore that leaves out all would
	// give equal layers too.
	img := stack.MustPull(t, ctx, s.Registry.Image("layers0:function"))
	files := stack.MustFiles(t, img)
	for path, want := range map[string]bool{
		"keep.log": true, "a.log": false, "sub/a.log": true, "ignored/x": false, "ignored/deep/kept": true, "ignored/deep/x": false,
		"x.tmp": false, "sub/x.tmp": false, "sub/keep.tmp": true, "empty-ignored": false, "names/sub.d": false, "names/sub/inside": true,
		"links/dangling": true, "links/self": true, "sizes/empty/empty/empty": true, "modes/all": true,
	} {
		if _, ok := files[path]; ok != want {
			t.Errorf("%s is in the image: %v, want %v", path, ok, want)
		}
	}
	if h := files["modes/all"]; h != nil && h.Mode&0o7777 != 0o7777 {
		t.Errorf("modes/all has mode %o", h.Mode)
	}
	if h := files["links/z-hard"]; h == nil || h.Typeflag != tar.TypeLink {
		t.Errorf("links/z-hard is %+v, want a hard link", h)
	}
}

func compareLayers(t *testing.T, what string, got, want v1.Image) {
	t.Helper()
	g, err := got.Layers()
	if err != nil {
		t.Fatal(err)
	}
	w, err := want.Layers()
	if err != nil {
		t.Fatal(err)
	}
	if len(g) != len(w) || len(g) == 0 {
		t.Fatalf("%s: %d layers, and %d of buildctl", what, len(g), len(w))
	}
	for i := range g {
		gd, err := g[i].Digest()
		if err != nil {
			t.Fatal(err)
		}
		wd, err := w[i].Digest()
		if err != nil {
			t.Fatal(err)
		}
		gi, err := g[i].DiffID()
		if err != nil {
			t.Fatal(err)
		}
		wi, err := w[i].DiffID()
		if err != nil {
			t.Fatal(err)
		}
		if gd == wd && gi == wi {
			continue
		}
		t.Errorf("%s: layer %d is %v (diff ID %v), and of buildctl %v (%v)", what, i, gd, gi, wd, wi)
		gl, wl := headers(t, g[i]), headers(t, w[i])
		for n := range max(len(gl), len(wl)) {
			var a, b string
			if n < len(gl) {
				a = gl[n]
			}
			if n < len(wl) {
				b = wl[n]
			}
			if a != b {
				t.Errorf("entry %d:\n\t%s\n\t%s", n, a, b)
				break
			}
		}
	}
}

// headers are a layer's entries as lines.
func headers(t *testing.T, l v1.Layer) (lines []string) {
	t.Helper()
	r, err := l.Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return lines
		}
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		io.Copy(&b, tr)
		lines = append(lines, fmt.Sprintf("%c %o %d:%d %d %v %.100q -> %.100q %v", h.Typeflag, h.Mode, h.Uid, h.Gid, h.Size, h.ModTime.UTC(), h.Name, h.Linkname, h.PAXRecords))
	}
}
