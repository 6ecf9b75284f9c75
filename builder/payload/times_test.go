package payload_test

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"handler/function/payload"
)

// timedFile is a file of a context, with its time in ns.
type timedFile struct {
	path, data string
	time       int64
}

func (f timedFile) String() string {
	sec, ns := f.time/1e9, f.time%1e9
	if ns < 0 {
		sec, ns = sec-1, ns+1e9
	}
	mtime := fmt.Sprintf("%d.%09d", sec, ns)
	if sec < 0 && ns > 0 { // PAX counts both parts from 0
		mtime = fmt.Sprintf("-%d.%09d", -(sec + 1), 1e9-ns)
	}
	return pax('x', "mtime="+mtime) + file("context/"+f.path, f.data)
}

// times receives files and returns the time of each.
func times(t testing.TB, files []timedFile, opts payload.Options, more ...string) map[string]int64 {
	t.Helper()
	var b strings.Builder
	for _, f := range files {
		b.WriteString(f.String())
	}
	p := mustReceive(t, archive(append([]string{b.String()}, more...)...), opts)
	got := map[string]int64{}
	for _, e := range p.Context.Entries() {
		got[e.Path] = e.ModTime
	}
	return got
}

// randomFiles makes n files in few seconds, so that some times are equal and many are close. Some
// are before 1970.
func randomFiles(src *rand.Rand, n int) []timedFile {
	files := make([]timedFile, n)
	for i := range files {
		files[i] = timedFile{
			path: fmt.Sprintf("d%d/f%d", src.IntN(5), i),
			data: fmt.Sprint(src.Uint64()),
			time: (src.Int64N(7)-3)*1e9 + []int64{0, 1, 500_000_000, 999_999_998, 999_999_999, src.Int64N(1e9)}[src.IntN(6)],
		}
	}
	return files
}

func floor(ns int64) int64 {
	s := ns / 1e9
	if ns%1e9 < 0 {
		s--
	}
	return s
}

