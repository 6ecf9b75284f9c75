//go:build k8s

package k8s

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/builder"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

func TestMain(m *testing.M) { stack.Main(m) }

// images builds the images that the cluster runs, with the function on this machine, and
// pushes them to the registry from which the cluster pulls.
func images(t *testing.T, s *stack.Stack) {
	t.Helper()
	_, f := stack.Test(t, stack.FunctionConfig{Plain: true, Env: map[string]string{"build_timeout": "30m"}})
	pause := stack.Context(t, map[string]string{"Dockerfile": "FROM busybox\nENTRYPOINT [\"sleep\", \"2147483647\"]\n"})
	send(t, f, pause, map[string]any{"image": s.Registry.Image("pause:latest")})

	daemon := t.TempDir()
	if err := os.CopyFS(daemon, os.DirFS("testdata/buildkitd")); err != nil {
		t.Fatal(err)
	}
	rootlesskit, err := s.Rootlesskit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(daemon, "root")
	for to, from := range map[string]string{
		"usr/bin/buildkitd":     s.Tools.Buildkitd,
		"usr/bin/buildctl":      s.Tools.Buildctl,
		"usr/bin/buildkit-runc": s.Tools.Runc,
		"usr/bin/rootlesskit":   rootlesskit,
		"usr/bin/newuidmap":     "newuidmap",
		"usr/bin/newgidmap":     "newgidmap",
		"usr/bin/setcap":        "setcap",
	} {
		if err := copyProgram(root, to, from); err != nil {
			t.Fatal(err)
		}
	}
	for target, tag := range map[string]string{"buildkit": "v0.34.2", "rootless": "v0.34.2-rootless"} {
		send(t, f, daemon, map[string]any{"image": s.Registry.Image("moby/buildkit:" + tag), "target": target})
	}

	server, _, err := stack.BuildNATS(t.Context(), s.Repo, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	// docker.io/library/nats:2.15.3 is the program alone too.
	nats := stack.Context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY nats-server /\nENTRYPOINT [\"/nats-server\"]\n"})
	if err := copyProgram(nats, "nats-server", server); err != nil {
		t.Fatal(err)
	}
	send(t, f, nats, map[string]any{"image": s.Registry.Image("library/nats:2.15.3")})

	function, args, err := s.Own(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	send(t, f, function, map[string]any{"image": s.Registry.Image("builder:latest"), "buildArgs": args})
}

// copyProgram copies a program and the shared libraries that it needs below root.
func copyProgram(root, to, from string) error {
	from, err := exec.LookPath(from)
	if err != nil {
		return fmt.Errorf("%w: apt-get install uidmap libcap2-bin", err)
	}
	files := map[string]string{to: from}
	out, err := exec.Command("ldd", from).CombinedOutput()
	if err == nil { // it is not static
		for line := range strings.Lines(string(out)) {
			for _, word := range strings.Fields(line) {
				if filepath.IsAbs(word) {
					files[word] = word
				}
			}
		}
	}
	for to, from := range files {
		path := filepath.Join(root, to)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if out, err := exec.Command("cp", "--dereference", "--preserve=mode", from, path).CombinedOutput(); err != nil {
			return fmt.Errorf("copying %s: %w: %s", from, err, out)
		}
	}
	return nil
}

// send builds a context and fails the test unless it succeeds.
func send(t *testing.T, f *stack.Function, dir string, config map[string]any) client.Record {
	t.Helper()
	return f.MustBuild(t, t.Context(), stack.MustTar(t, dir, config))
}

// manifests are the Deployment and the Service that faas-netes makes of the
// function: every key of every secret as a file of one directory, a read-only root
// with /tmp, both probes on /_/health. See its pkg/handlers/deploy.go.
func manifests(t *testing.T, d *stack.Description, image string) []byte {
	t.Helper()
	labels := map[string]string{"faas_function": "builder"}
	container := corev1.Container{
		Name:            "builder",
		Image:           image,
		ImagePullPolicy: corev1.PullAlways,
		Ports:           []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}},
		SecurityContext: &corev1.SecurityContext{
			ReadOnlyRootFilesystem:   &d.ReadOnly,
			AllowPrivilegeEscalation: new(bool),
		},
		Resources:    corev1.ResourceRequirements{Requests: quantities(t, d.Requests), Limits: quantities(t, d.Limits)},
		VolumeMounts: []corev1.VolumeMount{{Name: "secrets", MountPath: "/var/openfaas/secrets", ReadOnly: true}, {Name: "temp", MountPath: "/tmp"}},
	}
	probe := &corev1.Probe{
		ProbeHandler:        corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/_/health", Port: intstr.FromInt32(8080)}},
		InitialDelaySeconds: 2, TimeoutSeconds: 1, PeriodSeconds: 2, FailureThreshold: 3,
	}
	container.LivenessProbe, container.ReadinessProbe = probe, probe
	for name, value := range d.Environment {
		container.Env = append(container.Env, corev1.EnvVar{Name: name, Value: value})
	}
	var secrets corev1.ProjectedVolumeSource
	for _, name := range d.Secrets {
		secrets.Sources = append(secrets.Sources, corev1.VolumeProjection{
			Secret: &corev1.SecretProjection{LocalObjectReference: corev1.LocalObjectReference{Name: name}},
		})
	}
	list := []any{
		appsv1.Deployment{
			TypeMeta:   metav1.TypeMeta{APIVersion: "apps/v1", Kind: "Deployment"},
			ObjectMeta: metav1.ObjectMeta{Name: "builder", Namespace: "openfaas-fn"},
			Spec: appsv1.DeploymentSpec{
				Selector: &metav1.LabelSelector{MatchLabels: labels},
				Template: corev1.PodTemplateSpec{
					ObjectMeta: metav1.ObjectMeta{Labels: labels},
					Spec: corev1.PodSpec{
						Containers: []corev1.Container{container},
						Volumes: []corev1.Volume{
							{Name: "secrets", VolumeSource: corev1.VolumeSource{Projected: &secrets}},
							{Name: "temp", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
						},
					},
				},
			},
		},
		corev1.Service{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
			ObjectMeta: metav1.ObjectMeta{Name: "builder", Namespace: "openfaas-fn"},
			Spec: corev1.ServiceSpec{
				Selector: labels,
				Ports:    []corev1.ServicePort{{Name: "http", Port: 8080, TargetPort: intstr.FromInt32(8080)}},
			},
		},
	}
	var b bytes.Buffer
	for _, o := range list {
		if err := json.NewEncoder(&b).Encode(o); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func quantities(t *testing.T, list map[string]string) corev1.ResourceList {
	t.Helper()
	quantities := corev1.ResourceList{}
	for name, value := range list {
		q, err := resource.ParseQuantity(value)
		if err != nil {
			t.Fatal(err)
		}
		quantities[corev1.ResourceName(name)] = q
	}
	return quantities
}

// cluster is the Kubernetes of all tests, with what they apply.
type cluster struct {
	*stack.Cluster
	s   *stack.Stack
	dir string // a copy of buildkit/, and overlays beside it
}

// kubectl fails the test where kubectl fails.
func (c *cluster) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	return c.input(t, nil, args...)
}

func (c *cluster) input(t *testing.T, stdin []byte, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	out, err := c.Kubectl(ctx, bytes.NewReader(stdin), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// overlay writes an overlay over a directory of buildkit/, as buildkit/README.md says, and
// returns the overlay's directory. The overlay suits this cluster, which has two
// processors and one registry in plain HTTP that also mirrors docker.io.
func (c *cluster) overlay(t *testing.T, variant string) string {
	t.Helper()
	dir := filepath.Join(c.dir, "my-"+variant)
	toml, err := os.ReadFile(filepath.Join(c.dir, "buildkit", "base", "pod", "buildkitd.toml"))
	if err != nil {
		t.Fatal(err)
	}
	replicas := ""
	if strings.HasPrefix(variant, "pool") {
		replicas = "replicas:\n  - { name: buildkitd, count: 2 }\n"
	}
	err = stack.WriteContext(dir, map[string]string{
		"buildkitd.toml": fmt.Sprintf("%s\n[registry.%q]\n  http = true\n[registry.\"docker.io\"]\n  mirrors = [%[2]q]\n", toml, c.Registry),
		"kustomization.yaml": fmt.Sprintf(`kind: Kustomization
namespace: openfaas
resources:
  - ../buildkit/%s
%sconfigMapGenerator:
  - name: buildkitd
    behavior: replace
    files:
      - buildkitd.toml
`, variant, replicas),
	})
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// function is the deployed builder.
func (c *cluster) function(t *testing.T) *client.Client {
	t.Helper()
	ip := c.kubectl(t, "-n", "openfaas-fn", "get", "service", "builder", "-o", "jsonpath={.spec.clusterIP}")
	return &client.Client{URL: "http://" + ip + ":8080", Secret: c.s.PayloadSecret, HTTP: c.Client()}
}

// build sends one Dockerfile through the deployed function.
func (c *cluster) build(ctx context.Context, f *client.Client, image string, dockerfile ...string) (client.Record, error) {
	body, err := c.tar(image, dockerfile...)
	if err != nil {
		return client.Record{}, err
	}
	return f.Build(ctx, body)
}

// body is the request of build.
func (c *cluster) body(t *testing.T, image string, dockerfile ...string) []byte {
	t.Helper()
	body, err := c.tar(image, dockerfile...)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func (c *cluster) tar(image string, dockerfile ...string) ([]byte, error) {
	dir, err := os.MkdirTemp(c.dir, "context-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := stack.WriteContext(dir, map[string]string{"Dockerfile": strings.Join(dockerfile, "\n") + "\n"}); err != nil {
		return nil, err
	}
	return stack.Tar(dir, &builder.BuildConfig{Image: c.Registry + "/" + image})
}
