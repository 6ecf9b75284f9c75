//go:build !race

// The tests here measure memory. Under the race detector, the process takes far more memory
// than the function does.

package payload_test

import (
	"encoding/base64"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"handler/function/api"
	"handler/function/budget"
	"handler/function/buildconfig"
	"handler/function/payload"
)

// TestMemory checks that no hostile body takes the process over 128 MiB, the memory of the test
// included.
func TestMemory(t *testing.T) {
	const ceiling = 128 << 20
	// The function is deployed with this limit. The collector keeps it as long as no body
	// has more memory in use.
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(96 << 20))

	// 8 MiB of zeros compress to a few KiB. 1,280 such members unpack to 10 GiB.
	zeros := gzipped(t, strings.Repeat("\x00", 8<<20))
	var manyKeys []string
	for i := range 80_000 {
		manyKeys = append(manyKeys, fmt.Sprintf("%d=", i))
	}
	keys := pax('x', manyKeys...)
	deep := strings.Repeat("d/", 2000)
	zstZeros := zstded(t, strings.Repeat("\x00", 8<<20))

	tests := []struct {
		name string
		body func() io.Reader
		code api.Code
		says string
	}{
		{"gzip bomb in an entry", func() io.Reader {
			return repeated(gzipped(t, config+dir("context")+header{name: "context/x", size: 63 << 20}.String()), zeros, 1280, "")
		}, api.TooLarge, "unpacked"},
		{"gzip bomb in the padding", func() io.Reader { return repeated(gzipped(t, archive()), zeros, 1280, "") }, api.TooLarge, "unpacked"},
		{"zstd bomb", func() io.Reader { return repeated(zstded(t, archive()), zstZeros, 1280, "") }, api.TooLarge, "unpacked"},
		{"gzip of empty members", func() io.Reader { return repeated(gzipped(t, archive()), gzipped(t, ""), 200_000, "") }, "", ""},
		{"zstd of skippable frames", func() io.Reader {
			return repeated(zstded(t, archive()), "\x50\x2a\x4d\x18\x00\x00\x00\x00", 1_000_000, "")
		}, "", ""},
		{"extended headers of many keys", func() io.Reader { return repeated(config+dir("context"), keys, 60, end) }, api.TooLarge, "extended headers"},
		{"global headers of many keys", func() io.Reader {
			return repeated(config+dir("context"), pax('g', manyKeys...), 60, end)
		}, api.TooLarge, "extended headers"},
		{"flood of global headers", func() io.Reader { return repeated(config+dir("context"), pax('g', "a=b"), 40_000, end) }, api.TooLarge, "extended headers"},
		{"long names of 1 MiB", func() io.Reader {
			return repeated(config+dir("context"), special('L', strings.Repeat("n", 1<<20)), 100, end)
		}, api.TooLarge, "extended headers"},
		{"deep directories left out", func() io.Reader {
			var parts []io.Reader
			for i := range 100 {
				parts = append(parts, strings.NewReader(special('L', fmt.Sprintf("context/%d/%sx\x00", i, deep))+file("x", "")))
			}
			return io.MultiReader(strings.NewReader(config), io.MultiReader(parts...), strings.NewReader(end))
		}, api.TooLarge, "all paths together"},
		{"200,000 entries", func() io.Reader { return &manyEntries{n: 200_000 - 2, name: 108} }, "", ""},
		{"envelope of 160 MiB", func() io.Reader {
			text := base64.StdEncoding.EncodeToString([]byte(archive(file("x", ""))[:1536]))
			zero := base64.StdEncoding.EncodeToString(make([]byte, 3<<10))
			return repeated(`{"tar":"`+text, zero, 40<<10, `"}`)
		}, api.TooLarge, "unpacked"},
		{"envelope of one long string", func() io.Reader {
			return repeated(`{"x":"`, strings.Repeat("x", 4<<10), 50<<10, `"}`)
		}, api.BadEnvelope, `no key "tar"`},
		{"envelope of one long key", func() io.Reader {
			return repeated(`{"`, strings.Repeat("x", 4<<10), 50<<10, `":1}`)
		}, api.BadEnvelope, "a string over"},
		{"envelope nested deep", func() io.Reader { return repeated(`{"x":`, "[", 50<<20, "") }, api.BadEnvelope, "nested"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			body := tt.body()
			opts := testOptions(t)
			opts.Limits.Unpacked = 104 << 20
			opts.Limits.Body = 1 << 30
			debug.FreeOSMemory()
			goroutines := runtime.NumGoroutine()
			peak := watchMemory()
			s, err := payload.Receive(body, io.Discard, opts)
			if err != nil {
				t.Fatal(err)
			}
			_, err = s.Payload()
			if got := peak(); got > ceiling {
				t.Errorf("%d MiB of memory", got>>20)
			}
			if code(err) != tt.code || !strings.Contains(fmt.Sprint(err), tt.says) {
				t.Errorf("%s %v; want %s, %q", code(err), err, tt.code, tt.says)
			}
			s.Close()
			checkNothingLeft(t, opts.Dir, goroutines)
		})
	}
}

