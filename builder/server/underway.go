package server

import (
	"context"
	"sync"

	"handler/function/tenants"
)

// underway is the work for the tenants of a file, so that the work can be ended.
type underway struct {
	mu  sync.Mutex
	all map[*work]bool
}

// work is one build, or one context on its way to the registry.
type work struct {
	tenant string // its id
	cancel context.CancelCauseFunc
}

// working calls cancel if the tenant with that id is suspended or removed already, or is so
// before end is called. An empty id stands for the only tenant, which is never suspended or
// removed.
func (s *Server) working(tenant string, cancel context.CancelCauseFunc) (end func()) {
	if tenant == "" {
		return func() {}
	}
	w := &work{tenant, cancel}
	u := &s.underway
	u.mu.Lock()
	u.all[w] = true
	u.mu.Unlock()
	// The file may have changed since the signature passed. If it changed before the work was
	// noted, this sees it. If it changed later, TenantsChanged finds the work.
	if set, err := s.fileOfTenants(); err == nil && ended(set, tenant) {
		cancel(errSuspended)
	}
	return func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		delete(u.all, w)
	}
}

// ended says whether set is of a file in which the tenant with that id is suspended or missing.
func ended(set *tenants.Set, id string) bool {
	if set == nil || !set.File {
		return false
	}
	t := set.ByID(id)
	return t == nil || t.Suspended
}

// TenantsChanged ends the waiting and running work of tenants that are suspended in set or not
// in it. Revoking a key ends nothing. It must be called once Tenants.Current returns set.
func (s *Server) TenantsChanged(set *tenants.Set) {
	if set.File {
		s.metrics.Tenants(func(id string) bool { return set.ByID(id) != nil })
	}
	s.underway.mu.Lock()
	defer s.underway.mu.Unlock()
	for w := range s.underway.all {
		if ended(set, w.tenant) {
			w.cancel(errSuspended)
		}
	}
}
