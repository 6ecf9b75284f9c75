package server_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"

	"handler/function/api"
	"handler/function/server"
	"handler/function/signature"
)

// BenchmarkTenants compares builds of one of 1,000 tenants, named and by the config's image,
// with builds where there is one key. It reports medians: the time of a small body with one
// key, how much longer it takes with tenants, and ratios of the times of 200 MB.
func BenchmarkTenants(b *testing.B) {
	const size = 200_000_000
	small, plain := pack(b, imageOf("acme")), benchTar(b, size)
	var zipped bytes.Buffer
	w, err := gzip.NewWriterLevel(&zipped, gzip.BestSpeed)
	if err != nil {
		b.Fatal(err)
	}
	w.Write(plain)
	w.Close()

	limits := func(c *server.Config) {
		c.Limits.Body, c.Limits.Unpacked, c.Limits.Entries, c.Limits.Names = 512<<20, 1<<30, 1000, 1<<20
		c.SpoolMemory = 4 << 20
	}
	one := start(b, &scripted{}, limits)
	entries := many()
	for i := range 1000 - len(entries) {
		entries = append(entries, tenant(fmt.Sprintf("more%d", i), ""))
	}
	all, _ := startTenants(b, &scripted{}, entries, limits)
	measure := func(f *fixture, key string, body []byte, headers ...string) time.Duration {
		r := f.request(b, body, append([]string{api.SignatureHeader, signature.Sign([]byte(key), "", body)}, headers...)...)
		r.Body = io.NopCloser(bytes.NewReader(body))
		began := time.Now()
		if a := f.do(b, r); a.status != http.StatusOK {
			b.Fatalf("%d %s", a.status, a.body)
		}
		return time.Since(began)
	}
	for name, body := range map[string][]byte{"small": small, "tar": plain, "gzip": zipped.Bytes()} {
		b.Run(name, func(b *testing.B) {
			times := make([][]float64, 3)
			for b.Loop() {
				for i, took := range []time.Duration{
					measure(one, secret, body),
					measure(all, keyOf("acme"), body, api.TenantHeader, "acme"),
					measure(all, keyOf("acme"), body),
				} {
					times[i] = append(times[i], took.Seconds())
				}
			}
			median := func(i int) float64 {
				slices.Sort(times[i])
				return times[i][len(times[i])/2]
			}
			if name == "small" {
				b.ReportMetric(1000*median(0), "one-ms")
				b.ReportMetric(1000*(median(1)-median(0)), "named-more-ms")
				b.ReportMetric(1000*(median(2)-median(0)), "image-more-ms")
				return
			}
			b.ReportMetric(median(0), "one-s")
			b.ReportMetric(median(1)/median(0), "named/one")
			b.ReportMetric(median(2)/median(1), "image/named")
		})
	}
}

// benchTar has about size bytes in files of 1 MiB that compress to half. Its config comes last,
// as go-sdk writes it.
func benchTar(tb testing.TB, size int) []byte {
	tb.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	add := func(name string, data []byte) {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
			tb.Fatal(err)
		}
		w.Write(data)
	}
	src := rand.NewChaCha8([32]byte{})
	data := make([]byte, 1<<20)
	for i := 0; buf.Len() < size; i++ {
		src.Read(data)
		for j := range data {
			data[j] &= 0x0f
		}
		add(fmt.Sprintf("context/%d", i), data)
	}
	add(api.ConfigFile, []byte(imageOf("acme")))
	w.Close()
	return buf.Bytes()
}
