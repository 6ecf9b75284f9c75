package server_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"handler/function/api"
	"handler/function/records"
	"handler/function/server"
	"handler/function/signature"
	"handler/function/solve"
)

// later makes the timestamps of such requests differ, and with them their signatures.
var later atomic.Int64

// asking is a request without a body, with a timestamp and further headers.
func (f *fixture) asking(t testing.TB, key, method, target string, headers ...string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, f.URL+target, nil)
	if err != nil {
		t.Fatal(err)
	}
	stamp := strconv.FormatInt(time.Now().Unix()-100+later.Add(1)%200, 10)
	r.Header.Set(api.TimestampHeader, stamp)
	r.Header.Set(api.SignatureHeader, signature.Sign([]byte(key), signature.Timestamp(stamp), []byte(method+" "+target)))
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	return r
}

// seen is a record as a client reads it.
type seen struct {
	Log        []string
	Tenant     string
	ID         string
	Attempt    int
	Image      string
	ImageName  string
	Status     api.Status
	Code       api.Code
	Error      string
	Warnings   []string
	Digest     string
	Duration   float64
	Request    string
	Began      time.Time
	Ended      time.Time
	Lines      uint64
	Queued     bool
	CanceledBy string
}

type seenList struct {
	Builds   []seen
	Next     string
	Complete *bool
	ID       string
}

func decode[T any](t testing.TB, a answer) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(a.body), &v); err != nil {
		t.Fatalf("%v in %d %s", err, a.status, a.body)
	}
	return v
}

// record asks for the record of a build.
func (f *fixture) record(t testing.TB, key, id string) (int, seen) {
	t.Helper()
	a := f.do(t, f.asking(t, key, "GET", "/builds/"+id))
	return a.status, decode[seen](t, a)
}

func (f *fixture) ids(t testing.TB, key, query string) (ids []string, next string) {
	t.Helper()
	a := f.do(t, f.asking(t, key, "GET", "/builds"+query))
	if a.status != 200 {
		t.Fatalf("%q: %d %s", query, a.status, a.body)
	}
	list := decode[seenList](t, a)
	for _, b := range list.Builds {
		ids = append(ids, b.ID)
	}
	return ids, list.Next
}

// TestBuildsRoutes tries what is wrong with a request about builds.
func TestBuildsRoutes(t *testing.T) {
	solver, started, release := speaking()
	f := start(t, solver, nil)
	sent := f.deliver(t, "call", pack(t, config))
	<-started
	for _, tt := range []struct {
		method, target string
		status         int
		code           api.Code
	}{
		{"GET", "/builds", 200, ""},
		{"HEAD", "/builds", 200, ""},
		{"GET", "/builds?", 200, ""},
		{"GET", "/builds?limit=200&status=failed&image=a%2Fb", 200, ""},
		{"GET", "/builds?limit=0", 400, api.BadQuery},
		{"GET", "/builds?limit=201", 400, api.BadQuery},
		{"GET", "/builds?limit=ten", 400, api.BadQuery},
		{"GET", "/builds?status=failure", 400, api.BadQuery},
		{"GET", "/builds?before=x", 400, api.BadQuery},
		{"GET", "/builds?status=failed&status=success", 400, api.BadQuery},
		{"GET", "/builds?page=2", 400, api.BadQuery},
		{"GET", "/builds?tenant=default", 400, api.BadQuery},
		{"GET", "/builds?limit=1;status=failed", 400, api.BadQuery},
		{"GET", "/builds?image=%zz", 400, api.BadQuery},
		{"POST", "/builds", 405, api.MethodNotAllowed},
		{"GET", "/builds/", 404, api.NotFound},
		{"GET", "/builds/none", 404, api.NotFound},
		{"GET", "/builds/call?attempt=1", 202, ""},
		{"GET", "/builds/call?attempt=2", 404, api.NotFound},
		{"GET", "/builds/call?attempt=0", 400, api.BadQuery},
		{"GET", "/builds/call?after=1", 400, api.BadQuery},
		{"HEAD", "/builds/call", 202, ""},
		{"PUT", "/builds/call", 405, api.MethodNotAllowed},
		{"DELETE", "/builds/none", 404, api.NotFound},
		{"DELETE", "/builds/call?attempt=2", 404, api.NotFound},
		{"DELETE", "/builds/call?attempt=-1", 400, api.BadQuery},
		{"DELETE", "/builds/call?force=1", 400, api.BadQuery},
		{"GET", "/builds/call/log", 200, ""},
		{"GET", "/builds/call/log?attempt=2", 404, api.NotFound},
		{"GET", "/builds/none/log", 404, api.NotFound},
		{"GET", "/builds/none/log?follow=1", 404, api.NotFound},
		{"GET", "/builds/call/log?follow=yes", 400, api.BadQuery},
		{"GET", "/builds/call/log?after=x", 400, api.BadQuery},
		{"GET", "/builds/call/log?after=-1", 400, api.BadQuery},
		{"GET", "/builds/call/log/", 404, api.NotFound},
		{"GET", "/builds//log", 404, api.NotFound},
		{"GET", "/builds/call/logs", 404, api.NotFound},
		{"DELETE", "/builds/call/log", 405, api.MethodNotAllowed},
	} {
		a := f.do(t, f.asking(t, secret, tt.method, tt.target))
		if a.status != tt.status || a.rec.Code != tt.code && tt.method != "HEAD" {
			t.Errorf("%s %s: %d %s", tt.method, tt.target, a.status, a.body)
		}
		// Whoever asks is not asked for a signature when the route is not there.
		routed := tt.code != api.MethodNotAllowed && (tt.code != api.NotFound || !strings.Contains(tt.target, "//") && !strings.HasSuffix(tt.target, "/") && !strings.HasSuffix(tt.target, "logs"))
		stream := strings.HasPrefix(a.header.Get("Content-Type"), api.NDJSONType)
		if tt.method != "HEAD" && (a.header.Get(api.SignatureHeader) != "") != (routed && !stream) {
			t.Errorf("%s %s: signed %q", tt.method, tt.target, a.header.Get(api.SignatureHeader))
		}
		if !routed {
			continue
		}
		if a := f.do(t, f.asking(t, "another key of the same length", tt.method, tt.target)); a.status != 401 {
			t.Errorf("%s %s with another key: %d", tt.method, tt.target, a.status)
		}
		r := f.asking(t, secret, tt.method, tt.target)
		r.Header.Del(api.TimestampHeader)
		r.Header.Set(api.SignatureHeader, signature.Sign([]byte(secret), "", []byte(tt.method+" "+tt.target)))
		want := 401
		if strings.HasPrefix(tt.target, "/builds/call") && !strings.Contains(tt.target, "log") && tt.method != "DELETE" || tt.target == "/builds/none" && tt.method == "GET" {
			want = tt.status // a record needs no timestamp
		}
		if a := f.do(t, r); a.status != want {
			t.Errorf("%s %s without a timestamp: %d %s", tt.method, tt.target, a.status, a.body)
		}
	}
	close(release)
	if a := <-sent; a.status != 200 {
		t.Errorf("the build ended with %d %s", a.status, a.body)
	}
}

