package openfaas

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestTenants has two tenants at one gateway, with clients that do not say whose they are:
// among more than eight keys the config's image says it. Each gets its own answers, signed
// with its own key, and from the queue its own callbacks.
func TestTenants(t *testing.T) {
	s := stack.Shared(t)
	acme, globex := stack.NewTenant("acme", s.Registry.Image("acme")), stack.NewTenant("globex", s.Registry.Image("globex"))
	crowd := stack.NewTenant("crowd", s.Registry.Image("crowd"))
	for i := range 7 {
		crowd.Keys = append(crowd.Keys, stack.TenantKey{ID: fmt.Sprint("k", i+2), Secret: stack.NewTenant("").Key()})
	}
	env := map[string]string{"context_repository": s.Registry.Image("builder/contexts-of-tenants")}
	file := stack.TenantsOf(acme, globex, crowd)
	// The queue delivers each call again, while its build runs and after it.
	_, _, o := around(t, stack.OpenFaaSConfig{AckWait: time.Second, Workers: 4}, stack.FunctionConfig{Watchdog: true, Env: env, Secrets: file.Secret()})
	m := mark()
	ahead, digest := contextTar(t, 1000)
	for _, of := range []*stack.Tenant{acme, globex} {
		t.Run(of.Name, func(t *testing.T) {
			t.Parallel()
			as := *o
			as.Secret = of.Key()
			image := func(name string) string { return of.Images[0][strings.IndexByte(of.Images[0], '/')+1:] + "/" + name }
			signed := func(a client.Answer) {
				t.Helper()
				if got := a.Header.Get("X-Build-Signature"); got != client.Sign(of.Key(), []byte(a.Body)) {
					t.Errorf("not signed with the key of %s: %v", of.Name, a)
				}
			}
			// The same Dockerfile as the other tenant's, at the same time.
			body := request(t, s, image("app"), "FROM busybox", "RUN cat /proc/sys/kernel/random/uuid; : "+m)
			for accept, contentType := range map[string]string{"": "application/json", both: client.NDJSON, client.SSE: client.SSE} {
				a := post(t, &as, "/function/builder/build", body, client.Accept(accept))
				if a.StatusCode != http.StatusOK || a.Status != "success" || a.Header.Get("Content-Type") != contentType {
					t.Errorf("Accept %q: %v", accept, a)
				}
				if accept == "" {
					signed(a)
				}
			}
			// faas-cli invoke, and the UI.
			a := post(t, &as, "/function/builder.openfaas-fn", body, client.Header("Content-Type", "text/plain"), client.Header("User-Agent", "faas-cli/0.18.12"))
			if a.Status != "success" {
				t.Errorf("invoke: %v", a)
			}
			envelope := fmt.Appendf(nil, `{"signature":%q,"tar":%q}`, client.Sign(of.Key(), body), base64.StdEncoding.EncodeToString(body))
			a = post(t, &as, "/function/builder", envelope, client.Signature(""), client.Header("Content-Type", "text/plain"))
			if a.Status != "success" {
				t.Errorf("the UI: %v", a)
			}

			// The queue. The other tenant's calls have the same id.
			r := newReceiver(t)
			slow := request(t, s, image("queued"), "FROM busybox", "RUN sleep 3; : "+mark())
			id := "one-id-" + m
			enqueue(t, &as, slow, callbackTo(r), client.Header("X-Call-Id", id))
			first, second := r.next(t), r.next(t)
			for _, c := range []client.Answer{first, second} {
				if c.StatusCode != http.StatusOK || c.Status != "success" || c.Image != of.Images[0]+"/queued:v1" || c.Digest != first.Digest {
					t.Errorf("a callback: %v", c)
				}
				signed(c)
			}
			if n := s.Registry.Pushes(t, image("queued")); n != 1 {
				t.Errorf("%d pushes, want 1", n)
			}
			// What has no image names the tenant.
			named := of.Of(*function(&as))
			v := named.MustVerdict(t, t.Context(), id)
			if v.StatusCode != http.StatusOK || v.Digest != first.Digest {
				t.Errorf("GET /builds: %v", v)
			}
			if v := verdict(t, &as, id); v.StatusCode != http.StatusUnauthorized {
				t.Errorf("GET /builds without a name: %v", v)
			}
			if status := sendAhead(t, named, "PUT", digest, ahead); status != http.StatusCreated {
				t.Errorf("a context ahead: HTTP %d, want 201", status)
			}
			a = post(t, &as, "/function/builder/build", small(t, of.Images[0]+"/ahead:v1", digest))
			if a.Status != "success" {
				t.Errorf("its build: %v", a)
			}
		})
	}
}
