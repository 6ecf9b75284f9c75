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

// The tars of these tests are made of blocks, because archive/tar refuses to write most of
// them.

const (
	configName  = "com.openfaas.docker.config"
	secretsName = "com.openfaas.secrets"
)

// header is one block of a tar. A zero field gets the value that tar would write.
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

// sparse01 is a sparse file in GNU's PAX format 0.1: spans are offsets and sizes of
// its data in turn.
func sparse01(name string, size int64, data string, spans ...int64) string {
	return pax('x', "GNU.sparse.major=0", "GNU.sparse.minor=1", fmt.Sprint("GNU.sparse.size=", size),
		fmt.Sprint("GNU.sparse.numblocks=", len(spans)/2), "GNU.sparse.map="+joined(spans, ","), "GNU.sparse.name="+name) + file("f", data)
}

// sparse00 is the same in format 0.0, whose map is a record for each number.
func sparse00(name string, size int64, data string, spans ...int64) string {
	records := []string{"path=" + name, fmt.Sprint("GNU.sparse.size=", size), fmt.Sprint("GNU.sparse.numblocks=", len(spans)/2)}
	for i := 0; i < len(spans); i += 2 {
		records = append(records, fmt.Sprint("GNU.sparse.offset=", spans[i]), fmt.Sprint("GNU.sparse.numbytes=", spans[i+1]))
	}
	return pax('x', records...) + file("f", data)
}

// sparse10 is the same in format 1.0, whose map is before the data.
func sparse10(name string, size int64, data string, spans ...int64) string {
	return pax('x', "GNU.sparse.major=1", "GNU.sparse.minor=0", fmt.Sprint("GNU.sparse.realsize=", size), "GNU.sparse.name="+name) +
		file("f", padded(fmt.Sprintf("%d\n%s\n", len(spans)/2, joined(spans, "\n")))+data)
}

// sparseGNU is the same in GNU's old format, whose map is in the header and in blocks
// after it.
func sparseGNU(name string, size int64, data string, spans ...int64) string {
	numbers := func(spans []int64) string {
		var b strings.Builder
		for _, n := range spans {
			b.WriteString(octal(n, 12))
		}
		return b.String()
	}
	inHeader := min(len(spans), 8)
	h := header{name: name, typ: 'S', size: int64(len(data)), magic: "ustar  \x00", set: map[int]string{386: numbers(spans[:inHeader]), 483: octal(size, 12)}}
	rest := spans[inHeader:]
	if len(rest) > 0 {
		h.set[482] = "\x01"
	}
	var more strings.Builder
	for len(rest) > 0 {
		n := min(len(rest), 42)
		b := []byte(padded(numbers(rest[:n])))
		if rest = rest[n:]; len(rest) > 0 {
			b[504] = 1
		}
		more.Write(b)
	}
	return h.String() + more.String() + padded(data)
}

func joined(numbers []int64, by string) string {
	s := make([]string, len(numbers))
	for i, n := range numbers {
		s[i] = fmt.Sprint(n)
	}
	return strings.Join(s, by)
}

var (
	config = file(configName, "{}")
	end    = strings.Repeat("\x00", 1024)
)

// archive is a complete tar with parts in it. It is accepted if parts are.
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

// zstdEncoder is shared by all tests, because each encoder needs megabytes.
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

// zstdForms packs s with and without a checksum, in one piece, as a stream and in many
// frames, at both ends of the encoder's levels. All of it ends with a frame of one byte
// that is repeated.
func zstdForms(t testing.TB, s string) []string {
	t.Helper()
	var forms []string
	for _, level := range []zstd.EncoderLevel{zstd.SpeedFastest, zstd.SpeedBetterCompression} {
		for _, crc := range []bool{true, false} {
			var b bytes.Buffer
			w, err := zstd.NewWriter(&b, zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(1<<16), zstd.WithEncoderLevel(level), zstd.WithEncoderCRC(crc))
			if err != nil {
				t.Fatal(err)
			}
			forms = append(forms, string(w.EncodeAll([]byte(s), nil)))
			for _, p := range []string{s[:len(s)/2], s[len(s)/2:]} {
				if _, err := w.Write([]byte(p)); err != nil {
					t.Fatal(err)
				}
				w.Flush()
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			forms = append(forms, b.String())
			var pieces []byte
			for rest := s; rest != ""; {
				n := min(len(rest), 1+len(pieces)/10)
				pieces = w.EncodeAll([]byte(rest[:n]), pieces)
				rest = rest[n:]
			}
			forms = append(forms, string(pieces))
		}
	}
	// 100 zeros: a single segment, its size in one byte, and one block.
	for i := range forms {
		forms[i] += "\x28\xb5\x2f\xfd\x20\x64\x23\x03\x00\x00"
	}
	return forms
}