// TestRecord follows the record of builds of every kind.
func TestRecord(t *testing.T) {
	solver, started, release := speaking()
	f := start(t, solver, func(c *server.Config) { c.MaxBuilds = 1 })
	before := time.Now().Add(-time.Second)
	body := pack(t, config)
	direct := make(chan answer, 1)
	go func() { direct <- f.do(t, f.request(t, body, api.CallIDHeader, "direct")) }()
	<-started
	queued := f.deliver(t, "queued", pack(t, config, "context/x", "y"))
	eventually(t, "the second waits", func() bool {
		status, _ := f.record(t, secret, "queued")
		return status == 202
	})
	status, rec := f.record(t, secret, "direct")
	if status != 202 || rec.Status != api.InProgress || rec.Attempt != 1 || rec.Queued || rec.Image != "ghcr.io/acme/app:v1" || rec.ImageName != rec.Image ||
		rec.Began.Before(before) || !rec.Ended.IsZero() || rec.Lines != 1 || rec.Duration <= 0 || rec.Tenant != "" || len(rec.Log) != 0 {
		t.Errorf("while it runs: %d %+v", status, rec)
	}
	if _, rec := f.record(t, secret, "queued"); !rec.Queued || rec.Lines != 0 || rec.Request == "" {
		t.Errorf("while it waits: %+v", rec)
	}
	close(release)
	first := <-direct
	<-queued
	a := f.do(t, f.asking(t, secret, "GET", "/builds/direct"))
	rec = decode[seen](t, a)
	if a.status != 200 || rec.Status != api.Success || rec.Digest != first.rec.Digest || rec.Request != first.rec.Request || rec.Ended.Before(rec.Began) ||
		rec.Lines != 2 || !slices.Equal(rec.Log, first.rec.Log) || rec.Duration <= 0 || rec.Attempt != 1 || strings.Contains(a.body, `"tenant"`) {
		t.Errorf("after the end: %d %s", a.status, a.body)
	}

	// The same id again is another attempt.
	solver.solve = func(context.Context, *solve.Request, solve.Log) (solve.Outcome, solve.Stats, error) {
		return solve.Outcome{}, solve.Stats{}, &api.Error{Code: api.BuildFailed, Msg: "exit code 1"}
	}
	f.do(t, f.request(t, body, api.CallIDHeader, "direct"))
	if status, rec := f.record(t, secret, "direct"); status != 200 || rec.Attempt != 2 || rec.Code != api.BuildFailed || rec.Error != "exit code 1" || rec.Digest != "" {
		t.Errorf("the second attempt: %d %+v", status, rec)
	}
	if status, rec := f.record(t, secret, "direct?attempt=1"); status != 200 || rec.Attempt != 1 || rec.Status != api.Success {
		t.Errorf("the first attempt: %d %+v", status, rec)
	}

	// A build that never begins has a record, and so has one whose verdict is a defect.
	f.do(t, f.request(t, pack(t, `{"image":7}`), api.CallIDHeader, "bad"))
	solver.solve = func(context.Context, *solve.Request, solve.Log) (solve.Outcome, solve.Stats, error) {
		panic("a defect")
	}
	f.do(t, f.request(t, body, api.CallIDHeader, "panic"))
	for id, code := range map[string]api.Code{"bad": api.BadConfig, "panic": api.Internal} {
		if status, rec := f.record(t, secret, id); status != 200 || rec.Code != code || strings.Contains(rec.Error, "defect") && code == api.BadConfig {
			t.Errorf("%s: %d %+v", id, status, rec)
		}
	}
	// What is refused before it is a build has none.
	f.do(t, f.request(t, body, api.CallIDHeader, "unsigned", api.SignatureHeader, "x"))
	if status, _ := f.record(t, secret, "unsigned"); status != 404 {
		t.Errorf("of an unsigned request: %d", status)
	}
}

