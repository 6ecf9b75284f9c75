package stack

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"
)

// Pull returns the image that a reference names now, with the credentials of
// this user's Docker configuration.
func Pull(ctx context.Context, ref string) (v1.Image, error) {
	r, err := name.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	return remote.Image(r, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain),
		remote.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))
}

// Files returns the headers and contents of an image's root file system, all
// layers applied, by path without a leading slash.
func Files(img v1.Image) (map[string]*File, error) {
	r := mutate.Extract(img)
	defer r.Close()
	files := map[string]*File{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return files, nil
		}
		if err != nil {
			return nil, err
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			return nil, err
		}
		files[path.Clean(h.Name)] = &File{Header: h, Content: b}
	}
}

// File is one entry of an image.
type File struct {
	*tar.Header
	Content []byte
}

// RunConfig says how a container differs from what its image says, which is its
// zero value.
type RunConfig struct {
	Env  []string // added to the image's
	Args []string // instead of the image's command
	// ReadOnly makes the root file system so, with a tmpfs on /tmp: what
	// readonly_root_filesystem in stack.yml asks for.
	ReadOnly bool
	// HostNetwork is this machine's network instead of one that holds only
	// loopback. The container is taken for one with of-watchdog: see
	// FunctionConfig.Watchdog.
	HostNetwork bool
	// Mounts are directories that the container can read, by their paths there.
	Mounts map[string]string
}

// Container is an image that runs under runc.
type Container struct {
	dir  string
	proc *process

	watchdog io.Closer // the claim to of-watchdog's port, nil without HostNetwork
}

// Run unpacks an image and starts it. It is killed with the stack.
func (s *Stack) Run(ctx context.Context, img v1.Image, c RunConfig) (*Container, error) {
	dir, err := os.MkdirTemp(s.Dir, "container-")
	if err != nil {
		return nil, err
	}
	rootfs := filepath.Join(dir, "rootfs")
	if err := os.Mkdir(rootfs, 0o755); err != nil {
		return nil, err
	}
	files := mutate.Extract(img)
	defer files.Close()
	unpack := exec.CommandContext(ctx, "tar", "-x", "-p", "--numeric-owner", "-C", rootfs)
	unpack.Stdin = files
	if out, err := unpack.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("unpacking the image: %w\n%s", err, out)
	}
	cgroup := filepath.Base(s.Dir) + "-" + filepath.Base(dir)
	if err := s.writeSpec(ctx, dir, cgroup, img, c); err != nil {
		return nil, err
	}
	// The network is made here and not by runc, so that it is there, and can be
	// entered, before the container is.
	setup, flags := "busybox ip link set lo up &&", uintptr(unix.CLONE_NEWNET)
	if c.HostNetwork {
		setup, flags = "", 0
	}
	cmd := namespaced(setup, s.Tools.Runc, "--root", filepath.Join(dir, "runc"), "run", "--bundle", dir, cgroup)
	cmd.SysProcAttr.Cloneflags |= flags
	container := &Container{dir: dir}
	if c.HostNetwork {
		if container.watchdog, err = claimWhenFree(ctx, "of-watchdog"); err != nil {
			return nil, err
		}
	}
	if container.proc, err = startProcess("container", container.LogFile(), cmd); err != nil {
		return nil, err
	}
	s.onClose(func() { container.Kill(); removeCgroups(cgroup) })
	return container, nil
}

