package pool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/buildkit/client"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"handler/function/api"
	"handler/function/solve"
)

// trio is a pool of three daemons.
type trio struct {
	*Pool
	t       *testing.T
	servers map[string]*grpc.Server // by address
	ctl     map[string]*control
}

func newTrio(t *testing.T, limit int) *trio {
	t.Helper()
	tr := &trio{t: t, servers: make(map[string]*grpc.Server), ctl: make(map[string]*control)}
	dir := t.TempDir()
	var addrs []string
	for i := range 3 {
		addr := "unix://" + filepath.Join(dir, fmt.Sprint(i))
		tr.ctl[addr] = &control{}
		tr.serve(addr)
		addrs = append(addrs, addr)
	}
	tr.Pool = mustNew(t, Config{Addrs: addrs, Builds: limit})
	return tr
}

func (tr *trio) serve(addr string) {
	tr.t.Helper()
	_, tr.servers[addr] = listen(tr.t, tr.ctl[addr], "unix", addr[len("unix://"):], nil)
}

func (tr *trio) order() []*Daemon { return tr.Pool.order(tr.t.Context(), Key{Cache: "key"}) }

// placed takes a seat. It returns the index of its daemon in the key's order too.
func (tr *trio) placed(prefer, avoid *Daemon) (int, *Seat) {
	tr.t.Helper()
	s, err := tr.Place(tr.t.Context(), Key{Cache: "key"}, prefer, avoid)
	if err != nil {
		tr.t.Fatal(err)
	}
	return slices.Index(tr.order(), s.Daemon), s
}

func TestPlace(t *testing.T) {
	tr := newTrio(t, 2)
	var seats []*Seat
	for i, want := range []struct {
		at     int
		choice solve.Choice
	}{
		{0, solve.First}, {0, solve.First}, {1, solve.Busy}, {1, solve.Busy}, {2, solve.Busy}, {2, solve.Busy},
		// All have their limit: the one with the fewest.
		{0, solve.First}, {1, solve.Busy},
	} {
		at, s := tr.placed(nil, nil)
		if at != want.at || s.Choice != want.choice {
			t.Errorf("build %d: at %d, %s; want %+v", i, at, s.Choice, want)
		}
		seats = append(seats, s)
	}
	for _, s := range seats {
		s.Leave()
	}
	if at, s := tr.placed(nil, nil); at != 0 {
		t.Errorf("after all have ended: at %d", at)
	} else {
		s.Leave()
	}
	for _, d := range tr.daemons {
		if d.health.mine() != 0 || d.cur.refs != 0 {
			t.Errorf("%d builds and %d uses left", d.health.mine(), d.cur.refs)
		}
	}
}

// TestLoadOfOthers counts the builds that other replicas have placed, and counts again.
func TestLoadOfOthers(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, 4)
	first := tr.ctl[tr.order()[0].addr]
	first.mu.Lock()
	first.active = 4
	first.mu.Unlock()
	at, s := tr.placed(nil, nil)
	s.Leave()
	if at != 1 {
		t.Errorf("placed at %d", at)
	}
	if at, s = tr.placed(tr.order()[0], nil); at != 0 {
		t.Errorf("where the build runs already: at %d", at)
	}
	s.Leave()
	first.mu.Lock()
	first.active = 3
	first.mu.Unlock()
	time.Sleep(loadAge + 100*time.Millisecond)
	at, s = tr.placed(nil, nil)
	if s.Leave(); at != 0 {
		t.Errorf("after they have ended: at %d", at)
	}
}