// TestRecordHidesArguments has a build fail at a step that names a build argument. Its caller is told
// the step as BuildKit names it, and its record has no value of the argument.
func TestRecordHidesArguments(t *testing.T) {
	const value = "value-of-an-argument"
	f := start(t, &scripted{solve: func(context.Context, *solve.Request, solve.Log) (solve.Outcome, solve.Stats, error) {
		warned := solve.Outcome{Warnings: []string{"FROM " + value + " is old"}}
		return warned, solve.Stats{}, &api.Error{Code: api.BuildFailed, Msg: "[2/2] RUN make " + value + ": exit code 2, debug=on"}
	}}, nil)
	a := <-f.deliver(t, "failed", pack(t, `{"image":"ghcr.io/acme/app:v1","buildArgs":{"TOKEN":"`+value+`","DEBUG":"on"}}`))
	if a.status != 422 || !strings.Contains(a.rec.Error, value) || len(a.rec.Warnings) != 1 || !strings.Contains(a.rec.Warnings[0], value) {
		t.Errorf("its caller was told: %d %s", a.status, a.body)
	}
	if _, rec := f.record(t, secret, "failed"); rec.Error != "[2/2] RUN make ***: exit code 2, debug=on" || !slices.Equal(rec.Warnings, []string{"FROM *** is old"}) {
		t.Errorf("the record has the error %q and the warnings %q", rec.Error, rec.Warnings)
	}
}

func TestList(t *testing.T) {
	f := start(t, &scripted{}, nil)
	f.solver.solve = func(_ context.Context, req *solve.Request, _ solve.Log) (solve.Outcome, solve.Stats, error) {
		if req.Config.Image == "ghcr.io/acme/bad:v1" {
			return solve.Outcome{}, solve.Stats{}, &api.Error{Code: api.BuildFailed, Msg: "exit code 1"}
		}
		return solve.Outcome{Digest: "sha256:abc"}, solve.Stats{}, nil
	}
	var all []string
	for i := range 60 {
		image := []string{"ghcr.io/acme/app:v1", "ghcr.io/acme/app2:v1", "ghcr.io/acme/bad:v1"}[i%3]
		id := fmt.Sprintf("call-%02d", i)
		f.do(t, f.request(t, pack(t, fmt.Sprintf(`{"image":%q}`, image)), api.CallIDHeader, id))
		all = append(all, id)
	}
	slices.Reverse(all)
	if got, next := f.ids(t, secret, ""); !slices.Equal(got, all[:50]) || next == "" {
		t.Errorf("the first page is %q, next %q", got, next)
	} else if got, next := f.ids(t, secret, "?before="+next); !slices.Equal(got, all[50:]) || next != "" {
		t.Errorf("the second page is %q, next %q", got, next)
	}
	var paged []string
	for next := ""; ; {
		var ids []string
		if ids, next = f.ids(t, secret, "?limit=7&before="+next); len(ids) > 7 {
			t.Errorf("a page of %d", len(ids))
		}
		if paged = append(paged, ids...); next == "" {
			break
		}
	}
	if !slices.Equal(paged, all) {
		t.Errorf("by pages: %q", paged)
	}
	for query, want := range map[string]int{"status=failed": 20, "status=success": 40, "status=in_progress": 0, "image=ghcr.io/acme/app": 20, "image=ghcr.io/acme/app:v1": 20, "image=ghcr.io/acme/app:v2": 0, "image=ghcr.io/acme": 0, "image=ghcr.io/acme/bad&status=success": 0} {
		if got, _ := f.ids(t, secret, "?limit=200&"+query); len(got) != want {
			t.Errorf("%s: %d builds, want %d", query, len(got), want)
		}
	}
	r := f.asking(t, secret, "GET", "/builds?limit=1", api.CallIDHeader, "asked")
	a := f.do(t, r)
	list := decode[seenList](t, a)
	if a.header.Get(api.SignatureHeader) != signature.Sign([]byte(secret), signature.Timestamp(a.header.Get(api.TimestampHeader)), []byte(a.body)) || list.ID != "asked" ||
		list.Complete == nil || *list.Complete || strings.Contains(a.body, `"log"`) || strings.Contains(a.body, `"tenant"`) || !strings.HasPrefix(a.body, "{\n") {
		t.Errorf("%v %s", a.header, a.body)
	}
	shared := start(t, &scripted{}, func(c *server.Config) { c.Elsewhere = func() records.Load { return records.Load{} } })
	if a := shared.do(t, shared.asking(t, secret, "GET", "/builds")); !strings.Contains(a.body, `"complete": true`) || !strings.Contains(a.body, `"builds": []`) {
		t.Errorf("with a store of all replicas: %s", a.body)
	}
}

