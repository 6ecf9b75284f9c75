package tenants

import (
	"crypto/rand"

	"handler/function/repository"
)

// MaxUnnamed is the largest number of keys that are all tried for a request that names no tenant.
// If the file has more keys, none is tried before the image in the request's config has told the
// tenant.
const MaxUnnamed = 8

// Set is all tenants at one time.
type Set struct {
	File      bool                // there is a file; without it, there is one tenant
	Tenants   []*Tenant           // in the order of their names
	Operators []Key               // may list and stop the builds of all tenants, and nothing else
	Pools     map[string][]string // addresses of daemons, by the name in Tenant.Pool

	named  map[string]*Tenant
	ids    map[string]*Tenant
	hosts  map[string]*Tenant
	images repository.Index[*Tenant]
	keys   int      // of all tenants
	width  int      // keys of the tenant with the most
	decoy  [][]byte // width of them; random
	logins []string // loginKeys
}

// Single is the Set of an installation without a file. keys are those of the payload secret,
// which may be none.
func Single(keys [][]byte) *Set {
	t := &Tenant{Name: DefaultID, ID: DefaultID, Weight: 1}
	for _, k := range keys {
		t.Keys = append(t.Keys, Key{Secret: k})
	}
	s := &Set{Tenants: []*Tenant{t}}
	s.index()
	return s
}

// index fills what look-ups need. No two tenants may share a name, an id, a host, a key or an
// image.
func (s *Set) index() {
	s.named, s.ids, s.hosts = make(map[string]*Tenant), make(map[string]*Tenant), make(map[string]*Tenant)
	for _, t := range s.Tenants {
		s.named[t.Name], s.ids[t.ID] = t, t
		for _, prefix := range t.Images {
			s.images.Add(prefix, t)
		}
		for _, h := range t.Hosts {
			s.hosts[h] = t
		}
		s.keys += len(t.Keys)
		s.width = max(s.width, len(t.Keys))
	}
	s.logins = loginKeys(s.Tenants)
	for range s.width {
		s.decoy = append(s.decoy, []byte(rand.Text()))
	}
}

// Candidate is a key that may have signed a request. A decoy has no Tenant: it is a random key
// that takes as long to try as any other.
type Candidate struct {
	Tenant *Tenant
	Key    Key
}

// candidates are the keys of a tenant, with decoys. A nil t has only decoys. The number is the
// same for every t, so that the time of a refusal does not tell whether the tenant exists.
func (s *Set) candidates(t *Tenant) []Candidate {
	list := make([]Candidate, 0, s.width)
	if t != nil {
		for _, k := range t.Keys {
			list = append(list, Candidate{t, k})
		}
	}
	for _, decoy := range s.decoy[len(list):] {
		list = append(list, Candidate{Key: Key{Secret: decoy}})
	}
	return list
}

// Named returns the keys of the tenant of that name.
func (s *Set) Named(name string) []Candidate { return s.candidates(s.named[name]) }

// AtHost returns the keys of the tenant that has the host of a request, with or without a
// port. ok is false if none has it.
func (s *Set) AtHost(text string) (list []Candidate, ok bool) {
	h, err := host(text)
	if err != nil {
		return nil, false
	}
	t, ok := s.hosts[h]
	if !ok {
		return nil, false
	}
	return s.candidates(t), true
}

// All returns the keys of all tenants. ok is false if a file has more than MaxUnnamed. The payload
// secret may have any number.
func (s *Set) All() (list []Candidate, ok bool) {
	if s.File && s.keys > MaxUnnamed {
		return nil, false
	}
	for _, t := range s.Tenants {
		for _, k := range t.Keys {
			list = append(list, Candidate{t, k})
		}
	}
	return list, true
}

// OfImage returns the keys of the tenant that may push to a repository.
func (s *Set) OfImage(name string) []Candidate {
	t, _ := s.images.Within(name)
	return s.candidates(t)
}

// ByID returns the tenant with that id, or nil.
func (s *Set) ByID(id string) *Tenant { return s.ids[id] }

// IsOthers says whether a repository may be an image of another tenant than t.
func (s *Set) IsOthers(t *Tenant, name string) bool {
	owner, ok := s.images.MayBeWithin(name)
	return ok && owner.ID != t.ID
}
