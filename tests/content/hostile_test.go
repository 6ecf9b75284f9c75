package content_test

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// block is a tar header that no library would write. Fields set by offset win.
func block(name string, typ byte, size int64, fields map[int]string) string {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:], fmt.Sprintf("%011o\x00%011o\x00", size, 0))
	b[156] = typ
	copy(b[257:], "ustar\x0000")
	for at, s := range fields {
		copy(b[at:], s)
	}
	copy(b[148:], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return string(b)
}

func data(text string) string { return text + strings.Repeat("\x00", -len(text)&511) }

func file(name, text string) string { return block(name, '0', int64(len(text)), nil) + data(text) }

func dir(name string) string { return block(name, '5', 0, nil) }

func symlink(name, target string) string { return block(name, '2', 0, map[int]string{157: target}) }

func hardlink(name, target string) string { return block(name, '1', 0, map[int]string{157: target}) }

// extended is a PAX or GNU header that holds text.
func extended(typ byte, text string) string {
	return block("extended", typ, int64(len(text)), nil) + data(text)
}

// sparse is a file of one hole.
func sparse(name string, size int64) string {
	return extended('x', record("GNU.sparse.name", name)+record("GNU.sparse.size", fmt.Sprint(size))+record("GNU.sparse.numblocks", "1")+record("GNU.sparse.map", fmt.Sprintf("%d,0", size))) + file("sparse", "")
}

func record(key, value string) string {
	rest := fmt.Sprintf(" %s=%s\n", key, value)
	n := len(rest) + 1
	for len(fmt.Sprint(n))+len(rest) > n {
		n++
	}
	return fmt.Sprint(n) + rest
}

var (
	tarEnd = strings.Repeat("\x00", 1024)
	// plain builds when nothing is put into it. It pushes nothing.
	plainConfig = file("com.openfaas.docker.config", `{"skipPush":true}`)
	plainHead   = plainConfig + dir("context/") + file("context/Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")
)

func with(parts ...string) string { return plainHead + strings.Join(parts, "") + tarEnd }

func gzipped(s string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	io.WriteString(w, s)
	w.Close()
	return b.String()
}

func zstded(t testing.TB, s string) string {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return string(w.EncodeAll([]byte(s), nil))
}

func enveloped(f *stack.Function, s string) string {
	return fmt.Sprintf(`{"signature":%q,"tar":%q}`, client.Sign(f.Secret, []byte(s)), base64.StdEncoding.EncodeToString([]byte(s)))
}

// wantStarted has the function build once more, and checks that it has begun n builds before.
// The log has a line for each, which may come after the build's answer.
func wantStarted(t *testing.T, ctx context.Context, f *stack.Function, n int) {
	t.Helper()
	if a := f.MustPost(t, ctx, []byte(with())); a.StatusCode != 200 {
		t.Errorf("the next build got %v", a)
	}
	var got int
	stack.Eventually(t, time.Minute, func() error {
		log, err := f.Log()
		if got = strings.Count(log, `"build started"`) - 1; err == nil && got < n {
			err = fmt.Errorf("%d builds were started, want %d", got, n)
		}
		return err
	})
	if got > n {
		t.Errorf("%d builds were started, want %d", got, n)
	}
}

type hostileTar struct {
	name string
	body string
	says string // in the error: mostly the entry's name
}

