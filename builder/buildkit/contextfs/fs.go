// Package contextfs is a build context in the form in which BuildKit asks for it. It
// serves the files out of the stored tar, refuses what BuildKit cannot be given, and reads
// what the Dockerfile frontend looks at first: the ignore file and the syntax line.
package contextfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"

	"handler/function/api"
	"handler/function/payload"
)

// Source is the part of a [payload.Context] that an FS reads.
type Source interface {
	// Entries are in fsutil's order, each after its parent directory.
	Entries() []payload.Entry
	// Open reads the content of a regular file that is no hard link.
	Open(*payload.Entry) io.Reader
}

// FS is a build context as an fsutil.FS. The daemon may ask for files for as long as its
// session lives, which can be longer than the solve. After Close nothing is read from the
// Source any more.
type FS struct {
	src     Source
	entries []payload.Entry
	odd     bool         // BuildKit cannot be given some of the entries
	sent    atomic.Int64 // bytes of file content read
	refused atomic.Pointer[api.Error]

	mu     sync.RWMutex // held for reading while the Source is read
	closed bool
}

// New returns the FS of src. The caller must call Close.
func New(src Source) *FS {
	entries := src.Entries()
	odd := slices.ContainsFunc(entries, func(e payload.Entry) bool { return e.Odd() != "" })
	return &FS{src: src, entries: entries, odd: odd}
}

// Close waits for the reads that are under way. Later ones fail.
func (f *FS) Close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
}

// Sent is how many bytes of file content have been read.
func (f *FS) Sent() int64 { return f.sent.Load() }

// find is the index of the entry at p, which is clean and relative.
func (f *FS) find(p string) (int, bool) {
	return slices.BinarySearchFunc(f.entries, p, func(e payload.Entry, p string) int {
		return fsutil.ComparePath(e.Path, p)
	})
}

// Walk follows filepath.WalkDir, with two exceptions. fsutil wants the root left out. And Walk
// leaves out entries that BuildKit cannot take: CheckSent has refused every context in which such
// an entry would be sent. A target that does not exist is no error, as it is none in fsutil.NewFS.
func (f *FS) Walk(ctx context.Context, target string, fn fs.WalkDirFunc) error {
	first, within := 0, ""
	if target = strings.TrimPrefix(path.Clean("/"+target), "/"); target != "" {
		i, ok := f.find(target)
		if !ok {
			return nil
		}
		first, within = i, target+"/"
	}
	for i := first; i < len(f.entries); i++ {
		e := &f.entries[i]
		if i > first && !strings.HasPrefix(e.Path, within) {
			return nil
		}
		if f.odd && e.Odd() != "" {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		err := fn(e.Path, &fsutil.DirEntryInfo{Stat: f.stat(e)}, nil)
		switch {
		case err == nil:
		case errors.Is(err, fs.SkipAll):
			return nil
		case errors.Is(err, fs.SkipDir):
			skip := skippedBy(e)
			if skip == "" || skip == within {
				return nil
			}
			i = f.after(i, skip) - 1
		default:
			return err
		}
	}
	return nil
}

// after is the first index after i whose entry is not in the directory with this prefix. The entry at i
// is the directory, or in it.
func (f *FS) after(i int, prefix string) int {
	return i + 1 + sort.Search(len(f.entries)-i-1, func(n int) bool { return !strings.HasPrefix(f.entries[i+1+n].Path, prefix) })
}

// skippedBy is the prefix of the entries that fs.SkipDir leaves out when it is returned for
// e: those in the directory e, or the rest of the directory that the file e is in. It is
// empty for the whole context.
func skippedBy(e *payload.Entry) string {
	dir := e.Path
	if !e.Mode.IsDir() {
		dir = path.Dir(dir)
	}
	if dir == "." {
		return ""
	}
	return dir + "/"
}

// stat is made anew for each walk, because its callers change it.
func (f *FS) stat(e *payload.Entry) *types.Stat {
	st := &types.Stat{
		Path:     e.Path,
		Mode:     uint32(e.Mode),
		Size:     e.Size,
		ModTime:  e.ModTime,
		Linkname: e.Linkname,
	}
	if e.Linkname != "" && e.Mode.IsRegular() {
		// The receiver wants the file itself, not another link to it.
		if to, err := f.file(e.Linkname); err == nil {
			st.Linkname = to.Path
		}
	}
	return st
}

// Open never fails. Where a file does not open, fsutil sends an empty one in its place and
// reports nothing. So Read returns the error.
func (f *FS) Open(p string) (io.ReadCloser, error) {
	e, err := f.file(strings.TrimPrefix(path.Clean("/"+p), "/"))
	if err != nil {
		return io.NopCloser(failingReader{err}), nil
	}
	return &fileReader{fs: f, path: e.Path, r: f.src.Open(e), left: e.Size}, nil
}

// file is the regular file at p, or the one that p is a hard link to.
func (f *FS) file(p string) (*payload.Entry, error) {
	for i, ok := f.find(p); ok; i, ok = f.find(p) {
		e := &f.entries[i]
		if !e.Mode.IsRegular() {
			return nil, &fs.PathError{Op: "open", Path: p, Err: fs.ErrInvalid}
		}
		if e.Linkname == "" {
			return e, nil
		}
		// A hard link is to an entry before it, so the loop ends.
		if fsutil.ComparePath(e.Linkname, p) >= 0 {
			return nil, &fs.PathError{Op: "open", Path: p, Err: errors.New("hard link to an entry after it")}
		}
		p = e.Linkname
	}
	return nil, &fs.PathError{Op: "open", Path: p, Err: fs.ErrNotExist}
}

// maxLinks is how many symlinks a file's name may lead through. containerd, which resolves
// names for the frontend, has the same limit.
const maxLinks = 255

// follow opens the regular file that name leads to. Symlinks are followed, and none of
// them leaves the context. It returns nil where there is no such file.
func (f *FS) follow(name string) io.Reader {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	for links, from := 0, 0; ; {
		end := len(name)
		if i := strings.IndexByte(name[from:], '/'); i >= 0 {
			end = from + i
		}
		i, ok := f.find(name[:end])
		if !ok {
			return nil // its parents would be entries, too
		}
		e := &f.entries[i]
		switch {
		case e.Mode&fs.ModeSymlink != 0:
			if links++; links > maxLinks {
				return nil
			}
			target := e.Linkname
			if !path.IsAbs(target) {
				target = path.Join("/", path.Dir(e.Path), target)
			}
			name, from = strings.TrimPrefix(path.Join(target, name[end:]), "/"), 0
		case end < len(name):
			from = end + 1
		default:
			file, err := f.file(name)
			if err != nil {
				return nil
			}
			return f.src.Open(file)
		}
	}
}

type failingReader struct{ err error }

func (r failingReader) Read([]byte) (int, error) { return 0, r.err }

var errClosed = errors.New("the build has ended")

type fileReader struct {
	fs   *FS
	path string
	r    io.Reader
	left int64
}

func (r *fileReader) Read(p []byte) (int, error) {
	r.fs.mu.RLock()
	defer r.fs.mu.RUnlock()
	if r.fs.closed {
		return 0, errClosed
	}
	n, err := r.r.Read(p)
	r.left -= int64(n)
	r.fs.sent.Add(int64(n))
	if err == io.EOF && r.left != 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && err != io.EOF {
		err = fmt.Errorf("reading %q: %w", r.path, err)
	}
	return n, err
}

func (r *fileReader) Close() error { return nil }
