package payload

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/minio/highwayhash"

	"handler/function/api"
	"handler/function/budget"
)

const (
	blockLen = 512 // of a tar

	// freeHeaders is how many bytes of headers an entry has for nothing: its
	// own block, a long name and link target, and times. What is over it is
	// counted, since a flood of extended headers costs time and memory that
	// the limit on entries does not see.
	freeHeaders = 4096

	// maxName is what Linux takes as one name of a path, in bytes.
	maxName = 255

	symlinkMode = fs.ModeSymlink | 0o777 // as lstat gives it
)

// errHeaders is what the stream of a tar returns when its headers are over the
// limit.
var errHeaders = errors.New("extended headers over the limit")

// errMemory is of an index for which there is no memory now.
var errMemory = errors.New("indexing payload: no memory is left for it")

// What an index takes of memory, in bytes. TestIndexMemory compares it with what the
// runtime says.
const (
	entryMemory = 112      // of an entry beside its names
	pathMemory  = 64       // of an entry, until all are there
	leastTaken  = 64 << 10 // is taken at once
)

// index reads a tar to its end and returns what it holds. data is where the
// same bytes can be read later. The index is taken of memory. Each of its errors that is the client's is an
// *api.Error. errMemory is for the caller alone.
func index(r io.Reader, data io.ReaderAt, opts *Options, memory *budget.Account) (_ *Payload, err error) {
	hash, err := highwayhash.NewDigest128(opts.ContentKey[:])
	if err != nil {
		return nil, err
	}
	start := &beginning{r: r}
	x := &indexer{
		memory:  memory,
		limits:  &opts.Limits,
		start:   start,
		in:      &tarStream{r: start, limit: opts.Limits.Unpacked},
		hash:    hash,
		paths:   map[string]int32{},
		others:  map[string]struct{}{},
		names:   opts.Limits.Names,
		headers: opts.Limits.Names,
	}
	defer func() {
		if err != nil {
			x.give(x.taken)
		}
	}()
	x.tr = tar.NewReader(x.in)
	for {
		hdr, err := x.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		if err := x.add(hdr); err != nil {
			return nil, err
		}
	}
	if err := x.zeros(); err != nil {
		return nil, err
	}
	if opts.ContextOnly && !x.context {
		return nil, ErrNoContext
	}
	if _, ok := x.others[api.ConfigFile]; !ok && !opts.ContextOnly {
		return nil, refuse(nil, "reading tar: it holds no %s", api.ConfigFile)
	}
	c, err := x.finish()
	if err != nil {
		return nil, err
	}
	p := &Payload{Config: x.config, Secrets: x.secrets, memory: x.taken}
	if x.context {
		c.data = data
		p.Context = c
	}
	if x.ignored > 0 {
		p.Warnings = append(p.Warnings, x.warning())
	}
	return p, nil
}

type indexer struct {
	memory      *budget.Account
	taken, owed int64 // of memory: what has been, and what is still to be

	limits *Limits
	start  *beginning
	in     *tarStream
	tr     *tar.Reader
	hash   *highwayhash.Digest
	buf    []byte
	last   string // name of the last entry, for errors of the next

	config, secrets []byte
	context         bool // there is one

	entries paged[Entry]
	inodes  paged[inode]
	sums    paged[contentSum]   // by inode
	paths   map[string]int32    // index in entries by Path
	others  map[string]struct{} // cleaned names of all other entries

	count   int   // entries so far
	names   int64 // bytes of names that may still come
	headers int64 // bytes of extended headers that may still come

	ignored int
	first   []string // names of the first that were ignored
}

// next is the next entry, global headers left out. It returns io.EOF after the
// two blocks of zeros that end a tar.
func (x *indexer) next() (*tar.Header, error) {
	for {
		pad := -x.in.n & (blockLen - 1)
		start := x.in.n + pad
		x.in.beginHeaders(start + freeHeaders + x.headers)
		hdr, err := x.tr.Next()
		x.in.inHeaders = false
		used := x.in.n - start
		switch {
		case err == io.EOF && used == 2*blockLen && x.in.zeros >= 2*blockLen:
			return nil, io.EOF
		case err == io.EOF || err == io.ErrUnexpectedEOF:
			return nil, x.cutShort(err)
		case err != nil:
			return nil, x.headerError(err)
		}
		used += -used & (blockLen - 1) // the padding of a global header is not read yet
		if hdr.Typeflag == tar.TypeXGlobalHeader {
			if x.headers -= used; x.headers < 0 {
				return nil, x.headerError(errHeaders)
			}
			continue
		}
		x.headers -= max(0, used-freeHeaders)
		return hdr, nil
	}
}

