package buildkit

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"sync"

	"handler/function/buildkit/pool"
	"handler/function/solve"
)

// A tenant has a limit of builds over all replicas. Each replica knows its own builds. If the other
// replicas cannot tell how many they have, a replica counts the builds on the daemons, by the tags in
// their Refs.

// tenantTag is how Refs name a tenant.
func tenantTag(id string) string { return tag("tenant " + id) }

func tag(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])[:pool.TagLen]
}

// tagsOf are the tags for the Refs of a request. A second delivery of one build has the same
// tags, on every replica.
func tagsOf(req *solve.Request) pool.Tags {
	if req.Tenant == nil {
		return pool.Tags{}
	}
	build := rand.Text()
	if req.Name != (solve.Name{}) {
		build = req.Name.Call + "x" + req.Name.Body
	}
	return pool.Tags{Tenant: tenantTag(req.Tenant.ID), Build: tag("build " + build)}
}

// running are the builds of tenants that this process solves.
type running struct {
	mu  sync.Mutex
	all map[pool.Tags]int // how many solves each has: two deliveries may run at once
}

// add counts a build until done is called.
func (r *running) add(t pool.Tags) (done func()) {
	if t == (pool.Tags{}) {
		return func() {}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all == nil {
		r.all = make(map[pool.Tags]int)
	}
	r.all[t]++
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.all[t]--; r.all[t] == 0 {
			delete(r.all, t)
		}
	}
}

// remove removes the builds of this process from tags.
func (r *running) remove(tags map[pool.Tags]bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for t := range r.all {
		delete(tags, t)
	}
}

// Counted says whether the pool of that name has several daemons. Running counts only in such pools.
// A lone daemon keeps records only of named builds, because a record takes a quarter of the time of a
// cached build. So do all daemons while Config.Elsewhere tells of all builds: Running does not count
// the unnamed builds that begin in this time.
func (s *Solver) Counted(name string) bool {
	p, leave, err := s.pools.use(name)
	if err != nil {
		return false
	}
	defer leave()
	return p.Several()
}

// Running asks the daemons of all pools what other processes build there, and returns how many
// builds a tenant has. A build counts once, however many parts and attempts it has. Daemons that
// do not answer before ctx ends are left out.
func (s *Solver) Running(ctx context.Context) func(tenant string) int {
	list, leave := s.pools.all()
	defer leave()
	all := make(map[pool.Tags]bool)
	var mu sync.Mutex
	var asking sync.WaitGroup
	for _, p := range list {
		if !p.Several() {
			continue
		}
		asking.Go(func() {
			tags := p.Running(ctx)
			mu.Lock()
			defer mu.Unlock()
			maps.Copy(all, tags)
		})
	}
	asking.Wait()
	s.running.remove(all)
	count := make(map[string]int)
	for t := range all {
		count[t.Tenant]++
	}
	return func(tenant string) int { return count[tenantTag(tenant)] }
}
