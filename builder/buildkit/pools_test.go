package buildkit

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"handler/function/api"
	"handler/function/buildconfig"
	"handler/function/buildkit/contextfs"
	"handler/function/payload"
	"handler/function/registry"
	"handler/function/solve"
)

// daemon is a fake buildkitd. Its solves run until their context ends or release is closed, and
// they are in its history while they run.
type daemon struct {
	controlapi.UnimplementedControlServer
	addr    string
	release chan struct{}

	mu     sync.Mutex
	active map[string]bool   // Refs
	hidden map[string]bool   // those of them that are in no history
	past   []string          // Refs of builds that have ended
	made   map[string]string // the digests of some of past
	fails  bool              // solves fail at once
	taken  int               // solves whose Ref is refused; meanwhile a progress goes on for two minutes
	refuse func() error      // has the first solve fail
	bridge bridge
	broken bool // the history cannot be read
	says   int  // lines of a build's progress, each a message
}

func newDaemon(t *testing.T, name string) *daemon {
	t.Helper()
	socket := filepath.Join(t.TempDir(), name)
	d := &daemon{addr: "unix://" + socket, release: make(chan struct{}), active: make(map[string]bool), hidden: make(map[string]bool)}
	d.bridge.asked, d.bridge.returned = make(chan struct{}), make(chan struct{})
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	controlapi.RegisterControlServer(s, d)
	gatewayapi.RegisterLLBBridgeServer(s, &d.bridge)
	go s.Serve(l)
	t.Cleanup(s.Stop)
	return d
}

func (d *daemon) refs() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.active))
}

// recorded is how many builds run that are in the history.
func (d *daemon) recorded() (n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for ref := range d.active {
		if !d.hidden[ref] {
			n++
		}
	}
	return n
}

func (d *daemon) Solve(ctx context.Context, req *controlapi.SolveRequest) (*controlapi.SolveResponse, error) {
	d.mu.Lock()
	if d.taken > 0 {
		d.taken--
		d.mu.Unlock()
		return nil, status.Errorf(codes.Unknown, "failed to solve: job ID %s exists", req.Ref)
	}
	if refuse := d.refuse; refuse != nil {
		d.refuse = nil
		d.mu.Unlock()
		return nil, refuse()
	}
	d.active[req.Ref], d.hidden[req.Ref] = true, req.Internal
	fails := d.fails
	d.mu.Unlock()
	if len(req.FrontendInputs) > 0 {
		d.bridge.mu.Lock()
		d.bridge.own = req.FrontendInputs
		d.bridge.mu.Unlock()
		select {
		case <-d.bridge.returned:
			return nil, status.Error(codes.Unknown, "the gateway's error")
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.active, req.Ref)
	}()
	if fails {
		return nil, status.Error(codes.Unknown, "process \"/bin/sh -c false\" did not complete successfully: exit code: 1")
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-d.release:
		return &controlapi.SolveResponse{ExporterResponse: map[string]string{"containerimage.digest": "sha256:" + filepath.Base(d.addr)}}, nil
	}
}

func (d *daemon) ListenBuildHistory(req *controlapi.BuildHistoryRequest, stream grpc.ServerStreamingServer[controlapi.BuildHistoryEvent]) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.broken {
		return status.Error(codes.Unknown, "invalid database")
	}
	var records []*controlapi.BuildHistoryRecord
	for ref := range d.active {
		if d.hidden[ref] {
			continue
		}
		records = append(records, &controlapi.BuildHistoryRecord{Ref: ref, CreatedAt: timestamppb.Now()})
	}
	for _, ref := range d.past {
		if !req.ActiveOnly {
			r := &controlapi.BuildHistoryRecord{Ref: ref, CreatedAt: timestamppb.Now(), CompletedAt: timestamppb.Now()}
			if digest := d.made[ref]; digest != "" {
				// As of a build that was ended during its push.
				r.Error = status.New(codes.Canceled, "context canceled").Proto()
				r.Result = &controlapi.BuildResultInfo{Results: map[int64]*controlapi.Descriptor{0: {Digest: digest}}}
			}
			records = append(records, r)
		}
	}
	for _, r := range records {
		if req.Ref != "" && r.Ref != req.Ref {
			continue
		}
		if err := stream.Send(&controlapi.BuildHistoryEvent{Record: r}); err != nil {
			return err
		}
	}
	return nil
}