func (x *indexer) cutShort(err error) error {
	if x.in.n == 0 {
		return refuse(err, "reading tar: there is none, this is empty; %s", tarWanted)
	}
	if err := x.noTar(err); err != nil {
		return err
	}
	return refuse(err, "reading tar: it is cut short after %s: two blocks of zeros do not end it", x.after())
}

func (x *indexer) headerError(err error) error {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	switch {
	case errors.Is(err, errHeaders):
		return tooLarge("the tar's extended headers are over the limit of %d bytes (max_names_bytes) after %s", x.limits.Names, x.after())
	case errors.Is(err, tar.ErrFieldTooLong):
		return tooLarge("the tar has an extended header of over 1 MiB after %s", x.after())
	case errors.Is(err, tar.ErrHeader) && x.count == 0:
		if err := x.noTar(err); err != nil {
			return err
		}
		return refuse(err, "reading tar: this is neither a tar nor one compressed with gzip or zstd")
	}
	return refuse(err, "reading tar: bad header after %s", x.after())
}

func (x *indexer) after() string {
	if x.count == 0 {
		return "its beginning"
	}
	return "entry " + quote(x.last)
}

// give gives n bytes of memory back.
func (x *indexer) give(n int64) {
	x.memory.Give(n)
	x.taken -= n
}

// add takes in one entry, with its data.
func (x *indexer) add(hdr *tar.Header) error {
	x.last = shorten(hdr.Name)
	if x.count++; x.count > x.limits.Entries {
		return tooLarge("tar entry %s: over the limit of %d entries (max_entries)", quote(x.last), x.limits.Entries)
	}
	if err := x.take(entryMemory + pathMemory); err != nil {
		return err
	}
	if err := x.checkType(hdr); err != nil {
		return err
	}
	name, err := x.clean(hdr)
	if err != nil {
		return err
	}
	isDir := hdr.Typeflag == tar.TypeDir
	rel, inContext := strings.CutPrefix(name, api.ContextDir+"/")
	if inContext {
		x.context = true
		if _, ok := x.paths[rel]; ok {
			return x.refuse("it is there twice")
		}
		return x.addContext(rel, hdr)
	}
	if _, ok := x.others[name]; ok {
		return x.refuse("it is there twice")
	}
	x.others[name] = struct{}{}
	switch name {
	case api.ConfigFile:
		x.config, err = x.readFile(hdr, x.limits.Config, "max_config_bytes")
		return err
	case api.SecretsFile:
		x.secrets, err = x.readFile(hdr, x.limits.Secrets, "max_secrets_bytes")
		return err
	case api.ContextDir, ".":
		if !isDir {
			return x.refuse("it is not a directory")
		}
		x.context = x.context || name == api.ContextDir
		return nil
	}
	if x.ignored++; len(x.first) < 3 {
		x.first = append(x.first, name)
	}
	return x.skip(hdr)
}

// refuse names the entry that was read last.
func (x *indexer) refuse(why string) error {
	return refuse(nil, "tar entry %s: %s", quote(x.last), why)
}

// clean checks the entry's name and link target. The name it returns is one of
// its own: those of the header may be parts of something far larger.
func (x *indexer) clean(hdr *tar.Header) (string, error) {
	for _, s := range []string{hdr.Name, hdr.Linkname} {
		if len(s) > x.limits.Path {
			return "", tooLarge("tar entry %s: a path over the limit of %d bytes (max_path_bytes)", quote(x.last), x.limits.Path)
		}
		if strings.IndexByte(s, 0) >= 0 {
			return "", x.refuse("a NUL in a path")
		}
		if !utf8.ValidString(s) {
			return "", x.refuse("a path that is not UTF-8")
		}
	}
	switch name := hdr.Name; {
	case name == "":
		return "", x.refuse("it has no name")
	case name[0] == '/':
		return "", x.refuse("an absolute path")
	case strings.IndexByte(name, '\\') >= 0:
		return "", x.refuse("a backslash in its path")
	case hdr.Typeflag != tar.TypeDir && name[len(name)-1] == '/':
		return "", x.refuse("a slash at its end, though it is not a directory")
	}
	for part := range strings.SplitSeq(hdr.Name, "/") {
		if part == ".." {
			return "", x.refuse(`".." in its path`)
		}
		if len(part) > maxName {
			return "", x.refuse(fmt.Sprintf("a name over %d bytes in its path", maxName))
		}
	}
	name := path.Clean(hdr.Name)
	if err := x.charge(len(name) + len(hdr.Linkname)); err != nil {
		return "", err
	}
	return strings.Clone(name), nil
}

