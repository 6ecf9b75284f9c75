package payload_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"

	"handler/function/budget"
	"handler/function/payload"
)

// head receives a body that is not indexed.
func head(t testing.TB, body string, opts payload.Options) (s *payload.Spool, signed string) {
	t.Helper()
	opts.HeadSize = int64(len(body))
	var w strings.Builder
	s, err := payload.Receive(strings.NewReader(body), &w, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, w.String()
}

// search returns what FindConfig finds, or "-" for nothing.
func search(ctx context.Context, s *payload.Spool) (string, error) {
	found := "-"
	err := s.FindConfig(ctx, func(config []byte) { found = string(config) })
	return found, err
}

// noise is incompressible.
func noise(n int) string {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{7}).Read(b)
	return string(b)
}

func TestFindConfig(t *testing.T) {
	named := func(name, content string) string { return file(name, content) }
	const name = "com.openfaas.docker.config"
	for _, tt := range []struct {
		name, body, want string
	}{
		{name: "first", body: named(name, `{"image":"a"}`) + dir("context") + file("context/x", "x") + end, want: `{"image":"a"}`},
		{name: "last", body: dir("context") + file("context/x", noise(200_000)) + named("./"+name, `{"image":"b"}`) + end, want: `{"image":"b"}`},
		{name: "after global headers", body: strings.Repeat(pax('g', "a=b"), 9) + named(name, `c`) + end, want: "c"},
		{name: "with a long name before it", body: special('L', "context/"+strings.Repeat("n", 4000)+"\x00") + file("x", "y") + named(name, `d`) + end, want: "d"},
		{name: "behind a sparse file", body: sparse10("context/s", 1<<40, "some data", 0, 4, 2000, 5) + sparseGNU("context/t", 1<<40, "x", 7, 1) + named(name, `e`) + end, want: "e"},
		{name: "sparse", body: sparse01(name, 6, "{}", 1, 2) + end, want: "\x00{}\x00\x00\x00"},
		{name: "empty", body: named(name, "") + end, want: ""},
		{name: "there twice", body: named(name, "1") + named(name, "2") + end, want: "1"},
		{name: "before what is no tar", body: named(name, "f") + noise(100_000), want: "f"},
		{name: "nowhere", body: dir("context") + file("context/x", "x") + end, want: "-"},
		{name: "in a cut tar", body: file("context/x", noise(3000)) + named(name, "i")[:512], want: "-"},
		{name: "a directory", body: dir(name) + named(name, "j") + end, want: "-"},
		{name: "over its limit", body: named(name, strings.Repeat("x", 1<<20+1)) + end, want: "-"},
		{name: "behind a long header", body: special('L', "context/"+strings.Repeat("n", 66<<10)+"\x00") + file("x", "") + named(name, "k") + end, want: "-"},
		{name: "outside", body: named("context/"+name, "l") + named("/"+name, "l") + named(name+"x", "l") + end, want: "-"},
		{name: "in nothing", body: "", want: "-"},
		{name: "in no tar", body: noise(5000), want: "-"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for form, body := range map[string]string{"tar": tt.body, "gzip": gzipped(t, tt.body), "zstd": zstded(t, tt.body), "envelope": enveloped(tt.body), "envelope of gzip": enveloped(gzipped(t, tt.body))} {
				memory, disk := budget.New(1<<40), budget.New(1<<40)
				opts := testOptions(t)
				opts.HeadMemory, opts.HeadDisk, opts.Gate = memory.Open(), disk.Open(), payload.NewGate(1)
				s, signed := head(t, body, opts)
				before, onDisk := memory.Used(), disk.Used()
				got, err := search(t.Context(), s)
				if got != tt.want || (err == nil) != (tt.want != "-") {
					t.Errorf("%s: found %.80q, %v; want %.80q", form, got, err, tt.want)
				}
				var again strings.Builder
				if err := s.WriteSigned(t.Context(), &again); err != nil || again.String() != signed {
					t.Errorf("%s: %d bytes are signed, and %d again, %v", form, len(signed), again.Len(), err)
				}
				if memory.Used() != before || disk.Used() != onDisk || len(opts.Gate) > 0 {
					t.Errorf("%s: left are %d bytes of memory, %d of the disk, %d in the gate", form, memory.Used()-before, disk.Used()-onDisk, len(opts.Gate))
				}
			}
		})
	}
}