func (*daemon) Info(context.Context, *controlapi.InfoRequest) (*controlapi.InfoResponse, error) {
	return &controlapi.InfoResponse{}, nil
}

func (*daemon) ListWorkers(context.Context, *controlapi.ListWorkersRequest) (*controlapi.ListWorkersResponse, error) {
	return &controlapi.ListWorkersResponse{Record: []*apitypes.WorkerRecord{{ID: "w", Platforms: []*pb.Platform{{OS: "linux", Architecture: "amd64"}}}}}, nil
}

func (*daemon) Session(stream grpc.BidiStreamingServer[controlapi.BytesMessage, controlapi.BytesMessage]) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return nil // the client has closed the session
		}
	}
}

func (d *daemon) Status(_ *controlapi.StatusRequest, stream grpc.ServerStreamingServer[controlapi.StatusResponse]) error {
	d.mu.Lock()
	says, deadline := d.says, time.Now().Add(time.Hour)
	if d.taken > 0 {
		says, deadline = math.MaxInt, time.Now().Add(2*time.Minute)
	}
	d.mu.Unlock()
	const vertex = "sha256:0000000000000000000000000000000000000000000000000000000000000001"
	for i := range says {
		if time.Now().After(deadline) {
			break
		}
		if err := stream.Send(&controlapi.StatusResponse{
			Vertexes: []*controlapi.Vertex{{Digest: vertex, Name: "step", Started: timestamppb.Now()}},
			Logs:     []*controlapi.VertexLog{{Vertex: vertex, Msg: fmt.Appendf(nil, "line %d\n", i), Timestamp: timestamppb.Now()}},
		}); err != nil {
			return err
		}
	}
	return nil
}

func newSolver(t *testing.T, daemons ...*daemon) *Solver {
	t.Helper()
	return newSolverOf(t, Config{}, daemons...)
}

func newSolverOf(t *testing.T, cfg Config, daemons ...*daemon) *Solver {
	t.Helper()
	cfg.Credentials = registry.New(registry.Config{})
	for _, d := range daemons {
		cfg.Addrs = append(cfg.Addrs, d.addr)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// request builds nothing in particular for a tenant. of is its repository.
func request(t *testing.T, tenant *solve.Tenant, of string) *solve.Request {
	t.Helper()
	c, err := buildconfig.Parse([]byte(`{"skipPush":true}`))
	if err != nil {
		t.Fatal(err)
	}
	return &solve.Request{ID: of, Config: c, Context: new(payload.Context), SharedKey: of, Tenant: tenant}
}

// ended is how a build ended.
type ended struct {
	digest string
	err    error
}

// build begins a build, and returns when a daemon has it.
func build(t *testing.T, s *Solver, req *solve.Request, among ...*daemon) <-chan ended {
	t.Helper()
	count := func() (n int) {
		for _, d := range among {
			n += len(d.refs())
		}
		return n
	}
	before, result := count(), make(chan ended, 1)
	go func() {
		outcome, _, err := s.solve(t.Context(), req, contextfs.New(sample), func(...string) {})
		result <- ended{outcome.Digest, err}
	}()
	for deadline := time.Now().Add(time.Minute); count() == before; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) || len(result) > 0 {
			t.Fatalf("no daemon has the build: %v", result)
		}
	}
	return result
}

// TestSlowReader has a solve fail at once, and its progress read for longer than BuildTimeout. The
// build failed, and all of its log comes.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, "d")
	d.fails, d.says = true, 10
	const timeout = 2 * time.Second
	s := newSolverOf(t, Config{BuildTimeout: timeout}, d)
	var lines []string
	_, _, err := s.solve(t.Context(), request(t, nil, "r"), contextfs.New(sample), func(some ...string) {
		if len(lines) == 0 {
			time.Sleep(timeout + time.Second)
		}
		lines = append(lines, some...)
	})
	if code := api.AsError(err).Code; code != api.BuildFailed {
		t.Errorf("the build ended with %q: %v", code, err)
	}
	if !slices.Contains(lines, "l: line 9") {
		t.Errorf("the log is %q", lines)
	}
}

