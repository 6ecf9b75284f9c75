package tenants

import (
	"encoding/json"
	"maps"
	"slices"
)

// loginKeys returns the keys of "auths" in the registry credentials of all tenants, as they are
// written, each of them once.
func loginKeys(list []*Tenant) []string {
	keys := make(map[string]bool)
	for _, t := range list {
		var config struct {
			Auths map[string]json.RawMessage `json:"auths"`
		}
		if t.Registry.Config == nil || json.Unmarshal(t.Registry.Config, &config) != nil {
			continue
		}
		for key := range config.Auths {
			keys[key] = true
		}
	}
	return slices.Sorted(maps.Keys(keys))
}

// LoginKeys are the registries that some tenant has credentials of its own for, as the keys of
// "auths" in a Docker config.json. The list must not be changed.
func (s *Set) LoginKeys() []string { return s.logins }