// hostileTars are refused with 400 or 413, with the limits of TestHostileLimits
// or with none.
func hostileTars(t testing.TB) []hostileTar {
	var list []hostileTar
	add := func(name, says string, parts ...string) {
		list = append(list, hostileTar{name, with(parts...), says})
	}
	whole := func(name, says, body string) { list = append(list, hostileTar{name, body, says}) }

	add("absolute path", "/etc/passwd", file("/etc/passwd", "x"))
	add("absolute path in the context", "/context/x", file("/context/x", "x"))
	add("dotdot", "context/../../x", file("context/../../x", "x"))
	add("dotdot first", "../x", file("../x", "x"))
	add("dotdot that stays inside", "context/a/../b", file("context/a/../b", "x"))
	add("dotdot as a directory", "context/..", dir("context/.."))
	add("dotdot in a PAX path", "context/../x", extended('x', record("path", "context/../x")), file("x", "x"))
	add("dotdot in a GNU name", "context/../x", extended('L', "context/../x\x00"), file("x", "x"))
	add("dotdot in the prefix field", "context/../x", block("x", '0', 0, map[int]string{345: "context/.."}))
	add("NUL in a PAX path", "", extended('x', record("path", "context/a\x00b")), file("x", "x"))
	add("no name", "", file("", "x"))
	add("hard link to a path outside", "context/l", hardlink("context/l", "/etc/passwd"))
	add("hard link up", "context/l", hardlink("context/l", "context/../../etc/passwd"))
	add("hard link forward", "context/l", hardlink("context/l", "context/z"), file("context/z", "x"))
	add("hard link to itself", "context/l", hardlink("context/l", "context/l"))
	add("hard link to a directory", "context/l", dir("context/d"), hardlink("context/l", "context/d"))
	add("hard link to the config", "context/l", hardlink("context/l", "com.openfaas.docker.config"))
	add("hard link to a sibling", "context/l", file("sibling", "x"), hardlink("context/l", "sibling"))
	add("file below a symlink", "context/l/x", symlink("context/l", "/tmp"), file("context/l/x", "x"))
	add("file below a file", "context/Dockerfile/x", file("context/Dockerfile/x", "x"))
	add("PAX sparse file of 1 TiB", "max_unpacked_bytes", extended('x', record("GNU.sparse.major", "1")+record("GNU.sparse.minor", "0")+record("GNU.sparse.name", "context/d")+record("GNU.sparse.realsize", "1099511627776")), file("context/d", "0\n"+strings.Repeat("\x00", 510)))
	add("PAX sparse file of an unknown version", "context/d", extended('x', record("GNU.sparse.major", "2")+record("GNU.sparse.minor", "0")+record("GNU.sparse.name", "context/d")), file("context/d", "x"))
	add("GNU sparse file of 8 EiB", "max_unpacked_bytes", block("context/d", 'S', 0, map[int]string{257: "ustar  \x00", 483: "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff"}))
	add("sparse files beside that are too large together", "max_unpacked_bytes", sparse("x/d", 3<<29), sparse("x/e", 3<<29))
	add("sparse map past the file's end", "", extended('x', record("GNU.sparse.size", "1")+record("GNU.sparse.numblocks", "1")+record("GNU.sparse.map", "1,1")), file("context/d", "x"))
	add("unknown type", "context/d", block("context/d", 'Q', 0, nil))
	add("config twice", "com.openfaas.docker.config", plainConfig)
	add("config twice in two spellings", "com.openfaas.docker.config", file("./com.openfaas.docker.config", `{}`))
	add("secrets twice", "com.openfaas.secrets", file("com.openfaas.secrets", "x"), file("com.openfaas.secrets", "x"))
	add("negative size", "", block("context/x", '0', 0, map[int]string{124: strings.Repeat("\xff", 12)}))
	add("size that is no number", "", block("context/x", '0', 0, map[int]string{124: "some"}))
	add("size of 8 EiB", "", extended('x', record("size", "9223372036854775807")), file("context/x", "x"))
	add("size beyond the body", "context/x", block("context/x", '0', 1<<20, nil))
	add("PAX record of a wrong length", "", extended('x', "99 path=context/x\n"), file("context/x", "x"))
	add("PAX record of no length", "", extended('x', "path=context/x\n"), file("context/x", "x"))
	add("PAX size that is none", "", extended('x', record("size", "-1")), file("context/x", "x"))
	add("PAX time that is none", "", extended('x', record("mtime", "never")), file("context/x", "x"))
	add("extended header of over 1 MiB", "1 MiB", extended('x', record("comment", strings.Repeat("x", 1<<20))), file("context/x", "x"))
	add("wrong checksum", "", strings.Replace(file("context/x", "x"), "context/x", "context/y", 1))
	// Beside the context nothing is built from, and no more is allowed.
	add("dotdot beside the context", "x/../y", file("x/../y", "x"))
	add("dotdot at the end beside", "x/..", dir("x/.."))
	add("name of 256 bytes", "context/n", extended('L', "context/"+strings.Repeat("n", 256)+"\x00"), file("x", "x"))
	add("absolute PAX path", "/x", extended('x', record("path", "/x")), file("x", "x"))
	add("absolute GNU name", "/x", extended('L', "/x\x00"), file("x", "x"))
	add("two slashes first", "//x", file("//x", "x"))
	add("root as a directory", "/", dir("/"))
	add("dot dotdot", "./../x", file("./../x", "x"))
	add("dot as a file", ".", file(".", "x"))
	add("dot as a symlink", ".", symlink(".", "/"))
	add("multi-volume file", "context/f", block("context/f", 'M', 0, map[int]string{257: "ustar  \x00"}))
	add("incremental dump", "context/f", block("context/f", 'D', 0, map[int]string{257: "ustar  \x00"}))
	add("hard link to nothing", "context/l", hardlink("context/l", ""))
	add("hard link to the context", "context/l", hardlink("context/l", "context"))
	add("hard link relative to the context", "context/l", hardlink("context/l", "Dockerfile"))
	add("hard link to the secrets", "context/l", hardlink("context/l", "com.openfaas.secrets"))
	add("symlink without a target", "context/l", symlink("context/l", ""))
	add("file below a hard link", "context/l/x", hardlink("context/l", "context/Dockerfile"), file("context/l/x", "x"))
	add("directory below a file", "context/Dockerfile/x", dir("context/Dockerfile/x"))
	add("NUL in a PAX link", "", extended('x', record("linkpath", "a\x00b")), symlink("context/l", "x"))
	add("PAX record of length 0", "", extended('x', "0 path=x\n"), file("context/x", "x"))
	add("PAX record of a negative length", "", extended('x', "-9 path=x\n"), file("context/x", "x"))
	add("PAX record of a huge length", "", extended('x', "99999999999999999999 path=x\n"), file("context/x", "x"))
	add("PAX record without an equals sign", "", extended('x', "7 path\n"), file("context/x", "x"))
	add("PAX record without a newline", "", extended('x', "10 path=xy"), file("context/x", "x"))
	add("PAX sparse map in disorder", "", extended('x', record("GNU.sparse.numbytes", "1")+record("GNU.sparse.offset", "1")), file("context/x", "x"))
	add("global header of over 1 MiB", "1 MiB", extended('g', record("comment", strings.Repeat("x", 1<<20))), file("context/x", "x"))
	add("GNU name of over 1 MiB", "1 MiB", extended('L', strings.Repeat("x", 1<<20+1)), file("context/x", "x"))
	add("extended header before the end", "", extended('x', record("path", "x")))
	whole("nothing", "", "")
	whole("no tar", "", strings.Repeat("not a tar ", 200))
	whole("no config", "com.openfaas.docker.config", dir("context/")+file("context/Dockerfile", "FROM scratch\n")+tarEnd)
	whole("no context", "context", plainConfig+tarEnd)
	whole("context is a symlink", "context", plainConfig+symlink("context", "/etc")+tarEnd)
	whole("context is a file", "context", plainConfig+file("context", "x")+tarEnd)
	whole("config is a symlink", "com.openfaas.docker.config", symlink("com.openfaas.docker.config", "/etc/passwd")+dir("context/")+tarEnd)
	whole("config is no JSON", "", file("com.openfaas.docker.config", "{")+dir("context/")+tarEnd)
	whole("config of a wrong type", "skipPush", file("com.openfaas.docker.config", `{"skipPush":"yes"}`)+dir("context/")+tarEnd)
	whole("config is nested deep", "", file("com.openfaas.docker.config", `{"labels":`+strings.Repeat("[", 900_000))+dir("context/")+tarEnd)
	whole("secrets that are no envelope", "com.openfaas.secrets", with(file("com.openfaas.secrets", "no: envelope")))
	whole("secrets of YAML aliases", "com.openfaas.secrets", with(file("com.openfaas.secrets", aliases())))
	whole("no end", "", plainHead)
	whole("half an end", "", plainHead+tarEnd[:512])
	whole("text after the end", "", with()+"x")
	whole("a tar after the end", "", with()+with())
	whole("gzip that is cut", "", gzipped(with())[:60])
	whole("gzip with text after it", "", gzipped(with())+"text")
	whole("gzip of a wrong checksum", "", gzipped(with())[:len(gzipped(with()))-8]+"\x00\x00\x00\x00\x00\x00\x00\x00")
	whole("gzip in gzip", "", gzipped(gzipped(with())))
	whole("gzip with zeros and text after it", "", gzipped(with())+"\x00\x00text")
	whole("gzip with zeros and gzip after it", "", gzipped(with())+"\x00\x00"+gzipped(with()))
	whole("zstd with zeros and text after it", "", zstded(t, with())+"\x00\x00text")
	whole("zstd that is cut", "", zstded(t, with())[:60])
	whole("zstd with text after it", "", zstded(t, with())+"text")
	whole("zeros", "com.openfaas.docker.config", tarEnd)
	whole("zip", "", "PK\x03\x04"+strings.Repeat("x", 1000))
	whole("config as a directory", "com.openfaas.docker.config", dir("com.openfaas.docker.config")+dir("context")+tarEnd)
	whole("a byte far after the end", "", with()+strings.Repeat("\x00", 100_000)+"x")
	whole("an entry after half an end", "", plainHead+tarEnd[:512]+file("context/x", "x")+tarEnd)
	whole("gzip of nothing", "", gzipped(""))
	whole("gzip of text", "", gzipped(strings.Repeat("no tar ", 200)))
	whole("gzip and then zstd", "", gzipped(with())+zstded(t, with()))
	whole("zstd in zstd", "", zstded(t, zstded(t, with())))
	whole("zstd of a wrong checksum", "", zstded(t, with())[:len(zstded(t, with()))-4]+"xxxx")
	whole("zstd with a dictionary", "", "\x28\xb5\x2f\xfd\x03\x01\x02\x03\x04\x00\x00")
	whole("zstd with a window of 2 GiB", "", "\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00")
	return list
}

