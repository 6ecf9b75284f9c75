package stack

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/openfaas/go-sdk/builder"
)

// WriteContext writes files, named by slashed paths, into dir. A file that
// begins with #! is executable.
func WriteContext(dir string, files map[string]string) error {
	for name, text := range files {
		p := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		mode := fs.FileMode(0o644)
		if strings.HasPrefix(text, "#!") {
			mode = 0o755
		}
		if err := os.WriteFile(p, []byte(text), mode); err != nil {
			return err
		}
	}
	return nil
}

// Pack returns the body that go-sdk, and so faas-cli, makes of a build context.
func Pack(contextDir string, config *builder.BuildConfig) ([]byte, error) {
	f, err := os.CreateTemp("", "req-*.tar")
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	// A relative or unclean path would lose letters of the entries' names.
	contextDir, err = filepath.Abs(contextDir)
	if err != nil {
		return nil, err
	}
	if err := builder.MakeTar(f.Name(), contextDir, config); err != nil {
		return nil, fmt.Errorf("packing %s: %w", contextDir, err)
	}
	return io.ReadAll(f)
}

// Tar returns a body for any config, also one that go-sdk has no field for:
// config is marshalled as JSON, or taken as it is when it is a []byte. Times
// are exact and links are kept.
func Tar(contextDir string, config any) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	text, ok := config.([]byte)
	if !ok {
		var err error
		if text, err = json.Marshal(config); err != nil {
			return nil, err
		}
	}
	if err := w.WriteHeader(&tar.Header{Name: "com.openfaas.docker.config", Mode: 0o644, Size: int64(len(text))}); err != nil {
		return nil, err
	}
	w.Write(text)
	err := filepath.WalkDir(contextDir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		var link string
		if info.Mode().Type() == fs.ModeSymlink {
			if link, err = os.Readlink(p); err != nil {
				return err
			}
		}
		h, err := tar.FileInfoHeader(info, link)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(contextDir, p)
		if err != nil {
			return err
		}
		h.Name = path.Join("context", filepath.ToSlash(rel))
		if d.IsDir() {
			h.Name += "/"
		}
		h.Format = tar.FormatPAX
		if err := w.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
			return err
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(w, f)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("packing %s: %w", contextDir, err)
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
