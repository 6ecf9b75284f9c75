//go:build k8s

package k8s

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestKubernetes goes the way of buildkit/README.md, from the certificates on.
func TestKubernetes(t *testing.T) {
	s := stack.Shared(t)
	images(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Minute) // that compiles Kubernetes
	defer cancel()
	kubernetes, err := s.Cluster(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{Cluster: kubernetes, s: s, dir: t.TempDir()}
	t.Cleanup(func() {
		if t.Failed() {
			c.explain(t)
		}
	})
	if err := os.CopyFS(filepath.Join(c.dir, "buildkit"), os.DirFS(filepath.Join(s.Repo, "buildkit"))); err != nil {
		t.Fatal(err)
	}
	// What there are volumes for: each is claimed once.
	if err := c.Volumes(t.Context(), 7, "50Gi"); err != nil {
		t.Fatal(err)
	}
	c.run(t, []string{"SIDES=daemon client nats"}, "buildkit/certs.sh", filepath.Join(c.dir, "buildkit", "certs"))
	for _, namespace := range []string{"openfaas", "openfaas-fn"} {
		c.kubectl(t, "create", "namespace", namespace)
	}

	step := func(name string, f func(*testing.T)) {
		if !t.Run(name, f) {
			t.FailNow()
		}
	}
	step("accepted", c.accepted)
	step("pool", func(t *testing.T) { c.apply(t, "pool", "statefulset") })
	step("secrets", c.secrets)
	step("deploy", func(t *testing.T) { c.deploy(t) })
	step("build", c.buildAndRun)
	step("userns", func(t *testing.T) { c.isolated(t, "pool") })
	step("restart", c.restart)
	step("records", c.records)
	step("tenants", c.tenants)
	c.kubectl(t, "delete", "--ignore-not-found", "-k", c.overlay(t, "pool"))
	for _, variant := range []string{"single", "single-privileged", "single-rootless"} {
		step(variant, func(t *testing.T) {
			c.apply(t, variant, "deployment")
			c.isolated(t, variant)
			c.kubectl(t, "delete", "-k", c.overlay(t, variant))
		})
	}
}

// run runs a script of the copy in the cluster's node, which has kubectl, with variables.
func (c *cluster) run(t *testing.T, env []string, script string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := c.Command(ctx, "/bin/sh", append([]string{filepath.Join(c.dir, script)}, args...)...)
	cmd.Env = append(append(cmd.Env, env...), "PAYLOAD_SECRET="+filepath.Join(c.dir, "payload-secret"), "REGISTRY_CONFIG="+filepath.Join(c.dir, "config.json"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
}

// accepted has the API server take every variant as it is shipped, NetworkPolicies
// included. The network plugin here enforces none of those.
func (c *cluster) accepted(t *testing.T) {
	for _, variant := range []string{"single", "single-rootless", "single-privileged", "single-cert-manager", "pool", "pool-rootless", "pool-privileged", "pool-cert-manager"} {
		out := c.kubectl(t, "apply", "--dry-run=server", "--validate=strict", "-o", "name", "-k", filepath.Join(c.dir, "buildkit", variant))
		if !strings.Contains(out, "networkpolicy.networking.k8s.io/buildkitd") {
			t.Errorf("%s has %q", variant, out)
		}
	}
	for _, variant := range []string{"nats", "nats-three"} {
		out := c.kubectl(t, "apply", "--dry-run=server", "--validate=strict", "-o", "name", "-k", filepath.Join(c.dir, "buildkit", variant))
		if !strings.Contains(out, "networkpolicy.networking.k8s.io/builder-nats") || !strings.Contains(out, "statefulset.apps/builder-nats") {
			t.Errorf("%s has %q", variant, out)
		}
	}
}

// apply applies a variant and waits until its daemons are ready.
func (c *cluster) apply(t *testing.T, variant, kind string) {
	t.Helper()
	c.kubectl(t, "apply", "-k", c.overlay(t, variant))
	c.kubectl(t, "-n", "openfaas", "rollout", "status", kind+"/buildkitd", "--timeout=5m")
}

func (c *cluster) secrets(t *testing.T) {
	err := stack.WriteContext(c.dir, map[string]string{"payload-secret": c.s.PayloadSecret + "\n", "config.json": "{}"})
	if err != nil {
		t.Fatal(err)
	}
	c.run(t, nil, "buildkit/secrets.sh", "kubectl")
	list := strings.Fields(c.kubectl(t, "-n", "openfaas-fn", "get", "secrets", "-o", `jsonpath={.items[*].metadata.name}`))
	d, err := c.s.Description()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range d.Secrets {
		if !slices.Contains(list, name) {
			t.Errorf("make secrets made %q, not %s of stack.yml", list, name)
		}
	}
}

// deploy deploys the function with the secrets of stack.yml and with more.
func (c *cluster) deploy(t *testing.T, more ...string) {
	d, err := c.s.Description()
	if err != nil {
		t.Fatal(err)
	}
	d.Secrets = append(d.Secrets, more...)
	c.deployAs(t, d)
}

func (c *cluster) deployAs(t *testing.T, d *stack.Description) {
	c.input(t, manifests(t, d, c.Registry+"/builder:latest"), "apply", "-f", "-")
	c.kubectl(t, "-n", "openfaas-fn", "rollout", "status", "deployment/builder", "--timeout=3m")
	// An old pod still serves for a while, as it was deployed.
	stack.Eventually(t, 3*time.Minute, func() error {
		replicas := c.kubectl(t, "-n", "openfaas-fn", "get", "deployment/builder", "-o", "jsonpath={.spec.replicas}")
		pods := strings.Fields(c.kubectl(t, "-n", "openfaas-fn", "get", "pods", "-l", "faas_function=builder", "-o", "name"))
		if fmt.Sprint(len(pods)) != replicas {
			return fmt.Errorf("%q are there, and %s are wanted", pods, replicas)
		}
		return nil
	})
}

// buildAndRun builds through the function's Service and the daemons' one, and runs
// what was pushed as a pod.
func (c *cluster) buildAndRun(t *testing.T) {
	f := c.function(t)
	for i := range 4 {
		image := fmt.Sprintf("k8s/hello-%d:v1", i)
		got, err := c.build(t.Context(), f, image, "FROM busybox", fmt.Sprintf(`CMD ["echo", "built in the cluster, %d"]`, i))
		if err != nil {
			t.Fatal(err)
		}
		pod := fmt.Sprintf("hello-%d", i)
		c.kubectl(t, "-n", "openfaas-fn", "run", pod, "--restart=Never", "--image="+c.Registry+"/k8s/"+pod+"@"+got.Digest)
		c.kubectl(t, "-n", "openfaas-fn", "wait", "pod/"+pod, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=2m")
		if out, want := c.kubectl(t, "-n", "openfaas-fn", "logs", pod), fmt.Sprintf("built in the cluster, %d\n", i); out != want {
			t.Errorf("the pod printed %q, want %q", out, want)
		}
	}
	// From inside the cluster, by the name in DEPLOY.md.
	c.kubectl(t, "-n", "openfaas-fn", "run", "inside", "--restart=Never", "--image=busybox", "--", "wget", "-qO-", "http://builder.openfaas-fn:8080/ready")
	c.kubectl(t, "-n", "openfaas-fn", "wait", "pod/inside", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=2m")
	if out := c.kubectl(t, "-n", "openfaas-fn", "logs", "inside"); out != "ready\n" {
		t.Errorf("the builder says %q", out)
	}
	// By the names that placement needs, of which DNS has told the function.
	log := c.kubectl(t, "-n", "openfaas-fn", "logs", "deployment/builder")
	if want := `"daemon":"tcp://buildkitd-`; !strings.Contains(log, want) {
		t.Errorf("the function's log lacks %s:\n%s", want, log)
	}
}

// isolated builds with a step that looks around, and looks at it from the node, and
// expects what buildkit/README.md says of the variant.
func (c *cluster) isolated(t *testing.T, variant string) {
	sandboxed := !strings.Contains(variant, "rootless")
	userns := !strings.Contains(variant, "privileged")
	mark := "mark-" + variant
	f := c.function(t)
	type result struct {
		log string // what the step printed
		err error
	}
	built := make(chan result, 1)
	go func() {
		got, err := c.build(t.Context(), f, "k8s/around-"+variant+":v1", "FROM busybox",
			`RUN echo "uid_map: $(cat /proc/self/uid_map)" && \
    for p in /proc/[0-9]*; do echo "process: $(cat $p/comm)"; done && \
    if ls /etc/buildkit/certs /proc/1/root/etc/buildkit/certs; then echo "file: the daemon's"; fi; \
    sleep 15; : `+mark)
		printed := slices.DeleteFunc(got.Log, func(line string) bool { return !strings.HasPrefix(line, "l: ") })
		built <- result{strings.Join(printed, "\n"), err}
	}()
	owner, err := c.ownerOf(t.Context(), mark)
	if err != nil {
		t.Error(err)
	}
	r := <-built
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Logf("a step of %s is user %d on the node", variant, owner)
	if unprivileged := owner != 0; unprivileged != userns {
		t.Errorf("the step is user %d on the node", owner)
	}
	mapped := strings.Fields(after(r.log, "uid_map: "))
	if len(mapped) != 3 || mapped[0] != "0" || (mapped[1] != "0") != userns {
		t.Errorf("the step's uid_map is %q", mapped)
	}
	if sees := strings.Contains(r.log, "process: buildkitd"); sees == sandboxed {
		t.Errorf("that the step sees the daemon's process is %t:\n%s", sees, r.log)
	}
	if strings.Contains(r.log, "file: the daemon's") {
		t.Errorf("the step reads the daemon's files:\n%s", r.log)
	}
}

// after returns what follows the last occurrence of a word, up to the line's end.
func after(text, word string) string {
	if i := strings.LastIndex(text, word); i >= 0 {
		text, _, _ = strings.Cut(text[i+len(word):], "\n")
		return text
	}
	return ""
}

// ownerOf is the user of a process on the node that has mark in its command line.
func (c *cluster) ownerOf(ctx context.Context, mark string) (uid int, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		out, err := exec.CommandContext(ctx, "pgrep", "-f", "sleep 15; : "+mark+"$").Output()
		for pid := range strings.FieldsSeq(string(out)) {
			status, err := os.ReadFile("/proc/" + pid + "/status")
			if err != nil {
				continue
			}
			// Of runc too, which starts as the daemon and becomes the step.
			if name := after(string(status), "Name:"); !strings.Contains(name, "sh") {
				continue
			}
			return strconv.Atoi(strings.Fields(after(string(status), "Uid:"))[0])
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("looking for the step on the node: %w, %w", ctx.Err(), err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// restart restarts the daemons one at a time while builds are running and more are
// coming: none is lost.
func (c *cluster) restart(t *testing.T) {
	f := c.function(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	done := make(chan struct{})
	var mu sync.Mutex
	var built int
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			for n := 0; ; n++ {
				image := fmt.Sprintf("k8s/restart-%d-%d:v1", i, n%5)
				_, err := c.build(ctx, f, image, "FROM busybox", fmt.Sprintf("RUN sleep 8 && echo %d.%d > /built", i, n))
				mu.Lock()
				built++
				mu.Unlock()
				if err != nil {
					t.Errorf("build %d.%d: %v", i, n, err)
				}
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	before := c.kubectl(t, "-n", "openfaas", "get", "pods", "-l", "app=buildkitd", "-o", "jsonpath={.items[*].metadata.uid}")
	time.Sleep(4 * time.Second) // the first builds are in their step
	c.kubectl(t, "-n", "openfaas", "rollout", "restart", "statefulset/buildkitd")
	c.kubectl(t, "-n", "openfaas", "rollout", "status", "statefulset/buildkitd", "--timeout=5m")
	close(done)
	wg.Wait()
	t.Logf("%d builds", built)
	now := c.kubectl(t, "-n", "openfaas", "get", "pods", "-l", "app=buildkitd", "-o", "jsonpath={.items[*].metadata.uid}")
	for uid := range strings.FieldsSeq(before) {
		if strings.Contains(now, uid) {
			t.Error("a daemon was not restarted")
		}
	}
	log := c.kubectl(t, "-n", "openfaas-fn", "logs", "deployment/builder")
	for i := range 2 {
		if want := fmt.Sprintf(`"daemon":"tcp://buildkitd-%d.`, i); !strings.Contains(log, want) {
			t.Errorf("no build was on daemon %d", i)
		}
	}
}

// records applies the NATS server for records of builds, and has two replicas of the function
// use it. What one of them builds, the other lists, reads and stops, also after the server has
// come again with what is on its volume.
func (c *cluster) records(t *testing.T) {
	c.kubectl(t, "apply", "-k", filepath.Join(c.dir, "buildkit", "nats"))
	c.kubectl(t, "-n", "openfaas", "rollout", "status", "statefulset/builder-nats", "--timeout=5m")
	c.run(t, []string{"NATS=" + filepath.Join(c.dir, "buildkit", "certs", "nats")}, "buildkit/secrets.sh", "kubectl")
	d, err := c.s.Description()
	if err != nil {
		t.Fatal(err)
	}
	d.Secrets = append(d.Secrets, "nats-credential", "nats-ca")
	d.Environment["nats_url"] = "tls://builder-nats.openfaas:4222"
	c.kubectl(t, "-n", "openfaas-fn", "scale", "deployment/builder", "--replicas=2")
	c.deployAs(t, d)
	a, b := c.replicas(t)

	image := c.Registry + "/k8s/records:v1"
	built, err := a.Post(t.Context(), c.body(t, "k8s/records:v1", "FROM busybox", "RUN echo of the one replica"), client.Header("X-Call-Id", "kept"))
	if err != nil || built.Status != "success" {
		t.Fatalf("%v, %v", err, built)
	}
	stopped := make(chan string, 1)
	endless := c.body(t, "k8s/records:v2", "FROM busybox", "RUN sleep 600")
	go func() {
		answer, err := a.Post(t.Context(), endless, client.Header("X-Call-Id", "stopped"))
		stopped <- fmt.Sprint(answer.Code, " ", err)
	}()
	stack.Eventually(t, 3*time.Minute, func() error {
		v := b.MustVerdict(t, t.Context(), "stopped")
		if v.Status != "in_progress" {
			return fmt.Errorf("the other replica says %v", v)
		}
		return nil
	})
	b.MustStop(t, t.Context(), "stopped")
	if got := <-stopped; got != "canceled <nil>" {
		t.Errorf("the build that was stopped: %s", got)
	}

	c.kubectl(t, "-n", "openfaas", "rollout", "restart", "statefulset/builder-nats")
	c.kubectl(t, "-n", "openfaas", "rollout", "status", "statefulset/builder-nats", "--timeout=5m")
	stack.Eventually(t, 3*time.Minute, func() error {
		list, err := b.Builds(t.Context(), "")
		if err != nil || !list.Complete || len(list.Builds) != 2 || list.Builds[1].ID != "kept" || list.Builds[1].Image != image {
			return fmt.Errorf("the other replica lists %+v, %v", list, err)
		}
		return nil
	})
	if log := b.MustReadLog(t, t.Context(), "kept", ""); !slices.Equal(log.Texts(), built.Log) {
		t.Errorf("the other replica has %q, want %q", log.Texts(), built.Log)
	}
	c.kubectl(t, "-n", "openfaas-fn", "scale", "deployment/builder", "--replicas=1")
	c.deploy(t) // as the next ones expect it
	c.kubectl(t, "delete", "-k", filepath.Join(c.dir, "buildkit", "nats"))
}

// replicas are both pods of the function, once each has its store.
func (c *cluster) replicas(t *testing.T) (a, b *client.Client) {
	var found []*client.Client
	stack.Eventually(t, 3*time.Minute, func() error {
		pods := strings.Fields(c.kubectl(t, "-n", "openfaas-fn", "get", "pods", "-l", "faas_function=builder", "-o", "jsonpath={.items[*].status.podIP}"))
		if len(pods) != 2 {
			return fmt.Errorf("the pods are at %q", pods)
		}
		found = nil
		for _, ip := range pods {
			one := &client.Client{URL: "http://" + ip + ":8080", Secret: c.s.PayloadSecret, HTTP: c.Client()}
			if list, err := one.Builds(t.Context(), ""); err != nil || !list.Complete {
				return fmt.Errorf("%s lists %+v, %v", ip, list, err)
			}
			found = append(found, one)
		}
		return nil
	})
	return found[0], found[1]
}

// tenants deploys the function with a file of tenants, and changes the file while a build
// runs. The build goes on, and the change counts without a restart, once the kubelet has
// written it into the pod.
func (c *cluster) tenants(t *testing.T) {
	put := func(list ...*stack.Tenant) {
		t.Helper()
		file := filepath.Join(c.dir, stack.TenantsSecret)
		if err := os.WriteFile(file, stack.TenantsOf(list...).YAML(), 0o600); err != nil {
			t.Fatal(err)
		}
		secret := c.kubectl(t, "-n", "openfaas-fn", "create", "secret", "generic", stack.TenantsSecret, "--from-file="+file, "--dry-run=client", "-o", "yaml")
		c.input(t, []byte(secret), "apply", "--server-side", "-f", "-")
	}
	acme, globex := stack.NewTenant("acme", c.Registry+"/k8s/acme"), stack.NewTenant("globex", c.Registry+"/k8s/globex")
	put(acme)
	c.deploy(t, stack.TenantsSecret)
	nobody := c.function(t)
	if _, err := c.build(t.Context(), nobody, "k8s/acme/app:v1", "FROM busybox"); err == nil || !strings.Contains(err.Error(), "unauthorized") {
		t.Errorf("with the payload secret: %v", err)
	}
	before := acme.Of(*nobody)
	running := make(chan error, 1)
	go func() {
		_, err := c.build(t.Context(), before, "k8s/acme/app:v1", "FROM busybox", "RUN sleep 150")
		running <- err
	}()

	acme.Keys = stack.NewTenant("").Keys
	put(acme, globex)
	began := time.Now()
	build := func(of *client.Client, image string) error {
		_, err := c.build(t.Context(), of, image, "FROM busybox", "RUN echo built > /built")
		return err
	}
	for err := build(globex.Of(*nobody), "k8s/globex/app:v1"); err != nil; err = build(globex.Of(*nobody), "k8s/globex/app:v1") {
		if time.Since(began) > 3*time.Minute {
			t.Fatalf("the new tenant: still after three minutes: %v", err)
		}
		time.Sleep(time.Second)
	}
	t.Logf("the changed Secret counts after %v", time.Since(began).Round(time.Second))
	if err := build(acme.Of(*nobody), "k8s/acme/app:v2"); err != nil {
		t.Errorf("acme's new key: %v", err)
	}
	if err := build(before, "k8s/acme/app:v2"); err == nil || !strings.Contains(err.Error(), "unauthorized") {
		t.Errorf("acme's old key: %v", err)
	}
	select {
	case err := <-running:
		t.Errorf("the build that was to run meanwhile has ended: %v", err)
	default:
		if err := <-running; err != nil {
			t.Errorf("the build that ran meanwhile: %v", err)
		}
	}
	c.deploy(t) // as the next ones expect it
}

// explain shows what the cluster knows of its own trouble.
func (c *cluster) explain(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, args := range [][]string{
		{"get", "pods,statefulsets,deployments,pvc,pv", "-A", "-o", "wide"},
		{"get", "events", "-A", "--sort-by=.lastTimestamp"},
		{"-n", "openfaas", "logs", "-l", "app=buildkitd", "--tail=30", "--prefix"},
		{"-n", "openfaas", "logs", "-l", "app=builder-nats", "--tail=30", "--prefix"},
		{"-n", "openfaas-fn", "logs", "deployment/builder", "--tail=40"},
	} {
		out, err := c.Kubectl(ctx, nil, args...)
		if err != nil {
			out += err.Error()
		}
		t.Logf("kubectl %s:\n%s", strings.Join(args, " "), out[max(0, len(out)-6<<10):])
	}
}
