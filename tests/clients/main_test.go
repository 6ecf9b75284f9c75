// Package clients_test holds the builder against the clients that people have:
// go-sdk, faas-cli's requests, curl and openssl, Python and Node, and the tars
// that each of them writes. Everything runs on a real buildkitd and registry, and
// behind the real of-watchdog where this machine has one.
package clients_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"handler/function/tests/stack"
)

func TestMain(m *testing.M) { stack.Main(m) }

// start returns a function of the test's own, and a context that ends before go
// test would kill the package.
func start(t *testing.T, c stack.FunctionConfig) (context.Context, *stack.Stack, *stack.Function) {
	t.Helper()
	c.Watchdog = true
	s, f := stack.Test(t, c)
	return stack.Within(t, 10*time.Minute), s, f
}

// starter is start, or what a tenant has in its place.
type starter func(*testing.T, stack.FunctionConfig) (context.Context, *stack.Stack, *stack.Function)

// everybody runs the test of a client alone, and then as two tenants side by side. The client
// is the same: it does not say whose it is. With few keys all are tried, and among many the
// config's image says it.
func everybody(t *testing.T, test func(*testing.T, starter)) {
	t.Run("alone", func(t *testing.T) { test(t, start) })
	t.Run("few keys", func(t *testing.T) { asTenants(t, tenants(t, 0), test) })
	t.Run("many keys", func(t *testing.T) { asTenants(t, tenants(t, 7), test) })
}

// atHosts is everybody for a client that asks for a tenant's sealing key. Each tenant has the
// builder at a host of its own, which says whose request it is.
func atHosts(t *testing.T, test func(*testing.T, starter)) {
	t.Run("alone", func(t *testing.T) { test(t, start) })
	t.Run("at hosts", func(t *testing.T) {
		file := tenants(t, 7)
		for name, tenant := range file.Tenants {
			tenant.Hosts = []string{name + ".builder.example.com"}
		}
		asTenants(t, file, test)
	})
}

// tenants is a file with two tenants, and a third one that has n keys.
func tenants(t *testing.T, n int) *stack.Tenants {
	t.Helper()
	var list []*stack.Tenant
	for _, name := range []string{"acme", "globex"} {
		list = append(list, stack.NewTenant(name, stack.Shared(t).Registry.Image(name)))
	}
	if n > 0 {
		crowd := stack.NewTenant("crowd", stack.Shared(t).Registry.Image("crowd"))
		crowd.Keys = nil
		for i := range n {
			crowd.Keys = append(crowd.Keys, stack.TenantKey{ID: fmt.Sprint("k", i), Secret: stack.NewTenant("").Key()})
		}
		list = append(list, crowd)
	}
	return stack.TenantsOf(list...)
}

// asTenants runs a test as acme and as globex at once, on one function.
func asTenants(t *testing.T, file *stack.Tenants, test func(*testing.T, starter)) {
	s, f := stack.Test(t, stack.FunctionConfig{Watchdog: true, Secrets: file.Secret()})
	for _, name := range []string{"acme", "globex"} {
		tenant := file.Tenants[name]
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			as := *f
			as.Secret, as.Images = tenant.Key(), tenant.Images[0]
			as.SecretsDir = stack.Context(t, map[string]string{"payload-secret": tenant.Key() + "\n"})
			if len(tenant.Hosts) > 0 {
				addr := strings.TrimPrefix(f.URL, "http://")
				as.URL = "http://" + tenant.Hosts[0]
				as.HTTP = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
					return new(net.Dialer).DialContext(ctx, network, addr)
				}}}
				t.Cleanup(as.HTTP.CloseIdleConnections)
			}
			test(t, func(t *testing.T, c stack.FunctionConfig) (context.Context, *stack.Stack, *stack.Function) {
				return stack.Within(t, 10*time.Minute), s, &as
			})
		})
	}
}

// within returns an error that names the first of want that text lacks.
func within(text string, want ...string) error {
	for _, w := range want {
		if !strings.Contains(text, w) {
			return fmt.Errorf("%q is not in %q", w, text)
		}
	}
	return nil
}

func sha256Hex(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