// TestIndexMemory compares the memory that an index has taken with the runtime's number.
func TestIndexMemory(t *testing.T) {
	for _, name := range []int{20, 60, 108} {
		for _, n := range []int{1000, 30_000, 199_000} {
			memory := budget.New(1 << 40)
			opts := testOptions(t)
			opts.Memory = memory.Open()
			opts.InMemory = 0
			before := liveMemory()
			s, err := payload.Receive(&manyEntries{n: n, name: name}, io.Discard, opts)
			if err != nil {
				t.Fatal(err)
			}
			if !s.Index() {
				t.Fatal("not indexed")
			}
			said, is := float64(memory.Used()), float64(liveMemory()-before)
			if ratio := said / is; ratio < 0.9 || n > 1000 && ratio > 1.4 {
				t.Errorf("%d entries with names of %d bytes take %.1f MiB, and say %.1f", n, name, is/(1<<20), said/(1<<20))
			}
			runtime.KeepAlive(s)
			s.Close()
			if memory.Used() != 0 {
				t.Errorf("%d bytes are left", memory.Used())
			}
		}
	}
}

// TestIndexMemoryAgain: a replaced entry is not counted any more, and the pieces of a sparse
// file are counted.
func TestIndexMemoryAgain(t *testing.T) {
	var spans []int64
	for i := range int64(60_000) {
		spans = append(spans, 2*i, 1)
	}
	sparse := sparse01("context/s", 120_000, strings.Repeat("x", 60_000), spans...)
	for name, tt := range map[string]struct {
		body func() io.Reader
		most float64
	}{
		"everything twice": {func() io.Reader {
			var parts []io.Reader
			for range 2 {
				parts = append(parts, io.LimitReader(&manyEntries{n: 99_000, name: 60}, int64(len(config)+512*99_001)))
			}
			return io.MultiReader(parts[0], &skipper{r: parts[1], n: int64(len(config))}, strings.NewReader(end))
		}, 1.5},
		"sparse": {func() io.Reader {
			return strings.NewReader(archive(sparse, sparse01("context/r", 120_000, strings.Repeat("x", 60_000), spans...)))
		}, 1.6},
	} {
		memory := budget.New(1 << 40)
		opts := testOptions(t)
		opts.Memory, opts.InMemory = memory.Open(), 0
		before := liveMemory()
		s, err := payload.Receive(tt.body(), io.Discard, opts)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Payload(); err != nil {
			t.Fatal(err)
		}
		said, is := float64(memory.Used()), float64(liveMemory()-before)
		if ratio := said / is; ratio < 0.9 || ratio > tt.most {
			t.Errorf("%s takes %.1f MiB, and says %.1f", name, is/(1<<20), said/(1<<20))
		}
		runtime.KeepAlive(s)
		s.Close()
		if memory.Used() != 0 {
			t.Errorf("%s: %d bytes are left", name, memory.Used())
		}
	}
}

// TestSearchMemory compares the memory that a search takes of its budget with the runtime's
// number. It looks while the search has found the config, and has everything in use. Then it
// adds all that is allocated to find the image in the config.
func TestSearchMemory(t *testing.T) {
	wide := func(s string) string {
		var b strings.Builder
		w, err := zstd.NewWriter(&b, zstd.WithWindowSize(8<<20))
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, s)
		w.Close()
		return b.String()
	}
	beside := file("context/noise", noise(20<<20)) + special('L', strings.Repeat("n", 60<<10)+"\x00") + file("x", "")
	long := strings.Repeat("x", 1<<20-64)
	value := beside + file(configName, fmt.Sprintf(`{"x":%q,"image":"ghcr.io/acme/app"}`, long)) + end
	key := beside + file(configName, fmt.Sprintf(`{%q:"x","image":"ghcr.io/acme/app"}`, long)) + end
	image := beside + file(configName, fmt.Sprintf(`{"image":%q}`, long)) + end
	for form, body := range map[string]string{
		"tar": value, "gzip": gzipped(t, value), "zstd": wide(value), "envelope of zstd": enveloped(wide(value)),
		"tar with a long key": key, "tar with a long image": image,
		"tar that is no text": beside + file(configName, `{"`+strings.Repeat("\xff", 1<<20-64)+`":"x"}`) + end,
	} {
		memory := budget.New(1 << 40)
		opts := testOptions(t)
		opts.HeadMemory, opts.InMemory = memory.Open(), 0
		s, _ := head(t, body, opts)
		before, taken := liveMemory(), memory.Used()
		var is, said int64
		if err := s.FindConfig(t.Context(), func(config []byte) {
			is, said = int64(liveMemory()-before), memory.Used()-taken
			is += allocated(func() { buildconfig.Image(config) })
			runtime.KeepAlive(config)
		}); err != nil {
			t.Fatal(err)
		}
		if is > said || is < said/8 {
			t.Errorf("%s: a search takes %d KiB, and says %d", form, is>>10, said>>10)
		}
		t.Logf("%s: %d KiB, said %d", form, is>>10, said>>10)
		s.Close()
	}
}

// allocated returns how many bytes f allocates, those included that it does not keep.
func allocated(f func()) int64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return int64(after.TotalAlloc - before.TotalAlloc)
}