// TestRefTaken has a daemon refuse the Ref of a build twice, and show the progress of the build that
// has it. The build does not wait for the end of this progress.
func TestRefTaken(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, "d")
	d.taken = 2
	close(d.release)
	s := newSolver(t, d)
	req := request(t, nil, "r")
	req.Name = solve.Name{Call: "1f", Body: "2e"}
	start := time.Now()
	outcome, stats, err := s.solve(t.Context(), req, contextfs.New(sample), func(...string) {})
	if took := time.Since(start); err != nil || outcome.Digest != "sha256:d" || stats.Attempts != 3 || took > time.Minute {
		t.Errorf("%+v after %d attempts and %v, %v", outcome, stats.Attempts, took, err)
	}
}

// TestHistoryUnreadable builds where a daemon answers and cannot read its history.
func TestHistoryUnreadable(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, "d")
	d.broken = true
	close(d.release)
	s := newSolver(t, d)
	req := request(t, nil, "r")
	req.Name = solve.Name{Call: "1f", Body: "2e"}
	var lines []string
	outcome, stats, err := s.solve(t.Context(), req, contextfs.New(sample), func(l ...string) { lines = append(lines, l...) })
	if err != nil || outcome.Digest != "sha256:d" || stats.Attempts != 1 || len(lines) > 0 {
		t.Errorf("%+v after %d attempts, %v, %q", outcome, stats.Attempts, err, lines)
	}
}

func TestNamedPools(t *testing.T) {
	t.Parallel()
	shared, gold, silver := newDaemon(t, "shared"), newDaemon(t, "gold"), newDaemon(t, "silver")
	s := newSolver(t, shared)
	err := s.SetPools(map[string][]string{"gold": {gold.addr}, "silver": {silver.addr}, "broken": {"http://x"}})
	if err == nil || !strings.Contains(err.Error(), `"broken"`) || !strings.Contains(err.Error(), "http://x") {
		t.Errorf("an address of no daemon: %v", err)
	}
	if got := s.Daemons(t.Context()); got != (solve.Daemons{Total: 3, Reachable: 3}) {
		t.Errorf("%+v", got)
	}
	tenant := func(pool string) *solve.Tenant { return &solve.Tenant{ID: "t", Pool: pool} }
	all := []*daemon{shared, gold, silver}
	for _, tt := range []struct {
		tenant *solve.Tenant
		at     *daemon
	}{{nil, shared}, {tenant(""), shared}, {tenant("gold"), gold}, {tenant("silver"), silver}} {
		build(t, s, request(t, tt.tenant, "r"), all...)
		for _, d := range all {
			if n := len(d.refs()); (n > 0) != (d == tt.at) {
				t.Errorf("%+v: %s has %d builds", tt.tenant, d.addr, n)
			}
			close(d.release)
			for deadline := time.Now().Add(time.Minute); len(d.refs()) > 0 && time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			}
			d.release = make(chan struct{})
		}
	}
	if _, _, err := s.Solve(t.Context(), request(t, tenant("bronze"), "r"), func(...string) {}); api.AsError(err).Code != api.NoDaemon || strings.Contains(api.AsError(err).Msg, "bronze") {
		t.Errorf("an unknown pool: %v", err)
	}

	// A pool whose addresses stay is kept. One that goes ends after its last build.
	keptPool, oldPool := s.pools.named["gold"].Pool, s.pools.named["silver"].Pool
	result := build(t, s, request(t, tenant("silver"), "r"), all...)
	if err := s.SetPools(map[string][]string{"gold": {gold.addr}}); err != nil {
		t.Fatal(err)
	}
	if s.pools.named["gold"].Pool != keptPool {
		t.Error("a pool that stays is made anew")
	}
	if _, err := s.Find(t.Context(), "silver", "call"); api.AsError(err).Code != api.NoDaemon {
		t.Errorf("a pool that has gone: %v", err)
	}
	if got := oldPool.Count(t.Context()); got.Reachable != 1 {
		t.Error("the pool is closed while it has a build")
	}
	close(silver.release)
	if e := <-result; e.err != nil || e.digest != "sha256:silver" {
		t.Errorf("the build on a pool that goes: %+v", e)
	}
	if got := oldPool.Count(t.Context()); got.Reachable != 0 {
		t.Error("the pool is open after its last build")
	}
	if err := s.SetPools(map[string][]string{"gold": {shared.addr}}); err != nil || s.pools.named["gold"].Pool == keptPool {
		t.Errorf("new addresses: %v", err)
	}
	if got := keptPool.Count(t.Context()); got.Reachable != 0 {
		t.Error("the pool with the old addresses is open")
	}
}

