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
	objects, err := decode(ingresses(t)...)
	if err != nil {
		t.Fatal(err)
	}
	if len(objects) != 1 {
		t.Fatalf("the pages have %d Ingresses", len(objects))
	}
	ingress, ok := objects[0].(*networkingv1.Ingress)
	if !ok {
		t.Fatalf("the Ingress is a %T", objects[0])
	}
	rule, tls := only(ingress.Spec.Rules), only(ingress.Spec.TLS)
	if ingress.Namespace != "openfaas-fn" || rule.Host == "" || only(tls.Hosts) != rule.Host {
		t.Errorf("it is in %q, with a certificate for %q and a rule for %q", ingress.Namespace, tls.Hosts, rule.Host)
	}
	path := only(value(rule.HTTP).Paths)
	if path.Path != "/" || value(path.PathType) != networkingv1.PathTypePrefix {
		t.Errorf("the path is %+v", path)
	}
	// The port of faas-netes' Services, by the function's name in stack.yml.
	if service := value(path.Backend.Service); service.Name != "builder" || service.Port.Number != 8080 {
		t.Errorf("it leads to %+v", service)
	}
	for name, want := range map[string]string{"proxy-body-size": "0", "proxy-request-buffering": "off", "proxy-buffering": "off"} {
		if got := ingress.Annotations["nginx.ingress.kubernetes.io/"+name]; got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
}

// ingresses are the pages' manifests of that kind.
func ingresses(t *testing.T) (manifests [][]byte) {
	t.Helper()
	pages, err := readme.Pages(repo)
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range pages {
		for _, block := range page.Blocks {
			if block.Language == "yaml" && strings.Contains(block.Text, "kind: Ingress\n") {
				manifests = append(manifests, []byte(block.Text))
			}
		}
	}
	return manifests
}