// TestToldOfOthers takes the word of the other replicas for what they have. Only if not all have
// told is a daemon asked, and the higher of both counts.
func TestToldOfOthers(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		told   int
		all    bool
		active int // by the daemon's own count
		at     int
		counts bool
	}{
		{0, true, 4, 0, false},
		{4, true, 0, 1, false},
		{4, false, 0, 1, true},
		{0, false, 4, 1, true},
		{3, false, 3, 0, true},
	} {
		tr := newTrio(t, 4)
		first := tr.order()[0].addr
		tr.ctl[first].active = tt.active
		tr.cfg.Elsewhere = func() (map[string]int, bool) { return map[string]int{first: tt.told}, tt.all }
		at, s := tr.placed(nil, nil)
		if counts := tr.Counts(); at != tt.at || counts != tt.counts {
			t.Errorf("%+v: placed at %d, counts %v", tt, at, counts)
		}
		if asked := !s.Daemon.health.asked.IsZero(); asked == tt.all {
			t.Errorf("%+v: the daemon was asked: %v", tt, asked)
		}
		if seats := tr.cfg.Seats.All(); len(seats) != 1 || seats[s.Daemon.addr] != 1 {
			t.Errorf("%+v: the seats are %v", tt, seats)
		}
		s.Leave()
	}
	if p := mustNew(t, Config{Addrs: []string{"tcp://127.0.0.1:1"}}); p.Counts() {
		t.Error("a lone daemon is asked")
	}
}

// TestRest leaves a daemon alone for longer after its third loss in a row.
func TestRest(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, 2)
	d := tr.order()[0]
	d.health.losses = 2
	start := time.Now()
	tr.lose(d, errors.New("lost"))
	for deadline := start.Add(time.Minute); !d.health.isFit(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not come back")
		}
	}
	if took := time.Since(start); took < 4*probeMin {
		t.Errorf("it was back after %v, want %v at least", took, 4*probeMin)
	}
}

func TestDaemonOut(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, 2)
	first := tr.order()[0]
	_, s := tr.placed(nil, nil)
	tr.servers[first.addr].Stop()
	s.give(true)
	start := time.Now()
	at, s := tr.placed(nil, nil)
	s.Leave()
	// It is not dialled for as long as a daemon that is not known to be down.
	if took := time.Since(start); at != 1 || s.Choice != solve.Down || took >= dialWindow {
		t.Errorf("at %d, %s, after %v", at, s.Choice, took)
	}
	if got := tr.Count(t.Context()); got != (solve.Daemons{Total: 3, Reachable: 2}) {
		t.Errorf("%+v", got)
	}
	tr.serve(first.addr)
	for deadline := time.Now().Add(time.Minute); !first.health.isFit(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not come back")
		}
	}
	at, s = tr.placed(nil, nil)
	if s.Leave(); at != 0 {
		t.Errorf("back, and placed at %d", at)
	}

	at, s = tr.placed(nil, first)
	if s.Leave(); at != 1 {
		t.Errorf("placed at %d again, where it was lost", at)
	}
	for _, d := range tr.order()[1:] {
		tr.servers[d.addr].Stop()
	}
	at, s = tr.placed(nil, first)
	if s.Leave(); at != 0 {
		t.Errorf("at %d: the only one left is good enough", at)
	}
}

// TestFrozen waits no longer when more daemons hang.
func TestFrozen(t *testing.T) {
	t.Parallel()
	const longest = keptTimeout + checkTimeout // of acquire
	for _, tt := range []struct {
		name  string
		lost  bool // the first is where the build was lost
		limit time.Duration
	}{
		{"before", false, 2*longest + checkTimeout},
		{"after one was lost", true, longest},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tr := newTrio(t, 2)
			tr.Count(t.Context()) // so that there are connections
			var lost *Daemon
			if order := tr.order(); tt.lost {
				lost = order[0]
				tr.lose(lost, errors.New("lost"))
			}
			for _, ctl := range tr.ctl {
				ctl.freeze()
			}
			start := time.Now()
			_, err := tr.Place(t.Context(), Key{Cache: "key"}, nil, lost)
			if took := time.Since(start); api.AsError(err).Code != api.NoDaemon || took > tt.limit+checkTimeout {
				t.Errorf("%v after %v", err, took)
			}
		})
	}
	t.Run("one of those asked at once", func(t *testing.T) {
		t.Parallel()
		tr := newTrio(t, 2)
		tr.Count(t.Context())
		order := tr.order()
		tr.servers[order[0].addr].Stop()
		tr.ctl[order[2].addr].freeze()
		kept := order[2].cur
		start := time.Now()
		at, s := tr.placed(nil, nil)
		if took := time.Since(start); at != 1 || took >= longest {
			t.Errorf("at %d after %v", at, took)
		}
		s.Leave()
		if !order[2].health.isFit() || order[2].cur != kept || kept.refs != 0 {
			t.Error("the one that was not waited for has lost something")
		}
	})
}

