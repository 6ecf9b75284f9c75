package clients_test

import (
	"context"
	"crypto/rand"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestSelf builds the builder's own image with the builder, from what stack.yml
// says, and runs it. The template's Dockerfile does the rest, the function's own
// tests included.
//
// To compile all of it takes as long as everything else here. So the daemon keeps its cache
// mounts from one run to the next, and Go compiles and tests what has changed. noCache would
// empty them.
func TestSelf(t *testing.T) {
	s := stack.Shared(t)
	ctx, cancel := context.WithTimeout(t.Context(), 25*time.Minute) // the first on a busy machine
	defer cancel()
	daemon, err := s.NewBuildkitd(ctx, stack.BuildkitdConfig{Kept: "self"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(daemon.Kill)
	// Cache mounts are in a namespace that is made of the secret.
	const secret = "the same in each run"
	_, _, f := start(t, stack.FunctionConfig{Buildkitd: daemon, Secrets: map[string][]byte{"payload-secret": []byte(secret)}})
	f.Secret = secret

	function, err := s.Description()
	if err != nil {
		t.Fatal(err)
	}
	if function.Lang != "golang-middleware" {
		t.Fatalf("stack.yml's builder is %+v", function)
	}
	dir, args, err := s.Own(ctx)
	if err != nil {
		t.Fatal(err)
	}
	args["ADDITIONAL_PACKAGE"] = "" // as faas-cli sends it
	// make lint vets the tests.
	args["GOFLAGS"] = strings.TrimSpace(args["GOFLAGS"] + " -vet=off")
	// No result of the last run's steps serves for this one.
	if err := os.WriteFile(filepath.Join(dir, "function", "run"), []byte(rand.Text()), 0o644); err != nil {
		t.Fatal(err)
	}
	ref := s.Registry.Image("self/builder:latest")
	body := stack.MustTar(t, dir, config{"image": ref, "buildArgs": args})
	got := f.MustBuild(t, ctx, body)
	img := pull(t, ctx, ref, got.Digest)

	c := configOf(t, img)
	if user := regexp.MustCompile(`^[1-9]\d*(:\d+)?$`); !user.MatchString(c.User) {
		t.Errorf("the user is %q, not a number that is not root", c.User)
	}
	if c.WorkingDir != "/home/app" || len(c.Cmd) != 1 || c.Cmd[0] != "./fwatchdog" {
		t.Errorf("the config is %+v", c)
	}
	checkSelfFiles(t, img)
	size := sizeOf(t, img)
	t.Logf("the image is %.1f MiB compressed, built in %.0f s", float64(size)/(1<<20), got.Duration)
	if size > 30<<20 {
		t.Errorf("the image is %d bytes compressed, over 30 MiB", size)
	}

	if !function.ReadOnly {
		t.Error("stack.yml does not ask for a read-only root file system")
	}
	f.Kill() // the real of-watchdog's metrics port is fixed
	checkSelfBuilds(t, ctx, s, img, f, function.Environment)
}

// checkSelfBuilds runs the image as OpenFaaS does, but for its ports, and builds with
// it: its user reads the secrets, and of its file system only /tmp can be written.
func checkSelfBuilds(t *testing.T, ctx context.Context, s *stack.Stack, img v1.Image, f *stack.Function, environment map[string]string) {
	t.Helper()
	secrets := t.TempDir() // for all to read, as Kubernetes mounts them
	if err := os.CopyFS(secrets, os.DirFS(f.SecretsDir)); err != nil {
		t.Fatal(err)
	}
	var ports [2]int
	for i := range ports {
		var err error
		if ports[i], err = stack.FreePort(); err != nil {
			t.Fatal(err)
		}
	}
	var env []string
	for name, value := range environment {
		env = append(env, name+"="+value)
	}
	// The last of a name counts.
	env = append(env, fmt.Sprint("port=", ports[0]), fmt.Sprint("upstream_url=http://127.0.0.1:", ports[1]), "buildkit_addr="+s.Buildkitd.Addr)
	container, err := s.Run(ctx, img, stack.RunConfig{
		Env: env, ReadOnly: true, HostNetwork: true, Mounts: map[string]string{"/var/openfaas/secrets": secrets},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(container.Kill)
	for path, want := range map[string]string{"/ready": "ready", "/": `"name": "builder"`, "/metrics": "builder_"} {
		if status, got, err := container.Get(ctx, ports[0], path); err != nil || status != 200 || !strings.Contains(got, want) {
			t.Fatalf("%s answers %d, %.200q, %v, want %q", path, status, got, err, want)
		}
	}
	// Larger than spool_memory_bytes, so that it goes through /tmp.
	noise := make([]byte, 8<<20)
	mathrand.NewChaCha8([32]byte{}).Read(noise)
	ref := s.Registry.Image("self/built-by-it:latest")
	itself := &client.Client{URL: fmt.Sprint("http://127.0.0.1:", ports[0]), Secret: f.Secret, Strict: true}
	got := itself.MustBuild(t, ctx, stack.Body(t, config{"image": ref}, map[string]string{
		"Dockerfile": "FROM busybox\nRUN echo built > /built\nCOPY noise /\n", "noise": string(noise),
	}))
	if files := contents(t, pull(t, ctx, ref, got.Digest), ""); files["built"] != "built\n" || files["noise"] != string(noise) {
		t.Errorf("the image holds built %q and %d bytes of noise", files["built"], len(files["noise"]))
	}
}

// checkSelfFiles expects what the function needs and no more.
func checkSelfFiles(t *testing.T, img v1.Image) {
	t.Helper()
	files := stack.MustFiles(t, img)
	var names []string
	for name, file := range files {
		if file.FileInfo().Mode().IsRegular() {
			names = append(names, name)
		}
	}
	want := map[string]int64{
		"home/app/handler":                  0o755,
		"home/app/fwatchdog":                0o755,
		"etc/passwd":                        0o644,
		"etc/group":                         0o644,
		"etc/ssl/certs/ca-certificates.crt": 0o644,
	}
	for name, mode := range want {
		if file := files[name]; file == nil || file.Mode&0o7777 != mode || file.Size == 0 || file.Uid != 0 {
			t.Errorf("%s is %+v, want mode %o of root", name, file, mode)
		}
	}
	if len(names) != len(want) {
		t.Errorf("the image holds %q", names)
	}
	for name, file := range files {
		if file.Mode&0o6000 != 0 || file.Mode&0o002 != 0 && name != "tmp" && file.FileInfo().Mode().Type() != os.ModeSymlink {
			t.Errorf("%s has mode %o", name, file.Mode)
		}
	}
}

// sizeOf is what a node downloads.
func sizeOf(t *testing.T, img v1.Image) (size int64) {
	t.Helper()
	for _, layer := range manifest(t, img).Layers {
		size += layer.Size
	}
	return size
}
