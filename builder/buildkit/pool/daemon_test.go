package pool

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/solver/pb"
	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"handler/function/api"
	"handler/function/solve"
)

// control is a fake daemon. It answers the RPCs by which a connection is checked and a build is
// placed, and a solve as a daemon with a full disk does.
type control struct {
	controlapi.UnimplementedControlServer
	mu      sync.Mutex
	clients []string // common names, one for each RPC
	active  int      // builds
	known   string   // Ref of another one
	asked   int      // questions for the history
	prunes  int
	pruned  func() // instead of an answer
	stuck   bool   // nothing can be pruned
	full    bool   // also after a prune
	frozen  bool   // no RPC is answered
	slow    bool   // no solve ends
	busy    bool   // no look into the history ends
}

func (c *control) ListenBuildHistory(req *controlapi.BuildHistoryRequest, stream grpc.ServerStreamingServer[controlapi.BuildHistoryEvent]) error {
	c.mu.Lock()
	busy := c.busy
	if req.EarlyExit {
		c.asked++
	}
	c.mu.Unlock()
	// Without EarlyExit, it also waits for the builds to end. Here none does.
	if busy || !req.EarlyExit {
		<-stream.Context().Done()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.active {
		if err := stream.Send(&controlapi.BuildHistoryEvent{Record: &controlapi.BuildHistoryRecord{Ref: fmt.Sprint(i)}}); err != nil {
			return err
		}
	}
	if c.known != "" {
		return stream.Send(&controlapi.BuildHistoryEvent{Record: &controlapi.BuildHistoryRecord{Ref: c.known}})
	}
	return nil
}

func (c *control) DiskUsage(context.Context, *controlapi.DiskUsageRequest) (*controlapi.DiskUsageResponse, error) {
	return &controlapi.DiskUsageResponse{Record: []*controlapi.UsageRecord{{Size: 1000}, {Size: 24}}}, nil
}

func (c *control) Prune(req *controlapi.PruneRequest, stream grpc.ServerStreamingServer[controlapi.UsageRecord]) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.prunes++
	if c.pruned != nil {
		go c.pruned()
		<-stream.Context().Done()
		return stream.Context().Err()
	}
	if c.stuck || req.MaxUsedSpace != 512 {
		return status.Errorf(codes.ResourceExhausted, "pruning to %d bytes: no space left on device", req.MaxUsedSpace)
	}
	return stream.Send(&controlapi.UsageRecord{Size: 600})
}

func (c *control) Solve(ctx context.Context, _ *controlapi.SolveRequest) (*controlapi.SolveResponse, error) {
	c.mu.Lock()
	slow := c.slow
	c.mu.Unlock()
	if slow {
		<-ctx.Done()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.full {
		return nil, status.Error(codes.Unknown, "mkdir x: no space left on device")
	}
	return &controlapi.SolveResponse{}, nil
}

func (c *control) Session(stream grpc.BidiStreamingServer[controlapi.BytesMessage, controlapi.BytesMessage]) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return nil // the client has closed the session
		}
	}
}

func (c *control) Status(*controlapi.StatusRequest, grpc.ServerStreamingServer[controlapi.StatusResponse]) error {
	return nil
}

func (c *control) seen(ctx context.Context) error {
	p, _ := peer.FromContext(ctx)
	name := ""
	if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
		name = info.State.PeerCertificates[0].Subject.CommonName
	}
	c.mu.Lock()
	c.clients = append(c.clients, name)
	frozen := c.frozen
	c.mu.Unlock()
	if frozen {
		<-ctx.Done()
	}
	return ctx.Err()
}

func (c *control) freeze() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frozen = true
}

// awaitAsked waits until the daemon has been asked for its history more than n times.
func (c *control) awaitAsked(t *testing.T, n int) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		c.mu.Lock()
		asked := c.asked
		c.mu.Unlock()
		if asked > n {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("asked for the history %d times in a minute", asked)
		}
	}
}

func (c *control) last() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.clients[len(c.clients)-1]
}

func (c *control) Info(ctx context.Context, _ *controlapi.InfoRequest) (*controlapi.InfoResponse, error) {
	return &controlapi.InfoResponse{}, c.seen(ctx)
}

func (c *control) ListWorkers(ctx context.Context, _ *controlapi.ListWorkersRequest) (*controlapi.ListWorkersResponse, error) {
	return &controlapi.ListWorkersResponse{Record: []*apitypes.WorkerRecord{{
		ID: "w", Platforms: []*pb.Platform{{OS: "linux", Architecture: "arm64"}, {OS: "linux", Architecture: "amd64"}},
	}}}, c.seen(ctx)
}

