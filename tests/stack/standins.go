package stack

import (
	"archive/tar"
	"cmp"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// StandinLabel marks an image that only stands in for a real one. Images built
// on it inherit it.
const StandinLabel = "standin"

var fromLine = regexp.MustCompile(`(?mi)^FROM\s+(?:--platform=\S+\s+)?([a-z][\w./-]*:[\w.-]+)`)

// standinRefs are the images that the template's Dockerfile builds on, and the
// two that tests use.
func standinRefs(repo string) ([]string, error) {
	refs := []string{"busybox:latest", "alpine:latest"}
	dockerfile, err := os.ReadFile(filepath.Join(repo, "template", "golang-middleware", "Dockerfile"))
	if err != nil {
		return nil, err
	}
	for _, m := range fromLine.FindAllStringSubmatch(string(dockerfile), -1) {
		refs = append(refs, m[1])
	}
	slices.Sort(refs)
	return slices.Compact(refs), nil
}

// seed pushes the stand-ins. buildkitd asks a mirror for the repository path
// without the host, so docker.io/library/golang is library/golang here.
func (s *Stack) seed(ctx context.Context) error {
	if len(s.Standins) == 0 {
		return nil
	}
	m, err := newMachine(ctx, s.Repo)
	if err != nil {
		return err
	}
	fmt.Fprintln(s.log, "seeding the registry with stand-ins for", strings.Join(s.Standins, ", "))
	for _, ref := range s.Standins {
		r, err := name.ParseReference(ref)
		if err != nil {
			return err
		}
		img, err := m.standin(path.Base(r.Context().RepositoryStr()))
		if err != nil {
			return fmt.Errorf("making a stand-in for %s: %w", ref, err)
		}
		to, err := name.ParseReference(s.Registry.Image(r.Context().RepositoryStr() + ":" + r.Identifier()))
		if err != nil {
			return err
		}
		if err := remote.Write(to, img, remote.WithContext(ctx)); err != nil {
			return fmt.Errorf("pushing the stand-in for %s: %w", ref, err)
		}
	}
	return nil
}

// machine is what this machine has to make images of.
type machine struct {
	cache    string // directory of image layouts
	busybox  string // static
	applets  []string
	bundle   string // CA certificates
	goroot   string
	version  string // of Go
	watchdog string // the real of-watchdog's path, or that of its stand-in
	real     bool   // whether watchdog is the real one
}

func newMachine(ctx context.Context, repo string) (*machine, error) {
	unlock, err := lockCache(ctx, repo)
	if err != nil {
		return nil, err
	}
	defer unlock()
	m := &machine{cache: filepath.Join(repo, ".cache", "standins")}
	if m.busybox, err = findBusybox(); err != nil {
		return nil, err
	}
	list, err := exec.CommandContext(ctx, m.busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("listing busybox's applets: %w", err)
	}
	m.applets = strings.Fields(string(list))
	for _, f := range []string{os.Getenv("SSL_CERT_FILE"), "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"} {
		if _, err := os.Stat(f); err == nil {
			m.bundle = f
			break
		}
	}
	if m.bundle == "" {
		return nil, errors.New("finding CA certificates: apt-get install ca-certificates")
	}
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT", "GOVERSION").Output()
	if err != nil {
		return nil, fmt.Errorf("asking go for its root: %w", err)
	}
	lines := strings.Split(string(out), "\n")
	m.goroot, m.version = lines[0], lines[1]
	if m.watchdog, m.real = FindWatchdog(); !m.real {
		m.watchdog = filepath.Join(repo, ".cache", "bin", "of-watchdog-standin")
		if err := goCommand(ctx, filepath.Join(repo, "tests"), []string{"build", "-trimpath", "-o", m.watchdog, "./cmd/of-watchdog-standin"}, "CGO_ENABLED=0"); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// FindWatchdog returns the path of the real of-watchdog, if this machine has
// one: what OF_WATCHDOG names, or fwatchdog on the PATH.
func FindWatchdog() (string, bool) {
	p, err := exec.LookPath(cmp.Or(os.Getenv("OF_WATCHDOG"), "fwatchdog"))
	return p, err == nil
}

func findBusybox() (string, error) {
	p, err := exec.LookPath("busybox")
	if err != nil {
		return "", errors.New("finding busybox: apt-get install busybox-static")
	}
	f, err := elf.Open(p)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for _, prog := range f.Progs {
		if prog.Type == elf.PT_INTERP {
			return "", fmt.Errorf("%s is not static: apt-get install busybox-static", p)
		}
	}
	return p, nil
}

// standin returns the image that stands in for a repository, by its last name.
// Images are kept as layouts: compressing a Go tree takes longer than a test.
func (m *machine) standin(repository string) (v1.Image, error) {
	var layers []func(*tarWriter)
	config := v1.Config{
		Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		Cmd:        []string{"/bin/sh"},
		WorkingDir: "/",
		Labels:     map[string]string{StandinLabel: repository + ", made of this machine's files for tests"},
	}
	inputs := []string{"2", runtime.GOARCH, repository}
	switch repository {
	case "busybox", "alpine":
		layers = append(layers, m.base)
		inputs = append(inputs, fileKey(m.busybox), fileKey(m.bundle))
	case "golang":
		layers = append(layers, m.base, m.golang)
		inputs = append(inputs, fileKey(m.busybox), fileKey(m.bundle), m.goroot, m.version)
		config.Env = []string{
			"PATH=/go/bin:/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
			"GOLANG_VERSION=" + strings.TrimPrefix(m.version, "go"), "GOTOOLCHAIN=local", "GOPATH=/go",
		}
		config.WorkingDir = "/go"
	case "of-watchdog":
		layers = append(layers, func(w *tarWriter) { w.file("fwatchdog", m.watchdog, 0o755) })
		inputs = append(inputs, fileKey(m.watchdog))
		if m.real {
			delete(config.Labels, StandinLabel)
		}
		config.Cmd = nil
	default:
		return nil, errors.New("nothing here can stand in for it")
	}

	key := sha256.Sum256([]byte(strings.Join(inputs, "\n")))
	dir := filepath.Join(m.cache, repository+"-"+hex.EncodeToString(key[:6]))
	if p, err := layout.FromPath(dir); err == nil {
		return layoutImage(p)
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, "application/vnd.oci.image.manifest.v1+json"), "application/vnd.oci.image.config.v1+json")
	for _, write := range layers {
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
			r, w := io.Pipe()
			go func() {
				tw := &tarWriter{Writer: tar.NewWriter(w)}
				write(tw)
				w.CloseWithError(errors.Join(tw.err, tw.Close()))
			}()
			return r, nil
		}, tarball.WithCompression(compression.GZip), tarball.WithCompressionLevel(1), tarball.WithMediaType("application/vnd.oci.image.layer.v1.tar+gzip"))
		if err != nil {
			return nil, err
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			return nil, err
		}
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Config = "linux", runtime.GOARCH, config
	if img, err = mutate.ConfigFile(img, file); err != nil {
		return nil, err
	}
	// Written beside and renamed: another process may look for it now.
	tmp, err := os.MkdirTemp(filepath.Dir(m.cache), "standin-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	p, err := layout.Write(tmp, empty.Index)
	if err != nil {
		return nil, err
	}
	if err := p.AppendImage(img); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(m.cache, 0o755); err != nil {
		return nil, err
	}
	if err := os.Rename(tmp, dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return layoutImage(layout.Path(dir))
}

func layoutImage(p layout.Path) (v1.Image, error) {
	index, err := p.ImageIndex()
	if err != nil {
		return nil, err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	return index.Image(manifest.Manifests[0].Digest)
}

// fileKey tells one version of a file from another.
func fileKey(path string) string {
	info, err := os.Stat(path)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprint(path, info.Size(), info.ModTime().UnixNano())
}

// base is a small root file system: busybox and the CA certificates.
func (m *machine) base(w *tarWriter) {
	for _, dir := range []string{"bin", "etc", "etc/ssl", "etc/ssl/certs", "home", "proc", "root", "sbin", "sys", "usr", "usr/bin", "usr/local", "usr/local/bin", "usr/sbin", "var", "var/tmp"} {
		w.add(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755}, nil)
	}
	w.add(&tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}, nil)
	w.file("bin/busybox", m.busybox, 0o755)
	for _, applet := range m.applets {
		if applet != "busybox" {
			w.add(&tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + applet, Linkname: "busybox", Mode: 0o777}, nil)
		}
	}
	w.text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n")
	w.text("etc/group", "root:x:0:\nnogroup:x:65533:\nnobody:x:65534:\n")
	w.text("etc/os-release", "ID=standin\nPRETTY_NAME=\"stand-in: busybox and nothing else\"\n")
	w.file("etc/ssl/certs/ca-certificates.crt", m.bundle, 0o644)
	w.add(&tar.Header{Typeflag: tar.TypeSymlink, Name: "etc/ssl/cert.pem", Linkname: "certs/ca-certificates.crt", Mode: 0o777}, nil)
}

// golang is this machine's toolchain where the official image has it, without
// what no build reads.
func (m *machine) golang(w *tarWriter) {
	for _, dir := range []string{"go", "go/bin", "go/src"} {
		w.add(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o777}, nil)
	}
	err := filepath.WalkDir(m.goroot, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == m.goroot {
			return err
		}
		rel, err := filepath.Rel(m.goroot, p)
		if err != nil {
			return err
		}
		switch {
		case rel == "src/archive/tar/testdata":
			// The builder's own tests read it.
		case slices.Contains([]string{"api", "doc", "misc", "test", ".git"}, rel), d.IsDir() && d.Name() == "testdata":
			return fs.SkipDir
		case strings.HasSuffix(rel, "_test.go"):
			return nil
		}
		to := "usr/local/go/" + rel
		info, err := os.Stat(p) // Debian links parts of its tree elsewhere
		switch {
		case err != nil:
			return err
		case d.IsDir():
			w.add(&tar.Header{Typeflag: tar.TypeDir, Name: to + "/", Mode: 0o755}, nil)
		case info.Mode().IsRegular():
			w.file(to, p, int64(info.Mode().Perm()))
		}
		return w.err
	})
	w.err = cmp.Or(w.err, err)
}

// tarWriter keeps the first error, and gives everything one time, so that equal
// files make equal layers.
type tarWriter struct {
	*tar.Writer
	err error
}

func (w *tarWriter) add(h *tar.Header, r io.Reader) {
	if w.err != nil {
		return
	}
	h.Format = tar.FormatPAX
	if w.err = w.WriteHeader(h); w.err == nil && r != nil {
		_, w.err = io.Copy(w, r)
	}
}

func (w *tarWriter) text(name, text string) {
	w.add(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(text))}, strings.NewReader(text))
}

func (w *tarWriter) file(name, path string, mode int64) {
	f, err := os.Open(path)
	if err != nil {
		w.err = cmp.Or(w.err, err)
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		w.err = cmp.Or(w.err, err)
		return
	}
	w.add(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: info.Size()}, f)
}
