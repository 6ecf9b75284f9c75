package tenants_test

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestImages: a tenant pushes below its own prefixes alone.
func TestImages(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	own := h.acme.Images[0]
	for image, allowed := range map[string]bool{
		own + ":v1":                true,
		own + "/deep/er:v1":        true,
		own + "2/app:v1":           false,
		own + "-2:v1":              false,
		h.globex.Images[0] + ":v1": false,
		h.s.Registry.Image("x:v1"): false,
	} {
		a := h.of(h.acme).MustPost(t, within(t), body(t, config{"image": image}, "FROM scratch", "LABEL a=b"))
		if allowed {
			a.WantSuccess(t)
		} else {
			a.WantFailed(t, "image_forbidden")
		}
	}
	c := app(h.acme)
	c["tags"] = []string{own + "/other:v1", h.globex.Images[0] + "/app:v1"}
	h.of(h.acme).MustPost(t, within(t), body(t, c, "FROM scratch", "LABEL a=b")).WantFailed(t, "image_forbidden", h.globex.Images[0])
}

// TestFrom: a tenant pulls what its patterns match, and its own images.
func TestFrom(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		h.acme.From = []string{"docker.io/library/busybox", h.s.Registry.Image("library/*")}
		h.globex.From = []string{}
		c.Env = map[string]string{"cache_repository": h.s.Registry.Image("library/cache")}
	})
	own := h.acme.Images[0] + "/base:v1"
	h.of(h.acme).MustBuild(t, within(t), body(t, config{"image": own}, "FROM busybox", "RUN echo private > /private"))
	for _, test := range []struct {
		of      *stack.Tenant
		ref     string
		allowed bool
	}{
		{h.acme, own, true},
		{h.acme, "busybox", true},
		{h.acme, "docker.io/library/busybox:latest", true},
		{h.acme, h.s.Registry.Image("library/busybox:latest"), true},
		{h.acme, h.s.Registry.Image("library/cache:any"), false}, // the builder's own, whatever from says
		{h.acme, "alpine", false},
		{h.acme, "busybox2", false},
		{h.acme, h.s.Registry.Image("other/library/busybox"), false},
		{h.globex, "busybox", false},
		{h.globex, own, false},
		{h.globex, "scratch", true}, // no image
	} {
		for name, dockerfile := range uses(test.ref) {
			// What is missing in an image that may be pulled is not the question here.
			dockerfile = append(dockerfile[:len(dockerfile)-1:len(dockerfile)-1], strings.NewReplacer("/private /private", "/ /", "cat /other/private", "true").Replace(dockerfile[len(dockerfile)-1]))
			if test.of == h.globex {
				if name != "FROM" {
					continue // its other stages are busybox, which it may not pull
				}
				dockerfile = append(dockerfile, "LABEL a=b")
			}
			a := h.of(test.of).MustPost(t, within(t), body(t, config{"skipPush": true}, dockerfile...))
			if test.allowed && a.Status != "success" || !test.allowed && a.Code != "from_forbidden" {
				t.Errorf("%s: %s of %s: %v", test.of.Name, name, test.ref, a)
			}
		}
	}
}

// TestLine: the error names the Dockerfile and the line in it, and what may be pulled.
func TestLine(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) { h.acme.From = []string{"docker.io/library/busybox"} })
	request := stack.Body(t, config{"skipPush": true, "dockerfile": "deep/Other"}, map[string]string{
		"deep/Other": "# comment\nFROM busybox AS one\n\nRUN true\nFROM \\\n  alpine\nCOPY --from=one /bin/sh /sh2\n",
	})
	for _, accept := range []string{"", client.NDJSON, client.SSE} {
		a := h.of(h.acme).MustPost(t, within(t), request, client.Accept(accept))
		a.WantFailed(t, "from_forbidden", `"alpine:latest"`, "Other:5")
	}
	// The function looks for the line itself. The daemon has expanded none of these variables.
	bomb := body(t, config{"skipPush": true}, "FROM alpine", "ENV A=xxxxxxxx"+strings.Repeat("\nENV A=$A$A", 40))
	h.of(h.acme).MustPost(t, within(t), bomb).WantFailed(t, "from_forbidden", `"alpine:latest"`)
}

