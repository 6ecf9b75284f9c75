package builds

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	control "github.com/moby/buildkit/api/services/control"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestShareOfReplicas has a tenant with one build at once, two replicas and one daemon, which keeps
// no record that could be counted. While there is no NATS server, each replica has its own count.
func TestShareOfReplicas(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	acme := stack.NewTenant("acme", s.Registry.Image("share-acme"))
	globex := stack.NewTenant("globex", s.Registry.Image("share-globex"))
	acme.Builds, globex.Builds = 1, 1
	h := newHouse(t, stack.FunctionConfig{
		Env:     map[string]string{"buildkit_addr": daemons(t)[0].Addr},
		Secrets: stack.TenantsOf(acme, globex).Secret(),
	})
	atA, atB := acme.Of(h.a.Client), acme.Of(h.b.Client)
	connected(t, atA)
	connected(t, atB)
	request := func(who *stack.Tenant, m string) []byte {
		return stack.Body(t, map[string]any{"image": who.Images[0] + "/app:v1"}, stack.Dockerfile("FROM busybox", held(m)))
	}
	// Who waits for nothing is refused a further build.
	further := stack.Body(t, map[string]any{"image": acme.Images[0] + "/app:v2"}, stack.Dockerfile("FROM busybox"))
	busy := func(c *client.Client) {
		t.Helper()
		c.MustPost(t, within(t), further, client.Accept("")).WantFailed(t, "tenant_busy")
	}
	soonBusy := func(c *client.Client) {
		t.Helper()
		stack.Eventually(t, patience, func() error {
			if a := c.MustPost(t, within(t), further, client.Accept("")); a.Code != "tenant_busy" {
				return fmt.Errorf("a further build: %v", a)
			}
			return nil
		})
	}

	m, n, other := mark(), mark(), mark()
	first := background(t, atA, request(acme, m))
	waitStep(t, m)
	soonBusy(atB)
	second := background(t, atB, request(acme, n))
	others := background(t, globex.Of(h.b.Client), request(globex, other))
	waitStep(t, other)
	for range 3 { // some counts
		busy(atB)
		busy(atA)
		time.Sleep(time.Second)
	}
	if len(stack.Sleepers(t, n)) != 0 {
		t.Error("the tenant has two builds")
	}
	release(t, m)
	waitStep(t, n)
	first().WantSuccess(t)
	soonBusy(atA)
	release(t, other)
	others().WantSuccess(t)

	// What was told last counts for a while after the server's death. Then each replica has one.
	h.nats.Kill()
	busy(atA)
	o := mark()
	alone := background(t, atA, request(acme, o))
	waitStep(t, o)
	busy(atA)
	busy(atB)
	if err := h.nats.Restart(within(t)); err != nil {
		t.Fatal(err)
	}
	connected(t, atA)
	connected(t, atB)
	release(t, o)
	alone().WantSuccess(t)
	soonBusy(atA)
	busy(atA)
	release(t, n)
	second().WantSuccess(t)
}

// TestLoadOfReplicas: a replica knows from the other, and not from a daemon, how many builds the daemon
// has. Daemons have records only of the builds of a queue.
func TestLoadOfReplicas(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{Env: map[string]string{"daemon_builds": "1"}})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	ctx := within(t)
	image := h.a.Images + "/load:v1"
	request := func(label string, dockerfile ...string) []byte {
		return stack.Body(t, map[string]any{"image": image, "labels": map[string]string{"marker": label}},
			stack.Dockerfile(append([]string{"FROM busybox"}, dockerfile...)...))
	}
	// Each replica is certain soon that it has heard the other.
	for _, f := range []*stack.Function{h.a, h.b} {
		stack.Eventually(t, patience, func() error {
			label := rand.Text()
			f.MustPost(t, ctx, request(label)).WantSuccess(t)
			if h.remembers(t, ctx, label) {
				return errors.New("the build is in a history")
			}
			return nil
		})
	}
	label := rand.Text()
	h.a.MustPost(t, ctx, request(label), delivery(label)).WantSuccess(t)
	if !h.remembers(t, ctx, label) {
		t.Error("a queued build is in no history")
	}

	// The first daemon is everyone's choice while it is free. A replica that has not heard of the other's
	// build yet, within a tenth of a second on a free machine, does not know that it is full.
	full := func() float64 {
		t.Helper()
		n, err := h.b.Metric("builder_placements_total", `choice="full"`)
		if err != nil && !strings.Contains(err.Error(), "there is no metric") { // before the first
			t.Fatal(err)
		}
		return n
	}
	pair := func() (m, n string, went float64) {
		t.Helper()
		m, n = mark(), mark()
		first := background(t, &h.a.Client, request(m, held(m)))
		waitStep(t, m)
		before := full()
		second := background(t, &h.b.Client, request(n, held(n)))
		waitStep(t, n)
		release(t, m)
		release(t, n)
		first().WantSuccess(t)
		second().WantSuccess(t)
		return m, n, full() - before // a build is counted at its end
	}
	m, n, went := pair()
	for tries := 1; went != 1; m, n, went = pair() {
		if tries++; tries > 3 {
			t.Fatalf("%v builds went on because the first daemon had its share", went)
		}
		t.Logf("%v builds went on because the first daemon had its share", went)
	}
	if h.remembers(t, ctx, m) || h.remembers(t, ctx, n) {
		t.Error("the builds are in a history")
	}
}

