package manifests

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
)

var yamlBlock = regexp.MustCompile("(?ms)^ *```yaml\n(.*?)^ *```")

// TestReadmeIngress decodes the README's Ingress as the API server does: it leads
// to the function's Service, and holds neither bodies nor lines back.
func TestReadmeIngress(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(repo, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, block := range yamlBlock.FindAllSubmatch(text, -1) {
		if !regexp.MustCompile(`(?m)^kind: Ingress$`).Match(block[1]) {
			continue
		}
		found++
		object, _, err := codecs.UniversalDeserializer().Decode(block[1], nil, nil)
		if err != nil {
			t.Fatalf("decoding %s: %v", block[1], err)
		}
		ingress := object.(*networkingv1.Ingress)
		if ingress.Namespace != "openfaas-fn" || len(ingress.Spec.Rules) != 1 || len(ingress.Spec.TLS) != 1 {
			t.Fatalf("the Ingress is %+v", ingress)
		}
		rule := ingress.Spec.Rules[0]
		if hosts := ingress.Spec.TLS[0].Hosts; len(hosts) != 1 || hosts[0] != rule.Host {
			t.Errorf("the certificate is for %q, the rule for %q", hosts, rule.Host)
		}
		path := rule.HTTP.Paths[0]
		if path.Path != "/" || path.PathType == nil || *path.PathType != networkingv1.PathTypePrefix {
			t.Errorf("the path is %+v", path)
		}
		// The port of faas-netes' Services, by the function's name in stack.yml.
		if service := path.Backend.Service; service == nil || service.Name != "builder" || service.Port.Number != 8080 {
			t.Errorf("it leads to %+v", path.Backend)
		}
		for name, want := range map[string]string{"proxy-body-size": "0", "proxy-request-buffering": "off", "proxy-buffering": "off"} {
			if got := ingress.Annotations["nginx.ingress.kubernetes.io/"+name]; got != want {
				t.Errorf("%s is %q, want %q", name, got, want)
			}
		}
	}
	if found != 1 {
		t.Fatalf("the README has %d Ingresses", found)
	}
}
