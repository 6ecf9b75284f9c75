package payload_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"handler/function/api"
	"handler/function/payload"
)

func testOptions(t testing.TB) payload.Options {
	return payload.Options{
		Limits: payload.Limits{
			Body: 512 << 20, Unpacked: 2 << 30, Config: 1 << 20, Secrets: 2 << 20,
			Names: 32 << 20, Entries: 200_000, Path: 4096,
		},
		Dir:        t.TempDir(),
		InMemory:   4 << 20,
		HeadSize:   100, // so that most are streams
		ContentKey: [32]byte{1, 2, 3},
	}
}

// fewer is n, or a tenth of it with -short. It is for numbers and sizes that the race detector
// need not see: under it, everything takes ten times as long.
func fewer(n int) int {
	if testing.Short() {
		return n / 10
	}
	return n
}

// receive receives a body twice: as a head, and with opts. It checks what holds for every body:
// both results are the same, the body is what is hashed, no file is left, and an error comes
// without a payload. signed is the text that a signature would sign.
func receive(t testing.TB, body string, opts payload.Options) (p *payload.Payload, signed string, err error) {
	t.Helper()
	small := opts
	small.HeadSize = int64(len(body))
	whole, signedWhole, wholeErr := receiveAs(t, body, small)
	p, signed, err = receiveAs(t, body, opts)
	if signed != signedWhole || fmt.Sprint(err) != fmt.Sprint(wholeErr) {
		t.Errorf("in memory and as a stream, %d and %d bytes are signed, and the errors are %v and %v", len(signedWhole), len(signed), wholeErr, err)
	}
	if err == nil && (string(p.Config) != string(whole.Config) || string(p.Secrets) != string(whole.Secrets) || !slices.Equal(p.Warnings, whole.Warnings) ||
		p.Context != nil && !reflect.DeepEqual(strip(p.Context.Entries()), strip(whole.Context.Entries()))) {
		t.Error("in memory and as a stream, the body is not the same")
	}
	return p, signed, err
}

// receiveAs receives a body once.
func receiveAs(t testing.TB, body string, opts payload.Options) (p *payload.Payload, signed string, err error) {
	t.Helper()
	goroutines := runtime.NumGoroutine()
	var w bytes.Buffer
	s, err := payload.Receive(strings.NewReader(body), &w, opts)
	if err != nil {
		t.Fatalf("Receive: %v", err)
	}
	t.Cleanup(func() { s.Close() })
	sum, ok := s.SHA256()
	if again, _ := s.SHA256(); sum != again {
		t.Error("the SHA-256 differs the second time")
	}
	if s.Size() != int64(len(body)) || !ok || sum != sha256.Sum256([]byte(body)) {
		t.Errorf("size %d and SHA-256 %x are not the body's %d, %x", s.Size(), sum, len(body), sha256.Sum256([]byte(body)))
	}
	if _, ok := s.Signature(); ok != strings.HasPrefix(body, "{") {
		t.Errorf("Signature says ok = %v", ok)
	} else if !ok && w.String() != body {
		t.Errorf("signed are %d bytes that are not the body's %d", w.Len(), len(body))
	}
	checkNothingLeft(t, opts.Dir, goroutines)
	p, err = s.Payload()
	checkNothingLeft(t, opts.Dir, goroutines)
	if err != nil {
		if e, ok := errors.AsType[*api.Error](err); !ok || e.Code == api.Internal {
			t.Errorf("the error is not for a client: %#v", err)
		}
		if p != nil {
			t.Errorf("a payload beside the error %v", err)
		}
	}
	if p != nil && p.Context != nil {
		p.Context.SetTimes(timeKey)
	}
	return p, w.String(), err
}

var timeKey = [32]byte{4, 5, 6}