// remembers says whether a build with this label is in the history of a daemon.
func (h *house) remembers(t *testing.T, ctx context.Context, label string) bool {
	t.Helper()
	for _, b := range h.daemons {
		c, err := b.Client(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		events, err := c.ControlClient().ListenBuildHistory(ctx, &control.BuildHistoryRequest{EarlyExit: true})
		for err == nil {
			var e *control.BuildHistoryEvent
			if e, err = events.Recv(); err == nil && e.Record.FrontendAttrs["label:marker"] == label {
				return true
			}
		}
		if err != io.EOF {
			t.Fatal(err)
		}
	}
	return false
}

// TestLostWithDigest kills a replica that has two builds of a queue. One was pushed before the
// replica could say so, and one was not. The other replica has 3 s to ask the daemon what became of
// them. A round in which it says that they were not enough says nothing else.
func TestLostWithDigest(t *testing.T) {
	t.Parallel()
	for rounds := 1; !lostWithDigest(t); rounds++ {
		if rounds == 3 {
			t.Fatal("lost builds could not be looked up, three times")
		}
	}
}

// lostWithDigest is a round of TestLostWithDigest. It returns false if the daemon was not asked in time.
func lostWithDigest(t *testing.T) bool {
	t.Helper()
	h := newHouse(t, stack.FunctionConfig{})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	m, n := mark(), mark()
	pushed := body(t, h.a, m, "FROM busybox", held(m))
	// The tag of the second has another image already.
	h.a.MustPost(t, within(t), body(t, h.a, n, "FROM busybox", "RUN : "+n)).WantSuccess(t)
	old := digestOf(t, h.a.Images+"/"+strings.ToLower(n)+":v1")
	for id, request := range map[string][]byte{m: pushed, n: body(t, h.a, n, "FROM busybox", held(n))} {
		stack.Later(t, func(ctx context.Context) (struct{}, error) {
			h.a.Post(ctx, request, client.Accept(client.NDJSON), delivery(id)) // it is cut off
			return struct{}{}, nil
		})
		waitStep(t, id)
		waitRecord(t, &h.b.Client, id, func(a client.Answer) bool { return a.Status == "in_progress" })
	}
	if err := h.a.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	release(t, m)
	var digest string
	stack.Eventually(t, patience, func() error {
		if digest = digestOf(t, h.a.Images+"/"+strings.ToLower(m)+":v1"); digest == "" {
			return errors.New("the image is not pushed")
		}
		return nil
	})
	if err := h.a.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	isLost := func(a client.Answer) bool { return a.Status == "failed" }
	a, _ := waitRecord(t, &h.b.Client, m, isLost)
	other, _ := waitRecord(t, &h.b.Client, n, isLost)
	if log, err := h.b.Log(); err != nil || strings.Contains(log, "lost build not looked up") {
		t.Logf("the builds are %v and %v; %v", a, other, err)
		return false
	}
	if a.Code != "lost" || a.StatusCode != http.StatusOK || a.Digest != digest || !strings.Contains(a.Error, "pushed") {
		t.Errorf("what was pushed is %v, want the digest %s", a, digest)
	}
	if other.Code != "lost" || other.Digest != "" || strings.Contains(other.Error, "pushed") {
		t.Errorf("what was not pushed is %v", other)
	}
	if got := digestOf(t, h.a.Images+"/"+strings.ToLower(n)+":v1"); got != old || old == "" {
		t.Errorf("its tag has %s, want %s", got, old)
	}
	// The daemon tells a later delivery, which builds nothing.
	again := h.b.MustPost(t, within(t), pushed, client.Accept(client.NDJSON), delivery(m))
	again.WantSuccess(t)
	if again.Digest != digest || strings.Contains(fmt.Sprint(again.Log), "RUN sleep") {
		t.Errorf("delivered again: %v", again)
	}
	return true
}

// digestOf is the digest under a tag; empty if there is none.
func digestOf(t *testing.T, image string) string {
	t.Helper()
	ref, err := name.ParseReference(image)
	if err != nil {
		t.Fatal(err)
	}
	d, err := remote.Head(ref, remote.WithContext(within(t)))
	if err != nil {
		return ""
	}
	return d.Digest.String()
}
