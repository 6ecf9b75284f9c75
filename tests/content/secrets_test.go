package content_test

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"handler/function/tests/stack"
)

// TestSecretInLayer has a step put a build secret into a layer. BuildKit's own
// cache would hand that layer to every later build of the same Dockerfile.
func TestSecretInLayer(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	context := []entry{{name: "Dockerfile", text: `FROM busybox
RUN --mount=type=secret,id=token cat /run/secrets/token > /got || echo none > /got
RUN --mount=type=secret,id=token --mount=type=cache,target=/cache cat /run/secrets/token > /again || echo none > /again
`}}
	image := s.Registry.Image("secret-layer:latest")
	first, second := rand.Text(), rand.Text()
	for _, tt := range []struct {
		name    string
		secrets map[string]string
		want    string
		cached  bool
	}{
		{"one", map[string]string{"token": first}, first, false},
		{"another", map[string]string{"token": second}, second, false},
		{"none", nil, "none\n", false},
		{"of another name", map[string]string{"other": first}, "none\n", false},
		{"one more beside it", map[string]string{"token": first, "other": second}, first, false},
		{"the first again", map[string]string{"token": first}, first, true},
		{"none again", nil, "none\n", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var sealed []byte
			if tt.secrets != nil {
				sealed = sealFor(t, s, tt.secrets)
			}
			built := f.MustBuild(t, ctx, body(t, config{"image": image}, sealed, context...))
			for _, path := range []string{"got", "again"} {
				if got := mustPulled(t, ctx, built, path); got != tt.want {
					t.Errorf("/%s holds %q, want %q", path, got, tt.want)
				}
			}
			// A cache that is never used would be correct too.
			log := strings.Join(built.Log, "\n")
			if cached := regexp.MustCompile(` 3/3\] RUN .* CACHED`).MatchString(log); cached != tt.cached {
				t.Errorf("cached is %v, want %v:\n%s", cached, tt.cached, log)
			}
		})
	}
}

// TestReservedArgs sends the build arguments that would undo what keeps builds
// apart.
func TestReservedArgs(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	context := []entry{{name: "Dockerfile", text: "FROM scratch\nCOPY Dockerfile /\n"}}
	for _, name := range []string{
		"BUILDKIT_SANDBOX_HOSTNAME", "BUILDKIT_CACHE_MOUNT_NS", "BUILDKIT_SYNTAX", "BUILDKIT_INLINE_CACHE",
		"BUILDKIT_CONTEXT_KEEP_GIT_DIR", "BUILDKIT_MULTI_PLATFORM", "BUILDKIT_", "BUILDKIT_DOCKERFILE_CHECK",
	} {
		r := f.MustFail(t, ctx, body(t, config{"image": s.Registry.Image("args:latest"), "buildArgs": map[string]string{name: "x"}}, nil, context...), "bad_config")
		if !strings.Contains(r.Error, name) {
			t.Errorf("the error does not say %s: %s", name, r.Error)
		}
		empty := body(t, config{"skipPush": true, "buildArgs": map[string]string{name: ""}}, nil, context...)
		if a := f.MustPost(t, ctx, empty); a.StatusCode != 400 {
			t.Errorf("%s: want HTTP 400, got %v", name, a)
		}
	}
	wantStarted(t, ctx, f, 0)
}

