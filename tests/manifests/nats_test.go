package manifests

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

const natsRoutes = "builder-nats-routes"

func isNATS(name string) bool { return shape(name) == "nats" }

// natsPromises are those of NATS servers for records of builds.
var natsPromises = []promise{
	{"nats: no privileges", checkNATSPrivileges},
	{"nats: image", checkNATSImage},
	{"nats: probes", checkNATSProbes},
	{"nats: memory", checkNATSMemory},
	{"nats: files", checkNATSFiles},
	{"nats: volume", checkNATSVolume},
	{"nats: service", checkNATSService},
	{"nats: policy", checkNATSPolicy},
	{"nats: policy of a cluster", checkNATSClusterPolicy},
	{"nats: selectors", checkNATSSelectors},
	{"nats: how many", checkNATSServers},
	{"nats: apart", checkNATSApart},
	{"nats: routes", checkNATSRoutes},
}

func checkNATSPrivileges(_ string, v *variant) error {
	pod, c := value(v.pod().Spec.SecurityContext), value(v.daemon().SecurityContext)
	mount := v.pod().Spec.AutomountServiceAccountToken
	if !value(pod.RunAsNonRoot) || value(pod.RunAsUser) == 0 || value(pod.FSGroup) == 0 || value(pod.SeccompProfile).Type != corev1.SeccompProfileTypeRuntimeDefault ||
		!value(c.ReadOnlyRootFilesystem) || c.AllowPrivilegeEscalation == nil || *c.AllowPrivilegeEscalation ||
		!slices.Equal(value(c.Capabilities).Drop, []corev1.Capability{"ALL"}) || mount == nil || *mount {
		return fmt.Errorf("the pod's security is %+v, the container's %+v, a service account %v", pod, c, mount)
	}
	return nil
}

// natsVersion is in the module of the server that the tests run, and natsAddress in stack.yml.
var (
	natsVersion = sync.OnceValues(func() ([]string, error) {
		return match(`nats-server/v2 v(\S+)`, "tests", "tools", "nats-server", "go.mod")
	})
	natsAddress = sync.OnceValues(func() ([]string, error) { return match(`# nats_url: tls://(\S+):(\d+)\n`, "stack.yml") })
)

// match finds what a file of the repository has of a pattern.
func match(pattern string, path ...string) ([]string, error) {
	text, err := os.ReadFile(filepath.Join(append([]string{repo}, path...)...))
	return regexp.MustCompile(pattern).FindStringSubmatch(string(text)), err
}

// checkNATSImage wants the version that the tests run.
func checkNATSImage(_ string, v *variant) error {
	version, err := natsVersion()
	if err != nil {
		return err
	}
	if version == nil || v.daemon().Image != "nats:"+version[1] {
		return fmt.Errorf("the image is %q, and the tests have %q", v.daemon().Image, version)
	}
	return nil
}

func checkNATSProbes(_ string, v *variant) error {
	c := v.daemon()
	open := map[string]int32{}
	for _, p := range c.Ports {
		open[p.Name] = p.ContainerPort
	}
	var errs []error
	for what, p := range map[string]*corev1.Probe{"startup": c.StartupProbe, "readiness": c.ReadinessProbe, "liveness": c.LivenessProbe} {
		get := value(value(p).HTTPGet)
		if !strings.HasPrefix(get.Path, "/healthz") || !slices.Contains(c.Args, fmt.Sprintf("--http_port=%d", open[get.Port.StrVal])) {
			errs = append(errs, fmt.Errorf("%s asks %s at the port %q of %v", what, get.Path, get.Port.StrVal, open))
		}
	}
	return errors.Join(errs...)
}