// TestFindConfigBehindZeros: zeros compress to little, so that a search ends after 64 MiB of
// them. What did not compress is searched to its end.
func TestFindConfigBehindZeros(t *testing.T) {
	const piece = 8 << 20
	tests := []struct {
		pieces int
		pack   func(string) string
		noise  int // bytes before the zeros
		found  bool
	}{
		{7, func(s string) string { return gzipped(t, s) }, 0, true},
		{9, func(s string) string { return gzipped(t, s) }, 0, false},
		{9, func(s string) string { return gzipped(t, s) }, 2 << 20, true},
		{7, func(s string) string { return zstded(t, s) }, 0, true},
		{9, func(s string) string { return zstded(t, s) }, 0, false},
		{25, func(s string) string { return s }, 0, true},
	}
	for _, tt := range tests {
		zeros := tt.pack(strings.Repeat("\x00", piece))
		body := tt.pack(file("context/noise", noise(tt.noise))+header{name: "context/zeros", size: int64(tt.pieces * piece)}.String()) +
			strings.Repeat(zeros, tt.pieces) + tt.pack(config+end)
		opts := testOptions(t)
		opts.InMemory = 1 << 30
		disk := budget.New(1 << 40)
		opts.HeadDisk, opts.Disk = disk.Open(), disk.Open()
		s, _ := head(t, body, opts)
		if got, err := search(t.Context(), s); (got == "{}") != tt.found {
			t.Errorf("behind %d MiB in %d KiB: %q, %v", tt.pieces*piece>>20, len(body)>>10, got, err)
		}
		if disk.Used() > 0 {
			t.Errorf("%d bytes were written to the disk", disk.Used())
		}
		s.Close()
	}
}

