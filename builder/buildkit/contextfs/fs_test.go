package contextfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
	"golang.org/x/sync/errgroup"

	"handler/function/payload"
)

// memory is a Source. A file's content is its text.
type memory struct {
	entries []payload.Entry
	content map[string]string
}

func (m *memory) Entries() []payload.Entry { return m.entries }

func (m *memory) Open(e *payload.Entry) io.Reader {
	return io.NewSectionReader(strings.NewReader(m.content[e.Path]), 0, e.Size)
}

const second = int64(time.Second)

// add puts one entry in its place; "dir/" is a directory, "a -> b" a symlink,
// "a => b" a hard link.
func (m *memory) add(name string, mode fs.FileMode, content string) {
	e := payload.Entry{Path: name, Mode: mode, ModTime: 1_700_000_000*second + int64(len(m.entries)+1)}
	if p, target, ok := strings.Cut(name, " -> "); ok {
		e.Path, e.Linkname, e.Mode, e.Size = p, target, 0o777|fs.ModeSymlink, int64(len(target))
	} else if p, target, ok := strings.Cut(name, " => "); ok {
		e.Path, e.Linkname = p, target
		if i := slices.IndexFunc(m.entries, func(e payload.Entry) bool { return e.Path == target }); i >= 0 {
			e.Size = m.entries[i].Size
		}
	} else if p, ok := strings.CutSuffix(name, "/"); ok {
		e.Path, e.Mode = p, mode|fs.ModeDir
	} else {
		e.Size = int64(len(content))
		if m.content == nil {
			m.content = make(map[string]string)
		}
		m.content[name] = content
	}
	i, _ := slices.BinarySearchFunc(m.entries, e.Path, func(e payload.Entry, p string) int { return fsutil.ComparePath(e.Path, p) })
	m.entries = slices.Insert(m.entries, i, e)
}

func sample() *memory {
	m := &memory{}
	m.add("Dockerfile", 0o644, "FROM scratch\n")
	m.add("dir/", 0o755, "")
	m.add("dir/a", 0o600, "a")
	m.add("dir/sub/", 0o700, "")
	m.add("dir/sub/deep", 0o755|fs.ModeSetuid, "deep")
	m.add("dir/z", 0o644, "")
	// '-' and '.' sort below '/' in bytes, and must not here.
	m.add("dir-other/", 0o755, "")
	m.add("dir-other/x", 0o644, "x")
	m.add("dir.txt", 0o644, strings.Repeat("t", 100_000))
	m.add("empty/", 0o755|fs.ModeSticky, "")
	m.add("link -> dir/a", 0, "")
	m.add("loop -> loop", 0, "")
	m.add("out -> /etc/passwd", 0, "")
	m.add("second => dir/a", 0o600, "")
	m.add("third => second", 0o600, "")
	m.add("weird\nname\\", 0o644, "w")
	return m
}

// pipe is one end of an fsutil.Stream in memory.
type pipe struct {
	ctx context.Context
	in  <-chan []byte
	out chan<- []byte
}

func (p *pipe) Context() context.Context { return p.ctx }

