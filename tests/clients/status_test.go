package clients_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// refusal is the answer that a failed request must have.
type refusal struct {
	status int
	code   string
	text   string // in the error
	image  string // the record's
	log    string // in the record's log
	retry  bool   // there is a Retry-After
}

// The Content-Types of a request for an error as JSON, and as text.
const askJSON, askText = "application/octet-stream", "text/plain; charset=utf-8"

// check sends a request twice: the error must come as JSON, and as text.
func (want refusal) check(t *testing.T, send func(t *testing.T, contentType string) client.Answer) {
	t.Helper()
	got := send(t, askJSON)
	if got.StatusCode != want.status || got.Header.Get("Content-Type") != client.JSON {
		t.Errorf("got %v of %s, want HTTP %d of JSON", got, got.Header.Get("Content-Type"), want.status)
	}
	if got.Status != "failed" || got.Code != want.code || got.Image != want.image || got.Digest != "" ||
		got.Error == "" || !strings.Contains(got.Error, want.text) || !strings.Contains(strings.Join(got.Log, "\n"), want.log) {
		t.Errorf("got %+v, want %+v", got.Record, want)
	}
	if retry := got.Header.Get("Retry-After") != ""; retry != want.retry {
		t.Errorf("Retry-After is %q", got.Header.Get("Retry-After"))
	}
	checkHeaders(t, got)

	got = send(t, askText)
	if got.StatusCode != want.status || !strings.HasPrefix(got.Header.Get("Content-Type"), "text/plain") {
		t.Errorf("got %v of %s, want HTTP %d of text", got, got.Header.Get("Content-Type"), want.status)
	}
	if strings.HasPrefix(strings.TrimSpace(got.Body), "{") {
		t.Errorf("the text is JSON: %s", got.Body)
	}
	if err := within(got.Body, want.text, want.code, want.image, want.log); err != nil {
		t.Errorf("the text does not tell what the record does: %v", err)
	}
	checkHeaders(t, got)
}

func checkHeaders(t *testing.T, got client.Answer) {
	t.Helper()
	// The queue worker sends a request again, up to a hundred times, if the answer has
	// this header.
	if v, ok := got.Header["X-Openfaas-Internal"]; ok {
		t.Errorf("the answer carries X-OpenFaaS-Internal: %q", v)
	}
}

func posting(f *stack.Function, body []byte, changes ...client.Change) func(*testing.T, string) client.Answer {
	return func(t *testing.T, contentType string) client.Answer {
		t.Helper()
		return f.MustPost(t, t.Context(), body, append(changes[:len(changes):len(changes)], client.Header("Content-Type", contentType))...)
	}
}

// Package faults tests the failures of registries and daemons while a build runs.

