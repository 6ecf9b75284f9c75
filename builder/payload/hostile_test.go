package payload_test

import (
	"bytes"
	"compress/bzip2"
	"encoding/base64"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"handler/function/api"
	"handler/function/payload"
)

// hostile is a body that must be refused.
type hostile struct {
	name string
	body string
	code api.Code
	says string // part of the error

	limits func(*payload.Limits)
}

func hostileBodies(t testing.TB) []hostile {
	ctxFile := file("context/a", "a")
	var list []hostile
	add := func(name, body string, code api.Code, says string) {
		list = append(list, hostile{name: name, body: body, code: code, says: says})
	}
	bad := func(name, body, says string) { add(name, body, api.BadTar, says) }
	limited := func(name, body, says string, limits func(*payload.Limits)) {
		list = append(list, hostile{name: name, body: body, code: api.TooLarge, says: says, limits: limits})
	}

	// Names.
	for _, where := range []struct{ name, prefix string }{{"context", "context/"}, {"beside", "x/"}} {
		bad("dotdot "+where.name, archive(file(where.prefix+"../x", "")), where.prefix+`../x": ".." in its path`)
		bad("dotdot at the end "+where.name, archive(dir(where.prefix+"..")), `".." in its path`)
		bad("dotdot that stays inside "+where.name, archive(file(where.prefix+"a/../b", "")), `".." in its path`)
	}
	bad("absolute", archive(file("/etc/passwd", "")), `"/etc/passwd": an absolute path`)
	bad("absolute context", archive(file("/context/x", "")), "absolute")
	bad("absolute directory", archive(dir("/")), "absolute")
	bad("two slashes", archive(file("//x", "")), "absolute")
	bad("dotdot first", archive(file("../x", "")), `".."`)
	bad("only dotdot", archive(dir("..")), `".."`)
	bad("dot dotdot", archive(file("./../x", "")), `".."`)
	bad("dotdot in a PAX path", archive(pax('x', "path=context/../../x"), ctxFile), `".."`)
	bad("absolute PAX path", archive(pax('x', "path=/x"), ctxFile), "absolute")
	bad("dotdot in a GNU long name", archive(special('L', "context/../x\x00"), ctxFile), `".."`)
	bad("dotdot by the prefix field", archive(header{name: "x", set: map[int]string{345: "context/.."}}.String()), `".."`)
	bad("NUL in a PAX path", archive(pax('x', "path=context/a\x00b"), ctxFile), "bad header")
	bad("NUL in a PAX link", archive(pax('x', "linkpath=a\x00b"), symlink("context/s", "x")), "bad header")
	bad("no name", archive(header{typ: '0'}.String()), "no name")
	bad("name over 255 bytes", archive(special('L', "context/"+strings.Repeat("n", 256)+"\x00"), file("x", "")), "over 255 bytes")
	bad("dot as a file", archive(file(".", "")), "not a directory")
	bad("dot as a symlink", archive(symlink(".", "/")), "not a directory")

	// Links.
	bad("hard link to nothing", archive(hardlink("context/l", "context/none")), `hard link to "context/none"`)
	bad("hard link to itself", archive(hardlink("context/l", "context/l")), "hard link")
	bad("hard link forward", archive(hardlink("context/l", "context/a"), ctxFile), "hard link")
	bad("hard link outside", archive(hardlink("context/l", "/etc/passwd")), "hard link")
	bad("hard link by dotdot", archive(ctxFile, hardlink("context/l", "../etc/passwd")), "hard link")
	bad("hard link to the config", archive(hardlink("context/l", configName)), "hard link")
	bad("hard link to the secrets", archive(file(secretsName, "s"), hardlink("context/l", secretsName)), "hard link")
	bad("hard link to a sibling", archive(file("x", ""), hardlink("context/l", "x")), "hard link")
	bad("hard link relative to the context", archive(ctxFile, hardlink("context/l", "a")), "hard link")
	bad("hard link to a directory", archive(dir("context/d"), hardlink("context/l", "context/d")), "hard link")
	bad("hard link to the context", archive(hardlink("context/l", "context")), "hard link")
	bad("hard link to no name", archive(hardlink("context/l", "")), "hard link")
	bad("symlink to nothing", archive(symlink("context/l", "")), "without a target")
	bad("file below a symlink", archive(symlink("context/l", "/tmp"), file("context/l/x", "")), `"context/l/x": "context/l" is not a directory`)
	bad("file below a symlink to a file", archive(ctxFile, symlink("context/l", "a"), file("context/l/x", "")), `"context/a" is not a directory`)
	bad("file below a symlink to itself", archive(symlink("context/l", "l"), file("context/l/x", "")), `"context/l" is not a directory`)
	bad("file below symlinks in a circle", archive(symlink("context/l", "m/x"), symlink("context/m", "l"), file("context/l/x", "")), "is not a directory")
	bad("file below a symlink to nothing in a directory", archive(dir("context/d"), symlink("context/l", "d/e"), file("context/l/x", "")), `"context/l" is not a directory`)
	bad("hard link through a symlink to nothing", archive(symlink("context/l", "d"), hardlink("context/x", "context/l/x")), "is not a directory")
	bad("file below a file", archive(ctxFile, file("context/a/b", "")), "not a directory")
	bad("directory below a file", archive(ctxFile, dir("context/a/b")), "not a directory")
	bad("deep below a file", archive(ctxFile, file("context/a/b/c/d", "")), "not a directory")
	bad("file below a hard link", archive(ctxFile, hardlink("context/b", "context/a"), file("context/b/c", "")), "not a directory")

	// The parts of a payload.
	bad("nothing", "", "there is none")
	bad("only zeros", end, "no "+configName)
	bad("no config", dir("context")+ctxFile+end, "no "+configName)
	bad("context as a file", config+file("context", "")+end, "not a directory")
	bad("context as a symlink", config+symlink("context", "/")+end, "not a directory")
	bad("context as a symlink with a file below", config+symlink("context", "/etc")+file("context/passwd", "")+end, "not a directory")
	bad("config twice", archive(config), configName+`": it is there twice`)
	bad("config twice with a dot", archive(file("./"+configName, "{}")), "twice")
	bad("secrets twice", archive(file(secretsName, ""), file(secretsName, "")), "twice")
	bad("config as a symlink", symlink(configName, "/etc/passwd")+dir("context")+end, "not a regular file")
	bad("config as a directory", dir(configName)+dir("context")+end, "not a regular file")
	bad("config as a hard link", ctxFile+hardlink(configName, "context/a")+end, "not a regular file")
	bad("secrets as a symlink", archive(symlink(secretsName, "/etc/passwd")), "not a regular file")

	// Headers.
	bad("text", strings.Repeat("no tar ", 200), "looks like plain text")
	bad("one byte", "x", "looks like plain text")
	bad("one byte of no text", "\x01", "cut short")
	bad("a JSON array", "[]", "looks like JSON")
	bad("zip", "PK\x03\x04"+strings.Repeat("x", 1000), "looks like a zip archive")
	bad("xz", "\xfd7zXZ\x00"+strings.Repeat("x", 1000), "looks like xz")
	bad("noise", strings.Repeat("\x01\xff\x02", 1000), "neither a tar nor")
	bad("wrong checksum", archive(header{name: "context/x", sum: "000000\x00 "}.String()), "bad header after entry \"context/\"")
	bad("no checksum", archive(header{name: "context/x", sum: "xxxxxxxx"}.String()), "bad header")
	bad("negative size", archive(header{name: "context/x", set: map[int]string{124: "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"}}.String()), "bad header")
	bad("size that is no number", archive(header{name: "context/x", set: map[int]string{124: "xyz"}}.String()), "bad header")
	bad("size over 63 bits", archive(header{name: "context/x", set: map[int]string{124: "\x80\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff"}}.String()), "bad header")
	bad("negative PAX size", archive(pax('x', "size=-1"), ctxFile), "bad header")
	bad("PAX size that is no number", archive(pax('x', "size=1e3"), ctxFile), "bad header")
	bad("PAX record without a length", archive(special('x', "path=x\n"), ctxFile), "bad header")
	bad("PAX record of length 0", archive(special('x', "0 path=x\n"), ctxFile), "bad header")
	bad("PAX record of negative length", archive(special('x', "-9 path=x\n"), ctxFile), "bad header")
	bad("PAX record of huge length", archive(special('x', "99999999999999999999 path=x\n"), ctxFile), "bad header")
	bad("PAX record longer than its header", archive(special('x', "900 path=x\n"), ctxFile), "bad header")
	bad("PAX record without an equals sign", archive(special('x', "7 path\n"), ctxFile), "bad header")
	bad("PAX record without a newline", archive(special('x', "10 path=xy"), ctxFile), "bad header")
	bad("PAX time that is none", archive(pax('x', "mtime=soon"), ctxFile), "bad header")
	bad("PAX sparse map in disorder", archive(pax('x', "GNU.sparse.numbytes=1", "GNU.sparse.offset=1"), ctxFile), "bad header")
	bad("PAX sparse map of many", archive(pax('x', "GNU.sparse.major=0", "GNU.sparse.minor=1", "GNU.sparse.numblocks=9999999999", "GNU.sparse.map=1,2"), ctxFile), "bad header")
	bad("PAX sparse records alone", archive(pax('x', "GNU.sparse.realsize=1000000000000"), ctxFile), "a sparse file of an unknown format")
	bad("PAX sparse of an unknown version", archive(pax('x', "GNU.sparse.major=9", "GNU.sparse.minor=9"), ctxFile), "a sparse file of an unknown format")
	bad("sparse data past the file's end", archive(sparse01("context/f", 10, "0123456789x", 0, 11)), "bad header")
	bad("sparse data out of order", archive(sparse01("context/f", 10, "0123", 4, 2, 0, 2)), "bad header")
	bad("sparse data that overlaps", archive(sparse01("context/f", 10, "0123", 0, 2, 1, 2)), "bad header")
	bad("sparse file with less data than its map", archive(sparse01("context/f", 10, "01", 0, 4)), "bad data of entry")
	bad("sparse file with more data than its map", archive(sparse01("context/f", 10, "0123", 0, 2)), "bad data of entry")
	bad("sparse file of negative size", archive(sparse01("context/f", -1, "", 0, 0)), "bad header")
	bad("sparse directory", archive(pax('x', "GNU.sparse.major=0", "GNU.sparse.minor=1", "GNU.sparse.numblocks=1", "GNU.sparse.map=0,0", "GNU.sparse.size=0"), dir("context/d")), "bad header")
	bad("sparse map in a chain", archive(header{name: "context/f", typ: 'S', magic: "ustar  \x00", set: map[int]string{482: "\x01", 483: octal(0, 12)}}.String(), strings.Repeat(strings.Repeat("\x00", 504)+"\x01"+strings.Repeat("\x00", 7), 3000)), "bad header")
	bad("multi-volume", archive(header{name: "context/f", typ: 'M', magic: "ustar  \x00"}.String()), "unknown type 'M'")
	bad("incremental dump", archive(header{name: "context/f", typ: 'D', magic: "ustar  \x00"}.String()), "unknown type 'D'")
	bad("type of a later standard", archive(header{name: "context/f", typ: 'Z'}.String()), "unknown type 'Z'")
	bad("error with a long name", archive(special('L', "/"+strings.Repeat("n/", 2000)+"\x00"), file("x", "")), "…")

	// The end.
	bad("no end", config+dir("context"), "cut short")
	bad("one block of zeros", config+dir("context")+end[:512], "cut short")
	bad("one block and a half", config+dir("context")+end[:1023], "cut short")
	bad("an entry after one block of zeros", config+dir("context")+end[:512]+ctxFile+end, "bad header")
	bad("an entry after the end", archive()+ctxFile+end, "something else than zeros")
	bad("a byte after the end", archive()+"x", "something else than zeros")
	bad("a byte far after the end", archive()+strings.Repeat("\x00", 100_000)+"x", "something else than zeros")
	bad("extended header, then the end", config+dir("context")+pax('x', "path=x")+end, "cut short")
	bad("extended header, then nothing", config+dir("context")+pax('x', "path=x"), "cut short")
	bad("long name, then the end", config+dir("context")+special('L', "x\x00")+end, "cut short")
	bad("cut in a header", config+dir("context")+ctxFile[:100], "cut short")
	bad("cut in data", config+dir("context")+file("context/b", strings.Repeat("x", 1000))[:600], `cut short in entry "context/b"`)
	bad("cut in padding", config+dir("context")+ctxFile[:1000], "cut short")
	bad("cut in the config", config[:513], "cut short in entry")
	bad("size over what there is", archive(header{name: "context/x", size: 1 << 20}.String()), "cut short")

	// Compression.
	whole := archive(file("context/f", strings.Repeat("0123456789", 1000)))
	gz, zst := gzipped(t, whole), zstded(t, whole)
	bad("gzip of nothing", gzipped(t, ""), "there is none")
	bad("gzip magic alone", gz[:2], "gzip: it is cut short")
	bad("gzip header alone", gz[:10], "gzip: it is cut short")
	bad("gzip cut in the middle", gz[:len(gz)/2], "gzip: it is cut short")
	bad("gzip cut in its checksum", gz[:len(gz)-3], "gzip: it is cut short")
	bad("gzip of a wrong checksum", gz[:len(gz)-8]+"xxxx"+gz[len(gz)-4:], "gzip: its checksum")
	bad("gzip of a wrong size", gz[:len(gz)-4]+"xxxx", "gzip: its checksum")
	bad("gzip with other bytes inside", gz[:20]+"\xff\xff\xff\xff"+gz[24:], "gzip")
	bad("gzip of an unknown method", gz[:2]+"\x07"+gz[3:], "gzip")
	bad("gzip, then text", gz+"more", "gzip")
	bad("gzip, then zeros, then text", gz+strings.Repeat("\x00", 512)+"more", "gzip: something else follows")
	bad("gzip, then many zeros, then a byte", gz+strings.Repeat("\x00", 200_000)+"x", "gzip: something else follows")
	bad("gzip, then zeros, then gzip", gz+strings.Repeat("\x00", 512)+gz, "gzip: something else follows")
	bad("gzip, then a line end", gz+"\n", "gzip: something else follows")
	bad("gzip, then a tar", gz+whole, "gzip: something else follows")
	bad("gzip, then another tar in gzip", gz+gz, "something else than zeros")
	bad("gzip, then zstd", gz+zst, "gzip: something else follows")
	bad("gzip in gzip", gzipped(t, gz), "compressed twice")
	bad("gzip of an envelope", gzipped(t, enveloped(whole)), "looks like JSON")
	bad("gzip of a cut tar", gzipped(t, whole[:len(whole)-1024]), "cut short")
	bad("zstd magic alone", zst[:4], "zstd")
	bad("zstd cut in the middle", zst[:len(zst)/2], "zstd")
	bad("zstd cut in its checksum", zst[:len(zst)-2], "zstd")
	bad("zstd of a wrong checksum", zst[:len(zst)-4]+"xxxx", "zstd: its checksum")
	bad("zstd, then text", zst+"more", "zstd")
	bad("zstd, then zeros, then text", zst+strings.Repeat("\x00", 512)+"more", "zstd: something else follows")
	bad("zstd, then zeros, then zstd", zst+strings.Repeat("\x00", 512)+zst, "zstd: something else follows")
	bad("zstd, then a zero and a byte", zst+"\x00x", "zstd: something else follows")
	bad("zstd, then a tar", zst+whole, "zstd: something else follows")
	bad("zstd, then gzip", zst+gz, "zstd: something else follows")
	bad("zstd in zstd", zstded(t, zst), "compressed twice")
	bad("zstd with a dictionary", "\x28\xb5\x2f\xfd\x03\x01\x02\x03\x04\x00\x00", "zstd")
	bad("zstd with a reserved block", "\x28\xb5\x2f\xfd\x00\x58\x07\x00\x00", "zstd")
	bad("skippable frame alone", "\x50\x2a\x4d\x18\x03\x00\x00\x00abc", "there is none")
	bad("skippable frame that is cut", "\x50\x2a\x4d\x18\xff\xff\xff\xffabc", "zstd")
	add("zstd window of 16 MiB", "\x28\xb5\x2f\xfd\x00\x70\x01\x00\x00", api.TooLarge, "zstd window")
	add("zstd window of 2 GiB", "\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00", api.TooLarge, "zstd window")
	add("zstd single segment of 2 GiB", "\x28\xb5\x2f\xfd\xa0\x00\x00\x00\x80\x01\x00\x00", api.TooLarge, "zstd window")

	// Limits.
	limited("config too large", archive(file(secretsName, ""))+"", "", func(l *payload.Limits) { l.Config = 1 })
	limited("secrets too large", archive(file(secretsName, "123")), "limit of 2 bytes", func(l *payload.Limits) { l.Secrets = 2 })
	limited("config of 1 MiB and a byte", file(configName, strings.Repeat(" ", 1<<20+1)), "limit of 1048576 bytes", nil)
	limited("config that claims 8 GiB", header{name: configName, size: 8<<30 - 1}.String(), "limit of 1048576 bytes", nil)
	limited("path too long", archive(special('L', "context/"+strings.Repeat("n/", 2045)+"\x00"), file("x", "")), "limit of 4095 bytes", func(l *payload.Limits) { l.Path = 4095 })
	limited("link target too long", archive(pax('x', "linkpath="+strings.Repeat("n", 5000)), symlink("context/x", "y")), "limit of 4096 bytes", nil)
	limited("path too long through a symlink", archive(special('K', strings.Repeat("d/", 1500)+"\x00"), symlink("context/l", "x"), file("context/"+strings.Repeat("d/", 40), "")+special('L', "context/l/"+strings.Repeat("n/", 600)+"x\x00"), file("x", "")), "through the symlink", nil)
	deep := strings.Repeat("d/", 100)
	limited("too many looks through symlinks", archive(special('L', "context/"+deep+"x\x00")+file("x", ""), symlink("context/l", "."), strings.Repeat(special('L', "context/l/"+deep+"x\x00")+file("x", ""), 100)), "all paths together", func(l *payload.Limits) { l.Names = 60_000 })
	limited("too many entries", archive(ctxFile, file("context/b", "")), "limit of 3 entries", func(l *payload.Limits) { l.Entries = 3 })
	limited("too many entries beside", archive(file("a", ""), file("b", "")), "limit of 3 entries", func(l *payload.Limits) { l.Entries = 3 })
	limited("too many directories left out", archive(file("context/a/b/c/d", "")), "directories that are left out", func(l *payload.Limits) { l.Entries = 5 })
	limited("too many names", archive(file("context/"+strings.Repeat("n", 90), ""), file("context/"+strings.Repeat("m", 90), "")), "all paths together", func(l *payload.Limits) { l.Names = 200 })
	limited("too many names of directories left out", archive(file("context/"+strings.Repeat("n/", 40)+"x", "")), "all paths together", func(l *payload.Limits) { l.Names = 1000 })
	limited("too many link targets", archive(symlink("context/s", strings.Repeat("n", 100)), symlink("context/r", strings.Repeat("n", 100))), "all paths together", func(l *payload.Limits) { l.Names = 200 })
	limited("unpacked too large", whole, "limit of 12000 bytes unpacked", func(l *payload.Limits) { l.Unpacked = 12000 })
	limited("unpacked gzip too large", gz, "limit of 12000 bytes unpacked", func(l *payload.Limits) { l.Unpacked = 12000 })
	limited("unpacked zstd too large", zst, "limit of 12000 bytes unpacked", func(l *payload.Limits) { l.Unpacked = 12000 })
	limited("unpacked too large beside", archive(file("x", strings.Repeat("x", 10_000))), "bytes unpacked", func(l *payload.Limits) { l.Unpacked = 10_000 })
	limited("padding too large", archive()+strings.Repeat("\x00", 10_000), "bytes unpacked", func(l *payload.Limits) { l.Unpacked = 10_000 })
	limited("entry that claims 8 GiB", archive(header{name: "context/x", size: 8<<30 - 1}.String()), "bytes unpacked", nil)
	limited("PAX size of 8 EiB", archive(pax('x', "size=9223372036854775807"), ctxFile), "bytes unpacked", nil)
	limited("extended header over 1 MiB", archive(pax('x', "comment="+strings.Repeat("x", 1<<20)), ctxFile), "over 1 MiB", nil)
	limited("global header over 1 MiB", archive(pax('g', "comment="+strings.Repeat("x", 1<<20)), ctxFile), "over 1 MiB", nil)
	limited("long name over 1 MiB", archive(special('L', strings.Repeat("x", 1<<20+1)), ctxFile), "over 1 MiB", nil)
	limited("long name of 1 MiB", archive(special('L', strings.Repeat("x", 1<<20)), ctxFile), "limit of 4096 bytes", nil)
	limited("sparse file over the limit", archive(sparse01("context/f", 2<<30, "x", 0, 1)), "bytes unpacked", nil)
	limited("sparse file of 8 EiB", archive(sparse01("context/f", 1<<63-1, "x", 0, 1)), "bytes unpacked", nil)
	limited("sparse file beside of 8 EiB", archive(sparse01("f", 1<<63-1, "x", 0, 1)), "bytes unpacked", nil)
	limited("sparse entry beside of no known type", archive(strings.Replace(sparse01("f", 1<<63-1, "", 0, 0), file("f", ""), header{name: "f", typ: 'Z'}.String(), 1)), "bytes unpacked", nil)
	limited("sparse files that are over the limit together", archive(sparse01("context/f", 6000, "x", 0, 1), sparse01("context/g", 6000, "x", 0, 1)), "bytes unpacked", func(l *payload.Limits) { l.Unpacked = 15_000 })
	limited("sparse file before others", archive(sparse01("context/f", 10_000, "x", 0, 1), ctxFile), "bytes unpacked", func(l *payload.Limits) { l.Unpacked = 15_000 })
	limited("sparse config", sparse01(configName, 1<<20+1, "", 0, 0)+end, "limit of 1048576 bytes", nil)
	bad("sparse map over 1 MiB", archive(pax('x', "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=context/f", "GNU.sparse.realsize=1"), file("f", "900000\n"+strings.Repeat("0\n", 600_000))), "bad header")
	small := func(l *payload.Limits) { l.Names = 100_000 }
	limited("flood of extended headers", archive(strings.Repeat(pax('x', "a=b"), 200), ctxFile), "extended headers", small)
	limited("flood of global headers", archive(strings.Repeat(pax('g', "a=b"), 200), ctxFile), "extended headers", small)
	limited("flood of long names", archive(strings.Repeat(special('L', "x\x00"), 200), ctxFile), "extended headers", small)
	limited("flood of long links", archive(strings.Repeat(special('K', "x\x00"), 200), ctxFile), "extended headers", small)
	limited("flood over many entries", archive(flood(200)), "extended headers", small)
	return list
}

