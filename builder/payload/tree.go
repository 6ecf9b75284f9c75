package payload

import (
	"archive/tar"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"handler/function/api"
)

const (
	// maxName is what Linux takes as one name of a path, in bytes.
	maxName = 255

	symlinkMode = fs.ModeSymlink | 0o777 // as lstat gives it

	maxLinks = 40 // symlinks that Linux follows in one path

	freeLookups = 4096 // bytes of names that are looked up for an entry and not counted

	noEntry = -1
)

// node places an entry in the tree, until all entries are there.
type node struct {
	child, next int32 // the first entry in a directory, and the next in the same; or noEntry

	implied    bool // a directory that has had no entry of its own so far
	attributed bool // it has extended attributes
	capable    bool // it has capabilities
}

// addContext adds the entry at the path rel of the context.
func (x *indexer) addContext(rel string, hdr *tar.Header) error {
	rel, err := x.through(rel)
	if err != nil {
		return err
	}
	for part := range strings.SplitSeq(rel, "/") {
		if len(part) > maxName {
			return x.badEntry(fmt.Sprintf("a name over %d bytes in its path", maxName))
		}
	}
	var e Entry
	if hdr.Typeflag == tar.TypeLink {
		var known bool
		if e, known, err = x.linked(rel, hdr.Linkname); known {
			return nil
		}
	} else {
		e, err = x.entry(rel, hdr)
	}
	if err != nil {
		return err
	}
	i, err := x.put(e)
	if err != nil {
		return err
	}
	n := x.nodes.at(i)
	n.attributed, n.capable = attributes(hdr)
	return nil
}

// entry makes the Entry of everything but a hard link. It reads the data of a regular file.
func (x *indexer) entry(rel string, hdr *tar.Header) (Entry, error) {
	e := Entry{
		Path:    rel,
		Mode:    modeOf(hdr.Mode),
		ModTime: nanoseconds(hdr.ModTime),
		inode:   noInode,
	}
	switch hdr.Typeflag {
	case tar.TypeDir:
		e.Mode |= fs.ModeDir
	case tar.TypeSymlink:
		if hdr.Linkname == "" {
			return e, x.badEntry("a symlink without a target")
		}
		e.Mode = symlinkMode
		e.Linkname = strings.Clone(hdr.Linkname)
		e.Size = int64(len(e.Linkname))
		return e, x.take(e.Size)
	case tar.TypeChar:
		e.Mode |= fs.ModeDevice | fs.ModeCharDevice
	case tar.TypeBlock:
		e.Mode |= fs.ModeDevice
	case tar.TypeFifo:
		e.Mode |= fs.ModeNamedPipe
	default:
		if !isFile(hdr) {
			return e, x.badEntry(fmt.Sprintf("a tar entry of the unknown type %q", hdr.Typeflag))
		}
		var err error
		e.inode, err = x.addFile(hdr)
		return e, err
	}
	return e, nil
}

// linked makes the Entry of a hard link at rel: a copy of the entry that it links to. known
// says that it links to itself, and that nothing is to be done: GNU tar writes such an entry
// if it is told to pack a file with links twice.
func (x *indexer) linked(rel, linkname string) (e Entry, known bool, err error) {
	target, ok := strings.CutPrefix(path.Clean(linkname), api.ContextDir+"/")
	if ok {
		if target, err = x.through(target); err != nil {
			return e, false, err
		}
	}
	i, there := x.paths[target]
	if !ok || !there || x.entries.at(i).Mode.IsDir() {
		return e, false, x.badEntry(fmt.Sprintf("a hard link to %s, which is no earlier file or symlink of the context", quote(linkname)))
	}
	if target == rel {
		return e, true, nil
	}
	e = *x.entries.at(i)
	e.Path = rel
	return e, false, x.countNames(len(e.Linkname))
}

// nanoseconds is t as BuildKit has times. A time outside of BuildKit's range becomes the
// nearest second inside.
func nanoseconds(t time.Time) int64 {
	switch sec := t.Unix(); {
	case sec < minSecond:
		return minSecond * second
	case sec > maxSecond:
		return maxSecond * second
	}
	return t.UnixNano()
}