// charge counts n bytes of names.
func (x *indexer) charge(n int) error {
	if x.names -= int64(n); x.names < 0 {
		return tooLarge("tar entry %s: all paths together are over the limit of %d bytes (max_names_bytes)", quote(x.last), x.limits.Names)
	}
	return x.take(int64(n))
}

// take takes n bytes of memory, some of them later.
func (x *indexer) take(n int64) error {
	if x.owed += n; x.owed < leastTaken {
		return nil
	}
	if !x.memory.Take(x.owed) {
		return errMemory
	}
	x.taken, x.owed = x.taken+x.owed, 0
	return nil
}

func (x *indexer) checkType(hdr *tar.Header) error {
	for key := range hdr.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return x.refuse("a sparse file")
		}
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink:
		return nil
	case tar.TypeGNUSparse:
		return x.refuse("a sparse file")
	case tar.TypeChar, tar.TypeBlock:
		return x.refuse("a device")
	case tar.TypeFifo:
		return x.refuse("a FIFO")
	}
	return x.refuse(fmt.Sprintf("a tar entry of the unknown type %q", hdr.Typeflag))
}

func (x *indexer) addContext(rel string, hdr *tar.Header) error {
	e := Entry{
		Path:  rel,
		Mode:  modeOf(hdr.Mode),
		inode: noInode,
	}
	sec := hdr.ModTime.Unix()
	if sec < minSecond || sec > maxSecond {
		return x.refuse("its time is out of range")
	}
	e.ModTime = hdr.ModTime.UnixNano()
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
	case tar.TypeLink:
		target, ok := strings.CutPrefix(path.Clean(hdr.Linkname), api.ContextDir+"/")
		i, there := x.paths[target]
		if !ok || !there || x.entries.at(i).inode == noInode {
			return x.refuse(fmt.Sprintf("a hard link to %s, which is no earlier file of the context", quote(hdr.Linkname)))
		}
		t := x.entries.at(i)
		e.Mode, e.ModTime, e.inode = t.Mode, t.ModTime, t.inode
	default:
		e.inode = x.inodes.add(inode{offset: x.in.n, size: hdr.Size})
		x.hash.Reset()
		if err := x.read(hdr, x.hash); err != nil {
			return err
		}
		x.hash.Sum(x.sums.at(x.sums.add(contentSum{}))[:0])
	}
	x.paths[rel] = x.entries.add(e)
	return nil
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

// readFile reads the data of a regular file of at most limit bytes, which
// setting sets.
func (x *indexer) readFile(hdr *tar.Header, limit int64, setting string) ([]byte, error) {
	if hdr.Typeflag != tar.TypeReg {
		return nil, x.refuse("it is not a regular file")
	}
	if hdr.Size > limit {
		return nil, tooLarge("tar entry %s: over the limit of %d bytes (%s)", quote(x.last), limit, setting)
	}
	if err := x.take(hdr.Size); err != nil {
		return nil, err
	}
	buf := bytes.NewBuffer(make([]byte, 0, hdr.Size))
	err := x.read(hdr, buf)
	return buf.Bytes(), err
}

func (x *indexer) skip(hdr *tar.Header) error { return x.read(hdr, io.Discard) }

// read writes all data of an entry to w.
func (x *indexer) read(hdr *tar.Header, w io.Writer) error {
	if hdr.Typeflag == tar.TypeReg && hdr.Size > x.limits.Unpacked-x.in.n {
		return x.in.tooLarge()
	}
	buf, err := x.buffer()
	if err != nil {
		return err
	}
	// What is hidden is WriteTo and ReadFrom, which would not use the buffer.
	_, err = io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{x.tr}, buf)
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return refuse(err, "reading tar: it is cut short in entry %s", quote(x.last))
	}
	return refuse(err, "reading tar: bad data of entry %s", quote(x.last))
}

