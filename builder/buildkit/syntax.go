package buildkit

import (
	"io"
	"io/fs"
	"path"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/parser"

	"handler/function/payload"
)

// maxDockerfile is how much of a Dockerfile is read for its syntax line, which
// is among the first.
const maxDockerfile = 1 << 20 // bytes

// maxLinks is how many symlinks a file's name may lead through.
const maxLinks = 255 // as containerd's, which resolves them for the frontend

const defaultDockerfile = "Dockerfile"

// syntaxLine is the frontend that the Dockerfile asks for, or empty. What
// cannot be read has none: the daemon says what is wrong with it.
func syntaxLine(f *contextFS, name string) string {
	if name == "" {
		name = defaultDockerfile
	}
	r := openFile(f, name)
	if r == nil && path.Base(name) == defaultDockerfile {
		// The frontend falls back to this one too.
		r = openFile(f, path.Join(path.Dir(name), "dockerfile"))
	}
	if r == nil {
		return ""
	}
	data, err := io.ReadAll(io.LimitReader(r, maxDockerfile))
	if err != nil {
		return ""
	}
	_, syntax, _, _ := parser.DetectSyntax(data)
	return syntax
}

// openFile opens the regular file that name leads to, through symlinks, none of which
// leaves the context; nil where there is none.
func openFile(f *contextFS, name string) io.Reader {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	for links, from := 0, 0; ; {
		end := len(name)
		if i := strings.IndexByte(name[from:], '/'); i >= 0 {
			end = from + i
		}
		var e payload.Entry // of no mode where there is none
		if i, ok := f.find(name[:end]); ok {
			e = f.entries[i]
		}
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