// TestFindInPool looks for a build where its tenant's builds are.
func TestFindInPool(t *testing.T) {
	shared, gold := newDaemon(t, "shared"), newDaemon(t, "gold")
	s := newSolver(t, shared)
	if err := s.SetPools(map[string][]string{"gold": {gold.addr}}); err != nil {
		t.Fatal(err)
	}
	tags := tagsOf(&solve.Request{Tenant: &solve.Tenant{ID: "t"}, Name: solve.Name{Call: "1f", Body: "2e"}})
	gold.past = []string{tags.Ref(refOf(solve.Name{Call: "1f", Body: "2e"}, 0))}
	if past, err := s.Find(t.Context(), "gold", "1f"); past == nil || err != nil {
		t.Errorf("%v, %v", past, err)
	}
	if past, err := s.Find(t.Context(), "", "1f"); past != nil || err != nil {
		t.Errorf("in the shared pool: %v, %v", past, err)
	}
}

// TestRunning counts the builds of tenants over two processes, each with a Solver.
func TestRunning(t *testing.T) {
	t.Parallel()
	var daemons []*daemon
	for i := range 3 {
		daemons = append(daemons, newDaemon(t, fmt.Sprint(i)))
	}
	gold := newDaemon(t, "gold")
	one, two := newSolver(t, daemons...), newSolver(t, daemons...)
	for _, s := range []*Solver{one, two} {
		if err := s.SetPools(map[string][]string{"gold": {gold.addr}}); err != nil {
			t.Fatal(err)
		}
	}
	if !one.Counted("") || one.Counted("gold") || one.Counted("none") {
		t.Errorf("counted: shared %v, a lone daemon %v, no pool %v", one.Counted(""), one.Counted("gold"), one.Counted("none"))
	}
	wide, other := &solve.Tenant{ID: "wide"}, &solve.Tenant{ID: "other"}
	all := append(slices.Clone(daemons), gold)
	var results []<-chan ended
	for i := range 3 {
		results = append(results, build(t, one, request(t, wide, fmt.Sprint(i)), all...))
	}
	results = append(results,
		build(t, two, request(t, wide, "x"), all...),
		build(t, two, request(t, other, "y"), all...),
		build(t, two, request(t, nil, "z"), all...),
		build(t, two, request(t, &solve.Tenant{ID: "wide", Pool: "gold"}, "w"), all...))
	// Two parts of one build, at one and the same daemon or not, are one build.
	parts := pretend(daemons, tagsOf(request(t, wide, "")).Ref)
	for _, tt := range []struct {
		name        string
		s           *Solver
		wide, other int
	}{{"the first", one, 2, 1}, {"the second", two, 4, 0}} {
		of := tt.s.Running(t.Context())
		if of("wide") != tt.wide || of("other") != tt.other || of("nobody") != 0 {
			t.Errorf("%s: others have %d of wide and %d of other, want %d and %d", tt.name, of("wide"), of("other"), tt.wide, tt.other)
		}
	}
	parts()
	for _, d := range all {
		close(d.release)
	}
	for _, result := range results {
		if e := <-result; e.err != nil {
			t.Error(e.err)
		}
	}
	if of := two.Running(t.Context()); of("wide") != 0 {
		t.Errorf("after the end: %d", of("wide"))
	}
	if len(one.running.all) != 0 {
		t.Errorf("%d builds are left", len(one.running.all))
	}
}

