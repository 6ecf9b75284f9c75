package stack

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

var clusterModules = []toolModule{
	{module: "kubernetes", pkg: "k8s.io/kubernetes/cmd/kube-apiserver", name: "kube-apiserver", cgo: "0"},
	{module: "kubernetes", pkg: "k8s.io/kubernetes/cmd/kube-controller-manager", name: "kube-controller-manager", cgo: "0"},
	{module: "kubernetes", pkg: "k8s.io/kubernetes/cmd/kube-scheduler", name: "kube-scheduler", cgo: "0"},
	{module: "kubernetes", pkg: "k8s.io/kubernetes/cmd/kube-proxy", name: "kube-proxy", cgo: "0"},
	{module: "kubernetes", pkg: "k8s.io/kubernetes/cmd/kubelet", name: "kubelet", cgo: "0"},
	{module: "kubernetes", pkg: "k8s.io/kubernetes/cmd/kubectl", name: "kubectl", cgo: "0"},
	{module: "containerd", pkg: "github.com/containerd/containerd/v2/cmd/containerd", name: "containerd", cgo: "0"},
	{module: "containerd", pkg: "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2", name: "containerd-shim-runc-v2", cgo: "0"},
	{module: "coredns", pkg: "github.com/coredns/coredns", name: "coredns", cgo: "0"},
}

// clusterPackages are what Debian has of a node, by a file of each.
var clusterPackages = map[string]string{
	"etcd":      "etcd-server",
	"conntrack": "conntrack",
	"iptables":  "iptables",
	"ip":        "iproute2",
	"nsenter":   "util-linux",

	"/usr/lib/cni/ptp": "containernetworking-plugins",
}

// The cluster's addresses. Nothing outside its network namespace sees them.
const (
	nodeIP      = "10.250.0.1"
	podCIDR     = "10.244.0.0/16"
	serviceCIDR = "10.96.0.0/16"

	clusterRegistry = nodeIP + ":5000"
)

// Cluster is a Kubernetes of one node. It has a network, a process and a mount
// namespace of its own, so that it needs no free port, and pods, mounts and
// packet filter rules end with it. Its pods reach the node and one another.
type Cluster struct {
	// Registry is the stack's registry as pods and the node know it. It is the
	// mirror of docker.io, so that docker.io/moby/buildkit is moby/buildkit here.
	Registry string

	dir   string
	bin   string // the tools by their plain names
	node  *process
	procs []*process
}

// Cluster starts one. It is ended with the stack.
func (s *Stack) Cluster(ctx context.Context) (*Cluster, error) {
	for command, pkg := range clusterPackages {
		if _, err := exec.LookPath(command); err != nil {
			return nil, fmt.Errorf("starting a cluster: %s is missing: apt-get install %s", command, pkg)
		}
	}
	tools, err := buildTools(ctx, s.Repo, s.log, clusterModules)
	if err != nil {
		return nil, err
	}
	c := &Cluster{Registry: clusterRegistry}
	// The path of a socket has to be short.
	if c.dir, err = os.MkdirTemp(s.Dir, "c-"); err != nil {
		return nil, err
	}
	// Root of a pod's user namespace is nobody here, and has to get to its files.
	for _, dir := range []string{s.Dir, c.dir} {
		if err := os.Chmod(dir, 0o711); err != nil {
			return nil, err
		}
	}
	c.bin = filepath.Join(c.dir, "bin")
	if err := os.Mkdir(c.bin, 0o755); err != nil {
		return nil, err
	}
	tools["runc"] = s.Tools.Runc
	tools["registry"] = s.Tools.Registry
	for name, path := range tools {
		if err := os.Symlink(path, filepath.Join(c.bin, name)); err != nil {
			return nil, err
		}
	}
	s.onClose(c.close)

	fmt.Fprintln(s.log, "starting Kubernetes")
	if err := c.startNode(ctx); err != nil {
		return nil, err
	}
	if err := c.writeFiles(s.Registry.Dir); err != nil {
		return nil, err
	}
	if err := c.startAll(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// startNode makes the namespaces. Their first process reaps whatever the node's
// shims leave.
func (c *Cluster) startNode(ctx context.Context) error {
	setup := strings.Join([]string{
		// Volumes of pods have to reach the containers that runc starts.
		"mount --make-rshared /",
		// What has no setting, of the kubelet and of the network plugins.
		"mount -t tmpfs tmpfs /var/log",
		"mount -t tmpfs tmpfs /var/lib",
		"ip link set lo up",
		"ip address add " + nodeIP + "/32 dev lo",
		// A Service's address has to have a route before it is translated.
		"ip route add " + serviceCIDR + " dev lo src " + nodeIP,
		"echo 1 > /proc/sys/net/ipv4/ip_forward",
		"",
	}, " && ")
	cmd := namespaced(setup, "/bin/sh", "-c", "while sleep 1; do :; done")
	cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWNET | unix.CLONE_NEWIPC
	var err error
	if c.node, err = startProcess("node", c.LogFile("node"), cmd); err != nil {
		return err
	}
	return c.node.ready(ctx, func(ctx context.Context) error {
		out, err := c.Command(ctx, "cat", "/proc/sys/net/ipv4/ip_forward").CombinedOutput()
		if err == nil && string(out) != "1\n" {
			err = fmt.Errorf("the network is not set up: %s", out)
		}
		return err
	})
}

// Command runs on the node, in its root directory, with kubectl on its PATH.
func (c *Cluster) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{
		"--target", strconv.Itoa(c.node.cmd.Process.Pid), "--mount", "--net", "--pid", "--ipc", "--", name}, args...)...)
	cmd.Env = []string{"PATH=" + c.bin + ":" + os.Getenv("PATH"), "HOME=" + c.dir, "KUBECONFIG=" + c.path("kubeconfig")}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func (c *Cluster) path(elem ...string) string {
	return filepath.Join(append([]string{c.dir}, elem...)...)
}