func (p *pipe) SendMsg(m any) error {
	data, err := m.(*types.Packet).MarshalVT()
	if err != nil {
		return err
	}
	select {
	case p.out <- data:
		return nil
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}

func (p *pipe) RecvMsg(m any) error {
	select {
	case data, ok := <-p.in:
		if !ok {
			return io.EOF
		}
		return m.(*types.Packet).UnmarshalVT(data)
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}

// transfer sends f into dir as a session does. Its error is that of both sides: when fsutil cannot
// read a file, it sometimes waits for the other side until ctx ends, and so is the later one.
func transfer(t *testing.T, f fsutil.FS, dir string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	up, down := make(chan []byte, 16), make(chan []byte, 16)
	g, ctx := errgroup.WithContext(ctx)
	var sent error
	g.Go(func() error {
		defer close(down)
		sent = fsutil.Send(ctx, &pipe{ctx, up, down}, f, nil)
		return sent
	})
	g.Go(func() error {
		return fsutil.Receive(ctx, &pipe{ctx, down, up}, dir, fsutil.ReceiveOpt{
			Filter: func(_ string, st *types.Stat) bool {
				// Only root can give files to somebody else.
				st.Uid, st.Gid = uint32(os.Getuid()), uint32(os.Getgid())
				return true
			},
		})
	})
	return errors.Join(g.Wait(), sent)
}

func TestTransfer(t *testing.T) {
	m := sample()
	files := New(m)
	dir := t.TempDir()
	if err := transfer(t, files, dir); err != nil {
		t.Fatal(err)
	}
	var got []string
	filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(dir, p); rel != "." {
			got = append(got, rel)
		}
		return err
	})
	if len(got) != len(m.entries) {
		t.Errorf("%d files arrived of %d: %q", len(got), len(m.entries), got)
	}
	for _, e := range m.entries {
		p := filepath.Join(dir, e.Path)
		fi, err := os.Lstat(p)
		if err != nil {
			t.Error(err)
			continue
		}
		if fi.Mode()&^fs.ModePerm != e.Mode&^fs.ModePerm || e.Mode&fs.ModeSymlink == 0 && fi.Mode() != e.Mode {
			t.Errorf("%q: mode %v, want %v", e.Path, fi.Mode(), e.Mode)
		}
		switch {
		case e.Mode&fs.ModeSymlink != 0:
			if target, _ := os.Readlink(p); target != e.Linkname {
				t.Errorf("%q: link to %q, want %q", e.Path, target, e.Linkname)
			}
		case e.Linkname != "":
			to, err := os.Stat(filepath.Join(dir, e.Linkname))
			if err != nil || !os.SameFile(fi, to) {
				t.Errorf("%q is not %q: %v", e.Path, e.Linkname, err)
			}
		case e.Mode.IsRegular():
			if data, _ := os.ReadFile(p); string(data) != m.content[e.Path] {
				t.Errorf("%q: %d bytes %.20q", e.Path, len(data), data)
			}
			// A link's time is set after its target's, and is the same in a
			// real context.
			if e.Path != "dir/a" && fi.ModTime().UnixNano() != e.ModTime {
				t.Errorf("%q: time %d, want %d", e.Path, fi.ModTime().UnixNano(), e.ModTime)
			}
		}
	}
	if want := int64(len("FROM scratch\n") + 1 + len("deep") + 1 + 100_000 + 1); files.sent.Load() != want {
		t.Errorf("%d bytes counted, want %d", files.sent.Load(), want)
	}
}

// A file that has not changed is not written again. BuildKit would give its directory the
// time of the writing.
func TestTransferAgain(t *testing.T) {
	m := &memory{}
	m.add("dir/", 0o755, "")
	m.add("dir/a", 0o600, "a")
	m.add("dir/b => dir/a", 0o600, "")
	m.add("dir/link -> a", 0, "")
	m.entries[2].ModTime = m.entries[1].ModTime
	dir := t.TempDir()
	for range 2 {
		if err := transfer(t, New(m), dir); err != nil {
			t.Fatal(err)
		}
		if fi, err := os.Stat(filepath.Join(dir, "dir")); err != nil || fi.ModTime().UnixNano() != m.entries[0].ModTime {
			t.Errorf("the directory's time is %v, %v", fi.ModTime(), err)
		}
	}
}

// Without its target, a hard link is a file of its own.
func TestTransferFilteredLink(t *testing.T) {
	filtered, err := fsutil.NewFilterFS(New(sample()), &fsutil.FilterOpt{ExcludePatterns: []string{"dir", "second"}})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := transfer(t, filtered, dir); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "third")); string(data) != "a" {
		t.Errorf("content %q, %v", data, err)
	}
}

func TestTransferFollowsLinks(t *testing.T) {
	filtered, err := fsutil.NewFilterFS(New(sample()), &fsutil.FilterOpt{FollowPaths: []string{"link", "loop", "out", "nothing", "dir-*"}})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := transfer(t, filtered, dir); err != nil {
		t.Fatal(err)
	}
	for p, want := range map[string]string{"link": "a", "dir/a": "a", "dir-other/x": "x"} {
		if data, err := os.ReadFile(filepath.Join(dir, p)); string(data) != want {
			t.Errorf("%s: %q, %v", p, data, err)
		}
	}
	if _, err := os.Lstat(filepath.Join(dir, "dir.txt")); err == nil {
		t.Error("a file came that was not asked for")
	}
}

// brokenSource ends before its entries say.
type brokenSource struct{ *memory }