// TestSlowCount places builds while a daemon answers, and is too slow to count its builds. It
// stays in, and gets a build where no other daemon is.
func TestSlowCount(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, 2)
	order := tr.order()
	slow := tr.ctl[order[0].addr]
	slow.mu.Lock()
	slow.busy = true
	slow.mu.Unlock()
	at, s := tr.placed(nil, nil)
	if s.Leave(); at != 1 {
		t.Errorf("beside two others: at %d", at)
	}
	for _, d := range order[1:] {
		tr.servers[d.addr].Stop()
	}
	// Also for a build that was lost elsewhere, which has one round of asking.
	for _, avoid := range []*Daemon{nil, order[1]} {
		at, s = tr.placed(nil, avoid)
		if s.Leave(); at != 0 {
			t.Errorf("without the others: at %d", at)
		}
	}
	if d := order[0]; !d.health.isFit() || d.cur == nil || d.cur.refs != 0 {
		t.Error("the slow one was taken out, or has lost its connection")
	}
}

// TestLostWhilePlaced: a daemon ends after it has answered, while another one is waited for. It gets
// no build. If it is back by then, it gets the build, whose connection does not count as broken.
func TestLostWhilePlaced(t *testing.T) {
	for _, back := range []bool{false, true} {
		t.Run(fmt.Sprintf("back=%v", back), func(t *testing.T) {
			t.Parallel()
			testLostWhilePlaced(t, back)
		})
	}
}

func testLostWhilePlaced(t *testing.T, back bool) {
	tr := newTrio(t, 2)
	order := tr.order()
	tr.ctl[order[0].addr].freeze()
	type result struct {
		seat *Seat
		err  error
	}
	placed := make(chan result, 1)
	go func() {
		s, err := tr.Place(t.Context(), Key{Cache: "key"}, nil, order[2]) // asks all at once
		placed <- result{s, err}
	}()
	tr.ctl[order[1].addr].awaitAsked(t, 0)
	tr.servers[order[1].addr].Stop()
	if back {
		tr.serve(order[1].addr)
	}
	got := <-placed
	if got.err != nil {
		t.Fatal(got.err)
	}
	defer got.seat.Leave()
	want := order[2]
	if back {
		want = order[1]
	}
	if got.seat.Daemon != want || got.seat.Broke(status.Error(codes.Unavailable, "from a registry")) {
		t.Errorf("on %s, want %s on a connection that is not broken", got.seat.Daemon.addr, want.addr)
	}
}

