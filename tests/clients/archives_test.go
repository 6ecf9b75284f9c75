package clients_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// packer writes the archive of a folder that holds com.openfaas.docker.config
// and context/.
type packer func(t *testing.T, dir string) []byte

// gnuTar packs with GNU tar. The config comes first, in the middle of the
// context, or last.
func gnuTar(format, position, prefix string) packer {
	return func(t *testing.T, dir string) []byte {
		config, context := prefix+"com.openfaas.docker.config", prefix+"context"
		args := []string{"c"}
		if format != "" {
			args = append(args, "--format="+format)
		}
		switch position {
		case "first":
			args = append(args, config, context)
		case "middle":
			entries, err := os.ReadDir(filepath.Join(dir, "context"))
			if err != nil {
				t.Fatal(err)
			}
			args = append(args, "--no-recursion", context, "--recursion")
			for i, e := range entries {
				if i == len(entries)/2 {
					args = append(args, config)
				}
				args = append(args, context+"/"+e.Name())
			}
		case "last":
			args = append(args, context, config)
		}
		return output(t, dir, nil, "tar", args...)
	}
}

// pythonTar packs with Python's tarfile, in its default format where none is
// named.
func pythonTar(format, prefix string) packer {
	return func(t *testing.T, dir string) []byte {
		return output(t, dir, nil, "python3", "-c", `
import sys, tarfile
form = {"format": getattr(tarfile, sys.argv[1])} if sys.argv[1] else {}
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|", **form) as tar:
    for name in "com.openfaas.docker.config", "context":
        tar.add(name, arcname=sys.argv[2] + name)
`, format, prefix)
	}
}

func goSDKTar(image string) packer {
	return func(t *testing.T, dir string) []byte {
		body, err := stack.Pack(filepath.Join(dir, "context"), &builder.BuildConfig{Image: image})
		if err != nil {
			t.Fatal(err)
		}
		return body
	}
}

func compressed(pack packer, program string, args ...string) packer {
	return func(t *testing.T, dir string) []byte {
		return output(t, dir, pack(t, dir), program, args...)
	}
}

// output returns what a program prints in dir.
func output(t *testing.T, dir string, stdin []byte, program string, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Dir = dir
	cmd.Stdin = bytes.NewReader(stdin)
	return []byte(run(t, cmd))
}

// TestArchives packs one folder with every program that people have for it. All
// images have to be the same.
func TestArchives(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	ref := s.Registry.Image("archives:latest")
	middle, sdk := gnuTar("", "middle", "./"), goSDKTar(ref)
	type test struct {
		name  string
		pack  packer
		plain bool // without links: go-sdk cannot pack them
	}
	tests := []test{
		{name: "python", pack: pythonTar("", "")},
		{name: "python ./", pack: pythonTar("", "./")},
		{name: "python PAX_FORMAT", pack: pythonTar("PAX_FORMAT", "")},
		{name: "python GNU_FORMAT", pack: pythonTar("GNU_FORMAT", "")},
		{name: "python USTAR_FORMAT", pack: pythonTar("USTAR_FORMAT", "")},
		{name: "go-sdk", pack: sdk, plain: true},
		{name: "tar c .", pack: func(t *testing.T, dir string) []byte { return output(t, dir, nil, "tar", "c", ".") }},
		{name: "no entry for context", pack: func(t *testing.T, dir string) []byte {
			return output(t, dir, nil, "sh", "-c", "tar c com.* context/*")
		}},
		{name: "gzip", pack: compressed(middle, "gzip")},
		{name: "gzip of go-sdk", pack: compressed(sdk, "gzip", "-1"), plain: true},
		{name: "gzip in two members", pack: compressed(middle, "sh", "-c", "head -c 20000 | gzip; gzip")},
		{name: "zstd", pack: compressed(middle, "zstd", "-q")},
		{name: "zstd of python", pack: compressed(pythonTar("", ""), "zstd", "-q", "-19")},
	}
	for _, format := range []string{"", "ustar", "posix"} {
		for _, position := range []string{"first", "middle", "last"} {
			for _, prefix := range []string{"", "./"} {
				name := strings.Join(strings.Fields(fmt.Sprintf("tar %s config %s %s", format, position, prefix)), " ")
				tests = append(tests, test{name: name, pack: gnuTar(format, position, prefix)})
			}
		}
	}

	layers := map[bool][]v1.Hash{}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir := writeLayout(t, ref, test.plain)
			got := f.MustBuild(t, ctx, test.pack(t, dir))
			if len(got.Warnings) > 0 {
				t.Errorf("warnings: %q", got.Warnings)
			}
			img := pull(t, ctx, ref, got.Digest)
			checkLayout(t, img, test.plain)
			file, err := img.ConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			if layers[test.plain] == nil {
				layers[test.plain] = file.RootFS.DiffIDs
			}
			if got, want := file.RootFS.DiffIDs, layers[test.plain]; !slices.Equal(got, want) {
				t.Errorf("the layers are %v, those of another archive %v", got, want)
			}
		})
	}
}