// TestAdd: ADD reads what is at the hosts that a tenant may have contexts from.
func TestAdd(t *testing.T) {
	t.Parallel()
	files := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "a file") }))
	t.Cleanup(files.Close)
	git := stack.NewGitServer(t, "")
	work := git.Repository(t, "app.git", map[string]string{"file": "in git"})
	commit := stack.Git(t, work, "rev-parse", "HEAD")
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		h.acme.ContextHosts = []string{files.URL, git.URL}
		h.globex.ContextHosts = []string{}
		c.Env = map[string]string{"context_hosts": files.URL}
	})
	sum := fmt.Sprintf("%x", sha256.Sum256([]byte("a file")))
	for name, test := range map[string]struct {
		add  string
		file string // that is in the image then
	}{
		"http":          {"ADD " + files.URL + "/file /file", "a file"},
		"http checksum": {"ADD --checksum=sha256:" + sum + " " + files.URL + "/file /file", "a file"},
		"git":           {"ADD " + git.URL + "/app.git#main /", "in git"},
		"git by commit": {"ADD " + git.URL + "/app.git#" + commit + " /", "in git"},
	} {
		dockerfile := []string{"FROM busybox", test.add}
		built := h.of(h.acme).MustPost(t, within(t), body(t, app(h.acme), dockerfile...))
		if built.Status != "success" || file(t, built.Record, "file") != test.file {
			t.Errorf("acme, %s: %v", name, built)
		}
		// The daemon has it now.
		seen := len(git.Seen())
		if a := h.of(h.globex).MustPost(t, within(t), body(t, app(h.globex), dockerfile...)); a.Code != "from_forbidden" || !strings.Contains(a.Error, "Dockerfile:2") {
			t.Errorf("globex, %s: %v", name, a)
		}
		if now := len(git.Seen()); now > seen {
			t.Errorf("globex, %s: git was asked %d times", name, now-seen)
		}
	}
}

// TestGitContext: a tenant has git contexts from its own hosts, with its own credentials.
func TestGitContext(t *testing.T) {
	t.Parallel()
	const password = "a-password-of-acme"
	git := stack.NewGitServer(t, "acme:"+password)
	work := git.Repository(t, "app.git", map[string]string{"Dockerfile": "FROM scratch\nCOPY file /file\n", "file": "private"})
	commit := stack.Git(t, work, "rev-parse", "HEAD")
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		h.acme.GitCredentials = []string{strings.Replace(git.URL, "://", "://acme:"+url.QueryEscape(password)+"@", 1)}
		h.acme.ContextHosts = []string{git.URL}
		h.globex.ContextHosts = []string{git.URL}
	})
	from := func(of *stack.Tenant, ref string) []byte {
		c := app(of)
		c["context"] = map[string]string{"git": git.URL + "/app.git" + ref}
		return configAlone(t, c)
	}
	for _, ref := range []string{"", "#main", "#" + commit} {
		built := h.of(h.acme).MustBuild(t, within(t), from(h.acme, ref))
		if got := file(t, built, "file"); got != "private" {
			t.Errorf("acme, %q: %q", ref, got)
		}
	}
	for _, ref := range []string{"", "#main", "#" + commit} {
		if a := h.of(h.globex).MustPost(t, within(t), from(h.globex, ref)); a.Code != "bad_context" {
			t.Errorf("globex, %q: %v", ref, a)
		}
		dockerfile := []string{"FROM busybox", "ADD " + git.URL + "/app.git" + ref + " /"}
		if a := h.of(h.globex).MustPost(t, within(t), body(t, app(h.globex), dockerfile...)); a.Status != "failed" {
			t.Errorf("globex adds %q: %v", ref, a)
		}
	}
	h.globex.ContextHosts = []string{"example.com"}
	h.write(t)
	h.of(h.globex).MustPost(t, within(t), from(h.globex, "")).WantFailed(t, "context_forbidden")
	log, err := h.f.Log()
	if err != nil || strings.Contains(log, password) {
		t.Errorf("the log has the password: %v", err)
	}
}