func TestRefusals(t *testing.T) {
	_, s, f := start(t, stack.FunctionConfig{Env: map[string]string{
		"max_body_bytes":     "1MiB",
		"max_unpacked_bytes": "8MiB",
		"max_entries":        "50",
		"max_path_bytes":     "200",
		"max_config_bytes":   "64KiB",
		"max_secrets_bytes":  "64KiB",
		"allowed_images":     "127.0.0.1:1, " + stack.Shared(t).Registry.Image("allowed/"),
	}})
	allowed := s.Registry.Image("allowed/app:1")
	with := func(c config, files map[string]string) []byte {
		if c["image"] == nil {
			c["image"] = allowed
		}
		return stack.Body(t, c, files)
	}
	many := map[string]string{"Dockerfile": "FROM scratch\n"}
	for i := range 60 {
		many[fmt.Sprint("f", i)] = ""
	}

	for name, test := range map[string]struct {
		body []byte
		want refusal
	}{
		"400 not a tar":  {[]byte("hello"), refusal{status: 400, code: "bad_tar"}},
		"400 empty":      {nil, refusal{status: 400, code: "bad_tar"}},
		"400 no config":  {output(t, stack.Context(t, map[string]string{"context/Dockerfile": "FROM scratch\n"}), nil, "tar", "c", "context"), refusal{status: 400, code: "bad_tar", text: "com.openfaas.docker.config"}},
		"400 config":     {with(config{"image": "UPPER"}, copyOnly), refusal{status: 400, code: "bad_config", text: "UPPER"}},
		"400 secrets":    {stack.WithSecrets(t, with(config{}, copyOnly), "version: v1\n"), refusal{status: 400, code: "bad_secrets", image: allowed}},
		"400 envelope":   {[]byte(`{"signature":"` + client.Sign(f.Secret, nil) + `"}`), refusal{status: 400, code: "bad_envelope"}},
		"403 repository": {with(config{"image": s.Registry.Image("allowed-not/app")}, copyOnly), refusal{status: 403, code: "image_forbidden", text: "allowed-not/app", image: s.Registry.Image("allowed-not/app")}},
		"403 tag":        {with(config{"tags": []string{"docker.io/library/other"}}, copyOnly), refusal{status: 403, code: "image_forbidden", text: "docker.io/library/other", image: allowed}},
		"413 body":       {make([]byte, 1<<20+1), refusal{status: 413, code: "too_large", text: "the body is over the limit of 1048576 bytes"}},
		"413 unpacked": {compressed(func(*testing.T, string) []byte {
			return with(config{}, map[string]string{"zero": strings.Repeat("\x00", 9<<20)})
		}, "gzip")(t, ""), refusal{status: 413, code: "too_large", text: "over the limit of 8388608 bytes unpacked"}},
		"413 entries":       {with(config{}, many), refusal{status: 413, code: "too_large", text: "over the limit of 50 entries"}},
		"413 path":          {with(config{}, map[string]string{strings.Repeat("p", 200) + "/" + strings.Repeat("p", 200): ""}), refusal{status: 413, code: "too_large", text: "a path over the limit of 200 bytes"}},
		"413 config":        {with(config{"labels": config{"x": strings.Repeat("x", 64<<10)}}, copyOnly), refusal{status: 413, code: "too_large", text: "com.openfaas.docker.config\": over the limit of 65536 bytes"}},
		"413 secrets":       {stack.WithSecrets(t, with(config{}, copyOnly), strings.Repeat("x", 64<<10+1)), refusal{status: 413, code: "too_large", text: "com.openfaas.secrets\": over the limit of 65536 bytes"}},
		"422 step":          {with(config{}, map[string]string{"Dockerfile": "FROM busybox\nRUN echo before; exit 3\n"}), refusal{status: 422, code: "build_failed", text: "exit code 3", image: allowed, log: "l: before"}},
		"422 no Dockerfile": {with(config{}, map[string]string{"x": ""}), refusal{status: 422, code: "build_failed", text: "Dockerfile", image: allowed}},
		"422 base":          {with(config{}, map[string]string{"Dockerfile": "FROM " + s.Registry.Image("not/there") + "\n"}), refusal{status: 422, code: "registry_denied", text: "not/there", image: allowed}},
		"503 registry":      {with(config{"image": "127.0.0.1:1/app"}, copyOnly), refusal{status: 503, code: "registry_failed", text: "127.0.0.1:1", image: "127.0.0.1:1/app", retry: true}},
	} {
		t.Run(name, func(t *testing.T) { test.want.check(t, posting(f, test.body)) })
	}

	t.Run("401", func(t *testing.T) {
		refusal{status: 401, code: "unauthorized"}.check(t, posting(f, with(config{}, copyOnly), client.Signature(client.Sign("another key", nil))))
	})
	for name, test := range map[string]struct {
		method, path string
		want         refusal
	}{
		"404": {"GET", "/debug/requests", refusal{status: 404, code: "not_found"}},
		"405": {"PUT", "/build", refusal{status: 405, code: "method_not_allowed"}},
	} {
		t.Run(name, func(t *testing.T) {
			test.want.check(t, posting(f, nil, func(req *http.Request) { req.Method, req.URL.Path = test.method, test.path }))
		})
	}
	// The same limits let this request pass.
	t.Run("200", func(t *testing.T) {
		got := f.MustPost(t, t.Context(), with(config{}, copyOnly))
		if got.StatusCode != http.StatusOK || got.Status != "success" {
			t.Errorf("got %v", got)
		}
	})
}

