// Package content_test tests what the builder promises about content. An image has the
// bytes, times, links and modes of its own context, and of no other. Hostile archives are
// refused and cost nothing. No answer, log or image contains a secret or a credential.
package content_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/openfaas/go-sdk/seal"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

func TestMain(m *testing.M) { stack.Main(m) }

// start returns a function of the test's own, and a context that ends before go
// test would kill the package.
func start(t *testing.T, c stack.FunctionConfig) (context.Context, *stack.Stack, *stack.Function) {
	t.Helper()
	s, f := stack.Test(t, c)
	return stack.Within(t, 10*time.Minute), s, f
}

// config is com.openfaas.docker.config.
type config map[string]any

// entry is one entry of a tar. It is a directory if its name ends with a slash, and a
// symlink if it has a link.
type entry struct {
	name string
	text string
	mode int64 // 0644, of a directory 0755, if zero
	time time.Time
	link string
}

// body packs a context of entries in PAX format. Times are exact.
func body(t testing.TB, c config, sealed []byte, context ...entry) []byte {
	t.Helper()
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	entries := []entry{{name: "com.openfaas.docker.config", text: string(text)}, {name: "context/"}}
	for _, e := range context {
		e.name = "context/" + e.name
		entries = append(entries, e)
	}
	if sealed != nil {
		entries = append(entries, entry{name: "com.openfaas.secrets", text: string(sealed)})
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{
			Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: e.name, Size: int64(len(e.text)),
			Mode: e.mode, ModTime: e.time, Linkname: e.link,
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		switch {
		case e.link != "":
			h.Typeflag = tar.TypeSymlink
		case strings.HasSuffix(e.name, "/"):
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, e.text)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// sealFor seals build secrets, by id, to the stack's key.
func sealFor(t testing.TB, s *stack.Stack, secrets map[string]string) []byte {
	t.Helper()
	values := map[string][]byte{}
	for id, v := range secrets {
		values[id] = []byte(v)
	}
	b, err := seal.Seal(s.PublicKey, values)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// pull returns the image with the digest that a build's answer names. The tag may name
// another image by now.
func pull(ctx context.Context, built client.Record) (v1.Image, error) {
	repository := built.Image
	if i := strings.LastIndexByte(repository, ':'); i > strings.LastIndexByte(repository, '/') {
		repository = repository[:i]
	}
	return stack.Pull(ctx, repository+"@"+built.Digest)
}

// pulled returns the text of one file of a build's image.
func pulled(ctx context.Context, built client.Record, path string) (string, error) {
	img, err := pull(ctx, built)
	if err != nil {
		return "", err
	}
	files, err := stack.Files(img)
	if err != nil {
		return "", err
	}
	f := files[path]
	if f == nil {
		return "", fmt.Errorf("%s is not in the image", path)
	}
	return string(f.Content), nil
}

func mustPulled(t testing.TB, ctx context.Context, built client.Record, path string) string {
	t.Helper()
	text, err := pulled(ctx, built, path)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// printed are the lines that a build's steps printed.
func printed(log []string) []string {
	var lines []string
	for _, l := range log {
		if l, ok := strings.CutPrefix(l, "l: "); ok {
			lines = append(lines, l)
		}
	}
	return lines
}

// everything is the manifest, the config and the unpacked layers of an image in one
// text, to be searched.
func everything(t testing.TB, img v1.Image) []byte {
	t.Helper()
	manifest, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	file, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	all := slices.Concat(manifest, []byte("\n"), file)
	for _, l := range layers {
		r, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		r.Close()
		if err != nil {
			t.Fatal(err)
		}
		all = append(append(all, '\n'), b...)
	}
	return all
}

// ended returns the line that the function logs at the end of a body's build. The line
// may come after the answer.
func ended(t testing.TB, f *stack.Function, body []byte) (line struct {
	Sent   int64 `json:"context_sent_bytes"`
	Steps  int   `json:"steps"`
	Cached int   `json:"cached_steps"`
}) {
	t.Helper()
	sum := fmt.Sprintf("%x", sha256.Sum256(body))
	for range 6000 {
		log, err := f.Log()
		if err != nil {
			t.Fatal(err)
		}
		for l := range strings.Lines(log) {
			if strings.Contains(l, `"build ended"`) && strings.Contains(l, sum) {
				if err := json.Unmarshal([]byte(l), &line); err != nil {
					t.Fatalf("reading the function's log: %v: %q", err, l)
				}
				return line
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the function has not logged the build's end")
	return line
}

// checkTempDir wants uploads to leave no file behind. The function closes a body after
// the answer, so checkTempDir waits for up to a minute.
func checkTempDir(t testing.TB, f *stack.Function) {
	t.Helper()
	var names []string
	var unlinked int64
	for range 6000 {
		var err error
		if names, unlinked, err = f.TempFiles(); err != nil {
			t.Fatal(err)
		}
		if len(names) == 0 && unlinked == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("in %s are %q, and %d bytes without a name", filepath.Base(f.TempDir), names, unlinked)
}
