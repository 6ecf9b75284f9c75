package buildkit

import (
	"io"
	"path"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// maxDockerfile is how much of a Dockerfile is read for its syntax line, which
// is among the first.
const maxDockerfile = 1 << 20 // bytes

// maxLinks is how many symlinks a Dockerfile's name may lead through.
const maxLinks = 10

// syntaxLine is the frontend that the Dockerfile asks for, or empty. What
// cannot be read has none: the daemon says what is wrong with it.
func syntaxLine(f *contextFS, name string) string {
	if name == "" {
		name = "Dockerfile"
	}
	r := openDockerfile(f, name)
	if r == nil && path.Base(name) == "Dockerfile" {
		// The frontend falls back to this one too.
		r = openDockerfile(f, path.Join(path.Dir(name), "dockerfile"))
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

func openDockerfile(f *contextFS, name string) io.Reader {
	for range maxLinks {
		name = strings.TrimPrefix(path.Clean("/"+name), "/")
		i, ok := f.find(name)
		if !ok {
			return nil
		}
		if e := &f.entries[i]; e.Linkname != "" && !e.Mode.IsRegular() {
			if path.IsAbs(e.Linkname) {
				name = e.Linkname
			} else {
				name = path.Join(path.Dir(name), e.Linkname)
			}
			continue
		}
		e, err := f.file(name)
		if err != nil {
			return nil
		}
		return f.src.Open(e)
	}
	return nil
}