// TestDockerfileArgs has the Dockerfile itself say what build arguments may
// not: the host name, which carries the secrets' hash, and the cache mounts'
// namespace stay what they are.
func TestDockerfileArgs(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	dockerfile := `ARG BUILDKIT_SANDBOX_HOSTNAME=chosen
ARG BUILDKIT_CACHE_MOUNT_NS=chosen
FROM busybox
ARG BUILDKIT_SANDBOX_HOSTNAME=chosen
ARG BUILDKIT_CACHE_MOUNT_NS=chosen
`
	hostname := func(sealed []byte, dockerfile string) string {
		t.Helper()
		// A comment alone would not make the step run again.
		built := f.MustBuild(t, ctx, body(t, config{"skipPush": true}, sealed, entry{name: "Dockerfile", text: dockerfile + "RUN hostname # " + rand.Text() + "\n"}))
		return strings.Join(printed(built.Log), "\n")
	}
	plain := hostname(nil, "FROM busybox\n")
	if !regexp.MustCompile(`^[0-9a-f]{40}$`).MatchString(plain) {
		t.Errorf("the host name is %q", plain)
	}
	if got := hostname(nil, dockerfile); got != plain {
		t.Errorf("the Dockerfile has made the host name %q of %q", got, plain)
	}
	sealed := sealFor(t, s, map[string]string{"token": rand.Text()})
	if got := hostname(sealed, "FROM busybox\n"); got == plain {
		t.Error("with and without a secret, the host name is the same")
	} else if again := hostname(sealed, dockerfile); again != got {
		t.Errorf("the Dockerfile has made the host name %q of %q", again, got)
	}

	// What one build leaves in a cache mount, the next one finds, whatever its
	// Dockerfile says of the namespace.
	mark := rand.Text()
	for i, from := range []string{"FROM busybox\n", dockerfile} {
		built := f.MustBuild(t, ctx, body(t, config{"skipPush": true}, nil, entry{name: "Dockerfile",
			text: from + fmt.Sprintf("RUN --mount=type=cache,id=%s,target=/cache cat /cache/*; echo build %d > /cache/%d\n", mark, i, i)}))
		if got := slices.Contains(printed(built.Log), "build 0"); got != (i == 1) {
			t.Errorf("build %d printed %q", i, printed(built.Log))
		}
	}
}

// TestCredentials looks for the registry's password and for private keys
// everywhere that a step can look, and in all that comes out of a build that
// needs them.
func TestCredentials(t *testing.T) {
	user, password := "pusher", "canary-"+rand.Text()
	sh := stack.Shared(t)
	line, err := stack.Htpasswd(user, password)
	if err != nil {
		t.Fatal(err)
	}
	htpasswd := t.TempDir() + "/htpasswd"
	if err := os.WriteFile(htpasswd, []byte(line), 0o644); err != nil {
		t.Fatal(err)
	}
	registry, err := sh.NewRegistry(t.Context(), map[string]string{
		"REGISTRY_AUTH_HTPASSWD_REALM": "test", "REGISTRY_AUTH_HTPASSWD_PATH": htpasswd,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer registry.Kill()
	auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
	docker, err := json.Marshal(map[string]any{"auths": map[string]any{registry.Addr: map[string]string{"auth": auth}}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, s, f := start(t, stack.FunctionConfig{Secrets: map[string][]byte{"registry-config": docker}})

	built := f.MustBuild(t, ctx, body(t, config{"image": registry.Image("canary:latest")}, nil, entry{name: "Dockerfile", text: `FROM busybox
RUN env > /seen; cat /proc/*/environ /proc/*/cmdline /proc/mounts >> /seen; \
    ls -la / /root /run /run/secrets /var/run /root/.docker /etc/buildkit >> /seen 2>&1; \
    find / -xdev -type f -size -1000 -not -path '/seen' -exec cat {} + >> /seen 2>/dev/null; true
`}))
	if _, err := pull(ctx, built); err == nil {
		t.Fatal("the registry gives its images to everyone")
	}
	home := stack.Context(t, map[string]string{"config.json": string(docker)})
	t.Setenv("DOCKER_CONFIG", home)
	img, err := pull(ctx, built)
	if err != nil {
		t.Fatal(err)
	}
	files := string(everything(t, img))
	log, err := f.Log()
	if err != nil {
		t.Fatal(err)
	}
	daemon, err := os.ReadFile(s.Buildkitd.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	answer, err := json.Marshal(built)
	if err != nil {
		t.Fatal(err)
	}
	for where, text := range map[string]string{
		"what the step saw, and the image": files, "the function's log": log, "the daemon's log": string(daemon), "the answer": string(answer),
	} {
		for _, secret := range []string{password, auth, base64.RawURLEncoding.EncodeToString([]byte(password)), "PRIVATE KEY", s.PayloadSecret} {
			if i := strings.Index(text, secret); i >= 0 {
				t.Errorf("%s holds %q: …%q…", where, secret, text[max(0, i-100):min(len(text), i+100)])
			}
		}
	}
	if !strings.Contains(files, "PATH=") || !strings.Contains(files, "root:x:0:0") {
		t.Error("the step did not see what it should: its environment and /etc/passwd")
	}
}
