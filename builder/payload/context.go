package payload

import (
	"io"
	"io/fs"
	"sort"
	"unicode/utf8"
)

// Context is a build context that lies in a spooled tar. Once SetTimes has been
// called it does not change, and may be read from many goroutines at once, until its
// Spool is closed.
type Context struct {
	entries []Entry
	inodes  []inode
	sparse  map[int32][]fragment // by inode
	data    io.ReaderAt
	sums    []contentSum // by inode; nil once SetTimes has been called
}

// Entry is a file, directory or symlink of a context, or an odd one.
type Entry struct {
	Path string      // slash-separated, relative to the context, clean
	Mode fs.FileMode // with setuid, setgid and sticky

	// inode is an index into Context.inodes, the same for all of a regular
	// file's hard links; noInode for what has no content.
	inode int32

	Size    int64 // as lstat gives it, also for a hard link; 0 for a directory
	ModTime int64 // ns since 1970; of a regular file, a group time once SetTimes has been called

	// Linkname is a symlink's target as it was sent, or, for a regular file,
	// the path of the entry before this one that it is a hard link to.
	Linkname string
}

const noInode = -1

// Odd says why BuildKit cannot be given the entry; "" where it can. Who serves a
// Context judges those that would be sent.
func (e *Entry) Odd() string {
	switch {
	case e.Mode&fs.ModeDevice != 0:
		return "a device"
	case e.Mode&fs.ModeNamedPipe != 0:
		return "a FIFO"
	case !utf8.ValidString(e.Path):
		return "a path that is not UTF-8"
	case e.Mode&fs.ModeSymlink != 0 && !utf8.ValidString(e.Linkname):
		return "a symlink to a path that is not UTF-8"
	}
	return ""
}

// inode is where a regular file's content lies in the tar, if it is not sparse.
type inode struct {
	offset, size int64
}

// Entries are in the order of [ComparePath], each after its parent directory;
// parents that the tar leaves out are there. The caller must not change them.
func (c *Context) Entries() []Entry { return c.entries }

// Find looks an entry up by its Path; nil when there is none.
func (c *Context) Find(path string) *Entry {
	i, ok := sort.Find(len(c.entries), func(i int) int {
		return ComparePath(path, c.entries[i].Path)
	})
	if !ok {
		return nil
	}
	return &c.entries[i]
}

// Open reads a regular file's content, a hard link's too. Of anything else it
// reads nothing.
func (c *Context) Open(e *Entry) io.Reader {
	if e.inode == noInode {
		return io.NewSectionReader(c.data, 0, 0)
	}
	n := c.inodes[e.inode]
	if fragments, ok := c.sparse[e.inode]; ok {
		return &sparseReader{tar: c.data, fragments: fragments, size: n.size}
	}
	return io.NewSectionReader(c.data, n.offset, n.size)
}

// ComparePath is the order in which fsutil walks a tree: '/' sorts before every
// other byte, so that a directory is followed by what is in it. It returns a
// number below, at or above 0.
func ComparePath(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		x, y := a[i], b[i]
		switch {
		case x == y:
		case x == '/':
			return -1
		case y == '/':
			return 1
		default:
			return int(x) - int(y)
		}
	}
	return len(a) - len(b)
}
