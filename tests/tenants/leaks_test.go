package tenants_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// The nine ways in which tenants of one daemon could get at each other's things. Each test
// fails if the mechanism that its comment names is taken out of the function.

// TestSecretStep: a step that read a secret never serves another tenant, even one who knows
// the secret. The tenant is in the host name of steps.
func TestSecretStep(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	// What the step got with its secret is different every time that it runs.
	dockerfile := []string{"FROM busybox", "RUN --mount=type=secret,id=token cat /run/secrets/token /proc/sys/kernel/random/uuid > /got"}
	build := func(of *stack.Tenant) string {
		t.Helper()
		secrets := sealed(t, h.of(of), map[string][]byte{"token": []byte("known to both\n")})
		return file(t, h.of(of).MustBuild(t, within(t), stack.WithSecrets(t, body(t, app(of), dockerfile...), string(secrets))), "got")
	}
	acmes, globexs := build(h.acme), build(h.globex)
	if acmes == globexs {
		t.Errorf("globex has what acme's step got: %q", globexs)
	}
	// A cache that is never used would be correct too.
	if again := build(h.acme); again != acmes {
		t.Errorf("acme's own step ran again: %q, and then %q", acmes, again)
	}
}

// TestCacheMount: a cache mount of one id is another one for each tenant. The tenant is in
// the namespace of mounts.
func TestCacheMount(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	m := mark()
	build := func(of *stack.Tenant) string {
		t.Helper()
		// The step runs each time.
		return printed(h.of(of).MustBuild(t, within(t), body(t, config{"skipPush": true}, "FROM busybox",
			"RUN --mount=type=cache,id="+m+",target=/cache cat /cache/* 2>/dev/null; echo found by "+of.Name+" > /cache/a; : "+mark())))
	}
	build(h.acme)
	if got := build(h.globex); got != "" {
		t.Errorf("globex finds in its cache mount: %s", got)
	}
	if got := build(h.acme); got != "found by "+h.acme.Name {
		t.Errorf("acme finds in its cache mount: %s", got)
	}
}

// TestContextOfPredecessor: a repository that was acme's is given to globex. globex knows
// paths, sizes and times of acme's files, so it could have the daemon take files that it does
// not have for unchanged, or test a guess of their content. The tenant is in the SharedKey
// and in the key of times.
func TestContextOfPredecessor(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	when := time.Now().Add(-time.Hour).Truncate(time.Second)
	image := app(h.acme)
	build := func(of *stack.Tenant, content string) (r client.Record, sent float64) {
		t.Helper()
		dir := stack.Context(t, map[string]string{
			"Dockerfile": "FROM busybox\nCOPY file /file\nRUN --mount=type=bind,target=/context stat -c %y /context/file # " + mark() + "\n",
			"file":       content,
		})
		if err := os.Chtimes(filepath.Join(dir, "file"), when, when); err != nil {
			t.Fatal(err)
		}
		r = h.of(of).MustBuild(t, within(t), stack.MustTar(t, dir, image))
		return r, ended(t, h.f, r.ID)["context_sent_bytes"].(float64)
	}
	const size = 1 << 20
	content := strings.Repeat(mark(), size/len(mark()))
	first, sent := build(h.acme, content)
	if sent < size/2 {
		t.Fatalf("acme sent %v bytes at first", sent)
	}
	if _, sent = build(h.acme, content); sent > size/2 {
		t.Errorf("acme sent %v bytes of what the daemon has", sent)
	}

	h.globex.Images, h.acme.Images = append(h.globex.Images, h.acme.Images...), []string{h.s.Registry.Image("elsewhere-" + h.acme.Name)}
	h.write(t)
	second, sent := build(h.globex, content)
	if sent < size/2 {
		t.Errorf("globex sent %v bytes: it has learnt that its guess of acme's file is right", sent)
	}
	if a, b := printed(first), printed(second); a == b || len(a) != len(b) {
		t.Errorf("acme's step saw the time %s, and globex's step %s of the same file", a, b)
	}
	other := strings.Repeat("x", len(content))
	third, _ := build(h.globex, other)
	if got := file(t, third, "file"); got != other {
		t.Errorf("globex has %d bytes in its image that it did not send: %.40q", len(got), got)
	}

	// What globex sent has not taken the place of what acme had sent.
	h.acme.Images, h.globex.Images = h.globex.Images[1:], h.globex.Images[:1]
	h.write(t)
	if _, sent = build(h.acme, content); sent > size/2 {
		t.Errorf("acme sent %v bytes after globex had built", sent)
	}
}