func (brokenSource) Open(e *payload.Entry) io.Reader {
	return io.NewSectionReader(strings.NewReader("short"), 0, e.Size)
}

// A file that cannot be read must end the transfer: an empty one in its place
// would be built.
func TestTransferUnreadable(t *testing.T) {
	err := transfer(t, New(brokenSource{sample()}), t.TempDir())
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut source: %v", err)
	}
	closed := New(sample())
	closed.Close()
	if err := transfer(t, closed, t.TempDir()); !errors.Is(err, errClosed) {
		t.Errorf("closed: %v", err)
	}
	m := sample()
	m.entries[slices.IndexFunc(m.entries, func(e payload.Entry) bool { return e.Path == "third" })].Linkname = "zzz"
	r, err := New(m).Open("third")
	if err != nil {
		t.Fatalf("Open failed: %v", err)
	}
	if _, err := r.Read(make([]byte, 1)); err == nil {
		t.Error("a link to nothing is read without an error")
	}
	for _, p := range []string{"nothing", "dir", "loop", ""} {
		r, err := New(m).Open(p)
		if err != nil {
			t.Fatalf("Open(%q) failed: %v", p, err)
		}
		if _, err := io.ReadAll(r); err == nil {
			t.Errorf("%q is read without an error", p)
		}
	}
}

