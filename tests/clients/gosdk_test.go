package clients_test

import (
	"cmp"
	"encoding/json"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/stack"
)

// sdkFiles is a context whose image shows what became of it: contents, modes,
// config, labels, and a step that ran.
var sdkFiles = map[string]string{
	"Dockerfile": `FROM busybox
ARG GREETING=nobody
ARG ADDITIONAL_PACKAGE=unset
LABEL org.example.greeting=$GREETING org.example.package=<$ADDITIONAL_PACKAGE>
COPY app /app
RUN echo "$GREETING" > /greeting
WORKDIR /app
USER 1000:1000
ENV MODE=test
EXPOSE 8080
ENTRYPOINT ["/app/run.sh"]
CMD ["one", "two"]
`,
	"app/run.sh":           "#!/bin/sh\ncat /greeting; echo $MODE $*\n",
	"app/deep/er/data.txt": "data\n",
	"not-copied":           "x",
}

func TestGoSDK(t *testing.T) { everybody(t, testGoSDK) }

func testGoSDK(t *testing.T, start starter) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	client := sdkClient(t, f)

	builds := map[string]func(tar string) (builder.BuildResult, error){
		"Build": client.Build,
		"BuildWithStream": func(tar string) (builder.BuildResult, error) {
			return lastResult(client.BuildWithStream(tar))
		},
	}
	for name, build := range builds {
		t.Run(name, func(t *testing.T) {
			ref := f.Image("gosdk:" + strings.ToLower(name))
			result, err := build(sdkTar(t, sdkFiles, &builder.BuildConfig{
				Image:     ref,
				BuildArgs: map[string]string{"GREETING": name, "ADDITIONAL_PACKAGE": ""},
			}))
			if err != nil {
				t.Fatal(err)
			}
			if result.Status != builder.BuildSuccess || result.Image != ref || result.Error != "" {
				t.Fatalf("got %+v", result)
			}
			if log := strings.Join(result.Log, "\n"); !strings.Contains(log, "COPY app /app") {
				t.Errorf("the log does not tell of the steps:\n%s", log)
			}

			img := pull(t, ctx, ref, sdkDigest(t, s, f, ref))
			checkSDKImage(t, img, name)
			c, err := s.Run(ctx, img, stack.RunConfig{})
			if err != nil {
				t.Fatal(err)
			}
			if out, err := c.Output(ctx); err != nil || out != name+"\ntest one two\n" {
				t.Errorf("the image printed %q, %v", out, err)
			}
		})
	}
}

// checkSDKImage holds an image to sdkFiles, built with a greeting.
func checkSDKImage(t *testing.T, img v1.Image, greeting string) {
	t.Helper()
	files := stack.MustFiles(t, img)
	for path, want := range map[string]string{
		"app/run.sh":           sdkFiles["app/run.sh"],
		"app/deep/er/data.txt": "data\n",
		"greeting":             greeting + "\n",
	} {
		if file := files[path]; file == nil || string(file.Content) != want {
			t.Fatalf("%s is %+v, want %q", path, file, want)
		}
	}
	if files["not-copied"] != nil || files["app/not-copied"] != nil {
		t.Error("a file is in the image that no step copied")
	}
	if mode := files["app/run.sh"].Mode & 0o777; mode != 0o755 {
		t.Errorf("run.sh has mode %o", mode)
	}
	config := configOf(t, img)
	if config.Labels["org.example.greeting"] != greeting || config.Labels["org.example.package"] != "<>" {
		t.Errorf("labels are %v", config.Labels)
	}
	if config.User != "1000:1000" || config.WorkingDir != "/app" ||
		!slices.Equal(config.Entrypoint, []string{"/app/run.sh"}) || !slices.Equal(config.Cmd, []string{"one", "two"}) ||
		!slices.Contains(config.Env, "MODE=test") {
		t.Errorf("the config is %+v", config)
	}
	if _, ok := config.ExposedPorts["8080/tcp"]; !ok {
		t.Errorf("exposed ports are %v", config.ExposedPorts)
	}
}

func TestGoSDKSecrets(t *testing.T) { atHosts(t, testGoSDKSecrets) }

