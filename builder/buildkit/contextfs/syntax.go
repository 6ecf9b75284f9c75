package contextfs

import (
	"io"
	"path"

	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// maxDockerfile is how much of a Dockerfile is read here, in bytes. Its syntax line is among the
// first.
const maxDockerfile = 1 << 20

const defaultDockerfile = "Dockerfile"

// Syntax is the frontend that the Dockerfile's "# syntax=" line asks for, or empty. A
// Dockerfile that cannot be read has none: the daemon reports its error. dockerfile is the
// config's.
func (f *FS) Syntax(dockerfile string) string {
	_, data := f.Dockerfile(dockerfile)
	_, syntax, _, _ := parser.DetectSyntax(data)
	return syntax
}

// Dockerfile returns the Dockerfile, and the name that the daemon has for it. It is empty if
// it cannot be read here. dockerfile is the config's.
func (f *FS) Dockerfile(dockerfile string) (name string, data []byte) {
	if dockerfile == "" {
		dockerfile = defaultDockerfile
	}
	r := f.follow(dockerfile)
	if r == nil && path.Base(dockerfile) == defaultDockerfile {
		// The frontend falls back to this one too.
		r = f.follow(path.Join(path.Dir(dockerfile), "dockerfile"))
	}
	if r == nil {
		return dockerfile, nil
	}
	data, err := io.ReadAll(io.LimitReader(r, maxDockerfile))
	if err != nil {
		return dockerfile, nil
	}
	return dockerfile, data
}
