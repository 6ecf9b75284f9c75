package contexts

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/owned"
)

// standin is a registry in memory, since these tests start no process; the tests module uses a
// real one. first, if it is not nil, gets each request before the registry does, and says
// whether it has answered.
func standin(t *testing.T, first func(w http.ResponseWriter, r *http.Request) bool) *Store {
	t.Helper()
	memory := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if first == nil || !first(w, r) {
			memory.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(server.Close)
	s, err := New(Config{
		Repository: strings.TrimPrefix(server.URL, "http://") + "/contexts",
		MaxAge:     time.Hour,
		Login:      func(context.Context, string, string) (authn.AuthConfig, error) { return authn.AuthConfig{}, nil },
		RootCAs:    func(string) (*x509.CertPool, error) { return nil, nil },
		Log:        zerolog.Nop(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t *testing.T, s *Store, content []byte) (digest string) {
	t.Helper()
	digest = fmt.Sprintf("sha256:%x", sha256.Sum256(content))
	if err := s.Put(t.Context(), "", digest, int64(len(content)), func() io.Reader { return bytes.NewReader(content) }); err != nil {
		t.Fatal(err)
	}
	return digest
}

func TestPutAndOpen(t *testing.T) {
	s := standin(t, nil)
	content := bytes.Repeat([]byte("content"), 1000)
	digest := put(t, s, content)
	r, err := s.Open(t.Context(), "", digest)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	_, err = s.Open(t.Context(), "", "sha256:"+strings.Repeat("0", 64))
	if e, ok := errors.AsType[*api.Error](err); !ok || e.Code != api.BadContext {
		t.Errorf("one that is not there: %v", err)
	}
}

// TestRefusals checks that a request that the registry would refuse again has a code that is
// not retried.
func TestRefusals(t *testing.T) {
	for status, want := range map[int]api.Code{
		401: api.RegistryDenied, 403: api.RegistryDenied, 404: api.RegistryDenied, 413: api.RegistryDenied,
		400: api.RegistryFailed, 408: api.RegistryFailed, 429: api.RegistryFailed, 503: api.RegistryFailed,
	} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel() // some are tried again for seconds
			s := standin(t, func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method == http.MethodPost {
					w.WriteHeader(status)
				}
				return r.Method == http.MethodPost
			})
			digest := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte("x")))
			err := s.Put(t.Context(), "", digest, 1, func() io.Reader { return strings.NewReader("x") })
			if e, ok := errors.AsType[*api.Error](err); !ok || e.Code != want {
				t.Errorf("%v, want %s", err, want)
			}
		})
	}
}

// patience is longer than a registry in this process is silent on a busy machine, and as
// short as a test can wait.
const patience = 3 * time.Second

// TestRegistryStalls has the registry stop in the middle of its answer, for each request in
// turn.
func TestRegistryStalls(t *testing.T) {
	content := bytes.Repeat([]byte("content"), 1000)
	for name, path := range map[string]string{"at the first request": "/v2/", "in the context": "/blobs/"} {
		for _, tt := range []struct {
			name           string
			stall, timeout time.Duration
			text           string
		}{
			{"silence", patience, time.Hour, "has sent nothing"},
			{"the caller's limit", time.Hour, patience, "the caller's"},
		} {
			t.Run(name+", "+tt.name, func(t *testing.T) {
				t.Parallel()
				stalls, ended := make(chan struct{}), make(chan struct{})
				var mu sync.Mutex
				stalling := false
				s := standin(t, func(w http.ResponseWriter, r *http.Request) bool {
					mu.Lock()
					defer mu.Unlock()
					if !stalling || r.Method != http.MethodGet || !strings.Contains(r.URL.Path, path) {
						return false
					}
					stalling = false
					w.Header().Set("Content-Length", fmt.Sprint(len(content)))
					w.Write(content[:100])
					http.NewResponseController(w).Flush()
					close(stalls)
					select {
					case <-r.Context().Done():
						close(ended)
					case <-time.After(time.Minute):
					}
					return true
				})
				digest := put(t, s, content)
				mu.Lock()
				stalling = true
				mu.Unlock()
				s.stall = tt.stall
				began := time.Now()
				ctx, cancel := context.WithTimeoutCause(t.Context(), tt.timeout, &api.Error{Code: api.RegistryTimeout, Msg: "the caller's"})
				defer cancel()
				r, err := s.Open(ctx, "", digest)
				if err == nil {
					_, err = io.ReadAll(r)
					r.Close()
				}
				if e, ok := errors.AsType[*api.Error](err); !ok || e.Code != api.RegistryTimeout || !strings.Contains(e.Msg, tt.text) {
					t.Errorf("got %v", err)
				}
				if took := time.Since(began); took < patience || took > time.Minute {
					t.Errorf("after %v", took)
				}
				<-stalls
				select {
				case <-ended:
				case <-time.After(time.Minute):
					t.Error("its connection is still open")
				}
			})
		}
	}
}

