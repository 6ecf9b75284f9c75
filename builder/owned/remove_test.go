package owned

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// standin is a registry in memory that lists two tags on a page. refuse returns the status
// with which it refuses to delete a tag or a digest, or 0.
type standin struct {
	*Repository
	refuse func(reference string) int
}

func newStandin(t *testing.T) *standin {
	t.Helper()
	s := &standin{refuse: func(string) int { return 0 }}
	memory := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch _, reference, ok := strings.Cut(r.URL.Path, "/manifests/"); {
		case strings.HasSuffix(r.URL.Path, "/tags/list"):
			s.list(w, r, memory)
			return
		case ok && r.Method == http.MethodDelete:
			if status := s.refuse(reference); status != 0 {
				w.WriteHeader(status)
				return
			}
		}
		memory.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	var err error
	s.Repository, err = New(Config{
		Repository: strings.TrimPrefix(server.URL, "http://") + "/builder/cache",
		Login:      func(context.Context, string, string) (authn.AuthConfig, error) { return authn.AuthConfig{}, nil },
		RootCAs:    func(string) (*x509.CertPool, error) { return nil, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// list answers with two tags, and where to find the next ones.
func (s *standin) list(w http.ResponseWriter, r *http.Request, memory http.Handler) {
	rec := httptest.NewRecorder()
	memory.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, r.URL.Path, nil))
	var page struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}
	if rec.Code != http.StatusOK || json.Unmarshal(rec.Body.Bytes(), &page) != nil {
		w.WriteHeader(rec.Code)
		return
	}
	begin, _ := slices.BinarySearch(page.Tags, r.URL.Query().Get("last")+"\x00")
	page.Tags = page.Tags[begin:]
	if len(page.Tags) > 2 {
		page.Tags = page.Tags[:2]
		w.Header().Set("Link", fmt.Sprintf(`<%s?last=%s>; rel="next"`, r.URL.Path, page.Tags[1]))
	}
	json.NewEncoder(w).Encode(page)
}

// put makes a manifest of the content, with the tags.
func (s *standin) put(t *testing.T, content string, tags ...string) (digest string) {
	t.Helper()
	img := mutate.Annotations(empty.Image, map[string]string{"content": content}).(v1.Image)
	for _, tag := range tags {
		if err := remote.Write(s.Tag(tag), img); err != nil {
			t.Fatal(err)
		}
	}
	hash, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return hash.String()
}

// there says whether the registry has a tag or a digest.
func (s *standin) there(t *testing.T, reference string) bool {
	t.Helper()
	var err error
	if strings.HasPrefix(reference, "sha256:") {
		_, err = remote.Head(s.Digest(reference))
	} else {
		_, err = remote.Head(s.Tag(reference))
	}
	if err != nil && !IsMissing(err) {
		t.Fatal(err)
	}
	return err == nil
}

// ofTenant matches the tags of t-1.
func ofTenant(tag string) bool {
	return strings.HasPrefix(tag, "t-1-") && !strings.HasPrefix(tag, "t-1-x-")
}

func TestRemove(t *testing.T) {
	s := newStandin(t)
	check := func(wantRemoved []string) {
		t.Helper()
		removed, left, err := s.Remove(t.Context(), ofTenant)
		if err != nil || !slices.Equal(removed, wantRemoved) || len(left) > 0 {
			t.Errorf("removed %q, left %q, %v; want %q", removed, left, err, wantRemoved)
		}
	}
	check(nil) // a repository that does not exist

	var gone, stay []string
	for i := range 5 {
		tag := fmt.Sprint("t-1-", i)
		gone = append(gone, tag, s.put(t, tag, tag))
	}
	gone = append(gone, "t-1-shared", "t-1-twice", "t-1-twice-too", s.put(t, "twice", "t-1-twice", "t-1-twice-too"))
	stay = append(stay, "t-1-x-1", s.put(t, "other", "t-1-x-1"), "t-11-1", s.put(t, "another", "t-11-1"))
	stay = append(stay, "t-2-shared", s.put(t, "shared", "t-2-shared", "t-1-shared"))
	check([]string{"t-1-0", "t-1-1", "t-1-2", "t-1-3", "t-1-4", "t-1-shared", "t-1-twice", "t-1-twice-too"})
	for _, reference := range gone {
		if s.there(t, reference) {
			t.Errorf("%s is still there", reference)
		}
	}
	for _, reference := range stay {
		if !s.there(t, reference) {
			t.Errorf("%s is gone", reference)
		}
	}
	check(nil) // again
}

// TestRefusals has registries that delete only some things.
func TestRefusals(t *testing.T) {
	isTag := func(reference string) bool { return !strings.HasPrefix(reference, "sha256:") }
	for _, tt := range []struct {
		name          string
		refuse        func(reference string) int
		removed, left []string // "<digest>" is that of t-1-a
		noDeletion    bool
	}{
		{"nothing", func(string) int { return 405 }, nil, []string{"t-1-a", "t-1-b", "t-1-shared"}, true},
		{"nothing for this user", func(string) int { return 403 }, nil, []string{"t-1-a", "t-1-b", "t-1-shared"}, true},
		{"no tags", func(r string) int {
			if isTag(r) {
				return 400
			}
			return 0
		}, []string{"t-1-a", "t-1-b"}, []string{"t-1-shared"}, false},
		{"no tags, 405", func(r string) int {
			if isTag(r) {
				return 405
			}
			return 0
		}, []string{"t-1-a", "t-1-b"}, []string{"t-1-shared"}, false},
		{"no digests", func(r string) int {
			if isTag(r) {
				return 0
			}
			return 405
		}, []string{"t-1-shared"}, []string{"<digest>", "<digest of b>"}, true},
		{"one fails", func(r string) int {
			if r == "t-1-a" {
				return 409
			}
			return 0
		}, []string{"t-1-b", "t-1-shared"}, []string{"t-1-a"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStandin(t)
			a, b := s.put(t, "a", "t-1-a"), s.put(t, "b", "t-1-b")
			s.put(t, "shared", "t-1-shared", "t-2-shared")
			s.refuse = tt.refuse
			removed, left, err := s.Remove(t.Context(), ofTenant)
			for i := range left {
				left[i] = strings.NewReplacer(a, "<digest>", b, "<digest of b>").Replace(left[i])
			}
			if !slices.Equal(removed, tt.removed) || !slices.Equal(left, tt.left) || err == nil || errors.Is(err, ErrNoDeletion) != tt.noDeletion {
				t.Errorf("removed %q, left %q, %v", removed, left, err)
			}
			if !s.there(t, "t-2-shared") {
				t.Error("another tenant's tag is gone")
			}
		})
	}
}
