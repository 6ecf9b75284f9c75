// Package solve is what passes between the HTTP side and the BuildKit side:
// a verified request to build, and what came of it.
package solve

import (
	"cmp"
	"time"

	"handler/function/buildconfig"
	"handler/function/payload"
	"handler/function/redact"
)

// Request is one build, its signature verified and its config checked.
type Request struct {
	// ID is for logs: the caller's X-Call-Id, or an id made here.
	ID      string
	Config  *buildconfig.Config
	Context *payload.Context // empty where Config.Git says where it is

	// GitAuthorization is the value of the Authorization header for the git context's
	// host, or empty.
	GitAuthorization string

	// Secrets are the unsealed build secrets, by the id in RUN --mount=type=secret.
	Secrets map[string][]byte

	// Mask keeps the secrets' values out of log lines and errors.
	Mask *redact.Redactor

	// SharedKey, Hostname and CacheMountNS keep builds apart. Package isolation makes
	// them.
	SharedKey    string
	Hostname     string
	CacheMountNS string

	// Name is how daemons remember the build.
	Name Name

	// Tenant is whose build it is. Nil is the only tenant of an installation without a file
	// of tenants.
	Tenant *Tenant

	// Placed is called when an attempt begins on a daemon, with the daemon's address and the
	// attempt's name there. Pushing is called with true when the push of the image begins,
	// and with false if the build then begins anew. The push of a part, which has no tag, does
	// not count. Both may be nil, and must not block.
	Placed  func(daemon, ref string)
	Pushing func(yes bool)
}

// Tenant is what daemons and registries need to know of the tenant of a build.
type Tenant struct {
	ID   string
	Key  string // the id of the key that signed, for the log
	Pool string // of daemons; empty is the shared one

	Memory int64   // bytes of one step; zero is no limit
	CPUs   float64 // of one step, at least 0.01; zero is no limit

	BuildTimeout time.Duration // in place of the Solver's; zero leaves that

	// RegistryConfig is a Docker config.json with the tenant's credentials; nil for none.
	// BuilderRegistry says that the tenant has the builder's own in its place.
	RegistryConfig  []byte
	BuilderRegistry bool

	Sources Sources
}

// Sources says what a build may read from elsewhere. Repositories and prefixes of them are
// normalised.
type Sources struct {
	Images []string // prefixes that may be pulled, whatever From says
	Own    []string // the builder's repositories; nothing may pull them

	// Others says whether a repository may be another tenant's image. Only From lets those
	// be pulled. It is a func, and no list, because there may be thousands of them.
	Others func(name string) bool

	// From are patterns in which * is any text, compared with a normalised repository. Nil
	// allows everything but Others.
	From []string

	// Hosts are those that ADD may read with http and git, as in context_hosts.
	Hosts []string

	// Asked are the registries that some tenant has credentials for, as the keys of "auths"
	// in a Docker config.json. The function may ask them for images, even if they have
	// private addresses.
	Asked []string
}

// Name identifies a queued build over all deliveries of its request, on every replica. A build
// with the zero Name is not remembered.
type Name struct {
	Call string // of the call id
	Body string // of the request's body
}

// Log takes the contract's log lines as they come, free of control characters and of secrets.
// A call may block while the client is slow. It returns at once when the build's context has
// ended.
type Log func(lines ...string)

// Outcome is a build that succeeded.
type Outcome struct {
	Digest    string   // of the image, or of the index of several
	Commit    string   // of a git context; empty if the build was found in the history
	Tags      []string // further references pushed, as they were sent
	Platforms []string // built, as "os/arch[/variant]"
	Warnings  []string
}

// Past is what a daemon remembers of a build with a name.
type Past struct {
	Running bool
	Image   string // the reference, normalised
	Outcome Outcome
	Err     error // an *api.Error; nil if it succeeded or runs

	Began, Ended time.Time
}

// Choice says why a build was on its daemon.
type Choice string

const (
	First Choice = "first" // where its cache is
	Busy  Choice = "full"  // the first had its share of builds
	Down  Choice = "down"  // the first could not be reached, its disk was full, or a build had stalled there
)

// Daemons counts the daemons of the pool.
type Daemons struct {
	Total     int
	Reachable int // that answer
	Full      int // whose disk was full, and has not been pruned since
}

// Stats is how a build went, whether it succeeded or failed, for the log and the metrics.
// Durations of phases that it did not reach are zero.
type Stats struct {
	Steps    int           // of the Dockerfile that were reached
	Cached   int           // of Steps
	Attempts int           // solves started; policy in package buildkit says when there are several
	Daemon   string        // the address of the last attempt's daemon
	Choice   Choice        // of the last attempt's daemon
	Moved    bool          // to another daemon, on the way
	Sent     int64         // bytes of context sent to the daemon
	Pushed   int64         // bytes of the image's layers and configs, also of those that the registry had; zero without a Tenant
	Transfer time.Duration // of the context to the daemon
	Push     time.Duration
}

// Add counts another part of the same build. Daemon and Choice become the part's, if it was on
// a daemon. Push and Sent stay: the pushes of parts overlap, and all parts send one context.
func (s *Stats) Add(part Stats) {
	s.Steps += part.Steps
	s.Cached += part.Cached
	s.Attempts += part.Attempts
	s.Pushed += part.Pushed
	s.Transfer += part.Transfer
	s.Daemon, s.Choice = cmp.Or(part.Daemon, s.Daemon), cmp.Or(part.Choice, s.Choice)
	s.Moved = s.Moved || part.Moved
}