func TestWalk(t *testing.T) {
	f := New(sample())
	all := make([]string, 0, len(f.entries))
	for _, e := range f.entries {
		all = append(all, e.Path)
	}
	for _, tt := range []struct {
		target string
		skip   map[string]error
		want   []string
	}{
		{"/", nil, all},
		{".", nil, all},
		{"", nil, all},
		{"dir", nil, []string{"dir", "dir/a", "dir/sub", "dir/sub/deep", "dir/z"}},
		{"/dir/", nil, []string{"dir", "dir/a", "dir/sub", "dir/sub/deep", "dir/z"}},
		{"dir/sub", nil, []string{"dir/sub", "dir/sub/deep"}},
		{"dir.txt", nil, []string{"dir.txt"}},
		{"link", nil, []string{"link"}},
		{"nothing", nil, nil},
		{"dir/a/b", nil, nil},
		{"dir", map[string]error{"dir/sub": fs.SkipDir}, []string{"dir", "dir/a", "dir/sub", "dir/z"}},
		{"dir", map[string]error{"dir": fs.SkipDir}, []string{"dir"}},
		// For a file, fs.SkipDir skips the rest of its directory.
		{"/", map[string]error{"dir/a": fs.SkipDir}, slices.DeleteFunc(slices.Clone(all), func(p string) bool {
			return strings.HasPrefix(p, "dir/") && p != "dir/a"
		})},
		{"/", map[string]error{"dir-other": fs.SkipDir}, slices.DeleteFunc(slices.Clone(all), func(p string) bool {
			return p == "dir-other/x"
		})},
		{"/", map[string]error{"dir": fs.SkipDir}, slices.DeleteFunc(slices.Clone(all), func(p string) bool {
			return strings.HasPrefix(p, "dir/")
		})},
		{"/", map[string]error{"Dockerfile": fs.SkipDir}, []string{"Dockerfile"}},
		{"dir.txt", map[string]error{"dir.txt": fs.SkipDir}, []string{"dir.txt"}},
		{"/", map[string]error{"dir/a": fs.SkipAll}, []string{"Dockerfile", "dir", "dir/a"}},
	} {
		t.Run(fmt.Sprint(tt.target, tt.skip), func(t *testing.T) {
			var got []string
			err := f.Walk(t.Context(), tt.target, func(p string, d fs.DirEntry, err error) error {
				got = append(got, p)
				fi, err2 := d.Info()
				if err != nil || err2 != nil || fi.Sys().(*types.Stat).Path != p {
					t.Errorf("%q: %v, %v", p, err, err2)
				}
				return tt.skip[p]
			})
			if err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("walked %q, want %q: %v", got, tt.want, err)
			}
		})
	}
	wrong := errors.New("wrong")
	if err := f.Walk(t.Context(), "/", func(string, fs.DirEntry, error) error { return wrong }); err != wrong {
		t.Errorf("an error became %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.Walk(ctx, "/", func(string, fs.DirEntry, error) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

// fsutil changes the Stat it is given.
func TestWalkGivesCopies(t *testing.T) {
	f := New(sample())
	for range 2 {
		f.Walk(t.Context(), "/", func(p string, d fs.DirEntry, _ error) error {
			fi, _ := d.Info()
			st := fi.Sys().(*types.Stat)
			if st.Path != p || st.Uid != 0 {
				t.Errorf("%q was changed: %v", p, st)
			}
			st.Path, st.Uid, st.Linkname = "changed", 1, "changed"
			return nil
		})
	}
}

func TestWalkOrder(t *testing.T) {
	var v fsutil.Validator
	err := New(sample()).Walk(t.Context(), "/", func(p string, d fs.DirEntry, err error) error {
		fi, _ := d.Info()
		return v.HandleChange(fsutil.ChangeKindAdd, p, fi, err)
	})
	if err != nil {
		t.Error(err)
	}
}

// Close waits for the read that is under way.
func TestCloseWaits(t *testing.T) {
	started, finish := make(chan struct{}), make(chan struct{})
	f := New(&memory{})
	r := &fileReader{fs: f, r: readerFunc(func([]byte) (int, error) { close(started); <-finish; return 0, io.EOF })}
	var wg sync.WaitGroup
	wg.Go(func() { r.Read(nil) })
	<-started
	closed := make(chan struct{})
	wg.Go(func() { f.Close(); close(closed) })
	select {
	case <-closed:
		t.Error("closed while a read is under way")
	case <-time.After(20 * time.Millisecond):
	}
	close(finish)
	wg.Wait()
	if _, err := r.Read(nil); !errors.Is(err, errClosed) {
		t.Errorf("read after close: %v", err)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestSyntaxLine(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files map[string]string
		file  string
		want  string
	}{
		{"none", map[string]string{"Dockerfile": "FROM scratch\n"}, "", ""},
		{"line", map[string]string{"Dockerfile": "# syntax=docker/dockerfile:1\nFROM scratch\n"}, "", "docker/dockerfile:1"},
		{"spaces and case", map[string]string{"Dockerfile": "#  SynTax  =  evil/frontend  \r\nFROM scratch\n"}, "", "evil/frontend"},
		{"after escape", map[string]string{"Dockerfile": "# escape=`\n# syntax=x\n"}, "", "x"},
		{"after a comment", map[string]string{"Dockerfile": "# a comment\n# syntax=x\n"}, "", ""},
		{"byte order mark", map[string]string{"Dockerfile": "\ufeff# syntax=x\n"}, "", "x"},
		{"shebang", map[string]string{"Dockerfile": "#!/bin/sh\n# syntax=x\n"}, "", "x"},
		{"slashes", map[string]string{"Dockerfile": "// syntax=x\n"}, "", "x"},
		{"json", map[string]string{"Dockerfile": `{"syntax":"x"}`}, "", "x"},
		{"named", map[string]string{"Dockerfile": "# syntax=no\n", "d/My.file": "# syntax=x\n"}, "d/My.file", "x"},
		{"unclean name", map[string]string{"d/My.file": "# syntax=x\n"}, "./d//My.file", "x"},
		{"lower case", map[string]string{"d/dockerfile": "# syntax=x\n"}, "d/Dockerfile", "x"},
		{"missing", nil, "", ""},
		{"symlink", map[string]string{"Dockerfile -> d/real": "", "d/real": "# syntax=x\n"}, "", "x"},
		{"symlinks", map[string]string{"d/Dockerfile -> ../next": "", "next -> /d/real": "", "d/real": "# syntax=x\n"}, "d/Dockerfile", "x"},
		{"absolute symlink", map[string]string{"d/Dockerfile -> /real": "", "real": "# syntax=x\n"}, "d/Dockerfile", "x"},
		{"loop", map[string]string{"Dockerfile -> Dockerfile": ""}, "", ""},
		{"hard link", map[string]string{"Dockerfile => A": "", "A": "# syntax=x\n"}, "", "x"},
		{"directory", map[string]string{"Dockerfile/": ""}, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := &memory{}
			for name, content := range tt.files {
				m.add(name, 0o644, content)
				if strings.HasPrefix(name, "d/") && !slices.ContainsFunc(m.entries, func(e payload.Entry) bool { return e.Path == "d" }) {
					m.add("d/", 0o755, "")
				}
			}
			if got := New(m).Syntax(tt.file); got != tt.want {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
}
