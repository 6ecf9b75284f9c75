// Package records has what is known of a build apart from the connection that asked for it: its
// record and its log. A build can be followed and stopped through a Store, from any replica.
// This package has the types and the interface Store. The packages below it are the stores.
//
// No build waits for a store, and none fails because of one.
package records

import (
	"context"
	"errors"
	"iter"
	"maps"
	"net/http"
	"strings"
	"time"

	"handler/function/api"
)

// Limits of every store.
const (
	MaxPage      = 200              // records of a Page
	MaxLog       = 8 << 20          // bytes of one build's log; of a longer one the latest lines are kept
	MaxLine      = 60 << 10         // bytes of a line; the contract has no longer one
	MaxFollowers = 48               // at once, of one process
	KeepAlive    = 10 * time.Second // of silence, after which Follow yields a Line with N 0
	SlowAfter    = 10 * time.Second // that a follower may take for one Line; a slower one gets ErrSlow

	maxError    = 16 << 10 // bytes of Record.Error
	maxWarnings = 16 << 10 // bytes of Record.Warnings together
)

var (
	// ErrNotFound means that there is certainly no build of that name.
	ErrNotFound = errors.New("no such build")

	// ErrUnknown means that nobody can tell now whether there is such a build. A later try may
	// tell.
	ErrUnknown = errors.New("the store of records cannot be reached")

	// ErrOwnerUnreachable means that the build runs, and that the process that has it does
	// not answer.
	ErrOwnerUnreachable = errors.New("the process that runs the build does not answer")

	// ErrUsed means that Cancellation.Once has been used before.
	ErrUsed = errors.New("a cancellation works once")

	// ErrBusy means that MaxFollowers follow builds already.
	ErrBusy = errors.New("too many followers")

	// ErrSlow ends a follower that took longer than SlowAfter for a Line.
	ErrSlow = errors.New("the follower is too slow")
)

// Ref names a build. Attempt is 0 for the latest build of the id. Attempts are counted from 1
// for each id, as long as the store knows an earlier one.
//
// Tenant, here and in all of this package, says whose the build is: it is the tenant's id or,
// without a file of tenants, an id made of the key that signed. Holders of different keys have
// never seen each other's builds.
type Ref struct {
	Tenant  string
	ID      string // the call id
	Attempt int
}

// Record is what is known of a build. While it runs, what is not known yet is zero. It holds no
// build arguments, secrets, labels or keys.
//
// The JSON is what a client sees. Tenant is for operators: an answer to the tenant itself
// leaves it out.
type Record struct {
	Tenant  string `json:"tenant,omitempty"`
	ID      string `json:"id"`
	Attempt int    `json:"attempt,omitempty"` // 0 until the store has given a number

	Image      string     `json:"image,omitempty"`
	ImageName  string     `json:"imageName,omitempty"` // the same, as in api.Record
	Status     api.Status `json:"status"`
	Error      string     `json:"error,omitempty"`
	Code       api.Code   `json:"code,omitempty"`
	Duration   float64    `json:"duration"` // seconds
	Digest     string     `json:"digest,omitempty"`
	Commit     string     `json:"commit,omitempty"`
	Tags       []string   `json:"tags,omitempty"`
	Platforms  []string   `json:"platforms,omitempty"`
	Warnings   []string   `json:"warnings,omitempty"`
	Request    string     `json:"request,omitempty"` // hex SHA-256 of the request's body
	Began      time.Time  `json:"began"`
	Ended      time.Time  `json:"ended,omitzero"`
	Lines      uint64     `json:"lines"`                // of the log so far
	Queued     bool       `json:"queued"`               // the request came from a queue
	CanceledBy string     `json:"canceledBy,omitempty"` // who asked to stop it, whether it did or not

	// For the builder alone.
	Building bool   `json:"-"` // it has a build slot; before that it waits for one
	Daemon   string `json:"-"` // the address of the daemon that has it, or had it last
	Ref      string `json:"-"` // its name in this daemon's history
}

// SetVerdict copies everything but the log of a build's last record. ID is not changed.
func (r *Record) SetVerdict(v api.Record) {
	r.Image, r.ImageName, r.Status, r.Error, r.Code = v.Image, v.ImageName, v.Status, v.Error, v.Code
	r.Duration, r.Digest, r.Commit, r.Tags, r.Platforms = v.Duration, v.Digest, v.Commit, v.Tags, v.Platforms
	r.Warnings = v.Warnings
	if v.Request != "" {
		r.Request = v.Request
	}
}