// flood is n entries, each with an extended header over freeHeaders.
func flood(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(pax('x', "comment="+strings.Repeat("x", 4000)))
		b.WriteString(file(fmt.Sprintf("context/%d", i), ""))
	}
	return b.String()
}

func TestHostile(t *testing.T) {
	bodies := hostileBodies(t)
	if len(bodies) < 120 {
		t.Errorf("only %d hostile bodies", len(bodies))
	}
	names := map[string]bool{}
	for _, tt := range bodies {
		if names[tt.name] {
			t.Errorf("%q is there twice", tt.name)
		}
		names[tt.name] = true
		t.Run(tt.name, func(t *testing.T) {
			opts := testOptions(t)
			if tt.limits != nil {
				tt.limits(&opts.Limits)
			}
			for form, body := range map[string]string{
				"as it is": tt.body, "envelope": enveloped(tt.body),
			} {
				_, _, err := receive(t, body, opts)
				if code(err) != tt.code || !strings.Contains(fmt.Sprint(err), tt.says) {
					t.Errorf("%s: %s %v; want %s, %q", form, code(err), err, tt.code, tt.says)
				}
				if err != nil && len(err.Error()) > 1000 {
					t.Errorf("%s: an error of %d bytes", form, len(err.Error()))
				}
			}
			// A body that is refused is refused compressed too.
			if strings.HasPrefix(tt.says, "reading") || isCompressed(tt.body) {
				return
			}
			for form, body := range map[string]string{"gzip": gzipped(t, tt.body), "zstd": zstded(t, tt.body)} {
				if tt.body == "" && form == "zstd" {
					continue // nothing, compressed, is nothing
				}
				if _, _, err := receive(t, body, opts); code(err) != tt.code {
					t.Errorf("%s: %s %v; want %s", form, code(err), err, tt.code)
				}
			}
		})
	}
}

