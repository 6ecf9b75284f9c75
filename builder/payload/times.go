package payload

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"math"
	"math/bits"
	"runtime"
	"slices"
	"sync"

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

// SetTimes carries the content of regular files in their times, since
// BuildKit takes a file whose path, size, time and mode are those of the last
// build's for the same file. A second call does nothing.
//
// The files of one time are a group and get one new time: of the same second,
// and in a slot of it that keeps the order of the second's groups. Where in the
// slot is a keyed hash of the group's paths and contents. So what changes
// changes the time of its group, while make, which compares times, sees what
// it saw before.
//
// key is that of the builds that share a synced directory on the daemon, and of no
// others. A RUN step can read the times of its files: under a key that others shared,
// whoever has found two contents of one time in a repository could use them in theirs.
func (c *Context) SetTimes(key [32]byte) {
	if c.sums == nil {
		return
	}
	setGroupTimes(&key, c.entries, c.sums)
	c.sums = nil
}

// setGroupTimes has entries in their final order and sums by inode.
func setGroupTimes(key *[32]byte, entries []Entry, sums []contentSum) {
	var files []timedFile
	for i := range entries {
		if e := &entries[i]; e.inode != noInode && e.Linkname == "" {
			files = append(files, timedFile{e.ModTime, int32(i)})
		}
	}
	// A group's files are in the order of their paths.
	slices.SortFunc(files, func(a, b timedFile) int {
		return cmp.Or(cmp.Compare(a.time, b.time), cmp.Compare(a.entry, b.entry))
	})

	var groups []group
	for len(files) > 0 {
		sec := floorSecond(files[0].time)
		n := 1
		for n < len(files) && floorSecond(files[n].time) == sec {
			n++
		}
		// Of a power of two, so that one file more or less seldom changes it.
		least := int64(max(second>>(bits.Len(uint(n-1))+4), 1))
		setSlots(files[:n], 0, second, least, func(files []timedFile, from, to int64) {
			groups = append(groups, group{files, sec*second + from, to - from})
		})
		files = files[n:]
	}

	times := make([]int64, len(sums)) // by inode
	// Where each file has a time of its own, the hashes take longer than all else.
	var work sync.WaitGroup
	share := (len(groups) + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0)
	for part := range slices.Chunk(groups, max(share, 1)) {
		work.Go(func() {
			mac := hmac.New(sha256.New, key[:])
			var buf []byte
			for _, g := range part {
				mac.Reset()
				for _, f := range g.files {
					e := &entries[f.entry]
					buf = binary.BigEndian.AppendUint64(buf[:0], uint64(len(e.Path)))
					buf = append(buf, e.Path...)
					buf = append(buf, sums[e.inode][:]...)
					mac.Write(buf)
				}
				buf = mac.Sum(buf[:0])
				ns := g.from + int64(binary.BigEndian.Uint64(buf)%uint64(g.width))
				for _, f := range g.files {
					times[entries[f.entry].inode] = ns
				}
			}
		})
	}
	work.Wait()
	for i := range entries {
		if e := &entries[i]; e.inode != noInode {
			e.ModTime = times[e.inode]
		}
	}
}

// group is the files of one time, in the order of their paths, and the slot for their
// new time: width ns that begin at from.
type group struct {
	files       []timedFile
	from, width int64
}

// timedFile is a regular file that is no hard link, and its time as it was sent.
type timedFile struct {
	time  int64
	entry int32
}

// setSlots calls set with each group of files, which are sorted and of one
// second, and with its slot between from and to.
//
// Times are parted by the highest bit in which they differ, and each part gets
// half of what there is, and least ns for each of its files, which is less but
// where times crowd. Slots of one width would all move when a file is edited and
// so leaves the second of those it was checked out with, and all would be sent
// again. Of these, the few move that shared its bits.
func setSlots(files []timedFile, from, to, least int64, set func(group []timedFile, from, to int64)) {
	first, last := files[0].time, files[len(files)-1].time
	if first == last {
		set(files, from, to)
		return
	}
	bit := bits.Len64(uint64(first^last)) - 1
	n, _ := slices.BinarySearchFunc(files, 1, func(f timedFile, _ int) int { return int(f.time>>bit&1) - 1 })
	middle := from + (to-from)/2
	middle = max(middle, from+least*int64(n))
	middle = min(middle, to-least*int64(len(files)-n))
	setSlots(files[:n], from, middle, least, set)
	setSlots(files[n:], middle, to, least, set)
}

// floorSecond is the second that ns lies in, also before 1970.
func floorSecond(ns int64) int64 {
	s := ns / second
	if ns%second < 0 {
		s--
	}
	return s
}
