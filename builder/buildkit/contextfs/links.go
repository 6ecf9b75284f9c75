package contextfs

import (
	"fmt"
	"io/fs"
	"path"
	"strings"

	"github.com/tonistiigi/fsutil"

	"handler/function/api"
	"handler/function/payload"
)

// What fsutil.FollowLinks may take in one transfer to find the paths that the daemon asks for. It has
// no limits of its own: of a chain of n symlinks it keeps n paths, each longer than the one before.
const (
	maxPath     = 4096     // bytes of a path, as in Linux
	maxSteps    = 4 << 20  // entries looked up
	maxResolved = 64 << 10 // paths that symlinks lead to
	maxKept     = 16 << 20 // bytes of these paths
)

// Filter is a filesync.FilterOptFunc. It fails if the symlinks at the paths that the daemon asks for
// lead too far. Refused then has the error for the client.
func (f *FS) Filter(_ string, opt *fsutil.FilterOpt) error {
	l := &links{fs: f, seen: make(map[string]bool)}
	for _, p := range opt.FollowPaths {
		if why := l.follow(p, 0); why != "" {
			e := &api.Error{Code: api.BadTar, Msg: fmt.Sprintf("the path %.200q in the context: %s", p, why)}
			f.refused.Store(e)
			return e
		}
	}
	return nil
}

// Refused returns the error of Filter, or nil.
func (f *FS) Refused() error {
	if e := f.refused.Load(); e != nil {
		return e
	}
	return nil
}

// links follows symlinks as fsutil.FollowLinks does, and counts.
type links struct {
	fs    *FS
	seen  map[string]bool // what has been resolved
	steps int
	paths int // that symlinks have led to
	kept  int // bytes of paths
}

// follow returns why p is refused, or nothing. depth is how many symlinks have led to p.
func (l *links) follow(p string, depth int) (why string) {
	if depth > maxLinks {
		return "it leads through too many symlinks"
	}
	p = strings.TrimPrefix(path.Clean("/"+p), "/")
	if len(p) > maxPath {
		return fmt.Sprintf("with its symlinks followed, it has over %d bytes", maxPath)
	}
	if depth > 0 {
		l.paths++
		if l.kept += len(p); l.paths > maxResolved || l.kept > maxKept {
			return "too many symlinks match"
		}
	}
	current := ""
	for p != "" {
		var first string
		first, p, _ = strings.Cut(p, "/")
		current = path.Join(current, first)
		targets, why := l.targets(current)
		if why != "" {
			return why
		}
		if len(targets) == 0 {
			continue
		}
		if l.seen[current] {
			return ""
		}
		l.seen[current] = true
		for _, target := range targets {
			if why := l.follow(target+"/"+p, depth+1); why != "" {
				return why
			}
		}
		return ""
	}
	return ""
}

// targets are where the symlinks lead that match p. The last element of p may be a pattern.
func (l *links) targets(p string) (targets []string, why string) {
	dir, base := path.Split(p)
	if !hasWildcard(base) {
		if i, ok := l.fs.find(p); ok {
			targets = targetOf(&l.fs.entries[i])
		}
		return targets, l.step()
	}
	first := 0
	if dir != "" {
		i, ok := l.fs.find(strings.TrimSuffix(dir, "/"))
		if !ok {
			return nil, l.step()
		}
		first = i + 1
	}
	for i := first; i < len(l.fs.entries) && strings.HasPrefix(l.fs.entries[i].Path, dir); {
		if why := l.step(); why != "" {
			return nil, why
		}
		e := &l.fs.entries[i]
		if ok, _ := path.Match(base, e.Path[len(dir):]); ok {
			targets = append(targets, targetOf(e)...)
		}
		if e.Mode.IsDir() {
			i = l.fs.after(i, e.Path+"/")
		} else {
			i++
		}
	}
	return targets, ""
}

// targetOf is where a symlink leads, from the root of the context, or nothing.
func targetOf(e *payload.Entry) []string {
	switch {
	case e.Mode&fs.ModeSymlink == 0:
		return nil
	case path.IsAbs(e.Linkname):
		return []string{e.Linkname}
	}
	return []string{path.Join("/", path.Dir(e.Path), e.Linkname)}
}

func (l *links) step() (why string) {
	if l.steps++; l.steps > maxSteps {
		return "the Dockerfile's paths match too many entries"
	}
	return ""
}

// hasWildcard is containsWildcards of fsutil.
func hasWildcard(name string) bool {
	for i := 0; i < len(name); i++ {
		switch name[i] {
		case '\\':
			i++
		case '*', '?', '[':
			return true
		}
	}
	return false
}
