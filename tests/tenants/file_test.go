package tenants_test

import (
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

var timing = flag.Bool("timing", false, "hold a change of the file to 2 s, on a machine that does nothing else")

// inForce is the time in which a change of the file has to count: 2 s with -timing, and
// otherwise so much longer that no machine is too busy for it.
func inForce() time.Duration {
	if *timing {
		return 2 * time.Second
	}
	return 32 * time.Second
}

// TestSuspended: a tenant that is suspended has its builds ended, those that wait and those
// that run, and builds no more. Another tenant's go on.
func TestSuspended(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) { h.acme.Builds = 1 })
	runs, waits, others := mark(), mark(), mark()
	running := background(t, h.of(h.acme), body(t, app(h.acme), "FROM busybox", held(runs)))
	h.s.Buildkitd.WaitStep(t, runs)
	waiting := background(t, h.of(h.acme), body(t, app(h.acme), "FROM busybox", held(waits)))
	theirs := background(t, h.of(h.globex), body(t, app(h.globex), "FROM busybox", held(others)))
	h.s.Buildkitd.WaitStep(t, others)
	if h.s.Buildkitd.Runs(t, waits) {
		t.Error("builds is 1, and two run")
	}

	h.acme.Suspended = true
	h.write(t)
	for what, wait := range map[string]func() client.Answer{"running": running, "waiting": waiting} {
		if a := wait(); a.Code != "suspended" || a.Status != "failed" {
			t.Errorf("what was %s: %v", what, a)
		}
	}
	h.s.Buildkitd.WaitGone(t, runs, patience)
	a := h.of(h.acme).MustPost(t, within(t), body(t, app(h.acme), "FROM scratch"))
	a.WantFailed(t, "suspended")
	if a := h.of(h.acme).MustVerdict(t, within(t), "some-id"); a.Code != "suspended" {
		t.Errorf("GET /builds: %v", a)
	}
	if h.s.Buildkitd.Runs(t, waits) {
		t.Error("what waited has begun")
	}

	h.acme.Suspended = false
	h.write(t)
	h.of(h.acme).MustBuild(t, within(t), body(t, app(h.acme), "FROM scratch", "LABEL a=b"))
	release(t, others)
	theirs().WantSuccess(t)
}

// TestRevokedKeyEndsNothing: what a key has begun goes on without it.
func TestRevokedKeyEndsNothing(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) { h.acme.Builds = 1 })
	runs, waits := mark(), mark()
	running := background(t, h.of(h.acme), body(t, app(h.acme), "FROM busybox", held(runs)))
	h.s.Buildkitd.WaitStep(t, runs)
	waiting := background(t, h.of(h.acme), body(t, app(h.acme), "FROM busybox", held(waits)))
	stack.Eventually(t, patience, func() error {
		if n, err := h.f.Metric("builder_builds_waiting"); err != nil || n != 1 {
			return fmt.Errorf("%v builds wait: %v", n, err)
		}
		return nil
	})

	revoked := h.acme.Key()
	h.acme.Keys = stack.NewTenant("").Keys
	h.write(t)
	if a := h.ask(t, h.acme, revoked); a.StatusCode != http.StatusUnauthorized {
		t.Errorf("the revoked key: %v", a)
	}
	release(t, runs)
	running().WantSuccess(t)
	release(t, waits)
	waiting().WantSuccess(t)
}

// TestInForce: under load, a revoked key counts for inForce at most, and a new key and a
// new tenant count after two.
func TestInForce(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) { h.crowd(200) })
	// Bodies that are read, hashed and refused after their signature.
	noise := stack.Body(t, config{"image": h.globex.Images[0] + "/noise:v1", "buildArgs": 1}, map[string]string{"noise": strings.Repeat("noise", 50_000)})
	ctx := within(t)
	var load sync.WaitGroup
	var sent atomic.Int64
	stop := make(chan struct{})
	for range 4 {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if a, err := h.of(h.globex).Post(ctx, noise); err != nil || a.Code != "bad_config" {
					t.Errorf("the load: %v, %v", a, err)
					return
				}
				sent.Add(1)
			}
		})
	}
	defer load.Wait()
	defer close(stop)

	for range 3 {
		revoked := h.acme.Key()
		added := stack.NewTenant("added-"+strings.ToLower(mark()), h.s.Registry.Image("added-"+strings.ToLower(mark())))
		h.acme.Keys = stack.NewTenant("").Keys
		h.file.Tenants[added.Name] = added
		h.f.WriteSecret(t, stack.TenantsSecret, h.file.YAML())
		began := time.Now()
		waits := map[string]func() bool{
			"revoked":    func() bool { return h.ask(t, h.acme, revoked).StatusCode == http.StatusUnauthorized },
			"new key":    func() bool { return h.ask(t, h.acme, h.acme.Key()).StatusCode == http.StatusNotFound },
			"new tenant": func() bool { return h.ask(t, added, added.Key()).StatusCode == http.StatusNotFound },
		}
		for len(waits) > 0 {
			for name, done := range waits {
				if asked := time.Since(began); done() {
					t.Logf("%s after %v", name, asked.Round(time.Millisecond))
					delete(waits, name)
				} else if asked > inForce() {
					t.Errorf("%s: not in force after %v", name, asked)
					delete(waits, name)
				}
			}
		}
	}
	t.Logf("%d requests beside it", sent.Load())
}