// TestForeignImage: an image of another tenant in a registry that both can reach is no base,
// by tag or by digest, also where the daemon has it already. Everything that BuildKit
// resolves is asked about first, and without "from" it may be all but others' images.
func TestForeignImage(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	built := h.of(h.acme).MustBuild(t, within(t), body(t, app(h.acme), "FROM busybox", "RUN echo "+mark()+" > /private"))
	repository, tag, _ := cutTag(built.Image)
	for _, ref := range []string{repository + ":" + tag, repository + "@" + built.Digest, repository + ":any@" + built.Digest} {
		for name, dockerfile := range uses(ref) {
			a := h.of(h.globex).MustPost(t, within(t), body(t, app(h.globex), dockerfile...))
			if a.Code != "from_forbidden" {
				t.Errorf("%s of %s: want from_forbidden, got %v", name, ref, a)
				continue
			}
			a.WantFailed(t, "from_forbidden", repository)
			if !strings.Contains(a.Error, "Dockerfile") || !strings.Contains(a.Error, fmt.Sprint(len(dockerfile))) {
				t.Errorf("%s of %s: the error does not name line %d: %s", name, ref, len(dockerfile), a.Error)
			}
		}
		// It is acme's.
		h.of(h.acme).MustBuild(t, within(t), body(t, app(h.acme), "FROM "+ref))
	}
}

// uses are the ways in which a Dockerfile uses an image. The image is named in the last line.
func uses(ref string) map[string][]string {
	return map[string][]string{
		"FROM":             {"FROM " + ref},
		"FROM with ARG":    {"ARG BASE=" + ref, "FROM busybox AS first", "RUN true", "FROM $BASE"},
		"COPY --from":      {"FROM busybox", "COPY --from=" + ref + " /private /private"},
		"RUN --mount from": {"FROM busybox", "RUN --mount=type=bind,from=" + ref + ",target=/other cat /other/private"},
	}
}

// TestSealedSecrets: com.openfaas.secrets that acme has committed opens in no tar of another
// tenant. Each tenant has a sealing key of its own.
func TestSealedSecrets(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	value := mark()
	envelope := string(sealed(t, h.of(h.acme), map[string][]byte{"token": []byte(value)}))
	dockerfile := []string{"FROM busybox", "RUN --mount=type=secret,id=token base64 /run/secrets/token | rev; cat /run/secrets/token > /token"}
	a := h.of(h.globex).MustPost(t, within(t), stack.WithSecrets(t, body(t, app(h.globex), dockerfile...), envelope))
	a.WantFailed(t, "bad_secrets")
	built := h.of(h.acme).MustBuild(t, within(t), stack.WithSecrets(t, body(t, app(h.acme), dockerfile...), envelope))
	if got := file(t, built, "token"); got != value {
		t.Errorf("acme's own step read %q", got)
	}

	// An answer never tells whether there is a tenant.
	c := h.f.Client
	c.Tenant = "nobody-" + strings.ToLower(mark())
	decoy := publicKey(t, &c)
	for _, other := range []string{publicKey(t, h.of(h.acme)), publicKey(t, h.of(h.globex)), string(bytes.TrimSpace(h.s.PublicKey))} {
		if decoy == other {
			t.Errorf("the key of nobody is that of somebody: %s", decoy)
		}
	}
	if again := publicKey(t, &c); again != decoy {
		t.Errorf("the key of nobody was %s, and is %s", decoy, again)
	}
	c.Tenant += "-else"
	if publicKey(t, &c) == decoy {
		t.Error("two unknown names have one key, and a tenant has its own")
	}
	// A derived key is on every replica.
	_, other := stack.Test(t, stack.FunctionConfig{Secrets: h.file.Secret()})
	if publicKey(t, h.of(h.acme)) != publicKey(t, h.acme.Of(other.Client)) {
		t.Error("another replica has another key for acme")
	}
}

