package buildkit

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
	// keepaliveTime and keepaliveTimeout make a daemon that is frozen, or that
	// a network has lost, known within 20 s. grpc-go allows no shorter time.
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 10 * time.Second

	// checkTimeout bounds the RPC that shows a connection to be alive, dialling
	// included. keptTimeout is for one that has answered before: if it was too
	// short, a new one is dialled for nothing.
	checkTimeout = 5 * time.Second
	keptTimeout  = 2 * time.Second

	// dialWindow is for how long dialling is tried again: a daemon that is
	// restarted is back within it.
	dialWindow   = 5 * time.Second
	dialInterval = 200 * time.Millisecond
)

// daemon is one buildkitd, with the connection that is kept to it.
type daemon struct {
	addr       string
	serverName string
	files      [3]string // CA, certificate, key; all empty without TLS
	log        zerolog.Logger
	health     health

	mu       sync.Mutex
	cur      *conn
	closed   bool
	platform string // its own, as it said last
}

// conn is one client's connection. It is closed when it has been dropped and
// its last build has released it.
type conn struct {
	client *client.Client
	sum    [sha256.Size]byte // of the TLS files it was made from
	ends   *connEnds

	refs    int // guarded by daemon.mu, as is dropped
	dropped bool

	answered atomic.Bool // before
}

var errClosed = errors.New("the solver is closed")

// get is the kept connection, or a new one where there is none or its TLS files
// have changed. It does not wait for the network.
func (d *daemon) get() (*conn, error) {
	tlsConfig, sum, tlsErr := d.loadTLS()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errClosed
	}
	if d.cur != nil && (tlsErr != nil || sum == d.cur.sum) {
		if tlsErr != nil {
			d.log.Error().Err(tlsErr).Msg("keeping the connection to buildkitd made with the files before")
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

// dial needs no network: gRPC connects on the first RPC.
func (d *daemon) dial(tlsConfig *tls.Config) (*conn, error) {
	c := &conn{ends: &connEnds{end: make(chan struct{})}}
	opts := []client.ClientOpt{
		client.WithGRPCDialOption(grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout})),
		client.WithGRPCDialOption(grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: dialInterval, Multiplier: 1.5, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: checkTimeout,
		})),
		client.WithGRPCDialOption(grpc.WithStatsHandler(c.ends)),
		// A span in a build's context would reach the daemon, and its RUN steps.
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
func (d *daemon) loadTLS() (*tls.Config, [sha256.Size]byte, error) {
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

// drop has c closed after its last build. It holds d.mu.
func (d *daemon) drop(c *conn) {
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

// release gives c back; a connection that failed is not kept.
func (d *daemon) release(c *conn, failed bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c.refs--
	if failed {
		d.drop(c)
	}
	if c.dropped && c.refs == 0 {
		c.client.Close()
	}
}

// acquire is a connection that has just answered, a new one where the kept one
// does not. It must be released.
func (d *daemon) acquire(ctx context.Context) (*conn, error) {
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
			d.release(c, false) // of its state nothing is known
			return nil, context.Cause(ctx)
		}
		d.release(c, true)
		if !old {
			return nil, err
		}
	}
}

// check makes one small RPC.
func (d *daemon) check(ctx context.Context, c *conn) error {
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
	// Its own comes first, before those it emulates.
	if p := workers[0].Platforms; len(p) > 0 {
		d.mu.Lock()
		d.platform = platforms.Format(platforms.Normalize(p[0]))
		d.mu.Unlock()
	}
	c.answered.Store(true)
	return nil
}

func (d *daemon) close() error {
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

// connEnds tells that a transport to the daemon has ended. An error alone
// cannot: what the daemon relays of a registry has the same code.
type connEnds struct {
	mu  sync.Mutex
	end chan struct{} // closed, and made anew, when a transport ends
}

// next is closed when a transport ends from now on.
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