// TestKeysOfOne: without a file of tenants each key has its own builds.
func TestKeysOfOne(t *testing.T) {
	const another = "another-payload-secret"
	f := start(t, &scripted{}, func(c *server.Config) {
		c.PayloadSecret = func() ([]byte, error) { return []byte(secret + "\n" + another), nil }
	})
	f.do(t, f.request(t, pack(t, config), api.CallIDHeader, "call"))
	for key, want := range map[string]int{secret: 1, another: 0, secret + "\n" + another: 0} {
		if ids, _ := f.ids(t, key, ""); len(ids) != want {
			t.Errorf("key %q lists %q", key, ids)
		}
		status := 200
		if want == 0 {
			status = 404
		}
		for _, r := range []*http.Request{f.asking(t, key, "GET", "/builds/call"), f.asking(t, key, "DELETE", "/builds/call"), f.asking(t, key, "GET", "/builds/call/log")} {
			if a := f.do(t, r); a.status != status {
				t.Errorf("key %q: %s %s: %d %s", key, r.Method, r.URL.Path, a.status, a.body)
			}
		}
	}
}

// TestBuildsWithoutHMAC: where nobody signs, anybody sees and stops all builds.
func TestBuildsWithoutHMAC(t *testing.T) {
	solver, started, _ := speaking()
	f := start(t, solver, func(c *server.Config) { c.DisableHMAC, c.FallbackSecret = true, []byte("x") })
	sent := f.deliver(t, "call", pack(t, config))
	<-started
	ask := func(method, target string, status int) {
		t.Helper()
		r, _ := http.NewRequestWithContext(t.Context(), method, f.URL+target, nil)
		if a := f.do(t, r); a.status != status || a.header.Get(api.SignatureHeader) != "" {
			t.Errorf("%s %s: %d %s", method, target, a.status, a.body)
		}
	}
	ask("GET", "/builds", 200)
	ask("GET", "/builds/call", 202)
	ask("GET", "/builds/call/log", 200)
	ask("DELETE", "/builds/call", 202)
	<-sent
	ask("DELETE", "/builds/call", 200)
	if _, rec := f.record(t, secret, "call"); rec.Code != api.Canceled || rec.CanceledBy != "default" {
		t.Errorf("stopped: %+v", rec)
	}
}

// operator is an entry after which the file has an operator's key.
func operator(entry string) string {
	return entry + fmt.Sprintf("\noperator: {keys: [{id: ops, secret: %q}, {id: old, secret: %q, until: 2020-01-31T00:00:00Z}]}", opsKey, oldOpsKey)
}

const (
	opsKey    = "the key of the operator"
	oldOpsKey = "the old key of the operator"
)

// TestTenantsBuilds has two tenants and an operator: who sees, follows and stops what.
func TestTenantsBuilds(t *testing.T) {
	for name, entries := range map[string][]string{"few keys": {tenant("acme", ""), operator(tenant("globex", ""))}, "many keys": many(operator(tenant("last", "")))} {
		t.Run(name, func(t *testing.T) { testTenantsBuilds(t, entries) })
	}
}

