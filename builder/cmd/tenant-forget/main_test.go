package main

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"handler/function/isolation"
)

var hex64 = strings.Repeat("0123abcd", 8)

// sharedKey is what the cache's tags are made of.
var sharedKey = isolation.Derive([]byte("payload-secret")).SharedKey("t-1", "registry.example.com/a")

// newRegistry is a registry in memory with tags in two repositories.
func newRegistry(t *testing.T, contexts, cache []string) (host string) {
	t.Helper()
	return serve(t, memory(), contexts, cache)
}

func memory() http.Handler { return registry.New(registry.Logger(log.New(io.Discard, "", 0))) }

// serve serves a registry, and puts tags into two of its repositories.
func serve(t *testing.T, h http.Handler, contexts, cache []string) (host string) {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	host = strings.TrimPrefix(server.URL, "http://")
	for repository, tags := range map[string][]string{"contexts": contexts, "cache": cache} {
		for _, tag := range tags {
			img := mutate.Annotations(empty.Image, map[string]string{"tag": tag}).(v1.Image)
			if err := remote.Write(repositoryOf(t, host, repository).Tag(tag), img); err != nil {
				t.Fatal(err)
			}
		}
	}
	return host
}

func repositoryOf(t *testing.T, host, repository string) name.Repository {
	t.Helper()
	repo, err := name.NewRepository(host + "/" + repository)
	if err != nil {
		t.Fatal(err)
	}
	return repo
}

func TestForget(t *testing.T) {
	contexts := []string{"sha256-" + hex64, "t-1-sha256-" + hex64, "t-1-sha256-" + hex64 + ".sig", "t-1-x-sha256-" + hex64, "t-11-sha256-" + hex64}
	cache := []string{sharedKey, "t-1-" + sharedKey, "t-1-" + sharedKey + "-linux-amd64", "t-1-" + sharedKey + "-linux-arm-v7", "t-1-latest", "t-1-x-" + sharedKey, "t-11-" + sharedKey}
	host := newRegistry(t, contexts, cache)
	for _, tt := range []struct{ contexts, cache []string }{
		{contexts[1:2], cache[1:4]},
		{}, // again
	} {
		var out bytes.Buffer
		err := run(t.Context(), []string{"-id=t-1", "-contexts=" + host + "/contexts", "-cache=" + host + "/cache"}, &out, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		text, rest, _ := strings.Cut(out.String(), "Of t-1 ")
		want := removed(host+"/contexts", tt.contexts) + removed(host+"/cache", tt.cache)
		if text != want || !strings.Contains(rest, "the images that it pushed") {
			t.Errorf("it prints %s, want %s", &out, want)
		}
		for repository, want := range map[string][]string{
			"contexts": slices.DeleteFunc(slices.Clone(contexts), func(tag string) bool { return slices.Contains(contexts[1:2], tag) }),
			"cache":    slices.DeleteFunc(slices.Clone(cache), func(tag string) bool { return slices.Contains(cache[1:4], tag) }),
		} {
			left, err := remote.List(repositoryOf(t, host, repository))
			slices.Sort(want)
			if err != nil || !slices.Equal(left, want) {
				t.Errorf("%s: %q is left, %v, want %q", repository, left, err, want)
			}
		}
	}
}

// removed is what is printed of a repository.
func removed(repository string, tags []string) string {
	text := fmt.Sprintf("%s: %d removed\n", repository, len(tags))
	for _, tag := range tags {
		text += "  " + tag + "\n"
	}
	return text
}

// TestLogin has a registry that lets one user in, whose password is in the registry config.
func TestLogin(t *testing.T) {
	var private atomic.Bool
	inner := memory()
	host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); private.Load() && user+":"+password != "builder:secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="registry"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	}), nil, []string{"t-1-" + sharedKey})
	private.Store(true)
	config := func(password string) string {
		path := filepath.Join(t.TempDir(), "config.json")
		text := fmt.Sprintf(`{"auths":{%q:{"username":"builder","password":%q}}}`, host, password)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	cache := host + "/cache"
	for _, tt := range []struct{ flag, removed, err string }{
		{"", "", "401"},
		{"-registry-config=" + config("wrong"), "", "401"},
		{"-registry-config=" + config("secret"), removed(cache, []string{"t-1-" + sharedKey}), ""},
	} {
		args := []string{"-id=t-1", "-cache=" + cache}
		if tt.flag != "" {
			args = append(args, tt.flag)
		}
		var out bytes.Buffer
		err := run(t.Context(), args, &out, io.Discard)
		if (err != nil) != (tt.err != "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%q: %v, want %q", tt.flag, err, tt.err)
		}
		if text, _, _ := strings.Cut(out.String(), "Of t-1 "); text != tt.removed {
			t.Errorf("%q: it prints %s, want %s", tt.flag, text, tt.removed)
		}
	}
}

