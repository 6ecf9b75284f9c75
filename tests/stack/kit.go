package stack

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/seal"

	"handler/function/tests/client"
)

// Patience is how long a test waits for what a busy machine does late.
const Patience = time.Minute

// Soon is a context that ends before go test would kill the package.
func Soon(t testing.TB) context.Context { return Within(t, 3*time.Minute) }

// Mark is a word that makes a RUN step unlike all others, and that its processes can be found by.
func Mark() string { return "mark-" + rand.Text() }

// Held is a step that ends only when Release ends it, or its build is stopped.
func Held(mark string) string { return "RUN sleep 600; : " + mark }

// Dockerfile are the files of a context that has nothing else.
func Dockerfile(lines ...string) map[string]string {
	return map[string]string{"Dockerfile": strings.Join(lines, "\n") + "\n"}
}

// Later runs f in a goroutine. wait returns its result, and ends the test if that is an error.
func Later[T any](t testing.TB, f func(context.Context) (T, error)) (wait func() T) {
	t.Helper()
	ctx := Soon(t)
	var v T
	var err error
	var done sync.WaitGroup
	done.Go(func() { v, err = f(ctx) })
	t.Cleanup(done.Wait)
	return func() T {
		t.Helper()
		done.Wait()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// Background builds in a goroutine, for a stream. wait returns what came of it.
func Background(t testing.TB, c *client.Client, body []byte, changes ...client.Change) (wait func() client.Answer) {
	t.Helper()
	return Later(t, func(ctx context.Context) (client.Answer, error) {
		return c.Post(ctx, body, append([]client.Change{client.Accept(client.NDJSON)}, changes...)...)
	})
}

// SealingKey is the public key that a function gives a client for its build secrets.
func SealingKey(t testing.TB, c *client.Client) string {
	t.Helper()
	text, err := c.Get(Soon(t), "/publickey")
	if err != nil {
		t.Fatal(err)
	}
	var key struct {
		PublicKey string `json:"public_key"`
	}
	if err := json.Unmarshal([]byte(text), &key); err != nil || key.PublicKey == "" {
		t.Fatalf("%v: %s", err, text)
	}
	return key.PublicKey
}

// Sealed are build secrets, sealed to SealingKey: those of the client's tenant.
func Sealed(t testing.TB, c *client.Client, secrets map[string][]byte) []byte {
	t.Helper()
	envelope, err := seal.Seal([]byte(SealingKey(t, c)), secrets)
	if err != nil {
		t.Fatal(err)
	}
	return envelope
}

// Front stands before a registry. It has serve answer each request, which may pass it on to next,
// the registry. It returns the front's host:port.
func Front(t testing.TB, registry string, serve func(w http.ResponseWriter, r *http.Request, next http.Handler)) (addr string) {
	t.Helper()
	next := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: registry})
			r.Out.Host = r.In.Host // or its redirects lead past the front
		},
		FlushInterval: -1,
		// An upload that is aborted is no surprise in tests.
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { serve(w, r, next) }))
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return server.Listener.Addr().String()
}

// Link is a way to a server on loopback. It can be cut, and led to another server.
type Link struct {
	Addr string       // host:port
	to   atomic.Value // the server's host:port
	cut  atomic.Bool
}

// NewLink returns a way to a host:port.
func NewLink(t testing.TB, addr string) *Link {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	p := &Link{Addr: l.Addr().String()}
	p.Lead(addr)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			d, err := net.Dial("tcp", p.to.Load().(string))
			if err != nil {
				c.Close()
				continue
			}
			go p.pass(c, d)
			go p.pass(d, c)
		}
	}()
	return p
}

// Lead has new connections go to a host:port. Those that there are stay where they are.
func (p *Link) Lead(addr string) { p.to.Store(addr) }

// Cut has bytes vanish from now on, as on a network that drops them, or not any more.
func (p *Link) Cut(yes bool) { p.cut.Store(yes) }

func (p *Link) pass(to, from net.Conn) {
	defer to.Close()
	buf := make([]byte, 64<<10)
	broken := false
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		if broken = broken || p.cut.Load(); broken {
			if p.cut.Load() {
				continue
			}
			return // bytes are missing: the connection is of no use any more
		}
		if _, err := io.Writer(to).Write(buf[:n]); err != nil {
			return
		}
	}
}
