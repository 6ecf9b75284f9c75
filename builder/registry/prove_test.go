package registry

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"handler/function/api"
)

// TestProve wants a registry that tells a digest to have what is under it.
func TestProve(t *testing.T) {
	amd, arm, none := `{"config":"amd"}`, `{"config":"arm"}`, `{"config":"none"}`
	sum := func(text string) string { return digest.FromString(text).String() }
	index := func(children ...string) string {
		return `{"manifests":[` + strings.Join(children, ",") + `]}`
	}
	child := func(text, platform string) string {
		return fmt.Sprintf(`{"digest":%q,"platform":%s}`, sum(text), platform)
	}
	const linuxAMD, linuxARM, unknown = `{"os":"linux","architecture":"amd64"}`, `{"os":"linux","architecture":"arm64"}`, `null`
	var many []string
	for i := range maxChildren {
		many = append(many, child(fmt.Sprintf(`{"config":"%d"}`, i), linuxAMD))
	}
	stolen := "sha256:" + strings.Repeat("a", 64)
	for _, tt := range []struct {
		name     string
		tag      string   // the manifest under the tag
		told     string   // the digest that is told for it; its own if empty
		has      []string // manifests by digest beside the tag's
		platform *ocispecs.Platform
		requests int32 // of two questions
		code     api.Code
	}{
		{name: "an image", tag: amd, requests: 3},
		{name: "an index", tag: index(child(amd, linuxAMD), child(arm, linuxARM)), has: []string{amd, arm}, requests: 5},
		{name: "an index, for a platform", tag: index(child(amd, linuxAMD), child(arm, linuxARM)), has: []string{amd}, platform: &ocispecs.Platform{OS: "linux", Architecture: "amd64"}, requests: 4},
		{name: "an index in an index", tag: index(child(index(child(amd, linuxAMD)), unknown)), has: []string{index(child(amd, linuxAMD)), amd}, requests: 5},
		{name: "a digest that it has seen somewhere", tag: amd, told: stolen, code: api.RegistryDenied},
		{name: "another manifest under a digest", tag: none, told: sum(amd), has: []string{}, code: api.RegistryFailed},
		{name: "a child that it has seen somewhere", tag: index(child(amd, linuxAMD)), code: api.RegistryDenied},
		{name: "a child for any platform that it has seen somewhere", tag: index(child(amd, unknown)), platform: &ocispecs.Platform{OS: "linux", Architecture: "arm64"}, code: api.RegistryDenied},
		{name: "a grandchild that it has seen somewhere", tag: index(child(index(child(amd, linuxAMD)), unknown)), has: []string{index(child(amd, linuxAMD))}, code: api.RegistryDenied},
		{name: "too many children", tag: index(many...), has: func() (all []string) {
			for i := range maxChildren {
				all = append(all, fmt.Sprintf(`{"config":"%d"}`, i))
			}
			return all
		}(), code: api.RegistryFailed},
		{name: "no digest", tag: `{"manifests":[{"digest":"x"}]}`, code: api.RegistryFailed},
		{name: "no JSON", tag: "<html>", code: api.RegistryFailed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			told := tt.told
			if told == "" {
				told = sum(tt.tag)
			}
			f := newFakeRegistry(t, false, &fakeRegistry{})
			f.instead = func(w http.ResponseWriter, r *http.Request) bool {
				object := strings.TrimPrefix(r.URL.Path, "/v2/app/manifests/")
				for _, text := range append(tt.has, tt.tag) {
					if object == sum(text) || text == tt.tag && (object == "1" || object == told && told != stolen) {
						w.Header().Set("Docker-Content-Digest", told)
						w.Write([]byte(text))
						return true
					}
				}
				w.WriteHeader(http.StatusNotFound)
				return true
			}
			c := New(Config{})
			ref, err := reference.ParseNormalizedNamed(f.host() + "/app:1")
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				// Somebody else asks, the second time.
				of, err := c.Of(nil)
				if err != nil {
					t.Fatal(err)
				}
				d, err := of.Grant(nil).Ask(t.Context(), ref, true, tt.platform)
				if e := api.AsError(err); tt.code != "" && (err == nil || e.Code != tt.code) || tt.code == "" && (err != nil || d.String() != told) {
					t.Errorf("%s, %v", d, err)
				}
			}
			if n := f.requests.Load(); tt.requests != 0 && n != tt.requests {
				t.Errorf("%d requests, want %d: %q", n, tt.requests, f.log)
			}
		})
	}
}

// TestProvenElsewhere wants each repository to show what it has.
func TestProvenElsewhere(t *testing.T) {
	p := &proven{seen: make(map[string]bool)}
	for i := range 2 * maxProven {
		p.add(fmt.Sprint(i))
	}
	if len(p.seen) > maxProven || !p.has(fmt.Sprint(2*maxProven-1)) {
		t.Errorf("%d are remembered", len(p.seen))
	}
	f := newFakeRegistry(t, false, &fakeRegistry{})
	f.instead = func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/v2/other/manifests/") {
			w.Header().Set("Docker-Content-Digest", manifestDigest.String())
			if r.Method == http.MethodGet {
				w.WriteHeader(http.StatusNotFound)
			}
			return true
		}
		return false
	}
	g := New(Config{}).Grant(nil)
	for _, image := range []string{"/app:1", "/other:1"} {
		code := map[string]api.Code{"/other:1": api.RegistryDenied}[image]
		ref, err := reference.ParseNormalizedNamed(f.host() + image)
		if err != nil {
			t.Fatal(err)
		}
		d, err := g.Ask(t.Context(), ref, true, nil)
		wantAsked(t, d, err, code, "(404)")
	}
}

// TestManyValues: a manifest of a few MiB can be of so many objects, or of so many other values,
// that they take a hundred times as much memory.
func TestManyValues(t *testing.T) {
	for _, tt := range []struct {
		list string
		says string
	}{
		{strings.Repeat("{},", maxObjects) + "{}", "over 10000 objects"},
		{strings.Repeat("0,", maxValues+1) + "0", "over 100000 values"},
		{strings.Repeat("null,", maxValues+1) + "null", "over 100000 values"},
		{`{"platform":{"os.features":[` + strings.Repeat(`"",`, maxValues+1) + `""]}}`, "over 100000 values"},
		{strings.Repeat("null,", maxValues) + "null", "a manifest without a digest"},
	} {
		text := `{"manifests":[` + tt.list + `]}`
		f := newFakeRegistry(t, false, &fakeRegistry{})
		f.instead = func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Docker-Content-Digest", digest.FromString(text).String())
			if r.Method == http.MethodGet {
				fmt.Fprint(w, text)
			}
			return true
		}
		ref, err := reference.ParseNormalizedNamed(f.host() + "/app:1")
		if err != nil {
			t.Fatal(err)
		}
		d, err := New(Config{}).Grant(nil).Ask(t.Context(), ref, true, nil)
		if e := api.AsError(err); err == nil || e.Code != api.RegistryFailed || !strings.Contains(e.Err.Error(), tt.says) {
			t.Errorf("%.40s: %s, %v, want %q", text, d, err, tt.says)
		}
	}
}