// Change calls change for a Build.Update, and puts back what that may not change.
func (r *Record) Change(change func(r *Record)) {
	was := *r
	change(r)
	r.Tenant, r.ID, r.Attempt, r.Status = was.Tenant, was.ID, was.Attempt, was.Status
	r.Lines, r.CanceledBy = was.Lines, was.CanceledBy
}

// End ends the record now, with a verdict.
func (r *Record) End(verdict api.Record) {
	r.SetVerdict(verdict)
	r.Ended, r.Building = time.Now(), false
	r.Bound()
}

// Verdict is the record as a caller of the build is told it, without a log.
func (r *Record) Verdict() api.Record {
	return api.Record{
		Image: r.Image, ImageName: r.ImageName, Status: r.Status, Error: r.Error, Code: r.Code,
		Duration: r.Duration, Digest: r.Digest, Commit: r.Commit, Tags: r.Tags, Platforms: r.Platforms,
		Warnings: r.Warnings, ID: r.ID, Request: r.Request,
	}
}

// Running says whether there is no verdict yet.
func (r *Record) Running() bool { return r.Status == api.InProgress }

// Final says whether another attempt at the same request would have the same verdict. A
// redelivery is then answered with this verdict. A build that somebody stopped is final. A
// build whose caller left is not.
func (r *Record) Final() bool {
	switch status := r.Code.HTTPStatus(); {
	case r.Running():
		return false
	case r.Status == api.Success:
		return true
	case r.Code == api.Canceled:
		return r.CanceledBy != ""
	case r.Code == api.Suspended:
		return false // the tenant may build again later
	default:
		return status != http.StatusTooManyRequests && status < 500
	}
}

// Bound cuts the texts that have no other bound, so that a record fits into one message of any
// store.
func (r *Record) Bound() {
	if len(r.Error) > maxError {
		r.Error = strings.ToValidUTF8(r.Error[:maxError], "") + "…"
	}
	left := maxWarnings
	for i, w := range r.Warnings {
		if left -= len(w); left < 0 {
			r.Warnings = append(r.Warnings[:i:i], "further warnings were left out")
			break
		}
	}
}

// Line is one line of a log. Lines are counted from 1. If Lost is not 0, the lines N-Lost+1 to N
// are lost, and Text is a mark. Example: N 330 and Lost 312 stand for the lines 19 to 330. A Line
// with N 0 says that the log has been silent for KeepAlive.
type Line struct {
	N    uint64 `json:"n"`
	Lost uint64 `json:"lost,omitempty"`
	Text string `json:"t"`
}

// Gap is the Line for lost lines from first to last.
func Gap(first, last uint64) Line { return Line{N: last, Lost: last - first + 1, Text: "…"} }

// ClipLine is a line as stores keep it.
func ClipLine(line string) string {
	if len(line) <= MaxLine {
		return line
	}
	const mark = "…"
	return strings.ToValidUTF8(line[:MaxLine-len(mark)], "") + mark
}

// Query says which records a Page has.
type Query struct {
	Tenant   string     // as in a Ref
	Operator bool       // the records of all tenants; Tenant is ignored
	Status   api.Status // if it is not empty
	Image    string     // if it is not empty: this reference, or the repository of it with any tag or digest
	Limit    int        // 1 to MaxPage; others are taken for the nearest
	Before   string     // Page.Next of the page before, or empty
}

// Matches says whether a query asks for a record, apart from Before.
func (q *Query) Matches(r *Record) bool {
	if !q.Operator && r.Tenant != q.Tenant || q.Status != "" && r.Status != q.Status {
		return false
	}
	rest, ok := strings.CutPrefix(r.Image, q.Image)
	return q.Image == "" || ok && (rest == "" || rest[0] == ':' || rest[0] == '@')
}

// Size is Limit within its bounds.
func (q *Query) Size() int { return min(max(q.Limit, 1), MaxPage) }

// Page is a part of a list.
type Page struct {
	Builds   []Record // newest first, in the order in which the store has heard of them
	Next     string   // Query.Before of the next page; empty on the last one
	Complete bool     // false if there may be builds that this process does not know of
}

