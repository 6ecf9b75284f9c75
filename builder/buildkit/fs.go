package buildkit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"

	"handler/function/payload"
)

// source is the part of a payload.Context that a contextFS reads.
type source interface {
	Entries() []payload.Entry
	Open(*payload.Entry) io.Reader
}

// contextFS is a build context as fsutil sends it. It serves the daemon's
// requests for as long as a session lives, which may be longer than the solve:
// after close, nothing is read from the source any more.
type contextFS struct {
	src     source
	entries []payload.Entry
	odd     bool         // some of the entries are, and left out
	sent    atomic.Int64 // bytes of file content read

	mu     sync.RWMutex // held for reading while the source is read
	closed bool
}

// FS serves a build context to BuildKit's client, for a program that solves
// without a Solver: the benchmark's peer does.
func FS(c *payload.Context) fsutil.FS { return newContextFS(c) }

func newContextFS(src source) *contextFS {
	entries := src.Entries()
	odd := slices.ContainsFunc(entries, func(e payload.Entry) bool { return e.Odd() != "" })
	return &contextFS{src: src, entries: entries, odd: odd}
}

// close returns when no read is under way.
func (f *contextFS) close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
}

// find is the index of the entry at p, which is clean and relative.
func (f *contextFS) find(p string) (int, bool) {
	return slices.BinarySearchFunc(f.entries, p, func(e payload.Entry, p string) int {
		return fsutil.ComparePath(e.Path, p)
	})
}

// Walk follows filepath.WalkDir, but for the root, which fsutil wants left out, and for
// what BuildKit cannot be given: checkSent has found that it need not be.
// A target that does not exist is no error, as it is none in fsutil.NewFS.
func (f *contextFS) Walk(ctx context.Context, target string, fn fs.WalkDirFunc) error {
	first, within := 0, ""
	if target = strings.TrimPrefix(path.Clean("/"+target), "/"); target != "" {
		i, ok := f.find(target)
		if !ok {
			return nil
		}
		first, within = i, target+"/"
	}
	skip := "" // what begins with it was skipped
	for i := first; i < len(f.entries); i++ {
		e := &f.entries[i]
		if within != "" && i > first && !strings.HasPrefix(e.Path, within) {
			break
		}
		if skip != "" && strings.HasPrefix(e.Path, skip) {
			continue
		}
		skip = ""
		if f.odd && e.Odd() != "" {
			continue
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		err := fn(e.Path, &fsutil.DirEntryInfo{Stat: f.stat(e)}, nil)
		switch {
		case err == nil:
		case errors.Is(err, fs.SkipAll):
			return nil
		case errors.Is(err, fs.SkipDir) && e.Mode.IsDir():
			skip = e.Path + "/"
		case errors.Is(err, fs.SkipDir):
			dir := path.Dir(e.Path)
			if dir == "." || within != "" && i == first {
				return nil
			}
			skip = dir + "/"
		default:
			return err
		}
	}
	return nil
}

// stat is made anew for each walk: its callers change it.
func (f *contextFS) stat(e *payload.Entry) *types.Stat {
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

// Open never fails: for a file that does not open, fsutil sends an empty one
// and says nothing. What is wrong is said by Read.
func (f *contextFS) Open(p string) (io.ReadCloser, error) {
	e, err := f.file(strings.TrimPrefix(path.Clean("/"+p), "/"))
	if err != nil {
		return io.NopCloser(failingReader{err}), nil
	}
	return &fileReader{fs: f, path: e.Path, r: f.src.Open(e), left: e.Size}, nil
}

// file is the regular file at p, or what p is a hard link to.
func (f *contextFS) file(p string) (*payload.Entry, error) {
	for i, ok := f.find(p); ok; i, ok = f.find(p) {
		e := &f.entries[i]
		if !e.Mode.IsRegular() {
			return nil, &fs.PathError{Op: "open", Path: p, Err: fs.ErrInvalid}
		}
		if e.Linkname == "" {
			return e, nil
		}
		// A hard link is to an entry before it, so this ends.
		if fsutil.ComparePath(e.Linkname, p) >= 0 {
			return nil, &fs.PathError{Op: "open", Path: p, Err: errors.New("hard link to an entry after it")}
		}
		p = e.Linkname
	}
	return nil, &fs.PathError{Op: "open", Path: p, Err: fs.ErrNotExist}
}

type failingReader struct{ err error }

func (r failingReader) Read([]byte) (int, error) { return 0, r.err }

var errContextClosed = errors.New("the build has ended")

type fileReader struct {
	fs   *contextFS
	path string
	r    io.Reader
	left int64
}

func (r *fileReader) Read(p []byte) (int, error) {
	r.fs.mu.RLock()
	defer r.fs.mu.RUnlock()
	if r.fs.closed {
		return 0, errContextClosed
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
