package tenants_test

import (
	"fmt"
	"strings"
	"testing"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestGuess is what ISOLATION.md says is not closed: who guesses a tenant's Dockerfile and files
// is told that somebody has built them. The file is a PIN: a wrong guess is told apart.
func TestGuess(t *testing.T) {
	h := newHouse(t, nil)
	build := func(of *stack.Tenant, pin string) client.Record {
		return h.of(of).MustBuild(t, within(t), stack.Body(t, app(of), map[string]string{
			"Dockerfile": "FROM busybox\nCOPY pin /\n",
			"pin":        fmt.Sprintf("%s of %s", pin, h.acme.Name), // no other test's
		}))
	}
	cached := func(r client.Record) bool {
		for _, line := range r.Log {
			if strings.Contains(line, "COPY pin") && strings.HasSuffix(line, " CACHED") {
				return true
			}
		}
		return false
	}
	if cached(build(h.acme, "4711")) {
		t.Fatal("acme's own first build is from the cache")
	}
	if cached(build(h.globex, "4712")) {
		t.Error("a wrong guess is from the cache")
	}
	if !cached(build(h.globex, "4711")) {
		t.Error("a right guess cannot be told: ISOLATION.md says that it can")
	}
}