// TestWatchUnrecorded watches a build whose end the daemon cannot record: its record is gone.
func TestWatchUnrecorded(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, 2)
	at, s := tr.placed(nil, nil)
	defer s.Leave()
	ctl := tr.ctl[tr.order()[at].addr]
	known := func(ref string) (asked int) {
		ctl.mu.Lock()
		defer ctl.mu.Unlock()
		ctl.known = ref
		return ctl.asked
	}
	asked := known("callxbodyx0")
	updates, watched := make(chan *client.SolveStatus), make(chan error, 1)
	solved := false
	go func() { watched <- s.Watch(t.Context(), "callxbodyx0", updates, func() { solved = true }) }()
	if _, more := <-updates; more {
		t.Error("progress of a build that has none")
	}
	ctl.awaitAsked(t, asked)
	select {
	case err := <-watched:
		t.Fatalf("while the build runs, Watch returned %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	known("")
	if err := <-watched; err != nil || !solved {
		t.Errorf("Watch returned %v, and solved is %v", err, solved)
	}
	ended, cancel := context.WithCancel(t.Context())
	known("callxbodyx0")
	updates = make(chan *client.SolveStatus)
	go func() { watched <- s.Watch(ended, "callxbodyx0", updates, func() { t.Error("solved") }) }()
	<-updates
	cancel()
	if err := <-watched; err == nil {
		t.Error("Watch returned no error after its context had ended")
	}
}

// TestAwaitTwice: one connection has one solve of a Ref at a time.
func TestAwaitTwice(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, 2)
	_, s := tr.placed(nil, nil)
	defer s.Leave()
	for range 2 {
		_, forget, err := s.Await(t.Context(), "ref", func(error) {})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Await(t.Context(), "ref", func(error) {}); err != ErrTaken {
			t.Errorf("a second solve: %v, want ErrTaken", err)
		}
		_, other, err := s.Await(t.Context(), "other", func(error) {})
		if err != nil {
			t.Fatal(err)
		}
		other()
		forget()
	}
}

// TestSearch finds a record on any daemon, and fails where one could not be asked.
func TestSearch(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, 2)
	if found, err := tr.Search(t.Context(), "callx"); found != nil || err != nil {
		t.Errorf("before: %+v, %v", found, err)
	}
	order := tr.order()
	tr.servers[order[0].addr].Stop()
	// The first search notices that the daemon is gone. It is out in the second.
	for range 2 {
		if found, err := tr.Search(t.Context(), "callx"); found != nil || err == nil {
			t.Errorf("one is gone: %+v, %v", found, err)
		}
	}
	ctl := tr.ctl[order[1].addr]
	ctl.mu.Lock()
	ctl.known = "callxbodyx0"
	ctl.mu.Unlock()
	found, err := tr.Search(t.Context(), "callx")
	if len(found) != 1 || found[0].Daemon != order[1] || !found[0].Running() || found[0].Ref != "callxbodyx0" || err == nil {
		t.Errorf("another knows it: %+v, %v", found, err)
	}
	if found, _ := tr.Search(t.Context(), "other"); found != nil {
		t.Errorf("another prefix: %+v", found)
	}
}

// TestLosses leaves a daemon alone for longer, the more often it is lost in a row. Many builds
// lose a daemon that goes away once.
func TestLosses(t *testing.T) {
	var h health
	for i, want := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60} {
		if rest, already := h.lose(); rest != want*time.Second || already {
			t.Errorf("loss %d: left alone for %v, already out %v", i, rest, already)
		}
		for range 3 {
			if rest, already := h.lose(); rest != 0 || !already {
				t.Errorf("loss %d, another build: left alone for %v, already out %v", i, rest, already)
			}
		}
		h.setOut(false)
	}
	h.worked()
	if rest, _ := h.lose(); rest != probeMin {
		t.Errorf("after a build that ended well, left alone for %v", rest)
	}
}