// TestContextByDigest: a context that acme sent ahead is no other tenant's, whoever knows its
// digest. The tags of contexts are the tenant's own.
func TestContextByDigest(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		c.Env = map[string]string{"context_repository": h.s.Registry.Image("contexts-" + h.acme.Name)}
	})
	text := mark()
	parent := t.TempDir()
	if err := stack.WriteContext(filepath.Join(parent, "context"), map[string]string{"Dockerfile": "FROM scratch\nCOPY private /\n", "private": text}); err != nil {
		t.Fatal(err)
	}
	ahead := tarOf(t, parent)
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(ahead))
	if a := sendAhead(t, h.of(h.acme), http.MethodPut, digest, ahead); a.StatusCode != http.StatusCreated {
		t.Fatalf("acme's PUT: %v", a)
	}
	with := func(of *stack.Tenant) []byte {
		c := app(of)
		c["context"] = map[string]string{"digest": digest}
		return configAlone(t, c)
	}
	if a := sendAhead(t, h.of(h.globex), http.MethodHead, digest, nil); a.StatusCode != http.StatusNotFound {
		t.Errorf("globex's HEAD: HTTP %d", a.StatusCode)
	}
	a := h.of(h.globex).MustPost(t, within(t), with(h.globex))
	a.WantFailed(t, "bad_context")
	built := h.of(h.acme).MustBuild(t, within(t), with(h.acme))
	if got := file(t, built, "private"); got != text {
		t.Errorf("acme's build has %q", got)
	}
	// The same context is globex's too, once globex has sent it: 201, as if it were new.
	if a := sendAhead(t, h.of(h.globex), http.MethodPut, digest, ahead); a.StatusCode != http.StatusCreated {
		t.Errorf("globex's PUT: %v", a)
	}
	h.of(h.globex).MustBuild(t, within(t), with(h.globex))
}

// TestCacheRepository: the cache in a registry is the tenant's own. No tenant reads
// another's, or writes one, by its name.
func TestCacheRepository(t *testing.T) {
	t.Parallel()
	var cache string
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		cache = h.s.Registry.Image("cache-" + h.acme.Name)
		c.Env = map[string]string{"cache_repository": cache}
	})
	// A step without a secret, whose result is different every time that it runs.
	dockerfile := []string{"FROM busybox", "RUN cat /proc/sys/kernel/random/uuid > /got"}
	image := app(h.acme)
	first := file(t, h.of(h.acme).MustBuild(t, within(t), body(t, image, dockerfile...)), "got")
	tags := tagsOf(t, cache)
	if len(tags) != 1 {
		t.Fatalf("the cache has the tags %q", tags)
	}

	// Another daemon knows of the cache in the registry alone.
	fresh, err := h.s.NewBuildkitd(within(t), stack.BuildkitdConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(fresh.Kill)
	_, other := stack.Test(t, stack.FunctionConfig{
		Env: map[string]string{"cache_repository": cache}, Secrets: h.file.Secret(), Buildkitd: fresh,
	})
	if again := file(t, h.acme.Of(other.Client).MustBuild(t, within(t), body(t, image, dockerfile...)), "got"); again != first {
		t.Errorf("acme's cache in the registry was not used: %q, and then %q", first, again)
	}
	// globex has the repository now. Its cache has a tag of its own all the same.
	h.globex.Images, h.acme.Images = append(h.globex.Images, h.acme.Images...), []string{h.s.Registry.Image("elsewhere-" + h.acme.Name)}
	h.write(t)
	if got := file(t, h.of(h.globex).MustBuild(t, within(t), body(t, image, dockerfile...)), "got"); got == first {
		t.Errorf("globex has what acme's step got: %q", got)
	}
	if tags := tagsOf(t, cache); len(tags) != 2 {
		t.Errorf("the cache has the tags %q", tags)
	}

	for _, tag := range tags {
		a := h.of(h.globex).MustPost(t, within(t), body(t, config{"image": cache + ":" + tag}, "FROM busybox"))
		a.WantFailed(t, "image_forbidden")
		a = h.of(h.globex).MustPost(t, within(t), body(t, app(h.globex), "FROM "+cache+":"+tag))
		a.WantFailed(t, "from_forbidden")
		a = h.of(h.acme).MustPost(t, within(t), body(t, config{"skipPush": true}, "FROM busybox", "COPY --from="+cache+":"+tag+" / /"))
		a.WantFailed(t, "from_forbidden")
	}
}

