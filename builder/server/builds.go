package server

import (
	"context"
	"encoding/hex"
	"errors"
	"net/http"
	"time"

	"handler/function/api"
	"handler/function/fair"
	"handler/function/records"
	"handler/function/reply"
	"handler/function/signature"
	"handler/function/solve"
)

// The routes about builds that run or have ended: a list, a record, a log (log.go), and a build's
// end. A tenant sees its own. Operators list, read and stop those of all tenants, and read no log.

// How many questions about builds read from the store, or from daemons, at once. An answer that has
// been read keeps its place until it is written: a list can have 6 MiB, and a log 1 MiB, and its
// client may take it slowly. Each tenant, or each key without a file of tenants, has one list. With a
// file, a tenant has half of the excerpts and of the questions to daemons.
const (
	maxLists    = 4
	maxExcerpts = 8 // logs of ended builds
	maxFinds    = 4 // each reads the histories of all daemons of a pool
)

// Bounds of what is asked of the store and the daemons.
const (
	findTimeout   = 30 * time.Second // for a verdict on the daemons
	readTimeout   = 10 * time.Second // of the store
	cancelTimeout = 5 * time.Second
)

var (
	errNoBuild  = &api.Error{Code: api.NotFound, Msg: "no build of this id is known: it has not been delivered yet, or has been forgotten"}
	errUnknown  = &api.Error{Code: api.RecordsUnreachable, Msg: "the store of records cannot be reached, and may know of the build"}
	errOwner    = &api.Error{Code: api.OwnerUnreachable, Msg: "the build runs on a replica that does not answer"}
	errLists    = &api.Error{Code: api.Busy, Msg: "other lists of builds are being made"}
	errExcerpts = &api.Error{Code: api.Busy, Msg: "other records with their logs are being read"}
	errFinds    = &api.Error{Code: api.Busy, Msg: "the daemons are being asked for other builds"}
	errReplayed = &api.Error{Code: api.Unauthorized, Msg: "this signature has been taken once, and works no more: sign the request again, with a later timestamp"}
)

// question is a signed request about builds.
type question struct {
	r     *http.Request
	by    signer
	query query
	opts  reply.Options
}

// ask checks the signature and the query of a request about builds. It returns nil if it has
// answered.
func (s *Server) ask(w http.ResponseWriter, r *http.Request, needs signedNeeds, keys ...string) *question {
	q := &question{r: r, opts: reply.Options{ID: r.PathValue(segment), Start: time.Now()}}
	if !validCallID(q.opts.ID) {
		q.opts.ID, _ = nameCall(w, r)
	}
	var err error
	if q.by, err = s.signedWith(r, needs); err != nil {
		s.refuseUnverified(w, r, err, q.opts)
		return nil
	}
	q.opts.Sign = q.by.sign
	if err = q.by.suspended(); err == nil {
		if q.by.operator {
			keys = append(keys, "tenant")
		}
		q.query, err = parseQuery(r.URL.RawQuery, keys)
	}
	if err != nil {
		s.refuseSigned(w, r, q.by, err, q.opts)
		return nil
	}
	return q
}

// refuse answers a question with an error. It neither counts nor logs errNoBuild: clients ask
// until there is a build.
func (s *Server) refuse(w http.ResponseWriter, q *question, err error) {
	switch {
	case errors.Is(err, errNoBuild):
		writeRefusal(w, q.r, errNoBuild, q.opts)
	case errors.Is(err, records.ErrUnknown):
		err = &api.Error{Code: errUnknown.Code, Msg: errUnknown.Msg, Err: err}
		fallthrough
	default:
		s.refuseSigned(w, q.r, q.by, because(q.r.Context(), err), q.opts)
	}
}

// answer answers a question with v.
func (s *Server) answer(w http.ResponseWriter, q *question, status int, v any) {
	if err := reply.Value(w, status, v, q.opts); err != nil {
		log := q.by.logTo(s.Log)
		log.Warn().AnErr("cause", err).Msg("answer not delivered")
	}
}

// listed is the answer of GET /builds. ID tells whose answer it is.
type listed struct {
	Builds   []records.Record `json:"builds"`
	Next     string           `json:"next,omitempty"`
	Complete bool             `json:"complete"` // false if other replicas may know more
	ID       string           `json:"id"`
}

