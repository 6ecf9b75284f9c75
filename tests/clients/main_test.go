// Package clients_test holds the builder against the clients that people have:
// go-sdk, faas-cli's requests, curl and openssl, Python and Node, and the tars
// that each of them writes. Everything runs on a real buildkitd and registry, and
// behind the real of-watchdog where this machine has one.
package clients_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"handler/function/tests/stack"
)

func TestMain(m *testing.M) { stack.Main(m) }

// start returns a function of the test's own, and a context that ends before go
// test would kill the package.
func start(t *testing.T, c stack.FunctionConfig) (context.Context, *stack.Stack, *stack.Function) {
	t.Helper()
	c.Watchdog = true
	s, f := stack.Test(t, c)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx, s, f
}

// answer is a response that has been read to its end.
type answer struct {
	*http.Response
	text string
}

// post sends a signed body; change, if not nil, is applied before that.
func post(t *testing.T, ctx context.Context, f *stack.Function, body []byte, change func(*http.Request)) answer {
	t.Helper()
	req, err := f.Request(ctx, body)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(req)
	}
	return do(t, req)
}

func do(t *testing.T, req *http.Request) answer {
	t.Helper()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("reading the answer, after %q: %v", text, err)
	}
	return answer{resp, string(text)}
}

// record reads one object and allows no key that the contract does not have.
func record(t *testing.T, text string) stack.Record {
	t.Helper()
	var r stack.Record
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		t.Fatalf("reading a record: %v: %q", err, text)
	}
	if _, err := d.Token(); err != io.EOF {
		t.Fatalf("more than one JSON value: %q", text)
	}
	if r.Image != r.ImageName {
		t.Errorf("image is %q but imageName %q", r.Image, r.ImageName)
	}
	if r.Log == nil {
		t.Errorf("log is missing or null: %q", text)
	}
	if (r.Status == "failed") != (r.Code != "") {
		t.Errorf("status is %q but code %q", r.Status, r.Code)
	}
	return r
}

// tarOf is stack.Tar for a context that is written on the way.
func tarOf(t *testing.T, config any, files map[string]string) []byte {
	t.Helper()
	body, err := stack.Tar(stack.Context(t, files), config)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// mustBuild builds and expects a success.
func mustBuild(t *testing.T, ctx context.Context, f *stack.Function, body []byte) stack.Record {
	t.Helper()
	got, err := f.Build(ctx, body, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.Status != "success" {
		t.Fatalf("the build ended %s, %s: %s\n%s", got.Status, got.Code, got.Error, strings.Join(got.Log, "\n"))
	}
	return got
}

// pull returns an image and checks that its digest is the one that was told.
func pull(t *testing.T, ctx context.Context, ref, digest string) v1.Image {
	t.Helper()
	img, err := stack.Pull(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := img.Digest(); err != nil || got.String() != digest {
		t.Errorf("%s has digest %v, %v, but the answer said %q", ref, got, err, digest)
	}
	return img
}

func configOf(t *testing.T, img v1.Image) v1.Config {
	t.Helper()
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return file.Config
}

// contents returns the regular files of an image below dir, which ends with a
// slash or is empty.
func contents(t *testing.T, img v1.Image, dir string) map[string]string {
	t.Helper()
	files, err := stack.Files(img)
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{}
	for name, file := range files {
		if name, ok := strings.CutPrefix(name, dir); ok && file.FileInfo().Mode().IsRegular() {
			texts[name] = string(file.Content)
		}
	}
	return texts
}

// ndjson reads a stream and checks what holds for every one: no blank lines, no
// long lines, one verdict, at the end.
func ndjson(t *testing.T, text string) []stack.Record {
	t.Helper()
	rest, ok := strings.CutSuffix(text, "\n")
	if !ok {
		t.Fatalf("the stream does not end with a newline: %q", text)
	}
	var records []stack.Record
	for line := range strings.SplitSeq(rest, "\n") {
		if len(line) >= 60<<10 {
			t.Errorf("a line has %d bytes: %.100q…", len(line), line)
		}
		records = append(records, record(t, line))
	}
	verdicts(t, records)
	return records
}

func verdicts(t *testing.T, records []stack.Record) {
	t.Helper()
	for i, r := range records {
		last := i == len(records)-1
		if ended := r.Status == "success" || r.Status == "failed"; ended != last || !ended && r.Status != "in_progress" {
			t.Errorf("record %d of %d has status %q", i+1, len(records), r.Status)
		}
	}
}

// lines joins the logs of records.
func lines(records []stack.Record) (all []string) {
	for _, r := range records {
		all = append(all, r.Log...)
	}
	return all
}

// within says which of want does not stand in text.
func within(text string, want ...string) error {
	for _, w := range want {
		if !strings.Contains(text, w) {
			return fmt.Errorf("%q is not in %q", w, text)
		}
	}
	return nil
}

func sha256Hex(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
