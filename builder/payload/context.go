package payload

import (
	"io"
	"io/fs"
)

// Context is a build context that lies in a spooled tar. It does not change,
// and may be read from many goroutines at once, until its Payload is closed.
type Context struct {
	entries []Entry
	data    io.ReaderAt
}

// Entry is a file, directory or symlink of a context.
type Entry struct {
	Path    string      // slash-separated, relative to the context, clean
	Mode    fs.FileMode // with setuid, setgid and sticky
	Size    int64       // of a regular file that is not a link
	ModTime int64       // ns since 1970; of a regular file, a group time

	// Linkname is a symlink's target as it was sent, or, for a regular file,
	// the path of the entry before this one that it is a hard link to.
	Linkname string

	offset int64
}

// Entries are in the order that fsutil wants ('/' sorts before every other
// byte), each after its parent directory; parents the tar left out are there.
// The caller must not change them.
func (c *Context) Entries() []Entry { return c.entries }

// Open reads a regular file's content.
func (c *Context) Open(e *Entry) *io.SectionReader {
	return io.NewSectionReader(c.data, e.offset, e.Size)
}
