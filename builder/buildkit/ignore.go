package buildkit

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/moby/patternmatcher/ignorefile"
	"github.com/tonistiigi/fsutil"

	"handler/function/api"
)

const (
	ignoreName = ".dockerignore"
	// maxIgnore is how much of a .dockerignore the frontend reads. It fails on a
	// larger one.
	maxIgnore = 16 << 20 // bytes
)

// checkSent refuses a context of which something would be sent that BuildKit cannot be
// given: bad_tar, with the entry's name. What .dockerignore leaves out may be anything.
// dockerfile is the config's. It returns nil when ctx has ended: none of these entries
// is sent in any case.
func (f *contextFS) checkSent(ctx context.Context, dockerfile string) error {
	if !f.odd {
		return nil
	}
	all := &contextFS{src: f.src, entries: f.entries}
	name, file := openIgnore(f, dockerfile)
	patterns, err := ignorefile.ReadAll(io.LimitReader(file, maxIgnore))
	if err != nil {
		return nil // the frontend says it better: it fails on the same
	}
	sent, err := fsutil.NewFilterFS(all, &fsutil.FilterOpt{ExcludePatterns: patterns})
	if err != nil {
		return nil // likewise
	}
	var refused error
	// An error of the walk itself is a pattern's, or ctx has ended.
	sent.Walk(ctx, "/", func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		i, ok := f.find(p)
		if !ok {
			return nil
		}
		if why := f.entries[i].Odd(); why != "" {
			refused = &api.Error{Code: api.BadTar, Msg: fmt.Sprintf("tar entry %.200q: %s, and %s does not leave it out", api.ContextDir+"/"+p, why, name)}
			return fs.SkipAll
		}
		return nil
	})
	return refused
}

// openIgnore reads the file that says what is not sent, and names it: the Dockerfile's
// own before that of the context. An empty one counts. Where there is none, it is an
// empty .dockerignore.
func openIgnore(f *contextFS, dockerfile string) (name string, r io.Reader) {
	if dockerfile == "" {
		dockerfile = defaultDockerfile
	}
	for _, name := range []string{dockerfile + ignoreName, ignoreName} {
		if r := openFile(f, name); r != nil {
			return name, r
		}
	}
	return ignoreName, strings.NewReader("")
}
