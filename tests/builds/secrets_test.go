package builds

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestCanaries builds with everything that a record must not have, and looks for it: in what the
// routes about builds answer, in all bytes that the server has on its disk, and in all that it
// sends to a client of the account. The last two do not even name the build.
func TestCanaries(t *testing.T) {
	t.Parallel()
	canary := "canary-" + rand.Text()
	s := stack.Shared(t)
	git := stack.NewGitServer(t, "acme:"+canary+"-git")
	registry := stack.Front(t, s.Registry.Addr, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if user, password, _ := r.BasicAuth(); user != "acme" || password != canary+"-registry" {
			w.Header().Set("WWW-Authenticate", `Basic realm="acme"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		r.Header.Del("Authorization")
		next.ServeHTTP(w, r)
	})
	m := mark()
	acme := stack.NewTenant("acme", registry+"/"+strings.ToLower(m))
	acme.Keys[0].Secret = canary + "-key-of-the-tenant"
	acme.Registry = map[string]any{"auths": map[string]any{registry: map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte("acme:" + canary + "-registry"))}}}
	acme.ContextHosts = []string{git.URL}
	acme.GitCredentials = []string{strings.Replace(git.URL, "://", "://acme:"+canary+"-git@", 1)}
	secrets := stack.TenantsOf(acme).Secret()
	secrets["payload-secret"] = []byte(canary + "-root")
	h := newHouse(t, stack.FunctionConfig{Secrets: secrets, Env: map[string]string{"context_hosts": git.URL}})
	a, b := acme.Of(h.a.Client), acme.Of(h.b.Client)
	connected(t, a)
	connected(t, b)
	heard := listen(t, h.nats)

	values := map[string]string{}
	encoded := base64.StdEncoding.EncodeToString([]byte(canary))[:30]
	for _, what := range []string{"argument", "secret", "label", "annotation", "printed"} {
		values[what] = canary + "-" + what
	}
	config := func(c map[string]any) map[string]any {
		maps.Copy(c, map[string]any{
			"image": acme.Images[0] + ":v1", "buildArgs": map[string]string{"TOKEN": values["argument"]},
			"labels": map[string]string{"note": values["label"]}, "annotations": map[string]string{"note": values["annotation"]},
		})
		return c
	}
	step := `RUN --mount=type=secret,id=token echo "value: $(cat /run/secrets/token)"; base64 /run/secrets/token; test -n "$TOKEN"; : ` + m
	dockerfile := stack.Dockerfile("FROM busybox", "ARG TOKEN", step)
	sealed := func(body []byte) []byte {
		return stack.WithSecrets(t, body, string(stack.Sealed(t, a, map[string][]byte{"token": []byte(values["secret"])})))
	}
	git.Repository(t, "app.git", stack.Dockerfile("FROM busybox", "ARG TOKEN", step+"; : git")) // not from the cache
	ids := map[string]string{}                                                                  // and what becomes of each
	for name, build := range map[string]struct {
		body []byte
		want string
	}{
		"archive": {stack.Body(t, config(map[string]any{}), dockerfile), "success"},
		"git":     {stack.ConfigAlone(t, config(map[string]any{"context": map[string]any{"git": git.URL + "/app.git"}})), "success"},
		"failure": {stack.Body(t, config(map[string]any{}), stack.Dockerfile("FROM busybox", "ARG TOKEN", step+"; exit 3")), "failed"},
	} {
		id := m + "-" + name
		answer, err := a.Post(within(t), sealed(build.body), client.Accept(client.NDJSON), named(id))
		if err != nil || answer.Status != build.want {
			t.Fatalf("%s: %v, %v", name, answer, err)
		}
		// It has printed the secret, which is masked.
		if !strings.Contains(answer.Body, "l: value: ") {
			t.Fatalf("%s has printed nothing: %v", name, answer)
		}
		wantHidden(t, name, strings.ReplaceAll(answer.Body, values["argument"], ""), canary, encoded)
		ids[id] = build.want
	}
	labels, err := stack.MustPull(t, within(t), s.Registry.Image(strings.ToLower(m)+":v1")).ConfigFile()
	if err != nil || labels.Config.Labels["note"] != values["label"] {
		t.Errorf("the image has the labels %v, %v", labels, err)
	}

	for id, want := range ids {
		waitRecord(t, b, id, func(a client.Answer) bool { return a.Status == want })
		for _, path := range []string{"/builds", "/builds/" + id, "/builds/" + id + "/log"} {
			req, err := b.Ask(within(t), http.MethodGet, path)
			if err != nil {
				t.Fatal(err)
			}
			answer := b.MustFetch(t, req)
			if answer.StatusCode != http.StatusOK || !strings.Contains(answer.Body, id) {
				t.Errorf("%s: %v", path, answer)
			}
			if strings.HasPrefix(path, "/builds/") {
				// BuildKit names a step as it is with the arguments in their places. So it does in
				// the log, which is the tenant's own. The record has none of them.
				answer.Body = strings.ReplaceAll(answer.Body, values["argument"], "")
			}
			wantHidden(t, path, answer.Body, canary, encoded)
		}
	}
	// Nor the build: its id, its image, its tenant, what its log begins with.
	hidden := []string{canary, encoded, m, strings.ToLower(m), acme.ID, "in_progress", "[1/2] FROM", "value: "}
	for _, f := range []*stack.Function{h.a, h.b} {
		log, err := f.Log()
		if err != nil {
			t.Fatal(err)
		}
		wantHidden(t, "the function's log", strings.ReplaceAll(log, values["argument"], ""), canary, encoded)
	}
	if n := heard(hidden); n < 20 {
		t.Errorf("the client has heard %d messages only", n)
	}
	h.nats.Kill() // so that all of it is on the disk
	size := 0
	if err := filepath.WalkDir(h.nats.Store(), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		size += len(content)
		wantHidden(t, "a file of the server", path+" "+string(content), hidden...)
		return err
	}); err != nil || size < 1000 {
		t.Errorf("the server has %d bytes, %v", size, err)
	}
}

// wantHidden wants none of the words in a text.
func wantHidden(t *testing.T, what, text string, words ...string) {
	t.Helper()
	for _, word := range words {
		if i := strings.Index(text, word); i >= 0 {
			t.Errorf("%s shows %q", what, text[max(0, i-40):min(len(text), i+len(word)+20)])
		}
	}
}

// listen has a client of the account hear everything, and fetch what it can. check looks for words
// in all of it, and returns how many messages there were.
func listen(t *testing.T, server *stack.NATS) (check func(words []string) int) {
	t.Helper()
	conn, err := nats.Connect(server.URL, nats.Timeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	var mu sync.Mutex
	var all []*nats.Msg
	if _, err := conn.Subscribe(">", func(m *nats.Msg) {
		mu.Lock()
		defer mu.Unlock()
		all = append(all, m)
	}); err != nil {
		t.Fatal(err)
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	return func(words []string) int {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		for _, m := range all {
			wantHidden(t, "a message on "+m.Subject, fmt.Sprintf("%s %v %s", m.Subject, m.Header, m.Data), words...)
		}
		return len(all)
	}
}

// TestRootReplaced puts a new first line into the payload secret. What was recorded before is
// there as long as the old line is in the file.
func TestRootReplaced(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	acme := stack.NewTenant("acme", s.Registry.Image("acme-"+strings.ToLower(mark())))
	secrets := func(root string) map[string][]byte {
		all := stack.TenantsOf(acme).Secret()
		all["payload-secret"] = []byte(root)
		return all
	}
	before, after := "the-root-before-"+rand.Text(), "the-root-after-"+rand.Text()
	h := newHouse(t, stack.FunctionConfig{Secrets: secrets(before)})
	a, b := acme.Of(h.a.Client), acme.Of(h.b.Client)
	connected(t, a)
	connected(t, b)
	request := func(lines ...string) []byte {
		return stack.Body(t, map[string]any{"image": acme.Images[0] + "/app:v1"}, stack.Dockerfile(append([]string{"FROM busybox"}, lines...)...))
	}
	old, across, fresh := mark(), mark(), mark()
	done := a.MustPost(t, within(t), request("RUN : "+old), client.Accept(client.NDJSON), named(old))
	done.WantSuccess(t)
	built := background(t, a, request(held(across)), named(across))
	waitStep(t, across)
	waitRecord(t, b, old, func(a client.Answer) bool { return a.Status == "success" })
	waitRecord(t, b, across, func(a client.Answer) bool { return a.Status == "in_progress" })

	for _, f := range []*stack.Function{h.a, h.b} {
		f.WriteSecret(t, "payload-secret", []byte(after+"\n"+before+"\n"))
	}
	h.config.Secrets = secrets(after)
	only := h.replica(t) // without the old line
	c := acme.Of(only.Client)
	connected(t, c)
	// The new line is in force once a replica without the old one can read a record.
	stack.Eventually(t, patience, func() error {
		id := mark()
		a.MustPost(t, within(t), request("RUN echo "+fresh), client.Accept(client.NDJSON), named(id)).WantSuccess(t)
		stack.Eventually(t, patience, func() error {
			if v := b.MustVerdict(t, within(t), id); v.Status != "success" {
				return fmt.Errorf("%v", v)
			}
			return nil
		})
		if v := c.MustVerdict(t, within(t), id); v.Status != "success" {
			return fmt.Errorf("with the new line alone: %v", v)
		}
		fresh = id
		return nil
	})

	for name, who := range map[string]*client.Client{"its own": a, "the other": b} {
		v := who.MustVerdict(t, within(t), old)
		if v.StatusCode != http.StatusOK || v.Digest != done.Digest {
			t.Errorf("%s: %v", name, v)
		}
		wantSame(t, name, who.MustReadLog(t, within(t), old, "follow=1").Texts(), done.Log)
		wantListed(t, who, old, true)
		wantListed(t, who, fresh, true)
	}
	// A build goes on under the line that it began with, and is stopped as ever.
	stop(t, b, across, http.StatusAccepted)
	if a := built(); a.Code != "canceled" {
		t.Errorf("its caller was told %v", a)
	}

	for _, id := range []string{old, across} {
		c.MustVerdict(t, within(t), id).WantFailed(t, "not_found")
		c.MustReadLog(t, within(t), id, "").WantFailed(t, "not_found")
		c.MustStop(t, within(t), id).WantFailed(t, "not_found")
		wantListed(t, c, id, false)
	}
	wantListed(t, c, fresh, true)
	if n, err := only.Metric("builder_builds_lost_total"); err != nil || n != 0 {
		t.Errorf("who cannot read them has found %v builds lost, %v", n, err)
	}
}

// wantListed looks for a build in the list of all.
func wantListed(t *testing.T, c *client.Client, id string, want bool) {
	t.Helper()
	l := c.MustList(t, within(t), "limit=200")
	found := false
	for _, b := range l.Builds {
		found = found || b.ID == id
	}
	if found != want || !l.Complete {
		t.Errorf("%s is in the list: %v, want %v; complete: %v", id, found, want, l.Complete)
	}
}