// ca makes certificates that it has signed.
type ca struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newCA(t *testing.T) *ca {
	c := &ca{t: t}
	var der []byte
	der, c.key = c.make("ca", true)
	c.cert, _ = x509.ParseCertificate(der)
	c.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return c
}

func (c *ca) make(name string, isCA bool) ([]byte, *ecdsa.PrivateKey) {
	c.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		c.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: isCA, BasicConstraintsValid: true,
	}
	parent, parentKey := template, key
	if c.cert != nil {
		parent, parentKey = c.cert, c.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		c.t.Fatal(err)
	}
	return der, key
}

func (c *ca) pair(name string) (cert, key []byte) {
	der, k := c.make(name, false)
	keyDER, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		c.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})
}

// listen serves c over mTLS, or without it where authority is nil.
func listen(t *testing.T, c *control, network, addr string, authority *ca) (string, *grpc.Server) {
	t.Helper()
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	var opts []grpc.ServerOption
	if authority != nil {
		cert, key := authority.pair("buildkitd")
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AddCert(authority.cert)
		opts = append(opts, grpc.Creds(credentials.NewTLS(&tls.Config{
			Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		})))
	}
	s := grpc.NewServer(opts...)
	controlapi.RegisterControlServer(s, c)
	go s.Serve(l)
	t.Cleanup(s.Stop)
	return l.Addr().String(), s
}