// Contents of the layout. The first long name is one that ustar splits in two,
// the second one has no place in a header by itself.
var layoutFiles = map[string]string{
	"Dockerfile": "FROM scratch\nCOPY . /\n",
	"hello.txt":  "hello\n",
	"run.sh":     "#!/bin/sh\necho run\n",
	"größe.txt":  "umlauts\n",
	"zero":       "",
	"large":      strings.Repeat("0123456789abcde\n", 20<<10),
	strings.Repeat("d", 60) + "/" + strings.Repeat("f", 80): "a long path\n",
}

// layoutTime is in whole seconds: some archives have no more.
var layoutTime = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// TestContentEncoding: the header is accepted, not needed, and the signature is over
// what is sent.
func TestContentEncoding(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	plain := stack.Body(t, config{"image": s.Registry.Image("encoding:latest")}, copyOnly)
	pack := func(*testing.T, string) []byte { return plain }
	gzipped, zipped := compressed(pack, "gzip")(t, ""), compressed(pack, "zstd", "-q")(t, "")
	digests := map[string]string{}
	for name, test := range map[string]struct {
		body     []byte
		encoding string
	}{
		"gzip":            {gzipped, "gzip"},
		"gzip, untold":    {gzipped, ""},
		"zstd":            {zipped, "zstd"},
		"identity":        {plain, "identity"},
		"not what it has": {plain, "gzip"},
	} {
		a := f.MustPost(t, ctx, test.body, client.Header("Content-Encoding", test.encoding))
		if a.StatusCode != http.StatusOK || a.Status != "success" {
			t.Errorf("%s: got %v", name, a)
			continue
		}
		digests[a.Digest] = name
	}
	if len(digests) != 1 {
		t.Errorf("not one image: %v", digests)
	}
}

func writeLayout(t *testing.T, image string, plain bool) string {
	t.Helper()
	files := map[string]string{"com.openfaas.docker.config": fmt.Sprintf(`{"image":%q}`, image)}
	for name, text := range layoutFiles {
		files["context/"+name] = text
	}
	dir := stack.Context(t, files)
	in := func(name string) string { return filepath.Join(dir, "context", name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(in("empty"), 0o750))
	must(os.Chmod(in("zero"), 0o600))
	if !plain {
		must(os.Symlink("hello.txt", in("symlink")))
		must(os.Symlink("self", in("self")))
		must(os.Link(in("hello.txt"), in("zz-link")))
	}
	must(filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Type() == fs.ModeSymlink {
			return err
		}
		return os.Chtimes(path, layoutTime, layoutTime)
	}))
	return dir
}

func checkLayout(t *testing.T, img v1.Image, plain bool) {
	t.Helper()
	files := stack.MustFiles(t, img)
	entries := len(layoutFiles) + 2 // directories: the long one and the empty one
	for name, want := range layoutFiles {
		file := files[name]
		if file == nil || string(file.Content) != want {
			t.Errorf("%s is %.100v, want %.100q", name, file, want)
		} else if !file.ModTime.Equal(layoutTime) {
			t.Errorf("%s has time %v", name, file.ModTime)
		}
	}
	for name, want := range map[string]int64{"empty": 0o750, "zero": 0o600, "run.sh": 0o755, "hello.txt": 0o644} {
		if file := files[name]; file == nil || file.Mode&0o7777 != want {
			t.Errorf("%s is %v, want mode %o", name, file, want)
		}
	}
	if !plain {
		entries += 3
		for name, want := range map[string]string{"symlink": "hello.txt", "self": "self"} {
			if file := files[name]; file == nil || file.Typeflag != tar.TypeSymlink || file.Linkname != want {
				t.Errorf("%s is %v, want a link to %s", name, file, want)
			}
		}
		if file := files["zz-link"]; file == nil || file.Typeflag != tar.TypeLink || file.Linkname != "hello.txt" {
			t.Errorf("zz-link is %v, want a hard link", file)
		}
	}
	if len(files) != entries {
		t.Errorf("the image has %d entries, want %d", len(files), entries)
	}
}
