package faults

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	buildkit "github.com/moby/buildkit/client"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// delivery is a body as a queue sends it.
func delivery(t *testing.T, f *stack.Function, body []byte, callID string) *http.Request {
	t.Helper()
	return f.MustRequest(t, testContext(t), body, client.Queued(callID))
}

// deliver sends a delivery in a goroutine. wait returns what came of it.
func deliver(t *testing.T, f *stack.Function, body []byte, callID string) (wait func() client.Answer) {
	req := delivery(t, f, body, callID)
	type result struct {
		client.Answer
		err error
	}
	ch := make(chan result, 1)
	go func() {
		a, err := f.Do(req)
		ch <- result{a, err}
	}()
	return func() client.Answer {
		t.Helper()
		r := <-ch
		if r.err != nil {
			t.Fatal(r.err)
		}
		return r.Answer
	}
}

// stream is deliver for a stream. found gets true once the stream says that the replica has
// found the build running, and false when the stream has ended.
func stream(t *testing.T, f *stack.Function, body []byte, callID string, found chan<- bool) (wait func() client.Answer) {
	follows := sync.OnceFunc(func() { found <- true })
	return stack.Later(t, func(ctx context.Context) (client.Answer, error) {
		defer func() { found <- false }()
		return f.PostEach(ctx, body, func(r client.Record) {
			if strings.Contains(strings.Join(r.Log, "\n"), "following it") {
				follows()
			}
		}, client.Queued(callID), client.Accept(client.NDJSON))
	})
}

// follow is stream to a replica that finds the build running, and returns when it has
// found it.
func follow(t *testing.T, f *stack.Function, body []byte, callID string) (wait func() client.Answer) {
	t.Helper()
	found := make(chan bool, 2)
	wait = stream(t, f, body, callID, found)
	if !<-found {
		t.Fatalf("it followed nothing: %v", wait())
	}
	return wait
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
	if v := two.MustVerdict(t, testContext(t), m); v.StatusCode != http.StatusNotFound || v.Code != "not_found" {
		t.Errorf("before: got %v", v)
	}
	first := deliver(t, one, body, m)
	b.WaitStep(t, m)
	second := follow(t, two, body, m)
	for _, f := range []*stack.Function{one, two} {
		if v := f.MustVerdict(t, testContext(t), m); v.StatusCode != http.StatusAccepted || v.Status != "in_progress" {
			t.Errorf("meanwhile: got %v", v)
		}
	}
	release(t, m)
	a, other := first(), second()
	a.WantSuccess(t)
	other.WantSuccess(t)
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
		again.WantSuccess(t)
		if again.Digest != a.Digest {
			t.Errorf("delivered again: %s, want %s", again.Digest, a.Digest)
		}
	}
	if ends := logged(t, three); len(ends) != 1 || ends[0]["attempts"] != 0.0 {
		t.Errorf("the third replica built: %v", ends)
	}
	if n := s.Registry.Pushes(t, repository); n != 1 {
		t.Errorf("%d pushes, want 1", n)
	}
}