// tlsDaemon is a daemon with TLS files, which the function writes.
func tlsDaemon(t *testing.T, addr string, log *bytes.Buffer) (*Daemon, func(authority *ca, name string)) {
	dir := t.TempDir()
	d := &Daemon{addr: "tcp://" + addr, serverName: "buildkitd", log: zerolog.New(log)}
	for i, name := range []string{"ca.crt", "tls.crt", "tls.key"} {
		d.files[i] = filepath.Join(dir, name)
	}
	t.Cleanup(func() { d.close() })
	return d, func(authority *ca, name string) {
		t.Helper()
		cert, key := authority.pair(name)
		for i, data := range [][]byte{authority.pem, cert, key} {
			if err := os.WriteFile(d.files[i], data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func mustAcquire(t *testing.T, d *Daemon) *conn {
	t.Helper()
	c, err := d.acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestConnectionKept(t *testing.T) {
	authority := newCA(t)
	ctl := &control{}
	addr, _ := listen(t, ctl, "tcp", "127.0.0.1:0", authority)
	d, write := tlsDaemon(t, addr, &bytes.Buffer{})
	write(authority, "one")
	first := mustAcquire(t, d)
	if p := d.Native(); p != "linux/arm64" {
		t.Errorf("platform %q", p)
	}
	second := mustAcquire(t, d)
	if first != second || ctl.last() != "one" {
		t.Errorf("two connections, the last by %q", ctl.last())
	}
	d.release(first, false)
	d.release(second, false)
	if c := mustAcquire(t, d); c != first || c.dropped {
		t.Error("an idle connection is not kept")
	}
}

func TestCertificatesReplaced(t *testing.T) {
	authority := newCA(t)
	ctl := &control{}
	addr, _ := listen(t, ctl, "tcp", "127.0.0.1:0", authority)
	var log bytes.Buffer
	d, write := tlsDaemon(t, addr, &log)
	write(authority, "one")
	old := mustAcquire(t, d)

	write(authority, "two")
	c := mustAcquire(t, d)
	if c == old || ctl.last() != "two" {
		t.Fatalf("the new certificate is not used: %q", ctl.last())
	}
	if err := d.check(t.Context(), old); err != nil || ctl.last() != "one" {
		t.Errorf("the old connection, in use, is closed: %v", err)
	}
	d.release(old, false)
	if err := d.check(t.Context(), old); err == nil {
		t.Error("the old connection is open after its last build")
	}
	d.release(c, false)

	if err := os.WriteFile(d.files[2], []byte("half wri"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := mustAcquire(t, d); got != c {
		t.Error("a broken file ends the connection that works")
	} else {
		d.release(got, false)
	}
	if !strings.Contains(log.String(), "keeping") {
		t.Errorf("not logged: %s", log.String())
	}
	write(authority, "three")
	d.release(mustAcquire(t, d), false)
	if ctl.last() != "three" {
		t.Errorf("the repaired file is not used: %q", ctl.last())
	}
}

// TestCertificatesInOrder asks for the connection all the time while the files change. Each change
// makes one connection: a call that has read older files than another does not bring them back.
func TestCertificatesInOrder(t *testing.T) {
	authority := newCA(t)
	d, write := tlsDaemon(t, "127.0.0.1:1", &bytes.Buffer{})
	write(authority, "0")
	var mu sync.Mutex
	made := map[*conn]bool{}
	get := func() error {
		c, err := d.get()
		if err != nil {
			return err
		}
		d.release(c, false)
		mu.Lock()
		defer mu.Unlock()
		made[c] = true
		return nil
	}
	if err := get(); err != nil { // from now on, files that do not fit are no error
		t.Fatal(err)
	}
	var callers sync.WaitGroup
	stop := make(chan struct{})
	end := sync.OnceFunc(func() { close(stop); callers.Wait() })
	defer end()
	for range 4 {
		callers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := get(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	const changes = 20
	for i := range changes {
		write(authority, fmt.Sprint(i+1))
		if err := get(); err != nil {
			t.Fatal(err)
		}
	}
	end()
	if len(made) != changes+1 {
		t.Errorf("%d connections were made with %d sets of files", len(made), changes+1)
	}
}

func TestCertificatesRefused(t *testing.T) {
	authority, stranger := newCA(t), newCA(t)
	addr, _ := listen(t, &control{}, "tcp", "127.0.0.1:0", authority)
	for _, tt := range []struct {
		name string
		set  func(d *Daemon, write func(*ca, string))
	}{
		{"absent", func(*Daemon, func(*ca, string)) {}},
		{"another CA", func(_ *Daemon, write func(*ca, string)) { write(stranger, "one") }},
		{"another server name", func(d *Daemon, write func(*ca, string)) { write(authority, "one"); d.serverName = "other" }},
		{"a client of another CA", func(d *Daemon, write func(*ca, string)) {
			write(stranger, "one")
			os.WriteFile(d.files[0], authority.pem, 0o600)
		}},
		{"no certificate in the CA file", func(d *Daemon, write func(*ca, string)) {
			write(authority, "one")
			os.WriteFile(d.files[0], []byte("junk"), 0o600)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d, write := tlsDaemon(t, addr, &bytes.Buffer{})
			tt.set(d, write)
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			if c, err := d.acquire(ctx); err == nil {
				d.release(c, false)
				t.Error("connected")
			}
		})
	}
}

func TestDaemonRestarted(t *testing.T) {
	t.Parallel()
	ctl := &control{}
	socket := filepath.Join(t.TempDir(), "s")
	_, s := listen(t, ctl, "unix", socket, nil)
	p := mustNew(t, Config{Addrs: []string{"unix://" + socket}, CAFile: "absent", CertFile: "absent", KeyFile: "absent"})
	first, err := p.Place(t.Context(), Key{Cache: "key"}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	end := first.end
	s.Stop()
	select {
	case <-end:
	case <-time.After(time.Minute):
		t.Error("the end of the transport is not told")
	}
	first.give(true)
	time.AfterFunc(500*time.Millisecond, func() { listen(t, ctl, "unix", socket, nil) })
	start := time.Now()
	again, err := p.Place(t.Context(), Key{Cache: "key"}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	again.Leave()
	if again.conn == first.conn {
		t.Error("the lost connection is used again")
	}
	if took := time.Since(start); took >= dialWindow {
		t.Errorf("found again after %v", took)
	}
}

func mustNew(t *testing.T, cfg Config) *Pool {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestDaemonAbsent(t *testing.T) {
	t.Parallel()
	p := mustNew(t, Config{Addrs: []string{"unix://" + filepath.Join(t.TempDir(), "absent")}})
	if got := p.Count(t.Context()); got != (solve.Daemons{Total: 1}) {
		t.Errorf("%+v", got)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(300*time.Millisecond, func() { cancel(errClosed) })
	if _, err := p.Place(ctx, Key{Cache: "key"}, nil, nil); err != errClosed {
		t.Errorf("canceled: %v", err)
	}
	start := time.Now()
	if _, err := p.Place(t.Context(), Key{Cache: "key"}, nil, nil); api.AsError(err).Code != api.NoDaemon || time.Since(start) > 2*dialWindow {
		t.Errorf("%v after %v", err, time.Since(start))
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	for _, d := range p.daemons {
		if _, err := d.acquire(t.Context()); err != errClosed {
			t.Errorf("closed: %v", err)
		}
	}
}

func TestDaemons(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	listen(t, &control{}, "unix", socket, nil)
	p := mustNew(t, Config{Addrs: []string{"unix://" + socket}})
	if got := p.Count(t.Context()); got != (solve.Daemons{Total: 1, Reachable: 1}) {
		t.Errorf("%+v", got)
	}
	if p.daemons[0].cur.refs != 0 {
		t.Error("the connection is not given back")
	}
}
