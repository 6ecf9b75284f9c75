package manifests

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	buildkitd "github.com/moby/buildkit/cmd/buildkitd/config"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"handler/function/hosts"
)

// promise is what buildkit/README.md says of every variant of a kind. It takes any manifests
// that can be decoded, broken ones too: value and only make what is missing zero.
type promise struct {
	name  string
	check func(name string, v *variant) error
}

// promisesOf are those of a variant.
func promisesOf(name string) []promise {
	if isNATS(name) {
		return natsPromises
	}
	return promises
}

// promises are those of daemons.
var promises = []promise{
	{"replaced", checkReplaced},
	{"no service account", checkServiceAccount},
	{"time to end", checkTimeToEnd},
	{"probes", checkProbes},
	{"resources", checkResources},
	{"spread", checkSpread},
	{"isolation", checkIsolation},
	{"image and mounts", checkImage},
	{"config", checkConfig},
	{"certificates", checkCertificates},
	{"addresses", checkAddresses},
	{"garbage collection", checkGC},
	{"service", checkService},
	{"ingress", checkIngress},
	{"egress", checkEgress},
	{"selectors", checkSelectors},
	{"pool or single", checkShape},
}

// shape is single or pool, and isolation what follows it in a variant's name.
func shape(name string) string     { s, _, _ := strings.Cut(name, "-"); return s }
func isolation(name string) string { _, i, _ := strings.Cut(name, "-"); return i }

func checkReplaced(_ string, v *variant) error {
	if v.deployment != nil && v.deployment.Spec.Strategy.Type != appsv1.RecreateDeploymentStrategyType {
		return errors.New("a new daemon would wait for the volume of the old one")
	}
	return nil
}

func checkServiceAccount(_ string, v *variant) error {
	if mount := v.pod().Spec.AutomountServiceAccountToken; mount == nil || *mount {
		return errors.New("RUN steps could use a service account")
	}
	return nil
}

func checkTimeToEnd(_ string, v *variant) error {
	grace := value(v.pod().Spec.TerminationGracePeriodSeconds)
	if stop := value(v.daemon().Lifecycle).PreStop; grace < 1200 || value(stop).Sleep == nil {
		return fmt.Errorf("running builds are not given their time: %d s, before which runs %v", grace, stop)
	}
	return nil
}

func checkProbes(_ string, v *variant) error {
	c := v.daemon()
	var errs []error
	for what, p := range map[string]*corev1.Probe{"startup": c.StartupProbe, "readiness": c.ReadinessProbe, "liveness": c.LivenessProbe} {
		if command := value(value(p).Exec).Command; !slices.Equal(command, []string{"buildctl", "debug", "workers"}) {
			errs = append(errs, fmt.Errorf("%s is not the daemon's own health: %q", what, command))
		}
	}
	return errors.Join(errs...)
}

func checkResources(_ string, v *variant) error {
	r := v.daemon().Resources
	if r.Requests.Cpu().IsZero() || r.Requests.Memory().IsZero() || r.Limits.Memory().IsZero() {
		return fmt.Errorf("requests are %v and limits %v", r.Requests, r.Limits)
	}
	return nil
}

func checkSpread(_ string, v *variant) error {
	if n := len(v.pod().Spec.TopologySpreadConstraints); n != 1 {
		return fmt.Errorf("%d constraints spread the daemons, want 1", n)
	}
	return nil
}

func checkIsolation(name string, v *variant) error {
	spec, c := v.pod().Spec, v.daemon()
	security, pod := value(c.SecurityContext), value(spec.SecurityContext)
	type boundary struct{ userns, privileged, noSandbox bool }
	got := boundary{
		userns:     spec.HostUsers != nil && !*spec.HostUsers,
		privileged: value(security.Privileged),
		noSandbox:  slices.Contains(c.Args, "--oci-worker-no-process-sandbox"),
	}
	want, ok := map[string]boundary{
		"":             {userns: true, privileged: true},
		"cert-manager": {userns: true, privileged: true},
		"privileged":   {privileged: true},
		"rootless":     {noSandbox: true},
	}[isolation(name)]
	if !ok || got != want {
		return fmt.Errorf("got %+v, want %+v", got, want)
	}
	if isolation(name) != "rootless" {
		return nil
	}
	if value(pod.RunAsUser) != 1000 || value(pod.FSGroup) != 1000 ||
		value(security.SeccompProfile).Type != corev1.SeccompProfileTypeUnconfined || value(security.AppArmorProfile).Type != corev1.AppArmorProfileTypeUnconfined ||
		security.AllowPrivilegeEscalation != nil {
		return fmt.Errorf("the pod's security is %+v, the container's %+v", pod, security)
	}
	return nil
}

func checkImage(name string, v *variant) error {
	c := v.daemon()
	root, image := "/var/lib/buildkit", "moby/buildkit:v0.34.2"
	if isolation(name) == "rootless" {
		root, image = "/home/user/.local/share/buildkit", image+"-rootless"
	}
	mounts := map[string]string{}
	for _, m := range c.VolumeMounts {
		mounts[m.Name] = m.MountPath
	}
	if c.Image != image || mounts["state"] != root || mounts["config"] != "/etc/buildkit" || len(c.VolumeMounts) != 2 {
		return fmt.Errorf("image %q, mounts %v", c.Image, mounts)
	}
	return nil
}

