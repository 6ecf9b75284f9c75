package payload

import (
	"archive/tar"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"

	"handler/function/api"
)

const (
	// maxName is what Linux takes as one name of a path, in bytes.
	maxName = 255

	symlinkMode = fs.ModeSymlink | 0o777 // as lstat gives it

	maxLinks = 40 // that Linux follows in one path

	freeLookups = 4096 // bytes of names that are looked up for an entry

	noEntry = -1
)

// node is where an entry is in the tree, until all are there.
type node struct {
	child, next int32 // first of what is in a directory, next in the same; or noEntry

	implied    bool // a directory that has had no entry so far
	attributed bool // with extended attributes
	capable    bool // with capabilities
}

// addContext takes in an entry at rel in the context.
func (x *indexer) addContext(rel string, hdr *tar.Header) error {
	rel, err := x.through(rel)
	if err != nil {
		return err
	}
	for part := range strings.SplitSeq(rel, "/") {
		if len(part) > maxName {
			return x.refuse(fmt.Sprintf("a name over %d bytes in its path", maxName))
		}
	}
	e := Entry{
		Path:    rel,
		Mode:    modeOf(hdr.Mode),
		ModTime: hdr.ModTime.UnixNano(),
		inode:   noInode,
	}
	// Of what BuildKit has no time for, the nearest that it has.
	if sec := hdr.ModTime.Unix(); sec < minSecond {
		e.ModTime = minSecond * second
	} else if sec > maxSecond {
		e.ModTime = maxSecond * second
	}
	switch hdr.Typeflag {
	case tar.TypeDir:
		e.Mode |= fs.ModeDir
	case tar.TypeSymlink:
		if hdr.Linkname == "" {
			return x.refuse("a symlink without a target")
		}
		e.Mode = symlinkMode
		e.Linkname = strings.Clone(hdr.Linkname)
		e.Size = int64(len(e.Linkname))
		err = x.take(e.Size)
	case tar.TypeLink:
		target, ok := strings.CutPrefix(path.Clean(hdr.Linkname), api.ContextDir+"/")
		if ok {
			if target, err = x.through(target); err != nil {
				return err
			}
		}
		i, there := x.paths[target]
		if !ok || !there || x.entries.at(i).Mode.IsDir() {
			return x.refuse(fmt.Sprintf("a hard link to %s, which is no earlier file or symlink of the context", quote(hdr.Linkname)))
		}
		if target == rel {
			return nil // GNU tar packs a file with links so that it is told to pack twice
		}
		e = *x.entries.at(i)
		e.Path = rel
		err = x.countNames(len(e.Linkname))
	case tar.TypeChar:
		e.Mode |= fs.ModeDevice | fs.ModeCharDevice
	case tar.TypeBlock:
		e.Mode |= fs.ModeDevice
	case tar.TypeFifo:
		e.Mode |= fs.ModeNamedPipe
	default:
		if !isFile(hdr) {
			return x.refuse(fmt.Sprintf("a tar entry of the unknown type %q", hdr.Typeflag))
		}
		e.inode, err = x.addFile(hdr)
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

// through follows the symlinks above the last name of rel, as extracting does where the
// context is the root of the file system.
func (x *indexer) through(rel string) (string, error) {
	slash := strings.LastIndexByte(rel, '/')
	if slash < 0 {
		return rel, nil
	}
	if i, ok := x.paths[rel[:slash]]; ok && x.entries.at(i).Mode.IsDir() {
		return rel, nil
	}
	var link string // the last one
	var links, to int
	for from, looked := 0, 0; ; {
		next := strings.IndexByte(rel[from:], '/')
		if next < 0 {
			return rel, nil
		}
		end := from + next
		from = end + 1
		// A path may have thousands of parts, each of which takes a look: that is counted
		// like names, but for what paths usually have.
		if looked += end; looked > freeLookups {
			if err := x.countNames(end/16 + 1); err != nil {
				return "", err
			}
		}
		i, ok := x.paths[rel[:end]]
		switch {
		case !ok && end <= to || links > maxLinks:
			return "", x.refuse(fmt.Sprintf("%s is not a directory", quote(api.ContextDir+"/"+link)))
		case !ok:
			return rel, nil
		case x.entries.at(i).Mode&fs.ModeSymlink == 0:
			continue
		}
		e := x.entries.at(i)
		target := e.Linkname
		if !path.IsAbs(target) {
			target = path.Join(path.Dir(e.Path), target)
		}
		// What is inside stays inside.
		target = strings.TrimPrefix(path.Join("/", target), "/")
		links, link, to = links+1, e.Path, len(target)
		rel = strings.TrimPrefix(path.Join("/", target, rel[end:]), "/")
		if len(rel) > x.limits.Path {
			return "", tooLarge("tar entry %s: a path over the limit of %d bytes (max_path_bytes) through the symlink %s", quote(x.last), x.limits.Path, quote(link))
		}
		if err := x.countNames(len(target)); err != nil {
			return "", err
		}
		from = 0
	}
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

// modeOf is a tar header's mode without the type that some writers put there.
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

// attributes looks for those that BuildKit is not sent.
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

// put puts e into the tree as extracting it would. What was at its path is replaced,
// with all that was in it, but for a directory by another.
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

// insert adds an entry at a path where there is none, and the directories above it
// that are left out.
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
			return noEntry, x.refuse(fmt.Sprintf("%s is not a directory", quote(api.ContextDir+"/"+parent)))
		}
		siblings = &x.nodes.at(i).child
	}
	next := *siblings
	*siblings = x.entries.len
	x.nodes.add(node{child: noEntry, next: next})
	x.paths[e.Path] = x.entries.len
	return x.entries.add(e), nil
}

// drop takes entry i, those next to it and all that is in them out of the tree.
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

// finish puts the entries in order, and sets the links of files.
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

// sortEntries puts entries in the order of ComparePath, each half on a processor of its
// own.
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

// paged is a slice that grows without leaving its old selves behind: those of
// many entries would be most of an upload's memory.
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

// take empties p into one slice, page by page.
func (p *paged[T]) take() []T {
	s := make([]T, 0, p.len)
	for i, page := range p.pages {
		s = append(s, page...)
		p.pages[i] = nil
	}
	*p = paged[T]{}
	return s
}
