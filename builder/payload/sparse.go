package payload

import (
	"archive/tar"
	"hash"
	"io"
	"slices"
	"sort"
	"strings"
)

// fragment is a piece of a sparse file's data. Between fragments are holes, which read as
// zeros.
type fragment struct {
	at   int64 // in the file
	from int64 // in the tar
	size int64
}

// isFile says whether hdr is a regular file's. A contiguous file is a regular file today.
func isFile(hdr *tar.Header) bool {
	return hdr.Typeflag == tar.TypeReg || hdr.Typeflag == tar.TypeCont || hdr.Typeflag == tar.TypeGNUSparse
}

// hasData says whether archive/tar gives data for hdr. If not, hdr.Size means nothing.
func hasData(hdr *tar.Header) bool {
	switch hdr.Typeflag {
	case tar.TypeLink, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeDir, tar.TypeFifo:
		return false
	}
	return true
}

// sparseFile says whether hdr is a sparse file's, and whether archive/tar knows its format. In
// an unknown format archive/tar would take the map of the holes for content.
func sparseFile(hdr *tar.Header) (sparse, known bool) {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return true, true
	}
	for key := range hdr.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			sparse = true
			break
		}
	}
	if !sparse {
		return false, false
	}
	switch hdr.PAXRecords["GNU.sparse.major"] + "." + hdr.PAXRecords["GNU.sparse.minor"] {
	case "0.0", "0.1", "1.0":
		return true, true
	case ".":
		return true, hdr.PAXRecords["GNU.sparse.map"] != ""
	}
	return true, false
}

// checkSparse leaves a sparse file for later: its cost depends on the size that its header
// claims, and not on the bytes that were sent.
func (x *indexer) checkSparse(hdr *tar.Header) error {
	switch sparse, known := sparseFile(hdr); {
	case sparse && x.early:
		return errLater
	case sparse && !known:
		return x.badEntry("a sparse file of an unknown format")
	}
	return nil
}

// readSparse hashes a sparse file, and keeps the places of its data in the tar.
func (x *indexer) readSparse(hdr *tar.Header, inode int32) error {
	buf, err := x.buffer()
	if err != nil {
		return err
	}
	s := &sparseData{hash: x.hash, take: x.takePiece}
	x.in.data = func(p []byte) {
		// archive/tar reads data right into the place in buf where it belongs, and
		// fills in the holes. The capacity of p tells the place.
		s.add(fragment{s.size + int64(cap(buf)-cap(p)), x.in.n, int64(len(p))})
	}
	err = x.read(hdr, s)
	x.in.data = nil
	if err != nil {
		return err
	}
	if x.sparse == nil {
		x.sparse = map[int32][]fragment{}
	}
	x.sparse[inode] = slices.Clone(s.fragments) // without the room that append has made
	return nil
}

// maxPieces bounds the pieces of all sparse files of a tar. A map of pieces is a header, and a small
// one is not counted, so that many small ones would have no bound.
const maxPieces = 1 << 20

// takePiece takes the memory of one more piece.
func (x *indexer) takePiece() error {
	if x.pieces++; x.pieces > maxPieces {
		return tooLarge("the tar's sparse files have over %d pieces of data", maxPieces)
	}
	return x.take(fragmentMemory)
}

// sparseData is a sparse file while it is read.
type sparseData struct {
	hash      hash.Hash
	take      func() error // the memory of a fragment
	size      int64
	fragments []fragment
	err       error
}

func (s *sparseData) add(f fragment) {
	if n := len(s.fragments); n > 0 {
		if last := &s.fragments[n-1]; last.at+last.size == f.at && last.from+last.size == f.from {
			last.size += f.size
			return
		}
	}
	if s.err == nil {
		s.err = s.take()
	}
	if s.err == nil {
		s.fragments = append(s.fragments, f)
	}
}

func (s *sparseData) Write(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	s.size += int64(len(p))
	return s.hash.Write(p)
}

// sparseReader reads a sparse file out of a tar.
type sparseReader struct {
	tar       io.ReaderAt
	fragments []fragment
	size, pos int64
}

func (r *sparseReader) Read(p []byte) (int, error) {
	if r.pos == r.size {
		return 0, io.EOF
	}
	i := sort.Search(len(r.fragments), func(i int) bool { return r.fragments[i].at+r.fragments[i].size > r.pos })
	if i == len(r.fragments) || r.fragments[i].at > r.pos {
		end := r.size
		if i < len(r.fragments) {
			end = r.fragments[i].at
		}
		n := int(min(int64(len(p)), end-r.pos))
		clear(p[:n])
		r.pos += int64(n)
		return n, nil
	}
	f := r.fragments[i]
	in := r.pos - f.at
	n, err := r.tar.ReadAt(p[:min(int64(len(p)), f.size-in)], f.from+in)
	r.pos += int64(n)
	if err == io.EOF && n > 0 {
		err = nil
	}
	return n, err
}
