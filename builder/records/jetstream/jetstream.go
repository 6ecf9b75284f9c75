// Package jetstream keeps records in NATS JetStream, so that every replica of the builder sees
// all builds.
//
// A process has one goroutine for each build that it runs. Only these goroutines write: a build
// hands its lines over in memory, and never waits. A goroutine that cannot write tries again,
// and meanwhile lines gather, up to a limit.
//
// NATS is not trusted. Every payload is encrypted and bound to its subject, and nothing that is
// sent again changes what readers see. Who can reach the account can still remove records.
package jetstream

import (
	"cmp"
	"container/list"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	js "github.com/nats-io/nats.go/jetstream"

	"handler/function/records"
)

// Names of the streams.
const (
	RecordStream = "BUILDER_RECORDS"
	LogStream    = "BUILDER_LOGS"
)

// Times. A process whose heartbeat has not been heard for grace has died: its builds are lost
// after grace, sweepEvery, half a second and askFor at most, which is below 20 s.
const (
	beatEvery  = 2 * time.Second
	grace      = 10 * time.Second
	sweepEvery = 2 * time.Second
	askFor     = 3 * time.Second

	batchFor     = 50 * time.Millisecond // that a line waits for others
	writeTimeout = 5 * time.Second       // of one request by a writer
	readTimeout  = 3 * time.Second       // of a reader's requests
	readOwn      = time.Second / 2       // of a reader who has an answer of this process's own
	cancelFor    = time.Second           // that the owner of a build may take to answer
	keepRunning  = time.Minute           // that the running kind of an ended build is kept
)

const (
	maxRequests = 64 // of writers at once; a frozen server holds each of them for writeTimeout

	maxPending = 8 << 20 // bytes of lines and ended records that are not stored yet, of the process
	itemCost   = 128     // bytes of maxPending that an item takes beside its lines
	buildCost  = 8 << 10 // bytes of maxPending that an ended build and its goroutine take
)

// Options says where records are kept.
type Options struct {
	URL  string        // of one or more servers, separated by commas
	NATS []nats.Option // credentials and TLS

	// Roots are the lines of the root secret. The first seals. See SetRoots.
	Roots [][]byte

	// Limits of the streams, if this process is the one to create them. Zero values are a
	// week, 64 MiB, 512 MiB and one replica.
	Age         time.Duration
	RecordBytes int64
	LogBytes    int64
	Replicas    int

	// Daemons are the places that builds of this process have on daemons, by the address: the
	// other processes are told. Without it they are told of none.
	Daemons func() map[string]int

	// Ask completes the record of a build whose process has died with what became of the build.
	// If nobody knows, or ctx ends before, it returns the record as it was. It may be nil.
	Ask func(ctx context.Context, r records.Record) records.Record

	// Problem is told what the operator should know, at most once a minute. It may be nil.
	Problem func(err error)
}

// Store is a records.Store.
type Store struct {
	opts      Options
	process   string // this process, in subjects and records
	ring      atomic.Pointer[ring]
	followers records.Followers
	scans     chan struct{} // holds one value for each scan of all records
	requests  chan struct{} // holds one value for each request of a writer

	ctx     context.Context // ends when the store is closed
	stop    context.CancelFunc
	loops   sync.WaitGroup
	writers sync.WaitGroup

	// The connection is not under mu, and no caller of its methods may hold mu. nats.go locks the
	// connection for seconds while it connects or writes to a frozen server, and builds need mu.
	conn atomic.Pointer[nats.Conn]

	mu       sync.Mutex
	streams  *streams      // nil while they are not known to be there
	up       chan struct{} // closed when streams become known
	trouble  chan struct{} // has a value when the streams may be gone
	builds   map[name][]*build
	queue    list.List // of *item, the oldest first
	pending  int       // bytes of queue
	heard    map[string]*peer
	since    time.Time // when this process began to hear heartbeats without a break
	through  time.Time // when its latest heartbeat got through
	beatWake chan struct{}
	beats    uint64       // heartbeats sent
	used     records.Used // by this process; the streams remember longer
	purges   []purge
	told     time.Time // when Options.Problem was told last
	problem  error     // why there are no streams
	refused  error     // of the latest write

	dropped, forgotten, lost, errors uint64
}

type name struct{ tenant, id string }