// TestLeft has a registry that deletes nothing.
func TestLeft(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodDelete:
			w.WriteHeader(http.StatusMethodNotAllowed)
		case strings.HasSuffix(r.URL.Path, "/tags/list"):
			fmt.Fprintf(w, `{"name":"cache","tags":["t-1-%s"]}`, sharedKey)
		case strings.Contains(r.URL.Path, "/manifests/"):
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			w.Header().Set("Docker-Content-Digest", "sha256:"+hex64)
			w.Header().Set("Content-Length", "1")
		}
	}))
	t.Cleanup(server.Close)
	cache := strings.TrimPrefix(server.URL, "http://") + "/cache"
	var out bytes.Buffer
	err := run(t.Context(), []string{"-id=t-1", "-cache=" + cache}, &out, io.Discard)
	if err == nil || !strings.HasPrefix(err.Error(), cache+": ") || !strings.Contains(err.Error(), "deletes nothing") {
		t.Errorf("%v", err)
	}
	want := removed(cache, nil) + cache + ": 1 left, for the registry's own tools\n  t-1-" + sharedKey + "\n"
	if !strings.HasPrefix(out.String(), want) {
		t.Errorf("it prints %s, want %s", &out, want)
	}
}

// TestRefusals has command lines that remove nothing.
func TestRefusals(t *testing.T) {
	host := newRegistry(t, nil, []string{"t-1-" + sharedKey})
	cache := "-cache=" + host + "/cache"
	write := func(text string) string {
		path := filepath.Join(t.TempDir(), "tenants.yml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const file = `{version: 1, tenants: {acme: {id: t-%d, keys: [{id: k1, secret: "0123456789abcde%d"}], images: [example.com/a%d]}}}`
	one, two := write(fmt.Sprintf(file, 1, 1, 1)), write(strings.Replace(fmt.Sprintf(file, 2, 2, 2), "acme", "globex", 1))
	for _, tt := range []struct {
		want string
		args []string
	}{
		{`"" is no id`, []string{cache}},
		{`"T-1" is no id`, []string{"-id=T-1", cache}},
		{`"default" is no id`, []string{"-id=default", cache}},
		{"nothing to remove", []string{"-id=t-1"}},
		{"is the id of tenant acme", []string{"-id=t-1", cache, "-tenants=" + one}},
		{"is the id of tenant acme", []string{"-id=t-1", cache, "-tenants=" + two, "-tenants=" + one}},
		{"no such file", []string{"-id=t-1", cache, "-tenants=" + one + "x"}},
		{"line 1", []string{"-id=t-1", cache, "-tenants=" + write("version: 2")}},
		{"without the payload secret", []string{"-id=t-1", "-nats=nats://127.0.0.1:1"}},
		{"no such file", []string{"-id=t-1", cache, "-nats=nats://127.0.0.1:1", "-payload-secret=/nonexistent"}},
		{"has no key", []string{"-id=t-1", cache, "-nats=nats://127.0.0.1:1", "-payload-secret=" + write("short")}},
		{"is no flag", []string{"-id=t-1", cache, "t-2"}},
		{"want host=file", []string{"-id=t-1", cache, "-ca=ca.pem"}},
		{"repository can only contain", []string{"-id=t-1", "-cache=registry.example.com/A"}},
		{"no such file", []string{"-id=t-1", cache, "-ca=" + host + "=/nonexistent"}},
	} {
		err := run(t.Context(), tt.args, io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v, want %q", tt.args, err, tt.want)
		}
	}
	if left, err := remote.List(repositoryOf(t, host, "cache")); err != nil || len(left) != 1 {
		t.Errorf("%q is left, %v", left, err)
	}
	if err := run(t.Context(), []string{"-id=t-1", cache, "-tenants=" + two}, io.Discard, io.Discard); err != nil {
		t.Error(err)
	}
	if left, err := remote.List(repositoryOf(t, host, "cache")); err != nil || len(left) != 0 {
		t.Errorf("%q is left, %v", left, err)
	}
}

// TestNoNATS has servers that cannot be asked. What is in the registry is removed all the same.
func TestNoNATS(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "payload-secret")
	if err := os.WriteFile(secret, []byte("0123456789abcdef\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		want string
		args []string
	}{
		{"records: connecting to NATS: ", []string{"-nats=nats://127.0.0.1:1"}},
		{"records: connecting to NATS: ", []string{"-nats=nats://127.0.0.1:1", "-nats-credential=/nonexistent"}},
		{"records: reading the address of NATS: ", []string{"-nats=builder:password@127.0.0.1"}},
	} {
		host := newRegistry(t, nil, []string{"t-1-" + sharedKey})
		var out bytes.Buffer
		err := run(t.Context(), append(tt.args, "-id=t-1", "-cache="+host+"/cache", "-payload-secret="+secret), &out, io.Discard)
		if err == nil || !strings.HasPrefix(err.Error(), tt.want) || strings.Contains(err.Error(), "password") {
			t.Errorf("%q: %v, want %q", tt.args, err, tt.want)
		}
		if want := removed(host+"/cache", []string{"t-1-" + sharedKey}); !strings.HasPrefix(out.String(), want) {
			t.Errorf("%q: it prints %s, want %s", tt.args, &out, want)
		}
		if left, err := remote.List(repositoryOf(t, host, "cache")); err != nil || len(left) != 0 {
			t.Errorf("%q: %q is left, %v", tt.args, left, err)
		}
	}
}
