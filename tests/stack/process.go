package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a daemon of the stack. It dies with the process that started it,
// however that ends.
type process struct {
	name string
	log  string // path of its stdout and stderr
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended

	mu     sync.Mutex
	reaped bool // its pid, which is also its group's, may be another process's
}

// startProcess runs cmd in a process group of its own, so that a Ctrl-C at the
// terminal reaches only the one who is to stop it in order.
func startProcess(name, log string, cmd *exec.Cmd) (*process, error) {
	out, err := os.OpenFile(log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL

	p := &process{name: name, log: log, cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// Pdeathsig is sent when the thread that forked ends, not the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.reap()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		// In a bare chroot os/exec cannot make the mounts private, and says only EINVAL.
		if errors.Is(err, syscall.EINVAL) && cmd.SysProcAttr.Unshareflags&syscall.CLONE_NEWNS != 0 {
			err = fmt.Errorf("making its mounts private: the root directory must be a mount point, so run mount --bind DIR DIR before chroot DIR: %w", err)
		}
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	return p, nil
}

// reap waits for the end of the process, and then ends what is left of its group, as the end
// of a container's first process does. Until the process has been waited for, no other gets
// its pid: so no signal of kill reaches a process that is not its own.
func (p *process) reap() {
	for unix.Waitid(unix.P_PID, p.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	p.cmd.Wait()
	p.reaped = true
}

// namespaced returns a command that is process 1 of a process namespace, with
// private mounts: all that it starts or mounts ends with it.
func namespaced(setup, name string, args ...string) *exec.Cmd {
	// The shell becomes the command, so that the pid seen from outside is the
	// command's own.
	cmd := exec.Command("/bin/sh", append([]string{"-c", "mount -t proc proc /proc && " + setup + ` exec "$0" "$@"`, name}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   syscall.CLONE_NEWPID,
		Unshareflags: syscall.CLONE_NEWNS, // os/exec makes the mounts private
	}
	return cmd
}

// ready polls until check succeeds, the process ends or ctx does.
func (p *process) ready(ctx context.Context, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	for {
		attempt, done := context.WithTimeout(ctx, 5*time.Second)
		err := check(attempt)
		done()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended with %v; its log ends:\n%s", p.name, p.cmd.ProcessState, tail(p.log, 4<<10))
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w; its log ends:\n%s", p.name, err, tail(p.log, 4<<10))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// signal sends a signal to the process alone, as a kubelet does. After SIGSTOP it returns once
// all threads have stopped: on a busy machine one can go on for milliseconds.
func (p *process) signal(sig os.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil || sig != syscall.SIGSTOP {
		return err
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		stopped, err := isStopped(p.cmd.Process.Pid)
		if err != nil || stopped {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s has not stopped within a minute", p.name)
		}
	}
}

// isStopped says whether a signal has stopped all threads of a process.
func isStopped(pid int) (bool, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(files) == 0 {
		return false, fmt.Errorf("looking for the threads of process %d: there are none", pid)
	}
	for _, file := range files {
		stat, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			return false, err
		}
		// The name of the program is in brackets, and may have any character.
		if _, state, ok := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " "); !ok || !strings.HasPrefix(state, "T") {
			return false, nil
		}
	}
	return true, nil
}

// wait returns once the process has ended; ctx bounds the wait.
func (p *process) wait(ctx context.Context) (*os.ProcessState, error) {
	select {
	case <-p.done:
	case <-ctx.Done():
	}
	select {
	case <-p.done: // also when both had happened
		return p.cmd.ProcessState, nil
	default:
		return nil, fmt.Errorf("waiting for %s to end: %w", p.name, ctx.Err())
	}
}

// kill ends the process and its group, and waits. A second call does nothing.
func (p *process) kill() {
	if p == nil {
		return
	}
	p.mu.Lock()
	if !p.reaped {
		syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	}
	p.mu.Unlock()
	<-p.done
}

// ended reports whether the process has ended.
func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// FreePort returns a loopback port that is free now and that no outgoing connection
// gets. While this process lives, FreePort gives the port to no other process of this
// machine, so a daemon can be stopped and started again on it.
func FreePort() (int, error) {
	for range 100 {
		port := 20000 + rand.IntN(12000) // Linux hands out 32768 and up
		if err := reserve(fmt.Sprintf("port-%d", port)); err != nil {
			continue
		}
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err == nil {
			return port, l.Close()
		}
	}
	return 0, errors.New("finding a free port: none in 100 tries")
}

// reservations are the names that this process has for as long as it lives.
var reservations struct {
	sync.Mutex
	names []io.Closer
}

func reserve(name string) error {
	l, err := claim(name)
	if err != nil {
		return err
	}
	reservations.Lock()
	defer reservations.Unlock()
	reservations.names = append(reservations.names, l)
	return nil
}

// claim takes a name that one process of this machine can have at a time. It is
// that of a socket without a file, so that Linux frees it when the process ends.
func claim(name string) (io.Closer, error) {
	return net.Listen("unix", "@function-builder-"+name)
}

// claimWhenFree is claim for a name that another process may have. It waits until the
// other process gives the name up, at most for the time of the longest test, which
// delivers fifty builds twice.
func claimWhenFree(ctx context.Context, name string) (io.Closer, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	for {
		l, err := claim(name)
		if !errors.Is(err, syscall.EADDRINUSE) {
			return l, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for another process on this machine to give up the %s: %w", name, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// tail returns the last n bytes of a file, or the reason there are none.
func tail(path string, n int64) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err.Error()
	}
	n = min(n, info.Size())
	b := make([]byte, n)
	m, _ := f.ReadAt(b, info.Size()-n)
	return string(b[:m])
}
