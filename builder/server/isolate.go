package server

import (
	"crypto/rand"

	"handler/function/isolation"
	"handler/function/signature"
	"handler/function/solve"
)

// isolationKey is derived from the first key of the payload secret. A rotation of the
// other keys does not change it.
func (s *Server) isolationKey(keys signature.Keys) isolation.Key {
	if len(keys) == 0 {
		return isolation.Derive(s.FallbackSecret)
	}
	return isolation.Derive(keys[0])
}

// isolationValues are the values that keep one build apart from others on a daemon. Package
// isolation says what each is for.
type isolationValues struct {
	timeKey      [32]byte
	sharedKey    string
	hostname     string
	cacheMountNS string
	name         solve.Name // zero unless a queue may deliver the build again
}

func (s *Server) isolate(j *job, sp *spec) isolationValues {
	key, tenant := j.body.root, j.body.id()
	// Without an image nothing tells whether two builds are of one function, so each
	// build is alone.
	repository := rand.Text()
	if len(sp.config.References) > 0 {
		repository = sp.config.References[0].Name()
	}
	i := isolationValues{
		timeKey:      key.TimeKey(tenant, repository),
		sharedKey:    key.SharedKey(tenant, repository),
		hostname:     key.Hostname(tenant, sp.secrets),
		cacheMountNS: key.CacheMountNS(tenant),
	}
	if j.named() {
		i.name = solve.Name{
			Call: key.CallName(tenant, j.body.ownKey(), j.id.call),
			Body: key.BodyName(tenant, j.id.body),
		}
	}
	return i
}