// serveBuilds lists builds, the newest first.
func (s *Server) serveBuilds(w http.ResponseWriter, r *http.Request) {
	q := s.ask(w, r, signedNeeds{timestamp: true, operators: true}, "status", "image", "limit", "before")
	if q == nil {
		return
	}
	asked, err := q.query.list()
	if err != nil {
		s.refuse(w, q, err)
		return
	}
	asked.Tenant = q.by.owner()
	reader := fair.Tenant{ID: q.by.owner(), Most: 1}
	if q.by.operator {
		reader = fair.Tenant{ID: "operators", Most: maxLists / 2} // no tenant has this id
		asked.Tenant = q.query.text("tenant")
		asked.Operator = asked.Tenant == ""
	}
	leave, err := turn(q, s.lists, reader, errLists)
	if err != nil {
		s.refuse(w, q, err)
		return
	}
	defer leave()
	page, err := s.list(q, asked)
	if err != nil {
		s.refuse(w, q, err)
		return
	}
	s.answer(w, q, http.StatusOK, page)
}

// turn waits for a slot, for readTimeout at most. Its error is busy then. The caller must call leave.
func turn(q *question, slots *fair.Slots, reader fair.Tenant, busy *api.Error) (leave func(), err error) {
	if !slots.Try(reader) {
		if err := slots.Acquire(q.r.Context(), reader, readTimeout); err != nil {
			if q.r.Context().Err() == nil {
				err = busy
			}
			return nil, err
		}
	}
	return func() { slots.Release(reader.ID) }, nil
}

func (s *Server) list(q *question, asked records.Query) (*listed, error) {
	ctx, cancel := context.WithTimeout(q.r.Context(), readTimeout)
	defer cancel()
	page, err := s.Records.List(ctx, asked)
	switch {
	case ctx.Err() != nil:
		return nil, errors.Join(records.ErrUnknown, err)
	case err != nil:
		return nil, &api.Error{Code: api.BadQuery, Msg: "before is not the next of an earlier page", Err: err}
	}
	list := &listed{Builds: []records.Record{}, Next: page.Next, Complete: page.Complete && s.Elsewhere != nil, ID: q.opts.ID}
	for _, rec := range page.Builds {
		list.Builds = append(list.Builds, q.by.shown(rec))
	}
	return list, nil
}

// shown returns r as the signer may see it.
func (g signer) shown(r records.Record) records.Record {
	if !g.operator {
		r.Tenant = ""
	}
	if r.Running() {
		r.Duration = time.Since(r.Began).Seconds()
	}
	r.SetVerdict(reply.Bounded(r.Verdict()))
	return r
}

// told is a record with the excerpt of its log.
type told struct {
	Log []string `json:"log"`
	records.Record
}

// serveRecord tells of a build: 200 for a verdict, a success or a failure, and 202 while there is
// none.
func (s *Server) serveRecord(w http.ResponseWriter, r *http.Request) {
	q := s.ask(w, r, signedNeeds{operators: true}, "attempt")
	if q == nil {
		return
	}
	rec, err := s.find(q)
	if err != nil {
		s.refuse(w, q, err)
		return
	}
	t := told{[]string{}, q.by.shown(rec)}
	if !rec.Running() && rec.Lines > 0 && !q.by.operator {
		leave, err := turn(q, s.excerpts, q.by.reader(maxExcerpts), errExcerpts)
		if err != nil {
			s.refuse(w, q, err)
			return
		}
		defer leave()
		t.Log = s.excerpt(r.Context(), &rec)
	}
	s.answer(w, q, statusOf(&rec), t)
}

func statusOf(r *records.Record) int {
	if r.Running() {
		return http.StatusAccepted
	}
	return http.StatusOK
}

// find returns the record of the build that a question names. Its error is errNoBuild if there is
// none.
func (s *Server) find(q *question) (records.Record, error) {
	ref, err := s.ref(q)
	if err != nil {
		return records.Record{}, err
	}
	ctx, cancel := context.WithTimeout(q.r.Context(), readTimeout)
	defer cancel()
	rec, err := s.Records.Get(ctx, ref)
	if err != nil {
		return s.remembered(q, ref, err)
	}
	return rec, nil
}

