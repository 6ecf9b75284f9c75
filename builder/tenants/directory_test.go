package tenants

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
)

// file is a file of one tenant.
func file(name string, more string) string {
	return fmt.Sprintf("version: 1\ntenants:\n  %s: {id: t-%s, keys: [{id: k, secret: the-only-key-of-%s}], images: [ghcr.io/%s]%s}\n", name, name, name, name, more)
}

// world is a directory of secrets with a Directory.
type world struct {
	t      *testing.T
	dir    string
	secret string
	asked  int
	log    strings.Builder
	*Directory
}

func newWorld(t *testing.T, needed bool, files ...string) *world {
	w := &world{t: t, dir: t.TempDir(), secret: "the root of all salts"}
	for i := 0; i < len(files); i += 2 {
		w.write(files[i], files[i+1])
	}
	w.open(needed, "tenants")
	return w
}

func (w *world) open(needed bool, names ...string) {
	cfg := Config{
		Needed:        needed,
		PayloadSecret: func() ([]byte, error) { w.asked++; return []byte(w.secret), nil },
		Log:           zerolog.New(&w.log),
	}
	for _, name := range names {
		cfg.Files = append(cfg.Files, filepath.Join(w.dir, name))
	}
	w.Directory = Open(cfg)
}

// write puts a file in the place of another, at once.
func (w *world) write(name, text string) {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		w.t.Fatal(err)
	}
}

// is wants the tenants that are in force after two looks: their names, "one" where there is no
// file, or "nobody".
func (w *world) is(want string, stale bool) {
	w.t.Helper()
	w.look()
	w.look()
	got := "one"
	s, err := w.Current()
	var refused *api.Error
	switch {
	case errors.As(err, &refused) && refused.Code == api.NotReady && s == nil:
		got = "nobody"
	case err != nil:
		w.t.Errorf("%v, %v", s, err)
	case s != nil:
		var names []string
		for _, t := range s.Tenants {
			names = append(names, t.Name)
		}
		got = strings.Join(names, " ")
	}
	if got != want || w.Stale() != stale {
		w.t.Errorf("in force is %q, stale %v, want %q, %v; log:\n%s", got, w.Stale(), want, stale, &w.log)
	}
}

// logs wants a number of lines in the log with a text.
func (w *world) logs(text string, want int) {
	w.t.Helper()
	if got := strings.Count(w.log.String(), text); got != want {
		w.t.Errorf("%q is in the log %d times, want %d:\n%s", text, got, want, &w.log)
	}
}

func TestNoFile(t *testing.T) {
	w := newWorld(t, false)
	w.is("one", false)
	if w.log.Len() > 0 {
		t.Errorf("logged %s", &w.log)
	}
	w.write("tenants", file("acme", ""))
	w.is("acme", false)
	if err := os.Remove(filepath.Join(w.dir, "tenants")); err != nil {
		t.Fatal(err)
	}
	w.is("acme", true)
	w.logs("tenants: there is no such file", 1)
	w.write("tenants", file("acme", ""))
	w.is("acme", false)
}

func TestNoGoodFileYet(t *testing.T) {
	w := newWorld(t, true)
	w.is("nobody", true)
	w.logs("nobody can build", 1)
	w.write("tenants", "version: 1\n")
	w.is("nobody", true)
	w.write("tenants", file("acme", ""))
	w.is("acme", false)

	w = newWorld(t, false, "tenants", "half")
	w.is("nobody", true)

	// The first file is wrong: the one tenant stays in force.
	w = newWorld(t, false)
	w.write("tenants", "half")
	w.is("one", true)
	w.logs("what was in force before stays", 1)
	if err := os.Remove(filepath.Join(w.dir, "tenants")); err != nil {
		t.Fatal(err)
	}
	w.is("one", true)
	w.write("tenants", file("acme", ""))
	w.is("acme", false)
}

func TestReload(t *testing.T) {
	w := newWorld(t, false, "tenants", file("acme", ""))
	var before, after []string
	names := func(list *[]string) func(*Set) {
		return func(s *Set) {
			current, _ := w.Current()
			*list = append(*list, fmt.Sprintf("%s current %v", s.Tenants[0].Name, s == current))
		}
	}
	w.BeforeChange(names(&before))
	w.OnChange(names(&after))
	w.is("acme", false)
	first, _ := w.Current()

	w.write("tenants", file("globex", ""))
	w.is("globex", false)
	if first.Tenants[0].Name != "acme" {
		t.Error("a Set has changed")
	}

	// Each problem is in the log once, until the files have been right.
	wrong := file("globex", ", builds: -1, weight: 0")
	for range 2 {
		w.write("tenants", wrong)
		w.is("globex", true)
		w.write("tenants", wrong+"# again\n")
		w.is("globex", true)
	}
	w.logs("tenants.globex.builds", 1)
	w.logs("tenants.globex.weight", 1)
	w.write("tenants", file("acme", ""))
	w.is("acme", false)
	w.write("tenants", wrong)
	w.is("acme", true)
	w.logs("tenants.globex.builds", 2)
	w.logs("only-key", 0)

	if want := []string{"acme current true", "globex current false", "acme current false"}; !slices.Equal(before, want) {
		t.Errorf("before changes: %q, want %q", before, want)
	}
	if want := []string{"acme current true", "globex current true", "acme current true"}; !slices.Equal(after, want) {
		t.Errorf("after changes: %q, want %q", after, want)
	}
}