// writeFiles writes the configuration of all parts; storage is the registry's. There is one user, who may do
// anything: nothing here is about the API server's own authorization.
func (c *Cluster) writeFiles(storage string) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	token := rand.Text()
	files := map[string]string{
		"service-account.key": string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})),
		"tokens.csv":          token + ",admin,admin,system:masters\n",
		"kubeconfig": fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
  - name: test
    cluster: { server: "https://%s:6443", certificate-authority: %s }
users:
  - name: admin
    user: { token: %s }
contexts:
  - name: test
    context: { cluster: test, user: admin }
current-context: test
`, nodeIP, c.path("apiserver", "apiserver.crt"), token),
		"containerd.toml": fmt.Sprintf(`version = 3
root = %q
state = %q
oom_score = 0
disabled_plugins = ["io.containerd.nri.v1.nri"]

[grpc]
  address = %q

[plugins."io.containerd.cri.v1.images"]
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "%s/pause:latest"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = %q

[plugins."io.containerd.cri.v1.runtime"]
  # Without CAP_SYS_RESOURCE nobody's score can be lowered.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = %q
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      BinaryName = %q
`, c.path("containerd"), c.path("run"), c.path("containerd.sock"), clusterRegistry, c.path("hosts"), c.path("cni"), c.path("bin", "runc")),
		"hosts/docker.io/hosts.toml":               fmt.Sprintf("[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", "http://"+clusterRegistry),
		"hosts/" + clusterRegistry + "/hosts.toml": fmt.Sprintf("server = %q\n", "http://"+clusterRegistry),
		"cni/10-ptp.conflist":                      fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`, podCIDR),
		"resolv.conf":                              "",
		"kubelet.yaml": fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: { anonymous: { enabled: true }, webhook: { enabled: false } }
