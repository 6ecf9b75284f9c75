// Package manifests renders what is in buildkit/ as kubectl does, decodes it as the
// API server does, and holds it against stack.yml and the function's defaults.
package manifests

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"

	function "handler/function"
)

const repo = "../.."

// checkout is a copy of buildkit/ with certificates.
func checkout(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "buildkit")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(repo, "buildkit"))); err != nil {
		t.Fatal(err)
	}
	certs := filepath.Join(dir, "certs")
	for _, side := range []string{"daemon", "client", "nats"} { // of whoever runs this
		made, err := filepath.Glob(filepath.Join(certs, side, "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range made {
			if filepath.Base(file) != "kustomization.yaml" {
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	cmd := exec.Command(filepath.Join(dir, "certs.sh"), certs)
	cmd.Env = append(os.Environ(), "SIDES=daemon client nats")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return dir
}

var codecs = func() serializer.CodecFactory {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{appsv1.AddToScheme, corev1.AddToScheme, networkingv1.AddToScheme, policyv1.AddToScheme} {
		if err := add(s); err != nil {
			panic(err)
		}
	}
	return serializer.NewCodecFactory(s, serializer.EnableStrict)
}()

// render returns the manifests of a directory, as kubectl would send them.
func render(dir string) ([][]byte, error) {
	resources, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		return nil, fmt.Errorf("rendering %s: %w", filepath.Base(dir), err)
	}
	var manifests [][]byte
	for _, r := range resources.Resources() {
		text, err := r.AsYAML()
		if err != nil {
			return nil, err
		}
		manifests = append(manifests, text)
	}
	return manifests, nil
}

// variant is one directory, rendered and decoded.
type variant struct {
	deployment *appsv1.Deployment  // nil in a pool
	set        *appsv1.StatefulSet // nil without a pool
	service    *corev1.Service
	routes     *corev1.Service // of NATS servers, for one another
	policies   map[string]*networkingv1.NetworkPolicy
	claims     []corev1.PersistentVolumeClaim // a StatefulSet's templates among them
	budget     *policyv1.PodDisruptionBudget
	secrets    map[string]*corev1.Secret
	configs    map[string]*corev1.ConfigMap
}

// pod is the daemon's or the NATS server's.
func (v *variant) pod() corev1.PodTemplateSpec {
	if v.set != nil {
		return v.set.Spec.Template
	}
	return value(v.deployment).Spec.Template
}

// daemon is the pod's container. It is zero where there is not exactly one.
func (v *variant) daemon() corev1.Container { return only(v.pod().Spec.Containers) }

// decode reads manifests as the API server does: an unknown key is an error.
func decode(manifests ...[]byte) (objects []runtime.Object, err error) {
	for _, text := range manifests {
		object, _, err := codecs.UniversalDeserializer().Decode(text, nil, nil)
		if err != nil {
			return nil, fmt.Errorf("decoding %.60q…: %w", text, err)
		}
		objects = append(objects, object)
	}
	return objects, nil
}

func newVariant(objects []runtime.Object) (*variant, error) {
	v := &variant{policies: map[string]*networkingv1.NetworkPolicy{}, secrets: map[string]*corev1.Secret{}, configs: map[string]*corev1.ConfigMap{}}
	for _, object := range objects {
		if err := v.add(object); err != nil {
			return nil, err
		}
	}
	return v, nil
}

func (v *variant) add(object runtime.Object) error {
	var namespace string
	switch o := object.(type) {
	case *appsv1.Deployment:
		v.deployment, namespace = o, o.Namespace
	case *appsv1.StatefulSet:
		v.set, namespace = o, o.Namespace
		v.claims = append(v.claims, o.Spec.VolumeClaimTemplates...)
	case *corev1.PersistentVolumeClaim:
		v.claims, namespace = append(v.claims, *o), o.Namespace
	case *corev1.Service:
		namespace = o.Namespace
		if o.Name == natsRoutes {
			v.routes = o
		} else {
			v.service = o
		}
	case *networkingv1.NetworkPolicy:
		v.policies[o.Name], namespace = o, o.Namespace
	case *policyv1.PodDisruptionBudget:
		v.budget, namespace = o, o.Namespace
	case *corev1.Secret:
		v.secrets[o.Name], namespace = o, o.Namespace
	case *corev1.ConfigMap:
		v.configs[o.Name], namespace = o, o.Namespace
	default:
		return fmt.Errorf("%T is not expected", o)
	}
	if namespace != "openfaas" {
		return fmt.Errorf("%T is in the namespace %q", object, namespace)
	}
	return nil
}

func load(dir string) (*variant, error) {
	manifests, err := render(dir)
	if err != nil {
		return nil, err
	}
	objects, err := decode(manifests...)
	if err != nil {
		return nil, err
	}
	return newVariant(objects)
}

// mustLoad fails the test where a directory cannot be loaded.
func mustLoad(t *testing.T, dir string) *variant {
	t.Helper()
	v, err := load(dir)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// value is what p points to. It is zero where p is nil, so that a promise about a key
// that is missing fails as one about a wrong value does.
func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// number is a port or an amount. It is zero for a name.
func number(p *intstr.IntOrString) int {
	n := value(p)
	return n.IntValue()
}

// only is the one element of a list. It is zero where there is not exactly one.
func only[T any](list []T) (v T) {
	if len(list) == 1 {
		v = list[0]
	}
	return v
}

// variants are the directories that can be applied.
var variants = []string{
	"single", "single-rootless", "single-privileged", "single-cert-manager",
	"pool", "pool-rootless", "pool-privileged", "pool-cert-manager",
	"nats", "nats-three",
}

func TestVariants(t *testing.T) {
	dir := checkout(t)
	found, err := filepath.Glob(filepath.Join(dir, "*", "kustomization.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range found {
		names = append(names, filepath.Base(filepath.Dir(f)))
	}
	if want := slices.Sorted(slices.Values(append([]string{"cert-manager", "certs", "gold"}, variants...))); !slices.Equal(names, want) {
		t.Errorf("directories %q, want %q", names, want)
	}
	for _, name := range variants {
		t.Run(name, func(t *testing.T) {
			v := mustLoad(t, filepath.Join(dir, name))
			for _, p := range promisesOf(name) {
				t.Run(p.name, func(t *testing.T) {
					if err := p.check(name, v); err != nil {
						t.Error(err)
					}
				})
			}
			if isNATS(name) {
				return
			}
			t.Run("metrics", func(t *testing.T) {
				if err := checkMetrics(v, mustLoad(t, withMetrics(t, dir, name))); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestGold: the pool for some tenants is the pool, in a namespace of its own that admits it.
func TestGold(t *testing.T) {
	const namespace = "buildkit-gold"
	dir := checkout(t)
	pool, err := render(filepath.Join(dir, "pool"))
	if err != nil {
		t.Fatal(err)
	}
	gold, err := render(filepath.Join(dir, "gold"))
	if err != nil {
		t.Fatal(err)
	}
	var own *corev1.Namespace
	var rest []string
	for _, text := range gold {
		objects, err := decode(text)
		if err != nil {
			t.Fatal(err)
		}
		if o, ok := objects[0].(*corev1.Namespace); ok {
			own = o
			continue
		}
		rest = append(rest, string(text))
	}
	if own == nil || own.Name != namespace || own.Labels["pod-security.kubernetes.io/enforce"] != "privileged" {
		t.Errorf("the namespace is %+v", own)
	}
	if len(rest) != len(pool) {
		t.Fatalf("%d objects, and the pool has %d", len(rest), len(pool))
	}
	for i, text := range pool {
		if want := strings.ReplaceAll(string(text), "namespace: openfaas\n", "namespace: "+namespace+"\n"); rest[i] != want {
			t.Errorf("got %s, want %s", rest[i], want)
		}
	}
}

// withMetrics is an overlay of the operator's own that adds the metrics to a variant.
func withMetrics(t *testing.T, dir, name string) string {
	t.Helper()
	overlay := filepath.Join(dir, "own")
	if err := os.MkdirAll(overlay, 0o755); err != nil {
		t.Fatal(err)
	}
	text := "kind: Kustomization\nnamespace: openfaas\nresources: [../" + name + "]\ncomponents: [../components/metrics]\n"
	if err := os.WriteFile(filepath.Join(overlay, "kustomization.yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return overlay
}

func checkMetrics(without, with *variant) error {
	c := with.daemon()
	var port int
	if policy := with.policies["buildkitd-metrics"]; policy != nil {
		port = number(only(only(policy.Spec.Ingress).Ports).Port)
	}
	if !slices.Contains(c.Args, "--debugaddr=0.0.0.0:6060") || len(c.Args) != len(without.daemon().Args)+1 || len(c.Ports) != 2 || port != 6060 {
		return fmt.Errorf("arguments %q, ports %v, the policy's port %d", c.Args, c.Ports, port)
	}
	return nil
}

// defaults are the function's, of an empty environment.
func defaults() (*function.Config, error) {
	return function.LoadConfig(func(string) string { return "" })
}

func mustDefaults(t *testing.T) *function.Config {
	t.Helper()
	c, err := defaults()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestSecretsHash: a changed certificate is another Secret, so that the daemons are
// restarted.
func TestSecretsHash(t *testing.T) {
	dir := checkout(t)
	name := func() string {
		for n := range mustLoad(t, filepath.Join(dir, "pool")).secrets {
			return n
		}
		return ""
	}
	before := name()
	cmd := exec.Command(filepath.Join(dir, "certs.sh"), filepath.Join(dir, "certs"))
	cmd.Env = append(os.Environ(), "FORCE=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if after := name(); after == before || after == "" {
		t.Errorf("%s before and %s after", before, after)
	}
}