// TestBrokenFile: a file that is half written, wrong or gone changes nothing but the log and
// a metric. A good one counts again.
func TestBrokenFile(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	good := string(h.file.YAML())
	wantFailing := func(want bool) {
		t.Helper()
		stack.Eventually(t, patience, func() error {
			if got, err := h.fileFails(); err != nil || got != want {
				return fmt.Errorf("that the file fails is %v in the metrics, want %v: %v", got, want, err)
			}
			return nil
		})
	}
	wantFailing(false)
	for name, broken := range map[string]func(){
		"half written": func() { h.f.WriteSecret(t, stack.TenantsSecret, []byte(good[:len(good)*2/3])) },
		"empty":        func() { h.f.WriteSecret(t, stack.TenantsSecret, nil) },
		"a key that is unknown": func() {
			h.f.WriteSecret(t, stack.TenantsSecret, []byte(good+"tenant: {}\n"))
		},
		"gone": func() {
			if err := os.Remove(filepath.Join(h.f.SecretsDir, stack.TenantsSecret)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		broken()
		wantFailing(true)
		if a := h.ask(t, h.acme, h.acme.Key()); a.StatusCode != http.StatusNotFound {
			t.Errorf("%s: acme gets %v", name, a)
		}
		if a := h.ask(t, h.globex, h.acme.Key()); a.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s: acme in globex's name gets %v", name, a)
		}
		h.f.MustPost(t, within(t), unsaid(t)).WantFailed(t, "unauthorized") // with the payload secret
		if text, err := h.f.Get(within(t), "/ready"); err != nil {
			t.Errorf("%s: not ready: %s, %v", name, text, err)
		}
		h.write(t)
		wantFailing(false)
	}
	log, err := h.f.Log()
	if err != nil {
		t.Fatal(err)
	}
	// The log names what is wrong, and no key.
	for _, want := range []string{"line ", "tenant"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log does not say %q", want)
		}
	}
	for _, secret := range []string{h.acme.Key(), h.globex.Key(), h.s.PayloadSecret} {
		if strings.Contains(log, secret) {
			t.Error("the log has a key")
		}
	}
}

// fileFails is what the metrics say of the file.
func (h *house) fileFails() (bool, error) {
	stale, err := h.f.Metric("builder_tenants_stale")
	return stale == 1, err
}