func testGoSDKSecrets(t *testing.T, start starter) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	client := sdkClient(t, f)
	files := map[string]string{
		"Dockerfile": `FROM busybox
RUN --mount=type=secret,id=token --mount=type=secret,id=other \
    sha256sum < /run/secrets/token > /sum && cat /run/secrets/token && test "$(cat /run/secrets/other)" = "two words"
`,
	}
	builds := map[string]func(string, map[string]string) (builder.BuildResult, error){
		"BuildWithSecrets": client.BuildWithSecrets,
		"BuildWithSecretsStream": func(tar string, secrets map[string]string) (builder.BuildResult, error) {
			return lastResult(client.BuildWithSecretsStream(tar, secrets))
		},
	}
	for name, build := range builds {
		t.Run(name, func(t *testing.T) {
			ref := f.Image("gosdk:" + strings.ToLower(name))
			secret := "the secret of " + name
			result, err := build(sdkTar(t, files, &builder.BuildConfig{Image: ref}), map[string]string{"token": secret, "other": "two words"})
			if err != nil {
				t.Fatal(err)
			}
			if result.Status != builder.BuildSuccess || result.Image != ref {
				t.Fatalf("got %+v", result)
			}
			img := pull(t, ctx, ref, sdkDigest(t, s, f, ref))
			if got, want := contents(t, img, "")["sum"], sha256Hex([]byte(secret))+"  -\n"; got != want {
				t.Errorf("the step read a secret with the sum %q, want %q", got, want)
			}
			// The step prints it, so that there is something to mask.
			if log := strings.Join(result.Log, "\n"); strings.Contains(log, secret) || !strings.Contains(log, "l: ") {
				t.Errorf("the secret is in the log, or nothing is:\n%s", log)
			}
			if log, err := f.Log(); err != nil || strings.Contains(log, secret) {
				t.Errorf("the secret is in the function's log: %v", err)
			}
		})
	}
}

// TestGoSDKFailure is what an application on go-sdk sees of a failed build: an
// error without a stream, and with one the record.
func TestGoSDKFailure(t *testing.T) { everybody(t, testGoSDKFailure) }

func testGoSDKFailure(t *testing.T, start starter) {
	_, _, f := start(t, stack.FunctionConfig{})
	client := sdkClient(t, f)
	tar := sdkTar(t, map[string]string{"Dockerfile": "FROM busybox\nRUN exit 3\n"}, &builder.BuildConfig{Image: f.Image("gosdk:failure")})
	if result, err := client.Build(tar); err == nil || !strings.Contains(err.Error(), "422") {
		t.Errorf("got %+v, %v, want an error with 422", result, err)
	}
	result, err := lastResult(client.BuildWithStream(tar))
	if err != nil {
		t.Fatal(err)
	}
	if result.Status != builder.BuildFailed || !strings.Contains(result.Error, "exit code 3") {
		t.Errorf("got %+v", result)
	}
}

func sdkClient(t *testing.T, f *stack.Function) *builder.FunctionBuilder {
	t.Helper()
	u, err := url.Parse(f.URL)
	if err != nil {
		t.Fatal(err)
	}
	options := []builder.BuilderOption{builder.WithHmacAuth(f.Secret)}
	// Who has not said whose key it is gets none.
	if key, err := f.Get(t.Context(), "/publickey"); err == nil {
		var answer struct {
			PublicKey string `json:"public_key"`
		}
		if err := json.Unmarshal([]byte(key), &answer); err != nil {
			t.Fatal(err)
		}
		options = append(options, builder.WithBuildSecretsKey([]byte(answer.PublicKey)))
	}
	return builder.NewFunctionBuilder(u, cmp.Or(f.HTTP, http.DefaultClient), options...)
}

func sdkTar(t *testing.T, files map[string]string, config *builder.BuildConfig) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "req.tar")
	if err := builder.MakeTar(path, stack.Context(t, files), config); err != nil {
		t.Fatal(err)
	}
	return path
}

// sdkDigest is the digest that the function told for an image: go-sdk has no
// field for it, but the function's log has.
func sdkDigest(t *testing.T, s *stack.Stack, f *stack.Function, ref string) string {
	t.Helper()
	// The line is written once the answer has been.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		log, err := f.Log()
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(log) {
			if strings.Contains(line, `"build ended"`) && strings.Contains(line, `"image":"`+ref+`"`) {
				_, rest, _ := strings.Cut(line, `"digest":"`)
				digest, _, _ := strings.Cut(rest, `"`)
				return digest
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("the function's log has no end of a build of %s:\n%s", ref, log)
		}
	}
}

// lastResult reads a stream to its end and returns its last record with the
// whole log, as faas-cli does.
func lastResult(stream *builder.BuildResultStream, err error) (builder.BuildResult, error) {
	if err != nil {
		return builder.BuildResult{}, err
	}
	var last builder.BuildResult
	var log []string
	for result, err := range stream.Results() {
		if err != nil {
			return last, err
		}
		last = result
		log = append(log, result.Log...)
	}
	last.Log = log
	return last, nil
}
