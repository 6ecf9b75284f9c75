package server_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"handler/function/api"
	"handler/function/fair"
	"handler/function/records"
	"handler/function/server"
	"handler/function/signature"
	"handler/function/solve"
)

// tenantFixture is a fixture with a file of tenants.
type tenantFixture struct {
	*fixture
	file *file
}

// startFair makes a file of the tenants in pairs: a name, and further fields, such as
// "builds: 1, queue: 1".
func startFair(t *testing.T, solver *scripted, change func(*server.Config), pairs ...string) *tenantFixture {
	t.Helper()
	f, all := startTenants(t, solver, entries(pairs), change)
	return &tenantFixture{f, all}
}

func entries(pairs []string) (list []string) {
	for i := 0; i < len(pairs); i += 2 {
		more := pairs[i+1]
		if more != "" {
			more += ","
		}
		list = append(list, tenant(pairs[i], more))
	}
	return list
}

// change changes the file, as the Directory does.
func (f *tenantFixture) change(t testing.TB, pairs ...string) {
	f.file.write(t, entries(pairs)...)
	set, _ := f.file.Current()
	f.s.TenantsChanged(set)
}

// send sends a build of a tenant's image. It streams, so that it waits for a slot, unless more
// headers say otherwise.
func (f *tenantFixture) send(t testing.TB, tenant, image string, headers ...string) <-chan answer {
	return f.sendBody(t, tenant, pack(t, fmt.Sprintf(`{"image":"ghcr.io/%s/%s"}`, tenant, image)), headers...)
}

func (f *tenantFixture) sendBody(t testing.TB, tenant string, body []byte, headers ...string) <-chan answer {
	signed := signature.Sign([]byte(keyOf(tenant)), "", body)
	answers := make(chan answer, 1)
	go func() {
		answers <- f.do(t, f.request(t, body, append([]string{"Accept", api.NDJSONType, api.SignatureHeader, signed}, headers...)...))
	}()
	return answers
}

// waiting waits until n builds wait for a slot.
func (f *tenantFixture) waiting(t testing.TB, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d builds wait", n), func() bool {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, f.URL+"/metrics", nil)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(f.do(t, r).body, fmt.Sprintf("builder_builds_waiting %d\n", n))
	})
}

// stepwise makes builds that end one at a time. began has the image of each build in the order in
// which they got their slots.
func stepwise() (s *scripted, began chan string, end chan struct{}) {
	began, end = make(chan string, 200), make(chan struct{})
	return &scripted{solve: func(ctx context.Context, req *solve.Request, _ solve.Log) (solve.Outcome, solve.Stats, error) {
		began <- req.Config.Image
		select {
		case <-end:
			return solve.Outcome{Digest: "sha256:abc"}, solve.Stats{}, nil
		case <-ctx.Done():
			return solve.Outcome{}, solve.Stats{}, context.Cause(ctx)
		}
	}}, began, end
}

// next is the image of the build that gets a slot next.
func next(t testing.TB, began <-chan string) string {
	t.Helper()
	select {
	case image := <-began:
		return image
	case <-time.After(limit):
		t.Fatal("no build gets a slot")
		return ""
	}
}

// ending is the answer to a build that has to end now.
func ending(t testing.TB, answers <-chan answer) answer {
	t.Helper()
	select {
	case a := <-answers:
		return a
	case <-time.After(limit):
		t.Fatal("the build goes on")
		return answer{}
	}
}

// TestFair: a build waits for one slot at most, however many of another tenant wait.
func TestFair(t *testing.T) {
	solver, began, end := stepwise()
	f := startFair(t, solver, func(c *server.Config) { c.MaxBuilds = 2 }, "many", "", "one", "")
	var answers []<-chan answer
	for i := range 20 {
		answers = append(answers, f.send(t, "many", fmt.Sprint(i)))
	}
	f.waiting(t, 18)
	answers = append(answers, f.send(t, "one", "next"))
	f.waiting(t, 19)
	for range 2 {
		next(t, began)
	}
	end <- struct{}{}
	if image := next(t, began); image != "ghcr.io/one/next" {
		t.Errorf("the slot went to %s", image)
	}
	close(end)
	for _, a := range answers {
		if a := ending(t, a); a.rec.Status != api.Success {
			t.Errorf("%s", a.body)
		}
	}
}