func isCompressed(body string) bool {
	return strings.HasPrefix(body, "\x1f\x8b") || strings.Contains(body[:min(4, len(body))], "\x2a\x4d\x18") || strings.HasPrefix(body, "\x28\xb5")
}

// A tar that is cut at the end of any block, or near it, is refused.
func TestCutShort(t *testing.T) {
	long := "context/" + strings.Repeat("d/", 60) + strings.Repeat("x", 90)
	body := archive(
		file("context/a", strings.Repeat("a", 1500)), hardlink("context/b", "context/a"), symlink("context/c", "a"),
		pax('g', "comment=x"), pax('x', "path="+long, "mtime=1.5"), file("x", "y"),
		special('L', long+"2\x00"), file("x", "y"), file(secretsName, strings.Repeat("s", 600)), file("beside", "x"),
	)
	opts := testOptions(t)
	mustReceive(t, body, opts)
	for block := 0; block <= len(body); block += 512 {
		for _, n := range []int{block - 1, block, block + 1} {
			if n < 0 || n >= len(body) {
				continue
			}
			for form, cut := range map[string]string{"tar": body[:n], "gzip": gzipped(t, body[:n]), "envelope": enveloped(body[:n])} {
				if _, _, err := receive(t, cut, opts); code(err) != api.BadTar {
					t.Errorf("%s cut at %d of %d: %v", form, n, len(body), err)
				}
			}
		}
	}
	for n, gz := 0, gzipped(t, body); n < len(gz); n++ {
		if _, _, err := receive(t, gz[:n], opts); code(err) != api.BadTar {
			t.Errorf("gzip cut at %d of %d: %v", n, len(gz), err)
		}
	}
	for n, zst := 0, zstded(t, body); n < len(zst); n++ {
		if _, _, err := receive(t, zst[:n], opts); code(err) != api.BadTar {
			t.Errorf("zstd cut at %d of %d: %v", n, len(zst), err)
		}
	}
}