// aliases is YAML that grows to gigabytes where its aliases are followed.
func aliases() string {
	var b strings.Builder
	b.WriteString("version: v1\nkey_id: x\na0: &a0 [x,x,x,x,x,x,x,x,x]\n")
	for i := 1; i < 12; i++ {
		fmt.Fprintf(&b, "a%d: &a%d [%s]\n", i, i, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d,", i-1), 9), ","))
	}
	b.WriteString("secrets: *a11\n")
	return b.String()
}

// oddTars are refused for what .dockerignore does not leave out, before a daemon is
// asked.
func oddTars() []hostileTar {
	var list []hostileTar
	add := func(name, says string, parts ...string) {
		list = append(list, hostileTar{name, with(parts...), says})
	}
	add("character device", `"context/d": a device`, block("context/d", '3', 0, nil))
	add("block device", `"context/d": a device`, block("context/d", '4', 0, nil))
	add("FIFO", `"context/d": a FIFO`, block("context/d", '6', 0, nil))
	add("hard link to a FIFO", `"context/d": a FIFO`, block("context/d", '6', 0, nil), hardlink("context/e", "context/d"))
	add("no UTF-8", `"context/\xff": a path`, file("context/\xff", "x"))
	add("directory of no UTF-8", `"context/\xff": a path`, dir("context/\xff"))
	add("symlink to no UTF-8", `"context/l": a symlink`, symlink("context/l", "\xff"))
	add("FIFO that is not left out", `"context/run/d": a FIFO`, file("context/.dockerignore", "run/*\n!run/d"), block("context/run/d", '6', 0, nil))
	add("FIFO that another Dockerfile leaves out", `"context/run/d": a FIFO`, file("context/other.dockerignore", "run"), block("context/run/d", '6', 0, nil))
	return list
}

// TestHostile posts archives that must be refused. Nothing reaches the daemon,
// and the function serves the next build.
func TestHostile(t *testing.T) {
	ctx, _, f := start(t, stack.FunctionConfig{})
	list := hostileTars(t)
	names := map[string]bool{}
	for _, tt := range list {
		names[tt.name] = true
	}
	if len(names) < 100 || len(names) < len(list) {
		t.Errorf("%d archives have %d names, want at least 100", len(list), len(names))
	}
	odd := oddTars()
	for _, tt := range append(list, odd...) {
		t.Run(tt.name, func(t *testing.T) {
			forms := map[string]string{"as it is": tt.body, "envelope": enveloped(f, tt.body)}
			if !strings.HasPrefix(tt.body, "\x1f\x8b") && !strings.HasPrefix(tt.body, "\x28\xb5\x2f\xfd") {
				forms["gzip"] = gzipped(tt.body)
			}
			for form, body := range forms {
				a := f.MustPost(t, ctx, []byte(body))
				if a.StatusCode != 400 && a.StatusCode != 413 || a.Status != "failed" || a.Code == "" {
					t.Errorf("%s: got %v", form, a)
				}
				if !strings.Contains(a.Error, tt.says) {
					t.Errorf("%s: the error does not say %s: %s", form, tt.says, a.Error)
				}
				if len(a.Error) > 2000 {
					t.Errorf("%s: the error has %d bytes", form, len(a.Error))
				}
			}
		})
	}
	wantStarted(t, ctx, f, 3*len(odd))
	checkTempDir(t, f)
}

// TestCutShort cuts an archive at every block: no part of it is a build.
func TestCutShort(t *testing.T) {
	ctx, _, f := start(t, stack.FunctionConfig{Env: map[string]string{"spool_memory_bytes": "1000"}})
	whole := with(file("context/a", strings.Repeat("a", 1500)), hardlink("context/b", "context/a"), symlink("context/c", "a"),
		extended('g', record("comment", "x")), extended('x', record("mtime", "1.5")), file("context/d", "x"),
		extended('L', "context/"+strings.Repeat("e/", 100)+"\x00"), dir("x"), file("beside", "x"))
	for n := 0; n < len(whole); n += 512 {
		for _, body := range []string{whole[:n], gzipped(whole[:n]), enveloped(f, whole[:n])} {
			if a := f.MustPost(t, ctx, []byte(body)); a.StatusCode != 400 {
				t.Errorf("cut at byte %d of %d: got %v", n, len(whole), a)
			}
		}
	}
	wantStarted(t, ctx, f, 0)
	if a := f.MustPost(t, ctx, []byte(whole)); a.StatusCode != 200 {
		t.Errorf("uncut: got %v", a)
	}
	// A cut within later padding is none.
	if a := f.MustPost(t, ctx, []byte(whole+strings.Repeat("\x00", 700))); a.StatusCode != 200 {
		t.Errorf("padded: got %v", a)
	}
	checkTempDir(t, f)
}

// TestGoCorpus posts what Go's own archive/tar is tested with, as it is and
// after what a build needs. Whatever it holds, it is a build or a refusal.
func TestGoCorpus(t *testing.T) {
	ctx, _, f := start(t, stack.FunctionConfig{})
	//lint:ignore SA1019 these tests run on the machine that compiles them
	paths, err := filepath.Glob(filepath.Join(runtime.GOROOT(), "src", "archive", "tar", "testdata", "*.tar*"))
	if err != nil || len(paths) < 30 {
		t.Fatalf("Go's testdata: %d files, %v", len(paths), err)
	}
	built := 0
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		switch filepath.Ext(path) {
		case ".base64":
			b, err = base64.StdEncoding.DecodeString(string(b))
		case ".bz2":
			b, err = io.ReadAll(bzip2.NewReader(bytes.NewReader(b)))
		}
		if err != nil {
			t.Fatal(err)
		}
		if a := f.MustPost(t, ctx, b); a.StatusCode != 400 && a.StatusCode != 413 {
			t.Errorf("%s alone: got %v", filepath.Base(path), a)
		}
		switch a := f.MustPost(t, ctx, []byte(plainHead+string(b))); a.StatusCode {
		case 200:
			built++
		case 400, 413:
		default:
			t.Errorf("%s after a context: got %v", filepath.Base(path), a)
		}
	}
	if built < 5 {
		t.Errorf("only %d of %d were taken for what they are: entries beside the context", built, len(paths))
	}
	checkTempDir(t, f)
}