// TestBuildIDs: a call id is the tenant's. Another tenant with the same id learns nothing of
// the build, and joins no delivery of it, on the replica that built and on another one.
func TestBuildIDs(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		h.acme.Keys = append(h.acme.Keys, stack.NewTenant("").Keys...)
		h.acme.Keys[1].ID = "k2"
	})
	_, replica := stack.Test(t, stack.FunctionConfig{Secrets: h.file.Secret()})
	second := h.of(h.acme)
	second.Secret = h.acme.Keys[1].Secret

	id, m := "call-"+mark(), mark()
	request := body(t, app(h.acme), "FROM busybox", held(m))
	wait := background(t, h.of(h.acme), request, client.Queued(id))
	h.s.Buildkitd.WaitStep(t, m)
	others := map[string]*client.Client{"its replica": h.of(h.globex), "another replica": h.globex.Of(replica.Client)}
	ask := func(when, others string, acmes int) {
		t.Helper()
		for name, c := range map[string]*client.Client{"its replica": h.of(h.globex), "another replica": h.globex.Of(replica.Client)} {
			if a := c.MustVerdict(t, within(t), id); a.Code != others || a.Digest != "" || has(a.Log, m) {
				t.Errorf("%s, globex asks %s: %v", when, name, a)
			}
		}
		if a := second.MustVerdict(t, within(t), id); a.StatusCode != acmes {
			t.Errorf("%s, acme asks with its other key: %v", when, a)
		}
	}
	ask("while it runs", "not_found", http.StatusAccepted)
	// The same body and the same id, delivered by globex: nothing of acme's build.
	for name, c := range others {
		// Whoever joins acme's delivery waits for as long as it is held.
		a, err := c.Post(stack.Within(t, 20*time.Second), request, client.Queued(id), client.Accept(client.NDJSON))
		if err != nil {
			t.Errorf("globex delivers acme's call to %s: %v, %v", name, a, err)
			continue
		}
		if a.Code != "image_forbidden" || has(a.Log, m) {
			t.Errorf("globex delivers acme's call to %s: %v", name, a)
		}
	}
	// These were globex's own, and that is all that it learns.
	ask("after its own deliveries", "image_forbidden", http.StatusAccepted)
	release(t, m)
	built := wait()
	built.WantSuccess(t)
	for name, c := range others {
		if a := c.MustPost(t, within(t), request, client.Queued(id)); a.Code != "image_forbidden" || a.Digest != "" {
			t.Errorf("globex delivers acme's call to %s again: %v", name, a)
		}
	}
	ask("after its end", "image_forbidden", http.StatusOK)
	// globex's own refused call does not stand in the place of acme's.
	if a := h.of(h.acme).MustVerdict(t, within(t), id); a.Digest != built.Digest {
		t.Errorf("acme asks: %v", a)
	}
	if a := second.MustPost(t, within(t), request, client.Queued(id)); a.Digest != built.Digest {
		t.Errorf("acme delivers it again: %v", a)
	}
	if a := h.acme.Of(replica.Client).MustVerdict(t, within(t), id); a.StatusCode != http.StatusOK || a.Digest != built.Digest {
		t.Errorf("acme asks another replica: %v", a)
	}
}

// bases is a house in which both tenants may pull what is below "private" at a guard, and
// only acme has credentials for it there.
func bases(t *testing.T, tokens bool) (*house, *guard) {
	t.Helper()
	var g *guard
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		private := "private-" + h.acme.Name
		g = newGuard(t, h.s, tokens, map[string]string{"acme": private, "globex": "of-" + h.globex.Name})
		h.acme.Registry, h.globex.Registry = g.auths("acme"), g.auths("globex")
		if tokens {
			c.Env = map[string]string{"token_hosts": g.addr}
		}
	})
	return h, g
}

// TestPrivateBase: what one tenant's credentials have pulled, another tenant gets neither by
// digest nor by tag. The function asks the registry itself, with the build's own
// credentials, before it lets the daemon have the image.
func TestPrivateBase(t *testing.T) {
	t.Parallel()
	for _, tokens := range []bool{false, true} {
		t.Run(map[bool]string{false: "basic", true: "tokens"}[tokens], func(t *testing.T) {
			t.Parallel()
			h, g := bases(t, tokens)
			repository := g.image("private-" + h.acme.Name + "/base")
			text, digest := privateImage(t, h.s, repository+":v1")
			for _, ref := range []string{repository + ":v1", repository + "@" + digest} {
				for name, dockerfile := range uses(ref) {
					if _, err := h.of(h.acme).Build(within(t), body(t, app(h.acme), dockerfile...)); err != nil {
						t.Errorf("acme: %s of %s: %v", name, ref, err)
					}
				}
			}
			built := h.of(h.acme).MustBuild(t, within(t), body(t, app(h.acme), "FROM "+repository+"@"+digest))
			if got := file(t, built, "private"); got != text {
				t.Errorf("acme's build has %q", got)
			}
			// The daemon has it now. A name of globex's own leads to the same digest.
			for _, ref := range []string{
				repository + ":v1", repository + "@" + digest, repository + ":any@" + digest, repository + ":v1@" + digest,
				g.image("of-"+h.globex.Name+"/any") + "@" + digest,
			} {
				for name, dockerfile := range uses(ref) {
					a := h.of(h.globex).MustPost(t, within(t), body(t, app(h.globex), dockerfile...), client.Accept(client.NDJSON))
					if a.Status != "failed" || a.StatusCode != http.StatusOK || has(a.Log, text) {
						t.Errorf("globex: %s of %s: %v", name, ref, a)
					}
				}
			}
		})
	}
}

