// Package manifests renders what is in buildkit/ as kubectl does, decodes it as the
// API server does, and holds it against stack.yml and the function's defaults.
package manifests

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	buildkitd "github.com/moby/buildkit/cmd/buildkitd/config"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"sigs.k8s.io/json"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"

	function "handler/function"
	"handler/function/hosts"
)

const repo = "../.."

// checkout is a copy of buildkit/ with certificates.
func checkout(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "buildkit")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(repo, "buildkit"))); err != nil {
		t.Fatal(err)
	}
	for _, side := range []string{"daemon", "client"} { // of whoever runs this
		if err := os.RemoveAll(filepath.Join(dir, "certs", side)); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command(filepath.Join(dir, "certs.sh"), filepath.Join(dir, "certs")).CombinedOutput(); err != nil {
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

// variant is one directory, rendered.
type variant struct {
	pod      corev1.PodTemplateSpec
	claim    corev1.PersistentVolumeClaimSpec
	service  *corev1.Service
	policies map[string]*networkingv1.NetworkPolicy
	budget   *policyv1.PodDisruptionBudget
	set      *appsv1.StatefulSet
	secrets  map[string]*corev1.Secret
	configs  map[string]*corev1.ConfigMap
}

func render(t *testing.T, dir string) []runtime.Object {
	t.Helper()
	resources, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatal(err)
	}
	var objects []runtime.Object
	for _, r := range resources.Resources() {
		text, err := r.AsYAML()
		if err != nil {
			t.Fatal(err)
		}
		object, _, err := codecs.UniversalDeserializer().Decode(text, nil, nil)
		if err != nil {
			t.Fatalf("decoding %s %s: %v", r.GetKind(), r.GetName(), err)
		}
		if r.GetNamespace() != "openfaas" {
			t.Errorf("%s %s is in the namespace %q", r.GetKind(), r.GetName(), r.GetNamespace())
		}
		objects = append(objects, object)
	}
	return objects
}

func load(t *testing.T, dir string) *variant {
	t.Helper()
	v := &variant{policies: map[string]*networkingv1.NetworkPolicy{}, secrets: map[string]*corev1.Secret{}, configs: map[string]*corev1.ConfigMap{}}
	for _, object := range render(t, dir) {
		switch o := object.(type) {
		case *appsv1.Deployment:
			v.pod = o.Spec.Template
			if o.Spec.Strategy.Type != appsv1.RecreateDeploymentStrategyType {
				t.Error("a new daemon would wait for the volume of the old one")
			}
		case *appsv1.StatefulSet:
			v.set, v.pod = o, o.Spec.Template
			v.claim = o.Spec.VolumeClaimTemplates[0].Spec
		case *corev1.PersistentVolumeClaim:
			v.claim = o.Spec
		case *corev1.Service:
			v.service = o
		case *networkingv1.NetworkPolicy:
			v.policies[o.Name] = o
		case *policyv1.PodDisruptionBudget:
			v.budget = o
		case *corev1.Secret:
			v.secrets[o.Name] = o
		case *corev1.ConfigMap:
			v.configs[o.Name] = o
		default:
			t.Errorf("%T is not expected", o)
		}
	}
	return v
}

// variants are the directories that can be applied.
var variants = []string{
	"single", "single-rootless", "single-privileged", "single-cert-manager",
	"pool", "pool-rootless", "pool-privileged", "pool-cert-manager",
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
	if want := slices.Sorted(slices.Values(append([]string{"cert-manager", "certs"}, variants...))); !slices.Equal(names, want) {
		t.Errorf("directories %q, want %q", names, want)
	}
	for _, name := range variants {
		t.Run(name, func(t *testing.T) {
			v := load(t, filepath.Join(dir, name))
			check(t, name, v)
			// With the metrics, as an overlay of the operator's own.
			overlay := filepath.Join(dir, "own")
			if err := os.MkdirAll(overlay, 0o755); err != nil {
				t.Fatal(err)
			}
			text := "kind: Kustomization\nnamespace: openfaas\nresources: [../" + name + "]\ncomponents: [../components/metrics]\n"
			if err := os.WriteFile(filepath.Join(overlay, "kustomization.yaml"), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			with := load(t, overlay)
			c := with.pod.Spec.Containers[0]
			if !slices.Contains(c.Args, "--debugaddr=0.0.0.0:6060") || len(c.Args) != len(v.pod.Spec.Containers[0].Args)+1 ||
				len(c.Ports) != 2 || with.policies["buildkitd-metrics"].Spec.Ingress[0].Ports[0].Port.IntValue() != 6060 {
				t.Errorf("with metrics: %q, %v", c.Args, c.Ports)
			}
		})
	}
}

// checkEgress wants RUN steps to reach what the function takes for the internet, and
// port 53 anywhere.
func checkEgress(t *testing.T, rules []networkingv1.NetworkPolicyEgressRule) {
	t.Helper()
	if len(rules) != 2 || len(rules[0].To) != 0 || len(rules[0].Ports) != 2 || len(rules[1].Ports) != 0 {
		t.Fatalf("egress %+v", rules)
	}
	for _, p := range rules[0].Ports {
		if p.Port.IntValue() != 53 || p.EndPort != nil {
			t.Errorf("port %v is open everywhere", p.Port)
		}
	}
	all := map[netip.Prefix]bool{netip.MustParsePrefix("0.0.0.0/0"): true, netip.MustParsePrefix("::/0"): true}
	var except []netip.Prefix
	for _, peer := range rules[1].To {
		if peer.IPBlock == nil {
			t.Fatalf("a peer without a block: %+v", peer)
		}
		within := netip.MustParsePrefix(peer.IPBlock.CIDR)
		if !all[within] {
			t.Errorf("the block %s", within)
		}
		delete(all, within)
		for _, s := range peer.IPBlock.Except {
			p, err := netip.ParsePrefix(s)
			// As the API server wants it.
			if err != nil || p != p.Masked() || p.Bits() <= within.Bits() || !within.Contains(p.Addr()) || p.Addr().Is4In6() {
				t.Errorf("%q within %s: %v", s, within, err)
				continue
			}
			except = append(except, p)
		}
	}
	if len(all) > 0 {
		t.Errorf("no block for %v", all)
	}
	private := hosts.NotPublic()
	for _, p := range private {
		if !slices.Contains(except, p) {
			t.Errorf("RUN steps reach %s, which is private to the function", p)
		}
	}
	for _, p := range except {
		if !slices.Contains(private, p) {
			t.Errorf("RUN steps do not reach %s, which is public to the function", p)
		}
	}
	if len(except) != len(private) {
		t.Errorf("%d ranges, and %d of the function's", len(except), len(private))
	}
}

func check(t *testing.T, name string, v *variant) {
	t.Helper()
	shape, isolation, _ := strings.Cut(name, "-")
	spec := v.pod.Spec
	c := spec.Containers[0]
	if spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
		t.Error("RUN steps could use a service account")
	}
	if *spec.TerminationGracePeriodSeconds < 1200 || c.Lifecycle.PreStop.Sleep == nil {
		t.Error("running builds are not given their time")
	}
	for what, p := range map[string]*corev1.Probe{"startup": c.StartupProbe, "readiness": c.ReadinessProbe, "liveness": c.LivenessProbe} {
		if p == nil || !slices.Equal(p.Exec.Command, []string{"buildctl", "debug", "workers"}) {
			t.Errorf("%s is not the daemon's own health", what)
		}
	}
	if c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() || c.Resources.Limits.Memory().IsZero() {
		t.Error("requests and limits are missing")
	}
	if len(spec.TopologySpreadConstraints) != 1 {
		t.Error("daemons are not spread")
	}

	// Isolation.
	security, userns := c.SecurityContext, spec.HostUsers != nil && !*spec.HostUsers
	privileged := security.Privileged != nil && *security.Privileged
	noSandbox := slices.Contains(c.Args, "--oci-worker-no-process-sandbox")
	root, socket := "/var/lib/buildkit", "unix:///run/buildkit/buildkitd.sock"
	image := "moby/buildkit:v0.34.2"
	switch isolation {
	case "", "cert-manager":
		if !userns || !privileged || noSandbox {
			t.Errorf("userns %v, privileged %v, without the process sandbox %v", userns, privileged, noSandbox)
		}
	case "privileged":
		if userns || !privileged || noSandbox {
			t.Errorf("userns %v, privileged %v, without the process sandbox %v", userns, privileged, noSandbox)
		}
	case "rootless":
		if userns || privileged || !noSandbox || *spec.SecurityContext.RunAsUser != 1000 || *spec.SecurityContext.FSGroup != 1000 ||
			security.SeccompProfile.Type != corev1.SeccompProfileTypeUnconfined || security.AppArmorProfile.Type != corev1.AppArmorProfileTypeUnconfined ||
			security.AllowPrivilegeEscalation != nil {
			t.Errorf("%+v, %+v", spec.SecurityContext, security)
		}
		root, socket, image = "/home/user/.local/share/buildkit", "unix:///run/user/1000/buildkit/buildkitd.sock", image+"-rootless"
	}
	if c.Image != image {
		t.Errorf("image %s", c.Image)
	}
	mounts := map[string]string{}
	for _, m := range c.VolumeMounts {
		mounts[m.Name] = m.MountPath
	}
	if mounts["state"] != root || mounts["config"] != "/etc/buildkit" || len(c.VolumeMounts) != 2 {
		t.Errorf("mounts %v", mounts)
	}

	// Configuration and certificates, by names that change with their content.
	var config, secret string
	files := map[string]string{}
	for _, volume := range spec.Volumes {
		if volume.Name != "config" {
			continue
		}
		for _, s := range volume.Projected.Sources {
			if s.ConfigMap != nil {
				config = s.ConfigMap.Name
			}
			if s.Secret != nil {
				secret = s.Secret.Name
				for _, item := range s.Secret.Items {
					files["/etc/buildkit/"+item.Path] = item.Key
				}
			}
		}
	}
	generated := v.configs[config]
	if generated == nil || !regexp.MustCompile(`^buildkitd-[a-z0-9]{10}$`).MatchString(config) {
		t.Fatalf("the ConfigMap %q is not among %v", config, v.configs)
	}
	toml, err := buildkitd.Load(strings.NewReader(generated.Data["buildkitd.toml"]))
	if err != nil {
		t.Fatal(err)
	}
	tls := toml.GRPC.TLS
	keys := [3]string{files[tls.CA], files[tls.Cert], files[tls.Key]}
	if isolation == "cert-manager" {
		if secret != "buildkit-daemon-tls" || keys != [3]string{"ca.crt", "tls.crt", "tls.key"} {
			t.Errorf("secret %s, keys %q", secret, keys)
		}
	} else {
		data := v.secrets[secret]
		if data == nil || !regexp.MustCompile(`^buildkit-daemon-certs-[a-z0-9]{10}$`).MatchString(secret) || keys != [3]string{"ca.pem", "cert.pem", "key.pem"} {
			t.Fatalf("secret %q, keys %q", secret, keys)
		}
		block, _ := pem.Decode(data.Data["cert.pem"])
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		if err := cert.VerifyHostname(defaults(t).Buildkit.ServerName); err != nil {
			t.Error(err)
		}
	}
	// Flags overrule the file, where there are any.
	addrs := toml.GRPC.Address
	if isolation == "rootless" {
		addrs = nil
		for _, arg := range c.Args {
			if addr, ok := strings.CutPrefix(arg, "--addr="); ok {
				addrs = append(addrs, addr)
			}
		}
	}
	if !slices.Contains(addrs, socket) || !slices.Contains(addrs, "tcp://0.0.0.0:1234") {
		t.Errorf("listens on %q", addrs)
	}
	if len(toml.Entitlements) > 0 || toml.GRPC.DebugAddress != "" || toml.Frontends.Gateway.Enabled == nil || *toml.Frontends.Gateway.Enabled {
		t.Error("entitlements, a debug address or foreign frontends")
	}

	// GC leaves 40 % of the volume.
	size := v.claim.Resources.Requests.Storage().Value()
	for i, rule := range toml.Workers.OCI.GCPolicy {
		if max := rule.MaxUsedSpace.Bytes; max <= 0 || max > size*6/10 {
			t.Errorf("GC rule %d lets %d of %d bytes be used", i, max, size)
		}
	}

	// The Service, and who may use it.
	port := v.service.Spec.Ports[0]
	if v.service.Name != "buildkitd" || port.Name != "buildkit" || port.Port != 1234 || port.TargetPort.StrVal != c.Ports[0].Name || c.Ports[0].ContainerPort != 1234 {
		t.Errorf("service %+v, container %+v", port, c.Ports)
	}
	if want := []string{fmt.Sprintf("tcp://%s.openfaas:%d", v.service.Name, port.Port)}; !slices.Equal(defaults(t).Buildkit.Addrs, want) {
		t.Errorf("the function's default is %q, want %q", defaults(t).Buildkit.Addrs, want)
	}
	policy := v.policies["buildkitd"].Spec
	from := policy.Ingress[0].From[0]
	if len(policy.Ingress) != 1 || from.NamespaceSelector.MatchLabels["kubernetes.io/metadata.name"] != "openfaas-fn" ||
		from.PodSelector.MatchLabels["faas_function"] != "builder" || policy.Ingress[0].Ports[0].Port.IntValue() != 1234 || len(policy.PolicyTypes) != 2 {
		t.Errorf("ingress %+v", policy.Ingress)
	}
	checkEgress(t, policy.Egress)
	for _, selector := range []map[string]string{policy.PodSelector.MatchLabels, v.service.Spec.Selector, spec.TopologySpreadConstraints[0].LabelSelector.MatchLabels} {
		if len(selector) != 1 || v.pod.Labels["app"] != selector["app"] {
			t.Errorf("%v does not select %v", selector, v.pod.Labels)
		}
	}
	if shape == "pool" {
		if v.service.Spec.ClusterIP != corev1.ClusterIPNone || v.service.Spec.PublishNotReadyAddresses || v.set.Spec.ServiceName != v.service.Name {
			t.Errorf("service %+v of %s", v.service.Spec, v.set.Spec.ServiceName)
		}
		if v.budget == nil || v.budget.Spec.MaxUnavailable.IntValue() != 1 || v.budget.Spec.Selector.MatchLabels["app"] != v.pod.Labels["app"] {
			t.Error("no disruption budget")
		}
	} else if v.set != nil || v.budget != nil || v.service.Spec.ClusterIP != "" {
		t.Error("a single daemon has parts of a pool")
	}
}

// defaults are the function's, of an empty environment.
func defaults(t *testing.T) *function.Config {
	t.Helper()
	c, err := function.LoadConfig(func(string) string { return "" })
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
		for n := range load(t, filepath.Join(dir, "pool")).secrets {
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

// certificate has the fields of cert-manager.io/v1's Certificate and ClusterIssuer that
// are used. https://cert-manager.io/docs/reference/api-docs/ has all.
type certificate struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
	} `json:"metadata"`
	Spec struct {
		SelfSigned *struct{} `json:"selfSigned"`
		CA         *struct {
			SecretName string `json:"secretName"`
		} `json:"ca"`

		IsCA        bool     `json:"isCA"`
		CommonName  string   `json:"commonName"`
		SecretName  string   `json:"secretName"`
		Duration    string   `json:"duration"`
		RenewBefore string   `json:"renewBefore"`
		DNSNames    []string `json:"dnsNames"`
		Usages      []string `json:"usages"`
		PrivateKey  struct {
			Algorithm      string `json:"algorithm"`
			Size           int    `json:"size"`
			RotationPolicy string `json:"rotationPolicy"`
		} `json:"privateKey"`
		IssuerRef struct {
			Kind string `json:"kind"`
			Name string `json:"name"`
		} `json:"issuerRef"`
	} `json:"spec"`
}

func TestCertManager(t *testing.T) {
	dir := filepath.Join(repo, "buildkit", "cert-manager")
	resources, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]certificate{}
	for _, r := range resources.Resources() {
		text, err := r.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		var c certificate
		// As the API server does, by case.
		if strict, err := json.UnmarshalStrict(text, &c); err != nil || strict != nil {
			t.Fatalf("%s %s: %v, %v", r.GetKind(), r.GetName(), err, strict)
		}
		if c.APIVersion != "cert-manager.io/v1" {
			t.Errorf("%s %s", c.APIVersion, c.Kind)
		}
		all[c.Kind+" "+c.Metadata.Name] = c
	}
	for name, c := range all {
		if c.Kind != "Certificate" {
			continue
		}
		if _, ok := all[c.Spec.IssuerRef.Kind+" "+c.Spec.IssuerRef.Name]; !ok {
			t.Errorf("%s has no issuer %+v", name, c.Spec.IssuerRef)
		}
	}
	ca, daemon, client := all["Certificate buildkit-ca"], all["Certificate buildkit-daemon"], all["Certificate buildkit-client"]
	if ca.Spec.SecretName != all["ClusterIssuer buildkit-ca"].Spec.CA.SecretName || !ca.Spec.IsCA {
		t.Error("the CA's issuer does not use the CA")
	}
	if daemon.Metadata.Namespace != "openfaas" || daemon.Spec.SecretName != "buildkit-daemon-tls" || !slices.Contains(daemon.Spec.DNSNames, defaults(t).Buildkit.ServerName) || !slices.Equal(daemon.Spec.Usages, []string{"server auth"}) {
		t.Errorf("the daemon's: %+v", daemon)
	}
	if client.Metadata.Namespace != "openfaas-fn" || !slices.Equal(client.Spec.Usages, []string{"client auth"}) {
		t.Errorf("the function's: %+v", client)
	}
}

