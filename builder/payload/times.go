package payload

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"math"
	"slices"

	"github.com/minio/highwayhash"
)

const second = 1_000_000_000 // in ns

// BuildKit's times are int64 nanoseconds. These seconds have room for all of
// theirs.
const (
	minSecond = math.MinInt64/second + 1
	maxSecond = math.MaxInt64/second - 1
)

// contentSum is a keyed hash of a regular file's content. It has more bits than
// a time can carry.
type contentSum [highwayhash.Size128]byte

// contentKey is the key for content sums: not the one for times, which hashes
// paths too.
func contentKey(timeKey *[32]byte) []byte {
	m := hmac.New(sha256.New, timeKey[:])
	m.Write([]byte("content"))
	return m.Sum(nil)
}

// setGroupTimes carries the content of regular files in their times, since
// BuildKit takes a file whose path, size, time and mode are those of the last
// build's for the same file.
//
// The files of one time are a group and get one new time: of the same second,
// and in a slot of it that keeps the order of the second's groups. Where in the
// slot is a keyed hash of the group's paths and contents. So what changes
// changes the time of its group, while make, which compares times, sees what
// it saw before.
//
// entries are in their final order; sums are by inode.
func setGroupTimes(key *[32]byte, entries []Entry, sums []contentSum) {
	type file struct {
		time  int64
		entry int32
	}
	var files []file
	for i := range entries {
		if e := &entries[i]; e.inode != noInode && e.Linkname == "" {
			files = append(files, file{e.ModTime, int32(i)})
		}
	}
	// Stable, so that a group's files stay in the order of their paths.
	slices.SortStableFunc(files, func(a, b file) int { return cmp.Compare(a.time, b.time) })

	mac := hmac.New(sha256.New, key[:])
	var buf []byte
	groupHash := func(group []file) uint64 {
		mac.Reset()
		for _, f := range group {
			e := &entries[f.entry]
			buf = binary.BigEndian.AppendUint64(buf[:0], uint64(len(e.Path)))
			buf = append(buf, e.Path...)
			buf = append(buf, sums[e.inode][:]...)
			mac.Write(buf)
		}
		buf = mac.Sum(buf[:0])
		return binary.BigEndian.Uint64(buf)
	}

	times := make([]int64, len(sums)) // by inode
	for len(files) > 0 {
		sec := floorSecond(files[0].time)
		end, groups := 0, int64(0)
		for ; end < len(files) && floorSecond(files[end].time) == sec; end++ {
			if end == 0 || files[end].time != files[end-1].time {
				groups++
			}
		}
		// groups is at most Limits.Entries, so a slot is some µs at least.
		width := max(second/groups, 1)
		slot := int64(0)
		for rest := files[:end]; len(rest) > 0; slot++ {
			n := 1
			for n < len(rest) && rest[n].time == rest[0].time {
				n++
			}
			ns := slot*width + int64(groupHash(rest[:n])%uint64(width))
			for _, f := range rest[:n] {
				times[entries[f.entry].inode] = sec*second + ns
			}
			rest = rest[n:]
		}
		files = files[end:]
	}
	for i := range entries {
		if e := &entries[i]; e.inode != noInode {
			e.ModTime = times[e.inode]
		}
	}
}

// floorSecond is the second that ns lies in, also before 1970.
func floorSecond(ns int64) int64 {
	s := ns / second
	if ns%second < 0 {
		s--
	}
	return s
}