// TestWrongAtStart: with a wrong file the function is not ready, and says no more to
// strangers than that.
func TestWrongAtStart(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	acme := stack.NewTenant("acme", s.Registry.Image("acme-at-start"))
	good := stack.TenantsOf(acme)
	for name, test := range map[string]struct {
		file []byte
		env  map[string]string
		says string // in the log
	}{
		"a wrong file":        {file: []byte("version: 1\ntenants:\n  acme:\n    imagse: []\n"), says: "line 4"},
		"the payload secret":  {file: []byte(strings.ReplaceAll(string(good.YAML()), acme.Key(), s.PayloadSecret)), says: "line"},
		"disable_hmac":        {file: good.YAML(), env: map[string]string{"disable_hmac": "true"}, says: "disable_hmac"},
		"a registry mismatch": {file: good.YAML(), env: map[string]string{"allowed_images": "registry.example.com/all"}, says: "allowed_images"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, f := stack.Test(t, stack.FunctionConfig{Unready: true, Env: test.env, Secrets: map[string][]byte{stack.TenantsSecret: test.file}})
			req, err := http.NewRequestWithContext(within(t), http.MethodGet, f.URL+"/ready", nil)
			if err != nil {
				t.Fatal(err)
			}
			if a := f.MustFetch(t, req); a.StatusCode != http.StatusServiceUnavailable || strings.Contains(a.Body, acme.Key()) || strings.Contains(a.Body, "imagse") {
				t.Errorf("/ready: %v", a)
			}
			a := acme.Of(f.Client).MustPost(t, within(t), body(t, app(acme), "FROM scratch"))
			a.WantFailed(t, "not_ready")
			a = f.MustPost(t, within(t), body(t, config{"skipPush": true}, "FROM scratch"), client.Accept(client.NDJSON))
			if a.Code != "not_ready" {
				t.Errorf("with the payload secret: %v", a)
			}
			log, err := f.Log()
			if err != nil || !strings.Contains(log, test.says) || strings.Contains(log, acme.Key()) {
				t.Errorf("the log does not say %q, or has a key: %v\n%s", test.says, err, log)
			}
			if test.env != nil {
				return
			}
			// A good file is all that was missing.
			f.WriteSecret(t, stack.TenantsSecret, good.YAML())
			stack.Eventually(t, patience, func() error {
				_, err := f.Get(within(t), "/ready")
				return err
			})
			acme.Of(f.Client).MustBuild(t, within(t), body(t, app(acme), "FROM scratch", "LABEL a=b"))
		})
	}
}

// TestUpgrade goes from one key to tenants while a client goes on with its key: the payload
// secret gets a new first line, and the old key becomes a tenant's.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	s, f := stack.Test(t, stack.FunctionConfig{})
	acme := stack.NewTenant("acme", s.Registry.Image("upgraded-"+strings.ToLower(mark())))
	build := func(image string) client.Answer {
		t.Helper()
		return f.MustPost(t, within(t), body(t, config{"image": image + "/app:v1"}, "FROM scratch", "LABEL a=b"))
	}
	elsewhere := s.Registry.Image("elsewhere-" + strings.ToLower(mark()))
	build(acme.Images[0]).WantSuccess(t)
	build(elsewhere).WantSuccess(t)

	root := stack.NewTenant("").Key()
	f.WriteSecret(t, "payload-secret", []byte(root+"\n"+f.Secret+"\n"))
	build(acme.Images[0]).WantSuccess(t)
	acme.Keys[0].Secret = f.Secret
	f.WriteSecret(t, stack.TenantsSecret, stack.TenantsOf(acme).YAML())
	stack.Eventually(t, patience, func() error {
		if a := build(elsewhere); a.Code != "image_forbidden" {
			return fmt.Errorf("an image of nobody: %v", a)
		}
		return nil
	})
	build(acme.Images[0]).WantSuccess(t)
	f.Secret = root
	build(acme.Images[0]).WantFailed(t, "unauthorized")
}

// TestSeveralFiles: tenants of several files count together, and one that is missing is an
// error.
func TestSeveralFiles(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	acme, globex := stack.NewTenant("acme", s.Registry.Image("acme-of-two")), stack.NewTenant("globex", s.Registry.Image("globex-of-two"))
	files := map[string][]byte{"one": stack.TenantsOf(acme).YAML(), "two": stack.TenantsOf(globex).YAML()}
	env := map[string]string{"tenants_file": "one,two"}
	_, f := stack.Test(t, stack.FunctionConfig{Env: env, Secrets: files})
	for _, of := range []*stack.Tenant{acme, globex} {
		of.Of(f.Client).MustBuild(t, within(t), body(t, app(of), "FROM scratch", "LABEL a=b"))
	}
	// What is in one file cannot be in the other.
	globex.Images = acme.Images
	f.WriteSecret(t, "two", stack.TenantsOf(globex).YAML())
	stack.Eventually(t, patience, func() error {
		log, err := f.Log()
		if err == nil && !strings.Contains(log, "overlaps") {
			err = errors.New("the log does not tell of the overlap")
		}
		return err
	})
	acme.Of(f.Client).MustBuild(t, within(t), body(t, app(acme), "FROM scratch", "LABEL a=b"))

	delete(files, "two")
	_, f = stack.Test(t, stack.FunctionConfig{Unready: true, Env: env, Secrets: files})
	if text, err := f.Get(within(t), "/ready"); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("without the second file: %s, %v", text, err)
	}
}
