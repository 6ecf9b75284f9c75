package payload

import (
	"io"
	"io/fs"
	"sort"
	"unicode/utf8"
)

// Context is a build context in a stored tar. After SetTimes it does not change, and may be
// read from many goroutines at once, until its Spool is closed.
type Context struct {
	entries []Entry
	inodes  []inode
	sparse  map[int32][]fragment // by inode
	data    io.ReaderAt
	sums    []contentSum // by inode; nil once SetTimes has been called
}

// Entry is a file, a directory or a symlink of a context, or something that [Entry.Odd] names.
type Entry struct {
	Path string      // slash-separated, relative to the context, clean
	Mode fs.FileMode // with setuid, setgid and sticky

	// inode is an index into Context.inodes, or noInode for an entry without content. All
	// hard links of a regular file have the same.
	inode int32

	Size    int64 // as lstat gives it, also for a hard link; 0 for a directory
	ModTime int64 // ns since 1970; SetTimes changes that of a regular file

	// Linkname is a symlink's target as it was sent, or, for a regular file,
	// the path of the entry before this one that it is a hard link to.
	Linkname string
}

const noInode = -1

// Odd says why BuildKit cannot be given the entry, or returns "". It matters only for an entry
// that would be sent.
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

// inode is the place of a regular file's content in the tar. A sparse file uses its size only.
type inode struct {
	offset, size int64
}

// Entries returns all entries in the order of [ComparePath]. Each comes after its parent
// directory, also if the tar has no entry for the parent. The caller must not change them.
func (c *Context) Entries() []Entry { return c.entries }

// Find returns the entry with a Path, or nil.
func (c *Context) Find(path string) *Entry {
	i, ok := sort.Find(len(c.entries), func(i int) int {
		return ComparePath(path, c.entries[i].Path)
	})
	if !ok {
		return nil
	}
	return &c.entries[i]
}

// Open reads the content of a regular file or a hard link. Every other entry is empty.
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

// ComparePath compares paths in the order in which fsutil walks a tree: '/' sorts before every
// other byte, so that everything in a directory follows the directory. It returns a negative
// number if a is first, a positive one if b is, and 0 if they are equal.
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
