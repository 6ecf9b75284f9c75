package redact

import (
	"encoding/binary"
	"slices"
	"strings"
)

// keyLen is how many of a pattern's first bytes are its key in the index.
const keyLen = minPattern

// index finds any of many patterns in a text. The patterns are sorted, so that those with
// one key are neighbours. A binary search among them finds the longest that a text begins
// with. So the time depends little on the number of patterns, whatever the text.
type index struct {
	patterns []string
	// prefix is, for each pattern, the longest other pattern that it begins with, or -1.
	prefix []int32
	// ranges are, by key, the first of the patterns and the one after the last.
	ranges map[uint32][2]int32
	// filter has a bit for each hash of a key. Nearly every byte of a text gets no
	// further, so that it is sized to be mostly zero and to stay in the processor's
	// cache.
	filter []uint64
	shift  uint
}

// newIndex returns an index of patterns, each of keyLen bytes or more. It sorts them. It
// returns nil, which matches nothing, if there are none.
func newIndex(patterns []string) *index {
	if len(patterns) == 0 {
		return nil
	}
	slices.Sort(patterns)
	patterns = slices.Compact(patterns)
	ix := &index{
		patterns: patterns,
		prefix:   make([]int32, len(patterns)),
		ranges:   make(map[uint32][2]int32),
	}
	bits := uint(9)
	for 1<<bits < 32*len(patterns) {
		bits++
	}
	ix.filter = make([]uint64, 1<<bits/64)
	ix.shift = 32 - min(bits, 32)
	for i, p := range patterns {
		// A pattern that p begins with is sorted before p, and all patterns between the
		// two begin with it too. So the longest one is the pattern before p, or one that
		// that pattern begins with.
		j := int32(i) - 1
		for j >= 0 && !strings.HasPrefix(p, patterns[j]) {
			j = ix.prefix[j]
		}
		ix.prefix[i] = j

		key := binary.LittleEndian.Uint32([]byte(p[:keyLen]))
		r, ok := ix.ranges[key]
		if !ok {
			r[0] = int32(i)
		}
		r[1] = int32(i) + 1
		ix.ranges[key] = r
		h := ix.hash(key)
		ix.filter[h/64] |= 1 << (h % 64)
	}
	return ix
}

// hash is Knuth's multiplicative one.
func (ix *index) hash(key uint32) uint32 {
	return key * 2654435769 >> ix.shift
}

// mask returns text with all matches masked. It may reuse text.
func (ix *index) mask(text []byte) []byte {
	if ix == nil {
		return text
	}
	out, _ := ix.appendMasked(make([]byte, 0, len(text)), text, len(text), 0)
	return out
}

// appendMasked appends text[:n] to dst, with one mask for each run of bytes that matches
// cover. The first hidden bytes of text count as covered. If the last match reaches beyond
// n, the second result says by how many bytes.
func (ix *index) appendMasked(dst, text []byte, n, hidden int) ([]byte, int) {
	if ix == nil {
		return append(dst, text[:n]...), 0
	}
	end := hidden // of the last run of matches
	if hidden > 0 {
		dst = append(dst, mask...)
	}
	for i := 0; i < n && i+keyLen <= len(text); i++ {
		key := binary.LittleEndian.Uint32(text[i:])
		h := ix.hash(key)
		if ix.filter[h/64]&(1<<(h%64)) == 0 {
			continue
		}
		length := ix.match(key, text[i:])
		if length == 0 || i+length <= end {
			continue
		}
		if i > end || end == 0 {
			dst = append(dst, text[end:i]...)
			dst = append(dst, mask...)
		}
		end = i + length
	}
	if end < n {
		return append(dst, text[end:n]...), 0
	}
	return dst, end - n
}

// match returns the length of the longest pattern that text begins with, or 0. key is the
// key of text.
func (ix *index) match(key uint32, text []byte) int {
	r, ok := ix.ranges[key]
	if !ok {
		return 0
	}
	// Every pattern that text begins with is also the beginning of the last pattern that
	// is not greater than text.
	i, end := r[0], r[1]
	for i < end {
		mid := i + (end-i)/2
		if greater(ix.patterns[mid], text) {
			end = mid
		} else {
			i = mid + 1
		}
	}
	i--
	if i < r[0] {
		return 0
	}
	common := commonPrefix(ix.patterns[i], text)
	for i >= 0 && len(ix.patterns[i]) > common {
		i = ix.prefix[i]
	}
	if i < 0 {
		return 0
	}
	return len(ix.patterns[i])
}

// begun returns the length of the longest end of text with which a longer pattern begins, or
// 0. Ends shorter than keyLen bytes do not count.
func (ix *index) begun(text []byte) int {
	if ix == nil {
		return 0
	}
	for i := max(0, len(text)-maxPattern+1); i+keyLen <= len(text); i++ {
		key := binary.LittleEndian.Uint32(text[i:])
		r, ok := ix.ranges[key]
		if !ok {
			continue
		}
		end := string(text[i:])
		ps := ix.patterns[r[0]:r[1]]
		j, whole := slices.BinarySearch(ps, end)
		if whole {
			j++
		}
		if j < len(ps) && strings.HasPrefix(ps[j], end) {
			return len(end)
		}
	}
	return 0
}

// greater reports whether p sorts after text.
func greater(p string, text []byte) bool {
	n := commonPrefix(p, text)
	return n < len(p) && (n == len(text) || p[n] > text[n])
}

func commonPrefix(a string, b []byte) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}
