package tenants

import "testing"

// owner returns the name of the tenant whose keys are in list, or "".
func owner(list []Candidate) string {
	for _, c := range list {
		if c.Tenant != nil {
			return c.Tenant.Name
		}
	}
	return ""
}

func TestImages(t *testing.T) {
	acme := &Tenant{Name: "acme", ID: "t-1", Keys: []Key{{Secret: []byte("a")}}, Images: []string{"ghcr.io/acme", "registry.example.com:443/team/acme"}}
	globex := &Tenant{Name: "globex", ID: "t-2", Keys: []Key{{Secret: []byte("b")}, {Secret: []byte("c")}}, Images: []string{"ghcr.io/globex"}}
	s := &Set{File: true, Tenants: []*Tenant{acme, globex}}
	s.index()
	for _, tt := range []struct {
		name, owner            string
		othersAcme, othersGlob bool
	}{
		{"ghcr.io/acme/app", "acme", false, true},
		{"ghcr.io/acme", "acme", false, true},
		{"ghcr.io/acme2", "", false, false},
		{"ghcr.io", "", false, false},
		{"ghcr.io/globex/a/b", "globex", true, false},
		{"GHCR.io.:443/globex/a", "globex", true, false},
		{"ghcr.io:80/globex/a", "", true, false}, // perhaps the same registry: forbidden, and not allowed
		{"registry.example.com/team/acme/app", "acme", false, true},
	} {
		list := s.OfImage(tt.name)
		if got := owner(list); got != tt.owner || len(list) != 2 {
			t.Errorf("%s: %d keys of %q, want 2 of %q", tt.name, len(list), got, tt.owner)
		}
		if got := s.IsOthers(acme, tt.name); got != tt.othersAcme {
			t.Errorf("%s is another's for acme: %v", tt.name, got)
		}
		if got := s.IsOthers(globex, tt.name); got != tt.othersGlob {
			t.Errorf("%s is another's for globex: %v", tt.name, got)
		}
	}
	if s.ByID("t-2") != globex || s.ByID("acme") != nil {
		t.Error("tenants are found by something else than their id")
	}
}