// through resolves the symlinks above the last name of rel, as unpacking the tar would. The
// context is the root: no symlink leads out of it.
func (x *indexer) through(rel string) (string, error) {
	slash := strings.LastIndexByte(rel, '/')
	if slash < 0 {
		return rel, nil
	}
	if i, ok := x.paths[rel[:slash]]; ok && x.entries.at(i).Mode.IsDir() {
		return rel, nil
	}
	var link string // the last symlink that was followed
	var links int   // how many were followed
	var to int      // length of the last symlink's target, which must be there
	for from, looked := 0, 0; ; {
		next := strings.IndexByte(rel[from:], '/')
		if next < 0 {
			return rel, nil
		}
		end := from + next
		from = end + 1
		// A path may have thousands of parts, and each part is looked up. These lookups
		// are counted like names. A path of an ordinary length is free.
		if looked += end; looked > freeLookups {
			if err := x.countNames(end/16 + 1); err != nil {
				return "", err
			}
		}
		i, ok := x.paths[rel[:end]]
		switch {
		case !ok && end <= to || links > maxLinks:
			return "", x.badEntry(fmt.Sprintf("%s is not a directory", quote(api.ContextDir+"/"+link)))
		case !ok:
			return rel, nil
		case x.entries.at(i).Mode&fs.ModeSymlink == 0:
			continue
		}
		e := x.entries.at(i)
		target := targetOf(e)
		links, link, to = links+1, e.Path, len(target)
		var err error
		if rel, err = x.follow(link, target, rel[end:]); err != nil {
			return "", err
		}
		from = 0
	}
}

// targetOf is the path that a symlink leads to, without a slash before it. A target outside
// of the context becomes one inside.
func targetOf(e *Entry) string {
	target := e.Linkname
	if !path.IsAbs(target) {
		target = path.Join(path.Dir(e.Path), target)
	}
	return strings.TrimPrefix(path.Join("/", target), "/")
}

// follow is the path rest, which begins with a slash, below the target of link.
func (x *indexer) follow(link, target, rest string) (string, error) {
	rel := strings.TrimPrefix(path.Join("/", target, rest), "/")
	if len(rel) > x.limits.Path {
		return "", tooLarge("tar entry %s: a path over the limit of %d bytes (max_path_bytes) through the symlink %s", quote(x.last), x.limits.Path, quote(link))
	}
	return rel, x.countNames(len(target))
}

// addFile reads a regular file's data, and returns its inode.
func (x *indexer) addFile(hdr *tar.Header) (int32, error) {
	if err := x.take(inodeMemory); err != nil {
		return noInode, err
	}
	if err := x.checkSparse(hdr); err != nil {
		return noInode, err
	}
	i := x.inodes.add(inode{offset: x.in.n, size: hdr.Size})
	x.hash.Reset()
	var err error
	if sparse, _ := sparseFile(hdr); sparse {
		err = x.readSparse(hdr, i)
	} else {
		err = x.read(hdr, x.hash)
	}
	if err != nil {
		return noInode, err
	}
	x.hash.Sum(x.sums.at(x.sums.add(contentSum{}))[:0])
	return i, nil
}

// modeOf is the mode of a tar header. Some writers put the type there too, which is dropped.
func modeOf(m int64) fs.FileMode {
	mode := fs.FileMode(m & 0o777)
	for _, bit := range []struct {
		tar int64
		fs  fs.FileMode
	}{
		{0o4000, fs.ModeSetuid},
		{0o2000, fs.ModeSetgid},
		{0o1000, fs.ModeSticky},
	} {
		if m&bit.tar != 0 {
			mode |= bit.fs
		}
	}
	return mode
}

// attributes looks for extended attributes. BuildKit is sent none of them.
func attributes(hdr *tar.Header) (any, capabilities bool) {
	for key := range hdr.PAXRecords {
		for _, prefix := range []string{"SCHILY.xattr.", "LIBARCHIVE.xattr."} {
			if name, ok := strings.CutPrefix(key, prefix); ok {
				any = true
				capabilities = capabilities || name == "security.capability"
			}
		}
	}
	return any, capabilities
}

// put adds e to the tree, as unpacking the tar would. An earlier entry at the same path is
// replaced, with everything below it. Only a directory that replaces a directory keeps
// everything below it.
func (x *indexer) put(e Entry) (int32, error) {
	i, ok := x.paths[e.Path]
	if !ok {
		e.Path = strings.Clone(e.Path)
		return x.insert(e)
	}
	old, n := x.entries.at(i), x.nodes.at(i)
	if n.implied {
		n.implied = false
		x.implied--
		x.names += int64(len(old.Path))
	}
	if !e.Mode.IsDir() {
		x.drop(n.child)
		n.child = noEntry
	}
	e.Path = old.Path
	*old = e
	return i, nil
}

