package stack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"github.com/moby/buildkit/client"
)

// Buildkitd is a daemon behind mTLS. It, its RUN steps and its mounts live in a
// process and a mount namespace of their own and end together.
type Buildkitd struct {
	Addr string // tcp://127.0.0.1:port
	Root string // its state; kept when the daemon is killed and started again

	dir    string
	certs  string
	cgroup string
	args   []string
	env    []string
	tools  Tools
	proc   *process
}

// BuildkitdConfig changes how a daemon is run. The zero value is the shipped
// buildkit/base/pod/buildkitd.toml with the stack's registry as a mirror.
type BuildkitdConfig struct {
	Args []string                 // further flags of buildkitd, which overrule the file
	Edit func(toml string) string // changes the file
	Env  []string                 // further variables, as os/exec has them

	// Certs is a directory of buildkit/certs.sh, read at each start; empty is
	// the stack's.
	Certs string

	// Kept names a directory in .cache that has the daemon's state, and keeps it from
	// one run to the next: a build that compiles much then takes what its cache mounts
	// have. One daemon has it at a time, and another waits. Empty is a state of this
	// daemon's own, which goes with the stack.
	Kept string
}

// WholeLogs has a daemon pass on all that steps print. By itself it clips a step at
// 200 KiB a second and 2 MiB.
var WholeLogs = []string{"BUILDKIT_STEP_LOG_MAX_SPEED=-1", "BUILDKIT_STEP_LOG_MAX_SIZE=-1"}

// NewBuildkitd starts a daemon of its own beside the stack's first one. It is
// stopped with the stack.
func (s *Stack) NewBuildkitd(ctx context.Context, c BuildkitdConfig) (*Buildkitd, error) {
	dir, err := os.MkdirTemp(s.Dir, "buildkitd-")
	if err != nil {
		return nil, err
	}
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	b := &Buildkitd{
		Addr:   fmt.Sprintf("tcp://127.0.0.1:%d", port),
		Root:   filepath.Join(s.storage, filepath.Base(dir)),
		dir:    dir,
		certs:  cmp.Or(c.Certs, s.Certs),
		cgroup: filepath.Base(s.Dir) + "-" + filepath.Base(dir),
		args:   c.Args,
		env:    c.Env,
		tools:  s.Tools,
	}
	if c.Kept != "" {
		unlock, err := b.keep(ctx, filepath.Join(s.Repo, ".cache", c.Kept))
		if err != nil {
			return nil, err
		}
		s.onClose(unlock)
	}
	toml, err := b.config(s)
	if err != nil {
		return nil, err
	}
	if c.Edit != nil {
		toml = c.Edit(toml)
	}
	if err := os.WriteFile(filepath.Join(dir, "buildkitd.toml"), []byte(toml), 0o644); err != nil {
		return nil, err
	}
	if err := b.Start(ctx); err != nil {
		b.close()
		return nil, err
	}
	s.onClose(b.close)
	return b, nil
}