// TestToldDigest: a registry of globex's own tells the digest of a private base of acme's, and
// has nothing under it. The daemon has, and would not ask for it.
func TestToldDigest(t *testing.T) {
	t.Parallel()
	told := make(chan string, 1)
	own := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodHead && strings.Contains(r.URL.Path, "/manifests/") {
			digest := <-told
			told <- digest
			w.Header().Set("Docker-Content-Digest", digest)
			w.Header().Set("Content-Type", "application/vnd.docker.distribution.manifest.v2+json")
			w.Header().Set("Content-Length", "1")
			return
		}
		w.WriteHeader(http.StatusNotFound)
	}))
	t.Cleanup(own.Close)
	at := strings.TrimPrefix(own.URL, "http://")
	var g *guard
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		g = newGuard(t, h.s, false, map[string]string{"acme": "private-" + h.acme.Name})
		h.acme.Registry = g.auths("acme")
		h.globex.Registry = map[string]any{"auths": map[string]any{at: map[string]any{"username": "globex", "password": "any"}}}
	})
	base := g.image("private-" + h.acme.Name + "/base:v1")
	text, digest := privateImage(t, h.s, base)
	told <- digest
	if built := h.of(h.acme).MustBuild(t, within(t), body(t, app(h.acme), "FROM "+base, "RUN cat /private")); file(t, built, "private") != text {
		t.Error("acme does not get its base")
	}
	a := h.of(h.globex).MustPost(t, within(t), body(t, app(h.globex), "FROM "+at+"/any:v1", "RUN cat /private"), client.Accept(client.NDJSON))
	if a.Code != "registry_denied" || has(a.Log, text) {
		t.Errorf("globex: %v", a)
	}
}

// TestPrivateBaseAtOnce: builds that resolve one tag at once share neither an image nor a
// refusal. BuildKit makes one request of those that come together; a policy that gives it
// the digest leaves nothing to request.
func TestPrivateBaseAtOnce(t *testing.T) {
	t.Parallel()
	for _, first := range []string{"acme", "globex"} {
		t.Run(first+" first", func(t *testing.T) {
			t.Parallel()
			h, g := bases(t, true)
			ref := g.image("private-" + h.acme.Name + "/base:v1")
			text, _ := privateImage(t, h.s, ref)
			build := func(of *stack.Tenant) (wait func() client.Answer) {
				return background(t, h.of(of), body(t, app(of), "FROM "+ref, "RUN cat /private"))
			}
			// No answer about the manifest is given before both have been there for a
			// while.
			both := make(chan struct{})
			g.holds(func(r guarded) {
				if strings.Contains(r.path, "/manifests/") {
					<-both
				}
			})
			free := sync.OnceFunc(func() { close(both) })
			t.Cleanup(free)
			var waits [2]func() client.Answer
			order := []*stack.Tenant{h.acme, h.globex}
			if first == "globex" {
				order = []*stack.Tenant{h.globex, h.acme}
			}
			for i, of := range order {
				before := g.asked("/manifests/")
				waits[i] = build(of)
				if i == 0 {
					stack.Eventually(t, patience, func() error {
						if g.asked("/manifests/") == before {
							return fmt.Errorf("%s has not asked for the manifest", of.Name)
						}
						return nil
					})
				}
			}
			time.Sleep(time.Second)
			free()
			for i, of := range order {
				a := waits[i]()
				if of == h.acme && (a.Status != "success" || !strings.Contains(printed(a.Record), text)) {
					t.Errorf("acme: a stranger's 401 has ended its build: %v", a)
				}
				if of == h.globex && (a.Status != "failed" || strings.Contains(printed(a.Record), text)) {
					t.Errorf("globex has acme's image: %v", a)
				}
			}
			for _, r := range g.requests() {
				if strings.HasSuffix(r.path, "/manifests/v1") && strings.HasPrefix(r.agent, "buildkit") {
					t.Errorf("the daemon asked for the tag: %+v", r)
				}
			}
		})
	}
}