// files is what the volume config holds.
type files struct {
	config string            // the ConfigMap's name
	secret string            // the Secret's
	keys   map[string]string // the Secret's, by their paths in the container
}

func (v *variant) files() files {
	f := files{keys: map[string]string{}}
	for _, volume := range v.pod().Spec.Volumes {
		if volume.Name != "config" {
			continue
		}
		for _, s := range value(volume.Projected).Sources {
			if s.ConfigMap != nil {
				f.config = s.ConfigMap.Name
			}
			if s.Secret != nil {
				f.secret = s.Secret.Name
				for _, item := range s.Secret.Items {
					f.keys["/etc/buildkit/"+item.Path] = item.Key
				}
			}
		}
	}
	return f
}

// toml is the daemon's configuration.
func (v *variant) toml() (buildkitd.Config, error) {
	name := v.files().config
	generated := v.configs[name]
	if generated == nil {
		return buildkitd.Config{}, fmt.Errorf("the ConfigMap %q is not there", name)
	}
	return buildkitd.Load(strings.NewReader(generated.Data["buildkitd.toml"]))
}

// hashed is a name that changes with the content that it names.
func hashed(name, prefix string) bool {
	hash, ok := strings.CutPrefix(name, prefix+"-")
	return ok && regexp.MustCompile(`^[a-z0-9]{10}$`).MatchString(hash)
}

func checkConfig(_ string, v *variant) error {
	toml, err := v.toml()
	if err != nil {
		return err
	}
	if name := v.files().config; !hashed(name, "buildkitd") {
		return fmt.Errorf("the ConfigMap's name is %q", name)
	}
	if len(toml.Entitlements) > 0 || toml.GRPC.DebugAddress != "" || toml.Frontends.Gateway.Enabled == nil || *toml.Frontends.Gateway.Enabled {
		return fmt.Errorf("entitlements %q, debug address %q, or foreign frontends", toml.Entitlements, toml.GRPC.DebugAddress)
	}
	return nil
}