// functionSecrets are those that stack.yml names.
func functionSecrets(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(repo, "stack.yml"))
	if err != nil {
		t.Fatal(err)
	}
	var stack struct {
		Functions map[string]struct {
			Secrets     []string
			Labels      map[string]string
			Annotations map[string]string
		}
	}
	if err := yaml.Unmarshal(text, &stack); err != nil {
		t.Fatal(err)
	}
	f := stack.Functions["builder"]
	for key := range f.Labels {
		// CE refuses those, and with them the deployment.
		if strings.HasPrefix(key, "com.openfaas.scale.") && !slices.Contains([]string{"com.openfaas.scale.min", "com.openfaas.scale.max"}, key) {
			t.Errorf("CE refuses the label %s", key)
		}
	}
	return f.Secrets
}

func TestSecretNames(t *testing.T) {
	c := defaults(t)
	names := functionSecrets(t)
	for _, name := range []string{c.PayloadSecret, c.BuildkitCA, c.BuildkitCert, c.BuildkitKey, c.RegistryConfig} {
		if !slices.Contains(names, name) {
			t.Errorf("stack.yml does not name %s, the function's default", name)
		}
	}
}

// fakeCLI is a stand-in for kubectl or faas-cli that writes down how it is called.
func fakeCLI(t *testing.T, name string) (path, log string) {
	t.Helper()
	dir := t.TempDir()
	log = filepath.Join(dir, "log")
	script := "#!/bin/sh\nprintf '%s\\n' \"$*\" >> " + log + "\n[ \"$4\" != secret ] && [ \"$3\" = apply ] && cat >> " + log + "\n[ \"$3\" = create ] && echo \"manifest of $6\"\nexit 0\n"
	if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir, log
}