// TestDeadline has a build that takes longer than build_timeout. The timeout has room for
// the beginning of the step on a busy machine, and both requests run into it at once.
func TestDeadline(t *testing.T) {
	_, s, f := start(t, stack.FunctionConfig{Env: map[string]string{"build_timeout": "30s"}})
	ref := s.Registry.Image("deadline:latest")
	answers := make(map[string]func() client.Answer)
	for _, contentType := range []string{askJSON, askText} {
		body := stack.Body(t, config{"image": ref}, stack.Dockerfile("FROM busybox", "RUN echo before; sleep 600; : "+stack.Mark()))
		answers[contentType] = stack.Later(t, func(ctx context.Context) (client.Answer, error) {
			return f.Post(ctx, body, client.Header("Content-Type", contentType))
		})
	}
	refusal{status: 422, code: "deadline", text: "build_timeout", image: ref, log: "l: before"}.check(t,
		func(_ *testing.T, contentType string) client.Answer { return answers[contentType]() })
}

func TestBusy(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{Env: map[string]string{"max_builds": "1"}})
	long := stack.Body(t, config{"image": s.Registry.Image("busy:long")}, map[string]string{"Dockerfile": "FROM busybox\nRUN echo running; sleep 100\n"})
	running := openStream(t, ctx, f, long, "l: running")
	short := stack.Body(t, config{"image": s.Registry.Image("busy:short")}, copyOnly)
	refusal{status: 429, code: "busy", retry: true, image: s.Registry.Image("busy:short")}.check(t, posting(f, short))
	if _, err := f.Get(ctx, "/ready"); err != nil {
		t.Errorf("a busy function is not ready: %v", err)
	}

	// The function builds the same body after the other caller has gone.
	running.Close()
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		got := f.MustPost(t, ctx, short)
		if got.StatusCode == http.StatusOK {
			break
		}
		if got.StatusCode != http.StatusTooManyRequests || time.Now().After(end) {
			t.Fatalf("after the other caller had gone: got %v", got)
		}
	}
}

func TestNoDaemon(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{Env: map[string]string{"buildkit_addr": "tcp://127.0.0.1:1"}})
	ref := s.Registry.Image("no-daemon:latest")
	refusal{status: 503, code: "no_daemon", retry: true, image: ref}.check(t, posting(f, stack.Body(t, config{"image": ref}, copyOnly)))
	if _, err := f.Get(ctx, "/ready"); err != nil {
		t.Errorf("a function without a daemon is not ready: %v", err)
	}
}

func TestShuttingDown(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{Env: map[string]string{"healthcheck_interval": "20s"}})
	if err := f.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := f.Get(ctx, "/ready"); err != nil {
			if !strings.Contains(err.Error(), "503") {
				t.Fatal(err)
			}
			break
		}
		if time.Now().After(end) {
			t.Fatal("the function is ready 10 s after SIGTERM")
		}
	}
	body := stack.Body(t, config{"image": s.Registry.Image("shutting-down:latest")}, copyOnly)
	refusal{status: 503, code: "shutting_down", retry: true}.check(t, posting(f, body))
	if _, err := f.Get(ctx, "/healthz"); err != nil {
		t.Errorf("it serves, but is not healthy: %v", err)
	}
}

