package payload_test

import (
	"archive/tar"
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"handler/function/payload"
)

// BenchmarkReceive is to be compared with its case hmac: no receiver of signed bodies can be
// faster.
func BenchmarkReceive(b *testing.B) {
	const size = 128 << 20
	plain := benchTar(size)
	var gz, zst bytes.Buffer
	gw := gzip.NewWriter(&gz)
	gw.Write(plain)
	gw.Close()
	zw, err := zstd.NewWriter(&zst)
	if err != nil {
		b.Fatal(err)
	}
	zw.Write(plain)
	zw.Close()
	text := []byte(`{"signature":"sha256=","tar":"` + base64.StdEncoding.EncodeToString(plain) + `"}`)

	b.Run("hmac", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			hmac.New(sha256.New, []byte("key")).Write(plain)
		}
	})
	receive := func(b *testing.B, body io.Reader) {
		opts := testOptions(b)
		opts.Limits.Body, opts.Limits.Unpacked = 4*size, 4*size
		s, err := payload.Receive(body, hmac.New(sha256.New, []byte("key")), opts)
		if err != nil {
			b.Error(err)
			return
		}
		defer s.Close()
		if _, err := s.Payload(); err != nil {
			b.Error(err)
		}
	}
	for _, form := range []struct {
		name string
		body []byte
	}{{"tar", plain}, {"gzip", gz.Bytes()}, {"zstd", zst.Bytes()}, {"envelope", text}} {
		b.Run(form.name, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				receive(b, bytes.NewReader(form.body))
			}
		})
	}
	b.Run("http", func(b *testing.B) {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			receive(b, r.Body)
		}))
		defer srv.Close()
		b.SetBytes(size)
		for b.Loop() {
			resp, err := http.Post(srv.URL, "application/octet-stream", bytes.NewReader(plain))
			if err != nil {
				b.Fatal(err)
			}
			resp.Body.Close()
		}
	})
}

// BenchmarkManyFiles measures the work after the last byte of a tar with many files: sorting
// them, and SetTimes.
func BenchmarkManyFiles(b *testing.B) {
	var took time.Duration
	for b.Loop() {
		body := &timedReader{r: &manyEntries{n: 199_000, name: 108}}
		s, err := payload.Receive(body, io.Discard, testOptions(b))
		if err != nil {
			b.Fatal(err)
		}
		p, err := s.Payload()
		if err != nil {
			b.Fatal(err)
		}
		p.Context.SetTimes(timeKey)
		took += time.Since(body.ended)
		s.Close()
	}
	b.ReportMetric(float64(took.Milliseconds())/float64(b.N), "ms-after-last-byte")
}

// timedReader notes when r ended.
type timedReader struct {
	r     io.Reader
	ended time.Time
}

func (t *timedReader) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if err == io.EOF {
		t.ended = time.Now()
	}
	return n, err
}

// benchTar has about size bytes, in files of 1 MiB that compress to half.
func benchTar(size int) []byte {
	var buf bytes.Buffer
	buf.Grow(size + size/8)
	w := tar.NewWriter(&buf)
	add := func(name string, data []byte) {
		w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))})
		w.Write(data)
	}
	add("com.openfaas.docker.config", []byte("{}"))
	src := rand.NewChaCha8([32]byte{})
	data := make([]byte, 1<<20)
	for i := 0; buf.Len() < size; i++ {
		src.Read(data)
		for j := range data {
			data[j] &= 0x0f
		}
		add("context/"+string(rune('a'+i%26))+"/"+string(rune('a'+i/26)), data)
	}
	w.Close()
	return buf.Bytes()
}