// TestHostileLimits has each limit reached, named in the error, and not reached.
func TestHostileLimits(t *testing.T) {
	ctx, _, f := start(t, stack.FunctionConfig{Env: map[string]string{
		"max_body_bytes": "1MiB", "max_unpacked_bytes": "2MiB", "max_entries": "20", "max_path_bytes": "200",
		"max_names_bytes": "1500", "max_config_bytes": "1000", "max_secrets_bytes": "1000", "spool_memory_bytes": "1000",
	}})
	entries := func(n int, name string) string {
		var b strings.Builder
		for i := range n {
			b.WriteString(file(fmt.Sprintf("context/%s%d", name, i), ""))
		}
		return b.String()
	}
	config := func(n int) string {
		return file("com.openfaas.docker.config", `{"skipPush":true}`+strings.Repeat(" ", n-17))
	}
	rest := dir("context/") + file("context/Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")
	name := strings.Repeat("n", 90)
	for _, tt := range []struct {
		name string
		body string
		says string // empty: it builds
	}{
		{"body within", with(file("context/x", strings.Repeat("x", 1_000_000))), ""},
		{"body", with(file("context/x", strings.Repeat("x", 1<<20))), "1048576"},
		{"unpacked within", gzipped(with(file("context/x", strings.Repeat("x", 2_000_000)))), ""},
		{"unpacked", gzipped(with(file("context/x", strings.Repeat("x", 2<<20)))), "2097152"},
		{"unpacked zstd", zstded(t, with(file("context/x", strings.Repeat("x", 2<<20)))), "2097152"},
		{"unpacked beside", gzipped(with(file("x", strings.Repeat("x", 2<<20)))), "2097152"},
		{"entries within", with(entries(17, "")), ""},
		{"entries", with(entries(18, "")), "20 entries"},
		{"path within", with(extended('x', record("path", "context/"+strings.Repeat("n", 192))), file("x", "")), ""},
		{"path", with(extended('x', record("path", "context/"+strings.Repeat("n", 193))), file("x", "")), "200"},
		{"link target", with(extended('x', record("linkpath", strings.Repeat("n/", 101))), symlink("context/x", "x")), "200"},
		{"names", with(extended('x', record("path", "context/1"+name+name)), file("x", ""), entries(14, name)), "together"},
		{"config within", config(1000) + rest + tarEnd, ""},
		{"config", config(1001) + rest + tarEnd, "com.openfaas.docker.config"},
		{"secrets", with(file("com.openfaas.secrets", strings.Repeat("x", 1001))), "com.openfaas.secrets"},
		{"flood of extended headers", with(strings.Repeat(extended('x', record("a", "b")), 20), file("context/x", "")), "extended headers"},
		{"flood of global headers", with(strings.Repeat(extended('g', record("a", "b")), 20), file("context/x", "")), "extended headers"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := f.MustPost(t, ctx, []byte(tt.body))
			switch {
			case tt.says == "" && a.StatusCode != 200:
				t.Errorf("got %v", a)
			case tt.says != "" && (a.StatusCode != 413 || a.Code != "too_large" || !strings.Contains(a.Error, tt.says)):
				t.Errorf("got %v; want 413 and %q", a, tt.says)
			}
		})
	}
	checkTempDir(t, f)
}