authorization: { mode: AlwaysAllow }
containerRuntimeEndpoint: unix://%s
podLogsDir: %s
volumePluginDir: %s
resolvConf: %s
clusterDNS: [%s]
clusterDomain: cluster.local
# The machine may have version 1, and may let nobody make limits for all pods together.
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failSwapOn: false
oomScoreAdj: 0
evictionHard: { memory.available: "0%%", nodefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.available: "0%%" }
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
# Quicker than what a real node is asked.
syncFrequency: 5s
`, c.path("containerd.sock"), c.path("pods"), c.path("plugins"), c.path("resolv.conf"), nodeIP),
		"Corefile": fmt.Sprintf(".:53 {\n  bind %s\n  errors\n  kubernetes cluster.local {\n    kubeconfig %s\n    ttl 1\n  }\n}\n", nodeIP, c.path("kubeconfig")),
		// A second server over the stack's storage: that keeps no state of its own.
		"registry.yml": fmt.Sprintf("version: 0.1\nlog: {level: info}\nstorage: {filesystem: {rootdirectory: %q}, delete: {enabled: true}}\nhttp: {addr: %q, secret: %q}\n",
			storage, clusterRegistry, rand32()),
	}
	for name, text := range files {
		path := c.path(filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// startAll starts the parts in an order in which each finds what it needs.
func (c *Cluster) startAll(ctx context.Context) error {
	kubeconfig := "--kubeconfig=" + c.path("kubeconfig")
	for _, part := range []struct {
		name  string
		args  []string
		ready func(context.Context) error
	}{
		{"registry", []string{"serve", c.path("registry.yml")}, c.answers("http://" + clusterRegistry + "/v2/")},
		{"etcd", []string{"--data-dir=" + c.path("etcd"), "--log-level=warn", "--unsafe-no-fsync"}, c.answers("http://127.0.0.1:2379/health")},
		{"kube-apiserver", []string{
			"--etcd-servers=http://127.0.0.1:2379", "--cert-dir=" + c.path("apiserver"),
			"--advertise-address=" + nodeIP, "--service-cluster-ip-range=" + serviceCIDR,
			"--token-auth-file=" + c.path("tokens.csv"), "--authorization-mode=AlwaysAllow",
			"--service-account-issuer=https://kubernetes.default.svc",
			"--service-account-key-file=" + c.path("service-account.key"),
			"--service-account-signing-key-file=" + c.path("service-account.key"),
			"--allow-privileged=true", "--kubelet-preferred-address-types=InternalIP",
		}, c.says("ok", "get", "--raw", "/readyz")},
		{"kube-controller-manager", []string{kubeconfig, "--leader-elect=false", "--service-account-private-key-file=" + c.path("service-account.key")},
			c.says("default", "-n", "default", "get", "serviceaccount", "default", "-o", "name")},
		{"kube-scheduler", []string{kubeconfig, "--leader-elect=false"}, nil},
		{"containerd", []string{"--config", c.path("containerd.toml")}, func(context.Context) error {
			conn, err := net.Dial("unix", c.path("containerd.sock"))
			if err != nil {
				return err
			}
			return conn.Close()
		}},
		{"kube-proxy", []string{kubeconfig, "--proxy-mode=iptables", "--hostname-override=node", "--oom-score-adj=0",
			"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0"}, nil},
		{"coredns", []string{"-conf", c.path("Corefile")}, nil},
		{"kubelet", []string{kubeconfig, "--config=" + c.path("kubelet.yaml"), "--root-dir=" + c.path("kubelet"), "--cert-dir=" + c.path("kubelet-certs"),
			"--node-ip=" + nodeIP, "--hostname-override=node"},
			c.says("True", "get", "node", "node", "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)},
	} {
		p, err := startProcess(part.name, c.LogFile(part.name), c.Command(context.WithoutCancel(ctx), part.name, part.args...))
		if err != nil {
			return err
		}
		c.procs = append(c.procs, p)
		if part.ready == nil {
			continue
		}
		if err := p.ready(ctx, part.ready); err != nil {
			return err
		}
	}
	return nil
}

// answers is ready once a URL inside of the node answers.
func (c *Cluster) answers(url string) func(context.Context) error {
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := c.Client().Do(req)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}
}

// says is ready once kubectl prints something that has want in it.
func (c *Cluster) says(want string, args ...string) func(context.Context) error {
	return func(ctx context.Context) error {
		out, err := c.Kubectl(ctx, nil, args...)
		if err == nil && !strings.Contains(out, want) {
			err = fmt.Errorf("kubectl %s: %q", strings.Join(args, " "), out)
		}
		return err
	}
}

// Kubectl runs kubectl and returns what it prints. The error has what it
// complains about.
func (c *Cluster) Kubectl(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	cmd := c.Command(ctx, "kubectl", args...)
	var out, complaint strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &complaint
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), cmp.Or(ctx.Err(), err), strings.TrimSpace(complaint.String()))
	}
	return out.String(), nil
}

// Volumes makes n volumes of this size, which no provisioner would here: directories
// of the node.
func (c *Cluster) Volumes(ctx context.Context, n int, size string) error {
	var list strings.Builder
	for i := range n {
		dir := c.path("volumes", strconv.Itoa(i))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		fmt.Fprintf(&list, `---
apiVersion: v1
kind: PersistentVolume
metadata: { name: volume-%d }
spec:
  capacity: { storage: %s }
  accessModes: [ReadWriteOnce]
  local: { path: %s }
  nodeAffinity:
    required:
      nodeSelectorTerms:
        - matchExpressions: [{ key: kubernetes.io/hostname, operator: In, values: [node] }]
`, i, size, dir)
	}
	_, err := c.Kubectl(ctx, strings.NewReader(list.String()), "create", "-f", "-")
	return err
}

// Client sends requests from the node, to pods and Services by their addresses.
func (c *Cluster) Client() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
			return dialIn(c.node.cmd.Process.Pid, addr)
		},
	}}
}

// LogFile is the path of what one part, such as kubelet, prints.
func (c *Cluster) LogFile(name string) string { return filepath.Join(c.dir, name+".log") }

func (c *Cluster) close() {
	// The first process takes the others along, and the network with it.
	c.node.kill()
	for _, p := range c.procs {
		p.kill()
	}
	c.procs = nil
	// containerd's own, where the kubelet names none. Those in use stay.
	removeCgroups("k8s.io")
	if err := os.RemoveAll(c.dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		fmt.Fprintln(os.Stderr, "removing the cluster:", err)
	}
}
