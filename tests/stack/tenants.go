package stack

import (
	"crypto/rand"
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"

	"sigs.k8s.io/yaml"

	"handler/function/tests/client"
)

// TenantsSecret is the name of the secret with the file of tenants.
const TenantsSecret = "tenants"

// Tenants is a file of tenants. The contract says what its fields mean.
type Tenants struct {
	Version  int                 `json:"version"`
	Defaults map[string]any      `json:"defaults,omitempty"`
	Pools    map[string][]string `json:"pools,omitempty"`
	Tenants  map[string]*Tenant  `json:"tenants"` // by name
	Operator *Operator           `json:"operator,omitempty"`
}

// Tenant is one entry of the file.
type Tenant struct {
	Name string `json:"-"`

	ID             string      `json:"id"`
	Keys           []TenantKey `json:"keys"`
	Hosts          []string    `json:"hosts,omitempty"`
	Images         []string    `json:"images"`
	From           []string    `json:"from,omitzero"`     // an empty list is not nil: it allows nothing
	Registry       any         `json:"registry,omitzero"` // "builder", or as RegistryAuths makes it
	ContextHosts   []string    `json:"context_hosts,omitzero"`
	GitCredentials []string    `json:"git_credentials,omitempty"`
	Memory         string      `json:"memory,omitempty"`
	CPUs           float64     `json:"cpus,omitempty"`
	Daemons        string      `json:"daemons,omitempty"`
	Platforms      []string    `json:"platforms,omitempty"`
	Builds         int         `json:"builds,omitempty"`
	Queue          int         `json:"queue,omitempty"`
	Weight         int         `json:"weight,omitempty"`
	BuildTimeout   string      `json:"build_timeout,omitempty"`
	MaxBodyBytes   string      `json:"max_body_bytes,omitempty"`
	Suspended      bool        `json:"suspended,omitempty"`
}

// TenantKey is a key of a tenant or of the operator.
type TenantKey struct {
	ID     string `json:"id"`
	Secret string `json:"secret"`
	Until  string `json:"until,omitempty"` // RFC 3339
}

// Operator is the entry of whoever may list and stop the builds of all tenants.
type Operator struct {
	Keys []TenantKey `json:"keys"`
}

// NewTenant is an entry with an id and a key that nobody else has.
func NewTenant(name string, images ...string) *Tenant {
	id := make([]byte, 8)
	rand.Read(id)
	return &Tenant{
		Name: name, ID: "t-" + hex.EncodeToString(id), Images: images,
		Keys: []TenantKey{{ID: "k1", Secret: rand32()}},
	}
}

// TenantsOf is a file with the tenants.
func TenantsOf(list ...*Tenant) *Tenants {
	f := &Tenants{Version: 1, Tenants: make(map[string]*Tenant)}
	for _, t := range list {
		f.Tenants[t.Name] = t
	}
	return f
}

// YAML is the file's text.
func (f *Tenants) YAML() []byte {
	text, err := yaml.Marshal(f)
	if err != nil {
		panic(err) // every field can be written
	}
	return text
}

// Secret is the secret with the file, for FunctionConfig.Secrets.
func (f *Tenants) Secret() map[string][]byte {
	return map[string][]byte{TenantsSecret: f.YAML()}
}

// Key is the tenant's first key.
func (t *Tenant) Key() string { return t.Keys[0].Secret }

// Of is a client of the same function that signs with the tenant's first key and names the
// tenant.
func (t *Tenant) Of(c client.Client) *client.Client {
	c.Secret, c.Tenant = t.Key(), t.Name
	return &c
}

// WriteSecret replaces a file of SecretsDir at once, as a kubelet does.
func (f *Function) WriteSecret(t testing.TB, name string, content []byte) {
	t.Helper()
	next := filepath.Join(f.dir, "next-secret")
	if err := os.WriteFile(next, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, filepath.Join(f.SecretsDir, name)); err != nil {
		t.Fatal(err)
	}
}