// goTestdata are the bodies that the tests of Go's own archive/tar read, as far
// as their names match.
func goTestdata(t testing.TB, pattern string) map[string]string {
	//lint:ignore SA1019 these tests run on the machine that compiles them
	names, err := filepath.Glob(filepath.Join(runtime.GOROOT(), "src/archive/tar/testdata", pattern))
	if err != nil || len(names) == 0 {
		t.Fatalf("no testdata of archive/tar: %v", err)
	}
	bodies := map[string]string{}
	for _, name := range names {
		if testing.Short() && filepath.Ext(name) == ".bz2" {
			continue // the largest: they take the race detector as long as all others
		}
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		switch filepath.Ext(name) {
		case ".base64":
			data, err = base64.StdEncoding.DecodeString(string(data))
		case ".bz2":
			data, err = io.ReadAll(bzip2.NewReader(bytes.NewReader(data)))
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		bodies[filepath.Base(name)] = string(data)
	}
	return bodies
}

func TestGoTestdata(t *testing.T) {
	// These are accepted after a config and a context. A later Go may add others.
	accepted := []string{
		"gnu-long-nul.tar", "gnu-nil-sparse-data.tar", "gnu-nil-sparse-hole.tar", "gnu-not-utf8.tar", "gnu-utf8.tar", "gnu.tar", "hardlink.tar", "invalid-go17.tar",
		"pax-global-records.tar", "pax-nil-sparse-data.tar", "pax-nil-sparse-hole.tar", "pax-records.tar", "pax.tar", "sparse-formats.tar", "star.tar", "trailing-slash.tar", "ustar-file-devs.tar",
		"ustar.tar", "v7.tar", "writer.tar", "xattrs.tar",
	}
	refused := map[string]string{
		"gnu-incremental.tar":           "cut short",
		"gnu-multi-hdrs.tar":            "cut short",
		"gnu-sparse-big.tar.base64":     "max_unpacked_bytes",
		"gnu-sparse-many-zeros.tar.bz2": "sparse",
		"issue10968.tar":                "bad header",
		"issue11169.tar":                "bad header",
		"issue12435.tar":                "bad header",
		"neg-size.tar.base64":           "bad header",
		"nil-uid.tar":                   "cut short",
		"pax-bad-hdr-file.tar":          "bad header",
		"pax-bad-hdr-large.tar.bz2":     "over 1 MiB",
		"pax-bad-mtime-file.tar":        "bad header",
		"pax-multi-hdrs.tar":            "cut short",
		"pax-nul-path.tar":              "bad header",
		"pax-nul-xattrs.tar":            "bad header",
		"pax-path-hdr.tar":              "cut short",
		"pax-pos-size-file.tar":         "cut short",
		"pax-sparse-big.tar.base64":     "max_unpacked_bytes",
		"ustar-file-reg.tar":            "cut short",
	}
	for name, body := range goTestdata(t, "*.tar*") {
		t.Run(name, func(t *testing.T) {
			opts := testOptions(t)
			if _, _, err := receive(t, body, opts); err == nil {
				t.Error("accepted without a config")
			}
			_, _, err := receive(t, config+dir("context")+body, opts)
			switch {
			case slices.Contains(accepted, name):
				if err != nil {
					t.Error(err)
				}
			case refused[name] != "":
				if err == nil || !strings.Contains(err.Error(), refused[name]) {
					t.Errorf("got %v, want %q", err, refused[name])
				}
			default:
				t.Logf("%v", err)
			}
		})
	}
}

// repeated is a body that does not fit into memory: head, n times unit, and tail.
func repeated(head, unit string, n int, tail string) io.Reader {
	batch := max(1, 256<<10/len(unit))
	units := strings.Repeat(unit, batch)
	parts := []io.Reader{strings.NewReader(head)}
	for ; n >= batch; n -= batch {
		parts = append(parts, strings.NewReader(units))
	}
	return io.MultiReader(append(parts, strings.NewReader(strings.Repeat(unit, n)+tail))...)
}

// watchMemory watches the memory of the process. The function that it returns ends this, and
// returns the maximum in bytes.
func watchMemory() func() uint64 {
	samples := []metrics.Sample{
		{Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"},
	}
	var peak uint64
	stop := make(chan struct{})
	var work sync.WaitGroup
	look := func() {
		metrics.Read(samples)
		peak = max(peak, samples[0].Value.Uint64()-samples[1].Value.Uint64())
	}
	work.Go(func() {
		for {
			look()
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
		}
	})
	return func() uint64 {
		close(stop)
		work.Wait()
		look()
		return peak
	}
}

// manyEntries is a tar of n empty files in the context. Each has another name of name bytes, and
// another time.
type manyEntries struct {
	n, name int
	i       int
	rest    []byte
	block   []byte
}

func (m *manyEntries) Read(p []byte) (int, error) {
	for len(m.rest) == 0 {
		switch {
		case m.i == 0:
			m.rest = []byte(config + dir("context"))
			m.block = []byte(header{
				name: strings.Repeat("n", m.name-len("context/")-1),
				set:  map[int]string{345: "context"},
			}.String())
		case m.i <= m.n:
			// header is too slow for so many.
			b := m.block
			copy(b, fmt.Sprintf("%06d", m.i))
			copy(b[136:], octal(int64(m.i), 12))
			copy(b[148:156], "        ")
			sum := 0
			for _, c := range b {
				sum += int(c)
			}
			copy(b[148:], octal(int64(sum), 7))
			m.rest = b
		case m.i == m.n+1:
			m.rest = []byte(end)
		default:
			return 0, io.EOF
		}
		m.i++
	}
	n := copy(p, m.rest)
	m.rest = m.rest[n:]
	return n, nil
}