func testTenantsBuilds(t *testing.T, entries []string) {
	solver, started, release := speaking()
	f, all := startTenants(t, solver, entries, func(c *server.Config) { c.MaxBuilds = 10 })
	run := func(tenant, id string) <-chan answer {
		sent := make(chan answer, 1)
		go func() { sent <- f.do(t, f.as(t, tenant, pack(t, imageOf(tenant)), api.CallIDHeader, id)) }()
		<-started
		return sent
	}
	shared, own, others := run("acme", "shared"), run("acme", "own"), run("globex", "shared")
	named := func(tenant, method, target string) *http.Request {
		return f.asking(t, keyOf(tenant), method, target, api.TenantHeader, tenant)
	}
	ops := func(method, target string) *http.Request { return f.asking(t, opsKey, method, target) }

	for tenant, want := range map[string][]string{"acme": {"own", "shared"}, "globex": {"shared"}} {
		a := f.do(t, named(tenant, "GET", "/builds"))
		list := decode[seenList](t, a)
		for i, b := range list.Builds {
			if b.Tenant != "" || i >= len(want) || b.ID != want[i] || !strings.HasPrefix(b.Image, "ghcr.io/"+tenant) {
				t.Errorf("%s lists %+v", tenant, b)
			}
		}
		if len(list.Builds) != len(want) {
			t.Errorf("%s lists %s", tenant, a.body)
		}
	}
	for _, r := range []*http.Request{named("globex", "GET", "/builds/own"), named("globex", "GET", "/builds/own/log"), named("globex", "GET", "/builds/own/log?follow=1"), named("globex", "DELETE", "/builds/own")} {
		if a := f.do(t, r); a.status != 404 || same(a.body) != same(f.do(t, named("globex", r.Method, "/builds/none")).body) {
			t.Errorf("%s %s of another: %d %s", r.Method, r.URL, a.status, a.body)
		}
	}

	// The operator lists, reads and stops, and names a tenant where the id is not enough.
	list := decode[seenList](t, f.do(t, ops("GET", "/builds")))
	if len(list.Builds) != 3 || list.Builds[0].Tenant != "t-globex" || list.Builds[1].Tenant != "t-acme" {
		t.Errorf("the operator lists %+v", list.Builds)
	}
	for target, status := range map[string]int{
		"/builds/own": 202, "/builds/none": 404, "/builds/shared": 400, "/builds/shared?tenant=t-globex": 202, "/builds/own?tenant=t-globex": 404,
		"/builds?tenant=t-globex": 200, "/builds/own?attempt=1": 202, "/builds/own?attempt=2": 404,
	} {
		if a := f.do(t, ops("GET", target)); a.status != status || !strings.Contains(target, "?") && status == 202 && decode[seen](t, a).Tenant != "t-acme" {
			t.Errorf("the operator: %s: %d %s", target, a.status, a.body)
		}
	}
	if list := decode[seenList](t, f.do(t, ops("GET", "/builds?tenant=t-globex"))); len(list.Builds) != 1 || list.Builds[0].Tenant != "t-globex" {
		t.Errorf("the operator lists a tenant's: %+v", list.Builds)
	}
	// Nothing else, and nobody with a key that has ended.
	body := pack(t, imageOf("acme"))
	stolen := f.request(t, body, api.SignatureHeader, signature.Sign([]byte(opsKey), "", body))
	for _, r := range []*http.Request{
		stolen, ops("GET", "/builds/own/log"), ops("GET", "/builds/own/log?follow=1"), ops("HEAD", "/contexts/"+digestOf(nil)),
		f.asking(t, oldOpsKey, "GET", "/builds"), f.asking(t, oldOpsKey, "DELETE", "/builds/own"), f.asking(t, secret, "GET", "/builds"),
	} {
		if a := f.do(t, r); a.status != 401 || a.header.Get(api.SignatureHeader) != "" {
			t.Errorf("%s %s: %d %s", r.Method, r.URL, a.status, a.body)
		}
	}
	a := f.do(t, ops("DELETE", "/builds/shared?tenant=t-globex"))
	if a.status != 202 || a.header.Get(api.SignatureHeader) != signature.Sign([]byte(opsKey), signature.Timestamp(a.header.Get(api.TimestampHeader)), []byte(a.body)) {
		t.Errorf("the operator stops: %d %s", a.status, a.body)
	}
	if a := <-others; a.status != 409 || a.rec.Code != api.Canceled {
		t.Errorf("stopped by the operator: %d %s", a.status, a.body)
	}
	if rec := decode[seen](t, f.do(t, named("globex", "GET", "/builds/shared"))); rec.CanceledBy != "operator/ops" {
		t.Errorf("who has stopped it: %+v", rec)
	}
	if a := f.do(t, named("acme", "DELETE", "/builds/own")); a.status != 202 || decode[seen](t, a).CanceledBy != "t-acme/k1" {
		t.Errorf("acme stops: %d %s", a.status, a.body)
	}
	if a := <-own; a.status != 409 {
		t.Errorf("stopped by its tenant: %d %s", a.status, a.body)
	}
	close(release)
	if a := <-shared; a.status != 200 {
		t.Errorf("the build that nobody has stopped: %d %s", a.status, a.body)
	}

	all.write(t, tenant("acme", "suspended: true,"), operator(tenant("globex", "")))
	for _, r := range []*http.Request{named("acme", "GET", "/builds"), named("acme", "GET", "/builds/own"), named("acme", "GET", "/builds/own/log"), named("acme", "DELETE", "/builds/own")} {
		if a := f.do(t, r); a.status != 403 || a.rec.Code != api.Suspended {
			t.Errorf("suspended: %s %s: %d %s", r.Method, r.URL, a.status, a.body)
		}
	}
	if a := f.do(t, ops("GET", "/builds/own")); a.status != 200 || len(decode[seen](t, a).Log) != 0 || decode[seen](t, a).Lines == 0 {
		t.Errorf("the operator reads an ended build without its log: %d %s", a.status, a.body)
	}
}

