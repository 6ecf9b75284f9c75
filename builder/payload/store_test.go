package payload

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"

	"handler/function/api"
)

// /dev/full refuses every write, like a full file system.
func TestNoSpace(t *testing.T) {
	var plain, gz bytes.Buffer
	w := tar.NewWriter(&plain)
	for name, size := range map[string]int{api.ConfigFile: 2, api.ContextDir + "/x": 3 << 20} {
		w.WriteHeader(&tar.Header{Name: name, Size: int64(size), Mode: 0o644})
		w.Write(make([]byte, size))
	}
	w.Close()
	zw := gzip.NewWriter(&gz)
	zw.Write(plain.Bytes())
	zw.Close()
	opts := Options{Limits: Limits{Body: 1 << 30, Unpacked: 1 << 30, Config: 10, Names: 100, Entries: 10, Path: 100}}
	receive := func(body string, raw *store) (*Spool, string) {
		var signed bytes.Buffer
		s := &Spool{opts: opts, form: formOf([]byte(body)), raw: raw}
		if err := s.stream(strings.NewReader(body), &signed); err != nil {
			t.Fatal(err)
		}
		return s, signed.String()
	}
	for form, body := range map[string]string{
		"tar":      plain.String(),
		"gzip":     gz.String(),
		"envelope": `{"tar":"` + base64.StdEncoding.EncodeToString(plain.Bytes()) + `"}`,
	} {
		full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		s, signed := receive(body, &store{file: full})
		// The whole body is still read and hashed, because the signature comes first.
		if len(signed) < gz.Len() {
			t.Errorf("%s: not all was hashed", form)
		}
		if p, err := s.Payload(); p != nil || err == nil || api.AsError(err).Code != api.NoSpace {
			t.Errorf("%s: %v, %v", form, p, err)
		}
		if _, err := full.Write(nil); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: the file is still open: %v", form, err)
		}
		s.Close()

		// With room there is no error.
		s, _ = receive(body, &store{most: 1 << 30})
		if _, err := s.Payload(); err != nil {
			t.Errorf("%s: %v", form, err)
		}
		s.Close()
	}
}

func TestStoreErrors(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := &store{file: full}
	if _, err := s.Write(make([]byte, 100)); err != nil {
		t.Errorf("a small write: %v", err)
	}
	if err := s.finish(); api.AsError(err).Code != api.NoSpace || !strings.Contains(err.Error(), "the temporary directory is full") {
		t.Errorf("finish: %v", err)
	}
	if _, err := s.Write([]byte("x")); api.AsError(err).Code != api.NoSpace {
		t.Errorf("a write after it: %v", err)
	}
	s.Close()
	if _, err := s.ReadAt(make([]byte, 1), 0); err == nil {
		t.Error("reading after Close went well")
	}
}

// Pieces of many sizes are written: around the bound on memory, and around the size of a block.
func TestStorePieces(t *testing.T) {
	for _, memory := range []int64{0, 1, blockSize - 1, blockSize, blockSize + 1, 4 * blockSize} {
		for _, piece := range []int{1, 511, 512, blockSize - 1, blockSize, blockSize + 1, 5 * blockSize} {
			s := &store{dir: t.TempDir(), most: memory}
			var want []byte
			for i := 0; len(want) < 4*blockSize && i < 2000; i++ {
				p := bytes.Repeat([]byte{byte(i + 1)}, piece)
				want = append(want, p...)
				if _, err := s.Write(p); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.finish(); err != nil {
				t.Fatal(err)
			}
			if inFile := s.file != nil; inFile != (int64(len(want)) > memory) {
				t.Errorf("memory %d: %d bytes in a file: %v", memory, len(want), inFile)
			}
			got, err := io.ReadAll(io.NewSectionReader(s, 0, int64(len(want))+10))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("memory %d, pieces of %d: read %d bytes and %v, want %d", memory, piece, len(got), err, len(want))
			}
			off := int64(len(want)) - 700
			if got, err = io.ReadAll(io.NewSectionReader(s, max(off, 0), 300)); err != nil || !bytes.Equal(got, want[max(off, 0):][:min(300, len(want))]) {
				t.Errorf("memory %d, pieces of %d: read %d bytes and %v in the middle", memory, piece, len(got), err)
			}
			s.Close()
		}
	}
}

// A panic in a decompressor ends one upload, not the process.
func TestGuard(t *testing.T) {
	s := &Spool{raw: &store{most: 100}}
	s.hold(func() (*Payload, error) { panic("hostile") })
	p, err := s.Payload()
	if p != nil || api.AsError(err).Code != api.Internal || !strings.Contains(err.Error(), "hostile") {
		t.Errorf("got %v, %v", p, err)
	}
}