// TestReplicasAtOnce delivers to both at the same moment. The step goes on until one of them has
// found what the other builds, however late that is.
func TestReplicasAtOnce(t *testing.T) {
	t.Parallel()
	s, _, one, two := replicas(t)
	for range 5 {
		body, repository, m := queued(t, s, 5*time.Minute)
		found := make(chan bool, 4)
		first, second := stream(t, one, body, m, found), stream(t, two, body, m, found)
		follows := <-found
		if !follows {
			follows = <-found // the other's word
		}
		if !follows {
			t.Fatalf("neither follows the other: %v, %v", first(), second())
		}
		release(t, m)
		a, other := first(), second()
		a.WantSuccess(t)
		other.WantSuccess(t)
		if a.Digest != other.Digest {
			t.Errorf("digests %s and %s", a.Digest, other.Digest)
		}
		if n := s.Registry.Pushes(t, repository); n != 1 {
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
		if resp, err := one.Send(delivery(t, one, body, m)); err == nil {
			resp.Body.Close()
		}
	}()
	b.WaitStep(t, m)
	second := follow(t, two, body, m)
	before := stack.Sleepers(t, m)
	one.Kill()
	stack.Eventually(t, time.Minute, func() error {
		if now := stack.Sleepers(t, m); len(now) != 1 || slices.Equal(now, before) {
			return fmt.Errorf("the other does not build: %v slept, and %v sleep", before, now)
		}
		return nil
	})
	release(t, m)
	a := second()
	a.WantSuccess(t)
	if n := s.Registry.Pushes(t, repository); n != 1 {
		t.Errorf("%d pushes, want 1", n)
	}
}

// TestReplicaTakesOverPush kills the one that builds in mid-push: what it took for
// that is not the other's, which has all of push_timeout.
func TestReplicaTakesOverPush(t *testing.T) {
	t.Parallel()
	env := map[string]string{"push_timeout": "30s"}
	s, _, one := start(t, stack.FunctionConfig{Env: env})
	_, _, two := start(t, stack.FunctionConfig{Env: env})
	proxy := newFaultProxy(t, s.Registry.Addr)
	var pushes atomic.Int32
	proxy.set(&fault{blobBody, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		late := 10 * time.Second
		if pushes.Add(1) == 1 {
			late = 28 * time.Second
		}
		time.Sleep(late)
		next.ServeHTTP(w, r)
	}})
	m := mark()
	repository := strings.ToLower(m)
	body := layered(t, &builder.BuildConfig{Image: proxy.addr + "/" + repository + ":v1"}, 1<<20)
	go func() {
		if resp, err := one.Send(delivery(t, one, body, m)); err == nil {
			resp.Body.Close()
		}
	}()
	stack.Eventually(t, time.Minute, func() error {
		if n, _ := proxy.broken(); n == 0 {
			return errors.New("nothing is pushed")
		}
		return nil
	})
	second := deliver(t, two, body, m)
	// Not yet all of the blob, and less of push_timeout is left than the other needs for it.
	time.Sleep(25 * time.Second)
	one.Kill()
	a := second()
	a.WantSuccess(t)
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
	var body []byte
	var repository, m string
	// beside builds in the delivery's repository, without a name, and returns where.
	beside := func(f *stack.Function) (addr string, line map[string]any) {
		t.Helper()
		a := app{image: s.Registry.Image(repository + ":other"), mark: mark()}
		mustSend(t, f, request(t, &builder.BuildConfig{Image: a.image, SkipPush: true}, "FROM busybox", "RUN : "+a.mark), jsonForm).WantSuccess(t)
		return a.placed(t, f)
	}
	var first func() client.Answer
	var home *stack.Buildkitd
	// settle delivers a build, and says whether it runs where its repository belongs. Another
	// daemon has it if the first was too slow to count its builds.
	settle := func() bool {
		t.Helper()
		body, repository, m = queued(t, s, 5*time.Minute)
		addr, line := beside(one)
		first = deliver(t, one, body, m)
		for b := range running(t, list, []app{{mark: m}}) {
			home = b
		}
		return home.Addr == addr && line["choice"] == "first"
	}
	for round := 1; !settle(); round++ {
		if round == 3 {
			t.Fatal("three deliveries did not run where their repositories belong")
		}
		release(t, m)
		first()
	}
	// elsewhere shows that another build of the repository is not placed there.
	elsewhere := func(f *stack.Function) {
		t.Helper()
		if addr, line := beside(f); addr == home.Addr || line["choice"] != "full" {
			t.Errorf("a build without a name is on %s, %v; the first runs on %s", addr, line["choice"], home.Addr)
		}
	}
	// found checks what the last delivery to f came to.
	found := func(f *stack.Function, got, want client.Answer) {
		t.Helper()
		got.WantSuccess(t)
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
	a.WantSuccess(t)
	followed := second()
	found(two, followed, a)
	if log := strings.Join(followed.Log, "\n"); !strings.Contains(log, "following it") {
		t.Errorf("it followed nothing: %s", log)
	}

	// Now that it has ended: another build has its place there.
	busy, wait := holdOn(t, one, list, home, func(m string) []byte {
		config := &builder.BuildConfig{Image: s.Registry.Image(repository + ":busy"), SkipPush: true}
		return request(t, config, "FROM busybox", sleep(m, 5*time.Minute))
	})
	elsewhere(three)
	found(three, deliver(t, three, body, m)(), a)
	release(t, busy)
	wait().WantSuccess(t)
	if n := s.Registry.Pushes(t, repository); n != 1 {
		t.Errorf("%d pushes, want 1", n)
	}

	// While the one that knows is away, nobody can say that it never was.
	if v := four.MustVerdict(t, testContext(t), m); v.StatusCode != http.StatusOK || v.Digest != a.Digest {
		t.Errorf("got %v, want %s", v, a.Digest)
	}
	home.Kill()
	for range 2 {
		if v := four.MustVerdict(t, testContext(t), m); v.StatusCode != http.StatusServiceUnavailable || v.Code != "no_daemon" {
			t.Errorf("with its daemon gone: got %v", v)
		}
	}
	if err := home.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	stack.Eventually(t, patience(30*time.Second), func() error {
		if v := four.MustVerdict(t, testContext(t), m); v.StatusCode != http.StatusOK || v.Digest != a.Digest {
			return fmt.Errorf("back again: got %v", v)
		}
		return nil
	})
	if v := four.MustVerdict(t, testContext(t), "never-"+m); v.StatusCode != http.StatusNotFound || v.Code != "not_found" {
		t.Errorf("of no build: got %v", v)
	}
}

// TestVerdictAfterRestart asks a replica that has built nothing.
func TestVerdictAfterRestart(t *testing.T) {
	t.Parallel()
	s, _, one, two := replicas(t)
	body, repository, m := queued(t, s, 0)
	a := deliver(t, one, body, m)()
	a.WantSuccess(t)
	failing := "failing-" + m
	// What the command holds, or prints, could be a secret, which nothing masks later.
	deliver(t, one, request(t, local(), "FROM busybox", `RUN : "quoted-in-the-command"; printf '%s-by-it\\n' printed; exit 3`), failing)().WantFailed(t, "build_failed", "quoted-in-the-command", "printed-by-it")
	one.Kill()
	if v := two.MustVerdict(t, testContext(t), m); v.StatusCode != http.StatusOK || v.Status != "success" || v.Digest != a.Digest || !strings.Contains(v.Image, repository) {
		t.Errorf("got %v, want %s", v, a.Digest)
	}
	if v := two.MustVerdict(t, testContext(t), failing); v.StatusCode != http.StatusOK || v.Status != "failed" || v.Code != "build_failed" || !strings.Contains(v.Error, "exit code: 3") || strings.Contains(v.Error, "quoted") || strings.Contains(v.Error, "printed") {
		t.Errorf("of a failure: got %v", v)
	}
	// A call id is of whoever has the key.
	two.Secret = "another"
	if v := two.MustVerdict(t, testContext(t), m); v.StatusCode != http.StatusUnauthorized {
		t.Errorf("with another key: got %v", v)
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
	deliver(t, one, body, m)().WantFailed(t, "registry_failed")
	if v := two.MustVerdict(t, testContext(t), m); v.Status == "success" {
		t.Errorf("got %v", v)
	}
	deliver(t, two, body, m)().WantFailed(t, "registry_failed")
}

// TestRefTaken has another client's build hold the Ref of a delivery with a git context. That build
// is in no history: a busy daemon takes seconds to write the record of a build. The delivery builds
// when the Ref is free, and leaves the other build alone.
func TestRefTaken(t *testing.T) {
	t.Parallel()
	g := stack.NewGitServer(t, "")
	env := map[string]string{"context_hosts": g.URL}
	s, b, one := start(t, stack.FunctionConfig{Env: env})
	_, _, two := start(t, stack.FunctionConfig{Env: env})
	m := mark()
	repository := strings.ToLower(m)
	work := g.Repository(t, "app.git", map[string]string{"Dockerfile": "FROM scratch\nCOPY file /file\n"})
	body := stack.ConfigAlone(t, map[string]any{
		"image": s.Registry.Image(repository + ":v1"), "context": map[string]string{"git": g.URL + "/app.git"},
	})
	if a := deliver(t, one, body, m)(); a.Code != "build_failed" {
		t.Fatalf("without the file: %v", a)
	}
	stack.Commit(t, work, map[string]string{"file": m})

	c, err := b.Client(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ref, isFirst := strings.CutSuffix(refOf(t, c, repository), "x0")
	if !isFirst {
		t.Fatalf("the Ref of the first attempt is %q", ref)
	}
	ref += "x1"
	holds, free, held := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	holding := sync.OnceFunc(func() { close(holds) })
	ctx := testContext(t)
	go func() {
		for {
			_, err := c.Build(ctx, buildkit.SolveOpt{Ref: ref, Internal: true}, "", func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
				holding()
				select {
				case <-free:
				case <-ctx.Done():
				}
				return gateway.NewResult(), nil
			}, nil)
			select {
			case <-holds:
			case <-ctx.Done():
			default:
				continue // a busy daemon gives a build three seconds to begin
			}
			held <- err
			return
		}
	}()
	select {
	case <-holds:
	case err := <-held:
		t.Fatal(err)
	}
	second := deliver(t, two, body, m)
	stack.Eventually(t, time.Minute, func() error {
		time.Sleep(100 * time.Millisecond)
		log, err := os.ReadFile(b.LogFile())
		if err == nil && strings.Count(string(log), "job ID "+ref+" exists") < 3 {
			err = errors.New("the delivery has not asked for the Ref three times")
		}
		return err
	})
	close(free)
	if err := <-held; err != nil {
		t.Errorf("the other build failed: %v", err)
	}
	a := second()
	a.WantSuccess(t)
	if ended := logged(t, two); len(ended) != 1 || ended[0]["attempts"].(float64) < 4 {
		t.Errorf("the delivery ended as %v", ended)
	}
	image := s.Registry.Image(repository)
	if d := digest(t, image+":v1"); d != a.Digest {
		t.Errorf("the tag is %s, the answer %s", d, a.Digest)
	}
	if file := stack.MustFiles(t, stack.MustPull(t, testContext(t), image+":v1"))["file"]; file == nil || string(file.Content) != m {
		t.Error("the image has not the file of the commit")
	}
}

// refOf is the Ref of the only build of a repository in a daemon's history.
func refOf(t *testing.T, c *buildkit.Client, repository string) (ref string) {
	t.Helper()
	stream, err := c.ControlClient().ListenBuildHistory(testContext(t), &controlapi.BuildHistoryRequest{EarlyExit: true})
	if err != nil {
		t.Fatal(err)
	}
	for {
		event, err := stream.Recv()
		if err == io.EOF {
			return ref
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range event.GetRecord().GetExporters() {
			if strings.Contains(e.Attrs["name"], repository) {
				ref = event.Record.Ref
			}
		}
	}
}
