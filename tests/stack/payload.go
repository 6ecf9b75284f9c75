package stack

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
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

// Sign returns the value of X-Build-Signature for a body.
func Sign(secret string, body []byte) string {
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write(body)
	return "sha256=" + hex.EncodeToString(mac.Sum(nil))
}

// Request returns a signed POST /build, for a test to change before it sends it.
func (f *Function) Request(ctx context.Context, body []byte) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, f.URL+"/build", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	req.Header.Set("X-Build-Signature", Sign(f.Secret, body))
	return req, nil
}

// Post sends a signed body. accept chooses the form of the answer; empty is the
// single JSON object. The caller closes the answer's body.
func (f *Function) Post(ctx context.Context, body []byte, accept string) (*http.Response, error) {
	req, err := f.Request(ctx, body)
	if err != nil {
		return nil, err
	}
	if accept != "" {
		req.Header.Set("Accept", accept)
	}
	return cmp.Or(f.Client, http.DefaultClient).Do(req)
}

// Record is one object of an answer, read by the contract and not by the
// function's own types.
type Record struct {
	Log       []string `json:"log"`
	Image     string   `json:"image"`
	ImageName string   `json:"imageName"`
	Status    string   `json:"status"` // in_progress, success or failed
	Error     string   `json:"error"`
	Code      string   `json:"code"`
	Duration  float64  `json:"duration"` // seconds
	Digest    string   `json:"digest"`
	Tags      []string `json:"tags"`
	Platforms []string `json:"platforms"`
	Warnings  []string `json:"warnings"`
	ID        string   `json:"id"`
	Request   string   `json:"request"` // of the last record, hex SHA-256
}

// Build sends a signed body, asks for NDJSON and calls each, if not nil, for
// every record as it arrives. It returns the last record, with the whole log.
// The error is for answers that are not as the contract says; a build that
// failed is a Record with status failed.
func (f *Function) Build(ctx context.Context, body []byte, each func(Record)) (Record, error) {
	resp, err := f.Post(ctx, body, "application/x-ndjson")
	if err != nil {
		return Record{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, err := io.ReadAll(io.LimitReader(resp.Body, 2<<20))
		if err != nil {
			return Record{}, err
		}
		var r Record
		if err := json.Unmarshal(text, &r); err != nil || r.Status != "failed" {
			return Record{}, fmt.Errorf("the builder answered %s: %s", resp.Status, text)
		}
		return r, nil
	}
	var last Record
	var log []string
	lines := bufio.NewScanner(resp.Body) // lines over 64 KiB are an error, as for faas-cli
	for lines.Scan() {
		if last.Status == "success" || last.Status == "failed" {
			return Record{}, fmt.Errorf("a line came after the last record: %s", lines.Bytes())
		}
		last = Record{}
		if err := json.Unmarshal(lines.Bytes(), &last); err != nil {
			return Record{}, fmt.Errorf("reading the stream: %w: %q", err, lines.Bytes())
		}
		log = append(log, last.Log...)
		if each != nil {
			each(last)
		}
	}
	if err := lines.Err(); err != nil {
		return Record{}, fmt.Errorf("reading the stream: %w", err)
	}
	if last.Status != "success" && last.Status != "failed" {
		return Record{}, fmt.Errorf("the stream ended without a verdict, after %q", last.Log)
	}
	last.Log = log
	return last, nil
}
