package server_test

import (
	"errors"
	"strings"
	"testing"

	"handler/function/api"
	"handler/function/records"
	"handler/function/server"
	"handler/function/solve"
)

// TestBecame completes the records of builds whose replica has died.
func TestBecame(t *testing.T) {
	acme := tenant("acme", `registry: {auths: {ghcr.io: {auth: "dTpw"}}},`)
	for _, tt := range []struct {
		name   string
		file   []string // entries; nil is no file
		owner  string
		ref    string
		image  string
		digest string
		err    error
		asked  bool
		logged bool
	}{
		{name: "pushed", file: []string{acme}, owner: "t-acme", ref: "r", image: "ghcr.io/acme/app", digest: "sha256:abc", asked: true},
		{name: "not pushed", file: []string{acme}, owner: "t-acme", ref: "r", image: "ghcr.io/acme/app", asked: true},
		{name: "nobody can say", file: []string{acme}, owner: "t-acme", ref: "r", image: "ghcr.io/acme/app", err: errors.New("gone"), asked: true, logged: true},
		{name: "without a daemon", file: []string{acme}, owner: "t-acme", image: "ghcr.io/acme/app"},
		{name: "without an image", file: []string{acme}, owner: "t-acme", ref: "r"},
		{name: "a tenant that is gone", file: []string{acme}, owner: "t-other", ref: "r", image: "ghcr.io/acme/app"},
		{name: "a key, since there is a file", file: []string{acme}, owner: server.Owner([]byte(secret)), ref: "r", image: "ghcr.io/acme/app"},
		{name: "without a file", owner: server.Owner([]byte(secret)), ref: "r", image: "ghcr.io/acme/app", digest: "sha256:abc", asked: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			solver, asked := &scripted{}, false
			solver.pushed = func(tenant *solve.Tenant, daemon, ref, image string) (string, error) {
				asked = true
				if daemon != "tcp://one:1234" || ref != tt.ref || image != tt.image {
					t.Errorf("asked %s for %s of %s", daemon, ref, image)
				}
				if (tenant != nil) != (tt.file != nil) || tenant != nil && (tenant.ID != "t-acme" || !strings.Contains(string(tenant.RegistryConfig), "dTpw")) {
					t.Errorf("for %+v", tenant)
				}
				return tt.digest, tt.err
			}
			f := start(t, solver, nil)
			if tt.file != nil {
				f, _ = startTenants(t, solver, tt.file, nil)
			}
			r := records.Record{Tenant: tt.owner, ID: "call", Status: api.Failed, Code: api.Lost, Error: "died", Daemon: "tcp://one:1234", Ref: tt.ref, Image: tt.image}
			got := f.s.Became(t.Context(), r)
			pushed := strings.Contains(got.Error, "pushed")
			if got.Digest != tt.digest || pushed != (tt.digest != "") || got.Status != api.Failed || got.Code != api.Lost || got.Tenant != tt.owner || asked != tt.asked {
				t.Errorf("asked: %v; it became %+v", asked, got)
			}
			if logged := strings.Contains(f.log.String(), "lost build not looked up"); logged != tt.logged {
				t.Errorf("the log: %s", f.log)
			}
		})
	}
}
