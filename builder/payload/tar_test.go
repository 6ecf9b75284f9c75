package payload_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// The tars of these tests are put together from blocks, since archive/tar
// refuses to write most of what has to be tried.

const (
	configName  = "com.openfaas.docker.config"
	secretsName = "com.openfaas.secrets"
)

// header is one block of a tar. What is zero is filled in as tar would.
type header struct {
	name  string
	typ   byte // '0' if zero
	size  int64
	mode  int64 // 0644 if zero
	mtime int64
	link  string
	magic string // of ustar if empty

	// set overwrites fields, by offset, before the checksum is made.
	set map[int]string
	// sum is the checksum if not empty.
	sum string
}

func (h header) String() string {
	b := make([]byte, 512)
	if h.typ == 0 {
		h.typ = '0'
	}
	if h.mode == 0 {
		h.mode = 0o644
	}
	if h.magic == "" {
		h.magic = "ustar\x0000"
	}
	copy(b[0:100], h.name)
	copy(b[100:], octal(h.mode, 8))
	copy(b[108:], octal(0, 8))
	copy(b[116:], octal(0, 8))
	copy(b[124:], octal(h.size, 12))
	copy(b[136:], octal(h.mtime, 12))
	b[156] = h.typ
	copy(b[157:257], h.link)
	copy(b[257:], h.magic)
	for at, s := range h.set {
		copy(b[at:], s)
	}
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	if h.sum != "" {
		copy(b[148:156], h.sum)
	}
	return string(b)
}

func octal(n int64, width int) string { return fmt.Sprintf("%0*o\x00", width-1, n) }

func padded(data string) string {
	return data + strings.Repeat("\x00", -len(data)&511)
}

func file(name, data string) string {
	return header{name: name, size: int64(len(data))}.String() + padded(data)
}

func fileAt(name, data string, mtime int64) string {
	return header{name: name, size: int64(len(data)), mtime: mtime}.String() + padded(data)
}

func dir(name string) string { return header{name: name, typ: '5', mode: 0o755}.String() }

func symlink(name, target string) string {
	return header{name: name, typ: '2', link: target, mode: 0o777}.String()
}

func hardlink(name, target string) string {
	return header{name: name, typ: '1', link: target}.String()
}

// pax is an extended header of type 'x', or 'g' for the whole archive.
func pax(typ byte, records ...string) string {
	var b strings.Builder
	for _, r := range records {
		b.WriteString(paxRecord(r))
	}
	return special(typ, b.String())
}

func paxRecord(r string) string {
	n := len(r) + 2
	for len(fmt.Sprint(n))+len(r)+2 != n {
		n = len(fmt.Sprint(n)) + len(r) + 2
	}
	return fmt.Sprintf("%d %s\n", n, r)
}

func special(typ byte, data string) string {
	return header{name: "meta", typ: typ, size: int64(len(data))}.String() + padded(data)
}

var (
	config = file(configName, "{}")
	end    = strings.Repeat("\x00", 1024)
)

// archive is a tar that is accepted if parts are.
func archive(parts ...string) string {
	return config + dir("context/") + strings.Join(parts, "") + end
}

func gzipped(t testing.TB, s string) string {
	t.Helper()
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(s)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func zstded(t testing.TB, s string) string {
	t.Helper()
	return string(zstdEncoder().EncodeAll([]byte(s), nil))
}

// zstdEncoder is for all tests: it needs megabytes.
var zstdEncoder = sync.OnceValue(func() *zstd.Encoder {
	w, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(1<<20))
	if err != nil {
		panic(err)
	}
	return w
})

func enveloped(s string) string {
	return `{"signature":"sha256=00","tar":"` + base64.StdEncoding.EncodeToString([]byte(s)) + `"}`
}
