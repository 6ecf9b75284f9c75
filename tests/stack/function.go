package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"handler/function/tests/client"
)

// FunctionConfig says how one instance of the function differs from the usual.
type FunctionConfig struct {
	// Env is the function's environment, over the stack's own settings.
	Env map[string]string
	// Secrets are files of secrets_dir, by name, over payload-secret,
	// build-secrets-key, buildkit-ca, buildkit-cert and buildkit-key. A nil
	// value leaves a file out.
	Secrets map[string][]byte
	// Buildkitd is the daemon to use; nil is the stack's first.
	Buildkitd *Buildkitd
	// Watchdog puts the real of-watchdog in front, where this machine has one. Its
	// metrics port, 8081, is fixed: the start waits until no other runs.
	Watchdog bool
	// Nameserver is the address that the function's process looks names up at;
	// empty is the machine's.
	Nameserver string
	// Plain leaves out the race detector, for a test that measures memory or
	// time: it takes many times the function's own.
	Plain bool
	// Memory is the limit of the function's own memory cgroup, in bytes; 0 is none.
	Memory int64
	// Unready has the start end when the function serves, for a test of what keeps it
	// from being ready.
	Unready bool
}

// Function is one running instance of the builder.
type Function struct {
	// Client sends it requests, at http://127.0.0.1:port, signed with the stack's
	// PayloadSecret.
	client.Client

	// Images is what a reference begins with that Client may push to: the stack's
	// registry, of a tenant a prefix of its own.
	Images string

	SecretsDir string // its files may be changed while it runs
	TempDir    string // its TMPDIR, empty while no build runs

	dir    string
	cgroup string // its directory, empty without FunctionConfig.Memory
	proc   *process

	watchdog io.Closer // the claim to of-watchdog's port, nil without one
}

