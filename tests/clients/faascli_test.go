package clients_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/openfaas/go-sdk/builder"
	"github.com/openfaas/go-sdk/seal"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// faas-cli is not to be had as a module. These are its requests, as version
// 0.18.12 makes them.

// TestFaasCLIPublish is faas-cli publish --remote-builder. It asks for the path
// /build at the host of the URL, whatever path the URL has.
func TestFaasCLIPublish(t *testing.T) { everybody(t, testFaasCLIPublish) }

func testFaasCLIPublish(t *testing.T, start starter) {
	ctx, _, f := start(t, stack.FunctionConfig{})
	for _, test := range []struct {
		name      string
		platforms []string
	}{
		{"publish", []string{"linux/amd64"}},
		{"publish --platforms ''", []string{""}},
		{"build", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			ref := f.Image("faas-cli:latest")
			// Its order of the keys, and an argument that it always sends.
			body, err := stack.Pack(stack.Context(t, copyOnly), &builder.BuildConfig{
				Image: ref, BuildArgs: map[string]string{"ADDITIONAL_PACKAGE": ""}, Platforms: test.platforms,
			})
			if err != nil {
				t.Fatal(err)
			}
			got := f.MustPost(t, ctx, body, func(req *http.Request) {
				req.Header = http.Header{
					"X-Build-Signature": req.Header["X-Build-Signature"],
					"Content-Type":      {"application/octet-stream"},
					"User-Agent":        {"openfaas-go-sdk"},
					"Accept":            {"application/x-ndjson"},
				}
			})
			if got.StatusCode != http.StatusOK {
				t.Fatalf("got %v", got)
			}
			if form := got.Header.Get("Content-Type"); form != client.NDJSON || got.Status != "success" || got.Image != ref {
				t.Errorf("got %v of %s", got, form)
			}
			if len(got.Warnings) > 0 {
				t.Errorf("warnings: %q", got.Warnings)
			}
			pull(t, ctx, ref, got.Digest)
		})
	}
}

// TestFaasCLISecrets is faas-cli publish of a function with build_secrets: it
// takes the key from /publickey.
func TestFaasCLISecrets(t *testing.T) { atHosts(t, testFaasCLISecrets) }

func testFaasCLISecrets(t *testing.T, start starter) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	text, err := f.Get(ctx, "/publickey")
	if err != nil {
		t.Fatal(err)
	}
	var key struct {
		KeyID     string `json:"key_id"`
		Algorithm string `json:"algorithm"`
		PublicKey string `json:"public_key"`
	}
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&key); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	if id, err := seal.DeriveKeyID([]byte(key.PublicKey)); err != nil || key.KeyID != id || key.Algorithm != "nacl/box" {
		t.Errorf("got %+v, want key id %q, %v", key, id, err)
	}
	alone := f.Images == s.Registry.Addr
	if same := key.PublicKey == string(bytes.TrimSpace(s.PublicKey)); same != alone {
		t.Errorf("that the key is the installation's is %v: %s", same, key.PublicKey)
	}
	sealed, err := seal.Seal([]byte(key.PublicKey), map[string][]byte{"npmrc": []byte("//registry/:_authToken=abcdefgh\nsecond line\n")})
	if err != nil {
		t.Fatal(err)
	}
	ref := f.Image("faas-cli:secrets")
	body := stack.WithSecrets(t, stack.Body(t, config{"image": ref}, map[string]string{
		"Dockerfile": "FROM busybox\nRUN --mount=type=secret,id=npmrc,target=/root/.npmrc wc -l < /root/.npmrc > /lines\n",
	}), string(sealed))
	got := f.MustBuild(t, ctx, body)
	if got := contents(t, pull(t, ctx, ref, got.Digest), "")["lines"]; got != "2\n" {
		t.Errorf("the step read %q lines", got)
	}

	if !alone {
		return // the other tenant needs the key
	}
	if err := os.Remove(filepath.Join(f.SecretsDir, "build-secrets-key")); err != nil {
		t.Fatal(err)
	}
	if text, err := f.Get(ctx, "/publickey"); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("without a key: %s, %v", text, err)
	}
}

// TestFaasCLIInvoke is faas-cli invoke --sign X-Build-Signature: the path is
// always /, and the type text/plain. What it prints is what came.
func TestFaasCLIInvoke(t *testing.T) { everybody(t, testFaasCLIInvoke) }

func testFaasCLIInvoke(t *testing.T, start starter) {
	ctx, _, f := start(t, stack.FunctionConfig{})
	ref := f.Image("faas-cli:invoke")
	invoke := func(body []byte, changes ...client.Change) client.Answer {
		return f.MustPost(t, ctx, body, append(changes,
			func(req *http.Request) { req.URL.Path = "/" },
			client.Header("Content-Type", "text/plain"),
			client.Header("User-Agent", "faas-cli/0.18.12 (openfaas; linux; amd64)"))...)
	}
	body := stack.Body(t, config{"image": ref}, copyOnly)
	got := invoke(body)
	if got.Status != "success" || got.Image != ref {
		t.Errorf("got %v", got)
	}
	got = invoke(body, client.Accept(client.NDJSON))
	if form := got.Header.Get("Content-Type"); form != client.NDJSON || got.Status != "success" {
		t.Errorf("got %v of %s", got, form)
	}
	got = invoke(stack.Body(t, config{"image": ref}, map[string]string{"Dockerfile": "FROM busybox\nRUN echo a word; exit 7\n"}))
	if got.StatusCode != http.StatusUnprocessableEntity || !strings.HasPrefix(got.Header.Get("Content-Type"), "text/plain") {
		t.Errorf("a failed build is HTTP %d of %s", got.StatusCode, got.Header.Get("Content-Type"))
	}
	// The Dockerfile's line is shown.
	if err := within(got.Body, "l: a word\n", "exit code 7", "2 | >>> RUN echo a word; exit 7", "failed: build_failed, "+ref); err != nil {
		t.Error(err)
	}
}

// TestUI is the OpenFaaS UI: it sends text alone, and no header of one's own.
func TestUI(t *testing.T) { everybody(t, testUI) }

func testUI(t *testing.T, start starter) {
	ctx, _, f := start(t, stack.FunctionConfig{})
	ref := f.Image("faas-cli:ui")
	for name, body := range map[string][]byte{
		"tar":  stack.Body(t, config{"image": ref}, copyOnly),
		"gzip": compressed(func(t *testing.T, _ string) []byte { return stack.Body(t, config{"image": ref}, copyOnly) }, "gzip")(t, ""),
	} {
		for _, contentType := range []string{"text/plain", "application/json", "binary/octet-stream"} {
			t.Run(name+" as "+contentType, func(t *testing.T) {
				envelope := jsonOf(t, map[string]string{"signature": client.Sign(f.Secret, body), "tar": base64.StdEncoding.EncodeToString(body)})
				got := f.MustPost(t, ctx, envelope, func(req *http.Request) {
					req.URL.Path = "/"
					req.Header = http.Header{"Content-Type": {contentType}, "Accept": {"application/json, text/plain, */*"}}
				})
				if got.StatusCode != http.StatusOK || got.Status != "success" || got.Image != ref {
					t.Errorf("got %v", got)
				}
			})
		}
	}
}