// unreachable is a store that cannot be asked, and takes what it is given.
type unreachable struct {
	records.Store
	err error
}

func (u unreachable) Get(context.Context, records.Ref) (records.Record, error) {
	time.Sleep(50 * time.Millisecond) // an answer in events begins sooner
	return records.Record{}, u.err
}
func (u unreachable) Find(context.Context, string, string, string) (records.Record, error) {
	return records.Record{}, u.err
}
func (u unreachable) Everywhere(context.Context, string) ([]records.Record, error) { return nil, u.err }
func (u unreachable) Cancel(context.Context, records.Cancellation) (records.Record, error) {
	return records.Record{}, u.err
}
func (u unreachable) Follow(context.Context, records.Ref, uint64, bool) iter.Seq2[records.Line, error] {
	return func(yield func(records.Line, error) bool) { yield(records.Line{}, u.err) }
}

// TestUnreachableStore: what cannot be known now is 503, and builds go on.
func TestUnreachableStore(t *testing.T) {
	for _, tt := range []struct {
		err          error
		past         *solve.Past
		get, stop    int
		code, stopBy api.Code
	}{
		{records.ErrUnknown, nil, 503, 503, api.RecordsUnreachable, api.RecordsUnreachable},
		{records.ErrUnknown, &solve.Past{Running: true, Began: time.Now()}, 202, 503, "", api.OwnerUnreachable},
		{records.ErrUnknown, &solve.Past{Began: time.Now(), Ended: time.Now()}, 200, 200, "", ""},
		{records.ErrNotFound, nil, 404, 404, api.NotFound, api.NotFound},
		{records.ErrNotFound, &solve.Past{Running: true, Began: time.Now()}, 202, 503, "", api.OwnerUnreachable},
		{records.ErrOwnerUnreachable, nil, 500, 503, api.Internal, api.OwnerUnreachable},
		{records.ErrUsed, nil, 500, 401, api.Internal, api.Unauthorized},
		{errors.New("a defect"), nil, 500, 500, api.Internal, api.Internal},
	} {
		f := start(t, &scripted{find: func(string, string) (*solve.Past, error) { return tt.past, nil }}, func(c *server.Config) { c.Records = unreachable{c.Records, tt.err} })
		if a := <-f.deliver(t, "call", pack(t, config)); a.status != 200 {
			t.Errorf("%v: a build: %d %s", tt.err, a.status, a.body)
		}
		if a := f.do(t, f.asking(t, secret, "GET", "/builds/call")); a.status != tt.get || a.rec.Code != tt.code {
			t.Errorf("%v: the record: %d %s", tt.err, a.status, a.body)
		}
		if a := f.do(t, f.asking(t, secret, "DELETE", "/builds/call")); a.status != tt.stop || a.rec.Code != tt.stopBy {
			t.Errorf("%v: DELETE: %d %s", tt.err, a.status, a.body)
		}
		want := tt.get
		if tt.past != nil {
			want = map[error]int{records.ErrUnknown: 503, records.ErrNotFound: 404}[tt.err] // a daemon has no log
		}
		for _, accept := range []string{"", api.SSEType} {
			if a := f.do(t, f.asking(t, secret, "GET", "/builds/call/log?follow=1", "Accept", accept)); a.status != want {
				t.Errorf("%v: the log as %q: %d %s", tt.err, accept, a.status, a.body)
			}
		}
	}
}

// held is a store whose lists and logs wait.
type held struct {
	records.Store
	asked   chan string // has the tenant of each
	release chan struct{}
}

func (h *held) List(ctx context.Context, q records.Query) (records.Page, error) {
	h.asked <- q.Tenant
	select {
	case <-h.release:
	case <-ctx.Done():
	}
	return h.Store.List(ctx, q)
}

func (h *held) Follow(ctx context.Context, ref records.Ref, after uint64, wait bool) iter.Seq2[records.Line, error] {
	return func(yield func(records.Line, error) bool) {
		h.asked <- ref.Tenant
		<-h.release
		h.Store.Follow(ctx, ref, after, wait)(yield)
	}
}