// streams are the streams as they were found. They are made anew when a server has lost them.
type streams struct {
	js            js.JetStream
	records, logs js.Stream
	epoch         time.Time // records was created
	logEpoch      time.Time // logs was created
}

// Open returns a store at once. It connects in the background, for as long as it takes.
func Open(opts Options) (*Store, error) {
	if err := checkURL(opts.URL); err != nil {
		return nil, err
	}
	r, err := newRing(opts.Roots, nil)
	if err != nil {
		return nil, err
	}
	if opts.Age == 0 {
		opts.Age = 7 * 24 * time.Hour
	}
	if opts.RecordBytes == 0 {
		opts.RecordBytes = 64 << 20
	}
	if opts.LogBytes == 0 {
		opts.LogBytes = 512 << 20
	}
	opts.Replicas = max(opts.Replicas, 1)
	s := &Store{
		opts:      opts,
		process:   strings.ToLower(rand.Text()),
		followers: records.NewFollowers(),
		scans:     make(chan struct{}, 2),
		requests:  make(chan struct{}, maxRequests),
		up:        make(chan struct{}),
		trouble:   make(chan struct{}, 1),
		beatWake:  make(chan struct{}, 1),
		builds:    make(map[name][]*build),
		heard:     make(map[string]*peer),
		used:      make(records.Used),
		problem:   errors.New("connecting to NATS"),
	}
	s.ring.Store(r)
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.loops.Go(s.manage)
	s.loops.Go(s.beat)
	s.loops.Go(s.purging)
	s.loops.Go(s.sweep)
	return s, nil
}

// checkURL refuses what is no Options.URL.
func checkURL(list string) error {
	for server := range strings.SplitSeq(list, ",") {
		if u, err := url.Parse(strings.TrimSpace(server)); err != nil || u.Host == "" || !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme) {
			// Not %q: there may be a password in it.
			return errors.New("reading the address of NATS: it is not nats://host:port, or several with commas between them")
		}
	}
	return nil
}

// SetRoots replaces the lines of the root secret. Builds that run keep the key that they began
// with.
func (s *Store) SetRoots(roots [][]byte) error {
	r, err := newRing(roots, s.ring.Load())
	if err != nil {
		return err
	}
	s.ring.Store(r)
	return nil
}

func (s *Store) Stats() records.Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := records.Stats{
		Reachable: s.streams != nil && s.problem == nil && s.refused == nil,
		Pending:   int64(s.pending),
		Dropped:   s.dropped,
		Forgotten: s.forgotten,
		Lost:      s.lost,
		Errors:    s.errors,
		Followers: len(s.followers),
	}
	if err := cmp.Or(s.problem, s.refused); err != nil {
		st.Problem = err.Error()
	}
	if front := s.queue.Front(); front != nil {
		st.Lag = time.Since(front.Value.(*item).at)
	}
	return st
}

func (s *Store) Close(ctx context.Context) error {
	stored := make(chan struct{})
	go func() {
		s.writers.Wait()
		close(stored)
	}()
	var err error
	select {
	case <-stored:
	case <-ctx.Done():
		err = fmt.Errorf("storing the last records: %w", context.Cause(ctx))
	}
	s.stop()
	s.loops.Wait()
	<-stored
	if conn := s.conn.Load(); conn != nil {
		conn.Close()
	}
	return err
}

// failed counts a request that the store did not answer. It returns the error for the reader:
// ErrUnknown with err, or ctx's cause if ctx has ended.
func (s *Store) failed(ctx context.Context, err error) error {
	if ctx.Err() != nil && s.ctx.Err() == nil {
		return context.Cause(ctx)
	}
	s.mu.Lock()
	s.errors++
	s.mu.Unlock()
	if errors.Is(err, js.ErrNoStreamResponse) || errors.Is(err, nats.ErrNoResponders) || errors.Is(err, js.ErrStreamNotFound) {
		s.suspect()
	}
	return fmt.Errorf("%w: %w", records.ErrUnknown, err)
}

// suspect has the streams looked for again.
func (s *Store) suspect() {
	select {
	case s.trouble <- struct{}{}:
	default:
	}
}

// current returns the streams, or an error if they are not known.
func (s *Store) current() (*streams, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.streams == nil {
		return nil, fmt.Errorf("%w: %w", records.ErrUnknown, s.problem)
	}
	return s.streams, nil
}