func TestFull(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, 2)
	first := tr.order()[0]
	ctl := tr.ctl[first.addr]
	ctl.stuck = true
	tr.MarkFull(first, errors.New("no space"))
	at, s := tr.placed(nil, nil)
	s.Leave()
	if at != 1 || s.Choice != solve.Down || tr.Count(t.Context()).Full != 1 {
		t.Errorf("at %d, %s", at, s.Choice)
	}
	if !tr.HasRoom(t.Context(), Key{}, nil) || !tr.HasRoom(t.Context(), Key{}, tr.order()[1]) {
		t.Error("two have room")
	}
	for _, d := range tr.order()[1:] {
		tr.ctl[d.addr].stuck = true
		tr.MarkFull(d, errors.New("no space"))
	}
	if tr.HasRoom(t.Context(), Key{}, nil) {
		t.Error("there is said to be room")
	}
	if _, err := tr.Place(t.Context(), Key{Cache: "key"}, nil, nil); api.AsError(err).Code != api.DaemonFull {
		t.Errorf("all are full: %v", err)
	}
	// What was removed is taken again.
	ctl.mu.Lock()
	ctl.stuck, ctl.full = false, true
	ctl.mu.Unlock()
	if _, err := tr.Place(t.Context(), Key{Cache: "key"}, nil, nil); api.AsError(err).Code != api.DaemonFull || !first.health.isFull() {
		t.Errorf("one has no room after a prune: %v", err)
	}
	ctl.mu.Lock()
	ctl.full = false
	ctl.mu.Unlock()
	at, s = tr.placed(nil, nil)
	if s.Leave(); at != 0 || !first.health.isFit() {
		t.Errorf("one could be pruned: at %d", at)
	}
}

// TestLoneHasRoom finds no room on another daemon where there is none.
func TestLoneHasRoom(t *testing.T) {
	p := mustNew(t, Config{Addrs: []string{"tcp://127.0.0.1:1"}})
	if lone := p.list(t.Context())[0]; p.HasRoom(t.Context(), Key{}, lone) || !p.HasRoom(t.Context(), Key{}, nil) {
		t.Error("the daemon that is full counts as another")
	}
}

// TestPruneUnanswered does not take a daemon for pruned that has not answered.
func TestPruneUnanswered(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, 2)
	d := tr.order()[0]
	tr.ctl[d.addr].slow = true
	d.health.setFull(true)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := tr.prune(ctx, d); err == nil || !d.health.isFull() {
		t.Errorf("pruned: %v", err)
	}
}

// TestFullAndDown waits for a lone daemon that is full and restarts.
func TestFullAndDown(t *testing.T) {
	t.Parallel()
	ctl := &control{}
	socket := filepath.Join(t.TempDir(), "s")
	p := mustNew(t, Config{Addrs: []string{"unix://" + socket}})
	p.list(t.Context())[0].health.setFull(true)
	time.AfterFunc(time.Second, func() { listen(t, ctl, "unix", socket, nil) })
	s, err := p.Place(t.Context(), Key{Cache: "key"}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	s.Leave()
	ctl.mu.Lock()
	defer ctl.mu.Unlock()
	if ctl.prunes != 1 {
		t.Errorf("pruned %d times", ctl.prunes)
	}
}

// TestFullAndLost has a daemon with a full disk end while it is pruned. It has not answered that it
// is full.
func TestFullAndLost(t *testing.T) {
	t.Parallel()
	ctl := &control{}
	socket := filepath.Join(t.TempDir(), "s")
	_, server := listen(t, ctl, "unix", socket, nil)
	ctl.pruned = server.Stop
	p := mustNew(t, Config{Addrs: []string{"unix://" + socket}})
	p.list(t.Context())[0].health.setFull(true)
	_, err := p.Place(t.Context(), Key{Cache: "key"}, nil, nil)
	if api.AsError(err).Code != api.NoDaemon {
		t.Errorf("placed with %v", err)
	}
}

// TestFullAndLeft has a daemon with a full disk leave the pool. Nobody prunes it again and again.
func TestFullAndLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := New(Config{Addrs: []string{"tcp://127.0.0.1:1"}})
		if err != nil {
			t.Fatal(err)
		}
		d := p.daemons[0]
		p.replace([]string{"tcp://127.0.0.2:1"})
		p.MarkFull(d, errors.New("no space"))
		ended := make(chan struct{})
		go func() {
			p.running.Wait()
			close(ended)
		}()
		select {
		case <-ended:
		case <-time.After(time.Hour):
			t.Error("it is still pruned")
		}
		p.Close()
	})
}

