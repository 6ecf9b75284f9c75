package payload

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"math"
	"math/bits"
	"runtime"
	"slices"
	"sort"
	"sync"

	"github.com/minio/highwayhash"
)

const second = 1_000_000_000 // in ns

// BuildKit has times as int64 nanoseconds since 1970. Every nanosecond of the seconds from
// minSecond to maxSecond fits into that.
const (
	minSecond = math.MinInt64/second + 1
	maxSecond = math.MaxInt64/second - 1
)

// contentSum is a keyed hash of a regular file's content. Two contents get the same time by
// chance long before they get the same contentSum.
type contentSum [highwayhash.Size128]byte

// SetTimes makes the times of regular files depend on their contents. BuildKit compares no
// contents: a file that has the path, size, time and mode of the last build's file counts as
// unchanged, and is not sent. A second call of SetTimes does nothing.
//
// Programs such as make compare times. For them SetTimes keeps the order of the times of regular
// files, keeps equal times equal, and keeps the second of each time. Directories and symlinks keep
// their times, so a file may become newer than a directory of the same second. SetTimes works in
// three steps:
//
//  1. Files of the same time form a group.
//  2. The groups of one second divide the second into slots, one for each group.
//  3. A keyed hash of the paths and contents of a group chooses one nanosecond of the group's
//     slot. This is the new time of all files in the group.
//
// Example. Four files have times in the first second of 1970:
//
//	file  time in ns   slot in ns                   new time in ns
//	a      4 = 0100              0 … 249,999,999    189,007,645
//	b      4 = 0100              0 … 249,999,999    189,007,645
//	c      5 = 0101    250,000,000 … 499,999,999    431,258,557
//	d     12 = 1100    500,000,000 … 999,999,999    838,916,568
//
// If the content of b changes, the hash of the group of a and b almost certainly chooses
// another time, and BuildKit is sent a and b. c and d keep their times. appendGroups says how
// the second is divided. The new times depend on the key; these are TestExampleTimes's.
//
// key must be the key of the builds that share a synced directory on the daemon, and of no
// other builds. A RUN step can read the times of its files, and so find two contents that get
// the same time. With one key for everybody, these two would get the same time in every
// repository, and one could be put in the place of the other unnoticed.
func (c *Context) SetTimes(key [32]byte) {
	if c.sums == nil {
		return
	}
	groups := groupsOf(c.entries)
	times := newTimes(&key, groups, c.entries, c.sums)
	for i := range c.entries {
		if e := &c.entries[i]; e.inode != noInode {
			e.ModTime = times[e.inode]
		}
	}
	c.sums = nil
}

// group is the files of one time, and the slot for their new time.
type group struct {
	files    []timedFile // in the order of their paths
	from, to int64       // the slot: from ≤ time < to, in ns since 1970
}

// timedFile is a regular file that is not a hard link to an earlier one.
type timedFile struct {
	time  int64 // as it was sent, in ns since 1970
	entry int32 // its index
}

// groupsOf finds the groups of entries, which must be sorted by path.
func groupsOf(entries []Entry) []group {
	var files []timedFile
	for i := range entries {
		if e := &entries[i]; e.inode != noInode && e.Linkname == "" {
			files = append(files, timedFile{e.ModTime, int32(i)})
		}
	}
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
		groups = appendGroups(groups, files[:n], sec*second, (sec+1)*second, leastWidth(n))
		files = files[n:]
	}
	return groups
}

// leastWidth is the least width of a slot, in ns for each of its files, in a second that holds
// n ≥ 1 files. It is never less than 1. Together, the least widths take a sixteenth of the
// second at most. n is rounded up to a power of two, so that one file more or less seldom
// changes the width:
//
//	3 or 4 files      1,000,000,000 / (16 * 4)  = 15,625,000 ns
//	9 to 16 files     1,000,000,000 / (16 * 16) =  3,906,250 ns
//	257 to 512 files  1,000,000,000 / (16 * 512) =   122,070 ns
func leastWidth(n int) int64 {
	return max(int64(second)>>(bits.Len(uint(n-1))+4), 1)
}

