package manifests

import (
	"path/filepath"
	"slices"
	"testing"

	"sigs.k8s.io/json"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

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
	if daemon.Metadata.Namespace != "openfaas" || daemon.Spec.SecretName != "buildkit-daemon-tls" || !slices.Contains(daemon.Spec.DNSNames, mustDefaults(t).Buildkit.ServerName) || !slices.Equal(daemon.Spec.Usages, []string{"server auth"}) {
		t.Errorf("the daemon's: %+v", daemon)
	}
	if client.Metadata.Namespace != "openfaas-fn" || !slices.Equal(client.Spec.Usages, []string{"client auth"}) {
		t.Errorf("the function's: %+v", client)
	}
}
