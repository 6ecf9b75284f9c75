package contextfs

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"github.com/moby/patternmatcher/ignorefile"
	"github.com/tonistiigi/fsutil"

	"handler/function/api"
	"handler/function/payload"
)

const (
	ignoreName = ".dockerignore"
	// maxIgnore is how much of a .dockerignore is read here, in bytes. A pattern takes 90 bytes of
	// memory beside its text. The frontend reads 16 MiB.
	maxIgnore = 256 << 10
)

// CheckSent refuses a context of which BuildKit would be sent an entry that it cannot take,
// such as a FIFO. An ignore file may leave such entries out, if it has at most maxIgnore bytes.
// dockerfile is the config's. When ctx has ended CheckSent returns nil: Walk leaves those entries out
// in any case.
//
// The error is an *api.Error, bad_tar, with the entry's name.
func (f *FS) CheckSent(ctx context.Context, dockerfile string) error {
	if !f.odd {
		return nil
	}
	all := &FS{src: f.src, entries: f.entries}
	name, file := f.ignoreFile(dockerfile)
	text, err := io.ReadAll(io.LimitReader(file, maxIgnore+1))
	if err != nil {
		return nil // the solve fails on the same
	}
	if len(text) > maxIgnore {
		e := f.entries[slices.IndexFunc(f.entries, func(e payload.Entry) bool { return e.Odd() != "" })]
		return refuse(e.Path, fmt.Sprintf("%s, and %s has over %d bytes and is not read", e.Odd(), name, maxIgnore))
	}
	patterns, err := ignorefile.ReadAll(bytes.NewReader(text))
	if err != nil {
		return nil // the frontend fails on the same, and has a better message
	}
	sent, err := fsutil.NewFilterFS(all, &fsutil.FilterOpt{ExcludePatterns: patterns})
	if err != nil {
		return nil // likewise
	}
	var refused error
	// The walk itself fails for a bad pattern, or because ctx has ended.
	sent.Walk(ctx, "/", func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		i, ok := f.find(p)
		if !ok {
			return nil
		}
		if why := f.entries[i].Odd(); why != "" {
			refused = refuse(p, fmt.Sprintf("%s, and %s does not leave it out", why, name))
			return fs.SkipAll
		}
		return nil
	})
	return refused
}

func refuse(entry, why string) *api.Error {
	return &api.Error{Code: api.BadTar, Msg: fmt.Sprintf("tar entry %.200q: %s", api.ContextDir+"/"+entry, why)}
}

// ignoreFile opens the file that names what is not sent, and returns its name. The
// Dockerfile's own comes before the context's, even if it is empty. Where there is neither, it
// is an empty .dockerignore.
func (f *FS) ignoreFile(dockerfile string) (name string, r io.Reader) {
	if dockerfile == "" {
		dockerfile = defaultDockerfile
	}
	for _, name := range []string{dockerfile + ignoreName, ignoreName} {
		if r := f.follow(name); r != nil {
			return name, r
		}
	}
	return ignoreName, strings.NewReader("")
}
