package stack

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/bcrypt"
)

// Registry is a distribution registry on loopback that keeps its files in the
// stack's directory.
type Registry struct {
	Addr string // host:port, the first part of an image reference
	Dir  string // the storage's root

	bin  string
	dir  string
	env  map[string]string
	proc *process
}

// NewRegistry starts a registry of its own beside the stack's first one. env
// changes its configuration by distribution's rule: REGISTRY_AUTH_HTPASSWD_PATH
// sets auth.htpasswd.path. It is stopped with the stack.
func (s *Stack) NewRegistry(ctx context.Context, env map[string]string) (*Registry, error) {
	dir, err := os.MkdirTemp(s.Dir, "registry-")
	if err != nil {
		return nil, err
	}
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	r := &Registry{
		Addr: fmt.Sprintf("127.0.0.1:%d", port),
		Dir:  filepath.Join(s.storage, filepath.Base(dir)),
		bin:  s.Tools.Registry,
		dir:  dir,
		env: map[string]string{
			"REGISTRY_HTTP_SECRET":            rand32(),
			"REGISTRY_STORAGE_DELETE_ENABLED": "true",
			"OTEL_TRACES_EXPORTER":            "none",
		},
	}
	maps.Copy(r.env, env)
	config := fmt.Sprintf("version: 0.1\nlog: {level: info}\nstorage: {filesystem: {rootdirectory: %q}}\nhttp: {addr: %q}\n", r.Dir, r.Addr)
	if err := os.WriteFile(filepath.Join(dir, "config.yml"), []byte(config), 0o644); err != nil {
		return nil, err
	}
	if err := r.Start(ctx); err != nil {
		return nil, err
	}
	s.onClose(r.Kill)
	return r, nil
}

// Start runs the registry again, with its storage and address, after Kill.
func (r *Registry) Start(ctx context.Context) error {
	cmd := exec.Command(r.bin, "serve", filepath.Join(r.dir, "config.yml"))
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "REGISTRY_") {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	for k, v := range r.env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	var err error
	if r.proc, err = startProcess("registry", r.LogFile(), cmd); err != nil {
		return err
	}
	return r.proc.ready(ctx, func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", r.Addr)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// Kill ends the registry at once and keeps its storage.
func (r *Registry) Kill() { r.proc.kill() }

// LogFile is the path of the registry's own log.
func (r *Registry) LogFile() string { return filepath.Join(r.dir, "log") }

// Image returns a reference in this registry: Image("hello:1") is
// 127.0.0.1:port/hello:1.
func (r *Registry) Image(name string) string { return r.Addr + "/" + name }

// Htpasswd returns a line for the file that REGISTRY_AUTH_HTPASSWD_PATH names.
func Htpasswd(user, password string) (string, error) {
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		return "", err
	}
	return user + ":" + string(hash) + "\n", nil
}
