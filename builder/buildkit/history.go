package buildkit

import (
	"context"
	"errors"
	"regexp"
	"strconv"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"

	"handler/function/api"
	"handler/function/buildkit/pool"
	"handler/function/buildkit/report"
	"handler/function/redact"
	"handler/function/solve"
)

// A build with a name has a Ref that is made of it. So another replica, or this one after a
// restart, finds the build in the daemon's history, with its result or running. Each attempt
// has a Ref of its own: the first attempt at a build of the call 1f and the body 2e has the Ref
// 1fx2ex0, the next one 1fx2ex1. The call and the body are hex digits, so an x separates them. A
// build of a tenant has pool.Tags at the end of its Refs, which do not change what a Ref begins with.

// maxRefs is how many attempts at one name are looked for.
const maxRefs = 20

func refOf(name solve.Name, n int) string { return refPrefix(name) + strconv.Itoa(n) }

func refPrefix(name solve.Name) string { return callPrefix(name.Call) + name.Body + "x" }

func callPrefix(call string) string { return call + "x" }

// recall asks the seat's daemon for the plan's name. It returns the record of an attempt that
// runs or has succeeded, or, without one, the Ref for the next attempt. It looks no further than the
// first Ref without a record. If the daemon has removed the record of an older attempt, the plan is
// built again with that attempt's Ref.
func recall(ctx context.Context, seat *pool.Seat, p *plan) (*pool.Record, string, error) {
	for n := range maxRefs {
		ref := p.tags.Ref(refOf(p.name, n))
		record, err := seat.Record(ctx, ref)
		switch {
		case err != nil:
			return nil, "", err
		case record == nil:
			return nil, ref, nil
		case record.Running(), record.Succeeded():
			return record, "", nil
		}
	}
	// All of these attempts have failed. This one gets a Ref that no replica looks for.
	return nil, p.newRef(), nil
}

// newRef is a Ref that no replica looks for.
func (p *plan) newRef() string { return p.tags.Ref(identity.NewID()) }

// findHolder asks all daemons of a pool for the build's name. It returns the daemon that runs the
// build, or else one that has built it, or nil. It takes up to 39 s: 9 s as in pool.Pool.Count, and
// 30 s for a daemon that is slow to read its history.
func (r *run) findHolder(ctx context.Context) *pool.Daemon {
	if !r.plan.named() || !r.plan.pool.Several() {
		return nil
	}
	// A daemon that cannot be asked is asked again if the build is placed on it.
	found, _ := r.plan.pool.Search(ctx, refPrefix(r.plan.name))
	var holder *pool.Daemon
	for _, f := range found {
		switch {
		case f.Running():
			return f.Daemon
		case f.Succeeded():
			holder = f.Daemon
		}
	}
	return holder
}

// Find returns what the daemons of the pool of that name remember of the last build of the call,
// which is a Name.Call. An empty name is the shared pool. Find returns nil if they remember no build
// of the call, or if the last one was canceled. Its error is an *api.Error, no_daemon: there is no such
// pool, or Find would return nil and a daemon cannot be asked.
func (s *Solver) Find(ctx context.Context, name, call string) (*solve.Past, error) {
	daemons, leave, err := s.pools.use(name)
	if err != nil {
		return nil, err
	}
	defer leave()
	found, err := daemons.Search(ctx, callPrefix(call))
	var last *pool.Record
	for _, f := range found {
		if last == nil || f.Began.After(last.Began) {
			last = f.Record
		}
	}
	if last != nil {
		if p := past(last); p != nil {
			return p, nil
		}
	}
	if err != nil {
		return nil, &api.Error{Code: api.NoDaemon, Msg: "a buildkitd that may know of the build cannot be asked", Err: err}
	}
	return nil, nil
}

// Pushed looks for the image of a build whose process has died, and returns its digest. The daemon at
// the given address has a record of the build under its Ref, with the image's digest, even if the
// build was ended during the push. The registry tells whether the image's tag has this digest now. If
// the tag has another digest, or the daemon has no record, Pushed returns "".
func (s *Solver) Pushed(ctx context.Context, t *solve.Tenant, daemon, ref, image string) (string, error) {
	name, credentials := "", s.cfg.Credentials
	if t != nil {
		name = t.Pool
		if !t.BuilderRegistry {
			var err error
			if credentials, err = credentials.Of(t.RegistryConfig); err != nil {
				return "", err
			}
		}
	}
	daemons, leave, err := s.pools.use(name)
	if err != nil {
		return "", err
	}
	defer leave()
	record, err := daemons.RecordAt(ctx, daemon, ref)
	if err != nil || record == nil || record.Digest == "" {
		return "", err
	}
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return "", err
	}
	tagged, ok := reference.TagNameOnly(named).(reference.NamedTagged)
	if !ok {
		return "", nil
	}
	there, err := credentials.Grant([]reference.Named{tagged}).Tagged(ctx, tagged)
	if err != nil || there.String() != record.Digest {
		return "", err
	}
	return record.Digest, nil
}

// command finds a step's command in the error about its exit code.
var command = regexp.MustCompile(`process "(?:[^"\\]|\\.)*" did not complete successfully: `)

// past is a record for the client. It is nil for a build that was canceled: its function has
// stopped, say, and the next delivery builds again.
func past(r *pool.Record) *solve.Past {
	p := &solve.Past{Running: r.Running(), Image: r.Image, Began: r.Began, Ended: r.Ended}
	switch {
	case p.Running:
		return p
	case r.Err == nil:
		p.Outcome.Digest = r.Digest
		return p
	case grpcerrors.Code(r.Err) == codes.Canceled:
		return nil
	}
	// The secrets are not known here, and cannot be masked. BuildKit puts none of their
	// values into its own errors. But the command of a step may hold one: it is cut out.
	err := errors.New(command.ReplaceAllString(r.Err.Error(), ""))
	p.Err, _ = (&report.Failure{Err: err, Mask: redact.New(nil), Pushing: report.IsPush(err)}).Classify()
	return p
}
