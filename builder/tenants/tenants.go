// Package tenants knows who may build here, and what each of them may do. An operator writes
// it into a file, the secret "tenants". Without the file there is one tenant, who may do
// everything.
//
// Everything in a Set, and everything that a Set leads to, stays as it is. A changed file
// makes a new Set.
package tenants

import "time"

// DefaultID is the id of the only tenant where there is no file.
const DefaultID = "default"

// IsID says whether a text has the form of an id in the file.
func IsID(text string) bool { return idForm.MatchString(text) && text != DefaultID }

// Tenant is one entry of the file, with the file's defaults filled in. The installation has limits
// of its own. Where a tenant has the same limit, the lesser of the two counts.
type Tenant struct {
	Name string // by which requests name the tenant; it may change
	ID   string // in every salt, name, tag and record; it is never used for another tenant

	Keys  []Key
	Hosts []string // requests for these hosts are the tenant's; in lower case, without a default port

	// Images are prefixes of the repositories that the tenant may push to, normalised. Empty
	// allows every repository, which only the default tenant has.
	Images []string

	// From are patterns of what the tenant may pull. In a pattern, * is any text. It is compared
	// with a normalised name without tag and digest. Nil allows everything but the images of
	// other tenants. The tenant may always pull what Images has.
	From []string

	Registry       Registry
	ContextHosts   []string // in place of the installation's; nil leaves the installation's
	GitCredentials []byte   // in the form of git's credential store; nil is the installation's for the default tenant, and none for others

	Platforms []string // normalised; empty allows every platform

	Memory int64   // bytes of one step; zero is no limit
	CPUs   float64 // of one step; zero is no limit
	Pool   string  // of daemons, a key of Set.Pools; empty is the shared one

	Builds int // at once; zero is no limit
	Queue  int // builds that wait, on one replica; zero is no limit
	Weight int // its share of the slots in proportion to the weights of others; 1 or more

	BuildTimeout time.Duration // zero leaves the installation's
	MaxBodyBytes int64         // zero leaves the installation's

	Suspended bool
}

// Key is one key of a tenant or of the operator.
type Key struct {
	ID     string // for the log
	Secret []byte
	Until  time.Time // when it ends; zero is never
}

// Valid says whether the key may sign at a time.
func (k Key) Valid(now time.Time) bool { return k.Until.IsZero() || now.Before(k.Until) }

// Registry is where a tenant's registry credentials come from. The zero Registry is nowhere.
type Registry struct {
	Builder bool   // the builder's own registry config
	Config  []byte // a Docker config.json with nothing but "auths"; nil for none
}