// keep has the daemon's state in dir, once no other daemon has it there. The state of another
// version of the daemon is removed: an older daemon may not read a newer one's.
func (b *Buildkitd) keep(ctx context.Context, dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	unlock, err = waitLock(ctx, filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	b.Root = filepath.Join(dir, filepath.Base(b.tools.Buildkitd))
	states, err := filepath.Glob(filepath.Join(dir, "buildkitd*"))
	for _, state := range states {
		if state != b.Root {
			err = cmp.Or(err, os.RemoveAll(state))
		}
	}
	if err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

var ociWorkerTable = regexp.MustCompile(`(?m)^\[worker\.oci\][^\n]*\n`)

// config is the shipped file with what only this machine can know. Flags
// overrule the file, so only what has no flag is written here.
func (b *Buildkitd) config(s *Stack) (string, error) {
	shipped, err := os.ReadFile(filepath.Join(s.Repo, "buildkit", "base", "pod", "buildkitd.toml"))
	if err != nil {
		return "", err
	}
	if !ociWorkerTable.Match(shipped) {
		return "", errors.New("changing buildkitd.toml: it has no [worker.oci]")
	}
	toml := ociWorkerTable.ReplaceAllString(string(shipped), fmt.Sprintf("${0}defaultCgroupParent = %q\n", b.cgroup))
	if s.Standins != nil {
		for _, host := range []string{"docker.io", "ghcr.io"} {
			toml += fmt.Sprintf("\n[registry.%q]\nmirrors = [%q]\n", host, s.Registry.Addr)
		}
	}
	return toml, nil
}

// Start runs the daemon again, with its state and address, after Kill, and
// waits until it answers over mTLS.
func (b *Buildkitd) Start(ctx context.Context) error {
	cmd := namespaced("", b.tools.Buildkitd, append([]string{
		"--config", filepath.Join(b.dir, "buildkitd.toml"),
		"--root", b.Root,
		"--addr", b.Addr,
		"--tlscacert", filepath.Join(b.certs, "ca.pem"),
		"--tlscert", filepath.Join(b.certs, "daemon", "cert.pem"),
		"--tlskey", filepath.Join(b.certs, "daemon", "key.pem"),
		"--otel-socket-path", filepath.Join(b.dir, "otel.sock"),
		"--containerd-worker=false",
		"--oci-worker=true",
		"--oci-worker-net=host",
		"--oci-worker-binary", b.tools.Runc,
	}, b.args...)...)
	cmd.Dir = b.dir
	cmd.Env = append(append(os.Environ(), "TMPDIR="+b.dir), b.env...)
	var err error
	if b.proc, err = startProcess("buildkitd", b.LogFile(), cmd); err != nil {
		return err
	}
	return b.proc.ready(ctx, func(ctx context.Context) error {
		c, err := b.Client(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.ListWorkers(ctx)
		return err
	})
}

// Client connects as the function does. The caller closes it.
func (b *Buildkitd) Client(ctx context.Context) (*client.Client, error) {
	dir := filepath.Join(b.certs, "client")
	return client.New(ctx, b.Addr,
		client.WithServerConfig("buildkitd", filepath.Join(b.certs, "ca.pem")),
		client.WithCredentials(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")))
}

// Buildctl returns the command with the flags that reach this daemon.
func (b *Buildkitd) Buildctl(ctx context.Context, args ...string) *exec.Cmd {
	dir := filepath.Join(b.certs, "client")
	return exec.CommandContext(ctx, b.tools.Buildctl, append([]string{
		"--addr", b.Addr, "--tlsservername", "buildkitd",
		"--tlscacert", filepath.Join(b.certs, "ca.pem"),
		"--tlscert", filepath.Join(dir, "cert.pem"), "--tlskey", filepath.Join(dir, "key.pem"),
	}, args...)...)
}

// Pid is the daemon's process id.
func (b *Buildkitd) Pid() int { return b.proc.cmd.Process.Pid }

// LogFile is the path of the daemon's log.
func (b *Buildkitd) LogFile() string { return filepath.Join(b.dir, "log") }

// Signal sends a signal to the daemon alone.
func (b *Buildkitd) Signal(sig syscall.Signal) error { return b.proc.signal(sig) }

// Kill ends the daemon and its RUN steps at once.
func (b *Buildkitd) Kill() { b.proc.kill() }

// Wait returns once the daemon has ended.
func (b *Buildkitd) Wait(ctx context.Context) error {
	_, err := b.proc.wait(ctx)
	return err
}

// Restart kills the daemon and starts it with its state and address.
func (b *Buildkitd) Restart(ctx context.Context) error {
	b.Kill()
	return b.Start(ctx)
}

// Pause freezes the daemon: its port accepts connections and nothing answers.
func (b *Buildkitd) Pause() error { return b.Signal(syscall.SIGSTOP) }

// Resume ends a Pause.
func (b *Buildkitd) Resume() error { return b.Signal(syscall.SIGCONT) }

// Steps returns the command lines of the processes that RUN steps of this
// daemon have running.
func (b *Buildkitd) Steps() ([]string, error) {
	var lines []string
	for _, dir := range b.cgroups() {
		procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
			continue // the step has just ended
		}
		if err != nil {
			return nil, err
		}
		for pid := range strings.FieldsSeq(string(procs)) {
			if line, err := os.ReadFile("/proc/" + pid + "/cmdline"); err == nil && len(line) > 0 {
				lines = append(lines, strings.TrimSpace(strings.ReplaceAll(string(line), "\x00", " ")))
			}
		}
	}
	return lines, nil
}

// cgroups returns the directories of the daemon's steps in one hierarchy:
// cgroup v1's pids, or the only one of v2.
func (b *Buildkitd) cgroups() []string {
	v1, _ := filepath.Glob("/sys/fs/cgroup/pids/" + b.cgroup + "/buildkit/*/cgroup.procs")
	v2, _ := filepath.Glob("/sys/fs/cgroup/" + b.cgroup + "/buildkit/*/cgroup.procs")
	var dirs []string
	for _, f := range append(v1, v2...) {
		dirs = append(dirs, filepath.Dir(f))
	}
	return dirs
}

func (b *Buildkitd) close() {
	b.proc.kill()
	removeCgroups(b.cgroup)
}