// TestLimits: platforms, sizes and times are the tenant's, where they are less than the
// installation's.
func TestLimits(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		h.acme.Platforms, h.acme.MaxBodyBytes = []string{"linux/amd64"}, "64KiB"
		h.globex.MaxBodyBytes, h.globex.BuildTimeout = "1TiB", "24h"
		c.Env = map[string]string{"max_body_bytes": "2MiB", "build_timeout": "10m"}
		h.crowd(9)
	})
	with := func(of *stack.Tenant, platform string) []byte {
		c := app(of)
		c["platforms"] = []string{platform}
		return body(t, c, "FROM scratch", "LABEL a=b")
	}
	h.of(h.acme).MustPost(t, within(t), with(h.acme, "linux/amd64")).WantSuccess(t)
	h.of(h.acme).MustPost(t, within(t), with(h.acme, "linux/arm64")).WantFailed(t, "platform_forbidden", "linux/arm64")
	h.of(h.globex).MustPost(t, within(t), with(h.globex, "linux/arm64")).WantSuccess(t)

	sized := func(of *stack.Tenant, n int) []byte {
		return stack.Body(t, app(of), map[string]string{"Dockerfile": "FROM scratch\nCOPY noise /\n", "noise": strings.Repeat(mark(), n/len(mark()))})
	}
	for _, c := range []*client.Client{h.of(h.acme), h.nameless(h.acme)} {
		c.MustPost(t, within(t), sized(h.acme, 40<<10)).WantSuccess(t)
		c.MustPost(t, within(t), sized(h.acme, 100<<10)).WantFailed(t, "too_large", "65536")
	}
	h.of(h.globex).MustPost(t, within(t), sized(h.globex, 100<<10)).WantSuccess(t)
	h.of(h.globex).MustPost(t, within(t), sized(h.globex, 3<<20)).WantFailed(t, "too_large", "2097152")

	// Not before: a busy machine may take longer for a build that is to succeed.
	h.acme.BuildTimeout = "3s"
	h.write(t)
	m := mark()
	h.of(h.acme).MustPost(t, within(t), body(t, app(h.acme), "FROM busybox", held(m))).WantFailed(t, "deadline", "3s")
	h.s.Buildkitd.WaitGone(t, m, patience)
	h.of(h.globex).MustPost(t, within(t), body(t, app(h.globex), "FROM busybox", "RUN sleep 4; : "+mark())).WantSuccess(t)
}

// TestStepLimits: memory and cpus bound each step.
func TestStepLimits(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) { h.acme.Memory, h.acme.CPUs = "32MiB", 0.25 })
	// tail keeps what it reads, and its end is the step's.
	hungry := func(of *stack.Tenant) []byte {
		return body(t, app(of), "FROM busybox", "RUN : "+mark()+"; head -c 128000000 /dev/zero | tail -c 128000000 > /dev/null")
	}
	h.of(h.acme).MustPost(t, within(t), hungry(h.acme)).WantFailed(t, "build_failed")
	h.of(h.globex).MustPost(t, within(t), hungry(h.globex)).WantSuccess(t)

	m := mark()
	wait := background(t, h.of(h.acme), body(t, app(h.acme), "FROM busybox", held(m)))
	h.s.Buildkitd.WaitStep(t, m)
	limits := limitsOf(t, m)
	if limits.memory != 32<<20 || limits.cpus != 0.25 {
		t.Errorf("the step's cgroup has %+v", limits)
	}
	release(t, m)
	wait().WantSuccess(t)
}

// stepLimits are what a step's cgroup says.
type stepLimits struct {
	memory int64
	cpus   float64
}

// limitsOf are the limits of the step with a mark, under cgroup v1 or v2.
func limitsOf(t *testing.T, m string) (l stepLimits) {
	t.Helper()
	var pids []int
	stack.Eventually(t, patience, func() error {
		// The step's shell is there before its child.
		if pids = stack.Sleepers(t, m); len(pids) == 0 {
			return errors.New("the step has no process")
		}
		return nil
	})
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pids[0]))
	if err != nil {
		t.Fatal(err)
	}
	read := func(format string, into ...any) func(path ...string) bool {
		return func(path ...string) bool {
			text, err := os.ReadFile(filepath.Join(path...))
			if err != nil {
				return false
			}
			_, err = fmt.Sscanf(string(text), format, into...)
			return err == nil
		}
	}
	var quota, period float64
	for line := range strings.Lines(string(groups)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		for controller := range strings.SplitSeq(parts[1], ",") {
			dir := filepath.Join("/sys/fs/cgroup", controller, parts[2])
			switch controller {
			case "":
				read("%d", &l.memory)(dir, "memory.max")
				read("%f %f", &quota, &period)(dir, "cpu.max")
			case "memory":
				read("%d", &l.memory)(dir, "memory.limit_in_bytes")
			case "cpu":
				read("%f", &quota)(dir, "cpu.cfs_quota_us")
				read("%f", &period)(dir, "cpu.cfs_period_us")
			}
		}
	}
	l.cpus = quota / period
	return l
}