// checkNATSMemory wants Go's collector to know the limit.
func checkNATSMemory(_ string, v *variant) error {
	var soft resource.Quantity
	for _, e := range v.daemon().Env {
		if e.Name == "GOMEMLIMIT" {
			soft, _ = resource.ParseQuantity(strings.TrimSuffix(e.Value, "B"))
		}
	}
	r := v.daemon().Resources
	if hard := r.Limits.Memory(); soft.IsZero() || soft.Cmp(*hard) >= 0 || r.Requests.Cpu().IsZero() || r.Requests.Memory().IsZero() {
		return fmt.Errorf("Go's limit is %v, and the resources are %+v", soft, r)
	}
	return nil
}

// natsFiles are the files of a server below /etc/nats, as the pod has them.
func (v *variant) natsFiles() (map[string]string, error) {
	c := v.daemon()
	if !slices.Contains(c.Args, "--config=/etc/nats/nats.conf") {
		return nil, fmt.Errorf("the server's arguments are %q", c.Args)
	}
	mounted := map[string]string{}
	for _, m := range c.VolumeMounts {
		mounted[m.MountPath] = m.Name
	}
	files := map[string]string{}
	for _, volume := range v.pod().Spec.Volumes {
		if volume.Name != mounted["/etc/nats"] {
			continue
		}
		for _, s := range value(volume.Projected).Sources {
			if s.ConfigMap != nil && hashed(s.ConfigMap.Name, "builder-nats") {
				for name, text := range value(v.configs[s.ConfigMap.Name]).Data {
					files[name] = text
				}
			}
			if s.Secret != nil && hashed(s.Secret.Name, "builder-nats") {
				for _, item := range s.Secret.Items {
					files[item.Path] = string(value(v.secrets[s.Secret.Name]).Data[item.Key])
				}
			}
		}
	}
	return files, nil
}

func checkNATSFiles(_ string, v *variant) error {
	files, err := v.natsFiles()
	if err != nil {
		return err
	}
	for _, name := range []string{"nats.conf", "server.conf", "account.conf", "credential", "certs/ca.pem", "certs/cert.pem", "certs/key.pem"} {
		if files[name] == "" {
			return fmt.Errorf("the pod has no %s", name)
		}
	}
	return nil
}

// checkNATSVolume wants twice the room that the server may use.
func checkNATSVolume(_ string, v *variant) error {
	files, err := v.natsFiles()
	if err != nil {
		return err
	}
	conf := files["server.conf"]
	limit := regexp.MustCompile(`max_file_store: (\d+)GB`).FindStringSubmatch(conf)
	store := regexp.MustCompile(`store_dir: "(.+)"`).FindStringSubmatch(conf)
	if limit == nil || store == nil {
		return errors.New("the store has no limit or no place")
	}
	gib, err := strconv.Atoi(limit[1])
	if err != nil {
		return err
	}
	claim := only(v.claims)
	if size := claim.Spec.Resources.Requests.Storage().Value(); size < 2*int64(gib)<<30 {
		return fmt.Errorf("the server may use %d GiB of a volume of %d bytes", gib, size)
	}
	for _, m := range v.daemon().VolumeMounts {
		if m.Name == claim.Name && m.MountPath == store[1] {
			return nil
		}
	}
	return fmt.Errorf("%s is on no volume", store[1])
}

// natsCertificate is the server's.
func (v *variant) natsCertificate() (*x509.Certificate, error) {
	files, err := v.natsFiles()
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(files["certs/cert.pem"]))
	if block == nil {
		return nil, errors.New("cert.pem is no PEM")
	}
	return x509.ParseCertificate(block.Bytes)
}

// checkNATSService holds the Service to the address that stack.yml names.
func checkNATSService(_ string, v *variant) error {
	address, err := natsAddress()
	if err != nil {
		return err
	}
	if address == nil {
		return errors.New("stack.yml has no nats_url")
	}
	service := value(v.service)
	port := only(service.Spec.Ports)
	opens := slices.ContainsFunc(v.daemon().Ports, func(p corev1.ContainerPort) bool {
		return p.Name == port.TargetPort.StrVal && p.ContainerPort == port.Port
	})
	if service.Name+".openfaas" != address[1] || strconv.Itoa(int(port.Port)) != address[2] || service.Spec.ClusterIP != "" || !opens {
		return fmt.Errorf("service %q %+v, and the function dials %q", service.Name, service.Spec, address)
	}
	cert, err := v.natsCertificate()
	if err != nil {
		return err
	}
	return cert.VerifyHostname(address[1])
}