// Cancellation asks for a build's end.
type Cancellation struct {
	Ref
	By string // for the record

	// Once tells this cancellation from every other. Example: the signature of the request. A
	// second cancellation with the same Once is ErrUsed, also if the build had ended. One that
	// finds no build does not count. An empty Once is never used up.
	Once string
}

// useFor is how long a Cancellation.Once is remembered. A signed DELETE is good for ten minutes
// at most: its timestamp may be five minutes to either side.
const useFor = 11 * time.Minute

// Used are the values of Cancellation.Once that were used, and when.
type Used map[string]time.Time

// Use uses a value up. It returns false if the value was used before.
func (u Used) Use(once string) bool {
	maps.DeleteFunc(u, func(_ string, at time.Time) bool { return time.Since(at) > useFor })
	if _, used := u[once]; used {
		return false
	}
	if once != "" {
		u[once] = time.Now()
	}
	return true
}

// Load is what other processes have now. A process tells the others within a tenth of a second
// when a build begins, ends, or gets a slot or a daemon, and of other changes within two seconds.
type Load struct {
	Tenants  map[string]int // builds with a slot, by Record.Tenant
	Daemons  map[string]int // places that builds and their parts have on daemons, by the address
	Others   int            // processes that are in the sums
	Complete bool           // false if other processes may have builds that are not in the sums
}

// Stats is how the store does.
type Stats struct {
	Reachable bool          // the store takes what it is given
	Problem   string        // why not, for the operator; empty if Reachable
	Pending   int64         // bytes of lines and records that are not in the store yet
	Lag       time.Duration // age of the oldest of them
	Dropped   uint64        // lines that never came into the store
	Forgotten uint64        // ended records that never did
	Lost      uint64        // builds of other processes that this one has found lost
	Errors    uint64        // answers of the store that were none
	Followers int           // now
}

// Store keeps records. Its methods may be called from any number of goroutines.
type Store interface {
	// Begin adds a build that runs from now on. r needs Tenant, ID and Began. Begin never
	// waits. When somebody asks for the build's end, cancel is called with who it was. It
	// must not block, and may be called more than once.
	Begin(r Record, cancel func(by string)) Build

	// Get returns a build's record.
	//
	// # Errors
	//
	// ErrNotFound, ErrUnknown, or ctx's.
	Get(ctx context.Context, ref Ref) (Record, error)

	// Find returns the latest build of a tenant's call id with the same request, of those that
	// run or are Final. A redelivery of the request is answered with this build. Its errors are
	// Get's.
	Find(ctx context.Context, tenant, id, request string) (Record, error)

	// Everywhere returns the latest build of an id of each tenant that has one. It is for
	// operators, who name no tenant. Its errors are Get's.
	Everywhere(ctx context.Context, id string) ([]Record, error)

	// List returns a page of records. If the store cannot be reached, the page has what this
	// process knows, and Complete is false. The only error is ctx's, or that of a Before
	// which is no Page.Next.
	List(ctx context.Context, q Query) (Page, error)

	// Follow yields the log of a build from the line after a given one. If wait is true, it
	// yields the lines as they come, until the build has ended; then Get has the verdict.
	// Otherwise it ends with the latest line. The build does not wait for its followers.
	//
	// # Errors
	//
	// Get's, ErrBusy and ErrSlow. An error is the last that is yielded.
	Follow(ctx context.Context, ref Ref, after uint64, wait bool) iter.Seq2[Line, error]

	// Cancel tells the process that has a build to end it. If the record that it returns is
	// Running, this process has been told. Otherwise the build had ended.
	//
	// # Errors
	//
	// Get's, ErrOwnerUnreachable and ErrUsed.
	Cancel(ctx context.Context, c Cancellation) (Record, error)

	// Forget removes all that is known of a tenant's builds that have ended.
	Forget(ctx context.Context, tenant string) error

	// Stats never waits.
	Stats() Stats

	// Close waits until everything is stored, or ctx ends. The store is of no use afterwards.
	Close(ctx context.Context) error
}

// Build is a build that runs in this process. Its methods never wait, and do nothing after End.
type Build interface {
	// Record is the record as it is now.
	Record() Record

	// Update changes the record. Tenant, ID, Attempt, Status, Lines and CanceledBy are not
	// its to change.
	Update(change func(r *Record))

	// Log adds lines. The caller sees them in the same order.
	Log(lines ...string)

	// End gives the build its verdict.
	End(verdict api.Record)
}