// TestMakeSecrets: every secret of stack.yml is created from what is on disk, or
// none and what is missing is named.
func TestMakeSecrets(t *testing.T) {
	dir := checkout(t)
	config := filepath.Join(t.TempDir(), "config.json")
	payload := filepath.Join(t.TempDir(), "payload")
	run := func(via string) (calls, output string, err error) {
		path, log := fakeCLI(t, via)
		cmd := exec.Command(filepath.Join(dir, "secrets.sh"), via)
		cmd.Dir = t.TempDir()
		cmd.Env = []string{"PATH=" + path + ":" + os.Getenv("PATH"), "HOME=/nonexistent", "PAYLOAD_SECRET=" + payload, "REGISTRY_CONFIG=" + config}
		out, err := cmd.CombinedOutput()
		text, readErr := os.ReadFile(log)
		if readErr != nil && !os.IsNotExist(readErr) {
			t.Fatal(readErr)
		}
		return string(text), string(out), err
	}
	for _, via := range []string{"kubectl", "faas-cli"} {
		if calls, out, err := run(via); err == nil || calls != "" || !strings.Contains(out, config+" is missing") || !strings.Contains(out, "openssl rand") {
			t.Errorf("%s: with files missing: %v, %q, %s", via, err, calls, out)
		}
	}
	for _, f := range []string{config, payload} {
		if err := os.WriteFile(f, []byte("{}"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, via := range []string{"kubectl", "faas-cli"} {
		calls, out, err := run(via)
		if err != nil {
			t.Errorf("%s: %v: %s", via, err, out)
		}
		for _, name := range functionSecrets(t) {
			want := "secret create " + name + " --from-file "
			if via == "kubectl" {
				want = "-n openfaas-fn create secret generic " + name + " --from-file=" + name + "="
				if !strings.Contains(calls, "manifest of "+name+"\n") {
					t.Errorf("%s: the manifest of %s is not applied:\n%s", via, name, calls)
				}
			}
			if !strings.Contains(calls, want) {
				t.Errorf("%s: no %q in\n%s", via, want, calls)
			}
		}
	}
	if out, err := exec.Command(filepath.Join(dir, "secrets.sh")).CombinedOutput(); err == nil || !bytes.Contains(out, []byte("kubectl|faas-cli")) {
		t.Errorf("without a word: %v, %s", err, out)
	}
}