// TestNoSpace gives the function a temporary directory of 1 MiB.
func TestNoSpace(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m,mode=777"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	ctx, s, f := start(t, stack.FunctionConfig{Env: map[string]string{"temp_dir": dir, "spool_memory_bytes": "64KiB"}})
	body := func(size int) []byte {
		return stack.Body(t, config{"image": s.Registry.Image("no-space:latest")}, map[string]string{
			"Dockerfile": "FROM scratch\nCOPY . /\n", "file": strings.Repeat("x", size),
		})
	}
	refusal{status: 503, code: "no_space", retry: true}.check(t, posting(f, body(4<<20)))
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		t.Errorf("files are left: %v, %v", entries, err)
	}
	// The refused body is deleted, and a smaller one has room.
	f.MustBuild(t, ctx, body(512<<10))
}

func TestNotReady(t *testing.T) {
	_, s, f := start(t, stack.FunctionConfig{})
	if err := os.Remove(filepath.Join(f.SecretsDir, "payload-secret")); err != nil {
		t.Fatal(err)
	}
	body := stack.Body(t, config{"image": s.Registry.Image("not-ready:latest")}, copyOnly)
	refusal{status: 503, code: "not_ready", text: "payload secret", retry: true}.check(t, posting(f, body))
}

// TestInternal has a private key that cannot be read. No client can mend that.
func TestInternal(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	key := filepath.Join(f.SecretsDir, "build-secrets-key")
	if err := errors.Join(os.Remove(key), os.Mkdir(key, 0o755)); err != nil {
		t.Fatal(err)
	}
	ref := s.Registry.Image("internal:latest")
	body := stack.Body(t, config{"image": ref}, copyOnly)
	refusal{status: 500, code: "internal", text: "log has the cause", image: ref}.check(t, posting(f, stack.WithSecrets(t, body, "version: v1\n")))
	a := f.MustPost(t, ctx, stack.WithSecrets(t, body, "version: v1\n"))
	if strings.Contains(a.Body, key) {
		t.Errorf("the client is told the cause: %s", a.Body)
	}
	if log, err := f.Log(); err != nil || !strings.Contains(log, `"level":"error"`) || !strings.Contains(log, key) {
		t.Errorf("the log does not have the cause, %v", err)
	}
	// A build without secrets does not need the key.
	f.MustBuild(t, ctx, body)
}

// TestOwnRepositories pushes where the builder keeps its cache and contexts.
func TestOwnRepositories(t *testing.T) {
	registry := stack.Shared(t).Registry
	_, _, f := start(t, stack.FunctionConfig{Env: map[string]string{
		"cache_repository": registry.Image("own/cache"), "context_repository": registry.Image("own/contexts"),
	}})
	beside := registry.Image("own/app:1")
	for name, c := range map[string]config{
		"a cache":        {"image": registry.Image("own/cache:app")},
		"a context":      {"image": registry.Image("own/contexts:sha256-" + strings.Repeat("0", 64))},
		"below":          {"image": registry.Image("own/cache/app")},
		"a tag":          {"image": beside, "tags": []string{registry.Image("own/cache:app")}},
		"without a push": {"image": registry.Image("own/cache:app"), "skipPush": true},
	} {
		t.Run(name, func(t *testing.T) {
			refusal{status: 403, code: "image_forbidden", text: "own", image: c["image"].(string)}.check(t, posting(f, stack.Body(t, c, copyOnly)))
		})
	}
	f.MustBuild(t, t.Context(), stack.Body(t, config{"image": beside}, copyOnly))
}

// openStream starts a build and returns its answer once a line holds text.
func openStream(t *testing.T, ctx context.Context, f *stack.Function, body []byte, text string) io.Closer {
	t.Helper()
	resp, err := f.Send(f.MustRequest(t, ctx, body, client.Accept(client.NDJSON)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	stream := bufio.NewScanner(resp.Body)
	for stream.Scan() {
		if strings.Contains(stream.Text(), text) {
			return resp.Body
		}
	}
	t.Fatalf("the stream ended without %q: %v", text, stream.Err())
	return nil
}
