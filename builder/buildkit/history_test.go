package buildkit

import (
	"encoding/base64"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"handler/function/solve"
)

// TestPushed: a digest that a daemon remembers is what was pushed only if the registry has it under
// the tag, for the tenant.
func TestPushed(t *testing.T) {
	t.Parallel()
	made, other := "sha256:"+strings.Repeat("1", 64), "sha256:"+strings.Repeat("2", 64)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, password, _ := r.BasicAuth(); password != "pw" {
			w.Header().Set("WWW-Authenticate", `Basic realm="r"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		tags := map[string]string{"/v2/acme/app/manifests/v1": made, "/v2/acme/app/manifests/latest": made, "/v2/acme/app/manifests/moved": other}
		digest := tags[r.URL.Path]
		if r.Method != http.MethodHead || digest == "" {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		w.Header().Set("Docker-Content-Digest", digest)
	}))
	t.Cleanup(server.Close)
	host := strings.TrimPrefix(server.URL, "http://")
	acme := &solve.Tenant{ID: "acme", Pool: "gold", RegistryConfig: []byte(`{"auths":{"` + host + `":{"auth":"` + base64.StdEncoding.EncodeToString([]byte("u:pw")) + `"}}}`)}
	shared, gold := newDaemon(t, "shared"), newDaemon(t, "gold")
	gold.past, gold.made = []string{"ref", "nothing"}, map[string]string{"ref": made}
	s := newSolver(t, shared)
	if err := s.SetPools(map[string][]string{"gold": {gold.addr}}); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		tenant            *solve.Tenant
		daemon, ref, name string
		want              string
		fails             bool
	}{
		{acme, gold.addr, "ref", "acme/app:v1", made, false},
		{acme, gold.addr, "ref", "acme/app", made, false},
		{acme, gold.addr, "ref", "acme/app:moved", "", false},
		{acme, gold.addr, "ref", "acme/app:gone", "", true},
		{acme, gold.addr, "nothing", "acme/app:gone", "", false}, // the registry is not asked
		{acme, gold.addr, "unknown", "acme/app:v1", "", false},
		{acme, shared.addr, "ref", "acme/app:v1", "", false}, // it has left the pool
		{&solve.Tenant{ID: "acme", Pool: "gold"}, gold.addr, "ref", "acme/app:v1", "", true},
		{&solve.Tenant{ID: "acme", Pool: "none"}, gold.addr, "ref", "acme/app:v1", "", true},
		{nil, gold.addr, "ref", "acme/app:v1", "", false},
	} {
		got, err := s.Pushed(t.Context(), tt.tenant, tt.daemon, tt.ref, host+"/"+tt.name)
		if got != tt.want || (err != nil) != tt.fails {
			t.Errorf("%+v: %q, %v", tt, got, err)
		}
	}
}