// TestTold: while all other processes tell what they have, the daemons of a pool keep no record of a
// build, unless a queue may ask for it.
func TestTold(t *testing.T) {
	t.Parallel()
	daemons := []*daemon{newDaemon(t, "one"), newDaemon(t, "two")}
	var all atomic.Bool
	s := newSolverOf(t, Config{Elsewhere: func() (map[string]int, bool) { return nil, all.Load() }}, daemons...)
	tenant := &solve.Tenant{ID: "wide"}
	named := request(t, tenant, "named")
	named.Name = solve.Name{Call: "1f", Body: "2e"}
	var results []<-chan ended
	for _, tt := range []struct {
		all  bool
		req  *solve.Request
		want int // builds in the histories
	}{
		{true, request(t, tenant, "told"), 0},
		{true, named, 1},
		{false, request(t, tenant, "untold"), 2},
	} {
		all.Store(tt.all)
		results = append(results, build(t, s, tt.req, daemons...))
		n := 0
		for _, d := range daemons {
			n += d.recorded()
		}
		if n != tt.want {
			t.Errorf("%s: the histories have %d builds, want %d", tt.req.ID, n, tt.want)
		}
	}
	sum := 0
	for addr, n := range s.Seats() {
		if addr != daemons[0].addr && addr != daemons[1].addr {
			t.Errorf("a seat on %s", addr)
		}
		sum += n
	}
	if sum != 3 {
		t.Errorf("%d seats", sum)
	}
	for _, d := range daemons {
		close(d.release)
	}
	for _, result := range results {
		if e := <-result; e.err != nil {
			t.Error(e.err)
		}
	}
	if seats := s.Seats(); len(seats) != 0 {
		t.Errorf("after the end: seats %v", seats)
	}
}

// pretend has two daemons run parts of one build.
func pretend(daemons []*daemon, ref func(string) string) (end func()) {
	refs := []string{ref("part-1"), ref("part-2")}
	for i, r := range refs {
		daemons[i].mu.Lock()
		daemons[i].active[r] = true
		daemons[i].mu.Unlock()
	}
	return func() {
		for i, r := range refs {
			daemons[i].mu.Lock()
			delete(daemons[i].active, r)
			daemons[i].mu.Unlock()
		}
	}
}

// TestOneBuildOfTwoDeliveries: two replicas that were delivered one build have the same tags for
// it, and a build without a name has its own.
func TestOneBuildOfTwoDeliveries(t *testing.T) {
	named := &solve.Request{Tenant: &solve.Tenant{ID: "t"}, Name: solve.Name{Call: "1f", Body: "2e"}}
	if a, b := tagsOf(named), tagsOf(named); a != b {
		t.Errorf("two deliveries of one build have the tags %v and %v", a, b)
	}
	unnamed := &solve.Request{Tenant: &solve.Tenant{ID: "t"}}
	if a, b := tagsOf(unnamed), tagsOf(unnamed); a.Tenant != b.Tenant || a.Build == b.Build {
		t.Errorf("two builds have the tags %v and %v", a, b)
	}
	if ref := tagsOf(new(solve.Request)).Ref("1fx2ex0"); ref != "1fx2ex0" {
		t.Errorf("without a tenant: %s", ref)
	}
}

// TestCloseWithPools closes named pools too.
func TestCloseWithPools(t *testing.T) {
	shared, gold := newDaemon(t, "shared"), newDaemon(t, "gold")
	s := newSolver(t, shared)
	if err := s.SetPools(map[string][]string{"gold": {gold.addr}}); err != nil {
		t.Fatal(err)
	}
	p := s.pools.named["gold"].Pool
	if err := errors.Join(s.Close(), s.SetPools(map[string][]string{"silver": {gold.addr}})); err != nil {
		t.Error(err)
	}
	if got := p.Count(t.Context()); got.Reachable != 0 {
		t.Error("a named pool is open after Close")
	}
	if len(s.pools.named) != 0 {
		t.Error("a pool is made after Close")
	}
}
