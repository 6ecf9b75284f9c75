// Package tenants_test has tenants share a builder and a daemon. It looks for each way in
// which one of them could see, use or slow what is another's. One tenant knows everything
// about the other but its key: names, digests, Dockerfiles, contexts with their times, call
// ids, sealed secrets, and where the caches are.
package tenants_test

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

func TestMain(m *testing.M) { stack.Main(m) }

// Of the kit that all such tests share.
const patience = stack.Patience

var (
	within     = stack.Soon
	mark       = stack.Mark
	held       = stack.Held
	background = stack.Background
	publicKey  = stack.SealingKey
	sealed     = stack.Sealed

	configAlone = stack.ConfigAlone
)

// house is a function with tenants: acme, whose things the others want, and globex. They
// share the stack's daemon, unless the function has another.
type house struct {
	s    *stack.Stack
	f    *stack.Function
	file *stack.Tenants // as it is in force; write changes it

	acme, globex *stack.Tenant
}

// newHouse starts a function with acme and globex. change may add to what is in the file,
// and to the function's configuration.
func newHouse(t *testing.T, change func(h *house, c *stack.FunctionConfig)) *house {
	t.Helper()
	s := stack.Shared(t)
	// The names are the test's own, so that no test finds what another has pushed.
	own := strings.ToLower(rand.Text()[:8])
	h := &house{s: s}
	h.acme = stack.NewTenant("acme-"+own, s.Registry.Image("acme-"+own))
	h.globex = stack.NewTenant("globex-"+own, s.Registry.Image("globex-"+own))
	h.file = stack.TenantsOf(h.acme, h.globex)
	var c stack.FunctionConfig
	if change != nil {
		change(h, &c)
	}
	secrets := h.file.Secret()
	maps.Copy(secrets, c.Secrets)
	c.Secrets = secrets
	_, h.f = stack.Test(t, c)
	return h
}

// of is a client of a tenant of the house.
func (h *house) of(t *stack.Tenant) *client.Client { return t.Of(h.f.Client) }

// write changes the file, and returns once the change is in force: a key that nobody has
// had before is taken.
func (h *house) write(t *testing.T) {
	t.Helper()
	probe := stack.NewTenant("probe-"+strings.ToLower(rand.Text()), h.s.Registry.Image("probe-"+strings.ToLower(rand.Text())))
	for name := range h.file.Tenants {
		if strings.HasPrefix(name, "probe-") {
			delete(h.file.Tenants, name)
		}
	}
	h.file.Tenants[probe.Name] = probe
	h.f.WriteSecret(t, stack.TenantsSecret, h.file.YAML())
	stack.Eventually(t, patience, func() error {
		if a := h.ask(t, probe, probe.Key()); a.StatusCode != http.StatusNotFound {
			return fmt.Errorf("the file is not in force: %v", a)
		}
		return nil
	})
}

// ask has a key ask in a tenant's name for a build that there is not: 404 says that the key
// is taken.
func (h *house) ask(t testing.TB, of *stack.Tenant, key string) client.Answer {
	t.Helper()
	c := of.Of(h.f.Client)
	c.Secret = key
	return c.MustVerdict(t, within(t), "no-such-build")
}

// config is com.openfaas.docker.config.
type config map[string]any

// app is the config of a push to a tenant's repository "app".
func app(of *stack.Tenant) config { return config{"image": of.Images[0] + "/app:v1"} }

// body is a request with a Dockerfile of lines, and no other file.
func body(t testing.TB, c config, dockerfile ...string) []byte {
	t.Helper()
	return stack.Body(t, c, stack.Dockerfile(dockerfile...))
}

// printed are the lines that the steps of a build printed.
func printed(r client.Record) string {
	var lines []string
	for _, line := range r.Log {
		if text, ok := strings.CutPrefix(line, "l: "); ok {
			lines = append(lines, text)
		}
	}
	return strings.Join(lines, "\n")
}

// file is the text of a file of a build's image.
func file(t testing.TB, r client.Record, path string) string {
	t.Helper()
	repository, _, _ := cutTag(r.Image)
	files := stack.MustFiles(t, stack.MustPull(t, within(t), repository+"@"+r.Digest))
	if files[path] == nil {
		t.Fatalf("%s has no %s", r.Image, path)
	}
	return string(files[path].Content)
}

func cutTag(image string) (repository, tag string, ok bool) {
	i := strings.LastIndexByte(image, ':')
	if i <= strings.LastIndexByte(image, '/') {
		return image, "", false
	}
	return image[:i], image[i+1:], true
}

// release ends the held steps with the mark.
func release(t testing.TB, m string) {
	t.Helper()
	stack.Release(t, m, patience)
}

// lines are the function's log lines, in their order, that have a message.
func lines(t testing.TB, f *stack.Function, message string) (all []map[string]any) {
	t.Helper()
	text, err := f.Log()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(text) {
		var fields map[string]any
		if json.Unmarshal([]byte(line), &fields) == nil && fields["message"] == message {
			all = append(all, fields)
		}
	}
	return all
}

// ended is the log line of the end of a call's build. It may come after the answer.
func ended(t testing.TB, f *stack.Function, callID string) (line map[string]any) {
	t.Helper()
	stack.Eventually(t, patience, func() error {
		for _, l := range lines(t, f, "build ended") {
			if l["call_id"] == callID {
				line = l
				return nil
			}
		}
		return fmt.Errorf("the log has no end of %s", callID)
	})
	return line
}

// has says whether any of the lines contains text.
func has(list []string, text string) bool {
	return slices.ContainsFunc(list, func(line string) bool { return strings.Contains(line, text) })
}

// tarOf is a tar of a directory.
func tarOf(t testing.TB, dir string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.AddFS(os.DirFS(dir)), w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// sendAhead is a signed request for a context that is sent ahead.
func sendAhead(t testing.TB, c *client.Client, method, digest string, body []byte) client.Answer {
	t.Helper()
	req := c.MustRequest(t, within(t), body)
	req.Method, req.URL.Path = method, "/contexts/"+digest
	if method == http.MethodHead {
		req.Body, req.ContentLength = http.NoBody, 0
		req.Header.Set("X-Build-Signature", client.Sign(c.Secret, []byte(method+" "+req.URL.Path)))
	}
	return c.MustFetch(t, req)
}

// tagsOf are the tags of a repository.
func tagsOf(t testing.TB, repository string) []string {
	t.Helper()
	repo, err := name.NewRepository(repository)
	if err != nil {
		t.Fatal(err)
	}
	tags, err := remote.List(repo, remote.WithContext(within(t)))
	if err != nil {
		t.Fatal(err)
	}
	return tags
}