// background sends a request in a goroutine, and wants a status.
func (f *fixture) background(t *testing.T, wg *sync.WaitGroup, r *http.Request, status int) {
	wg.Go(func() {
		if a := f.do(t, r); a.status != status {
			t.Errorf("%s for %q: %d %s, want %d", r.URL.Path, r.Header.Get(api.TenantHeader), a.status, a.body, status)
		}
	})
}

// TestExcerptsAreShared: while a tenant has as many logs read for records as it may, another
// tenant's record does not wait, and the tenant's own next one waits for its turn.
func TestExcerptsAreShared(t *testing.T) {
	const most = 8 // of a replica; a tenant has half of them
	h := &held{asked: make(chan string, 100), release: make(chan struct{})}
	solver := &scripted{solve: func(_ context.Context, _ *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error) {
		log("one")
		return solve.Outcome{Digest: "sha256:abc"}, solve.Stats{}, nil
	}}
	f, _ := startTenants(t, solver, []string{tenant("acme", ""), tenant("globex", "")}, func(c *server.Config) {
		h.Store, c.Records = c.Records, h
	})
	var wg sync.WaitGroup
	read := func(name string) {
		r := f.asking(t, keyOf(name), "GET", "/builds/call", api.TenantHeader, name)
		wg.Go(func() {
			if a := f.do(t, r); a.status != 200 || !slices.Equal(decode[seen](t, a).Log, []string{"one"}) {
				t.Errorf("a record of %s: %d %s", name, a.status, a.body)
			}
		})
	}
	for _, name := range []string{"acme", "globex"} {
		f.do(t, f.as(t, name, pack(t, imageOf(name)), api.CallIDHeader, "call"))
	}
	for range most {
		read("acme")
	}
	for range most / 2 {
		if name := <-h.asked; name != "t-acme" {
			t.Errorf("a log of %s is read", name)
		}
	}
	read("globex")
	if name := <-h.asked; name != "t-globex" {
		t.Errorf("the next log is of %s", name)
	}
	close(h.release)
	wg.Wait()
}

// TestListsAreShared: while many lists of one tenant are wanted and each takes long, another
// tenant's list does not wait for them.
func TestListsAreShared(t *testing.T) {
	h := &held{asked: make(chan string, 100), release: make(chan struct{})}
	f, _ := startTenants(t, &scripted{}, []string{tenant("acme", ""), tenant("globex", "")}, func(c *server.Config) {
		h.Store, c.Records = c.Records, h
	})
	var wg sync.WaitGroup
	list := func(name string) {
		f.background(t, &wg, f.asking(t, keyOf(name), "GET", "/builds", api.TenantHeader, name), 200)
	}
	for range 10 {
		list("acme")
	}
	first := <-h.asked
	list("globex")
	if second := <-h.asked; first != "t-acme" || second != "t-globex" {
		t.Errorf("made at once: the lists of %s and %s", first, second)
	}
	select {
	case third := <-h.asked:
		t.Errorf("made at once too: a list of %s", third)
	case <-time.After(100 * time.Millisecond):
	}
	close(h.release)
	wg.Wait()
}

// TestListsOfOperators: the operators have half of the lists at once. Another tenant's does not wait.
func TestListsOfOperators(t *testing.T) {
	h := &held{asked: make(chan string, 100), release: make(chan struct{})}
	f, _ := startTenants(t, &scripted{}, []string{operator(tenant("acme", ""))}, func(c *server.Config) {
		h.Store, c.Records = c.Records, h
	})
	var wg sync.WaitGroup
	for range 10 {
		f.background(t, &wg, f.asking(t, opsKey, "GET", "/builds"), 200)
	}
	for range 2 {
		if of := <-h.asked; of != "" {
			t.Errorf("made at once: a list of %s", of)
		}
	}
	select {
	case <-h.asked:
		t.Error("the operators have a third list made at once")
	case <-time.After(100 * time.Millisecond):
	}
	f.background(t, &wg, f.asking(t, keyOf("acme"), "GET", "/builds", api.TenantHeader, "acme"), 200)
	if of := <-h.asked; of != "t-acme" {
		t.Errorf("made at once too: a list of %q", of)
	}
	close(h.release)
	wg.Wait()
}

// untaken is the answer to a client that takes nothing until it is released.
type untaken struct {
	*httptest.ResponseRecorder
	release chan struct{}
}

func (s *untaken) Write(p []byte) (int, error) {
	<-s.release
	return s.ResponseRecorder.Write(p)
}