// TestTenantBusy holds what a tenant is told that has all its builds, or its queue.
func TestTenantBusy(t *testing.T) {
	solver, began, end := stepwise()
	f := startFair(t, solver, func(c *server.Config) { c.MaxBuilds = 3 }, "few", "builds: 1, queue: 1", "other", "")
	runs := f.send(t, "few", "runs")
	next(t, began)
	if a := ending(t, f.send(t, "few", "x", "Accept", "")); a.status != http.StatusTooManyRequests || a.rec.Code != api.TenantBusy || !strings.Contains(a.rec.Error, "1 builds of the tenant are running") {
		t.Errorf("one too many: %d %s", a.status, a.body)
	}
	waits := f.send(t, "few", "waits")
	f.waiting(t, 1)
	for name, headers := range map[string][]string{
		"a queue":  {"Accept", "", api.CallbackHeader, calledBack},
		"a stream": nil,
	} {
		want := map[string]int{"a queue": http.StatusServiceUnavailable, "a stream": http.StatusOK}[name]
		if a := ending(t, f.send(t, "few", "x", headers...)); a.status != want || a.rec.Code != api.TenantBusy || !strings.Contains(a.rec.Error, "its queue allows no more") {
			t.Errorf("%s, with the tenant's queue full: %d %s", name, a.status, a.body)
		}
	}
	other := f.send(t, "other", "runs", "Accept", "")
	if image := next(t, began); image != "ghcr.io/other/runs" {
		t.Errorf("%s runs", image)
	}
	close(end)
	for _, a := range []<-chan answer{runs, waits, other} {
		if a := ending(t, a); a.rec.Status != api.Success {
			t.Errorf("%s", a.body)
		}
	}
}

func TestTenantQueueTimeout(t *testing.T) {
	solver, began, end := stepwise()
	f := startFair(t, solver, func(c *server.Config) { c.QueueWait = 50 * time.Millisecond }, "few", "builds: 1")
	runs := f.send(t, "few", "runs")
	next(t, began)
	a := ending(t, f.send(t, "few", "x", "Accept", "", api.CallbackHeader, calledBack))
	if a.status != http.StatusServiceUnavailable || a.rec.Code != api.QueueTimeout || !strings.Contains(a.rec.Error, "builds of the tenant") || !strings.Contains(a.rec.Error, "queue_wait has passed") {
		t.Errorf("%d %s", a.status, a.body)
	}
	close(end)
	<-runs
}

// TestBuildsElsewhere counts the builds that another replica has for a tenant: as the replica tells
// or, unless all replicas tell, as the daemons say. The higher number of the two counts.
func TestBuildsElsewhere(t *testing.T) {
	for _, tt := range []struct {
		name             string
		shared, complete bool
		told, said       int // of each build
	}{
		{"said by the daemons", false, false, 0, 1},
		{"told by all", true, true, 1, 9},
		{"told by some", true, false, 1, 0},
		{"told by none", true, false, 0, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var there atomic.Int32
			solver, began, end := stepwise()
			solver.running = func(tenant string) int {
				if tenant != "t-wide" {
					return 0
				}
				return tt.said * int(there.Load())
			}
			solver.lone = tt.shared // a lone daemon is not counted, but other replicas tell
			elsewhere(t, solver, began, end, &there, func(c *server.Config) {
				if tt.shared {
					c.Elsewhere = func() records.Load {
						return records.Load{Tenants: map[string]int{"t-wide": tt.told * int(there.Load())}, Others: 1, Complete: tt.complete}
					}
				}
			})
		})
	}
}

// TestBuildsAlone: if no other replica is there, builds of a tenant begin at once.
func TestBuildsAlone(t *testing.T) {
	solver, began, end := stepwise()
	solver.running = func(string) int { t.Error("the daemons are asked"); return 0 }
	f := startFair(t, solver, func(c *server.Config) {
		c.MaxBuilds = 9
		c.Elsewhere = func() records.Load { return records.Load{Complete: true} }
	}, "wide", "builds: 8")
	var all []<-chan answer
	sent := time.Now()
	for i := range 8 {
		all = append(all, f.send(t, "wide", fmt.Sprint(i)))
	}
	for range 8 {
		next(t, began)
	}
	if took := time.Since(sent); took > 4*time.Second {
		t.Errorf("eight builds began after %v: one a second, as with another replica", took)
	}
	close(end)
	for _, a := range all {
		if a := ending(t, a); a.rec.Status != api.Success {
			t.Errorf("%s", a.body)
		}
	}
}

// elsewhere has a tenant wait until there is one build less in another replica.
func elsewhere(t *testing.T, solver *scripted, began chan string, end chan struct{}, there *atomic.Int32, change func(*server.Config)) {
	there.Store(2)
	f := startFair(t, solver, change, "wide", "builds: 2", "other", "builds: 2")
	if a := ending(t, f.send(t, "wide", "x", "Accept", "")); a.status != http.StatusTooManyRequests || a.rec.Code != api.TenantBusy {
		t.Errorf("%d %s", a.status, a.body)
	}
	waits := f.send(t, "wide", "waits")
	f.waiting(t, 1)
	other := f.send(t, "other", "runs", "Accept", "")
	if image := next(t, began); image != "ghcr.io/other/runs" {
		t.Errorf("%s runs", image)
	}
	there.Store(1)
	if image := next(t, began); image != "ghcr.io/wide/waits" {
		t.Errorf("%s runs", image)
	}
	close(end)
	<-waits
	<-other
}

