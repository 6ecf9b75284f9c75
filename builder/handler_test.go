package function

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/rs/zerolog"
)

// TestWrongConfiguration: a process with a wrong environment is healthy, but not ready.
// Handle reads the environment once in a process, so no other test may call it.
func TestWrongConfiguration(t *testing.T) {
	t.Setenv("max_builds", "none")
	for path, want := range map[string]int{"/healthz": 200, "/ready": 503, "/": 503, "/build": 503} {
		w := httptest.NewRecorder()
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil)
		r.Header.Set("X-Call-Id", "a")
		if path == "/build" {
			r.Header.Set("Content-Type", "text/plain")
		}
		Handle(w, r)
		if w.Code != want {
			t.Errorf("%s: %d %s, want %d", path, w.Code, w.Body, want)
		}
		if want == 503 && (!strings.Contains(w.Body.String(), "configuration is wrong") || !strings.Contains(w.Body.String(), "not_ready")) {
			t.Errorf("%s does not tell the reason: %s", path, w.Body)
		}
		if want == 503 && (w.Header().Get("X-Call-Id") != "a" || strings.HasPrefix(w.Header().Get("Content-Type"), "text/plain") != (path == "/build")) {
			t.Errorf("%s: %v", path, w.Header())
		}
	}
	testLoggedErrors(t)
}

// testLoggedErrors checks how an error is logged after the first Handle: without the
// secrets in its URLs, and cut to the length of a line.
func testLoggedErrors(t *testing.T) {
	t.Helper()
	var log strings.Builder
	cause := fmt.Errorf("reading the layer: Get %q: EOF; https://user:secret@host/p", "https://bucket/blob?X-Amz-Signature=secret&x=secret")
	l := zerolog.New(&log)
	l.Err(cause).AnErr("cause", fmt.Errorf("again: %w", cause)).Errs("all", []error{cause}).Msg("failed")
	if strings.Contains(log.String(), "secret") || strings.Count(log.String(), "https://bucket/blob") != 3 || strings.Count(log.String(), "https://host/p") != 3 {
		t.Errorf("logged %s", &log)
	}
	// The cut goes through the URL. Its secrets must be removed before the cut.
	long := logged(errors.New(strings.Repeat("ä", maxLogged/2-5) + " https://user:secret@host/p?x=secret"))
	if len(long) > maxLogged+len(" (cut)") || !utf8.ValidString(long) || strings.Contains(long, "user") || !strings.HasSuffix(long, "(cut)") {
		t.Errorf("%d bytes, %q", len(long), long[len(long)-40:])
	}
}

// TestTenants makes servers with and without a file of tenants.
func TestTenants(t *testing.T) {
	const file = "version: 1\ntenants:\n  acme: {id: t-1, keys: [{id: k, secret: the-only-key-of-acme}], images: [ghcr.io/acme]}\n"
	for _, tt := range []struct {
		name, text, files, disableHMAC string
		want                           string // of GET /ready, or of the error
	}{
		{"none", "", "", "", "ready"},
		{"none, and it is needed", "", "tenants", "", "the tenants cannot be read"},
		{"right", file, "", "", "ready"},
		{"right, and it is needed", file, "tenants", "", "ready"},
		{"wrong", "version: 2", "", "", "the tenants cannot be read"},
		{"outside allowed_images", strings.Replace(file, "ghcr.io/acme", "quay.io/acme", 1), "", "", "the tenants cannot be read"},
		{"a pool of shared daemons", file + "pools: {gold: [\"tcp://buildkitd.openfaas:1234\"]}", "", "", "the tenants cannot be read"},
		{"none, without HMAC", "", "", "true", "ready"},
		{"right, without HMAC", file, "", "true", "with disable_hmac nobody knows whose a request is"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "payload-secret"), []byte("the root of all salts"), 0o600); err != nil {
				t.Fatal(err)
			}
			if tt.text != "" {
				if err := os.WriteFile(filepath.Join(dir, "tenants"), []byte(tt.text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			cfg, err := LoadConfig(env("secrets_dir", dir, "tenants_file", tt.files, "disable_hmac", tt.disableHMAC, "allowed_images", "ghcr.io"))
			if err != nil {
				t.Fatal(err)
			}
			s, err := newServer(cfg, zerolog.Nop())
			if err != nil {
				if !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v, want %s", err, tt.want)
				}
				return
			}
			w := httptest.NewRecorder()
			s.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/ready", nil))
			if !strings.Contains(w.Body.String(), tt.want) || (w.Code == http.StatusOK) != (tt.want == "ready") {
				t.Errorf("%d %s, want %s", w.Code, w.Body, tt.want)
			}
		})
	}
}

// TestTenantPools counts the daemons of the shared pool and of the file's.
func TestTenantPools(t *testing.T) {
	dir := t.TempDir()
	socket := "unix://" + filepath.Join(dir, "socket")
	for name, text := range map[string]string{
		"payload-secret": "the root of all salts",
		"tenants": "version: 1\npools: {gold: [" + socket + "1, " + socket + "2]}\n" +
			"tenants: {acme: {id: t-1, keys: [{id: k, secret: the-only-key-of-acme}], images: [ghcr.io/acme], daemons: gold}}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := LoadConfig(env("secrets_dir", dir, "buildkit_addr", socket))
	if err != nil {
		t.Fatal(err)
	}
	s, err := newServer(cfg, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	var about struct{ Daemons struct{ Total int } }
	if err := json.Unmarshal(w.Body.Bytes(), &about); err != nil || about.Daemons.Total != 3 {
		t.Errorf("%v: %s", err, w.Body)
	}
	// The Server was told of the tenants: it counts what only tenants are told from zero.
	w = httptest.NewRecorder()
	s.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	for _, line := range []string{"builder_tenants_stale 0\n", `builder_builds_total{code="tenant_busy",status="failed"} 0`} {
		if !strings.Contains(w.Body.String(), line) {
			t.Errorf("the metrics lack %s", line)
		}
	}
}

// TestRecords: the store in NATS opens without a server and without a payload secret, and gets its
// keys whenever the secret changes.
func TestRecords(t *testing.T) {
	dir := t.TempDir()
	cfg, err := LoadConfig(env("nats_url", "nats://127.0.0.1:1", "secrets_dir", dir))
	if err != nil {
		t.Fatal(err)
	}
	r, err := newRecords(cfg, nil, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(t.Context()) })
	if _, err := r.payloadSecret(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a payload secret: %v", err)
	}
	seen := r.sum
	for _, text := range []string{"the first payload secret", "another payload secret\nthe-first-payload-secret\n", "short"} {
		if err := os.WriteFile(filepath.Join(dir, "payload-secret"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := r.payloadSecret(); err != nil || string(got) != text {
			t.Errorf("the secret is %q, %v", got, err)
		}
		if changed := r.sum != seen; changed != (text != "short") {
			t.Errorf("with %q the keys change: %v", text, changed)
		}
		seen = r.sum
	}

	cfg.NATSURL = "http://user:password@host"
	if _, err := newRecords(cfg, nil, zerolog.Nop()); err == nil || strings.Contains(err.Error(), "password") || !strings.Contains(err.Error(), "nats_url") {
		t.Errorf("a wrong address: %v", err)
	}
}

// TestSIGTERM: a SIGTERM that comes as soon as a process is ready shuts the builder down.
func TestSIGTERM(t *testing.T) {
	called := make(chan struct{})
	onSIGTERM(func() { close(called) })
	if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-called:
	case <-time.After(time.Minute):
		t.Error("nothing was called")
	}
}
