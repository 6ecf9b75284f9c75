package payload

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/minio/highwayhash"

	"handler/function/api"
	"handler/function/budget"
)

const (
	blockLen = 512 // of a tar

	// freeHeaders is how many bytes of headers of an entry are not counted: its own
	// block, a long name and link target, and times. More bytes are counted, because a
	// flood of extended headers costs time and memory, and the limit on entries does not
	// bound it.
	freeHeaders = 4096

	// earlyHeaders bounds the bytes of headers of one entry before the signature has
	// passed. In memory, an extended header can take ten times its bytes in the tar.
	earlyHeaders = 64 << 10

	maxNamed = 3 // entries in one warning
)

// errHeaders is returned by a tarStream when headers are over the limit.
var errHeaders = errors.New("extended headers over the limit")

// The memory of an index, in bytes. TestIndexMemory compares these numbers with the
// runtime's.
const (
	entryMemory    = 80       // of an entry without its names
	inodeMemory    = 32       // of a file's content
	fragmentMemory = 32       // of a piece of a sparse file's content
	pathMemory     = 64       // of an entry, until all entries are there
	leastTaken     = 64 << 10 // taken of the account at once
)

// index reads a tar to its end and returns what it holds. The same bytes can be read from data
// later. early means that no signature has passed yet. The index is paid for by memory. An
// error that is the client's is an *api.Error. errMemory and errLater are for the caller alone.
func index(r io.Reader, data io.ReaderAt, early bool, opts *Options, memory *budget.Account) (_ *Payload, err error) {
	hash, err := highwayhash.NewDigest128(opts.ContentKey[:])
	if err != nil {
		return nil, err
	}
	start := &beginning{r: r}
	x := &indexer{
		top:     noEntry,
		early:   early,
		memory:  memory,
		limits:  &opts.Limits,
		start:   start,
		in:      &tarStream{r: start, limit: opts.Limits.Unpacked},
		hash:    hash,
		paths:   map[string]int32{},
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
	if x.config == nil && !opts.ContextOnly {
		return nil, badTar(nil, "reading tar: it holds no %s", api.ConfigFile)
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
	p.Warnings = x.warnings()
	return p, nil
}

type indexer struct {
	early       bool
	memory      *budget.Account
	taken, owed int64 // bytes that have been taken of memory, and bytes still to be taken

	limits *Limits
	start  *beginning
	in     *tarStream
	tr     *tar.Reader
	hash   *highwayhash.Digest
	buf    []byte
	last   string // name of the last entry, for errors

	config, secrets []byte
	context         bool // the tar has one

	entries paged[Entry]
	nodes   paged[node] // by entry
	top     int32       // the first entry at the top of the context, or noEntry
	inodes  paged[inode]
	sums    paged[contentSum]    // by inode
	sparse  map[int32][]fragment // by inode
	paths   map[string]int32     // index in entries by Path

	count   int   // entries so far
	implied int   // directories that have had no entry of their own so far
	names   int64 // bytes of names that may still come
	headers int64 // bytes of extended headers that may still come
	pieces  int   // of sparse files so far

	// For the warnings.
	ignored      int
	first        []string // names of the first ignored entries
	attributed   int      // entries with extended attributes
	capable      int      // entries with capabilities
	capabilities []string // paths of the first entries with capabilities
}

// next returns the next entry. It skips global headers. It returns io.EOF after the two blocks
// of zeros that end a tar.
func (x *indexer) next() (*tar.Header, error) {
	for {
		pad := -x.in.n & (blockLen - 1)
		start := x.in.n + pad
		limit := freeHeaders + x.headers
		if x.early {
			limit = min(limit, earlyHeaders)
		}
		x.in.beginHeaders(start + limit)
		hdr, err := x.tr.Next()
		x.in.inHeaders = false
		used := x.in.n - start
		switch {
		case err == io.EOF && used == 2*blockLen && x.in.zeros >= 2*blockLen:
			return nil, io.EOF
		case errors.Is(err, errHeaders) && x.early:
			return nil, errLater
		case err == io.EOF || err == io.ErrUnexpectedEOF:
			return nil, x.cutShort(err)
		case err != nil:
			return nil, x.headerError(err)
		}
		used += -used & (blockLen - 1) // a global header's padding has not been read yet
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
		return badTar(err, "reading tar: there is none, this is empty; %s", tarWanted)
	}
	if err := x.noTar(err); err != nil {
		return err
	}
	return badTar(err, "reading tar: it is cut short after %s: the two blocks of zeros that end a tar are missing", x.after())
}

func (x *indexer) headerError(err error) error {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	switch {
	case errors.Is(err, errHeaders):
		return tooLarge("the tar's extended headers are over the limit of %d bytes (max_names_bytes) after %s", x.limits.Names, x.after())
	case errors.Is(err, tar.ErrFieldTooLong):
		return tooLarge("the tar has an extended header over 1 MiB after %s", x.after())
	case errors.Is(err, tar.ErrHeader) && x.count == 0:
		if err := x.noTar(err); err != nil {
			return err
		}
		return badTar(err, "reading tar: this is neither a tar nor one compressed with gzip or zstd")
	}
	return badTar(err, "reading tar: bad header after %s", x.after())
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

// add adds one entry. It reads the entry's data.
func (x *indexer) add(hdr *tar.Header) error {
	x.last = shorten(hdr.Name)
	if x.count++; x.count > x.limits.Entries {
		return tooLarge("tar entry %s: over the limit of %d entries (max_entries)", quote(x.last), x.limits.Entries)
	}
	name, err := x.clean(hdr)
	if err != nil {
		return err
	}
	if rel, ok := strings.CutPrefix(name, api.ContextDir+"/"); ok {
		x.context = true
		if err := x.addContext(rel, hdr); err != nil {
			return err
		}
		if x.count+x.implied > x.limits.Entries {
			return tooLarge("tar entry %s: over the limit of %d entries (max_entries) with the directories that are left out", quote(x.last), x.limits.Entries)
		}
		return nil
	}
	switch name {
	case api.ConfigFile:
		x.config, err = x.readFile(hdr, x.config, x.limits.Config, "max_config_bytes")
		return err
	case api.SecretsFile:
		x.secrets, err = x.readFile(hdr, x.secrets, x.limits.Secrets, "max_secrets_bytes")
		return err
	case api.ContextDir, ".":
		if hdr.Typeflag != tar.TypeDir {
			return x.badEntry("it is not a directory")
		}
		x.context = x.context || name == api.ContextDir
		return nil
	}
	if x.ignored++; len(x.first) < maxNamed {
		x.first = append(x.first, strings.Clone(name))
	}
	if sparse, _ := sparseFile(hdr); sparse && x.early {
		return errLater
	}
	return x.read(hdr, io.Discard)
}

// clean checks an entry's name and link target, and returns the name in its shortest form. The
// name may be a substring of a far larger string.
func (x *indexer) clean(hdr *tar.Header) (string, error) {
	for _, s := range []string{hdr.Name, hdr.Linkname} {
		if len(s) > x.limits.Path {
			return "", tooLarge("tar entry %s: a path over the limit of %d bytes (max_path_bytes)", quote(x.last), x.limits.Path)
		}
		if strings.IndexByte(s, 0) >= 0 {
			return "", x.badEntry("a NUL in a path")
		}
	}
	switch name := hdr.Name; {
	case name == "":
		return "", x.badEntry("it has no name")
	case name[0] == '/':
		return "", x.badEntry("an absolute path")
	}
	for part := range strings.SplitSeq(hdr.Name, "/") {
		if part == ".." {
			return "", x.badEntry(`".." in its path`)
		}
	}
	name := path.Clean(hdr.Name)
	return name, x.countNames(len(name) + len(hdr.Linkname))
}

// countNames counts n bytes of names.
func (x *indexer) countNames(n int) error {
	if x.names -= int64(n); x.names < 0 {
		return tooLarge("tar entry %s: all paths together are over the limit of %d bytes (max_names_bytes)", quote(x.last), x.limits.Names)
	}
	return nil
}

// badEntry is an error of the entry that was read last.
func (x *indexer) badEntry(why string) error {
	return badTar(nil, "tar entry %s: %s", quote(x.last), why)
}

// take counts n bytes of memory. It takes them of the account once leastTaken are owed.
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

// readFile reads the data of a regular file. setting is the name of limit. before is the data
// of an earlier entry with the same name, or nil.
func (x *indexer) readFile(hdr *tar.Header, before []byte, limit int64, setting string) ([]byte, error) {
	if before != nil {
		return nil, x.badEntry("it is there twice")
	}
	if !isFile(hdr) {
		return nil, x.badEntry("it is not a regular file")
	}
	if err := x.checkSparse(hdr); err != nil {
		return nil, err
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

// read writes all data of an entry to w.
func (x *indexer) read(hdr *tar.Header, w io.Writer) error {
	if hasData(hdr) && hdr.Size > x.in.left() {
		return x.in.tooLarge()
	}
	buf, err := x.buffer()
	if err != nil {
		return err
	}
	start := x.in.n
	// The structs hide WriteTo and ReadFrom, which would not use buf.
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{x.tr}, buf)
	x.in.holes += n - (x.in.n - start)
	if err == nil || err == errMemory {
		return err
	}
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return badTar(err, "reading tar: it is cut short in entry %s", quote(x.last))
	}
	return badTar(err, "reading tar: bad data of entry %s", quote(x.last))
}

// buffer is for data that is copied.
func (x *indexer) buffer() ([]byte, error) {
	if x.buf == nil {
		if err := x.take(readSize); err != nil {
			return nil, err
		}
		x.buf = make([]byte, readSize)
	}
	return x.buf, nil
}

// zeros reads the padding after a tar. Everything but zeros is an error.
func (x *indexer) zeros() error {
	buf, err := x.buffer()
	if err != nil {
		return err
	}
	for {
		n, err := x.in.Read(buf)
		if len(bytes.TrimLeft(buf[:n], "\x00")) > 0 {
			return badTar(nil, "reading tar: something else than zeros follows its end")
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return x.headerError(err)
		}
	}
}

func (x *indexer) warnings() []string {
	var list []string
	if x.ignored > 0 {
		list = append(list, fmt.Sprintf("%s of the tar beside %s/ ignored: %s", entryCount(x.ignored), api.ContextDir, some(x.first, x.ignored > len(x.first))))
	}
	if x.attributed > 0 {
		warning := "extended attributes left out, of " + entryCount(x.attributed)
		if len(x.capabilities) > 0 {
			warning += "; without their capabilities are: " + some(x.capabilities, x.capable > len(x.capabilities))
		}
		list = append(list, warning)
	}
	return list
}

func entryCount(n int) string {
	if n == 1 {
		return "1 entry"
	}
	return fmt.Sprintf("%d entries", n)
}

// some quotes names. more says that there are others.
func some(names []string, more bool) string {
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = quote(n)
	}
	if more {
		quoted = append(quoted, "…")
	}
	return strings.Join(quoted, ", ")
}

// shorten cuts a name, so that an error does not become as long as the name.
func shorten(name string) string {
	const most = 200
	if len(name) <= most {
		return strings.Clone(name)
	}
	return name[:most] + "…"
}

func quote(name string) string { return fmt.Sprintf("%q", shorten(name)) }