// buffer is for data that passes.
func (x *indexer) buffer() ([]byte, error) {
	if x.buf == nil {
		if err := x.take(readSize); err != nil {
			return nil, err
		}
		x.buf = make([]byte, readSize)
	}
	return x.buf, nil
}

// zeros reads what follows a tar, which may be padding and nothing else.
func (x *indexer) zeros() error {
	buf, err := x.buffer()
	if err != nil {
		return err
	}
	for {
		n, err := x.in.Read(buf)
		if len(bytes.TrimLeft(buf[:n], "\x00")) > 0 {
			return refuse(nil, "reading tar: something else than zeros follows its end")
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return x.headerError(err)
		}
	}
}

// finish puts the entries in order, each with its parents, and sets the links of
// files.
func (x *indexer) finish() (*Context, error) {
	if err := x.addParents(); err != nil {
		return nil, err
	}
	if !x.memory.Take(x.owed) {
		return nil, errMemory
	}
	x.taken, x.owed = x.taken+x.owed, 0
	x.paths, x.others = nil, nil
	x.give(int64(x.count) * pathMemory)
	entries := x.entries.take()
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
	return &Context{entries: entries, inodes: inodes, sums: sums}, nil
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

// addParents adds the directories that the tar leaves out.
func (x *indexer) addParents() error {
	// Those added on the way are looked at in their turn.
	for i := int32(0); i < x.entries.len; i++ {
		p := x.entries.at(i).Path
		slash := strings.LastIndexByte(p, '/')
		if slash < 0 {
			continue
		}
		parent := p[:slash]
		if j, ok := x.paths[parent]; ok {
			if !x.entries.at(j).Mode.IsDir() {
				return refuse(nil, "tar entry %s: %s is not a directory", quote(api.ContextDir+"/"+p), quote(api.ContextDir+"/"+parent))
			}
			continue
		}
		x.last = shorten(api.ContextDir + "/" + p)
		if x.count++; x.count > x.limits.Entries {
			return tooLarge("tar entry %s: over the limit of %d entries (max_entries) with the directories that are left out", quote(x.last), x.limits.Entries)
		}
		if err := x.take(entryMemory + pathMemory); err != nil {
			return err
		}
		if err := x.charge(len(parent)); err != nil {
			return err
		}
		x.paths[parent] = x.entries.add(Entry{Path: parent, Mode: fs.ModeDir | 0o755, inode: noInode})
	}
	return nil
}

func (x *indexer) warning() string {
	names := make([]string, len(x.first))
	for i, n := range x.first {
		names[i] = quote(n)
	}
	more := ""
	if x.ignored > len(names) {
		more = ", …"
	}
	entries := "entries"
	if x.ignored == 1 {
		entries = "entry"
	}
	return fmt.Sprintf("%d %s of the tar beside %s/ ignored: %s%s", x.ignored, entries, api.ContextDir, strings.Join(names, ", "), more)
}

// shorten keeps a name from making an error as long as itself.
func shorten(name string) string {
	const most = 200
	if len(name) <= most {
		return strings.Clone(name)
	}
	return name[:most] + "…"
}

func quote(name string) string { return fmt.Sprintf("%q", shorten(name)) }

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

// tarStream counts the bytes of a tar, and bounds them.
type tarStream struct {
	r     io.Reader
	n     int64
	limit int64

	// While headers are read: where they must have ended, and how many zero
	// bytes were the last.
	inHeaders bool
	end       int64
	zeros     int64
}

func (s *tarStream) beginHeaders(end int64) {
	s.inHeaders, s.end, s.zeros = true, end, 0
}

func (s *tarStream) tooLarge() error {
	return tooLarge("the tar is over the limit of %d bytes unpacked (max_unpacked_bytes)", s.limit)
}

func (s *tarStream) Read(p []byte) (int, error) {
	if s.inHeaders && s.n >= s.end {
		return 0, errHeaders
	}
	n, err := s.r.Read(p)
	s.n += int64(n)
	if s.n > s.limit {
		return n, s.tooLarge()
	}
	if s.inHeaders {
		if t := len(bytes.TrimRight(p[:n], "\x00")); t > 0 {
			s.zeros = int64(n - t)
		} else {
			s.zeros += int64(n)
		}
	}
	return n, err
}
