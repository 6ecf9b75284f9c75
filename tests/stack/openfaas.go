package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"handler/function/tests/client"
)

// OpenFaaSConfig says how OpenFaaS differs from the usual, which is its zero
// value.
type OpenFaaSConfig struct {
	// Timeout is the gateway's upstream_timeout; the others, and the provider's,
	// are five seconds longer, as in OpenFaaS's chart. Zero is an hour.
	Timeout time.Duration
	// AckWait is after how long the queue delivers again what is not done. Zero
	// is an hour.
	AckWait time.Duration
	// Workers are the queue workers: each handles one call at a time. Zero is one.
	Workers int
}

// OpenFaaS is a running Community Edition: gateway, NATS Streaming and queue
// workers, built from their modules, in front of one function.
type OpenFaaS struct {
	// Client sends the gateway requests that are signed for the function.
	client.Client

	dir   string
	procs []*process
	ports io.Closer // the claim to the gateway's ports
}

// Ports of the gateway, which has no setting for them.
const (
	gatewayPort = 8080
	metricsPort = 8082
)

// OpenFaaS starts the Community Edition in front of f, as the function "builder".
// It is ended with the stack. The gateway's ports, 8080 and 8082, are fixed: where
// another process has a stack with OpenFaaS, this waits until that has ended.
func (s *Stack) OpenFaaS(ctx context.Context, f *Function, c OpenFaaSConfig) (_ *OpenFaaS, err error) {
	tools, err := buildTools(ctx, s.Repo, s.log, openfaasModules)
	if err != nil {
		return nil, err
	}
	provider := filepath.Join(s.Dir, "provider")
	if err := goCommand(ctx, filepath.Join(s.Repo, "tests"), []string{"build", "-o", provider, "./cmd/provider"}); err != nil {
		return nil, fmt.Errorf("building the provider: %w", err)
	}
	assets, err := gatewayAssets(ctx, s.Repo)
	if err != nil {
		return nil, err
	}
	if c.Timeout == 0 {
		c.Timeout = time.Hour
	}
	if c.AckWait == 0 {
		c.AckWait = time.Hour
	}
	c.Workers = max(c.Workers, 1)
	natsPort, err := FreePort()
	if err != nil {
		return nil, err
	}
	providerPort, err := FreePort()
	if err != nil {
		return nil, err
	}
	o := &OpenFaaS{Client: client.Client{URL: fmt.Sprintf("http://127.0.0.1:%d", gatewayPort), Secret: f.Secret}}
	if o.dir, err = os.MkdirTemp(s.Dir, "openfaas-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			o.Kill()
		}
	}()
	if o.ports, err = claimWhenFree(ctx, "OpenFaaS gateway"); err != nil {
		return nil, err
	}
	for _, port := range []int{gatewayPort, metricsPort} {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return nil, fmt.Errorf("OpenFaaS's gateway needs port %d: %w", port, err)
		}
		l.Close()
	}

	err = o.start(ctx, "nats", exec.Command(tools["nats-streaming"], "-a", "127.0.0.1", "-p", fmt.Sprint(natsPort), "-cid", "faas-cluster", "-st", "memory"),
		nil, answersTCP(natsPort))
	if err != nil {
		return nil, err
	}
	longer := (c.Timeout + 5*time.Second).String()
	timeouts := []string{"read_timeout=" + longer, "write_timeout=" + longer}
	err = o.start(ctx, "provider", exec.Command(provider),
		append(timeouts, "port="+fmt.Sprint(providerPort), "function_url="+f.URL),
		healthy(fmt.Sprintf("http://127.0.0.1:%d", providerPort)))
	if err != nil {
		return nil, err
	}
	queue := []string{"faas_nats_address=127.0.0.1", "faas_nats_port=" + fmt.Sprint(natsPort)}
	gateway := exec.Command(tools["gateway"])
	gateway.Dir = filepath.Dir(assets)
	err = o.start(ctx, "gateway", gateway,
		append(append(timeouts, queue...), "upstream_timeout="+c.Timeout.String(), "functions_provider_url="+fmt.Sprintf("http://127.0.0.1:%d/", providerPort),
			"faas_prometheus_host=127.0.0.1", "faas_prometheus_port="+fmt.Sprint(providerPort)),
		healthy(o.URL))
	if err != nil {
		return nil, err
	}
	for i := range c.Workers {
		// A worker is known to NATS by its host's name.
		worker := exec.Command("/bin/sh", "-c", `echo "$0" >/proc/sys/kernel/hostname && exec "$1"`, fmt.Sprintf("worker-%d", i), tools["queue-worker"])
		worker.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUTS}
		name := fmt.Sprintf("worker-%d", i)
		err = o.start(ctx, name, worker,
			append(queue, "faas_gateway_address=127.0.0.1", "faas_gateway_port="+fmt.Sprint(gatewayPort), "ack_wait="+c.AckWait.String()),
			o.logs(name, "Listening on"))
		if err != nil {
			return nil, err
		}
	}
	s.onClose(o.Kill)
	return o, nil
}

func (o *OpenFaaS) start(ctx context.Context, name string, cmd *exec.Cmd, env []string, ready func(context.Context) error) error {
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, env...)
	p, err := startProcess(name, o.LogFile(name), cmd)
	if err != nil {
		return err
	}
	o.procs = append(o.procs, p)
	return p.ready(ctx, ready)
}

// LogFile is the path of what one of nats, provider, gateway, worker-0, … prints.
func (o *OpenFaaS) LogFile(name string) string { return filepath.Join(o.dir, name+".log") }

// LogFiles are the paths of all logs.
func (o *OpenFaaS) LogFiles() []string {
	var list []string
	for _, p := range o.procs {
		list = append(list, p.log)
	}
	return list
}

// Kill ends all of it at once, the last started first.
func (o *OpenFaaS) Kill() {
	for i := len(o.procs) - 1; i >= 0; i-- {
		o.procs[i].kill()
	}
	o.procs = nil
	if o.ports != nil {
		o.ports.Close()
		o.ports = nil
	}
}

func answersTCP(port int) func(context.Context) error {
	return func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return err
		}
		return conn.Close()
	}
}

func healthy(url string) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := (&client.Client{URL: url}).Get(ctx, "/healthz")
		return err
	}
}

// logs waits for a line that holds text.
func (o *OpenFaaS) logs(name, text string) func(context.Context) error {
	return func(context.Context) error {
		b, err := os.ReadFile(o.LogFile(name))
		if err == nil && !strings.Contains(string(b), text) {
			err = errors.New("it is not ready")
		}
		return err
	}
}

// gatewayAssets is the folder of the gateway's UI, which it looks for in its
// working directory: it comes with the module.
func gatewayAssets(ctx context.Context, repo string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/openfaas/faas/gateway")
	cmd.Dir = filepath.Join(repo, "tests", "tools", "gateway")
	cmd.Env = append(os.Environ(), "GOWORK=off")
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("finding the gateway's assets: %w", err)
	}
	dir := filepath.Join(strings.TrimSpace(string(out)), "assets")
	_, err = os.Stat(dir)
	return dir, err
}
