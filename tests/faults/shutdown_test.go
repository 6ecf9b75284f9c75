package faults

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestShutdown sends SIGTERM under one build that ends in time, one that does
// not, and one that waits for a slot; and then asks for another. For healthcheck_interval after
// the signal, the function still listens.
func TestShutdown(t *testing.T) {
	t.Parallel()
	s, b, f := start(t, stack.FunctionConfig{Env: map[string]string{
		"max_builds": "2", "shutdown_timeout": "30s", "healthcheck_interval": "15s",
	}})
	short, long, waiting := mark(), mark(), mark()
	ref := s.Registry.Image("shutdown:latest")
	ends := background(t, f, request(t, &builder.BuildConfig{Image: ref}, "FROM busybox", sleep(short, 5*time.Minute)), jsonForm)
	lasts := background(t, f, request(t, local(), "FROM busybox", sleep(long, 5*time.Minute)), client.NDJSON)
	b.WaitStep(t, short)
	b.WaitStep(t, long)
	wait := background(t, f, request(t, local(), "FROM busybox", sleep(waiting, 5*time.Minute)), client.SSE)
	stack.Eventually(t, patience(5*time.Second), func() error {
		if n, err := f.Metric("builder_builds_waiting"); err != nil || n != 1 {
			return fmt.Errorf("%v builds wait, want 1: %v", n, err)
		}
		return nil
	})

	began := time.Now()
	if err := f.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	// Those that wait are told at once.
	a := wait()
	a.WantFailed(t, "shutting_down")
	// Not only when shutdown_timeout is over.
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("a build that waited was told %v after SIGTERM", took)
	}
	for _, form := range []string{jsonForm, client.NDJSON} {
		a = mustSend(t, f, request(t, local(), "FROM busybox"), form)
		a.WantFailed(t, "shutting_down")
		if a.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("a new request was answered with HTTP %d, want 503", a.StatusCode)
		}
	}
	for path, want := range map[string]int{"/ready": 503, "/healthz": 200} {
		resp, err := http.Get(f.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s answers %d while shutting down, want %d", path, resp.StatusCode, want)
		}
	}
	release(t, short)
	a = ends()
	a.WantSuccess(t)
	if d := digest(t, ref); d != a.Digest {
		t.Errorf("the registry has %q, the answer %q", d, a.Digest)
	}
	lasts().WantFailed(t, "shutting_down")
	took := time.Since(began)
	if took < 29*time.Second || took > patience(33*time.Second) {
		t.Errorf("the build was cancelled %v after SIGTERM, want shutdown_timeout, 30s", took)
	}
	waitGone(t, b, long, 2*time.Second)
	state, err := f.Wait(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if !state.Success() {
		t.Errorf("the function ended with %v", state)
	}
	t.Logf("the last verdict came %v after SIGTERM, the end of the process %v after", took, time.Since(began))
	if b.Runs(t, waiting) {
		t.Error("the build that waited was begun")
	}
}

// TestShutdownUploads sends SIGTERM under bodies that do not come.
func TestShutdownUploads(t *testing.T) {
	t.Parallel()
	const shutdown = 10 * time.Second
	_, f := stack.Test(t, stack.FunctionConfig{Env: map[string]string{
		"max_uploads": "2", "upload_grace": "5m", "shutdown_timeout": shutdown.String(),
		"context_repository": stack.Shared(t).Registry.Image("builder/shutdown"),
	}})
	uploads := map[string]net.Conn{
		"a build":   startUpload(t, f, "POST", "/build"),
		"a context": startUpload(t, f, "PUT", "/contexts/sha256:"+strings.Repeat("0", 64)),
	}
	waits := background(t, f, layered(t, local(), 2<<20), client.NDJSON)
	// It has come, and not all of it is read.
	addr, err := net.ResolveTCPAddr("tcp", strings.TrimPrefix(f.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	stack.Eventually(t, patience(5*time.Second), func() error {
		if n := underway(t, nil, addr); n < 256<<10 {
			return fmt.Errorf("%d bytes wait for a slot", n)
		}
		return nil
	})

	began := time.Now()
	if err := f.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waits().WantFailed(t, "shutting_down")
	if took := time.Since(began); took >= shutdown {
		t.Errorf("a body that waited for its slot was told %v after SIGTERM", took)
	}
	for name, conn := range uploads {
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		defer resp.Body.Close()
		a, err := client.Read(resp, nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		a.WantFailed(t, "shutting_down")
		if took := time.Since(began); took < shutdown || took > patience(shutdown+2*time.Second) {
			t.Errorf("%s was ended %v after SIGTERM, want shutdown_timeout, %v", name, took, shutdown)
		}
	}
	state, err := f.Wait(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if !state.Success() {
		t.Errorf("the function ended with %v", state)
	}
	if took := time.Since(began); took > patience(shutdown+5*time.Second) {
		t.Errorf("the process ended %v after SIGTERM", took)
	}
}
