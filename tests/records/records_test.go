// Package records holds the function's store of records to its contract on real NATS servers, of
// the newest and the oldest version, alone and in a cluster. It shows what becomes of builds,
// records and logs when a server or a replica dies, freezes or loses what it had.
package records

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"handler/function/records"
	"handler/function/records/jetstream"
	"handler/function/records/recordstest"
	"handler/function/tests/stack"
)

// root is the secret of all stores here.
var root = []byte("a root secret of the tests")

var timing = flag.Bool("timing", false, "hold followers to 15 s of silence, on a machine that does nothing else")

// patient has a test's own connection wait for longer than the 2 s of the library, which a busy
// machine may need.
var patient = nats.Timeout(recordstest.Timeout)

// binary returns the path of a server.
func binary(t testing.TB, oldest bool) string {
	t.Helper()
	repo, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	new, old, err := stack.BuildNATS(t.Context(), repo, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	if oldest {
		return old
	}
	return new
}

// start starts servers that end with the test.
func start(t testing.TB, cfg stack.NATSConfig) []*stack.NATS {
	t.Helper()
	if cfg.Bin == "" {
		cfg.Bin = binary(t, false)
	}
	cfg.Dir, cfg.Servers = t.TempDir(), max(cfg.Servers, 1)
	servers, err := stack.StartNATS(recordstest.Context(t), cfg)
	t.Cleanup(func() {
		for _, n := range servers {
			n.Thaw()
			if t.Failed() {
				t.Logf("%s ended its log with\n%s", n.URL, n.Log())
			}
			n.Kill()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return servers
}

func urls(servers []*stack.NATS) string {
	var list []string
	for _, n := range servers {
		list = append(list, n.URL)
	}
	return strings.Join(list, ",")
}

// open opens a store that is closed with the test.
func open(t testing.TB, servers []*stack.NATS, change func(*jetstream.Options)) *jetstream.Store {
	t.Helper()
	opts := jetstream.Options{
		URL: urls(servers), Roots: [][]byte{root}, Replicas: len(servers),
		Problem: func(err error) { t.Logf("%s: problem: %v", time.Now().Format("05.000"), err) },
	}
	if change != nil {
		change(&opts)
	}
	s, err := jetstream.Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		s.Close(ctx)
	})
	return s
}

// opened waits until a store can be reached.
func opened(t testing.TB, servers []*stack.NATS, change func(*jetstream.Options)) *jetstream.Store {
	t.Helper()
	s := open(t, servers, change)
	reachable(t, s)
	return s
}

func reachable(t testing.TB, s records.Store) {
	t.Helper()
	recordstest.Eventually(t, func() error {
		if st := s.Stats(); !st.Reachable {
			return fmt.Errorf("not reachable: %s", st.Problem)
		}
		return nil
	})
}

func TestContract(t *testing.T) {
	for _, tt := range []struct {
		name    string
		oldest  bool
		servers int
	}{
		{"One", false, 1},
		{"OneOldest", true, 1},
		{"Three", false, 3},
		{"ThreeOldest", true, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			servers := start(t, stack.NATSConfig{Bin: binary(t, tt.oldest), Servers: tt.servers})
			tests := 0
			recordstest.Run(t, func(t *testing.T) recordstest.Open {
				// Each test has a root of its own, and so a place without the records of others.
				tests++
				own := fmt.Appendf(nil, "%s %d", root, tests)
				return func(t *testing.T) records.Store {
					return opened(t, servers, func(o *jetstream.Options) { o.Roots = [][]byte{own} })
				}
			})
		})
	}
}

// TestNothing lists the builds of a server that has never had one.
func TestNothing(t *testing.T) {
	for _, oldest := range []bool{false, true} {
		s := opened(t, start(t, stack.NATSConfig{Bin: binary(t, oldest)}), nil)
		page, err := s.List(recordstest.Context(t), records.Query{Tenant: "acme"})
		if err != nil || !page.Complete || len(page.Builds) != 0 {
			t.Errorf("oldest %v: listed %+v, %v", oldest, page, err)
		}
	}
}