// TestSlowReader checks that a reader may be slow: only the registry's silence counts.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	s := standin(t, nil)
	digest := put(t, s, bytes.Repeat([]byte("content"), 1<<18))
	s.stall = patience
	r, err := s.Open(t.Context(), "", digest)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * s.stall)
	if _, err := io.Copy(io.Discard, r); err != nil {
		t.Error(err)
	}
}

// TestSweep checks that old contexts are deleted, whatever else is in the repository.
// TestTenants: a context is there for the tenants that have sent it, and for nobody else, even
// though the registry keeps one layer for all.
func TestTenants(t *testing.T) {
	s := standin(t, nil)
	content := []byte("content")
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(content))
	send := func(tenant string) {
		t.Helper()
		if err := s.Put(t.Context(), tenant, digest, int64(len(content)), func() io.Reader { return bytes.NewReader(content) }); err != nil {
			t.Fatal(err)
		}
	}
	there := func(tenant string) bool {
		t.Helper()
		has, err := s.Has(t.Context(), tenant, digest)
		if err != nil {
			t.Fatal(err)
		}
		r, err := s.Open(t.Context(), tenant, digest)
		if e, ok := errors.AsType[*api.Error](err); err != nil && (!ok || e.Code != api.BadContext) || has != (err == nil) {
			t.Errorf("%q: there %v, %v", tenant, has, err)
		}
		if err == nil {
			r.Close()
		}
		return has
	}
	send("t-1")
	if !there("t-1") || there("t-2") || there("t") {
		t.Error("a context is not the sender's alone")
	}
	send("t-2")
	send("t-2") // which deletes what was there
	if !there("t-1") || !there("t-2") {
		t.Error("a context is gone")
	}
	for _, tag := range []string{"t-1-sha256-" + digest[7:], "t-2-sha256-" + digest[7:]} {
		if _, err := remote.Head(s.repo.Tag(tag)); err != nil {
			t.Errorf("%s: %v", tag, err)
		}
	}
}

func TestSweep(t *testing.T) {
	broken := false // the registry fails at the tag of 2s
	digits := func(d string) string { return "sha256-" + strings.Repeat(d, 64) }
	s := standin(t, func(w http.ResponseWriter, r *http.Request) bool {
		if !broken || !strings.HasSuffix(r.URL.Path, "/manifests/"+digits("2")) {
			return false
		}
		w.WriteHeader(http.StatusBadRequest)
		return true
	})
	all := make(map[string]v1.Hash)
	tag := func(name string, age time.Duration) {
		t.Helper()
		annotations := map[string]string{"tag": name}
		if age > 0 {
			annotations[created] = time.Now().Add(-age).Format(time.RFC3339Nano)
		}
		img := mutate.Annotations(empty.Image, annotations).(v1.Image)
		digest, err := img.Digest()
		if err := errors.Join(err, remote.Write(s.repo.Tag(name), img)); err != nil {
			t.Fatal(err)
		}
		all[name] = digest
	}
	tag(digits("0")+".sig", 2*time.Hour) // as cosign names a signature
	tag("latest", 2*time.Hour)
	tag("t-7f3a-"+digits("6"), 2*time.Hour) // a tenant's
	tag("t-7f3a-"+digits("7"), time.Minute)
	tag("t-7f3a-"+digits("6")+".sig", 2*time.Hour)
	tag("T_7f3a-"+digits("6"), 2*time.Hour) // no tenant's
	tag(digits("1"), 0)                     // without a time
	tag(digits("2"), 2*time.Hour)
	tag(digits("3"), time.Minute)
	tag(digits("4"), 2*time.Hour)
	tag(digits("5"), 2*time.Hour)
	broken = true

	n, err := s.sweep(t.Context())
	if n != 3 || err == nil || !strings.Contains(err.Error(), "2 failed") || !strings.Contains(err.Error(), digits("1")) {
		t.Errorf("%d deleted, %v", n, err)
	}
	for name, digest := range all {
		// This registry keeps the tag of what is deleted.
		_, err := remote.Head(s.repo.Digest(digest.String()))
		if gone := name == digits("4") || name == digits("5") || name == "t-7f3a-"+digits("6"); owned.IsMissing(err) != gone {
			t.Errorf("%s: %v, want it gone: %v", name, err, gone)
		}
	}
}
