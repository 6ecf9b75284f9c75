package stack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// BuildNATS returns the paths of the newest and the oldest NATS server that the function's
// records are kept in.
func BuildNATS(ctx context.Context, repo string, log io.Writer) (newest, oldest string, err error) {
	paths, err := buildTools(ctx, repo, log, natsModules)
	return paths["nats-server"], paths["nats-server-oldest"], err
}

// NATS is one server with JetStream.
type NATS struct {
	URL string

	bin, dir, conf string
	monitor        string // the address of its monitoring
	disk           string
	process        *process
}

// NATSConfig says how servers are started.
type NATSConfig struct {
	Bin     string
	Dir     string // of all their files
	Servers int    // 1, or of a cluster
	MaxFile string // of JetStream, such as 10MB; empty is plenty
	More    string // lines of the configuration
	Disk    string // that each server has, such as 10m; empty is the machine's. It takes root
}

// StartNATS starts servers on loopback, and returns when they are ready. A cluster of 2.10 that begins
// on a busy machine may leave a server out for good: it elects a leader, and can make no stream of
// as many replicas as it has servers. Such a cluster begins again.
func StartNATS(ctx context.Context, cfg NATSConfig) ([]*NATS, error) {
	if cfg.MaxFile == "" {
		cfg.MaxFile = "4GB"
	}
	var servers []*NATS
	var ports, routes []string
	for range cfg.Servers {
		n := &NATS{bin: cfg.Bin, disk: cfg.Disk}
		var p [3]int
		for i := range p {
			var err error
			if p[i], err = FreePort(); err != nil {
				return nil, err
			}
		}
		n.URL = fmt.Sprintf("nats://127.0.0.1:%d", p[0])
		n.monitor = fmt.Sprintf("http://127.0.0.1:%d", p[1])
		n.dir = filepath.Join(cfg.Dir, fmt.Sprintf("nats-%d", p[0]))
		n.conf = fmt.Sprintf("listen: 127.0.0.1:%d\nhttp: 127.0.0.1:%d\nserver_name: n%d\njetstream {store_dir: %q, max_file_store: %s, max_memory_store: 64MB}\n",
			p[0], p[1], p[0], filepath.Join(n.dir, "store"), cfg.MaxFile) + cfg.More + "\n"
		ports = append(ports, fmt.Sprint(p[2]))
		routes = append(routes, fmt.Sprintf("nats://127.0.0.1:%d", p[2]))
		servers = append(servers, n)
	}
	for i, n := range servers {
		if len(servers) > 1 {
			n.conf += fmt.Sprintf("cluster {name: builder, listen: 127.0.0.1:%s, routes: [%s]}\n", ports[i], strings.Join(routes, ", "))
		}
	}
	var err error
	for range 5 {
		if err = begin(ctx, servers); err != nil {
			return servers, err
		}
		if err = whole(ctx, servers); err == nil {
			return servers, nil
		}
		for _, n := range servers {
			n.Kill()
			if err := n.Wipe(); err != nil {
				return servers, err
			}
		}
	}
	return servers, err
}

// begin starts servers, and returns when they are ready.
func begin(ctx context.Context, servers []*NATS) error {
	for _, n := range servers {
		if err := n.start(); err != nil {
			return err
		}
		// One after the other: servers of 2.10 that all begin at once sometimes never find
		// each other.
		if err := n.process.ready(ctx, func(context.Context) error {
			c, err := net.Dial("tcp", strings.TrimPrefix(n.URL, "nats://"))
			if err == nil {
				c.Close()
			}
			return err
		}); err != nil {
			return err
		}
	}
	for _, n := range servers {
		if err := n.Ready(ctx); err != nil {
			return err
		}
	}
	return nil
}