// TestSlowAnswers: an answer with a log, or a list, keeps its place until its client has taken it.
// Otherwise answers that nobody takes would have no bound.
func TestSlowAnswers(t *testing.T) {
	for _, tt := range []struct {
		path string
		most int // of a tenant
	}{{"/builds/call", 4}, {"/builds", 1}} {
		t.Run(tt.path, func(t *testing.T) {
			h := &held{asked: make(chan string, 100), release: make(chan struct{})}
			close(h.release)
			solver := &scripted{solve: func(_ context.Context, _ *solve.Request, log solve.Log) (solve.Outcome, solve.Stats, error) {
				log("one")
				return solve.Outcome{Digest: "sha256:abc"}, solve.Stats{}, nil
			}}
			f, _ := startTenants(t, solver, []string{tenant("acme", "")}, func(c *server.Config) {
				h.Store, c.Records = c.Records, h
			})
			f.do(t, f.as(t, "acme", pack(t, imageOf("acme")), api.CallIDHeader, "call"))
			release := make(chan struct{})
			var wg sync.WaitGroup
			ask := func() {
				r := f.asking(t, keyOf("acme"), "GET", tt.path, api.TenantHeader, "acme")
				w := &untaken{httptest.NewRecorder(), release}
				wg.Go(func() {
					if f.s.ServeHTTP(w, r); w.Code != 200 {
						t.Errorf("%d %s", w.Code, w.Body)
					}
				})
			}
			for range tt.most {
				ask()
				<-h.asked
			}
			ask()
			select {
			case <-h.asked:
				t.Error("one more is read")
				close(release)
			case <-time.After(100 * time.Millisecond):
				close(release)
				<-h.asked
			}
			wg.Wait()
		})
	}
}

// TestBodyThatNeverComes: a request that needs no body is answered soon, and its connection ends.
func TestBodyThatNeverComes(t *testing.T) {
	f := start(t, &scripted{}, nil)
	down := start(t, &scripted{}, nil)
	down.s.Shutdown()
	for _, tt := range []struct {
		f                  *fixture
		method, path, want string
	}{
		{f, "GET", "/healthz", "200"}, {f, "GET", "/", "200"}, {f, "GET", "/builds", "401"},
		{f, "GET", "/builds/x", "401"}, {f, "DELETE", "/builds/x", "401"}, {f, "POST", "/nothing", "404"}, {f, "PUT", "/build", "405"},
		{f, "HEAD", "/contexts/sha256:1", "401"}, {down, "POST", "/build", "503"}, {down, "PUT", "/contexts/sha256:1", "503"},
	} {
		t.Run(tt.method+" "+tt.path, func(t *testing.T) {
			t.Parallel()
			conn, err := net.Dial("tcp", strings.TrimPrefix(tt.f.URL, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(time.Minute))
			fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n", tt.method, tt.path)
			answer, err := io.ReadAll(conn)
			if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 "+tt.want) {
				t.Errorf("%q, %v", answer, err)
			}
		})
	}
}

// TestFindsAreShared: while a tenant has the daemons asked for as many builds as it may, another
// tenant's question does not wait.
func TestFindsAreShared(t *testing.T) {
	const most = 4 // of a replica; a tenant has half of them
	asked, release := make(chan string, 100), make(chan struct{})
	solver := &scripted{find: func(_, call string) (*solve.Past, error) {
		asked <- call
		<-release
		return nil, nil
	}}
	f, _ := startTenants(t, solver, []string{tenant("acme", ""), tenant("globex", "")}, nil)
	var wg sync.WaitGroup
	ask := func(name string) {
		f.background(t, &wg, f.asking(t, keyOf(name), "GET", "/builds/none", api.TenantHeader, name), 404)
	}
	for range most {
		ask("acme")
	}
	first := <-asked
	for range most/2 - 1 {
		<-asked
	}
	ask("globex")
	if next := <-asked; next == first {
		t.Error("the tenant has more than half")
	}
	close(release)
	wg.Wait()
}

// TestExpectContinue: a client that asks before it sends is not told to send what nobody reads.
func TestExpectContinue(t *testing.T) {
	f := start(t, &scripted{}, nil)
	f.s.Shutdown()
	for line, want := range map[string]string{"POST /nothing": "404", "PUT /build": "405", "POST /build": "503"} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(f.URL, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(time.Minute))
		fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1000000\r\n\r\n", line)
		answer, err := io.ReadAll(conn)
		if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 "+want) {
			t.Errorf("%s: %q, %v", line, answer, err)
		}
		conn.Close()
	}
}

// TestListsOfKeys: without a file of tenants, each key has a list of its own.
func TestListsOfKeys(t *testing.T) {
	const another = "another-payload-secret"
	h := &held{asked: make(chan string, 100), release: make(chan struct{})}
	f := start(t, &scripted{}, func(c *server.Config) {
		h.Store, c.Records = c.Records, h
		c.PayloadSecret = func() ([]byte, error) { return []byte(secret + "\n" + another), nil }
	})
	var wg sync.WaitGroup
	for _, key := range []string{secret, another} {
		f.background(t, &wg, f.asking(t, key, "GET", "/builds"), 200)
	}
	for range 2 {
		select {
		case <-h.asked:
		case <-time.After(5 * time.Second):
			t.Error("one list waits for the other")
		}
	}
	close(h.release)
	wg.Wait()
}