// TestCredentials: a tenant's pushes and pulls have its own credentials, or the builder's if
// the file says so, and never another's.
func TestCredentials(t *testing.T) {
	t.Parallel()
	for _, tokens := range []bool{false, true} {
		t.Run(map[bool]string{false: "basic", true: "tokens"}[tokens], func(t *testing.T) {
			t.Parallel()
			var g *guard
			h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
				g = newGuard(t, h.s, tokens, map[string]string{
					"acme": "of-" + h.acme.Name, "globex": "of-" + h.globex.Name, "builder": "of-builder",
				})
				h.acme.Images = []string{g.image("of-" + h.acme.Name)}
				h.globex.Images = []string{g.image("of-" + h.globex.Name)}
				h.acme.Registry = g.auths("acme")
				third := stack.NewTenant("third-"+h.acme.Name, g.image("of-builder"))
				third.Registry = "builder"
				h.file.Tenants[third.Name] = third
				config, err := json.Marshal(g.auths("builder"))
				if err != nil {
					t.Fatal(err)
				}
				c.Secrets = map[string][]byte{"registry-config": config}
				if tokens {
					c.Env = map[string]string{"token_hosts": g.addr}
				}
			})
			dockerfile := []string{"FROM busybox", "LABEL mark=" + mark()}
			third := h.file.Tenants["third-"+h.acme.Name]
			h.of(h.acme).MustPost(t, within(t), body(t, app(h.acme), dockerfile...)).WantSuccess(t)
			h.of(third).MustPost(t, within(t), body(t, app(third), dockerfile...)).WantSuccess(t)
			// It has none, on a daemon that has just had acme's and the builder's.
			h.of(h.globex).MustPost(t, within(t), body(t, app(h.globex), dockerfile...)).WantFailed(t, "registry_denied")
			for _, r := range g.requests() {
				if r.user != "" && !strings.HasPrefix(r.path, g.users[r.user].prefix+"/") {
					t.Errorf("%s came with the credentials of %s", r.path, r.user)
				}
			}
			// And now it has, without a restart.
			h.globex.Registry = g.auths("globex")
			h.write(t)
			h.of(h.globex).MustPost(t, within(t), body(t, app(h.globex), dockerfile...)).WantSuccess(t)
		})
	}
}

// TestBasicCache: where one registry that takes only user and password holds the cache and a
// tenant's images, that tenant has no cache there: the daemon asks for credentials by the
// host alone. A warning says so.
func TestBasicCache(t *testing.T) {
	t.Parallel()
	var g *guard
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		g = newGuard(t, h.s, false, map[string]string{"acme": "of-" + h.acme.Name, "builder": "cache-" + h.acme.Name})
		h.acme.Images, h.acme.Registry = []string{g.image("of-" + h.acme.Name)}, g.auths("acme")
		config, err := json.Marshal(g.auths("builder"))
		if err != nil {
			t.Fatal(err)
		}
		c.Secrets = map[string][]byte{"registry-config": config}
		c.Env = map[string]string{"cache_repository": g.image("cache-" + h.acme.Name)}
	})
	built := h.of(h.acme).MustBuild(t, within(t), body(t, app(h.acme), "FROM busybox", "RUN : "+mark()))
	if !has(built.Warnings, "cache") {
		t.Errorf("no warning tells of the cache: %q", built.Warnings)
	}
	// globex's images are elsewhere.
	built = h.of(h.globex).MustBuild(t, within(t), body(t, app(h.globex), "FROM busybox", "RUN : "+mark()))
	if has(built.Warnings, "cache") {
		t.Errorf("globex is warned: %q", built.Warnings)
	}
	if tags := tagsOf(t, h.s.Registry.Image("cache-"+h.acme.Name)); len(tags) != 1 {
		t.Errorf("the cache has the tags %q", tags)
	}
}