// TestHalfWritten writes a file bit by bit, in place. At one look it ends after the first
// tenant, and nothing is wrong with it then.
func TestHalfWritten(t *testing.T) {
	w := newWorld(t, false, "tenants", file("acme", ""))
	whole := file("globex", "") + "  initech: {id: t-3, keys: [{id: k, secret: initech's only key}], images: [ghcr.io/initech]}\n"
	f, err := os.OpenFile(filepath.Join(w.dir, "tenants"), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at := 0; at < len(whole); at += 20 {
		if at == 40 {
			at = len(file("globex", ""))
			if _, err := f.WriteString(whole[40:at]); err != nil {
				t.Fatal(err)
			}
			w.look()
		}
		if _, err := f.WriteString(whole[at:min(at+20, len(whole))]); err != nil {
			t.Fatal(err)
		}
		w.look()
		if s, err := w.Current(); err != nil || len(s.Tenants) != 1 || s.Tenants[0].Name != "acme" {
			t.Fatalf("%d bytes were taken: %+v, %v", at+20, s, err)
		}
	}
	w.is("globex initech", false)
	w.logs(`"error"`, 0)
}

// TestSymlinkSwap changes the file as Kubernetes does: its name is a link through a link to a
// directory, and that link is replaced.
func TestSymlinkSwap(t *testing.T) {
	w := &world{t: t, dir: t.TempDir(), secret: "the root of all salts"}
	swap := func(dir, text string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(w.dir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
		w.write(dir+"/tenants", text)
		// The same time and size: only the file is another.
		if err := os.Chtimes(filepath.Join(w.dir, dir, "tenants"), time.Unix(1, 0), time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(dir, filepath.Join(w.dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(w.dir, "..data_tmp"), filepath.Join(w.dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	swap("..1", file("acme", ""))
	if err := os.Symlink("..data/tenants", filepath.Join(w.dir, "tenants")); err != nil {
		t.Fatal(err)
	}
	w.open(false, "tenants")
	w.is("acme", false)
	swap("..2", file("bcme", ""))
	w.is("bcme", false)
}

// TestLooksAreCheap: a file that has not changed is not read again, unless it is so new that
// its time could be that of two changes.
func TestLooksAreCheap(t *testing.T) {
	w := newWorld(t, false, "tenants", file("acme", ""))
	path := filepath.Join(w.dir, "tenants")
	reads := func(want bool) {
		t.Helper()
		w.asked = 0
		w.look()
		if got := w.asked > 1; got != want {
			t.Errorf("read: %v, want %v", got, want)
		}
	}
	reads(true)
	if err := os.Chtimes(path, time.Unix(1, 0), time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	reads(true)
	reads(false)
	w.secret = "another root of salts"
	reads(true)
	reads(true) // it is judged when it has been found twice
	reads(false)
	if err := os.Chtimes(path, time.Unix(2, 0), time.Unix(2, 0)); err != nil {
		t.Fatal(err)
	}
	reads(true)
	reads(false)
	if err := os.WriteFile(path, []byte(file("bcme", "")), 0); err != nil {
		t.Fatal(err)
	}
	reads(true)
	reads(true)
	w.is("bcme", false)
}

func TestPayloadSecret(t *testing.T) {
	w := newWorld(t, false, "tenants", file("acme", ""))
	w.secret = "the-only-key-of-acme\nthe-old-root-of-salts\n"
	w.is("acme", true)
	w.logs("it is the first line of the payload secret", 1)
	w.secret = "the-new-root-of-salts\nthe-only-key-of-acme\n"
	w.is("acme", false)
	w.cfg.PayloadSecret = func() ([]byte, error) { return nil, errors.New("no such secret") }
	w.is("acme", true)
	w.logs("no such secret", 1)
}

func TestSeveralFiles(t *testing.T) {
	w := newWorld(t, false, "a", file("acme", ""), "b", file("globex", ""))
	w.open(true, "a", "b")
	w.is("acme globex", false)
	if err := os.Remove(filepath.Join(w.dir, "b")); err != nil {
		t.Fatal(err)
	}
	w.is("acme globex", true)
	w.logs("b: there is no such file", 1)
	w.write("b", file("initech", ""))
	w.is("acme initech", false)
}

func TestLargeFile(t *testing.T) {
	w := newWorld(t, false, "tenants", file("acme", ""))
	path := filepath.Join(w.dir, "tenants")
	if err := os.Truncate(path, 64<<20); err != nil {
		t.Fatal(err)
	}
	w.is("acme", true)
	w.logs("over 8388608 bytes", 1)
	if data, err := readFile(path); err != nil || len(data) != maxFile+1 {
		t.Errorf("%d bytes were read, %v", len(data), err)
	}
}

// TestRevocation wants a change to count within 2 s. BenchmarkRead has the time that more
// tenants add.
func TestRevocation(t *testing.T) {
	w := newWorld(t, true)
	w.write("tenants", string(many(20)))
	w.open(true, "tenants")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { w.Run(ctx); close(ended) }()
	defer func() { cancel(); <-ended }()
	var changed atomic.Int64
	w.OnChange(func(*Set) { changed.Add(1) })
	w.write("tenants", string(many(19)))
	began := time.Now()
	for changed.Load() < 2 {
		if time.Since(began) > 10*time.Second {
			t.Fatal("a change is not noticed")
		}
		time.Sleep(5 * time.Millisecond)
	}
	took := time.Since(began)
	if s, err := w.Current(); err != nil || owner(s.Named("tenant-0019")) != "" || owner(s.Named("tenant-0018")) == "" {
		t.Errorf("the tenant is there: %v", err)
	}
	// A busy machine may take any time. What the Directory adds to it is two looks, and a
	// third if the change came while the first one read.
	if 3*poll > 2*time.Second {
		t.Errorf("a look every %v: a change cannot count within 2 s", poll)
	}
	t.Logf("a change counted after %v", took)
}