func checkNothingLeft(t testing.TB, dir string, goroutines int) {
	t.Helper()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left in the temporary directory: %v, %v", left, err)
	}
	// A goroutine that has just said that it is done may still be there.
	for range 60_000 {
		if runtime.NumGoroutine() <= goroutines {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Errorf("%d goroutines, %d before", runtime.NumGoroutine(), goroutines)
}

func mustReceive(t testing.TB, body string, opts payload.Options) *payload.Payload {
	t.Helper()
	p, _, err := receive(t, body, opts)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func code(err error) api.Code {
	if err == nil {
		return ""
	}
	return api.AsError(err).Code
}

// describe writes entries as lines, without the times of files.
func describe(t testing.TB, c *payload.Context) []string {
	t.Helper()
	var lines []string
	for _, e := range c.Entries() {
		data, err := io.ReadAll(c.Open(&e))
		if err != nil {
			t.Fatalf("reading %q: %v", e.Path, err)
		}
		line := fmt.Sprintf("%v %d %s", e.Mode, e.Size, e.Path)
		if e.Linkname != "" {
			line += " -> " + e.Linkname
		}
		if e.Mode.IsRegular() {
			line += " = " + string(data)
		}
		lines = append(lines, line)
	}
	return lines
}

func TestContext(t *testing.T) {
	l := strings.Repeat("l", 150)
	long := "context/" + l + "/" + l + "/long"
	p := mustReceive(t, archive(
		file("context/b", "b of the context"),
		header{name: "context/a", typ: '1', link: "./context/b", mode: 0o600, mtime: 3}.String(),
		hardlink("./context/z/c", "context/a"),
		header{name: "context/self", typ: '2', link: "self", mode: 0o644}.String(),
		symlink("context/abs", "/etc/passwd"),
		symlink("context/up", "../../x\\y"),
		header{name: "context/suid", mode: 0o104755}.String(),
		header{name: "context/tmp/", typ: '5', mode: 0o1777, mtime: 7}.String(),
		dir("context/empty"),
		file("./context/./sub//f", "in sub"),
		file("context/sub-f", ""),
		file("context/sub.f", ""),
		file("context/\u00e9 \n\"", "odd"),
		pax('x', "path="+long), file("short", "far down"),
	), testOptions(t))
	want := []string{
		"-rw-r--r-- 16 a = b of the context",
		"Lrwxrwxrwx 11 abs -> /etc/passwd",
		"-rw-r--r-- 16 b -> a = b of the context",
		"drwxr-xr-x 0 empty",
		"drwxr-xr-x 0 " + l,
		"drwxr-xr-x 0 " + l + "/" + l,
		"-rw-r--r-- 8 " + l + "/" + l + "/long = far down",
		"Lrwxrwxrwx 4 self -> self",
		"drwxr-xr-x 0 sub",
		"-rw-r--r-- 6 sub/f = in sub",
		"-rw-r--r-- 0 sub-f = ",
		"-rw-r--r-- 0 sub.f = ",
		"urwxr-xr-x 0 suid = ",
		"dtrwxrwxrwx 0 tmp",
		"Lrwxrwxrwx 9 up -> ../../x\\y",
		"drwxr-xr-x 0 z",
		"-rw-r--r-- 16 z/c -> a = b of the context",
		"-rw-r--r-- 3 \u00e9 \n\" = odd",
	}
	if got := describe(t, p.Context); !slices.Equal(got, want) {
		t.Errorf("entries:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if e := p.Context.Find("tmp"); e == nil || e.ModTime != 7e9 {
		t.Errorf("Find(tmp) = %+v, want a directory that keeps its time", e)
	}
	if e := p.Context.Find("z"); e == nil || e.ModTime != 0 {
		t.Errorf("Find(z) = %+v, want a directory of time 0", e)
	}
	if e := p.Context.Find("tm"); e != nil {
		t.Errorf("Find(tm) = %+v", e)
	}
	if len(p.Warnings) > 0 {
		t.Errorf("warnings: %q", p.Warnings)
	}
}

func TestPayload(t *testing.T) {
	ctx := file("context/Dockerfile", "FROM scratch")
	sealed := file(secretsName, "sealed")
	tests := []struct {
		name    string
		body    string
		secrets string
		warning string
	}{
		{name: "config first", body: config + ctx + end},
		{name: "config last", body: dir("context") + ctx + config + end},
		{name: "config in the middle", body: ctx + config + file("context/x", "x") + end},
		{name: "secrets after the config", body: ctx + config + sealed + end, secrets: "sealed"},
		{name: "secrets first", body: sealed + ctx + config + end, secrets: "sealed"},
		{name: "dot names", body: dir("./") + dir("./context/") + file("./context/Dockerfile", "FROM scratch") + file("./"+configName, "{}") + file("./"+secretsName, "sealed") + end, secrets: "sealed"},
		{name: "padded to a record", body: config + ctx + strings.Repeat("\x00", 10240)},
		{name: "cut within the padding", body: config + ctx + strings.Repeat("\x00", 1024+100)},
		{name: "a sibling", body: config + ctx + file("template.yml", "x") + end, warning: `1 entry of the tar beside context/ ignored: "template.yml"`},
		{
			name:    "siblings",
			body:    config + ctx + dir("./src") + file("./src/a", "x") + symlink("src/b", "/") + hardlink("src/c", "src/a") + file("contextual/Dockerfile", "no") + end,
			warning: `5 entries of the tar beside context/ ignored: "src", "src/a", "src/b", …`,
		},
		{name: "global headers", body: pax('g', "comment=0123456789") + config + ctx + pax('g', "comment=x") + end},
		{name: "volatile records", body: config + ctx + pax('x', "SCHILY.acl.access=b", "LIBARCHIVE.creationtime=1", "atime=1.5") + file("context/x", "x") + end},
		{name: "V7", body: config + ctx + header{name: "context/old", typ: 0xff, magic: "\x00\x00\x00\x00\x00\x00\x00\x00", set: map[int]string{156: "\x00"}}.String() + end},
		{name: "GNU magic", body: config + ctx + header{name: "context/gnu", magic: "ustar  \x00"}.String() + end},
		{name: "GNU long name", body: config + ctx + special('L', "context/"+strings.Repeat("n", 200)+"\x00") + file("x", "y") + end},
		{name: "GNU long link", body: config + ctx + special('K', strings.Repeat("n/", 200)+"\x00") + symlink("context/x", "y") + end},
	}
	for _, tt := range tests {
		for _, form := range []struct {
			name string
			body string
		}{
			{"tar", tt.body},
			{"gzip", gzipped(t, tt.body)},
			{"gzip of members", gzipped(t, tt.body[:100]) + gzipped(t, "") + gzipped(t, tt.body[100:])},
			{"zstd", zstded(t, tt.body)},
			{"zstd of frames", zstded(t, tt.body[:100]) + "\x50\x2a\x4d\x18\x03\x00\x00\x00abc" + zstded(t, tt.body[100:])},
			{"zstd after a skippable frame", "\x5f\x2a\x4d\x18\x03\x00\x00\x00abc" + zstded(t, tt.body)},
			{"envelope", enveloped(tt.body)},
			{"envelope of gzip", enveloped(gzipped(t, tt.body))},
			{"envelope of zstd", enveloped(zstded(t, tt.body))},
		} {
			t.Run(tt.name+"/"+form.name, func(t *testing.T) {
				p := mustReceive(t, form.body, testOptions(t))
				if string(p.Config) != "{}" {
					t.Errorf("config %q", p.Config)
				}
				if string(p.Secrets) != tt.secrets || (p.Secrets == nil) != (tt.secrets == "") {
					t.Errorf("secrets %q, want %q", p.Secrets, tt.secrets)
				}
				if got := strings.Join(p.Warnings, "; "); got != tt.warning {
					t.Errorf("warnings %q, want %q", got, tt.warning)
				}
				e := p.Context.Find("Dockerfile")
				if e == nil {
					t.Fatalf("no Dockerfile in %+v", p.Context.Entries())
				}
				if data, err := io.ReadAll(p.Context.Open(e)); err != nil || string(data) != "FROM scratch" {
					t.Errorf("Dockerfile holds %q, %v", data, err)
				}
			})
		}
	}
}

// An empty part of a payload and a missing one differ.
func TestEmptyParts(t *testing.T) {
	p := mustReceive(t, file(configName, "")+file(secretsName, "")+dir("context")+end, testOptions(t))
	if p.Config == nil || p.Secrets == nil || len(p.Context.Entries()) != 0 {
		t.Errorf("got %+v", p)
	}
}

// Each of the three formats that archive/tar writes is read.
func TestFormats(t *testing.T) {
	long := "context/" + strings.Repeat("d/", 60) + strings.Repeat("x", 90)
	mtime := time.Unix(1_700_000_000, 0)
	for _, format := range []tar.Format{tar.FormatUSTAR, tar.FormatPAX, tar.FormatGNU} {
		t.Run(format.String(), func(t *testing.T) {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			for _, h := range []*tar.Header{
				{Name: "context/", Typeflag: tar.TypeDir, Mode: 0o755},
				{Name: long, Size: 4, Mode: 0o640},
				{Name: "context/ln", Typeflag: tar.TypeSymlink, Linkname: "x"},
				{Name: "context/hl", Typeflag: tar.TypeLink, Linkname: "context/a"},
				{Name: configName, Size: 4, Mode: 0o664},
			} {
				h.Format, h.ModTime = format, mtime
				if h.Typeflag == tar.TypeLink {
					h.Linkname = long
					if format == tar.FormatUSTAR {
						continue // a link target has no prefix field
					}
				}
				if err := w.WriteHeader(h); err != nil {
					t.Fatal(err)
				}
				if h.Size > 0 {
					w.Write([]byte("data"))
				}
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			p := mustReceive(t, b.String(), testOptions(t))
			name := strings.TrimPrefix(long, "context/")
			e := p.Context.Find(name)
			if e == nil {
				t.Fatalf("no %q", name)
			}
			if sec := e.ModTime / 1e9; e.Mode != 0o640 || sec != mtime.Unix() {
				t.Errorf("got %+v", e)
			}
			if hl := p.Context.Find("hl"); (hl == nil) != (format == tar.FormatUSTAR) {
				t.Errorf("hard link: %+v", hl)
			}
		})
	}
}

func TestHold(t *testing.T) {
	// This is more than the chunks hold, so reading goes on after the error.
	rest := strings.Repeat("\x00", 8<<20)
	for _, body := range []string{
		archive(file("context/../x", "")) + rest,
		gzipped(t, archive(file("/x", ""))) + rest,
		enveloped("no tar") + rest,
		enveloped("no tar" + rest),
		"no tar" + rest,
	} {
		if _, _, err := receive(t, body, testOptions(t)); err == nil {
			t.Errorf("accepted: %.40q", body)
		}
	}
}

func TestBodyLimit(t *testing.T) {
	body := archive(file("context/x", strings.Repeat("x", 3<<20)))
	for _, limit := range []int{0, 1, 511, 1 << 20, len(body) - 1} {
		for _, body := range []string{body, "{" + body} {
			goroutines := runtime.NumGoroutine()
			opts := testOptions(t)
			opts.Limits.Body = int64(limit)
			s, err := payload.Receive(strings.NewReader(body), io.Discard, opts)
			if s != nil || code(err) != api.TooLarge || !strings.Contains(err.Error(), fmt.Sprint(limit)) {
				t.Errorf("limit %d: %v, %v", limit, s, err)
			}
			checkNothingLeft(t, opts.Dir, goroutines)
		}
	}
	opts := testOptions(t)
	opts.Limits.Body = int64(len(body))
	mustReceive(t, body, opts)
}

// A body whose Read fails has that error, wherever it fails, and leaves nothing behind.
func TestBodyError(t *testing.T) {
	big := archive(file("context/x", strings.Repeat("x", 5<<20)))
	failed := errors.New("connection reset")
	for _, body := range []string{big, gzipped(t, big), zstded(t, big), enveloped(big)} {
		for _, n := range []int{0, 1, 600, len(body) / 2, len(body)} {
			goroutines := runtime.NumGoroutine()
			opts := testOptions(t)
			opts.InMemory = 1000
			var signed slowWriter
			s, err := payload.Receive(io.MultiReader(strings.NewReader(body[:n]), iotest.ErrReader(failed)), &signed, opts)
			if signed.busy.Load() {
				t.Error("signed is written to after Receive has returned")
			}
			if s != nil || !errors.Is(err, failed) {
				t.Errorf("after %d of %d bytes: %v, %v", n, len(body), s, err)
			}
			checkNothingLeft(t, opts.Dir, goroutines)
		}
	}
}

// slowWriter tells whether a Write is under way.
type slowWriter struct{ busy atomic.Bool }

func (w *slowWriter) Write(p []byte) (int, error) {
	w.busy.Store(true)
	defer w.busy.Store(false)
	time.Sleep(2 * time.Millisecond)
	return len(p), nil
}

// The result does not depend on the sizes of the pieces in which a body comes.
func TestReadSizes(t *testing.T) {
	body := archive(file("context/x", strings.Repeat("x", 10_000)), hardlink("context/y", "context/x"))
	want := describe(t, mustReceive(t, body, testOptions(t)).Context)
	for _, body := range []string{body, gzipped(t, body), zstded(t, body), enveloped(body)} {
		for name, r := range map[string]io.Reader{
			"one byte": iotest.OneByteReader(strings.NewReader(body)),
			"half":     iotest.HalfReader(strings.NewReader(body)),
			"data+EOF": iotest.DataErrReader(strings.NewReader(body)),
		} {
			s, err := payload.Receive(r, io.Discard, testOptions(t))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			defer s.Close()
			p, err := s.Payload()
			if err != nil {
				t.Errorf("%s: %v", name, err)
			} else if got := describe(t, p.Context); !slices.Equal(got, want) {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
	}
}

// A Context reads the same from memory and from a file, and from many goroutines at once.
func TestSpool(t *testing.T) {
	src := rand.New(rand.NewPCG(1, 2))
	var parts []string
	want := map[string]string{}
	for i := range max(20, fewer(60)) {
		data := make([]byte, src.IntN(100_000))
		for j := range data {
			data[j] = byte(src.Uint32())
		}
		name := fmt.Sprintf("d%d/f%d", i%7, i)
		want[name] = string(data)
		parts = append(parts, file("context/"+name, string(data)))
	}
	body := archive(parts...)
	for _, memory := range []int{0, 1, 1000, 64 << 10, len(body) - 1, len(body), 64 << 20} {
		for form, body := range map[string]string{"tar": body, "gzip": gzipped(t, body), "envelope": enveloped(body)} {
			t.Run(fmt.Sprintf("%d/%s", memory, form), func(t *testing.T) {
				opts := testOptions(t)
				opts.InMemory = int64(memory)
				s, err := payload.Receive(strings.NewReader(body), io.Discard, opts)
				if err != nil {
					t.Fatal(err)
				}
				p, err := s.Payload()
				if err != nil {
					t.Fatal(err)
				}
				var work sync.WaitGroup
				for range 4 {
					work.Go(func() {
						for name, data := range want {
							got, err := io.ReadAll(p.Context.Open(p.Context.Find(name)))
							if err != nil || string(got) != data {
								t.Errorf("%s reads %d bytes and %v, want %d", name, len(got), err, len(data))
							}
						}
					})
				}
				work.Wait()
				for range 2 {
					if err := s.Close(); err != nil {
						t.Errorf("Close: %v", err)
					}
				}
				if _, err := p.Context.Open(p.Context.Find("d0/f0")).Read(make([]byte, 1)); err == nil {
					t.Error("reading after Close went well")
				}
			})
		}
	}
}

// A closed Spool gives its file descriptor back.
func TestDescriptors(t *testing.T) {
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	opts := testOptions(t)
	opts.InMemory = 0
	bodies := []string{archive(file("context/x", "x")), archive(file("/x", "x")), gzipped(t, archive(file("/x", "x")))}
	before := count()
	for range 20 {
		for _, body := range bodies {
			s, err := payload.Receive(strings.NewReader(body), io.Discard, opts)
			if err != nil {
				t.Fatal(err)
			}
			s.Close()
			_, err = payload.Receive(io.MultiReader(strings.NewReader(body), iotest.ErrReader(io.ErrUnexpectedEOF)), io.Discard, opts)
			if err == nil {
				t.Fatal("no error")
			}
		}
	}
	if after := count(); after > before+2 {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

// Without a directory, only a body that fits into memory is received. The client is not told the
// cause, which is for the operator.
func TestNoTempDir(t *testing.T) {
	opts := testOptions(t)
	opts.Dir = path.Join(opts.Dir, "missing")
	opts.InMemory = 600 << 10 // some of it is stored before there is no more room
	mustSpool := func(body string) *payload.Spool {
		s, err := payload.Receive(strings.NewReader(body), io.Discard, opts)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	body := archive(file("context/x", strings.Repeat("x", 1<<20)))
	for i, body := range []string{body, gzipped(t, body), enveloped(body)} {
		s := mustSpool(body)
		// The sum of a plain tar is of the stored body.
		if _, ok := s.SHA256(); ok != (i > 0) {
			t.Errorf("body %d: its sum is known: %v", i, ok)
		}
		if _, err := s.Payload(); code(err) != api.Internal || !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	}
	if _, err := mustSpool(archive()).Payload(); err != nil {
		t.Error(err)
	}
}

func TestComparePath(t *testing.T) {
	ordered := []string{
		"", "a", "a/", "a/\x01", "a/b", "a/b/c", "a/b-", "a/b.", "a/c", "a\x01", "a\x01/b", "a ", "a-", "a-/x", "a.", "a0", "aa", "b", "é",
	}
	// The order in which a walk meets siblings: '/' is below every other byte.
	for i, a := range ordered {
		for j, b := range ordered {
			if got, want := sign(payload.ComparePath(a, b)), sign(i-j); got != want {
				t.Errorf("ComparePath(%q, %q) = %d, want %d", a, b, got, want)
			}
		}
	}
}

func sign(n int) int {
	switch {
	case n < 0:
		return -1
	case n > 0:
		return 1
	}
	return 0
}

// All tars of a tree are the same context, in whatever way they were written.
func TestOrderOfEntries(t *testing.T) {
	parts := []string{
		fileAt("context/a", "1", 100), fileAt("context/b/c", "2", 100), fileAt("context/b-", "3", 200),
		dir("context/b"), symlink("context/s", "a"), config,
	}
	want := mustReceive(t, strings.Join(parts, "")+end, testOptions(t)).Context.Entries()
	for seed := range uint64(20) {
		shuffled := slices.Clone(parts)
		rand.New(rand.NewPCG(seed, 0)).Shuffle(len(parts), func(i, j int) {
			shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
		})
		got := mustReceive(t, strings.Join(shuffled, "")+end, testOptions(t)).Context.Entries()
		if a, b := strip(got), strip(want); !reflect.DeepEqual(a, b) {
			t.Errorf("seed %d: %+v, want %+v", seed, a, b)
		}
	}
}

// strip removes everything that a daemon does not see.
func strip(entries []payload.Entry) []payload.Entry {
	var out []payload.Entry
	for _, e := range entries {
		out = append(out, payload.Entry{Path: e.Path, Mode: e.Mode, Size: e.Size, ModTime: e.ModTime, Linkname: e.Linkname})
	}
	return out
}