// TestOwnDaemons: a tenant with a pool of its own builds there and nowhere else.
func TestOwnDaemons(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	gold, err := s.NewBuildkitd(within(t), stack.BuildkitdConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(gold.Kill)
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		h.file.Pools = map[string][]string{"gold": {gold.Addr}}
		h.acme.Daemons, h.globex.Daemons = "gold", "shared"
	})
	for of, b := range map[*stack.Tenant]*stack.Buildkitd{h.acme: gold, h.globex: s.Buildkitd} {
		m := mark()
		wait := background(t, h.of(of), body(t, app(of), "FROM busybox", held(m)))
		b.WaitStep(t, m)
		release(t, m)
		a := wait()
		a.WantSuccess(t)
		if got := ended(t, h.f, a.ID)["daemon"]; got != b.Addr {
			t.Errorf("%s built on %v, want %s", of.Name, got, b.Addr)
		}
	}
	// A queued build's verdict is in the history of its own pool.
	id := "call-" + mark()
	a := h.of(h.acme).MustPost(t, within(t), body(t, app(h.acme), "FROM busybox", "RUN : "+mark()), client.Queued(id))
	a.WantSuccess(t)
	_, replica := stack.Test(t, stack.FunctionConfig{Secrets: h.file.Secret()})
	if v := h.acme.Of(replica.Client).MustVerdict(t, within(t), id); v.StatusCode != http.StatusOK || v.Digest != a.Digest {
		t.Errorf("another replica knows of it: %v", v)
	}
	// With its own daemons gone, the shared one does not take its place.
	gold.Kill()
	began := time.Now()
	a = h.of(h.acme).MustPost(t, within(t), body(t, app(h.acme), "FROM busybox", "RUN : "+mark()))
	a.WantFailed(t, "no_daemon")
	t.Logf("no_daemon after %v", time.Since(began).Round(time.Millisecond))
	h.of(h.globex).MustPost(t, within(t), body(t, app(h.globex), "FROM busybox", "RUN : "+mark())).WantSuccess(t)
	// The file moves it, without a restart.
	h.acme.Daemons = ""
	h.write(t)
	h.of(h.acme).MustPost(t, within(t), body(t, app(h.acme), "FROM busybox", "RUN : "+mark())).WantSuccess(t)
}

// TestAsked: the function itself asks Docker Hub, because somebody here has credentials for it. It
// asks where registry_mirrors says that Docker Hub is, and not for what from_unasked matches.
func TestAsked(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		env   func(g *guard) map[string]string
		code  string // of the build
		asked bool
	}{
		"neither": {func(*guard) map[string]string { return nil }, "registry_failed", false},
		"registry_mirrors": {func(g *guard) map[string]string {
			return map[string]string{"registry_mirrors": "docker.io=http://" + g.addr}
		}, "", true},
		"from_unasked": {func(*guard) map[string]string { return map[string]string{"from_unasked": "docker.io/library/*"} }, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var g *guard
			h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
				g = newGuard(t, h.s, false, map[string]string{"hub": "library"})
				login := g.auths("hub")["auths"].(map[string]any)[g.addr]
				h.acme.Registry = map[string]any{"auths": map[string]any{"https://index.docker.io/v1/": login}}
				// No name is known here, so that nothing leaves the machine.
				c.Env, c.Nameserver = test.env(g), "127.0.0.1"
			})
			a := h.of(h.acme).MustPost(t, within(t), body(t, config{"skipPush": true}, "FROM busybox", "RUN : "+mark()))
			if a.Code != test.code {
				t.Errorf("acme: %v", a)
			}
			if asked := g.asked("library/busybox/manifests/") > 0; asked != test.asked {
				t.Errorf("that the mirror was asked is %v", asked)
			}
			// globex has no credentials, and the registry answers it as it answers anybody.
			a = h.of(h.globex).MustPost(t, within(t), body(t, config{"skipPush": true}, "FROM busybox", "RUN : "+mark()))
			if want := map[string]string{"registry_mirrors": "registry_denied"}[name]; want != "" && a.Code != want || want == "" && a.Code != test.code {
				t.Errorf("globex: %v", a)
			}
		})
	}
}
