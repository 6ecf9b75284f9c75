package content_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// extract unpacks a tar with GNU tar and returns where the context is. GNU tar drops
// what is in a directory that a file replaces only where options say so, and then also
// what is in one that comes again.
func extract(t *testing.T, body string, options ...string) string {
	t.Helper()
	parent := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "tar", append(options, "-C", parent, "-xpf", "-")...)
	cmd.Stdin = strings.NewReader(body)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("extracting: %v\n%s", err, out)
	}
	return filepath.Join(parent, "context")
}

// buildctl builds a directory without a cache, compressed as the function does, and pushes
// it to ref.
func buildctl(t *testing.T, ctx context.Context, s *stack.Stack, dir, ref string) {
	t.Helper()
	// The daemon takes a file that it has from another build for the same as one of the
	// same time.
	if out, err := s.Buildkitd.Buildctl(ctx, "prune", "--filter=type==source.local").CombinedOutput(); err != nil {
		t.Fatalf("pruning: %v\n%s", err, out)
	}
	out, err := s.Buildkitd.Buildctl(ctx, "build", "--no-cache", "--frontend=dockerfile.v0",
		"--local=context="+dir, "--local=dockerfile="+dir, "--output=type=image,push=true,compression=gzip,compression-level=1,name="+ref).CombinedOutput()
	if err != nil {
		t.Fatalf("building with buildctl: %v\n%s", err, out)
	}
}

// fileAt is a file of a time of its own.
func fileAt(name, text string, time int64) string {
	return block(name, '0', int64(len(text)), map[int]string{136: fmt.Sprintf("%011o\x00", time)}) + data(text)
}

func dirMode(name, mode string) string {
	return block(name, '5', 0, map[int]string{100: mode + "\x00"})
}