// TestBombs posts what unpacks to gigabytes or is made to take memory, with the
// limits as they are by default, and looks at the memory of the process.
func TestBombs(t *testing.T) {
	const ceiling = 160 << 20 // GOMEMLIMIT
	_, f := stack.Test(t, stack.FunctionConfig{Plain: true})
	// 64 MiB of zeros are 64 KiB of gzip.
	zeros := gzipped(strings.Repeat("\x00", 64<<20))
	zstdZeros := zstded(t, strings.Repeat("\x00", 64<<20))
	var keys strings.Builder
	for i := range 60_000 {
		keys.WriteString(record(fmt.Sprint(i), ""))
	}
	// flood is n small entries, each after a header that is compressed once.
	flood := func(n int, header string) string {
		header = gzipped(header)
		b := gzipped(plainHead)
		for i := range n {
			b += header + gzipped(file(fmt.Sprintf("context/%d", i), ""))
		}
		return b + gzipped(tarEnd)
	}
	many := func(n int, entry func(i int) string) string {
		var b strings.Builder
		b.WriteString(plainHead)
		for i := range n {
			b.WriteString(entry(i))
		}
		b.WriteString(tarEnd)
		return b.String()
	}
	for _, tt := range []struct {
		name string
		body func() string
		says string
	}{
		{"10 GiB of gzip after the end", func() string { return gzipped(with()) + strings.Repeat(zeros, 160) }, "2147483648"},
		{"10 GiB of gzip in ten entries", func() string {
			b := gzipped(plainHead)
			for i := range 10 {
				b += gzipped(block(fmt.Sprintf("context/%d", i), '0', 1<<30, nil)) + strings.Repeat(zeros, 16)
			}
			return b + gzipped(tarEnd)
		}, "2147483648"},
		{"10 GiB in one entry", func() string {
			return gzipped(plainHead+extended('x', record("size", fmt.Sprint(10<<30)))+block("context/x", '0', 0, nil)) + strings.Repeat(zeros, 160)
		}, "2147483648"},
		{"10 GiB of zstd", func() string { return zstded(t, with()) + strings.Repeat(zstdZeros, 160) }, "2147483648"},
		{"extended headers of many keys", func() string { return flood(100, extended('x', keys.String())) }, "extended headers"},
		{"global headers of many keys", func() string { return flood(100, extended('g', keys.String())) }, "extended headers"},
		{"long names", func() string { return flood(100, extended('L', strings.Repeat("n", 1<<20-1)+"\x00")) }, "limit of 4096 bytes"},
		{"200,000 entries of long names and one more", func() string {
			// 140 bytes each, within what all names together may have.
			return many(200_000, func(i int) string {
				return block(fmt.Sprintf("%090d", i), '0', 0, map[int]string{136: fmt.Sprintf("%011o", i), 345: "context/" + strings.Repeat("d", 40)})
			})
		}, "200000 entries"},
		{"directories left out, 1,000 deep", func() string {
			return many(1000, func(i int) string {
				return extended('L', fmt.Sprintf("context/%d/%sx\x00", i, strings.Repeat("d/", 1000))) + file("x", "")
			})
		}, "together"},
		{"a chain of symlinks that grows", func() string {
			var b strings.Builder
			b.WriteString(plainConfig + dir("context/") + symlink("context/Dockerfile", "s0"))
			for i := range 25_000 {
				b.WriteString(symlink(fmt.Sprintf("context/s%d", i), fmt.Sprintf("s%d/x", i+1)))
			}
			return gzipped(b.String() + tarEnd)
		}, "too many symlinks"},
		{"many small sparse files", func() string {
			// The map of a file in the format 1.0 comes before its data.
			pieces := "257\n"
			for i := range 257 {
				pieces += fmt.Sprintf("%d\n1\n", 2*i)
			}
			one := extended('x', record("GNU.sparse.major", "1")+record("GNU.sparse.minor", "0")+record("GNU.sparse.name", "context/f")+record("GNU.sparse.realsize", "514")) +
				file("f", pieces+strings.Repeat("\x00", -len(pieces)&511)+strings.Repeat("x", 257))
			return gzipped(plainHead + strings.Repeat(one, 40_000) + tarEnd)
		}, "pieces of data"},
		{"a large ignore file beside a FIFO", func() string {
			return gzipped(with(block("context/fifo", '6', 0, nil), file("context/.dockerignore", strings.Repeat("a\n", 8<<20))))
		}, "is not read"},
		{"envelope nested deep", func() string {
			return strings.TrimSuffix(enveloped(f, with()), "}") + `,"x":` + strings.Repeat("[", 32<<20)
		}, "nested"},
		{"envelope of one long key", func() string {
			return strings.TrimSuffix(enveloped(f, with()), "}") + `,"` + strings.Repeat("x", 64<<20) + `":0}`
		}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			body := tt.body()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			defer cancel()
			began := time.Now()
			a := f.MustPost(t, ctx, []byte(body))
			if a.StatusCode != 400 && a.StatusCode != 413 || !strings.Contains(a.Error, tt.says) {
				t.Errorf("got %v; want %q", a, tt.says)
			}
			_, peak, err := f.Memory()
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%v, %d MiB at the peak so far", time.Since(began).Round(time.Millisecond), peak>>20)
			if peak > ceiling {
				t.Errorf("%d MiB of memory at the peak", peak>>20)
			}
			checkTempDir(t, f)
		})
	}
	// The daemon asks for the path through the symlinks, and a build finds out what is sent.
	wantStarted(t, stack.Within(t, 10*time.Minute), f, 2)
}
