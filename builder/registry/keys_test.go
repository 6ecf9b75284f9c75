package registry

import (
	"encoding/json"
	"strings"
	"testing"
)

// auths makes a config.json with these keys. The user of each is the key.
func auths(t *testing.T, keys ...string) string {
	t.Helper()
	m := make(map[string]any)
	for _, k := range keys {
		m[k] = map[string]string{"username": k, "password": "p"}
	}
	text, err := json.Marshal(map[string]any{"auths": m})
	if err != nil {
		t.Fatal(err)
	}
	return configFile(t, string(text))
}

func TestCredentialsByPath(t *testing.T) {
	for _, tt := range []struct {
		keys  []string
		image string
		want  string
	}{
		{[]string{"r.example", "r.example/org", "r.example/org/app"}, "r.example/org/app", "r.example/org/app"},
		{[]string{"r.example", "r.example/org", "r.example/org/app"}, "r.example/org/app2", "r.example/org"},
		{[]string{"r.example", "r.example/org"}, "r.example/organ/app", "r.example"},
		{[]string{"r.example", "r.example/org"}, "r.example/x/org", "r.example"},
		{[]string{"r.example/org-a", "r.example/org-b", "r.example/org-c"}, "r.example/org-b/app", "r.example/org-b"},
		{[]string{"r.example", "r.example/org/"}, "r.example/org/app", "r.example/org/"},
		{[]string{"https://r.example/org", "r.example"}, "r.example/org/app", "https://r.example/org"},
		{[]string{"https://r.example/v2/org", "r.example"}, "r.example/org/app", "https://r.example/v2/org"},
		{[]string{"https://r.example/v2/", "other.example/org"}, "r.example/org/app", "https://r.example/v2/"},
		{[]string{"https://r.example/v1/", "http://r.example", "r.example"}, "r.example/org/app", "r.example"},
		{[]string{"R.Example/org", "r.example"}, "r.EXAMPLE/org/app", "R.Example/org"},
		{[]string{"r.example:443/org", "r.example"}, "r.example/org/app", "r.example:443/org"},
		{[]string{"r.example:5000/org", "r.example"}, "r.example/org/app", "r.example"},
		{[]string{"r.example:5000/org", "r.example"}, "r.example:5000/org/app", "r.example:5000/org"},
		{[]string{"docker.io/acme", "https://index.docker.io/v1/"}, "acme/app", "docker.io/acme"},
		{[]string{"docker.io/acme", "https://index.docker.io/v1/"}, "alpine", "https://index.docker.io/v1/"},
		{[]string{"docker.io/library", "https://index.docker.io/v1/"}, "alpine", "docker.io/library"},
		{[]string{"index.docker.io", "docker.io", "https://index.docker.io/v1/", "registry-1.docker.io"}, "acme/app", "https://index.docker.io/v1/"},
		{[]string{"*.example", "r.example"}, "r.example/org/app", "r.example"},
		{[]string{"*.example/org", "r.example"}, "r.example/org/app", "r.example"},
		{[]string{"*.example", "*.example/org"}, "r.example/org/app", "*.example/org"},
		{[]string{"*.example", "r*.example"}, "x.r.example/org/app", ""},
		{[]string{"*.example"}, "r.example:5000/org/app", ""},
		{[]string{"*.example:5000"}, "r.example:5000/org/app", "*.example:5000"},
	} {
		c := New(Config{File: auths(t, tt.keys...), AllowBasic: true})
		host, path, _ := strings.Cut(refs(t, tt.image)[0].Name(), "/")
		for range 20 { // a map's order differs from time to time
			name, _, err := c.Grant(refs(t, tt.image)).Basic(t.Context(), serverHost(host))
			if err != nil || name != tt.want {
				t.Fatalf("%q for %s: %q, %v", tt.keys, tt.image, name, err)
			}
			if l, err := c.Login(t.Context(), host, path); err != nil || l.Username != tt.want {
				t.Fatalf("%q for %s itself: %q, %v", tt.keys, tt.image, l.Username, err)
			}
		}
	}
}

// TestCredentialsWithoutPath asks for a host alone, as the daemon does before it pulls.
func TestCredentialsWithoutPath(t *testing.T) {
	for _, tt := range []struct {
		keys []string
		want string
	}{
		{[]string{"r.example/org", "r.example"}, "r.example"},
		{[]string{"r.example/org-b", "r.example/org-a", "other.example"}, "r.example/org-a"},
	} {
		c := New(Config{File: auths(t, tt.keys...), AllowBasic: true})
		for range 20 {
			if got := user(t, c, "r.example"); got != tt.want {
				t.Fatalf("%q: %q", tt.keys, got)
			}
		}
	}
}