// TestAvoidLast tries the daemon to avoid after those that are out.
func TestAvoidLast(t *testing.T) {
	p := mustNew(t, Config{Addrs: []string{"tcp://127.0.0.1:1", "tcp://127.0.0.2:1", "tcp://127.0.0.3:1"}})
	order := p.order(t.Context(), Key{Cache: "key"})
	order[1].health.setOut(true)
	fit, rest := candidates(order, order[0])
	if !slices.Equal(fit, order[2:]) || !slices.Equal(rest, []*Daemon{order[1], order[0]}) {
		t.Errorf("%d are fit, %d are left", len(fit), len(rest))
	}
}

// records is a fake of the resolver.
type records struct {
	mu     sync.Mutex
	srv    map[string][]string
	silent bool // no answer about SRV
	hangs  bool // until the question about SRV is given up
	hosts  map[string][]string
}

func (r *records) LookupSRV(ctx context.Context, service, proto, name string) (string, []*net.SRV, error) {
	if r.hangs {
		<-ctx.Done()
		return "", nil, ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []*net.SRV
	for _, target := range r.srv["_"+service+"._"+proto+"."+name] {
		list = append(list, &net.SRV{Target: target + ".", Port: 1234})
	}
	if list == nil || r.silent {
		return "", nil, &net.DNSError{Name: name, IsNotFound: !r.silent, IsTimeout: r.silent}
	}
	return "", list, nil
}

func (r *records) LookupHost(ctx context.Context, host string) ([]string, error) {
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if list := r.hosts[host]; list != nil {
		return list, nil
	}
	return nil, &net.DNSError{Name: host, IsNotFound: true}
}

func TestLookup(t *testing.T) {
	r := &records{
		srv:   map[string][]string{"_buildkit._tcp.pool.ns": {"pool-1.pool.ns", "pool-0.pool.ns"}},
		hosts: map[string][]string{"headless": {"10.0.0.2", "10.0.0.1", "fd00::1"}, "one": {"10.0.0.1"}},
	}
	for addr, want := range map[string][]string{
		"tcp://pool.ns:1":       {"tcp://pool-0.pool.ns:1234", "tcp://pool-1.pool.ns:1234"},
		"tcp://headless:1":      {"tcp://10.0.0.1:1", "tcp://10.0.0.2:1", "tcp://[fd00::1]:1"},
		"tcp://one:1":           {"tcp://one:1"},
		"tcp://10.0.0.9:1":      {"tcp://10.0.0.9:1"},
		"tcp://localhost:1":     {"tcp://localhost:1"},
		"unix:///run/buildkitd": {"unix:///run/buildkitd"},
		"tcp://none:1":          nil,
	} {
		target, err := parseTarget(addr)
		if err != nil {
			t.Fatal(err)
		}
		got, srv, err := target.lookup(t.Context(), r, false)
		if !slices.Equal(got, want) || (err != nil) != (want == nil) || srv != (target.host == "pool.ns") {
			t.Errorf("%s: %q, %v, %v", addr, got, srv, err)
		}
	}
	for _, addr := range []string{"", "buildkitd:1234", "tcp://", "tcp://host", "tcp://host:1/path", "http://host:1", "unix://", "tcp://user@host:1"} {
		if _, err := New(Config{Addrs: []string{addr}}); err == nil {
			t.Errorf("%q is taken", addr)
		}
	}
	if _, err := New(Config{}); err == nil {
		t.Error("no address is taken")
	}
}

func TestDaemonsComeAndGo(t *testing.T) {
	r := &records{hosts: map[string][]string{"pool": {"127.0.0.1", "127.0.0.2"}}}
	p := mustNew(t, Config{Addrs: []string{"tcp://pool:1"}})
	p.resolver = r
	again := func() []*Daemon {
		p.mu.Lock()
		p.looked = time.Time{}
		p.mu.Unlock()
		return p.list(t.Context())
	}
	before := p.list(t.Context())
	r.mu.Lock()
	r.hosts["pool"] = []string{"127.0.0.2", "127.0.0.3"}
	r.mu.Unlock()
	if now := p.list(t.Context()); !slices.Equal(now, before) {
		t.Error("looked up again at once")
	}
	after := again()
	if len(after) != 2 || after[0] != before[1] || after[1].addr != "tcp://127.0.0.3:1" {
		t.Errorf("%d daemons", len(after))
	}
	if _, err := before[0].acquire(t.Context()); err != errClosed {
		t.Errorf("the one that left: %v", err)
	}
	r.mu.Lock()
	delete(r.hosts, "pool")
	r.mu.Unlock()
	if now := again(); !slices.Equal(now, after) {
		t.Error("forgotten when the name could not be looked up")
	}
}

// TestSeatsStay has a daemon leave and come back while it builds. Its builds still count, also where
// another pool has the daemon.
func TestSeatsStay(t *testing.T) {
	seats := NewSeats()
	cfg := Config{Addrs: []string{"tcp://127.0.0.1:1", "tcp://127.0.0.2:1"}, Builds: 1, Seats: seats}
	p, other := mustNew(t, cfg), mustNew(t, cfg)
	left := p.daemons[0]
	if !left.health.take(1) {
		t.Fatal("no seat")
	}
	p.replace([]string{"tcp://127.0.0.2:1"})
	if all := seats.All(); len(all) != 1 || all[left.addr] != 1 {
		t.Errorf("while the daemon is away: %v", all)
	}
	p.replace([]string{"tcp://127.0.0.1:1", "tcp://127.0.0.2:1"})
	for _, p := range []*Pool{p, other} {
		if d := p.daemons[0]; d == left || d.addr != left.addr || d.health.take(1) {
			t.Error("there is another seat")
		}
	}
	left.health.give()
	if all := seats.All(); len(all) != 0 || !p.daemons[0].health.take(1) {
		t.Errorf("after the build has ended: %v", all)
	}
}

// TestServiceDoesNotAnswer keeps the names of a pool while only the question about SRV
// records goes unanswered. It gives them up when there are no such records.
func TestServiceDoesNotAnswer(t *testing.T) {
	r := &records{srv: map[string][]string{"_buildkit._tcp.pool": {"a", "b"}}, hosts: map[string][]string{"pool": {"127.0.0.1", "127.0.0.2"}}}
	p := mustNew(t, Config{Addrs: []string{"tcp://pool:1"}})
	p.resolver = r
	look := func() (addrs []string) {
		p.look()
		for _, d := range p.list(t.Context()) {
			addrs = append(addrs, d.addr)
		}
		return addrs
	}
	names, addresses := []string{"tcp://a:1234", "tcp://b:1234"}, []string{"tcp://127.0.0.1:1", "tcp://127.0.0.2:1"}
	if got := look(); !slices.Equal(got, names) {
		t.Fatalf("%q", got)
	}
	r.silent = true
	if got := look(); !slices.Equal(got, names) {
		t.Errorf("without an answer: %q", got)
	}
	r.silent, r.srv = false, nil
	if got := look(); !slices.Equal(got, addresses) {
		t.Errorf("without records: %q", got)
	}
	r.silent = true // a name server that never answers it
	if got := look(); !slices.Equal(got, addresses) {
		t.Errorf("without an answer, where there were none: %q", got)
	}
}

// TestNamesHang looks up several names while the questions about SRV records go unanswered.
func TestNamesHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := New(Config{Addrs: []string{"tcp://one:1", "tcp://two:2"}})
		if err != nil {
			t.Fatal(err)
		}
		p.resolver = &records{hangs: true, hosts: map[string][]string{"one": {"10.0.0.1", "10.0.0.2"}, "two": {"10.0.0.3", "10.0.0.4"}}}
		start := time.Now()
		p.look()
		if took := time.Since(start); len(p.daemons) != 4 || took > lookupTimeout {
			t.Errorf("%d daemons after %v", len(p.daemons), took)
		}
	})
}