// Function starts an instance and waits until it is ready. It is killed with
// the stack. The first call compiles the function.
func (s *Stack) Function(ctx context.Context, c FunctionConfig) (_ *Function, err error) {
	handler, err := s.handler(ctx, s.race && !c.Plain)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(s.Dir, "function-")
	if err != nil {
		return nil, err
	}
	f := &Function{
		SecretsDir: filepath.Join(dir, "secrets"),
		TempDir:    filepath.Join(dir, "tmp"),
		Client:     client.Client{Secret: s.PayloadSecret, Strict: true},
		Images:     s.Registry.Addr,
		dir:        dir,
	}
	defer func() {
		if err != nil {
			f.Kill()
		}
	}()
	if err := s.writeSecrets(f.SecretsDir, c.Secrets); err != nil {
		return nil, err
	}
	if err := os.Mkdir(f.TempDir, 0o777); err != nil {
		return nil, err
	}
	if c.Buildkitd == nil {
		c.Buildkitd = s.Buildkitd
	}
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	upstream, command := port, handler
	env := map[string]string{
		"buildkit_addr": c.Buildkitd.Addr,
		"secrets_dir":   f.SecretsDir,
		"TMPDIR":        f.TempDir,
		"HOME":          f.dir,
		"log_level":     "debug",
		// Those of stack.yml, but for the wait before an idle instance ends.
		"read_timeout": "20m", "write_timeout": "20m", "exec_timeout": "20m",
		"healthcheck_interval": "100ms",
		"GOMEMLIMIT":           "160MiB",
		"max_header_bytes":     "16384",
	}
	if watchdog, ok := FindWatchdog(); ok && c.Watchdog {
		if upstream, err = FreePort(); err != nil {
			return nil, err
		}
		if f.watchdog, err = claimWhenFree(ctx, "of-watchdog"); err != nil {
			return nil, err
		}
		command = watchdog
		env["fprocess"], env["mode"], env["port"] = handler, "http", strconv.Itoa(port)
		env["prefix_logs"], env["log_buffer_size"] = "false", "-1"
	}
	f.URL = fmt.Sprintf("http://127.0.0.1:%d", port)
	env["upstream_url"] = fmt.Sprintf("http://127.0.0.1:%d", upstream)
	maps.Copy(env, c.Env)

	args := []string{command}
	if c.Memory > 0 {
		if f.cgroup, err = memoryCgroup(filepath.Base(s.Dir)+"-"+filepath.Base(dir), c.Memory); err != nil {
			return nil, err
		}
		// The shell moves itself, so that all of the function's memory counts.
		args = append([]string{"/bin/sh", "-c", `echo $$ >"$0/cgroup.procs" && exec "$@"`, f.cgroup}, args...)
	}
	var attr *syscall.SysProcAttr
	if c.Nameserver != "" {
		resolv := filepath.Join(dir, "resolv.conf")
		if err := os.WriteFile(resolv, []byte("nameserver "+c.Nameserver+"\n"), 0o644); err != nil {
			return nil, err
		}
		args = append([]string{"/bin/sh", "-c", `mount --bind "$0" "$(readlink -f /etc/resolv.conf)" && exec "$@"`, resolv}, args...)
		attr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = attr
	cmd.Dir = dir
	// Not this process's whole environment: CI's variables are not the
	// function's. PATH finds credential helpers.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "GORACE=halt_on_error=1"}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	if f.proc, err = startProcess("function", f.LogFile(), cmd); err != nil {
		return nil, err
	}
	s.onClose(f.Kill)
	probe := "/ready"
	if c.Unready {
		probe = "/healthz"
	}
	err = f.proc.ready(ctx, func(ctx context.Context) error {
		_, err := f.Get(ctx, probe)
		return err
	})
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (s *Stack) writeSecrets(dir string, over map[string][]byte) error {
	files := map[string][]byte{
		"payload-secret":    []byte(s.PayloadSecret),
		"build-secrets-key": s.privateKey,
	}
	for name, path := range map[string]string{"buildkit-ca": "ca.pem", "buildkit-cert": "client/cert.pem", "buildkit-key": "client/key.pem"} {
		b, err := os.ReadFile(filepath.Join(s.Certs, path))
		if err != nil {
			return err
		}
		files[name] = b
	}
	maps.Copy(files, over)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for name, b := range files {
		if b == nil {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// LogFile is the path of what the function prints.
func (f *Function) LogFile() string { return filepath.Join(f.dir, "log") }

// Log returns what the function has printed so far.
func (f *Function) Log() (string, error) {
	b, err := os.ReadFile(f.LogFile())
	return string(b), err
}

// Pid is the handler's process id, also with of-watchdog in front.
func (f *Function) Pid() int {
	pid := f.proc.cmd.Process.Pid
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if children := strings.Fields(string(b)); err == nil && len(children) == 1 {
		if child, err := strconv.Atoi(children[0]); err == nil {
			return child
		}
	}
	return pid
}

// Image returns a reference that Client may push to: Image("hello:1").
func (f *Function) Image(name string) string { return f.Images + "/" + name }

// Metric is the sum of a metric's values whose labels contain all of the texts.
func (f *Function) Metric(metric string, labels ...string) (sum float64, err error) {
	text, err := f.Get(context.Background(), "/metrics")
	if err != nil {
		return 0, err
	}
	found := false
	for _, m := range regexp.MustCompile(`(?m)^`+metric+`(\{.*\})? (\S+)$`).FindAllStringSubmatch(text, -1) {
		if slices.ContainsFunc(labels, func(l string) bool { return !strings.Contains(m[1], l) }) {
			continue
		}
		v, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			return 0, err
		}
		sum, found = sum+v, true
	}
	if !found {
		return 0, fmt.Errorf("there is no metric %s %v", metric, labels)
	}
	return sum, nil
}

// Memory returns the handler's resident memory now and at its peak, in bytes.
func (f *Function) Memory() (rss, peak int64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", f.Pid()))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) != 3 {
			continue
		}
		n, _ := strconv.ParseInt(fields[1], 10, 64)
		switch fields[0] {
		case "VmRSS:":
			rss = n << 10
		case "VmHWM:":
			peak = n << 10
		}
	}
	if rss == 0 || peak == 0 {
		return 0, 0, errors.New("reading the function's memory: it has ended")
	}
	return rss, peak, nil
}

// Anonymous returns the memory of the function's cgroup that is no file's, in bytes:
// what the kernel cannot have back before it kills. It needs FunctionConfig.Memory.
func (f *Function) Anonymous() (int64, error) { return anonymous(f.cgroup) }

// FDs returns the number of the handler's open descriptors.
func (f *Function) FDs() (int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", f.Pid()))
	return len(entries), err
}

// TempFiles returns the names in TempDir and the size of those that are open
// there but have no name any more, in bytes.
func (f *Function) TempFiles() (names []string, unlinked int64, err error) {
	entries, err := os.ReadDir(f.TempDir)
	if err != nil {
		return nil, 0, err
	}
	for _, e := range entries {
		if e.Name() != ".lock" { // of-watchdog's own, for its readiness
			names = append(names, e.Name())
		}
	}
	fds := fmt.Sprintf("/proc/%d/fd", f.Pid())
	open, err := os.ReadDir(fds)
	if err != nil {
		return nil, 0, err
	}
	for _, e := range open {
		fd := filepath.Join(fds, e.Name())
		target, err := os.Readlink(fd)
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed meanwhile
		}
		if err != nil {
			return nil, 0, err
		}
		if strings.HasPrefix(target, f.TempDir) && strings.HasSuffix(target, " (deleted)") {
			if info, err := os.Stat(fd); err == nil {
				unlinked += info.Size()
			}
		}
	}
	return names, unlinked, nil
}

// Signal sends a signal to the process in front, as a kubelet does.
func (f *Function) Signal(sig syscall.Signal) error { return f.proc.signal(sig) }

// Wait returns how the function ended, once it has.
func (f *Function) Wait(ctx context.Context) (*os.ProcessState, error) { return f.proc.wait(ctx) }

// Stop ends the function with SIGTERM and waits until it has ended.
func (f *Function) Stop(ctx context.Context) error {
	if err := f.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	state, err := f.Wait(ctx)
	if err != nil {
		return err
	}
	if !state.Success() {
		return fmt.Errorf("the function ended with %v; its log ends:\n%s", state, tail(f.LogFile(), 4<<10))
	}
	return nil
}

// Kill ends the function at once.
func (f *Function) Kill() {
	f.proc.kill()
	if f.watchdog != nil {
		f.watchdog.Close()
	}
	if f.cgroup != "" {
		removeCgroups(filepath.Base(f.cgroup))
	}
}
