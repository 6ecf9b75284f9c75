package pool

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/client"
	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/stats"
)

const (
	// A daemon that is frozen, or that the network has lost, is noticed within 20 s.
	// grpc-go allows no shorter keepaliveTime.
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 10 * time.Second

	// checkTimeout bounds the RPC that shows a connection to be alive, dialling
	// included. keptTimeout bounds it for a connection that has answered before. If it is
	// too short, a new connection is dialled for nothing.
	checkTimeout = 5 * time.Second
	keptTimeout  = 2 * time.Second

	// dialWindow is how long dialling is tried again. A daemon that is restarted is back
	// within it.
	dialWindow   = 5 * time.Second
	dialInterval = 200 * time.Millisecond
)

// Daemon is one buildkitd, with the connection that is kept to it.
type Daemon struct {
	addr       string
	serverName string
	files      [3]string // CA, certificate, key; all empty without TLS
	log        zerolog.Logger
	health     health

	reading  sync.Mutex // held while get compares the files with those of cur; locked before mu
	mu       sync.Mutex
	cur      *conn
	closed   bool
	platform string // its own, as it said last
}

func newDaemon(addr string, cfg *Config) *Daemon {
	return &Daemon{
		addr:       addr,
		serverName: cfg.ServerName,
		files:      [3]string{cfg.CAFile, cfg.CertFile, cfg.KeyFile},
		log:        cfg.Log,
		health:     health{addr: addr, seats: cfg.Seats, pruning: make(chan struct{}, 1)},
	}
}

// Addr is the daemon's address: an entry of Config.Addrs, or an address that its name was
// looked up to.
func (d *Daemon) Addr() string { return d.addr }

// Native is the daemon's own platform, as it said last. It is empty if the daemon has never
// answered.
func (d *Daemon) Native() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.platform
}

// conn is a connection to a daemon. It is closed once it has been dropped and its last build
// has released it.
type conn struct {
	client *client.Client
	sum    [sha256.Size]byte // of the TLS files it was made from
	ends   *connEnds
	solves *solves

	refs    int  // users that have not released it; guarded by Daemon.mu
	dropped bool // guarded by Daemon.mu

	answered atomic.Bool // at least once
}

var errClosed = errors.New("the pool is closed, or the daemon has left it")

// get returns the kept connection, or a new one if there is none or the TLS files have
// changed. It does not wait for the network.
func (d *Daemon) get() (*conn, error) {
	// The files are read under a lock. Otherwise a call that has read older files could replace a
	// newer connection.
	d.reading.Lock()
	defer d.reading.Unlock()
	tlsConfig, sum, tlsErr := d.loadTLS()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errClosed
	}
	if d.cur != nil && (tlsErr != nil || sum == d.cur.sum) {
		if tlsErr != nil {
			d.log.Error().Err(tlsErr).Msg("keeping the connection to buildkitd: its new TLS files cannot be read")
		}
		d.cur.refs++
		return d.cur, nil
	}
	if tlsErr != nil {
		return nil, tlsErr
	}
	c, err := d.dial(tlsConfig)
	if err != nil {
		return nil, err
	}
	c.sum = sum
	d.drop(d.cur)
	d.cur = c
	c.refs++
	return c, nil
}

// dial does not wait for the network: gRPC connects on the first RPC.
func (d *Daemon) dial(tlsConfig *tls.Config) (*conn, error) {
	c := &conn{ends: &connEnds{end: make(chan struct{})}, solves: &solves{all: make(map[string]*oneSolve)}}
	opts := []client.ClientOpt{
		client.WithGRPCDialOption(grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout})),
		client.WithGRPCDialOption(grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: dialInterval, Multiplier: 1.5, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: checkTimeout,
		})),
		client.WithGRPCDialOption(grpc.WithStatsHandler(c.ends)),
		client.WithGRPCDialOption(grpc.WithChainStreamInterceptor(c.solves.keepStatuses)),
		client.WithGRPCDialOption(grpc.WithChainUnaryInterceptor(tellAnswered)),
		// Without it, a span in a build's context reaches the daemon and its RUN steps.
		client.WithTracerProvider(nil),
	}
	if tlsConfig != nil {
		opts = append(opts,
			client.WithGRPCDialOption(grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig))),
			client.WithGRPCDialOption(grpc.WithAuthority(tlsConfig.ServerName)))
	}
	var err error
	c.client, err = client.New(context.Background(), d.addr, opts...)
	if err != nil {
		return nil, fmt.Errorf("dialling buildkitd: %w", err)
	}
	return c, nil
}