// insert adds an entry at a path without one. Before it, insert adds the directories above
// it that the tar leaves out.
func (x *indexer) insert(e Entry) (int32, error) {
	if err := x.take(entryMemory + pathMemory + int64(len(e.Path))); err != nil {
		return noEntry, err
	}
	siblings := &x.top
	if slash := strings.LastIndexByte(e.Path, '/'); slash >= 0 {
		parent := e.Path[:slash]
		i, ok := x.paths[parent]
		if !ok {
			x.implied++
			if err := x.countNames(len(parent)); err != nil {
				return noEntry, err
			}
			var err error
			if i, err = x.insert(Entry{Path: parent, Mode: fs.ModeDir | 0o755, inode: noInode}); err != nil {
				return noEntry, err
			}
			x.nodes.at(i).implied = true
		}
		if !x.entries.at(i).Mode.IsDir() {
			return noEntry, x.badEntry(fmt.Sprintf("%s is not a directory", quote(api.ContextDir+"/"+parent)))
		}
		siblings = &x.nodes.at(i).child
	}
	next := *siblings
	*siblings = x.entries.len
	x.nodes.add(node{child: noEntry, next: next})
	x.paths[e.Path] = x.entries.len
	return x.entries.add(e), nil
}

// drop removes from the tree: entry i, the entries after it in the same directory, and
// everything below them.
func (x *indexer) drop(i int32) {
	for todo := []int32{i}; len(todo) > 0; {
		i, todo = todo[len(todo)-1], todo[:len(todo)-1]
		for ; i != noEntry; i = x.nodes.at(i).next {
			delete(x.paths, x.entries.at(i).Path)
			x.entries.at(i).Path = ""
			if child := x.nodes.at(i).child; child != noEntry {
				todo = append(todo, child)
			}
		}
	}
}

// finish sorts the entries, and makes every entry of a file but the first a hard link to the
// first.
func (x *indexer) finish() (*Context, error) {
	if !x.memory.Take(x.owed) {
		return nil, errMemory
	}
	x.taken, x.owed = x.taken+x.owed, 0
	x.paths = nil
	x.give(int64(x.entries.len) * pathMemory)
	for i := range x.entries.len {
		e, n := x.entries.at(i), x.nodes.at(i)
		if e.Path == "" || !n.attributed {
			continue
		}
		x.attributed++
		if n.capable {
			if x.capable++; len(x.capabilities) < maxNamed {
				x.capabilities = append(x.capabilities, e.Path)
			}
		}
	}
	x.nodes = paged[node]{}
	entries := slices.DeleteFunc(x.entries.take(), func(e Entry) bool { return e.Path == "" })
	inodes := x.inodes.take()
	sums := x.sums.take()

	entries = sortEntries(entries)
	first := make([]int32, len(inodes)) // by inode, the entry's index + 1
	for i := range entries {
		e := &entries[i]
		if e.inode == noInode {
			continue
		}
		e.Size = inodes[e.inode].size
		if f := first[e.inode]; f > 0 {
			e.Linkname = entries[f-1].Path
			continue
		}
		first[e.inode] = int32(i + 1)
	}
	return &Context{entries: entries, inodes: inodes, sums: sums, sparse: x.sparse}, nil
}

// sortEntries sorts entries in the order of ComparePath. It sorts each half on a processor of
// its own.
func sortEntries(entries []Entry) []Entry {
	compare := func(a, b Entry) int { return ComparePath(a.Path, b.Path) }
	a, b := entries[:len(entries)/2], entries[len(entries)/2:]
	var work sync.WaitGroup
	work.Go(func() { slices.SortFunc(a, compare) })
	slices.SortFunc(b, compare)
	work.Wait()
	if len(a) == 0 || compare(a[len(a)-1], b[0]) < 0 {
		return entries
	}
	merged := make([]Entry, 0, len(entries))
	for len(a) > 0 && len(b) > 0 {
		if compare(a[0], b[0]) < 0 {
			merged, a = append(merged, a[0]), a[1:]
		} else {
			merged, b = append(merged, b[0]), b[1:]
		}
	}
	return append(append(merged, a...), b...)
}

// paged is a slice that grows without being copied. The copies that append leaves behind
// would be most of an upload's memory.
type paged[T any] struct {
	pages [][]T
	len   int32
}

const pageLen = 1024

func (p *paged[T]) at(i int32) *T { return &p.pages[i/pageLen][i%pageLen] }

// add appends v and returns its index.
func (p *paged[T]) add(v T) int32 {
	if p.len%pageLen == 0 {
		p.pages = append(p.pages, nil)
	}
	last := &p.pages[len(p.pages)-1]
	*last = append(*last, v)
	p.len++
	return p.len - 1
}

// take moves everything in p into one slice. It frees each page once it is copied.
func (p *paged[T]) take() []T {
	s := make([]T, 0, p.len)
	for i, page := range p.pages {
		s = append(s, page...)
		p.pages[i] = nil
	}
	*p = paged[T]{}
	return s
}
