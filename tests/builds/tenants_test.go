package builds

import (
	"net/http"
	"testing"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestTenants has two tenants and an operator ask for the builds of one of them.
func TestTenants(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	acme := stack.NewTenant("acme", s.Registry.Image("acme"))
	globex := stack.NewTenant("globex", s.Registry.Image("globex"))
	operator := stack.NewTenant("operator")
	file := stack.TenantsOf(acme, globex)
	file.Operator = &stack.Operator{Keys: operator.Keys}
	h := newHouse(t, stack.FunctionConfig{Secrets: file.Secret()})
	at := func(f *stack.Function, who *stack.Tenant) *client.Client { return who.Of(f.Client) }
	ops := at(h.b, operator)
	ops.Tenant = "" // an operator is no tenant
	connected(t, at(h.a, acme))
	connected(t, at(h.b, acme))
	connected(t, ops)
	ctx := within(t)

	// Both have a build of the same id, on different replicas.
	m, n := mark(), mark()
	dockerfile := func(m string) map[string]string {
		return stack.Dockerfile("FROM busybox", held(m))
	}
	app := func(who *stack.Tenant) map[string]any { return map[string]any{"image": who.Images[0] + "/app:v1"} }
	built := background(t, at(h.a, acme), stack.Body(t, app(acme), dockerfile(m)), named(m))
	waitStep(t, m)
	for _, f := range []*stack.Function{h.a, h.b} {
		// It is known everywhere, to whom it belongs.
		waitRecord(t, at(f, acme), m, func(a client.Answer) bool { return a.Status == "in_progress" })
		c := at(f, globex)
		if l := c.MustList(t, ctx, ""); !l.Complete || len(l.Builds) != 0 {
			t.Errorf("the other tenant lists %+v", l)
		}
		if l := c.MustList(t, ctx, "image="+acme.Images[0]+"/app"); len(l.Builds) != 0 {
			t.Errorf("the other tenant lists an image: %+v", l)
		}
		c.MustVerdict(t, ctx, m).WantFailed(t, "not_found")
		c.MustStop(t, ctx, m).WantFailed(t, "not_found")
		c.MustReadLog(t, ctx, m, "follow=1").WantFailed(t, "not_found")
		for _, query := range []string{"tenant=" + acme.ID} {
			if l, err := c.Builds(ctx, query); err == nil {
				t.Errorf("a tenant may ask for another's list: %+v", l)
			}
			c.MustStop(t, ctx, m+"?"+query).WantFailed(t, "bad_query")
		}
	}
	if l := at(h.b, acme).MustList(t, ctx, ""); len(l.Builds) != 1 || l.Builds[0].ID != m || l.Builds[0].Tenant != "" {
		t.Errorf("the tenant lists %+v", l)
	}

	others := background(t, at(h.b, globex), stack.Body(t, app(globex), dockerfile(n)), named(m))
	waitStep(t, n)
	waitRecord(t, at(h.a, globex), m, func(a client.Answer) bool { return a.Status == "in_progress" })
	l := ops.MustList(t, ctx, "status=in_progress")
	if len(l.Builds) != 2 || l.Builds[0].Tenant != globex.ID || l.Builds[1].Tenant != acme.ID || l.Builds[1].Image != acme.Images[0]+"/app:v1" {
		t.Errorf("the operator lists %+v", l)
	}
	if l := ops.MustList(t, ctx, "tenant="+acme.ID); len(l.Builds) != 1 || l.Builds[0].Tenant != acme.ID {
		t.Errorf("the operator lists one tenant: %+v", l)
	}
	// Operators read no log, and build nothing.
	ops.MustReadLog(t, ctx, m, "follow=1").WantFailed(t, "unauthorized")
	ops.MustPost(t, ctx, stack.Body(t, app(acme), dockerfile(m))).WantFailed(t, "unauthorized")
	// The id alone is not enough here.
	ops.MustStop(t, ctx, m).WantFailed(t, "bad_query", "tenant=")
	if a := stop(t, ops, m+"?tenant="+acme.ID, http.StatusAccepted); a.Build.Tenant != acme.ID {
		t.Errorf("the operator stops: %v", a)
	}
	waitGone(t, m)
	if a := built(); a.Code != "canceled" {
		t.Errorf("the tenant was told %v", a)
	}
	// The other replica knows soon what the caller knows.
	b, _ := waitRecord(t, at(h.b, acme), m, func(a client.Answer) bool { return a.Status == "failed" })
	wantStopped(t, b.Build, "operator/"+operator.Keys[0].ID)
	if b.Build.Tenant != "" {
		t.Errorf("a tenant is told its own id: %+v", b.Build)
	}

	// The other's build of this id goes on. Its owner follows and stops it from the other replica.
	begun, followed := follow(t, at(h.a, globex), m, "follow=1")
	<-begun
	stop(t, at(h.a, globex), m, http.StatusAccepted)
	a := others()
	if a.Code != "canceled" {
		t.Errorf("the other tenant was told %v", a)
	}
	log := followed()
	wantSame(t, "the follower", log.Texts(), a.Log)
	wantStopped(t, log.Build, globex.ID+"/"+globex.Keys[0].ID)
}
