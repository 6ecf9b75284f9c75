// Package faults breaks what a build depends on, one thing at a time and for
// real: the client's connection, buildkitd, the registry, disks, time and the
// function itself. Each test asks for a true verdict in time, and for nothing
// to stay behind.
package faults

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

func TestMain(m *testing.M) {
	// Most of these tests wait for a timeout to pass, and need no processor.
	flag.Set("test.parallel", "8")
	stack.Main(m)
}

// What a whole run and a busy machine leave out.
var (
	rounds = flag.Int("rounds", 1, "how often TestStrangers has each kind of stranger come")
	soak   = flag.Int("soak", 400, "how many builds TestNothingGrows makes")
	timing = flag.Bool("timing", false, "hold waits to what they are on a machine that does nothing else")
)

// jsonForm is what a client gets that asks for no form.
const jsonForm = ""

// forms names them in tests.
var forms = map[string]string{jsonForm: "json", client.NDJSON: "ndjson", client.SSE: "sse"}

// testTimeout bounds whatever a test waits for that has no limit of its own.
const testTimeout = 3 * time.Minute

func testContext(t *testing.T) context.Context {
	return stack.Within(t, testTimeout)
}

// request is a tar with one Dockerfile.
func request(t *testing.T, config any, dockerfile ...string) []byte {
	t.Helper()
	return stack.Body(t, config, map[string]string{"Dockerfile": strings.Join(dockerfile, "\n") + "\n"})
}

// local is the config of a build that pushes nothing.
func local() *builder.BuildConfig { return &builder.BuildConfig{SkipPush: true} }

var mark = stack.Mark

// sleep is a RUN line whose shell has m in its command line while it sleeps.
func sleep(m string, d time.Duration) string {
	return fmt.Sprintf("RUN sleep %g; : %s", d.Seconds(), m)
}

// mustSend sends a signed body and reads the answer in a form.
func mustSend(t *testing.T, f *stack.Function, body []byte, form string) client.Answer {
	t.Helper()
	return f.MustPost(t, testContext(t), body, client.Accept(form))
}