// checkNATSPolicy lets the builder in, and nobody else unless there is a cluster.
func checkNATSPolicy(name string, v *variant) error {
	policy := value(v.policies["builder-nats"]).Spec
	if len(policy.PolicyTypes) != 2 || len(policy.Ingress) == 0 || name == "nats" && len(policy.Ingress)+len(policy.Egress) != 1 {
		return fmt.Errorf("the policy is %+v", policy)
	}
	rule := policy.Ingress[0]
	if from := only(rule.From); value(from.NamespaceSelector).MatchLabels["kubernetes.io/metadata.name"] != "openfaas-fn" ||
		value(from.PodSelector).MatchLabels["faas_function"] != "builder" || number(only(rule.Ports).Port) != 4222 {
		return fmt.Errorf("the first rule for ingress is %+v", rule)
	}
	return nil
}

// checkNATSClusterPolicy lets the servers of a cluster reach one another, and DNS.
func checkNATSClusterPolicy(name string, v *variant) error {
	if name == "nats" {
		return nil
	}
	policy := value(v.policies["builder-nats"]).Spec
	if len(policy.Ingress) != 2 || len(policy.Egress) != 2 {
		return fmt.Errorf("the policy is %+v", policy)
	}
	own := func(peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) bool {
		peer := only(peers)
		return peer.NamespaceSelector == nil && value(peer.PodSelector).MatchLabels["app"] == "builder-nats" && number(only(ports).Port) == 6222
	}
	if in, out, dns := policy.Ingress[1], policy.Egress[0], policy.Egress[1]; !own(in.From, in.Ports) || !own(out.To, out.Ports) ||
		len(dns.To) != 0 || len(dns.Ports) != 2 || number(dns.Ports[0].Port) != 53 || number(dns.Ports[1].Port) != 53 {
		return fmt.Errorf("the servers reach %+v, and are reached by %+v", policy.Egress, in)
	}
	return nil
}

func checkNATSSelectors(name string, v *variant) error {
	labels := v.pod().Labels
	selectors := map[string]map[string]string{
		"the StatefulSet":   value(value(v.set).Spec.Selector).MatchLabels,
		"the NetworkPolicy": value(v.policies["builder-nats"]).Spec.PodSelector.MatchLabels,
		"the Service":       value(v.service).Spec.Selector,
	}
	if name != "nats" {
		selectors["the Service of routes"] = value(v.routes).Spec.Selector
		selectors["the disruption budget"] = value(value(v.budget).Spec.Selector).MatchLabels
	}
	var errs []error
	for what, selector := range selectors {
		if len(selector) != 1 || selector["app"] != "builder-nats" || labels["app"] != selector["app"] {
			errs = append(errs, fmt.Errorf("%s selects %v, not %v", what, selector, labels))
		}
	}
	return errors.Join(errs...)
}

// checkNATSServers wants one server, or three that find one another.
func checkNATSServers(name string, v *variant) error {
	set := value(v.set).Spec
	if name == "nats" {
		if value(set.Replicas) != 1 || v.routes != nil || v.budget != nil {
			return fmt.Errorf("%d servers, with parts of three", value(set.Replicas))
		}
		return nil
	}
	routes := value(v.routes)
	// A server is ready when it has the others, so their names must not wait for that.
	if value(set.Replicas) != 3 || set.PodManagementPolicy != appsv1.ParallelPodManagement || set.ServiceName != routes.Name ||
		routes.Spec.ClusterIP != corev1.ClusterIPNone || !routes.Spec.PublishNotReadyAddresses || only(routes.Spec.Ports).Port != 6222 {
		return fmt.Errorf("%d servers of %q, and their names are %+v", value(set.Replicas), set.ServiceName, routes.Spec)
	}
	return nil
}