// appendGroups appends the groups of files to groups, with slots between from and to. The files
// must be sorted by time and be of one second.
//
// It parts the files by the highest bit in which their times differ. The files where this bit
// is 0 get the first half of the range, and the files where it is 1 get the second half. Each
// half is parted again in the same way, until all files of a part have the same time. In the
// example of SetTimes:
//
//	4 = 0100 and 12 = 1100 differ in the bit of value 8:
//	    a, b and c have a 0 there, and get          0 … 499,999,999
//	    d has a 1 there, and gets         500,000,000 … 999,999,999
//	4 = 0100 and 5 = 0101 differ in the bit of value 1:
//	    a and b have a 0 there, and get             0 … 249,999,999
//	    c has a 1 there, and gets         250,000,000 … 499,999,999
//
// Halves keep most slots where they are when a file leaves the second. For example, an edit gives c
// a time in another second. Without c, the slot of a and b becomes 0 … 499,999,999, so their time
// may change. But d keeps its slot and its time. If all slots had the same width, thirds would become
// halves here: every slot would move, and BuildKit would be sent every file.
//
// To halve a part again and again can leave too little for a hash. So each part gets least ns
// or more for each of its files. Ten files have the times 1, 2, 4, 8 … 512, so least is
// 3,906,250:
//
//	512, 256, 128, 64 and 32 each get a half of what is left
//	1, 2, 4, 8 and 16 share     0 …  31,249,999
//	    16 gets        15,625,000 …  31,249,999, a half
//	    1, 2, 4, 8 share        0 …  15,624,999, the other half: 4 * 3,906,250
//	    8 gets         11,718,750 …  15,624,999: a half would leave 1, 2 and 4 too little
//	    4 gets          7,812,500 …  11,718,749
//	    2 gets          3,906,250 …   7,812,499
//	    1 gets                  0 …   3,906,249
func appendGroups(groups []group, files []timedFile, from, to, least int64) []group {
	first, last := files[0].time, files[len(files)-1].time
	if first == last {
		return append(groups, group{files, from, to})
	}
	bit := bits.Len64(uint64(first^last)) - 1
	zeros := sort.Search(len(files), func(i int) bool { return files[i].time>>bit&1 == 1 })
	ones := len(files) - zeros
	middle := from + (to-from)/2
	middle = max(middle, from+least*int64(zeros))
	middle = min(middle, to-least*int64(ones))
	groups = appendGroups(groups, files[:zeros], from, middle, least)
	return appendGroups(groups, files[zeros:], middle, to, least)
}

// newTimes returns the new times, in ns since 1970, by inode.
func newTimes(key *[32]byte, groups []group, entries []Entry, sums []contentSum) []int64 {
	times := make([]int64, len(sums))
	// If every file has a time of its own, the hashes take longer than everything else, so
	// they are computed on all processors.
	var work sync.WaitGroup
	share := (len(groups) + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0)
	for part := range slices.Chunk(groups, max(share, 1)) {
		work.Go(func() {
			mac := hmac.New(sha256.New, key[:])
			var buf []byte
			for _, g := range part {
				buf = g.hash(mac, buf[:0], entries, sums)
				ns := g.from + int64(binary.BigEndian.Uint64(buf)%uint64(g.to-g.from))
				for _, f := range g.files {
					times[entries[f.entry].inode] = ns
				}
			}
		})
	}
	work.Wait()
	return times
}

// hash returns the hash of the group's paths and contents. It uses buf as scratch space, and the
// result shares it. The length before each path keeps path and content apart.
func (g *group) hash(mac hash.Hash, buf []byte, entries []Entry, sums []contentSum) []byte {
	mac.Reset()
	for _, f := range g.files {
		e := &entries[f.entry]
		buf = binary.BigEndian.AppendUint64(buf[:0], uint64(len(e.Path)))
		buf = append(buf, e.Path...)
		buf = append(buf, sums[e.inode][:]...)
		mac.Write(buf)
	}
	return mac.Sum(buf[:0])
}

// floorSecond is the second that contains ns, in s since 1970. It rounds down before 1970 too.
func floorSecond(ns int64) int64 {
	s := ns / second
	if ns%second < 0 {
		s--
	}
	return s
}
