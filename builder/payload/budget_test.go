package payload_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"

	"handler/function/api"
	"handler/function/budget"
	"handler/function/payload"
)

// skipper reads r without its first n bytes.
type skipper struct {
	r io.Reader
	n int64
}

func (s *skipper) Read(p []byte) (int, error) {
	if s.n > 0 {
		if _, err := io.CopyN(io.Discard, s.r, s.n); err != nil {
			return 0, err
		}
		s.n = 0
	}
	return s.r.Read(p)
}

// liveMemory returns the bytes of the heap that are in use after a collection.
func liveMemory() uint64 {
	debug.FreeOSMemory()
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestMemorySpent: without memory a body is still stored and hashed. It is indexed once there is
// memory again.
func TestMemorySpent(t *testing.T) {
	var files []string
	for i := range 2000 {
		files = append(files, file(fmt.Sprintf("context/d%d/file%d", i%7, i), strings.Repeat("x", i)))
	}
	plain := archive(files...)
	want := describe(t, mustReceive(t, plain, testOptions(t)).Context)
	for form, body := range map[string]string{"tar": plain, "gzip": gzipped(t, plain), "zstd": zstded(t, plain), "envelope": enveloped(plain)} {
		for _, limit := range []int64{0, 100 << 10, 600 << 10, 100 << 20} {
			memory, disk := budget.New(limit), budget.New(1<<30)
			unsigned := disk.Part(1 << 29)
			opts := testOptions(t)
			opts.Memory, opts.Disk = memory.Open(), unsigned.Open()
			var signed strings.Builder
			s, err := payload.Receive(strings.NewReader(body), &signed, opts)
			if err != nil {
				t.Fatal(err)
			}
			if form != "envelope" && signed.String() != body || form == "envelope" && signed.String() != plain {
				t.Errorf("%s, %d bytes: not all was hashed", form, limit)
			}
			if indexed, want := s.Index(), form == "tar" && limit == 100<<20; indexed != want {
				t.Errorf("%s, %d bytes: indexed is %v", form, limit, indexed)
			}
			if used := memory.Used(); used > limit {
				t.Errorf("%s: %d bytes of %d are used", form, used, limit)
			}
			// The signature has passed, and the build waits for a slot: there is no room.
			waiting := budget.New(10)
			s.Charge(waiting, disk)
			if memory.Used() != 0 || waiting.Used() > 10 || unsigned.Used() != 0 || disk.Used() < int64(len(body)) {
				t.Errorf("%s, %d bytes: %d, %d, %d and %d are used by what waits", form, limit, memory.Used(), waiting.Used(), unsigned.Used(), disk.Used())
			}
			if s.Index() {
				t.Errorf("%s, %d bytes: an index waits, without room", form, limit)
			}
			// The build has a slot.
			s.Charge(nil, disk)
			p, err := s.Payload()
			if err != nil {
				t.Fatalf("%s, %d bytes: %v", form, limit, err)
			}
			if got := describe(t, p.Context); strings.Join(got, "\n") != strings.Join(want, "\n") {
				t.Errorf("%s, %d bytes: not the same context", form, limit)
			}
			s.Close()
			if memory.Used() != 0 || waiting.Used() != 0 || disk.Used() != 0 {
				t.Errorf("%s, %d bytes: %d, %d and %d are left", form, limit, memory.Used(), waiting.Used(), disk.Used())
			}
		}
	}
}

// TestWaitsInMemory: a body that finds room keeps its index, and stays in memory.
func TestWaitsInMemory(t *testing.T) {
	waiting := budget.New(10 << 20)
	opts := testOptions(t)
	opts.Memory = budget.New(10 << 20).Open()
	body := archive(file("context/x", strings.Repeat("x", 1<<20)))
	s, err := payload.Receive(strings.NewReader(body), io.Discard, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.Charge(waiting, nil)
	if used := waiting.Used(); !s.Index() || used < int64(len(body)) || used > int64(len(body))+1<<20 {
		t.Errorf("%d bytes are used by a body of %d", used, len(body))
	}
}

// TestChargeWithoutRoom: a body that is too large for the disk that it is charged to stays
// where it is.
func TestChargeWithoutRoom(t *testing.T) {
	disk, memory := budget.New(10<<20), budget.New(10<<20)
	opts := testOptions(t)
	opts.InMemory, opts.Disk, opts.Memory = 0, disk.Part(5<<20).Open(), memory.Open()
	body := archive(file("context/x", strings.Repeat("x", 2<<20)))
	s, err := payload.Receive(strings.NewReader(body), io.Discard, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	index, small, large := memory.Used(), disk.Part(1<<20), disk.Part(3<<20)
	if s.Charge(nil, small) || small.Used() != 0 || disk.Used() < int64(len(body)) || memory.Used() != index {
		t.Errorf("%d of %d bytes are charged to a disk of 1 MiB", small.Used(), disk.Used())
	}
	if !s.Charge(nil, large) || large.Used() < int64(len(body)) || disk.Used() != large.Used() || memory.Used() != 0 {
		t.Errorf("%d bytes are charged to a disk of 3 MiB", large.Used())
	}
}

// TestDiskSpent: a body that finds no room on the disk is no_space once its signature has passed,
// and leaves nothing on the disk.
func TestDiskSpent(t *testing.T) {
	plain := archive(file("context/x", strings.Repeat("x", 5<<20)))
	for form, body := range map[string]string{"tar": plain, "gzip": gzipped(t, plain), "envelope": enveloped(plain), "envelope of gzip": enveloped(gzipped(t, plain))} {
		for _, inMemory := range []int64{0, 1 << 20} {
			disk := budget.New(2 << 20)
			opts := testOptions(t)
			opts.InMemory, opts.Disk = inMemory, disk.Part(1<<20).Open()
			var signed strings.Builder
			s, err := payload.Receive(strings.NewReader(body), &signed, opts)
			if err != nil {
				t.Fatal(err)
			}
			if disk.Used() > 1<<20 || signed.Len() < len(body)*2/3 {
				t.Errorf("%s: %d bytes on the disk, %d hashed", form, disk.Used(), signed.Len())
			}
			s.Charge(nil, disk)
			if _, err := s.Payload(); code(err) != api.NoSpace || !strings.Contains(err.Error(), "max_spool_bytes") {
				t.Errorf("%s: %v", form, err)
			}
			s.Close()
			if disk.Used() != 0 {
				t.Errorf("%s: %d bytes are left", form, disk.Used())
			}
			if left, err := os.ReadDir(opts.Dir); err != nil || len(left) > 0 {
				t.Errorf("%s: %v, %v", form, left, err)
			}
		}
	}
}

// TestIsBody: IsBody recognises the beginning of a body by 1 KiB.
func TestIsBody(t *testing.T) {
	body := archive(file("context/x", "x"))
	long := archive(pax('x', "path=context/"+strings.Repeat("long/", 100)), file("short", "far down"))
	for name, body := range map[string]string{"tar": body, "PAX": long[len(config):], "empty": end, "gzip": gzipped(t, body), "zstd": zstded(t, body), "envelope": enveloped(body)} {
		if !payload.IsBody([]byte(body[:min(len(body), 1024)])) {
			t.Errorf("%s is none", name)
		}
		if payload.IsBody([]byte("0" + body[:min(len(body), 1024)])) {
			t.Errorf("%s with a byte before it is one", name)
		}
	}
	for _, text := range []string{"", "GET /builds/x", "FROM scratch\n", strings.Repeat("x", 1024)} {
		if payload.IsBody([]byte(text)) {
			t.Errorf("%.20q is one", text)
		}
	}
}

// TestNoRoom: a head or a stream that finds no room on the disk waits for it. Nothing asks for
// room after the body has been received.
func TestNoRoom(t *testing.T) {
	body := archive(file("context/x", strings.Repeat("x", 3<<20)))
	for _, head := range []int64{100, 16 << 20} {
		disk := budget.New(5 << 20)
		other := disk.Open()
		other.Take(5 << 20)
		// The head of a stream has room.
		heads := disk
		if head == 100 {
			heads = budget.New(1 << 20)
		}
		opts := testOptions(t)
		opts.InMemory, opts.HeadSize = 0, head
		opts.HeadDisk, opts.Disk = heads.Open(), disk.Open()
		asked := 0
		opts.NoRoom = func() error {
			if asked++; asked == 3 {
				other.Close()
			}
			return nil
		}
		s, err := payload.Receive(strings.NewReader(body), io.Discard, opts)
		if err != nil {
			t.Fatal(err)
		}
		if p, err := s.Payload(); err != nil || p.Context.Find("x") == nil || asked != 3 {
			t.Errorf("heads of %d bytes: asked %d times, %v", head, asked, err)
		}
		s.Close()

		other.Take(4 << 20)
		opts = testOptions(t)
		opts.InMemory, opts.HeadSize = 0, head
		opts.HeadDisk, opts.Disk = heads.Open(), disk.Open()
		opts.NoRoom = func() error { return io.ErrNoProgress }
		if _, err := payload.Receive(strings.NewReader(body), io.Discard, opts); !errors.Is(err, io.ErrNoProgress) {
			t.Errorf("heads of %d bytes: %v", head, err)
		}
		if disk.Used() != 4<<20 {
			t.Errorf("heads of %d bytes: %d bytes are left", head, disk.Used())
		}
	}

	// A body that is as large as the room does not wait.
	whole := budget.New(int64(len(body)))
	opts := testOptions(t)
	opts.InMemory, opts.Disk = 0, whole.Open()
	opts.NoRoom = func() error { return io.ErrNoProgress }
	s, err := payload.Receive(strings.NewReader(body), io.Discard, opts)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Payload(); err != nil {
		t.Errorf("where there is just enough: %v", err)
	}
	s.Close()

	disk := budget.New(1 << 20)
	opts = testOptions(t)
	opts.HeadSize = 16 << 20
	opts.HeadMemory, opts.HeadDisk = budget.New(16<<20).Open(), disk.Open()
	opts.NoRoom = func() error {
		t.Error("asked for room when all was there")
		return io.ErrNoProgress
	}
	s, err = payload.Receive(strings.NewReader(body), io.Discard, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.Charge(budget.New(0), disk)
	if _, err := s.Payload(); api.AsError(err).Code != api.NoSpace {
		t.Errorf("where nothing is left: %v", err)
	}
}