// checkNATSApart wants two of three servers to be there whatever happens to one node.
func checkNATSApart(name string, v *variant) error {
	if name == "nats" {
		return nil
	}
	if n := number(value(v.budget).Spec.MaxUnavailable); n != 1 {
		return fmt.Errorf("%d servers may be missing", n)
	}
	apart := only(value(value(v.pod().Spec.Affinity).PodAntiAffinity).RequiredDuringSchedulingIgnoredDuringExecution)
	if apart.TopologyKey != "kubernetes.io/hostname" || value(apart.LabelSelector).MatchLabels["app"] != v.pod().Labels["app"] {
		return fmt.Errorf("two servers may be on one node: %+v", apart)
	}
	return nil
}

// checkNATSRoutes wants a route to each server, with a name that the certificate has.
func checkNATSRoutes(name string, v *variant) error {
	if name == "nats" {
		return nil
	}
	files, err := v.natsFiles()
	if err != nil {
		return err
	}
	cert, err := v.natsCertificate()
	if err != nil {
		return err
	}
	var errs []error
	for i := range 3 {
		host := fmt.Sprintf("%s-%d.%s", value(v.set).Name, i, value(v.routes).Name)
		errs = append(errs, cert.VerifyHostname(host))
		if !strings.Contains(files["nats.conf"], `"nats://`+host+`:6222"`) {
			errs = append(errs, fmt.Errorf("no route leads to %s", host))
		}
	}
	return errors.Join(errs...)
}

// TestNATSUnit holds the unit for one machine to the configuration that its page installs: the
// one of buildkit/nats.
func TestNATSUnit(t *testing.T) {
	v := mustLoad(t, filepath.Join(checkout(t), "nats"))
	files, err := v.natsFiles()
	if err != nil {
		t.Fatal(err)
	}
	installed, err := filepath.Glob(filepath.Join(repo, "buildkit", "base", "nats", "*.conf"))
	if err != nil || len(installed) != 3 {
		t.Fatalf("the page installs %q, %v", installed, err)
	}
	for _, path := range installed {
		if text, err := os.ReadFile(path); err != nil || files[filepath.Base(path)] != string(text) {
			t.Errorf("%s is not what the pods have: %v", path, err)
		}
	}
	text, err := os.ReadFile(filepath.Join(repo, "buildkit", "nats-server.service"))
	if err != nil {
		t.Fatal(err)
	}
	settings := map[string][]string{}
	for line := range strings.Lines(string(text)) {
		if key, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(line, "#") {
			settings[key] = append(settings[key], v)
		}
	}
	for key, want := range map[string]string{
		"ExecStart": "/usr/local/bin/nats-server --config /etc/nats/nats.conf",
		"User":      "nats", "StateDirectory": "nats", "ProtectSystem": "strict", "NoNewPrivileges": "yes", "CapabilityBoundingSet": "",
	} {
		if !slices.Equal(settings[key], []string{want}) {
			t.Errorf("%s is %q, want %q", key, settings[key], want)
		}
	}
	version, err := natsVersion()
	if err != nil {
		t.Fatal(err)
	}
	// The page says where the program comes from.
	if install := pageBlock(t, "bash", "install -m 644 buildkit/nats-server.service"); strings.Count(install, "/v"+version[1]+"/") != 1 || strings.Count(install, "nats-server-v"+version[1]+"-linux") != 2 {
		t.Errorf("the page installs another version than %s:\n%s", version[1], install)
	}
	if !strings.Contains(files["server.conf"], `store_dir: "/var/lib/`+only(settings["StateDirectory"])+`"`) {
		t.Error("the store is not in the unit's StateDirectory, and the rest is read-only")
	}
}
