package openfaas

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// contextTar is a tar of context/ alone, with n random bytes in it.
func contextTar(t *testing.T, n int) (body []byte, digest string) {
	t.Helper()
	random := make([]byte, n)
	rand.NewChaCha8([32]byte([]byte((mark() + mark())[:32]))).Read(random)
	dir := stack.Context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY random /\n", "random": string(random)})
	parent := t.TempDir()
	if err := os.Rename(dir, filepath.Join(parent, "context")); err != nil {
		t.Fatal(err)
	}
	body, err := exec.CommandContext(t.Context(), "tar", "-C", parent, "-cf", "-", "context").Output()
	if err != nil {
		t.Fatal(err)
	}
	return body, fmt.Sprintf("sha256:%x", sha256.Sum256(body))
}

// ahead is a signed request for a context.
func ahead(t *testing.T, c *client.Client, method, digest string, body []byte) *http.Request {
	t.Helper()
	path := "/contexts/" + digest
	req, err := http.NewRequestWithContext(t.Context(), method, c.URL+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	signed := body
	if method == http.MethodHead {
		req.Body, signed = http.NoBody, []byte(method+" "+path)
	}
	req.Header.Set("X-Build-Signature", client.Sign(c.Secret, signed))
	client.Header("X-Build-Tenant", c.Tenant)(req)
	return req
}

// sendAhead sends it and returns the answer's status.
func sendAhead(t *testing.T, c *client.Client, method, digest string, body []byte) int {
	t.Helper()
	a := c.MustFetch(t, ahead(t, c, method, digest, body))
	// The function signs the answer to a request whose signature is right.
	if want := client.Sign(c.Secret, []byte(a.Body)); method == http.MethodPut && a.Header.Get("X-Build-Signature") != want {
		t.Errorf("%v is signed %q, want %q", a, a.Header.Get("X-Build-Signature"), want)
	}
	return a.StatusCode
}

// small is the request that names a context.
func small(t *testing.T, image, digest string) []byte {
	t.Helper()
	parent := t.TempDir()
	config := fmt.Sprintf(`{"image":%q,"context":{"digest":%q}}`, image, digest)
	if err := os.WriteFile(filepath.Join(parent, "com.openfaas.docker.config"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	body, err := exec.CommandContext(t.Context(), "tar", "-C", parent, "-cf", "-", "com.openfaas.docker.config").Output()
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// content is an image's file, without a leading slash.
func content(t *testing.T, ref, file string) string {
	t.Helper()
	files := stack.MustFiles(t, stack.MustPull(t, t.Context(), ref))
	if files[file] == nil {
		t.Fatalf("%s has no %s", ref, file)
	}
	return string(files[file].Content)
}

// TestContextAhead sends 30 MB ahead and queues a few hundred bytes.
func TestContextAhead(t *testing.T) {
	s := stack.Shared(t)
	env := map[string]string{"context_repository": s.Registry.Image("builder/contexts")}
	_, f, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true, Env: env})
	r := newReceiver(t)
	body, digest := contextTar(t, 30<<20)
	for i, want := range []struct {
		method string
		status int
	}{{"HEAD", 404}, {"PUT", 201}, {"HEAD", 200}, {"PUT", 200}} {
		if status := sendAhead(t, function(o), want.method, digest, body); status != want.status {
			t.Fatalf("%d, %s: HTTP %d, want %d", i, want.method, status, want.status)
		}
	}
	image := s.Registry.Image("ahead:v1")
	request := small(t, image, digest)
	t.Logf("%d bytes ahead, %d queued", len(body), len(request))
	enqueue(t, o, request, callbackTo(r))
	c := r.next(t)
	if c.StatusCode != http.StatusOK || c.Status != "success" {
		t.Fatalf("got %v", c)
	}
	if got := content(t, image, "random"); len(got) != 30<<20 || !bytes.Contains(body, []byte(got)) {
		t.Error("the image does not hold the context's file")
	}

	// Another replica, and another form of the same tar.
	_, other := stack.Test(t, stack.FunctionConfig{Env: env})
	if a := other.MustPost(t, t.Context(), small(t, image, digest)); a.Status != "success" || a.Digest != c.Digest {
		t.Errorf("another replica: %v", a)
	}
	var zipped bytes.Buffer
	zw := gzip.NewWriter(&zipped)
	zw.Write(body)
	zw.Close()
	digest = fmt.Sprintf("sha256:%x", sha256.Sum256(zipped.Bytes()))
	if status := sendAhead(t, &other.Client, "PUT", digest, zipped.Bytes()); status != 201 {
		t.Errorf("gzip: HTTP %d", status)
	}
	if a := f.MustPost(t, t.Context(), small(t, image, digest)); a.Status != "success" || a.Digest != c.Digest {
		t.Errorf("gzip: %v", a)
	}
	for _, f := range []*stack.Function{f, other} {
		names, unlinked, err := f.TempFiles()
		if err != nil || len(names) > 0 || unlinked > 0 {
			t.Errorf("left behind: %v, %d bytes, %v", names, unlinked, err)
		}
	}
}

// blobs counts a registry's files that hold a context's bytes.
func blobs(t *testing.T, r *stack.Registry, digest string) []string {
	t.Helper()
	hex := strings.TrimPrefix(digest, "sha256:")
	files, err := filepath.Glob(filepath.Join(r.Dir, "docker/registry/v2/blobs/sha256", hex[:2], hex, "data"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestContextRefused builds from contexts that the registry lacks or holds changed, and
// sends a context that must not reach the registry.
func TestContextRefused(t *testing.T) {
	s := stack.Shared(t)
	registry, err := s.NewRegistry(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	_, f := stack.Test(t, stack.FunctionConfig{Env: map[string]string{"context_repository": registry.Image("builder/contexts")}})
	body, digest := contextTar(t, 1<<20)
	image := s.Registry.Image("refused:v1")
	want := func(name string, a client.Answer, status int, code string) {
		t.Helper()
		if a.StatusCode != status || a.Code != code {
			t.Errorf("%s: got %v, want HTTP %d %s", name, a, status, code)
		}
	}
	want("never sent", f.MustPost(t, t.Context(), small(t, image, digest)), 400, "bad_context")

	req := ahead(t, &f.Client, http.MethodPut, digest, body)
	req.Header.Set("X-Build-Signature", client.Sign("wrong", body))
	want("wrong signature", f.MustDo(t, req), 401, "unauthorized")
	if log, err := os.ReadFile(registry.LogFile()); err != nil || strings.Contains(string(log), "/v2/builder/contexts/blobs/uploads") {
		t.Errorf("an unsigned context reached the registry: %v", err)
	}

	if status := sendAhead(t, &f.Client, "PUT", digest, body); status != 201 {
		t.Fatalf("PUT: HTTP %d", status)
	}
	files := blobs(t, registry, digest)
	if len(files) != 1 {
		t.Fatalf("blobs %v", files)
	}
	// One byte of the file in the tar, not of a header.
	changed := bytes.Clone(body)
	changed[len(changed)/2] ^= 1
	if err := os.WriteFile(files[0], changed, 0o644); err != nil {
		t.Fatal(err)
	}
	want("a changed blob", f.MustPost(t, t.Context(), small(t, image, digest)), 400, "bad_context")

	registry.Kill()
	want("no registry", f.MustPost(t, t.Context(), small(t, image, digest)), 503, "registry_failed")
	if err := registry.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestContextExpires: the function deletes a context that is too old, and takes it again.
func TestContextExpires(t *testing.T) {
	s := stack.Shared(t)
	_, f := stack.Test(t, stack.FunctionConfig{Env: map[string]string{
		"context_repository": s.Registry.Image("builder/expiring"), "context_max_age": "30s",
	}})
	// Others put a signature, as cosign names it, and an image without an age there. The
	// function deletes its own contexts all the same.
	odd := "sha256-" + strings.Repeat("0", 64)
	for _, tag := range []string{odd + ".sig", odd} {
		ref, err := name.NewTag(s.Registry.Image("builder/expiring:" + tag))
		if err := errors.Join(err, remote.Write(ref, empty.Image, remote.WithContext(t.Context()))); err != nil {
			t.Fatal(err)
		}
	}
	body, digest := contextTar(t, 1000)
	if status := sendAhead(t, &f.Client, "PUT", digest, body); status != 201 {
		t.Fatalf("PUT: HTTP %d", status)
	}
	time.Sleep(16 * time.Second)
	if status := sendAhead(t, &f.Client, "HEAD", digest, nil); status != 404 {
		t.Errorf("past half its age: HTTP %d", status)
	}
	if a := f.MustPost(t, t.Context(), small(t, s.Registry.Image("expiring:v1"), digest)); a.Status != "success" {
		t.Errorf("a build that was queued before: %v", a)
	}
	if status := sendAhead(t, &f.Client, "PUT", digest, body); status != 201 {
		t.Errorf("sent again: HTTP %d", status)
	}
	if status := sendAhead(t, &f.Client, "HEAD", digest, nil); status != 200 {
		t.Errorf("young again: HTTP %d", status)
	}
	stack.Eventually(t, 2*time.Minute, func() error {
		if log, err := f.Log(); err != nil || !strings.Contains(log, "old contexts deleted") {
			return fmt.Errorf("nothing has been deleted, %v", err)
		}
		return nil
	})
	for tag, want := range map[string]int{"sha256-" + strings.TrimPrefix(digest, "sha256:"): 404, odd + ".sig": 200, odd: 200} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.Registry.Addr+"/v2/builder/expiring/manifests/"+tag, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Accept", "application/vnd.docker.distribution.manifest.v2+json")
		if a := f.MustFetch(t, req); a.StatusCode != want {
			t.Errorf("%s: the registry answers %d, want %d", tag, a.StatusCode, want)
		}
	}
}

// TestContextCredentials uses a registry with a password and a certificate of a
// private CA.
func TestContextCredentials(t *testing.T) {
	s := stack.Shared(t)
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	out, err := exec.CommandContext(t.Context(), "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
		"-subj", "/CN=registry", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", file("key.pem"), "-out", file("ca.pem")).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	line, err := stack.Htpasswd("user", "password")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file("htpasswd"), []byte(line), 0o644); err != nil {
		t.Fatal(err)
	}
	registry, err := s.NewRegistry(t.Context(), map[string]string{
		"REGISTRY_HTTP_TLS_CERTIFICATE": file("ca.pem"), "REGISTRY_HTTP_TLS_KEY": file("key.pem"),
		"REGISTRY_AUTH": "htpasswd", "REGISTRY_AUTH_HTPASSWD_REALM": "test", "REGISTRY_AUTH_HTPASSWD_PATH": file("htpasswd"),
	})
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(file("ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	body, digest := contextTar(t, 1000)
	for _, tt := range []struct {
		name, login, ca string
		status          int
	}{
		{"all of it", "user:password", "registry_ca", 201},
		{"another password", "user:another", "registry_ca", 422},
		{"no CA", "user:password", "unused", 503},
	} {
		_, f := stack.Test(t, stack.FunctionConfig{
			Env: map[string]string{"context_repository": registry.Image("builder/contexts"), tt.ca: registry.Addr + "=private-ca"},
			Secrets: map[string][]byte{
				"private-ca":      ca,
				"registry-config": fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, registry.Addr, base64.StdEncoding.EncodeToString([]byte(tt.login))),
			},
		})
		if status := sendAhead(t, &f.Client, "PUT", digest, body); status != tt.status {
			t.Errorf("%s: HTTP %d, want %d", tt.name, status, tt.status)
		}
	}
}

// TestScript runs API.md's script as it is written there.
func TestScript(t *testing.T) {
	s := stack.Shared(t)
	script := commands(t, s, "#!/usr/bin/env bash")
	_, f, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true, Env: map[string]string{"context_repository": s.Registry.Image("builder/contexts")}})
	path := filepath.Join(t.TempDir(), "build.sh")
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	run := func(builder string, files map[string]string) (string, error) {
		m := mark()
		dir := stack.Context(t, files)
		if err := os.Symlink("./large", filepath.Join(dir, "link")); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), path, dir, s.Registry.Image(strings.ToLower(m)+":v1"))
		cmd.Env = append(os.Environ(), "BUILDER="+builder, "GATEWAY="+o.URL, "PAYLOAD_SECRET="+filepath.Join(f.SecretsDir, "payload-secret"))
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	large := strings.Repeat(mark(), 20_000) // over 256,000 bytes
	files := map[string]string{"Dockerfile": "FROM busybox\nCOPY . /src\nRUN wc -c /src/large && [ \"$(readlink /src/link)\" = ./large ]\n", "large": large}
	for _, builder := range []string{f.URL, o.URL + "/function/builder", f.URL} {
		if out, err := run(builder, files); err != nil || !strings.Contains(out, "sha256:") || !strings.Contains(out, fmt.Sprint(len(large), " /src/large")) && builder == f.URL && !strings.Contains(out, "CACHED") {
			t.Errorf("%s: %v\n%s", builder, err, out)
		}
	}
	if out, err := run(f.URL, map[string]string{"Dockerfile": "FROM busybox\nRUN exit 7\n"}); err == nil || !strings.Contains(out, "exit code 7") {
		t.Errorf("a failure: %v\n%s", err, out)
	}
}