// ref names the build of a question. An operator who names no tenant means the only one that has a
// build of that id.
func (s *Server) ref(q *question) (records.Ref, error) {
	ref := records.Ref{Tenant: q.by.owner(), ID: q.r.PathValue(segment)}
	if !validCallID(ref.ID) {
		return ref, errNoBuild
	}
	var err error
	if ref.Attempt, err = q.query.number("attempt", 1<<31-1); err != nil || !q.by.operator {
		return ref, err
	}
	if ref.Tenant = q.query.text("tenant"); ref.Tenant != "" {
		return ref, nil
	}
	ctx, cancel := context.WithTimeout(q.r.Context(), readTimeout)
	defer cancel()
	found, err := s.Records.Everywhere(ctx, ref.ID)
	switch {
	case errors.Is(err, records.ErrNotFound):
		return ref, errNoBuild
	case err != nil:
		return ref, err
	case len(found) > 1:
		return ref, &api.Error{Code: api.BadQuery, Msg: "several tenants have a build of this id: name one, by its id, with tenant="}
	}
	ref.Tenant = found[0].Tenant
	return ref, nil
}

// remembered asks the daemons for a build that the store does not know: another replica may have
// built it, or this one may have been restarted. err is the store's.
func (s *Server) remembered(q *question, ref records.Ref, err error) (records.Record, error) {
	if !errors.Is(err, records.ErrNotFound) && !errors.Is(err, records.ErrUnknown) {
		return records.Record{}, err
	}
	if q.by.operator || ref.Attempt != 0 {
		// A daemon is asked with the tenant, and knows only the latest attempt.
		if errors.Is(err, records.ErrNotFound) {
			err = errNoBuild
		}
		return records.Record{}, err
	}
	leave, busy := turn(q, s.finds, q.by.reader(maxFinds), errFinds)
	if busy != nil {
		return records.Record{}, busy
	}
	defer leave()
	ctx, cancel := context.WithTimeout(q.r.Context(), findTimeout)
	defer cancel()
	past, failure := s.Solver.Find(ctx, q.by.pool(), q.by.root.CallName(q.by.id(), q.by.ownKey(), ref.ID))
	switch {
	case failure != nil:
		return records.Record{}, failure
	case past != nil:
		return recordOf(past, ref.ID), nil
	case errors.Is(err, records.ErrUnknown):
		return records.Record{}, err
	}
	return records.Record{}, errNoBuild
}

// recordOf tells of a build that a daemon remembers.
func recordOf(p *solve.Past, id string) records.Record {
	verdict := api.Record{Status: api.Success, Image: p.Image, ImageName: p.Image}
	switch {
	case p.Running:
		verdict.Status = api.InProgress
	case p.Err != nil:
		verdict = failedRecord(api.AsError(p.Err), p.Image)
	}
	verdict.Digest = p.Outcome.Digest
	rec := records.Record{ID: id, Began: p.Began, Ended: p.Ended, Queued: true}
	if !p.Running {
		verdict.Duration = p.Ended.Sub(p.Began).Seconds()
	}
	rec.SetVerdict(verdict)
	return rec
}

// serveStop ends a build: 202 when its replica has been told, 200 if it had ended.
func (s *Server) serveStop(w http.ResponseWriter, r *http.Request) {
	q := s.ask(w, r, signedNeeds{timestamp: true, operators: true}, "attempt")
	if q == nil {
		return
	}
	rec, err := s.stopBuild(q)
	if err != nil {
		s.refuse(w, q, err)
		return
	}
	s.answer(w, q, statusOf(&rec), q.by.shown(rec))
}

func (s *Server) stopBuild(q *question) (records.Record, error) {
	ref, err := s.ref(q)
	if err != nil {
		return records.Record{}, err
	}
	ctx, cancel := context.WithTimeout(q.r.Context(), cancelTimeout)
	defer cancel()
	rec, err := s.Records.Cancel(ctx, records.Cancellation{Ref: ref, By: q.by.name(), Once: once(q.r)})
	switch {
	case err == nil:
		return rec, nil
	case errors.Is(err, records.ErrUsed):
		return rec, errReplayed
	case errors.Is(err, records.ErrOwnerUnreachable):
		return rec, &api.Error{Code: errOwner.Code, Msg: errOwner.Msg, Err: err}
	}
	rec, err = s.remembered(q, ref, err)
	if err == nil && rec.Running() {
		// Only a daemon knows the build, and does not know which replica runs it.
		return rec, errOwner
	}
	return rec, err
}

// once is a Cancellation.Once: the value of the signature, however it is written. Without HMAC it is
// empty.
func once(r *http.Request) string {
	mac, err := signature.Parse(r.Header.Values(api.SignatureHeader))
	if err != nil {
		return ""
	}
	return hex.EncodeToString(mac[:])
}

// name is who asks for a build's end, in its record. It is never empty.
func (g signer) name() string {
	switch {
	case g.operator:
		return "operator/" + g.key.ID
	case g.file():
		return g.tenant.ID + "/" + g.key.ID
	}
	return g.id()
}