// TestSuspendedBuilds ends what a tenant has waiting and running, and nothing else.
func TestSuspendedBuilds(t *testing.T) {
	solver, began, end := stepwise()
	f := startFair(t, solver, func(c *server.Config) { c.MaxBuilds = 3 }, "bad", "", "gone", "", "good", "")
	bad := f.send(t, "bad", "runs", "Accept", "")
	gone := f.send(t, "gone", "runs")
	good := f.send(t, "good", "runs", "Accept", "")
	for range 3 {
		next(t, began)
	}
	waits := f.send(t, "bad", "waits", "Accept", "", api.CallbackHeader, calledBack, api.CallIDHeader, "call")
	f.waiting(t, 1)
	f.change(t, "bad", "suspended: true", "good", "")
	for name, a := range map[string]<-chan answer{"a build": bad, "a waiting build": waits} {
		if a := ending(t, a); a.status != http.StatusForbidden || a.rec.Code != api.Suspended {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
	if a := ending(t, gone); a.rec.Code != api.Suspended {
		t.Errorf("a build of a tenant that is gone: %s", a.body)
	}
	if a := ending(t, f.send(t, "bad", "x", "Accept", "")); a.status != http.StatusForbidden || a.rec.Code != api.Suspended {
		t.Errorf("a new build: %d %s", a.status, a.body)
	}
	// A key that is revoked ends nothing.
	revoked := strings.ReplaceAll(tenant("good", ""), keyOf("good"), keyOf("good later"))
	f.file.write(t, tenant("bad", ""), revoked)
	set, _ := f.file.Current()
	f.s.TenantsChanged(set)
	end <- struct{}{}
	if a := ending(t, good); a.status != http.StatusOK {
		t.Errorf("a build whose key was revoked: %d %s", a.status, a.body)
	}
	// The verdict of a suspended build is not kept for the next delivery.
	f.change(t, "bad", "", "good", "")
	again := f.send(t, "bad", "waits", "Accept", "", api.CallbackHeader, calledBack, api.CallIDHeader, "call")
	next(t, began)
	close(end)
	if a := ending(t, again); a.status != http.StatusOK {
		t.Errorf("delivered again, not suspended any more: %d %s", a.status, a.body)
	}
}

// TestSuspendedMeanwhile suspends a tenant after its signature has passed and before its build is
// known to the one who ends builds.
func TestSuspendedMeanwhile(t *testing.T) {
	f := startFair(t, &scripted{}, nil, "bad", "suspended: true", "good", "")
	for tenant, want := range map[string]api.Code{"t-bad": api.Suspended, "t-gone": api.Suspended, "t-good": "", "": ""} {
		ctx, cancel := context.WithCancelCause(t.Context())
		end := f.s.Working(tenant, cancel)
		var got api.Code
		if err := context.Cause(ctx); err != nil {
			got = api.AsError(err).Code
		}
		if got != want {
			t.Errorf("%q: %q, want %q", tenant, got, want)
		}
		end()
		cancel(nil)
	}
}

// TestShareOfDisk has bodies of one tenant fill its half of the disk.
func TestShareOfDisk(t *testing.T) {
	solver, began, end := stepwise()
	f := startFair(t, solver, func(c *server.Config) {
		c.SpoolMemory, c.SpoolBytes, c.MaxBuilds = 1<<10, 400<<10, 10
	}, "many", "", "one", "")
	body := func(tenant, image string) []byte {
		return pack(t, fmt.Sprintf(`{"image":"ghcr.io/%s/%s"}`, tenant, image), "context/x", strings.Repeat(image, 40<<10))
	}
	var answers []<-chan answer
	for _, image := range []string{"a", "b", "c", "d"} {
		answers = append(answers, f.sendBody(t, "many", body("many", image)))
		next(t, began)
	}
	for name, headers := range map[string][]string{"a build": {"Accept", ""}, "a queue": {"Accept", "", api.CallbackHeader, calledBack}} {
		want := map[string]int{"a build": http.StatusTooManyRequests, "a queue": http.StatusServiceUnavailable}[name]
		if a := ending(t, f.sendBody(t, "many", body("many", "e"), headers...)); a.status != want || a.rec.Code != api.TenantBusy || !strings.Contains(a.rec.Error, "max_spool_bytes") {
			t.Errorf("%s over the half: %d %s", name, a.status, a.body)
		}
	}
	answers = append(answers, f.sendBody(t, "one", body("one", "a")))
	if image := next(t, began); image != "ghcr.io/one/a" {
		t.Errorf("%s runs", image)
	}
	close(end)
	for _, a := range answers {
		if a := ending(t, a); a.rec.Status != api.Success {
			t.Errorf("%s", a.body)
		}
	}
	eventually(t, "all shares are given back", func() bool { return f.s.Shares() == 0 })
	if a := ending(t, f.sendBody(t, "many", body("many", "e"), "Accept", "")); a.status != http.StatusOK {
		t.Errorf("after the end: %d %s", a.status, a.body)
	}
}

// TestOneTenantHasAll holds what there is without a file: no share, and no limit but max_builds.
func TestOneTenantHasAll(t *testing.T) {
	solver, began, end := stepwise()
	f := start(t, solver, func(c *server.Config) { c.SpoolMemory, c.SpoolBytes, c.MaxBuilds = 1<<10, 400<<10, 10 })
	var answers []<-chan answer
	for i := range 7 {
		answers = append(answers, f.deliver(t, fmt.Sprint(i), pack(t, config, "context/x", strings.Repeat(fmt.Sprint(i), 40<<10))))
		next(t, began)
	}
	if f.s.Shares() != 0 {
		t.Error("the only tenant has a share")
	}
	close(end)
	for _, a := range answers {
		if a := ending(t, a); a.status != http.StatusOK {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
	if log := f.log.String(); strings.Contains(log, "tenant") || strings.Contains(log, `"usage"`) {
		t.Errorf("the log has a tenant: %s", log)
	}
}

// TestShareOfUnpacked: what a body is unpacked to counts too.
func TestShareOfUnpacked(t *testing.T) {
	f := startFair(t, &scripted{}, func(c *server.Config) { c.SpoolMemory, c.SpoolBytes = 1<<10, 400<<10 }, "many", "")
	for size, want := range map[int]api.Code{100 << 10: "", 300 << 10: api.TenantBusy, 500 << 10: api.TenantBusy} {
		body := gzipped(t, pack(t, `{"image":"ghcr.io/many/app"}`, "context/x", strings.Repeat("x", size)))
		if a := ending(t, f.sendBody(t, "many", body)); a.rec.Code != want {
			t.Errorf("%d bytes: %s", size, a.body)
		}
	}
}

// TestSuspendedContext ends a context on its way to the registry.
func TestSuspendedContext(t *testing.T) {
	store := &stuck{inMemory: inMemory{all: make(map[string][]byte)}, putting: make(chan string, 1)}
	f := startFair(t, &scripted{}, func(c *server.Config) { c.Contexts = store }, "bad", "", "good", "")
	body := packTar(t, "context/Dockerfile", "FROM scratch\n")
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPut, f.URL+"/contexts/"+digestOf(body), bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set(api.SignatureHeader, signature.Sign([]byte(keyOf("bad")), "", body))
	answers := make(chan answer, 1)
	go func() { answers <- f.do(t, r) }()
	next(t, store.putting)
	f.change(t, "bad", "suspended: true", "good", "")
	if a := ending(t, answers); a.status != http.StatusForbidden || a.rec.Code != api.Suspended {
		t.Errorf("%d %s", a.status, a.body)
	}
}

// stuck is a registry whose Put ends with its context.
type stuck struct {
	inMemory
	putting chan string
}

func (s *stuck) Put(ctx context.Context, tenant, _ string, _ int64, _ func() io.Reader) error {
	s.putting <- tenant
	<-ctx.Done()
	return context.Cause(ctx)
}

func gzipped(t testing.TB, body []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(body)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestContextsAreShared: while a tenant's context is checked, its next one waits, and another
// tenant's does not.
func TestContextsAreShared(t *testing.T) {
	store := &inMemory{all: make(map[string][]byte)}
	f := startFair(t, &scripted{}, func(c *server.Config) { c.Contexts, c.QueueWait = store, 50*time.Millisecond }, "many", "", "one", "")
	if !f.s.ContextSlots().Try(fair.Tenant{ID: "t-many", Most: 1}) {
		t.Fatal("no slot")
	}
	body := packTar(t, "context/Dockerfile", "FROM scratch\n")
	for name, want := range map[string]api.Code{"many": api.QueueTimeout, "one": ""} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPut, f.URL+"/contexts/"+digestOf(body), bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set(api.SignatureHeader, signature.Sign([]byte(keyOf(name)), "", body))
		r.Header.Set(api.TenantHeader, name)
		if a := f.do(t, r); a.rec.Code != want {
			t.Errorf("%s: %d %s, want %q", name, a.status, a.body, want)
		}
	}
}
