package server

import (
	"context"
	"sync"

	"handler/function/tenants"
)

// underway is what is done for the tenants of a file, so that it can be ended.
type underway struct {
	mu  sync.Mutex
	all map[*work]bool
}

// work is one build, or one context on its way to the registry.
type work struct {
	tenant string // its id
	cancel context.CancelCauseFunc
}

// working has cancel called if the tenant with that id is suspended or removed, now or before end
// is called. An empty id stands for the only tenant, who is neither.
func (s *Server) working(tenant string, cancel context.CancelCauseFunc) (end func()) {
	if tenant == "" {
		return func() {}
	}
	w := &work{tenant, cancel}
	u := &s.underway
	u.mu.Lock()
	u.all[w] = true
	u.mu.Unlock()
	// A file that has changed since the signature passed came either before this line or, to
	// TenantsChanged, after the lines before.
	if set, err := s.fileOfTenants(); err == nil && ended(set, tenant) {
		cancel(errSuspended)
	}
	return func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		delete(u.all, w)
	}
}

// ended says whether a set, of a file, has no tenant with that id who may build.
func ended(set *tenants.Set, id string) bool {
	if set == nil || !set.File {
		return false
	}
	t := set.ByID(id)
	return t == nil || t.Suspended
}

// TenantsChanged ends what tenants that are suspended or removed in set have waiting and running.
// A key that is revoked ends nothing. It must be called once Tenants.Current returns set.
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
