package manifests

import (
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"

	"handler/function/tests/readme"
)

// TestIngress decodes DEPLOY.md's Ingress as the API server does: it leads to the
// function's Service, and holds neither bodies nor lines back.
func TestIngress(t *testing.T) {
	pages, err := readme.Pages(repo)
	if err != nil {
		t.Fatal(err)
	}
	var manifests []string
	for _, page := range pages {
		for _, block := range page.Blocks {
			if block.Language == "yaml" && strings.Contains(block.Text, "kind: Ingress\n") {
				manifests = append(manifests, block.Text)
			}
		}
	}
	for _, manifest := range manifests {
		object, _, err := codecs.UniversalDeserializer().Decode([]byte(manifest), nil, nil)
		if err != nil {
			t.Fatalf("decoding %s: %v", manifest, err)
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
	if len(manifests) != 1 {
		t.Fatalf("the pages have %d Ingresses", len(manifests))
	}
}
