package clients_test

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"gopkg.in/yaml.v3"

	"handler/function/tests/stack"
)

// TestSelf builds the builder's own image with the builder, from what stack.yml
// says, and runs it. The template's Dockerfile does the rest, the function's own
// tests included.
func TestSelf(t *testing.T) {
	_, s, f := start(t, stack.FunctionConfig{})
	ctx, cancel := context.WithTimeout(t.Context(), 12*time.Minute)
	defer cancel()

	text, err := os.ReadFile(filepath.Join(s.Repo, "stack.yml"))
	if err != nil {
		t.Fatal(err)
	}
	var services struct {
		Functions map[string]struct {
			Lang        string            `yaml:"lang"`
			Handler     string            `yaml:"handler"`
			Environment map[string]string `yaml:"environment"`
			BuildArgs   map[string]string `yaml:"build_args"`
		} `yaml:"functions"`
	}
	if err := yaml.Unmarshal(text, &services); err != nil {
		t.Fatal(err)
	}
	function := services.Functions["builder"]
	if function.Lang != "golang-middleware" {
		t.Fatalf("stack.yml's builder is %+v", function)
	}
	dir, err := s.Assemble("builder", filepath.Join(s.Repo, function.Handler))
	if err != nil {
		t.Fatal(err)
	}

	buildArgs := config{"ADDITIONAL_PACKAGE": ""}
	for name, value := range function.BuildArgs {
		buildArgs[name] = value
	}
	for _, name := range []string{"GOPROXY", "GONOSUMDB", "GOPRIVATE", "GONOPROXY", "GOSUMDB"} {
		if value := strings.TrimSpace(string(output(t, s.Repo, nil, "go", "env", name))); value != "" {
			buildArgs[name] = value
		}
	}
	ref := s.Registry.Image("self/builder:latest")
	body, err := stack.Tar(dir, config{"image": ref, "buildArgs": buildArgs})
	if err != nil {
		t.Fatal(err)
	}
	got := mustBuild(t, ctx, f, body)
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

	env := []string{"disable_hmac=true"}
	for name, value := range function.Environment {
		if !strings.Contains(value, "${") {
			env = append(env, name+"="+value)
		}
	}
	container, err := s.Run(ctx, img, env)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{"/ready": "ready", "/": `"name": "builder"`, "/metrics": "builder_"} {
		if status, got, err := container.Get(ctx, 8080, path); err != nil || status != 200 || !strings.Contains(got, want) {
			t.Errorf("%s answers %d, %.200q, %v, want %q", path, status, got, err, want)
		}
	}
}

// checkSelfFiles expects what the function needs and no more.
func checkSelfFiles(t *testing.T, img v1.Image) {
	t.Helper()
	files, err := stack.Files(img)
	if err != nil {
		t.Fatal(err)
	}
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
