package payload_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"handler/function/budget"

	"handler/function/api"
	"handler/function/payload"
)

// TestAccepted has archives that look wrong, and that can be unpacked all the same. It checks
// what becomes of them.
func TestAccepted(t *testing.T) {
	a, b := file("context/a", "1"), file("context/b", "2")
	tests := []struct {
		name     string
		body     string
		want     []string
		warnings string
	}{
		// Entries with the path of an earlier entry.
		{name: "a file", body: archive(a, file("context/a", "new")), want: []string{"-rw-r--r-- 3 a = new"}},
		{name: "with dots and slashes", body: archive(a, file("./context/.//a", "new")), want: []string{"-rw-r--r-- 3 a = new"}},
		{name: "the context", body: archive(dir("./context/"), a, dir("context")), want: []string{"-rw-r--r-- 1 a = 1"}},
		{name: "the root", body: archive(dir("./"), dir("."), a), want: []string{"-rw-r--r-- 1 a = 1"}},
		{
			name: "a directory keeps what is in it",
			body: archive(dir("context/d"), file("context/d/f", "1"), header{name: "context/d/", typ: '5', mode: 0o700}.String()),
			want: []string{"drwx------ 0 d", "-rw-r--r-- 1 d/f = 1"},
		},
		{
			name: "a directory that was left out gets its own mode",
			body: archive(file("context/d/f", "1"), header{name: "context/d/", typ: '5', mode: 0o700}.String()),
			want: []string{"drwx------ 0 d", "-rw-r--r-- 1 d/f = 1"},
		},
		{
			name: "a file over a directory",
			body: archive(dir("context/d"), file("context/d/e/f", "1"), file("context/d-", "2"), file("context/d", "3")),
			want: []string{"-rw-r--r-- 1 d = 3", "-rw-r--r-- 1 d- = 2"},
		},
		{
			name: "a symlink over a directory that was left out",
			body: archive(file("context/l/x", ""), symlink("context/l", "/tmp")),
			want: []string{"Lrwxrwxrwx 4 l -> /tmp"},
		},
		{
			name: "a directory over a file",
			body: archive(a, dir("context/a"), file("context/a/f", "2")),
			want: []string{"drwxr-xr-x 0 a", "-rw-r--r-- 1 a/f = 2"},
		},
		{
			name: "a directory over a symlink",
			body: archive(symlink("context/a", "/etc"), dir("context/a"), file("context/a/f", "2")),
			want: []string{"drwxr-xr-x 0 a", "-rw-r--r-- 1 a/f = 2"},
		},
		{
			name: "a directory, a file and a directory again",
			body: archive(header{name: "context/d/e/", typ: '5', mode: 0o700}.String(), file("context/d/e/f", "1"), file("context/d", "2"), dir("context/d"), file("context/d/e/g", "3")),
			want: []string{"drwxr-xr-x 0 d", "drwxr-xr-x 0 d/e", "-rw-r--r-- 1 d/e/g = 3"},
		},
		{
			name: "a hard link keeps what it linked to",
			body: archive(a, b, hardlink("context/l", "context/a"), file("context/a", "new")),
			want: []string{"-rw-r--r-- 3 a = new", "-rw-r--r-- 1 b = 2", "-rw-r--r-- 1 l = 1"},
		},
		{
			name: "hard links among themselves keep it",
			body: archive(file("context/d/a", "1"), hardlink("context/l", "context/d/a"), hardlink("context/k", "context/l"), file("context/d", "2")),
			want: []string{"-rw-r--r-- 1 d = 2", "-rw-r--r-- 1 k = 1", "-rw-r--r-- 1 l -> k = 1"},
		},
		{
			name: "a hard link over a file",
			body: archive(a, b, hardlink("context/a", "context/b")),
			want: []string{"-rw-r--r-- 1 a = 2", "-rw-r--r-- 1 b -> a = 2"},
		},
		{
			name: "a file over a hard link",
			body: archive(a, hardlink("context/l", "context/a"), file("context/l", "2")),
			want: []string{"-rw-r--r-- 1 a = 1", "-rw-r--r-- 1 l = 2"},
		},
		{
			name: "a hard link to itself",
			body: archive(a, hardlink("context/a", "context/a")),
			want: []string{"-rw-r--r-- 1 a = 1"},
		},
		{
			name:     "what is ignored",
			body:     archive(a, file("x/a", ""), dir("x/a"), file("x", ""), file("x/a", "")),
			want:     []string{"-rw-r--r-- 1 a = 1"},
			warnings: `4 entries of the tar beside context/ ignored: "x/a", "x/a", "x", …`,
		},

		// Entries below symlinks.
		{
			name: "a file below a symlink to a directory",
			body: archive(dir("context/usr"), dir("context/usr/lib"), symlink("context/lib", "usr/lib"), file("context/lib/f", "1"), file("context/lib/d/g", "2"), hardlink("context/h", "context/lib/f")),
			want: []string{"-rw-r--r-- 1 h = 1", "Lrwxrwxrwx 7 lib -> usr/lib", "drwxr-xr-x 0 usr", "drwxr-xr-x 0 usr/lib", "drwxr-xr-x 0 usr/lib/d", "-rw-r--r-- 1 usr/lib/d/g = 2", "-rw-r--r-- 1 usr/lib/f -> h = 1"},
		},
		{
			name: "what leads outside stays inside",
			body: archive(dir("context/etc"), symlink("context/l", "/etc"), symlink("context/m", "../../../l/."), file("context/m/f", "1"), symlink("context/r", ".."), file("context/r/g", "2")),
			want: []string{"drwxr-xr-x 0 etc", "-rw-r--r-- 1 etc/f = 1", "-rw-r--r-- 1 g = 2", "Lrwxrwxrwx 4 l -> /etc", "Lrwxrwxrwx 12 m -> ../../../l/.", "Lrwxrwxrwx 2 r -> .."},
		},

		// Names and links.
		{
			name: "backslashes",
			body: archive(file(`context/a\b`, "1"), file(`context/..\..\b`, "2"), symlink("context/l", `a\b`), dir(`context/C:\`)),
			want: []string{`-rw-r--r-- 1 ..\..\b = 2`, `drwxr-xr-x 0 C:\`, `-rw-r--r-- 1 a\b = 1`, `Lrwxrwxrwx 3 l -> a\b`},
		},
		{
			name: "slashes behind files",
			body: archive(file("context/f/", "1"), symlink("context/l/", "f")),
			want: []string{"-rw-r--r-- 1 f = 1", "Lrwxrwxrwx 1 l -> f"},
		},
		{
			name: "a hard link to a symlink",
			body: archive(symlink("context/s", "a"), hardlink("context/l", "context/s")),
			want: []string{"Lrwxrwxrwx 1 l -> a", "Lrwxrwxrwx 1 s -> a"},
		},
		{name: "a contiguous file", body: archive(header{name: "context/f", typ: '7', size: 1}.String() + padded("c")), want: []string{"-rw-r--r-- 1 f = c"}},

		// Entries that BuildKit cannot be given stay, because .dockerignore may leave them out.
		{
			name: "odd kinds",
			body: archive(header{name: "context/c", typ: '3'}.String(), header{name: "context/b", typ: '4'}.String(), header{name: "context/f", typ: '6'}.String(), hardlink("context/l", "context/f")),
			want: []string{"Drw-r--r-- 0 b: a device", "Dcrw-r--r-- 0 c: a device", "prw-r--r-- 0 f: a FIFO", "prw-r--r-- 0 l: a FIFO"},
		},
		{
			name: "not UTF-8",
			body: archive(file("context/caf\xe9", "1"), file("context/d\xff/f", "2"), symlink("context/l", "caf\xe9")),
			want: []string{
				"-rw-r--r-- 1 caf\xe9 = 1: a path that is not UTF-8", "drwxr-xr-x 0 d\xff: a path that is not UTF-8",
				"-rw-r--r-- 1 d\xff/f = 2: a path that is not UTF-8", "Lrwxrwxrwx 4 l -> caf\xe9: a symlink to a path that is not UTF-8",
			},
		},
		{
			name: "anything beside the context",
			body: archive(a,
				header{name: "label", typ: 'V', magic: "ustar  \x00"}.String(), header{name: "fifo", typ: '6'}.String(), header{name: "device", typ: '3'}.String(),
				header{name: "socket", typ: 's'}.String(), file("caf\xe9", ""), file(`a\b`, ""), symlink("l", "\xff"), hardlink("h", "/etc/passwd"), hardlink("fifo", "fifo"),
				file(strings.Repeat("n", 99)+"/", "x"), special('L', strings.Repeat("n", 300)+"\x00"), file("x", ""),
				sparse01("sparse", 5000, "x", 0, 1), pax('x', "GNU.sparse.major=9", "GNU.sparse.minor=9"), file("other", "x"), symlink("nothing", "")),
			want:     []string{"-rw-r--r-- 1 a = 1"},
			warnings: `14 entries of the tar beside context/ ignored: "label", "fifo", "device", …`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for form, body := range map[string]string{"tar": tt.body, "gzip": gzipped(t, tt.body), "envelope": enveloped(tt.body)} {
				opts := testOptions(t)
				opts.Memory = budget.New(1 << 30).Open()
				p := mustReceive(t, body, opts)
				got := describe(t, p.Context)
				for i, e := range p.Context.Entries() {
					if why := e.Odd(); why != "" {
						got[i] += ": " + why
					}
				}
				if !slices.Equal(got, tt.want) {
					t.Errorf("%s: entries:\n%s\nwant:\n%s", form, strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
				}
				if got := strings.Join(p.Warnings, "; "); got != tt.warnings {
					t.Errorf("%s: warnings %q, want %q", form, got, tt.warnings)
				}
			}
		})
	}
}

// TestAgainInAnyOrder makes random archives in which paths come again. It compares each context
// with a simple model of a file system.
func TestAgainInAnyOrder(t *testing.T) {
	built, links := 0, 0
	for seed := range uint64(500) {
		r := rand.New(rand.NewPCG(seed, 9))
		name := func() string {
			parts := []string{"a", "b", "c", "d"}
			r.Shuffle(len(parts), func(i, j int) { parts[i], parts[j] = parts[j], parts[i] })
			return strings.Join(parts[:1+r.IntN(3)], "/")
		}
		var parts []string
		tree := map[string]string{} // "dir", or a file's content
		var refused bool
		for i := range 30 {
			n := name()
			above, below := false, n+"/"
			for p := range tree {
				above = above || strings.HasPrefix(n, p+"/") && tree[p] != "dir"
			}
			if above && r.IntN(50) > 0 {
				continue
			}
			what := "dir"
			switch kind := r.IntN(4); {
			case kind == 0:
				parts = append(parts, dir("context/"+n))
			case kind == 1 && tree[n] == "" && len(tree) > 0:
				// A hard link, to a file if there is one.
				target := ""
				for p := range tree {
					if tree[p] != "dir" && p > target {
						target = p
					}
				}
				if target == "" {
					continue
				}
				what = tree[target]
				parts = append(parts, hardlink("context/"+n, "context/"+target))
			default:
				what = fmt.Sprint(i)
				parts = append(parts, file("context/"+n, what))
			}
			if above {
				refused = true
				break
			}
			for j := range n {
				if n[j] == '/' {
					tree[n[:j]] = "dir"
				}
			}
			if what != "dir" {
				for p := range tree {
					if strings.HasPrefix(p, below) {
						delete(tree, p)
					}
				}
			}
			tree[n] = what
		}
		p, _, err := receive(t, archive(parts...), testOptions(t))
		if (err != nil) != refused || err != nil && !strings.Contains(err.Error(), "not a directory") {
			t.Errorf("seed %d: %v, refused is to be %v", seed, err, refused)
		}
		if err != nil {
			continue
		}
		got := map[string]string{}
		for _, e := range p.Context.Entries() {
			got[e.Path] = "dir"
			if !e.Mode.IsDir() {
				data, err := io.ReadAll(p.Context.Open(&e))
				if err != nil {
					t.Fatal(err)
				}
				got[e.Path] = string(data)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(tree) {
			t.Errorf("seed %d:\n%v\nwant\n%v", seed, got, tree)
		}
		built++
		for _, e := range p.Context.Entries() {
			if e.Mode.IsRegular() && e.Linkname != "" {
				links++
			}
		}
	}
	if built < 100 || links < 50 {
		t.Errorf("only %d archives and %d hard links were tried", built, links)
	}
}

// TestEntriesInAnyOrder: a directory that comes after its files is still one entry.
func TestEntriesInAnyOrder(t *testing.T) {
	parts := []string{file("context/a/b/c/d", ""), dir("context/a/b/c"), dir("context/a/b"), dir("context/a")}
	opts := testOptions(t)
	opts.Limits.Entries, opts.Limits.Names = 6, int64(len(configName+"context/"+"context/a/b/c/d"+"context/a/b/c"+"context/a/b"+"context/a"))
	mustReceive(t, archive(parts...), opts)
	slices.Reverse(parts)
	mustReceive(t, archive(parts...), opts)
}

// TestFloodOfChildren: to drop the files of a directory takes no longer than to add them.
func TestFloodOfChildren(t *testing.T) {
	var parts strings.Builder
	for i := range 20 {
		for j := range 500 {
			parts.WriteString(file(fmt.Sprintf("context/d/%d/%d", i, j), ""))
		}
	}
	for range fewer(50_000) {
		parts.WriteString(file("context/d/x/y", "") + file("context/d/x", "") + dir("context/d/x"))
	}
	// In quadratic time this takes hours, and the test's own limit ends it.
	p := mustReceive(t, archive(parts.String()), testOptions(t))
	if len(p.Context.Entries()) != 20*501+2 {
		t.Errorf("%d entries", len(p.Context.Entries()))
	}
}

// TestTimesOfNoFileSystem: a time that BuildKit cannot have becomes the nearest that it can.
func TestTimesOfNoFileSystem(t *testing.T) {
	far := header{name: "context/far", set: map[int]string{136: "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff"}}
	farDir := far
	farDir.name, farDir.typ = "context/farDir", '5'
	p := mustReceive(t, archive(far.String(), farDir.String(), file("context/near", ""), pax('x', "mtime=-9223372037.5"), dir("context/early"), pax('x', "mtime=-9999999999999999"), file("context/old", "")), testOptions(t))
	for name, check := range map[string]func(ns int64) bool{
		"far":    func(ns int64) bool { return time.Unix(0, ns).UTC().Year() == 2262 },
		"farDir": func(ns int64) bool { return time.Unix(0, ns).UTC().Year() == 2262 },
		"early":  func(ns int64) bool { return time.Unix(0, ns).UTC().Year() == 1677 },
		"old":    func(ns int64) bool { return time.Unix(0, ns).UTC().Year() == 1677 },
		"near":   func(ns int64) bool { return time.Unix(0, ns).UTC().Year() == 1970 },
	} {
		if ns := p.Context.Find(name).ModTime; !check(ns) {
			t.Errorf("%s is of %d, %v", name, ns, time.Unix(0, ns))
		}
	}
}

// TestSparse reads sparse files in every format that GNU tar writes. Each must read as on a
// disk.
func TestSparse(t *testing.T) {
	forms := map[string]func(string, int64, string, ...int64) string{"0.0": sparse00, "0.1": sparse01, "1.0": sparse10, "GNU": sparseGNU}
	var data strings.Builder
	var many []int64
	for i := range int64(100) {
		many = append(many, i*2000+i%3, 100+i)
		data.WriteString(strings.Repeat(string(rune('a'+i%26)), int(100+i)))
	}
	tests := []struct {
		name  string
		size  int64
		data  string
		spans []int64
	}{
		{"hole first", 70_000, "data", []int64{69_996, 4}},
		{"hole last", 70_000, "data", []int64{0, 4}},
		{"as GNU tar ends it", 70_000, "data", []int64{0, 4, 70_000, 0}},
		{"hole alone", 70_000, "", []int64{70_000, 0}},
		{"no hole", 4, "data", []int64{0, 4}},
		{"adjacent data", 8, "datadata", []int64{0, 4, 4, 4}},
		{"nothing", 0, "", []int64{0, 0}},
		{"many", 300_000, data.String(), many},
		{"large pieces", 1 << 20, strings.Repeat("0123456789abcdef", 20_000), []int64{1000, 200_000, 300_000, 120_000}},
	}
	for _, tt := range tests {
		want, rest := make([]byte, tt.size), tt.data
		for i := 0; i < len(tt.spans); i += 2 {
			rest = rest[copy(want[tt.spans[i]:tt.spans[i]+tt.spans[i+1]], rest):]
		}
		for form, sparse := range forms {
			body := archive(file("context/before", "before"), sparse("context/s", tt.size, tt.data, tt.spans...), hardlink("context/link", "context/s"), file("context/z", "after"))
			dense := archive(file("context/before", "before"), file("context/s", string(want)), hardlink("context/link", "context/s"), file("context/z", "after"))
			denseEntries := strip(mustReceive(t, dense, testOptions(t)).Context.Entries())
			for packed, body := range map[string]string{"tar": body, "gzip": gzipped(t, body)} {
				for _, inMemory := range []int64{0, 4 << 20} {
					memory := budget.New(1 << 30)
					opts := testOptions(t)
					opts.InMemory, opts.Memory = inMemory, memory.Open()
					p := mustReceive(t, body, opts)
					for _, name := range []string{"s", "link"} {
						var got bytes.Buffer
						// Small reads meet holes and data in every way.
						if _, err := io.CopyBuffer(struct{ io.Writer }{&got}, struct{ io.Reader }{p.Context.Open(p.Context.Find(name))}, make([]byte, 777)); err != nil || !bytes.Equal(got.Bytes(), want) {
							t.Errorf("%s in %s, %s: %s is not the file: %d bytes, %v", tt.name, form, packed, name, got.Len(), err)
						}
					}
					// The time depends on the content, so it is the time of the same file without
					// holes.
					if got := strip(p.Context.Entries()); !slices.Equal(got, denseEntries) {
						t.Errorf("%s in %s, %s:\n%+v\nwant\n%+v", tt.name, form, packed, got, denseEntries)
					}
				}
			}
		}
	}
}

// TestSparseConfig: a sparse config is read with zeros in its holes.
func TestSparseConfig(t *testing.T) {
	p := mustReceive(t, sparse01(configName, 4, "{}", 0, 2, 3, 0)+dir("context")+end, testOptions(t))
	if string(p.Config) != "{}\x00\x00" {
		t.Errorf("config %q", p.Config)
	}
}

// processorTime is the processor time that this process has used. It does not pass while
// another process has the processor.
func processorTime(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestSparseWaits: before the signature has passed, a body costs no more than the bytes that were
// sent, however large its sparse files are.
func TestSparseWaits(t *testing.T) {
	const size = 1 << 30
	body := archive(file("context/before", strings.Repeat("x", 1<<20)), sparse01("context/s", size, "end", size-3, 3), sparse01("beside", 1<<29, "x", 0, 1))
	memory := budget.New(1 << 30)
	opts := testOptions(t)
	opts.Memory = memory.Open()
	began := processorTime(t)
	s, err := payload.Receive(strings.NewReader(body), io.Discard, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	received := processorTime(t) - began
	if s.Index() {
		t.Error("it was indexed outside of the slot")
	}
	if took := memory.Used(); took > int64(len(body))+1<<20 {
		t.Errorf("%d bytes are taken by a body of %d", took, len(body))
	}
	began = processorTime(t)
	p, err := s.Payload()
	if err != nil {
		t.Fatal(err)
	}
	if hashed := processorTime(t) - began; received > hashed/3 {
		t.Errorf("it took %v to receive, and %v to index after the signature", received, hashed)
	}
	r := p.Context.Open(p.Context.Find("s"))
	if n, err := io.Copy(io.Discard, io.LimitReader(r, size-3)); n != size-3 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	if rest, err := io.ReadAll(r); string(rest) != "end" || err != nil {
		t.Errorf("then %q, %v", rest, err)
	}
}

// TestLongHeaderWaits: an extended header takes many times its size in memory, so a long one is
// read only after the signature has passed.
func TestLongHeaderWaits(t *testing.T) {
	var records []string
	for i := range 20_000 {
		records = append(records, fmt.Sprintf("%x=", i))
	}
	for _, waits := range []bool{false, true} {
		header := pax('x', records[:1000]...)
		if waits {
			header = pax('x', records...)
		}
		opts := testOptions(t)
		opts.InMemory = 0
		s, err := payload.Receive(strings.NewReader(archive(header, file("context/x", "x"))), io.Discard, opts)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		// A body in a file is indexed while it arrives, or once the build has a slot.
		if indexed := s.Index(); indexed == waits {
			t.Errorf("a header of %d bytes: indexed is %v", len(header), indexed)
		}
		if p, err := s.Payload(); err != nil || p.Context.Find("x") == nil {
			t.Errorf("a header of %d bytes: %v", len(header), err)
		}
	}
}

// TestPadding: a program that writes to a pipe may fill its last record with zeros, after the
// compressed stream.
func TestPadding(t *testing.T) {
	// Checksums that end in zeros are not padding.
	step := 1
	if testing.Short() {
		step = 9 // still with every length of padding
	}
	for n := 0; n < 600; n += step {
		body := archive(file("context/x", strings.Repeat("x", n)))
		for form, packed := range map[string]string{
			"gzip": gzipped(t, body), "gzip of members": gzipped(t, body[:700]) + gzipped(t, body[700:]),
			"zstd": zstded(t, body), "zstd of frames": zstded(t, body[:700]) + "\x50\x2a\x4d\x18\x03\x00\x00\x00abc" + zstded(t, body[700:]),
		} {
			padding := []int{0, 1, 2, 3, 4, 5, 11, 10_240}[n%8]
			packed += strings.Repeat("\x00", padding)
			if n%50 == 0 {
				packed = enveloped(packed)
			}
			s, err := payload.Receive(strings.NewReader(packed), io.Discard, testOptions(t))
			if err != nil {
				t.Fatal(err)
			}
			p, err := s.Payload()
			if err != nil {
				t.Errorf("%s of %d bytes with %d after it: %v", form, n, padding, err)
			} else if e := p.Context.Find("x"); e.Size != int64(n) {
				t.Errorf("%s: %+v", form, e)
			}
			s.Close()
		}
	}
	long := archive(file("context/x", "x")) + strings.Repeat("\x00", 300_000)
	for _, body := range []string{gzipped(t, long) + strings.Repeat("\x00", 300_000), zstded(t, long) + strings.Repeat("\x00", 300_000)} {
		mustReceive(t, body, testOptions(t))
	}
}

// TestZstdForms: every kind of frame that the encoder writes is passed on as a whole.
func TestZstdForms(t *testing.T) {
	src := rand.New(rand.NewPCG(3, 4))
	for n := range max(20, fewer(60)) { // each size
		data := make([]byte, src.IntN(1<<(n%20+1)))
		for i := range data {
			data[i] = byte(src.Uint32()) & byte(src.Uint32()>>(n%9))
		}
		body := archive(file("context/x", string(data)))
		for _, packed := range zstdForms(t, body) {
			p := mustReceive(t, packed+"\x00\x00\x00", testOptions(t))
			if got, err := io.ReadAll(p.Context.Open(p.Context.Find("x"))); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes: %d and %v", len(data), len(got), err)
			}
		}
	}
}

// TestAttributes: a warning counts the extended attributes that are left out, and names the
// files that lose capabilities.
func TestAttributes(t *testing.T) {
	capability := pax('x', "SCHILY.xattr.security.capability=\x01")
	many := capability + file("context/a", "") + capability + file("context/b", "") + capability + file("context/c", "") + capability + file("context/d", "")
	for name, tt := range map[string]struct{ body, want string }{
		"a user's":     {pax('x', "SCHILY.xattr.user.a=b") + file("context/x", ""), "extended attributes left out, of 1 entry"},
		"libarchive's": {pax('x', "LIBARCHIVE.xattr.user.a=YQ") + file("context/x", "") + pax('x', "LIBARCHIVE.xattr.user.a=YQ") + dir("context/d"), "extended attributes left out, of 2 entries"},
		"capabilities": {capability + file("context/x", ""), `extended attributes left out, of 1 entry; without their capabilities are: "x"`},
		"libarchive's capabilities": {
			pax('x', "LIBARCHIVE.xattr.security.capability=AQ") + file("context/x", "") + pax('x', "SCHILY.xattr.user.a=b") + file("context/y", ""),
			`extended attributes left out, of 2 entries; without their capabilities are: "x"`,
		},
		"many":        {many, `extended attributes left out, of 4 entries; without their capabilities are: "a", "b", "c", …`},
		"replaced":    {capability + file("context/x", "") + file("context/x", ""), ""},
		"dropped":     {capability + file("context/d/x", "") + file("context/d", ""), ""},
		"beside":      {capability + file("x", ""), `1 entry of the tar beside context/ ignored: "x"`},
		"of the rest": {pax('x', "SCHILY.dev=1", "LIBARCHIVE.creationtime=1") + file("context/x", ""), ""},
	} {
		p := mustReceive(t, archive(tt.body), testOptions(t))
		if got := strings.Join(p.Warnings, "; "); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}

// TestSparsePieces has many sparse files, each with a map that is small enough not to be counted as
// a header. All pieces together have a limit.
func TestSparsePieces(t *testing.T) {
	const each = 256
	var spans []int64
	for i := range int64(each) {
		spans = append(spans, 2*i, 1)
	}
	one := sparse10("context/f", 2*each, strings.Repeat("x", each), spans...)
	for files, want := range map[int]api.Code{1 << 20 / each: "", 1<<20/each + 1: api.TooLarge} {
		_, _, err := receiveAs(t, file(configName, `{"image":"x"}`)+strings.Repeat(one, files)+end, testOptions(t))
		if code(err) != want || want != "" && !strings.Contains(err.Error(), "pieces of data") {
			t.Errorf("%d files: %v", files, err)
		}
	}
}
