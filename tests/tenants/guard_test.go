package tenants_test

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"handler/function/tests/stack"
)

// guard stands before the stack's registry and lets each user reach its own repositories
// alone. The repositories are the same ones as behind it: private/app is there at both.
type guard struct {
	addr   string // host:port
	tokens bool   // it wants tokens, and gives them; else user and password
	users  map[string]user

	mu   sync.Mutex
	hold func(guarded) // before a request is answered; nil holds nothing
	seen []guarded
}

// user is one of a guard's.
type user struct {
	password string
	prefix   string // of the repositories; the user may read and write them
}

// guarded is a request that a guard got for a manifest or a blob.
type guarded struct {
	user   string // empty without credentials
	method string
	path   string
	agent  string // User-Agent
}

// newGuard starts a guard. Users have their names as passwords.
func newGuard(t *testing.T, s *stack.Stack, tokens bool, prefixes map[string]string) *guard {
	t.Helper()
	g := &guard{tokens: tokens, users: make(map[string]user)}
	for name, prefix := range prefixes {
		g.users[name] = user{"password of " + name, prefix}
	}
	g.addr = stack.Front(t, s.Registry.Addr, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.URL.Path == "/token" {
			g.serveToken(w, r)
			return
		}
		g.serve(w, r, next)
	})
	return g
}

func (g *guard) serveToken(w http.ResponseWriter, r *http.Request) {
	name, password, _ := r.BasicAuth()
	if g.users[name].password != password || password == "" {
		name = "" // whoever has no credentials gets a token that opens nothing
	}
	json.NewEncoder(w).Encode(map[string]any{"token": "token-of-" + name, "expires_in": 300})
}

func (g *guard) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	if r.URL.Path == "/v2/" && r.Header.Get("Authorization") == "" {
		g.challenge(w, "")
		return
	}
	by := guarded{g.userOf(r), r.Method, strings.TrimPrefix(r.URL.Path, "/v2/"), r.UserAgent()}
	g.mu.Lock()
	g.seen = append(g.seen, by)
	hold := g.hold
	g.mu.Unlock()
	if hold != nil {
		hold(by)
	}
	if by.path != "" && (by.user == "" || !strings.HasPrefix(by.path, g.users[by.user].prefix+"/")) {
		g.challenge(w, by.path)
		return
	}
	r.Header.Del("Authorization") // it is for the guard
	next.ServeHTTP(w, r)
}

// userOf is who a request is from, or "".
func (g *guard) userOf(r *http.Request) string {
	if g.tokens {
		name, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer token-of-")
		if !ok {
			return ""
		}
		return name
	}
	name, password, _ := r.BasicAuth()
	if g.users[name].password != password {
		return ""
	}
	return name
}

func (g *guard) challenge(w http.ResponseWriter, path string) {
	value := `Basic realm="guard"`
	if g.tokens {
		repository, _, _ := strings.Cut(path, "/manifests/")
		repository, _, _ = strings.Cut(repository, "/blobs/")
		value = fmt.Sprintf(`Bearer realm="http://%s/token",service="guard",scope="repository:%s:pull"`, g.addr, repository)
	}
	w.Header().Set("WWW-Authenticate", value)
	w.WriteHeader(http.StatusUnauthorized)
	fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED","message":"so says the guard"}]}`)
}

// holds changes what is held.
func (g *guard) holds(f func(guarded)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hold = f
}

// asked counts the requests for a path, of anybody.
func (g *guard) asked(part string) (n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, r := range g.seen {
		if strings.Contains(r.path, part) {
			n++
		}
	}
	return n
}

// requests are all requests so far.
func (g *guard) requests() []guarded {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.seen)
}

// auths is an entry of a file of tenants, or a Docker config.json, with a user's login.
func (g *guard) auths(name string) map[string]any {
	text := base64.StdEncoding.EncodeToString([]byte(name + ":" + g.users[name].password))
	return map[string]any{"auths": map[string]any{g.addr: map[string]string{"auth": text}}}
}

// image is a reference at the guard.
func (g *guard) image(name string) string { return g.addr + "/" + name }

// privateImage makes an image with the file /private, whose text nobody can guess, and
// pushes it as what is the guard's name for it. It returns the text and the digest.
func privateImage(t testing.TB, s *stack.Stack, ref string) (text, digest string) {
	t.Helper()
	_, path, _ := strings.Cut(ref, "/")
	base := stack.MustPull(t, within(t), s.Registry.Image("library/busybox:latest"))
	text = mark()
	layer, err := fileLayer("private", text)
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(base, layer)
	if err != nil {
		t.Fatal(err)
	}
	to, err := name.ParseReference(s.Registry.Image(path))
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(to, img, remote.WithAuth(authn.Anonymous), remote.WithContext(within(t))); err != nil {
		t.Fatal(err)
	}
	sum, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return text, sum.String()
}

// fileLayer is a layer with one file.
func fileLayer(path, text string) (v1.Layer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: path, Mode: 0o644, Size: int64(len(text))}); err != nil {
		return nil, err
	}
	if _, err := w.Write([]byte(text)); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
}
