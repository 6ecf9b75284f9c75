package tenants

import (
	"slices"
	"testing"
)

func TestLoginKeys(t *testing.T) {
	s := &Set{File: true, Tenants: []*Tenant{
		{Name: "a", ID: "t-a", Registry: Registry{Config: []byte(`{"auths":{"ghcr.io":{"auth":"x"},"https://index.docker.io/v1/":{"auth":"x"}}}`)}},
		{Name: "b", ID: "t-b", Registry: Registry{Config: []byte(`{"auths":{"ghcr.io":{"auth":"y"},"*.example.com":{"auth":"y"}}}`)}},
		{Name: "c", ID: "t-c", Registry: Registry{Builder: true}},
		{Name: "d", ID: "t-d"},
	}}
	s.index()
	if got, want := s.LoginKeys(), []string{"*.example.com", "ghcr.io", "https://index.docker.io/v1/"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