// loadTLS makes the configuration and its hash from one reading of the files.
func (d *Daemon) loadTLS() (*tls.Config, [sha256.Size]byte, error) {
	var sum [sha256.Size]byte
	if d.files == [3]string{} || strings.HasPrefix(d.addr, "unix://") {
		return nil, sum, nil
	}
	var data [3][]byte
	h := sha256.New()
	for i, name := range d.files {
		var err error
		if data[i], err = os.ReadFile(name); err != nil {
			return nil, sum, fmt.Errorf("reading buildkitd's TLS files: %w", err)
		}
		fmt.Fprintf(h, "%d ", len(data[i]))
		h.Write(data[i])
	}
	h.Sum(sum[:0])
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(data[0]) {
		return nil, sum, fmt.Errorf("reading buildkitd's TLS files: %q holds no certificate", d.files[0])
	}
	cert, err := tls.X509KeyPair(data[1], data[2])
	if err != nil {
		return nil, sum, fmt.Errorf("reading buildkitd's TLS files: %w", err)
	}
	return &tls.Config{
		ServerName:   d.serverName,
		RootCAs:      roots,
		Certificates: []tls.Certificate{cert},
		MinVersion:   tls.VersionTLS12,
	}, sum, nil
}

// drop has c closed after its last build. The caller must hold d.mu.
func (d *Daemon) drop(c *conn) {
	if c == nil || c.dropped {
		return
	}
	c.dropped = true
	if d.cur == c {
		d.cur = nil
	}
	if c.refs == 0 {
		c.client.Close()
	}
}

// release gives c back. A connection that failed is not kept.
func (d *Daemon) release(c *conn, failed bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c.refs--
	switch {
	case failed && !c.dropped:
		d.drop(c)
	case c.dropped && c.refs == 0:
		c.client.Close()
	}
}

// acquire returns a connection that has just answered: the kept one, or a new one if that does
// not answer. The caller must release it.
func (d *Daemon) acquire(ctx context.Context) (*conn, error) {
	for {
		c, err := d.get()
		if err != nil {
			return nil, err
		}
		old := c.answered.Load()
		if err = d.check(ctx, c); err == nil {
			return c, nil
		}
		if ctx.Err() != nil {
			d.release(c, false) // it may well be alive
			return nil, context.Cause(ctx)
		}
		d.release(c, true)
		if !old {
			return nil, err
		}
	}
}

// check makes one small RPC.
func (d *Daemon) check(ctx context.Context, c *conn) error {
	if c.answered.Load() {
		ctx, cancel := context.WithTimeout(ctx, keptTimeout)
		defer cancel()
		_, err := c.client.Info(ctx)
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	workers, err := c.client.ListWorkers(ctx)
	if err != nil {
		return err
	}
	if len(workers) == 0 {
		return errors.New("buildkitd has no worker")
	}
	// The daemon's own platform comes first, before those that it emulates.
	if p := workers[0].Platforms; len(p) > 0 {
		d.mu.Lock()
		d.platform = platforms.Format(platforms.Normalize(p[0]))
		d.mu.Unlock()
	}
	c.answered.Store(true)
	return nil
}

func (d *Daemon) close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	c := d.cur
	if c == nil || c.refs > 0 {
		d.drop(c)
		return nil
	}
	c.dropped, d.cur = true, nil
	return c.client.Close()
}

// connEnds tells when a transport to the daemon ends. An error alone does not tell: the
// daemon passes on a registry's errors with the same codes.
type connEnds struct {
	mu  sync.Mutex
	end chan struct{} // closed, and replaced, when a transport ends
}

// next returns a channel that is closed when the next transport ends.
func (e *connEnds) next() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.end
}

func (e *connEnds) HandleConn(_ context.Context, s stats.ConnStats) {
	if _, ok := s.(*stats.ConnEnd); ok {
		e.mu.Lock()
		close(e.end)
		e.end = make(chan struct{})
		e.mu.Unlock()
	}
}

func (*connEnds) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (*connEnds) HandleRPC(context.Context, stats.RPCStats)                         {}
func (*connEnds) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