func TestGroupTimes(t *testing.T) {
	for seed := range uint64(20) {
		src := rand.New(rand.NewPCG(seed, 1))
		files := randomFiles(src, 1+src.IntN(80))
		opts := testOptions(t)
		got := times(t, files, opts)

		for _, a := range files {
			if floor(got[a.path]) != floor(a.time) {
				t.Fatalf("seed %d: %q of %d is of %d, another second", seed, a.path, a.time, got[a.path])
			}
			for _, b := range files {
				if cmp.Compare(a.time, b.time) != cmp.Compare(got[a.path], got[b.path]) {
					t.Fatalf("seed %d: times %d, %d became %d, %d", seed, a.time, b.time, got[a.path], got[b.path])
				}
			}
		}

		// The order in the tar does not matter.
		shuffled := slices.Clone(files)
		src.Shuffle(len(files), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		checkChanged(t, "shuffled", got, times(t, shuffled, opts), nil)

		// If one file changes, its group gets another time.
		i := src.IntN(len(files))
		changed := slices.Clone(files)
		changed[i].data = changed[i].data[1:] + "x" // of the same size
		checkChanged(t, "changed", got, times(t, changed, opts), sameTime(files, files[i].time))

		// The same holds for two files that swap their contents, and for a file that moves.
		j := src.IntN(len(files))
		if j != i && files[i].time == files[j].time {
			swapped := slices.Clone(files)
			swapped[i].data, swapped[j].data = files[j].data, files[i].data
			checkChanged(t, "swapped", got, times(t, swapped, opts), sameTime(files, files[i].time))
		}
		moved := slices.Clone(files)
		moved[i].path += "x"
		after := times(t, moved, opts)
		delete(after, moved[i].path)
		before := got
		if _, ok := before[files[i].path]; ok {
			before = map[string]int64{}
			for p, ns := range got {
				if p != files[i].path {
					before[p] = ns
				}
			}
		}
		checkChanged(t, "moved", before, after, slices.DeleteFunc(sameTime(files, files[i].time), func(p string) bool { return p == files[i].path }))

		// Another key for contents means other times.
		other := opts
		other.ContentKey[0]++
		var all []string
		for _, f := range files {
			all = append(all, f.path)
		}
		checkChanged(t, "other key", got, times(t, files, other), all)
	}
}

func sameTime(files []timedFile, ns int64) []string {
	var paths []string
	for _, f := range files {
		if f.time == ns {
			paths = append(paths, f.path)
		}
	}
	return paths
}

// checkChanged wants the times of exactly paths to differ.
func checkChanged(t *testing.T, what string, before, after map[string]int64, paths []string) {
	t.Helper()
	if len(before) != len(after) {
		t.Fatalf("%s: %d entries, %d before", what, len(after), len(before))
	}
	for p := range before {
		if changed := before[p] != after[p]; changed != slices.Contains(paths, p) {
			t.Errorf("%s: %q is of %d, before of %d; other times should be those of %q", what, p, after[p], before[p], paths)
		}
	}
}

// No two sets of files have the same hash because a boundary moved: between path and content, or
// between files.
func TestGroupTimesAreUnambiguous(t *testing.T) {
	seen := map[int64]string{}
	for _, files := range [][]timedFile{
		{{"a", "", 5}},
		{{"a", "b", 5}},
		{{"ab", "", 5}},
		{{"a", "", 5}, {"b", "", 5}},
		{{"a", "b", 5}, {"b", "", 5}},
		{{"a", "", 5}, {"b", "b", 5}},
		{{"a", "\x00", 5}},
		{{"a", "\x00\x00", 5}},
	} {
		ns := times(t, files, testOptions(t))[files[0].path]
		if other, ok := seen[ns]; ok {
			t.Errorf("%v has the time of %s", files, other)
		}
		seen[ns] = fmt.Sprint(files)
	}
}

// A hard link has the time of its file, and a file with links counts once in its group.
func TestGroupTimesOfLinks(t *testing.T) {
	files := []timedFile{{"m", "1", 5e9}, {"x", "2", 5e9}}
	plain := times(t, files, testOptions(t))
	linked := times(t, files, testOptions(t), hardlink("context/z", "context/m"), fileAt("context/other", "3", 9), hardlink("context/b", "context/z"), symlink("context/s", "m"), header{name: "context/d", typ: '5', mtime: 8}.String())
	if linked["z"] != linked["m"] || linked["b"] != linked["m"] || linked["x"] != linked["m"] {
		t.Errorf("links and their group have the times %v", linked)
	}
	if floor(linked["m"]) != 5 || linked["m"] == plain["m"] {
		t.Errorf("the group with the first path b has the time %d, as with m: %d", linked["m"], plain["m"])
	}
	if linked["s"] != 0 || linked["d"] != 8e9 {
		t.Errorf("a symlink and a directory have the times %d and %d, want their own", linked["s"], linked["d"])
	}
}

// Many neighbouring times fit into one second, in order.
func TestGroupTimesOfOneSecond(t *testing.T) {
	const n = 5000
	var files []timedFile
	for i := range n {
		files = append(files, timedFile{fmt.Sprint(i), "x", -1e9 + int64(i)})
	}
	got := times(t, files, testOptions(t))
	last := int64(-1e9 - 1)
	for _, f := range files {
		ns := got[f.path]
		if ns <= last || floor(ns) != -1 {
			t.Fatalf("%q is of %d, the one before it of %d", f.path, ns, last)
		}
		last = ns
	}
}

// However close together times are, each has room for a hash: it changes when the content
// changes.
func TestGroupTimesAreWide(t *testing.T) {
	for name, at := range map[string]func(i int) int64{
		"next to each other": func(i int) int64 { return int64(i) },
		"at powers of two":   func(i int) int64 { return 1 << (i % 30) },
		"at the end":         func(i int) int64 { return 1e9 - 1 - int64(i) },
		"in two heaps":       func(i int) int64 { return int64(i)/2 + int64(i%2)*999_000_000 },
	} {
		const n = 400
		var a, b []timedFile
		for i := range n {
			a = append(a, timedFile{fmt.Sprint(i), "a", at(i)})
			b = append(b, timedFile{fmt.Sprint(i), "b", at(i)})
		}
		before, after := times(t, a, testOptions(t)), times(t, b, testOptions(t))
		same := 0
		for path, ns := range before {
			if after[path] == ns {
				same++
			}
		}
		// Each slot has 1e9>>13 ns or more. One in 300 such tests finds one equal time.
		if same > 1 {
			t.Errorf("%s: %d of %d changed files keep their times", name, same, n)
		}
	}
}

// An edited file leaves the second in which it was written together with others. Few of the others
// get another time, and are sent again for it.
func TestGroupTimesOfNeighbours(t *testing.T) {
	src := rand.New(rand.NewPCG(1, 2))
	for name, step := range map[string]func() int64{
		"evenly":     func() int64 { return 1_000_000 },
		"one by one": func() int64 { return 1 },
		"as they come": func() int64 {
			return 10_000 + src.Int64N(100_000)
		},
	} {
		const n = 300
		var files []timedFile
		at := int64(1e9)
		for i := range n {
			at += step()
			files = append(files, timedFile{fmt.Sprint(i), "x", at})
		}
		before := times(t, files, testOptions(t))
		moved := 0
		for range 20 {
			edited := slices.Clone(files)
			k := src.IntN(n)
			edited[k].time = 5e9
			for path, ns := range times(t, edited, testOptions(t)) {
				if before[path] != ns && path != edited[k].path {
					moved++
				}
			}
		}
		if moved > 20*5 {
			t.Errorf("%s: %d of %d neighbours of each edited file get another time", name, moved/20, n)
		}
	}
}