// whole waits until the servers of a cluster are all in its metadata group.
func whole(ctx context.Context, servers []*NATS) error {
	if len(servers) == 1 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	for {
		var info struct {
			MetaCluster struct {
				Size int `json:"cluster_size"`
			} `json:"meta_cluster"`
		}
		text, err := servers[0].monitored(ctx, "/jsz")
		if err == nil {
			err = json.Unmarshal(text, &info)
		}
		switch {
		case err != nil:
			return fmt.Errorf("looking for the servers of the cluster: %w", err)
		case info.MetaCluster.Size == len(servers):
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the cluster has %d of %d servers", info.MetaCluster.Size, len(servers))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// ConfiguredNATS starts one server with a configuration, beside which there may be files that it
// includes. The server listens where url says. Ready waits for it.
func ConfiguredNATS(bin, dir, conf, url string) (*NATS, error) {
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	n := &NATS{URL: url, bin: bin, dir: dir, conf: conf + fmt.Sprintf("\nhttp: 127.0.0.1:%d\n", port), monitor: fmt.Sprintf("http://127.0.0.1:%d", port)}
	return n, n.start()
}

func (n *NATS) start() error {
	if err := os.MkdirAll(n.dir, 0o755); err != nil {
		return err
	}
	conf := filepath.Join(n.dir, "nats.conf")
	if err := os.WriteFile(conf, []byte(n.conf), 0o644); err != nil {
		return err
	}
	cmd := exec.Command(n.bin, "-c", conf)
	if n.disk != "" {
		if err := os.MkdirAll(n.Store(), 0o755); err != nil {
			return err
		}
		cmd = namespaced(fmt.Sprintf("mount -t tmpfs -o size=%s store %q &&", n.disk, n.Store()), n.bin, "-c", conf)
	}
	var err error
	n.process, err = startProcess("nats-server", filepath.Join(n.dir, "log"), cmd)
	return err
}

// Ready waits until a server answers.
func (n *NATS) Ready(ctx context.Context) error {
	return n.process.ready(ctx, func(ctx context.Context) error {
		_, err := n.monitored(ctx, "/healthz")
		return err
	})
}

// monitored is what the server's monitoring has at a path.
func (n *NATS) monitored(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, n.monitor+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, errors.New(resp.Status)
	}
	return io.ReadAll(resp.Body)
}

// Restart starts a server that was killed, with what it had on its disk.
func (n *NATS) Restart(ctx context.Context) error {
	if err := n.start(); err != nil {
		return err
	}
	return n.Ready(ctx)
}

// Wipe removes what a killed server has on its disk.
func (n *NATS) Wipe() error { return os.RemoveAll(n.Store()) }

// FillDisk takes what is free on a server's own disk, and what becomes free later, until ctx ends.
func (n *NATS) FillDisk(ctx context.Context) error {
	// The disk is mounted for the server alone.
	path := fmt.Sprintf("/proc/%d/root%s/filler", n.process.cmd.Process.Pid, n.Store())
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	for page := make([]byte, os.Getpagesize()); ; {
		_, err := f.Write(page)
		switch {
		case errors.Is(err, syscall.ENOSPC):
		case err != nil:
			return err
		default:
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Store is the directory of what a server keeps.
func (n *NATS) Store() string { return filepath.Join(n.dir, "store") }

// Kill ends a server with SIGKILL. A second call does nothing.
func (n *NATS) Kill() { n.process.kill() }

// Freeze and Thaw stop a server, and let it go on.
func (n *NATS) Freeze() error { return n.process.signal(syscall.SIGSTOP) }
func (n *NATS) Thaw() error   { return n.process.signal(syscall.SIGCONT) }

// Subjects counts the subjects of a stream that match a filter.
func (n *NATS) Subjects(ctx context.Context, stream, filter string) (int, error) {
	conn, err := nats.Connect(n.URL, nats.Timeout(Patience))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	j, err := jetstream.New(conn)
	if err != nil {
		return 0, err
	}
	s, err := j.Stream(ctx, stream)
	if err != nil {
		return 0, err
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(filter))
	if err != nil {
		return 0, err
	}
	return len(info.State.Subjects), nil
}

// Memory is a server's resident memory in bytes.
func (n *NATS) Memory() (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", n.process.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	var size, resident int64
	_, err = fmt.Sscan(string(b), &size, &resident)
	return resident * int64(os.Getpagesize()), err
}

// Log is the end of what a server has said.
func (n *NATS) Log() string { return tail(filepath.Join(n.dir, "log"), 4<<10) }