// background is mustSend in a goroutine. wait returns what came of it.
func background(t *testing.T, f *stack.Function, body []byte, form string) (wait func() client.Answer) {
	ctx := testContext(t)
	var a client.Answer
	var err error
	var done sync.WaitGroup
	done.Go(func() { a, err = f.Post(ctx, body, client.Accept(form)) })
	t.Cleanup(done.Wait)
	return func() client.Answer {
		t.Helper()
		done.Wait()
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
}

// patience is the limit of what takes d on a machine that does nothing else: d itself
// with -timing, and otherwise so much longer that no machine is too busy for it. What
// would go wrong takes longer still: steps sleep for five minutes. Where it does not, a
// test has a limit of its own.
func patience(d time.Duration) time.Duration {
	if *timing {
		return d
	}
	return d + 30*time.Second
}

// waitGone returns once the RUN step has no process any more.
func waitGone(t *testing.T, b *stack.Buildkitd, m string, limit time.Duration) time.Duration {
	t.Helper()
	return b.WaitGone(t, m, patience(limit))
}

// release ends the sleep of the steps with the mark m. A step that is to be there for as
// long as a test looks at it sleeps for longer than any test, and is released when the
// test has seen what it waits for.
func release(t *testing.T, m string) {
	t.Helper()
	stack.Release(t, m, patience(time.Second))
}

// roomy is a daemon for all tests whose steps sleep: the shipped configuration
// runs eight steps at once.
var roomy struct {
	sync.Mutex
	*stack.Buildkitd
}

// start is stack.Test with the roomy daemon, where c names none.
func start(t *testing.T, c stack.FunctionConfig) (*stack.Stack, *stack.Buildkitd, *stack.Function) {
	t.Helper()
	if c.Buildkitd == nil {
		roomy.Lock()
		if roomy.Buildkitd == nil {
			ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
			defer cancel()
			var err error
			if roomy.Buildkitd, err = stack.Shared(t).NewBuildkitd(ctx, stack.BuildkitdConfig{Args: []string{"--oci-max-parallelism=100"}}); err != nil {
				roomy.Unlock()
				t.Fatal(err)
			}
		}
		c.Buildkitd = roomy.Buildkitd
		roomy.Unlock()
	}
	s, f := stack.Test(t, c)
	return s, c.Buildkitd, f
}

// newBuildkitd is a daemon of this test's own.
func newBuildkitd(t *testing.T, c stack.BuildkitdConfig) *stack.Buildkitd {
	t.Helper()
	b, err := stack.Shared(t).NewBuildkitd(testContext(t), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Kill)
	return b
}

// waitIdle returns once no build holds a slot or waits for one.
func waitIdle(t *testing.T, f *stack.Function) time.Duration {
	t.Helper()
	return stack.Eventually(t, patience(15*time.Second), func() error {
		for _, name := range []string{"builder_builds_in_flight", "builder_builds_waiting"} {
			if n, err := f.Metric(name); err != nil || n != 0 {
				return fmt.Errorf("%s is %v, %v", name, n, err)
			}
		}
		return nil
	})
}

// logged is the function's log lines about ended builds, the last one last. A verdict
// is counted before it is given, and given before its line is written: what has been counted
// or has begun gets some time to be there.
func logged(t *testing.T, f *stack.Function) (ended []map[string]any) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		total, _ := f.Metric("builder_builds_total") // an error before the first build is counted
		counted := int(total)
		text, err := f.Log()
		if err != nil {
			t.Fatal(err)
		}
		started := 0
		ended = nil
		for line := range strings.Lines(text) {
			var fields map[string]any
			if json.Unmarshal([]byte(line), &fields) != nil {
				continue
			}
			switch fields["message"] {
			case "build started":
				started++
			case "build ended":
				ended = append(ended, fields)
			}
		}
		if counted > 0 && len(ended) >= max(started, counted) || time.Now().After(deadline) {
			return ended
		}
	}
}

// digest is what a tag resolves to, "" for a tag that is not there.
func digest(t *testing.T, ref string, opts ...remote.Option) string {
	t.Helper()
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	d, err := remote.Head(r, append(opts, remote.WithContext(testContext(t)))...)
	if err != nil {
		if strings.Contains(err.Error(), "404") {
			return ""
		}
		t.Fatal(err)
	}
	return d.Digest.String()
}

// wantWhole pulls every tag of a repository with all its blobs and compares
// their digests. A repository that is not there has no tags.
func wantWhole(t *testing.T, repository string, opts ...remote.Option) (tags []string) {
	t.Helper()
	repo, err := name.NewRepository(repository)
	if err != nil {
		t.Fatal(err)
	}
	opts = append(opts, remote.WithContext(testContext(t)))
	tags, err = remote.List(repo, opts...)
	if err != nil && !strings.Contains(err.Error(), "NAME_UNKNOWN") {
		t.Fatal(err)
	}
	for _, tag := range tags {
		if err := pullWhole(repo.Tag(tag), opts); err != nil {
			t.Errorf("the tag %s is there without all that it names: %v", tag, err)
		}
	}
	return tags
}

// pullWhole reads everything of an image; what has not its digest is an error.
func pullWhole(ref name.Reference, opts []remote.Option) error {
	img, err := remote.Image(ref, opts...)
	if err != nil {
		return err
	}
	if _, err := img.RawConfigFile(); err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		r, err := l.Compressed()
		if err != nil {
			return err
		}
		defer r.Close()
		if _, err := io.Copy(io.Discard, r); err != nil {
			return err
		}
	}
	return nil
}

func basic(user, password string) remote.Option {
	return remote.WithAuth(&authn.Basic{Username: user, Password: password})
}