func checkCertificates(name string, v *variant) error {
	toml, err := v.toml()
	if err != nil {
		return err
	}
	f, tls := v.files(), toml.GRPC.TLS
	keys := [3]string{f.keys[tls.CA], f.keys[tls.Cert], f.keys[tls.Key]}
	if isolation(name) == "cert-manager" {
		if f.secret != "buildkit-daemon-tls" || keys != [3]string{"ca.crt", "tls.crt", "tls.key"} {
			return fmt.Errorf("secret %q, keys %q", f.secret, keys)
		}
		return nil
	}
	secret := v.secrets[f.secret]
	if secret == nil || !hashed(f.secret, "buildkit-daemon-certs") || keys != [3]string{"ca.pem", "cert.pem", "key.pem"} {
		return fmt.Errorf("secret %q, there: %t, keys %q", f.secret, secret != nil, keys)
	}
	block, _ := pem.Decode(secret.Data["cert.pem"])
	if block == nil {
		return errors.New("cert.pem is no PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return err
	}
	c, err := defaults()
	if err != nil {
		return err
	}
	return cert.VerifyHostname(c.Buildkit.ServerName)
}

func checkAddresses(name string, v *variant) error {
	toml, err := v.toml()
	if err != nil {
		return err
	}
	socket, addrs := "unix:///run/buildkit/buildkitd.sock", toml.GRPC.Address
	if isolation(name) == "rootless" {
		// Flags overrule the file.
		socket, addrs = "unix:///run/user/1000/buildkit/buildkitd.sock", nil
		for _, arg := range v.daemon().Args {
			if addr, ok := strings.CutPrefix(arg, "--addr="); ok {
				addrs = append(addrs, addr)
			}
		}
	}
	if !slices.Contains(addrs, socket) || !slices.Contains(addrs, "tcp://0.0.0.0:1234") {
		return fmt.Errorf("the daemon listens on %q", addrs)
	}
	return nil
}

// checkGC wants 40 % of the volume left.
func checkGC(_ string, v *variant) error {
	toml, err := v.toml()
	if err != nil {
		return err
	}
	claim := only(v.claims)
	size := claim.Spec.Resources.Requests.Storage().Value()
	var errs []error
	for i, rule := range toml.Workers.OCI.GCPolicy {
		if max := rule.MaxUsedSpace.Bytes; max <= 0 || max > size*6/10 {
			errs = append(errs, fmt.Errorf("GC rule %d lets %d of %d bytes be used", i, max, size))
		}
	}
	return errors.Join(errs...)
}

func checkService(_ string, v *variant) error {
	service := value(v.service)
	port, open := only(service.Spec.Ports), only(v.daemon().Ports)
	if service.Name != "buildkitd" || port.Name != "buildkit" || port.Port != 1234 || port.TargetPort.StrVal != open.Name || open.ContainerPort != 1234 {
		return fmt.Errorf("service %q %+v, container %+v", service.Name, port, open)
	}
	c, err := defaults()
	if err != nil {
		return err
	}
	if want := []string{fmt.Sprintf("tcp://%s.openfaas:%d", service.Name, port.Port)}; !slices.Equal(c.Buildkit.Addrs, want) {
		return fmt.Errorf("the function's default is %q, want %q", c.Buildkit.Addrs, want)
	}
	return nil
}

// checkIngress lets the builder in, and nobody else.
func checkIngress(_ string, v *variant) error {
	policy := value(v.policies["buildkitd"]).Spec
	rule := only(policy.Ingress)
	from, port := only(rule.From), only(rule.Ports)
	if value(from.NamespaceSelector).MatchLabels["kubernetes.io/metadata.name"] != "openfaas-fn" ||
		value(from.PodSelector).MatchLabels["faas_function"] != "builder" || number(port.Port) != 1234 || len(policy.PolicyTypes) != 2 {
		return fmt.Errorf("ingress %+v of %v", policy.Ingress, policy.PolicyTypes)
	}
	return nil
}

// checkEgress wants RUN steps to reach what the function takes for the internet, and
// port 53 anywhere.
func checkEgress(_ string, v *variant) error {
	rules := value(v.policies["buildkitd"]).Spec.Egress
	if len(rules) != 2 || len(rules[0].To) != 0 || len(rules[0].Ports) != 2 || len(rules[1].Ports) != 0 {
		return fmt.Errorf("egress %+v", rules)
	}
	var errs []error
	for _, p := range rules[0].Ports {
		if number(p.Port) != 53 || p.EndPort != nil {
			errs = append(errs, fmt.Errorf("port %v is open everywhere", p.Port))
		}
	}
	except, err := exceptions(rules[1].To)
	errs = append(errs, err)
	private := hosts.NotPublic()
	for _, p := range private {
		if !slices.Contains(except, p) {
			errs = append(errs, fmt.Errorf("RUN steps reach %s, which is private to the function", p))
		}
	}
	for _, p := range except {
		if !slices.Contains(private, p) {
			errs = append(errs, fmt.Errorf("RUN steps do not reach %s, which is public to the function", p))
		}
	}
	if len(except) != len(private) {
		errs = append(errs, fmt.Errorf("%d ranges, and %d of the function's", len(except), len(private)))
	}
	return errors.Join(errs...)
}

// exceptions are what peers leave out of all of IPv4 and IPv6.
func exceptions(peers []networkingv1.NetworkPolicyPeer) (except []netip.Prefix, err error) {
	var errs []error
	all := map[string]bool{"0.0.0.0/0": true, "::/0": true}
	for _, peer := range peers {
		block := value(peer.IPBlock)
		if !all[block.CIDR] {
			errs = append(errs, fmt.Errorf("the block %q", block.CIDR))
			continue
		}
		delete(all, block.CIDR)
		within := netip.MustParsePrefix(block.CIDR)
		for _, s := range block.Except {
			p, err := netip.ParsePrefix(s)
			// As the API server wants it.
			if err != nil || p != p.Masked() || p.Bits() <= within.Bits() || !within.Contains(p.Addr()) || p.Addr().Is4In6() {
				errs = append(errs, fmt.Errorf("%q within %s: %v", s, within, err))
				continue
			}
			except = append(except, p)
		}
	}
	if len(all) > 0 {
		errs = append(errs, fmt.Errorf("no block for %v", all))
	}
	return except, errors.Join(errs...)
}

func checkSelectors(_ string, v *variant) error {
	labels := v.pod().Labels
	var errs []error
	for what, selector := range map[string]map[string]string{
		"the NetworkPolicy": value(v.policies["buildkitd"]).Spec.PodSelector.MatchLabels,
		"the Service":       value(v.service).Spec.Selector,
		"the spread":        value(only(v.pod().Spec.TopologySpreadConstraints).LabelSelector).MatchLabels,
	} {
		if len(selector) != 1 || selector["app"] == "" || labels["app"] != selector["app"] {
			errs = append(errs, fmt.Errorf("%s selects %v, not %v", what, selector, labels))
		}
	}
	return errors.Join(errs...)
}

func checkShape(name string, v *variant) error {
	service := value(v.service)
	if shape(name) == "single" {
		if v.deployment == nil || v.set != nil || v.budget != nil || service.Spec.ClusterIP != "" {
			return errors.New("a single daemon has parts of a pool, or no Deployment")
		}
		return nil
	}
	if set := value(v.set).Spec; service.Spec.ClusterIP != corev1.ClusterIPNone || service.Spec.PublishNotReadyAddresses || set.ServiceName != service.Name {
		return fmt.Errorf("service %+v of %q", service.Spec, set.ServiceName)
	}
	budget := value(v.budget).Spec
	if number(budget.MaxUnavailable) != 1 || value(budget.Selector).MatchLabels["app"] != v.pod().Labels["app"] {
		return fmt.Errorf("the disruption budget is %+v", budget)
	}
	return nil
}