// TestFindConfigInIndex: a body that has an index is not searched.
func TestFindConfigInIndex(t *testing.T) {
	opts := testOptions(t)
	opts.Gate = payload.NewGate(1)
	s, err := payload.Receive(strings.NewReader(archive(file("context/x", noise(200_000)))), io.Discard, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	opts.Gate <- struct{}{} // a search would wait
	if got, err := search(t.Context(), s); err != nil || !strings.Contains(got, "{") {
		t.Errorf("%q, %v", got, err)
	}
}

// TestFindConfigLimits: a search stays within the limits on the tar.
func TestFindConfigLimits(t *testing.T) {
	body := file("context/a", strings.Repeat("\x00", 100_000)) + file("context/b", "") + config + end
	opts := testOptions(t)
	for name, tt := range map[string]struct {
		body string
		set  func(*payload.Limits)
	}{
		"entries":  {body, func(l *payload.Limits) { l.Entries = 2 }},
		"unpacked": {gzipped(t, body), func(l *payload.Limits) { l.Unpacked = 100_000 }},
		"config":   {body, func(l *payload.Limits) { l.Config = 1 }},
	} {
		s, _ := head(t, tt.body, opts)
		if _, err := search(t.Context(), s); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		tight := opts
		tt.set(&tight.Limits)
		s, _ = head(t, tt.body, tight)
		if got, err := search(t.Context(), s); err == nil {
			t.Errorf("%s: found %q", name, got)
		}
	}
}

// TestSearchWaits: a search, and the reading for the signature, wait at the gate, and end with
// their context there.
func TestSearchWaits(t *testing.T) {
	for form, body := range map[string]string{"tar": archive(), "gzip": gzipped(t, archive()), "envelope": enveloped(archive())} {
		synctest.Test(t, func(t *testing.T) {
			opts := testOptions(t)
			opts.Gate = payload.NewGate(1)
			s, _ := head(t, body, opts)
			for name, work := range map[string]func(context.Context) error{
				"search": func(ctx context.Context) error { _, err := search(ctx, s); return err },
				"sign":   func(ctx context.Context) error { return s.WriteSigned(ctx, io.Discard) },
			} {
				opts.Gate <- struct{}{}
				done := make(chan error, 1)
				go func() { done <- work(t.Context()) }()
				synctest.Wait()
				if len(done) > 0 {
					t.Errorf("%s, %s: did not wait", form, name)
				}
				<-opts.Gate
				if err := <-done; err != nil {
					t.Errorf("%s, %s: %v", form, name, err)
				}
				gone := errors.New("gone")
				ctx, cancel := context.WithCancelCause(t.Context())
				cancel(gone)
				if err := work(ctx); !errors.Is(err, gone) && (form != "envelope" || err == nil) {
					t.Errorf("%s, %s: %v, not the cause", form, name, err)
				}
				if len(opts.Gate) > 0 {
					t.Errorf("%s, %s: left in the gate", form, name)
				}
			}
		})
	}
}

// TestSearchPanics: what makes a search panic does not end the process.
func TestSearchPanics(t *testing.T) {
	opts := testOptions(t)
	opts.Gate = payload.NewGate(1)
	s, _ := head(t, gzipped(t, archive()), opts)
	err := s.FindConfig(t.Context(), func([]byte) { panic("hostile") })
	if err == nil || !strings.Contains(err.Error(), "hostile") || len(opts.Gate) > 0 {
		t.Errorf("%v, %d in the gate", err, len(opts.Gate))
	}
}

// TestEnvelopeTenant: the tenant of an envelope is a string. Anything else is ignored, because
// the key had no meaning before there were tenants.
func TestEnvelopeTenant(t *testing.T) {
	for value, want := range map[string]string{
		`"acme"`: "acme", `"a\u0063me"`: "acme", `""`: "", `null`: "", `5`: "", `{"a":["b"]}`: "",
		`"` + strings.Repeat("x", 5000) + `"`: strings.Repeat("x", 1024),
	} {
		for _, format := range []string{`{"tenant":%s,"tar":%q}`, `{"tar":%[2]q,"signature":"x","tenant":%[1]s}`} {
			s, _ := head(t, fmt.Sprintf(format, value, ""), testOptions(t))
			if got := s.Tenant(); got != want {
				t.Errorf("%.40s: %.40q", value, got)
			}
		}
	}
}

// FuzzFindConfig compares the search with the index, for every body that has an index.
func FuzzFindConfig(f *testing.F) {
	opts := fuzzOptions(f)
	// The index takes longer headers once the signature has passed. A search never does.
	opts.Limits.Names = 1 << 15
	plain := archive(file("context/a/b", "data"), hardlink("context/0", "context/a/b"), file("beside", "x"))
	late := dir("context") + file("context/a", "data") + pax('g', "a=b") + config + end
	sparse := archive(sparse10("context/s", 3000, "some data", 0, 4, 2000, 5), sparseGNU("context/t", 10, "", 10, 0)) + end
	for _, body := range []string{plain, late, sparse, sparse01("com.openfaas.docker.config", 6, "{}", 1, 2) + end} {
		for _, body := range []string{body, gzipped(f, body), zstded(f, body), enveloped(body)} {
			f.Add([]byte(body))
		}
	}
	for _, h := range hostileBodies(f) {
		if len(h.body) < 8<<10 {
			f.Add([]byte(h.body))
		}
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		opts := opts
		opts.HeadSize = int64(len(body))
		var signed, again bytes.Buffer
		s, err := payload.Receive(bytes.NewReader(body), &signed, opts)
		if err != nil {
			return
		}
		defer s.Close()
		found, failed := search(t.Context(), s)
		if (failed == nil) != (found != "-") && found != "-" {
			t.Errorf("found %q beside the error %v", found, failed)
		}
		writeErr := s.WriteSigned(t.Context(), &again)
		p, err := s.Payload()
		if err != nil {
			return
		}
		if failed != nil || found != string(p.Config) {
			t.Errorf("found %q, %v; the index has %q", found, failed, p.Config)
		}
		if writeErr != nil || !bytes.Equal(signed.Bytes(), again.Bytes()) {
			t.Errorf("%d bytes are signed, and %d again, %v", signed.Len(), again.Len(), writeErr)
		}
	})
}