// TestExtracted builds archives as programs and people write them, and with buildctl
// what GNU tar extracts from them: the images have the same layers.
func TestExtracted(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	head := dirMode("context/", "0000755") + file("context/Dockerfile", "FROM scratch\nCOPY . /\n")
	twice := file("context/app.py", "print('once')\n") + dirMode("context/d/", "0000755") + file("context/d/f", "1")
	for i, tt := range []struct{ name, body string }{
		{"everything twice", head + twice + head + twice},
		{"the context twice", dir("./") + dirMode("./context/", "0000755") + dir("./") + head},
		{"the last of several", head + fileAt("context/f", "old", 1000) + fileAt("context/f", "newer", 2000)},
		{"a directory that keeps its files", head + dirMode("context/d", "0000755") + file("context/d/f", "1") + dirMode("context/d/", "0000700")},
		{"a file over a directory", head + dirMode("context/d", "0000755") + dirMode("context/d/e", "0000755") + file("context/d/e/f", "1") + file("context/d", "2")},
		{"a directory over a file", head + file("context/d", "1") + dirMode("context/d", "0000755") + file("context/d/f", "2")},
		{"a symlink over a directory", head + dirMode("context/d", "0000755") + file("context/d/f", "1") + symlink("context/d", "Dockerfile")},
		{"a hard link keeps what it linked to", head + file("context/a", "old") + hardlink("context/l", "context/a") + file("context/a", "new")},
		{"a hard link over a file", head + file("context/a", "1") + file("context/b", "2") + hardlink("context/a", "context/b")},
		{"a hard link to a symlink", head + symlink("context/s", "Dockerfile") + hardlink("context/l", "context/s")},
		{"files below a symlink", head + dirMode("context/usr", "0000755") + dirMode("context/usr/lib", "0000755") + symlink("context/lib", "usr/lib") + file("context/lib/f", "1") + hardlink("context/h", "context/lib/f") + dirMode("context/usr/lib", "0000755")},
		{"backslashes", head + file(`context/a\b`, "1") + file(`context/..\..\c`, "2") + symlink("context/l", `a\b`) + dirMode(`context/C:\`, "0000755")},
		{"contiguous files", head + block("context/f", '7', 1, nil) + data("c")},
		{"odd entries that are left out", head + file("context/.dockerignore", "run\nfixtures/caf*\nodd*\n") + dirMode("context/run", "0000755") + block("context/run/agent", '6', 0, nil) +
			dirMode("context/fixtures", "0000755") + file("context/fixtures/caf\xe9.txt", "x") + file("context/fixtures/plain", "x") + symlink("context/odd-link", "caf\xe9")},
		{"an odd entry that the Dockerfile's own file leaves out", head + file("context/Dockerfile.dockerignore", "run\n") + file("context/.dockerignore", "Dockerfile*\n") + dirMode("context/run", "0000755") + block("context/run/agent", '6', 0, nil)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := s.Registry.Image(fmt.Sprintf("extracted%d:buildctl", i))
			var options []string
			if strings.HasSuffix(tt.name, "over a directory") {
				options = append(options, "--recursive-unlink")
			}
			buildctl(t, ctx, s, extract(t, tt.body+tarEnd, options...), want)
			theirs := stack.MustPull(t, ctx, want)
			text, err := json.Marshal(config{"image": s.Registry.Image(fmt.Sprintf("extracted%d:function", i)), "noCache": true})
			if err != nil {
				t.Fatal(err)
			}
			body := file("com.openfaas.docker.config", string(text)) + tt.body + tarEnd
			for _, body := range []string{body, gzipped(body)} {
				built := f.MustBuild(t, ctx, []byte(body))
				if len(built.Warnings) > 0 {
					t.Errorf("warnings: %q", built.Warnings)
				}
				ours, err := pull(ctx, built)
				if err != nil {
					t.Fatal(err)
				}
				compareLayers(t, tt.name, ours, theirs)
			}
		})
	}
}

// TestSparse builds a directory of sparse files with buildctl and, packed by GNU tar in
// each of its forms, with the function.
func TestSparse(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	parent := t.TempDir()
	dir := filepath.Join(parent, "context")
	if err := stack.WriteContext(parent, map[string]string{"context/Dockerfile": "FROM scratch\nCOPY . /\n", "context/plain": "plain"}); err != nil {
		t.Fatal(err)
	}
	for name, at := range map[string][]int64{
		"first": {10 << 20}, "both": {0, 20 << 20}, "hole": nil,
		"many": {4096, 1 << 20, 2 << 20, 3 << 20, 4 << 20, 5 << 20, 6 << 20, 7 << 20, 8 << 20, 9 << 20},
	} {
		file, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		for _, off := range at {
			if _, err := file.WriteAt([]byte(strings.Repeat(name, 1000)), off); err != nil {
				t.Fatal(err)
			}
		}
		if err := file.Truncate(30 << 20); err != nil {
			t.Fatal(err)
		}
		file.Close()
	}
	want := s.Registry.Image("sparse:buildctl")
	buildctl(t, ctx, s, dir, want)
	theirs := stack.MustPull(t, ctx, want)
	text, err := json.Marshal(config{"image": s.Registry.Image("sparse:function"), "noCache": true})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(parent, "com.openfaas.docker.config"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, form := range [][]string{{"--format=gnu"}, {"--format=posix", "--sparse-version=0.0"}, {"--format=posix", "--sparse-version=0.1"}, {"--format=posix", "--sparse-version=1.0"}} {
		body, err := exec.CommandContext(ctx, "tar", append(form, "-C", parent, "--sparse", "--hole-detection=raw", "-cf", "-", ".")...).Output()
		if err != nil || len(body) > 5<<20 {
			t.Fatalf("%v: a tar of %d bytes, %v", form, len(body), err)
		}
		ours, err := pull(ctx, f.MustBuild(t, ctx, body))
		if err != nil {
			t.Fatal(err)
		}
		compareLayers(t, strings.Join(form, " "), ours, theirs)
	}
}

// TestNotKept builds what an archive says and BuildKit has no place for.
func TestNotKept(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	text := fmt.Sprintf(`{"image":%q}`, s.Registry.Image("not-kept:latest"))
	head := file("com.openfaas.docker.config", text) + dir("context/") + file("context/Dockerfile", "FROM scratch\nCOPY f* /\n")
	capability := extended('x', record("SCHILY.xattr.security.capability", "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	for name, tt := range map[string]struct {
		body     string
		warnings []string
		check    func(files map[string]*stack.File) bool
	}{
		"attributes": {
			head + capability + file("context/f", "1") + extended('x', record("SCHILY.xattr.user.note", "x")) + file("context/f2", "2"),
			[]string{`extended attributes left out, of 2 entries; without their capabilities are: "f"`},
			func(files map[string]*stack.File) bool { return string(files["f"].Content) == "1" },
		},
		"times": {
			head + block("context/f-far", '0', 0, map[int]string{136: "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff"}) + extended('x', record("mtime", "-99999999999")) + file("context/f-old", "x"),
			nil,
			func(files map[string]*stack.File) bool {
				return files["f-far"].ModTime.Year() == 2262 && files["f-old"].ModTime.Year() < 1970
			},
		},
		"beside the context": {
			head + file("context/f", "1") + block("fifo", '6', 0, nil) + file("caf\xe9", "") + block("disk", '4', 0, nil) + block("label", 'V', 0, nil) + file(`a\b`, "") + file(`a\b`, ""),
			[]string{`6 entries of the tar beside context/ ignored: "fifo", "caf\xe9", "disk", …`},
			func(files map[string]*stack.File) bool { return len(files) == 1 },
		},
	} {
		t.Run(name, func(t *testing.T) {
			built := f.MustBuild(t, ctx, []byte(tt.body+tarEnd))
			if !slices.Equal(built.Warnings, tt.warnings) {
				t.Errorf("warnings %q, want %q", built.Warnings, tt.warnings)
			}
			img, err := pull(ctx, built)
			if err != nil {
				t.Fatal(err)
			}
			files := stack.MustFiles(t, img)
			if !tt.check(files) {
				t.Errorf("the image holds %v", files)
			}
		})
	}
}

// TestPaddedStreams: zeros that a program writes after a compressed stream are padding.
func TestPaddedStreams(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	body := file("com.openfaas.docker.config", fmt.Sprintf(`{"image":%q}`, s.Registry.Image("padded:latest"))) +
		dir("context/") + file("context/Dockerfile", "FROM scratch\nCOPY hello.txt /\n") + file("context/hello.txt", "padded\n") + tarEnd
	gz, zst := gzipped(body), zstded(t, body)
	for name, packed := range map[string]string{
		"gzip to a record":     gz + strings.Repeat("\x00", 10240-len(gz)%10240),
		"gzip and one":         gz + "\x00",
		"gzip of members":      gzipped(body[:1000]) + gzipped(body[1000:]) + strings.Repeat("\x00", 700),
		"zstd to a record":     zst + strings.Repeat("\x00", 10240-len(zst)%10240),
		"zstd and one":         zst + "\x00",
		"zstd of frames":       zstded(t, body[:1000]) + zstded(t, body[1000:]) + strings.Repeat("\x00", 5),
		"gzip, far":            gz + strings.Repeat("\x00", 2<<20),
		"gzip in the envelope": enveloped(f, gz+strings.Repeat("\x00", 99)),
	} {
		a := f.MustPost(t, ctx, []byte(packed))
		if a.StatusCode != 200 || a.Status != "success" {
			t.Errorf("%s: got %v", name, a)
			continue
		}
		if got := mustPulled(t, ctx, a.Record, "hello.txt"); got != "padded\n" {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// TestSparseCosts: before its signature has been seen, a file of almost 2 GiB of nothing
// costs no time.
func TestSparseCosts(t *testing.T) {
	ctx, _, f := start(t, stack.FunctionConfig{})
	pad := file("context/pad", strings.Repeat("x", 2<<20))
	unsigned := func(body string) time.Duration {
		began := time.Now()
		for range 20 {
			if a := f.MustPost(t, ctx, []byte(body), client.Signature("sha256="+strings.Repeat("0", 64))); a.StatusCode != 401 {
				t.Fatalf("got %v", a)
			}
		}
		return time.Since(began)
	}
	plain := unsigned(with(pad))
	// Reading 20 times 2 GiB of nothing takes the race detector minutes.
	if took := unsigned(with(sparse("context/large", 2000<<20), pad)); took > 2*plain+20*time.Second {
		t.Errorf("unsigned requests took %v with a sparse file, and %v without", took, plain)
	}
}
