// Package solve is what passes between the HTTP side and the BuildKit side:
// a verified request to build, and what came of it.
package solve

import (
	"time"

	"handler/function/buildconfig"
	"handler/function/payload"
	"handler/function/redact"
)

// Request is one build, its signature verified and its config checked.
type Request struct {
	// ID is for logs: the caller's X-Call-Id, or one made here.
	ID      string
	Config  *buildconfig.Config
	Context *payload.Context // empty where Config.Git says where it is

	// GitAuthorization is the header's value for the git context's host, or
	// empty.
	GitAuthorization string

	// Secrets are the unsealed build secrets, by the id that
	// RUN --mount=type=secret names.
	Secrets map[string][]byte

	// Mask keeps the secrets' values out of everything that is said of the
	// build.
	Mask *redact.Redactor

	// SharedKey, Hostname and CacheMountNS keep this build apart from those of
	// others; package isolation makes them.
	SharedKey    string
	Hostname     string
	CacheMountNS string

	// Name is what the daemon remembers the build by.
	Name Name
}

// Name identifies a queued build over all deliveries of its request, on every
// replica. Of the zero Name nothing is remembered.
type Name struct {
	Call string // of the call id
	Body string // of the request's body
}

// Log takes the contract's log lines as they come, each free of control
// characters and of secrets. A call may block while the client is slow; it
// returns at once when the build's context has ended.
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
	Err     error // an *api.Error where the client may know the reason

	Began, Ended time.Time
}

// Choice is why a build was on its daemon.
type Choice string

const (
	First Choice = "first" // where its cache is
	Full  Choice = "full"  // the first had its share of builds
	Down  Choice = "down"  // the first could not be reached, or its disk was full
)

// Daemons counts those of the pool.
type Daemons struct {
	Total     int
	Reachable int // those that answer
	Full      int // those whose disk was, and has not been pruned since
}

// Stats is how a build went, for the log and the metrics, also of one that
// failed. Durations are zero for what did not happen.
type Stats struct {
	Steps    int // vertices, those of the frontend not counted
	Cached   int
	Attempts int           // solves started: 2 when a daemon was lost on the way
	Daemon   string        // the address of the last attempt's
	Choice   Choice        // of that daemon
	Moved    bool          // to another daemon, on the way
	Sent     int64         // bytes of context sent to the daemon
	Transfer time.Duration // of the context to the daemon
	Push     time.Duration
}

// Add counts another part of the same build. Where it was built is the last
// part's.
func (s *Stats) Add(part Stats) {
	s.Steps += part.Steps
	s.Cached += part.Cached
	s.Attempts += part.Attempts
	s.Transfer += part.Transfer
	s.Daemon, s.Choice = part.Daemon, part.Choice
	s.Moved = s.Moved || part.Moved
}
