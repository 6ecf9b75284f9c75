package faults

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/stack"
)

// delivery is a body as a queue sends it.
func delivery(t *testing.T, f *stack.Function, body []byte, callID string) *http.Request {
	t.Helper()
	req, err := f.Request(testContext(t), body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Call-Id", callID)
	req.Header.Set("X-Callback-Url", "http://127.0.0.1/")
	return req
}

// deliver sends a delivery in a goroutine. wait returns what came of it.
func deliver(t *testing.T, f *stack.Function, body []byte, callID string) (wait func() answer) {
	req := delivery(t, f, body, callID)
	type result struct {
		answer
		err error
	}
	ch := make(chan result, 1)
	go func() {
		a, err := do(http.DefaultClient, req)
		ch <- result{a, err}
	}()
	return func() answer {
		t.Helper()
		r := <-ch
		if r.err != nil {
			t.Fatal(r.err)
		}
		return r.answer
	}
}

// follow is deliver to a replica that finds the build running, and returns when it has
// found it.
func follow(t *testing.T, f *stack.Function, body []byte, callID string) (wait func() answer) {
	t.Helper()
	req := delivery(t, f, body, callID)
	req.Header.Set("Accept", ndjson)
	following, ended := make(chan struct{}), make(chan struct{})
	found := sync.OnceFunc(func() { close(following) })
	var a answer
	var err error
	go func() {
		defer close(ended)
		var resp *http.Response
		if resp, err = http.DefaultClient.Do(req); err != nil {
			return
		}
		defer resp.Body.Close()
		a, err = read(resp, func(r stack.Record) {
			if strings.Contains(strings.Join(r.Log, "\n"), "following it") {
				found()
			}
		})
	}()
	select {
	case <-following:
	case <-ended:
		t.Fatalf("it followed nothing: %v, %v", a, err)
	}
	return func() answer {
		t.Helper()
		<-ended
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
}

// verdict asks GET /builds.
func verdict(t *testing.T, f *stack.Function, callID string) (status int, rec stack.Record) {
	t.Helper()
	path := "/builds/" + callID
	req, err := http.NewRequestWithContext(testContext(t), http.MethodGet, f.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Build-Signature", stack.Sign(f.Secret, []byte("GET "+path)))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&rec); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, rec
}

// pushes counts the manifests that the registry took for a repository.
func pushes(t *testing.T, s *stack.Stack, repository string) int {
	t.Helper()
	log, err := os.ReadFile(s.Registry.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(log), `"PUT /v2/`+repository+`/manifests/`)
}

// replicas are two functions that know nothing of each other.
func replicas(t *testing.T) (*stack.Stack, *stack.Buildkitd, *stack.Function, *stack.Function) {
	t.Helper()
	s, b, one := start(t, stack.FunctionConfig{})
	_, _, two := start(t, stack.FunctionConfig{})
	return s, b, one, two
}

// queued is a build that sleeps for d and pushes to a repository of the test's.
func queued(t *testing.T, s *stack.Stack, d time.Duration) (body []byte, repository, m string) {
	m = mark()
	repository = strings.ToLower(m)
	config := &builder.BuildConfig{Image: s.Registry.Image(repository + ":v1")}
	return request(t, config, "FROM busybox", sleep(m, d)), repository, m
}

// TestReplicaFollows delivers to one replica what another builds.
func TestReplicaFollows(t *testing.T) {
	t.Parallel()
	s, b, one, two := replicas(t)
	body, repository, m := queued(t, s, 5*time.Minute)
	if status, rec := verdict(t, two, m); status != http.StatusNotFound || rec.Code != "not_found" {
		t.Errorf("before: HTTP %d, %+v", status, rec)
	}
	first := deliver(t, one, body, m)
	waitStep(t, b, m)
	second := follow(t, two, body, m)
	for _, f := range []*stack.Function{one, two} {
		if status, rec := verdict(t, f, m); status != http.StatusAccepted || rec.Status != "in_progress" {
			t.Errorf("meanwhile: HTTP %d, %+v", status, rec)
		}
	}
	release(t, m)
	a, other := first(), second()
	a.wantSuccess(t)
	other.wantSuccess(t)
	if a.Digest != other.Digest || a.Digest == "" {
		t.Errorf("digests %s and %s", a.Digest, other.Digest)
	}
	if log := strings.Join(other.Log, "\n"); !strings.Contains(log, m) {
		t.Errorf("who followed saw no step: %s", log)
	}

	// Later, to either, and to one that has seen nothing of it.
	_, _, three := start(t, stack.FunctionConfig{})
	for _, f := range []*stack.Function{one, two, three} {
		again := deliver(t, f, body, m)()
		again.wantSuccess(t)
		if again.Digest != a.Digest {
			t.Errorf("delivered again: %s, want %s", again.Digest, a.Digest)
		}
	}
	if ends := logged(t, three); len(ends) != 1 || ends[0]["attempts"] != 0.0 {
		t.Errorf("the third replica built: %v", ends)
	}
	if n := pushes(t, s, repository); n != 1 {
		t.Errorf("%d pushes, want 1", n)
	}
}

// TestReplicasAtOnce delivers to both at the same moment.
func TestReplicasAtOnce(t *testing.T) {
	t.Parallel()
	s, _, one, two := replicas(t)
	for range 5 {
		body, repository, m := queued(t, s, time.Second)
		first, second := deliver(t, one, body, m), deliver(t, two, body, m)
		a, other := first(), second()
		a.wantSuccess(t)
		other.wantSuccess(t)
		if a.Digest != other.Digest {
			t.Errorf("digests %s and %s", a.Digest, other.Digest)
		}
		if n := pushes(t, s, repository); n != 1 {
			t.Errorf("%d pushes, want 1", n)
		}
	}
}

// TestReplicaTakesOver kills the one that builds: the other, which followed,
// builds.
func TestReplicaTakesOver(t *testing.T) {
	t.Parallel()
	s, b, one, two := replicas(t)
	body, repository, m := queued(t, s, 5*time.Minute)
	go func() {
		if resp, err := http.DefaultClient.Do(delivery(t, one, body, m)); err == nil {
			resp.Body.Close()
		}
	}()
	waitStep(t, b, m)
	second := follow(t, two, body, m)
	before := sleepers(t, m)
	one.Kill()
	eventually(t, time.Minute, func() error {
		if now := sleepers(t, m); len(now) != 1 || slices.Equal(now, before) {
			return fmt.Errorf("the other does not build: %v slept, and %v sleep", before, now)
		}
		return nil
	})
	release(t, m)
	a := second()
	a.wantSuccess(t)
	if n := pushes(t, s, repository); n != 1 {
		t.Errorf("%d pushes, want 1", n)
	}
}

// TestReplicaTakesOverPush kills the one that builds in mid-push: what it took for
// that is not the other's, which has all of push_timeout.
func TestReplicaTakesOverPush(t *testing.T) {
	t.Parallel()
	env := map[string]string{"push_timeout": "20s"}
	s, _, one := start(t, stack.FunctionConfig{Env: env})
	_, _, two := start(t, stack.FunctionConfig{Env: env})
	proxy := newFaultProxy(t, s.Registry.Addr)
	proxy.set(&fault{blobBody, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		time.Sleep(12 * time.Second)
		next.ServeHTTP(w, r)
	}})
	m := mark()
	repository := strings.ToLower(m)
	body := layered(t, &builder.BuildConfig{Image: proxy.addr + "/" + repository + ":v1"}, 1<<20)
	go func() {
		if resp, err := http.DefaultClient.Do(delivery(t, one, body, m)); err == nil {
			resp.Body.Close()
		}
	}()
	eventually(t, time.Minute, func() error {
		if n, _ := proxy.broken(); n == 0 {
			return errors.New("nothing is pushed")
		}
		return nil
	})
	second := deliver(t, two, body, m)
	time.Sleep(10 * time.Second) // half of push_timeout, and not yet all of the blob
	one.Kill()
	a := second()
	a.wantSuccess(t)
	if log := strings.Join(a.Log, "\n"); !strings.Contains(log, "following it") {
		t.Errorf("it followed nothing: %s", log)
	}
	if d := digest(t, s.Registry.Image(repository+":v1")); d != a.Digest {
		t.Errorf("the tag is %s, the answer %s", d, a.Digest)
	}
}

// TestReplicasOfPool delivers to a replica that would place the build on another
// daemon of the pool than where it runs, or has run.
func TestReplicasOfPool(t *testing.T) {
	t.Parallel()
	list := daemons(t, 3)
	env := map[string]string{"daemon_builds": "1"}
	s, one := pool(t, list, env)
	_, two := pool(t, list, env)
	_, three := pool(t, list, env)
	_, four := pool(t, list, env)
	body, repository, m := queued(t, s, 5*time.Minute)
	first := deliver(t, one, body, m)
	var home *stack.Buildkitd
	for b := range running(t, list, []app{{mark: m}}) {
		home = b
	}
	// elsewhere shows that another build of the repository is not placed there.
	elsewhere := func(f *stack.Function) {
		t.Helper()
		a := app{image: s.Registry.Image(repository + ":other"), mark: mark()}
		mustSend(t, f, request(t, &builder.BuildConfig{Image: a.image, SkipPush: true}, "FROM busybox", "RUN : "+a.mark), jsonForm).wantSuccess(t)
		if addr, line := a.placed(t, f); addr == home.Addr || line["choice"] != "full" {
			t.Errorf("a build without a name is on %s, %v; the first runs on %s", addr, line["choice"], home.Addr)
		}
	}
	// found checks what the last delivery to f came to.
	found := func(f *stack.Function, got, want answer) {
		t.Helper()
		got.wantSuccess(t)
		if got.Digest != want.Digest || got.Digest == "" {
			t.Errorf("digests %s and %s", got.Digest, want.Digest)
		}
		ends := logged(t, f)
		if line := ends[len(ends)-1]; line["attempts"] != 0.0 || line["daemon"] != home.Addr {
			t.Errorf("built again, or asked at the wrong daemon: %v", line)
		}
	}
	elsewhere(two)
	second := follow(t, two, body, m)
	release(t, m)
	a := first()
	a.wantSuccess(t)
	followed := second()
	found(two, followed, a)
	if log := strings.Join(followed.Log, "\n"); !strings.Contains(log, "following it") {
		t.Errorf("it followed nothing: %s", log)
	}

	// Now that it has ended: another build has its place there.
	busy := app{image: s.Registry.Image(repository + ":busy"), mark: mark()}
	wait := background(t, one, request(t, &builder.BuildConfig{Image: busy.image, SkipPush: true}, "FROM busybox", sleep(busy.mark, 5*time.Minute)), jsonForm)
	if at := running(t, list, []app{busy}); len(at[home]) != 1 {
		t.Errorf("the repository has moved: %v", at)
	}
	elsewhere(three)
	found(three, deliver(t, three, body, m)(), a)
	release(t, busy.mark)
	wait().wantSuccess(t)
	if n := pushes(t, s, repository); n != 1 {
		t.Errorf("%d pushes, want 1", n)
	}

	// While the one that knows is away, nobody can say that it never was.
	if status, rec := verdict(t, four, m); status != http.StatusOK || rec.Digest != a.Digest {
		t.Errorf("HTTP %d, %+v, want %s", status, rec, a.Digest)
	}
	home.Kill()
	for range 2 {
		if status, rec := verdict(t, four, m); status != http.StatusServiceUnavailable || rec.Code != "no_daemon" {
			t.Errorf("with its daemon gone: HTTP %d, %+v", status, rec)
		}
	}
	if err := home.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	eventually(t, patience(30*time.Second), func() error {
		if status, rec := verdict(t, four, m); status != http.StatusOK || rec.Digest != a.Digest {
			return fmt.Errorf("back again: HTTP %d, %+v", status, rec)
		}
		return nil
	})
	if status, rec := verdict(t, four, "never-"+m); status != http.StatusNotFound || rec.Code != "not_found" {
		t.Errorf("of no build: HTTP %d, %+v", status, rec)
	}
}

// TestVerdictAfterRestart asks a replica that has built nothing.
func TestVerdictAfterRestart(t *testing.T) {
	t.Parallel()
	s, _, one, two := replicas(t)
	body, repository, m := queued(t, s, 0)
	a := deliver(t, one, body, m)()
	a.wantSuccess(t)
	failing := "failing-" + m
	// What the command holds, or prints, could be a secret, which nothing masks later.
	deliver(t, one, request(t, local(), "FROM busybox", `RUN : "quoted-in-the-command"; printf '%s-by-it\\n' printed; exit 3`), failing)().wantFailed(t, "build_failed", "quoted-in-the-command", "printed-by-it")
	one.Kill()
	if status, rec := verdict(t, two, m); status != http.StatusOK || rec.Status != "success" || rec.Digest != a.Digest || !strings.Contains(rec.Image, repository) {
		t.Errorf("HTTP %d, %+v, want %s", status, rec, a.Digest)
	}
	if status, rec := verdict(t, two, failing); status != http.StatusOK || rec.Status != "failed" || rec.Code != "build_failed" || !strings.Contains(rec.Error, "exit code: 3") || strings.Contains(rec.Error, "quoted") || strings.Contains(rec.Error, "printed") {
		t.Errorf("of a failure: HTTP %d, %+v", status, rec)
	}
	// A call id is of whoever has the key.
	two.Secret = "another"
	if status, rec := verdict(t, two, m); status != http.StatusUnauthorized {
		t.Errorf("with another key: HTTP %d, %+v", status, rec)
	}
}

// TestFailedPushIsNoSuccess reads a failed push back from the history.
func TestFailedPushIsNoSuccess(t *testing.T) {
	t.Parallel()
	_, _, one := start(t, stack.FunctionConfig{})
	_, _, two := start(t, stack.FunctionConfig{})
	m := mark()
	config := &builder.BuildConfig{Image: "127.0.0.1:1/" + strings.ToLower(m) + ":v1"}
	body := request(t, config, "FROM busybox", "RUN : "+m)
	deliver(t, one, body, m)().wantFailed(t, "registry_failed")
	if status, rec := verdict(t, two, m); rec.Status == "success" {
		t.Errorf("HTTP %d, %+v", status, rec)
	}
	deliver(t, two, body, m)().wantFailed(t, "registry_failed")
}