// writeSpec turns the image's config into the config.json that runc reads.
func (s *Stack) writeSpec(ctx context.Context, dir, cgroup string, img v1.Image, c RunConfig) error {
	if out, err := exec.CommandContext(ctx, s.Tools.Runc, "spec", "--bundle", dir).CombinedOutput(); err != nil {
		return fmt.Errorf("writing a runc spec: %w\n%s", err, out)
	}
	file := filepath.Join(dir, "config.json")
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var spec struct {
		Version  string           `json:"ociVersion"`
		Process  map[string]any   `json:"process"`
		Root     map[string]any   `json:"root"`
		Hostname string           `json:"hostname"`
		Mounts   []map[string]any `json:"mounts"`
		Linux    map[string]any   `json:"linux"`
	}
	if err := json.Unmarshal(text, &spec); err != nil {
		return err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return err
	}
	args := c.Args
	if len(args) == 0 {
		args = append(append(args, config.Config.Entrypoint...), config.Config.Cmd...)
	}
	var uid, gid int
	if user := config.Config.User; user != "" {
		if n, _ := fmt.Sscanf(user, "%d:%d", &uid, &gid); n == 0 {
			return fmt.Errorf("running the image: its user %q is not a number", user)
		}
	}
	spec.Process["terminal"] = false
	spec.Process["args"] = args
	spec.Process["env"] = append(append([]string{}, config.Config.Env...), c.Env...)
	spec.Process["cwd"] = path.Join("/", config.Config.WorkingDir)
	spec.Process["user"] = map[string]int{"uid": uid, "gid": gid}
	spec.Root["readonly"] = c.ReadOnly
	if c.ReadOnly {
		spec.Mounts = append(spec.Mounts, map[string]any{"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": []string{"nosuid", "nodev", "mode=1777"}})
	}
	for to, from := range c.Mounts {
		spec.Mounts = append(spec.Mounts, map[string]any{"destination": to, "type": "bind", "source": from, "options": []string{"bind", "ro"}})
	}
	spec.Linux["cgroupsPath"] = "/" + cgroup
	spec.Linux["namespaces"] = []map[string]string{{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}}
	if text, err = json.Marshal(spec); err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o644)
}

// LogFile is the path of what the container prints.
func (c *Container) LogFile() string { return filepath.Join(c.dir, "log") }

// Output waits for the container to end and returns what it printed. The error
// tells an exit code other than 0.
func (c *Container) Output(ctx context.Context) (string, error) {
	state, err := c.proc.wait(ctx)
	if err != nil {
		return "", err
	}
	out, err := os.ReadFile(c.LogFile())
	if err != nil {
		return "", err
	}
	if !state.Success() {
		return string(out), fmt.Errorf("the container ended with %v:\n%s", state, tail(c.LogFile(), 4<<10))
	}
	return string(out), nil
}

// Get asks the container's HTTP server on a port, again and again until it
// answers with a status below 500: a function may start after its watchdog.
func (c *Container) Get(ctx context.Context, port int, path string) (status int, body string, err error) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: c.dial}}
	err = c.proc.ready(ctx, func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", port, path), nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
		if err != nil {
			return err
		}
		status, body = resp.StatusCode, string(text)
		if status >= 500 {
			return fmt.Errorf("it answers %s: %s", resp.Status, strings.TrimSpace(body))
		}
		return nil
	})
	return status, body, err
}

// dial connects inside the container's network.
func (c *Container) dial(_ context.Context, _, addr string) (net.Conn, error) {
	return dialIn(c.proc.cmd.Process.Pid, addr)
}

// dialIn connects inside the network of a process.
func dialIn(pid int, addr string) (net.Conn, error) {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	type result struct {
		conn net.Conn
		err  error
	}
	dialled := make(chan result, 1)
	go func() {
		// Never unlocked: the thread has left this process's network and must
		// end with the goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			dialled <- result{nil, err}
			return
		}
		// net.Dialer may go on in another goroutine, and so in another thread.
		conn, err := dialTCP(addr)
		dialled <- result{conn, err}
	}()
	r := <-dialled
	return r.conn, r.err
}

// dialTCP connects to an IPv4 host:port in the calling thread.
func dialTCP(addr string) (net.Conn, error) {
	to, err := net.ResolveTCPAddr("tcp4", addr)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), addr)
	defer f.Close()
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: to.Port, Addr: [4]byte(to.IP.To4())}); err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", addr, err)
	}
	return net.FileConn(f)
}

// Kill ends the container at once.
func (c *Container) Kill() {
	c.proc.kill()
	if c.watchdog != nil {
		c.watchdog.Close()
	}
}

// Ended reports whether the container has ended.
func (c *Container) Ended() bool { return c.proc.ended() }
