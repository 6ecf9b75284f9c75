package manifests

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"handler/function/records"
	store "handler/function/records/jetstream"
	"handler/function/records/recordstest"
	"handler/function/tests/stack"
)

// natsFleet are servers that run with the files of a variant's pods.
type natsFleet struct {
	servers []*stack.NATS
	access  store.Access // as the function has it after make secrets
	ca      string
	routes  []string // addresses
	certs   string   // that certs.sh has made
}

// url is that of all servers.
func (f *natsFleet) url() string {
	var list []string
	for _, n := range f.servers {
		list = append(list, n.URL)
	}
	return strings.Join(list, ",")
}

// startNATS starts the servers of a variant. Their files are those of the pods, but for the
// directories and the addresses, which this machine may have already.
func startNATS(t *testing.T, name string, change func(files map[string]string)) *natsFleet {
	t.Helper()
	dir := checkout(t)
	v := mustLoad(t, filepath.Join(dir, name))
	files, err := v.natsFiles()
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(files)
	}
	certs := filepath.Join(dir, "certs")
	f := &natsFleet{certs: certs, ca: filepath.Join(certs, "nats", "ca.pem")}
	f.access = store.Access{Credential: filepath.Join(certs, "nats", "credential"), CA: f.ca}
	bin, _, err := stack.BuildNATS(t.Context(), stack.Shared(t).Repo, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	n := int(value(value(v.set).Spec.Replicas))
	var ports []int
	for range 2 * n {
		port, err := stack.FreePort()
		if err != nil {
			t.Fatal(err)
		}
		ports = append(ports, port)
	}
	var moved []string
	for i := range n {
		route := fmt.Sprintf("localhost:%d", ports[n+i])
		f.routes = append(f.routes, route)
		moved = append(moved, fmt.Sprintf("%s-%d.%s:6222", v.set.Name, i, natsRoutes), route)
	}
	for i := range n {
		own := filepath.Join(t.TempDir(), "nats")
		here := strings.NewReplacer(append(slices.Clone(moved),
			"/etc/nats/", own+"/", "/var/lib/nats", own+"/store",
			"0.0.0.0:4222", fmt.Sprintf("127.0.0.1:%d", ports[i]),
			"0.0.0.0:6222", fmt.Sprintf("127.0.0.1:%d", ports[n+i]))...)
		placed := map[string]string{}
		for name, text := range files {
			placed[name] = here.Replace(text)
		}
		if err := stack.WriteContext(own, placed); err != nil {
			t.Fatal(err)
		}
		conf := placed["nats.conf"] + fmt.Sprintf("\nserver_name: %s-%d\n", v.set.Name, i)
		server, err := stack.ConfiguredNATS(bin, own, conf, fmt.Sprintf("tls://localhost:%d", ports[i]))
		if err != nil {
			t.Fatal(err)
		}
		f.servers = append(f.servers, server)
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("%s ended its log with\n%s", server.URL, server.Log())
			}
			server.Kill()
		})
	}
	for _, server := range f.servers {
		if err := server.Ready(stack.Within(t, 2*time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// open opens the function's store as the function does. It is closed with the test.
func (f *natsFleet) open(t *testing.T, root string) *store.Store {
	t.Helper()
	s, err := store.Open(store.Options{
		URL: f.url(), NATS: f.access.Options(), Roots: [][]byte{[]byte(root)}, Replicas: len(f.servers),
		Problem: func(err error) {
			if t.Logf("problem: %v", err); errors.Is(err, nats.ErrPermissionViolation) {
				t.Errorf("the function's user may not do what the function does: %v", err)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		s.Close(ctx)
	})
	recordstest.Eventually(t, func() error {
		if st := s.Stats(); !st.Reachable {
			return errors.New(st.Problem)
		}
		return nil
	})
	return s
}

// keep stores a build with a log, and returns when another process sees both.
func keep(t *testing.T, by, other records.Store, id string) records.Ref {
	t.Helper()
	b := recordstest.Begin(by, "acme", id)
	b.Log("one", "two")
	b.End(recordstest.Success())
	ref := records.Ref{Tenant: "acme", ID: id}
	recordstest.Known(t, other, ref, recordstest.Ended)
	recordstest.Eventually(t, func() error {
		lines, _, err := recordstest.FollowLog(recordstest.Context(t), other, ref, 0, false)
		if err != nil || !maps.Equal(lines, map[uint64]string{1: "one", 2: "two"}) {
			return fmt.Errorf("the log is %v, %w", lines, err)
		}
		return nil
	})
	return ref
}

// dial connects as somebody, and returns what the server complains about later.
func dial(t *testing.T, url string, opts ...nats.Option) (conn *nats.Conn, complaints <-chan error, err error) {
	t.Helper()
	told := make(chan error, 16)
	conn, err = nats.Connect(url, append([]nats.Option{
		nats.MaxReconnects(0), nats.Timeout(time.Minute),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { told <- err }),
	}, opts...)...)
	if err == nil {
		t.Cleanup(conn.Close)
	}
	return conn, told, err
}

// TestNATS runs the server of buildkit/nats: the function's credential is enough for everything
// that the function does there, and for nothing else, and nobody gets in without it.
func TestNATS(t *testing.T) {
	t.Parallel()
	f := startNATS(t, "nats", nil)
	a, b := f.open(t, "a root secret"), f.open(t, "a root secret")
	useAll(t, a, b)
	ref := keep(t, a, b, "kept")

	f.strangers(t)
	f.permissions(t)
	f.limits(t)

	// After a restart, all is there.
	f.servers[0].Kill()
	if err := f.servers[0].Restart(recordstest.Context(t)); err != nil {
		t.Fatal(err)
	}
	recordstest.Known(t, f.open(t, "a root secret"), ref, recordstest.Ended)
}

// strangers try to get in.
func (f *natsFleet) strangers(t *testing.T) {
	t.Helper()
	url := f.servers[0].URL
	for who, opts := range map[string][]nats.Option{
		"nobody":               {nats.RootCAs(f.ca)},
		"a user without a key": {nats.RootCAs(f.ca), nats.UserInfo("builder", "")},
		"a wrong password":     {nats.RootCAs(f.ca), nats.UserInfo("builder", "k0")},
		"a token":              {nats.RootCAs(f.ca), nats.Token("builder")},
		"the function's certificate": {nats.RootCAs(f.ca), nats.ClientCert(filepath.Join(f.certs, "client", "cert.pem"),
			filepath.Join(f.certs, "client", "key.pem"))},
	} {
		if _, _, err := dial(t, url, opts...); !errors.Is(err, nats.ErrAuthorization) {
			t.Errorf("%s: %v", who, err)
		}
	}
	if _, _, err := dial(t, url, nats.UserInfo("builder", "")); err == nil || !strings.Contains(err.Error(), "x509") {
		t.Errorf("without the CA: %v", err)
	}
	if answer := plain(t, url); !strings.Contains(answer, "Secure Connection") && !strings.Contains(answer, "EOF") {
		t.Errorf("without TLS: %q", answer)
	}
}

// permissions tries what the function does not do with the function's credential.
func (f *natsFleet) permissions(t *testing.T) {
	t.Helper()
	conn, complaints, err := dial(t, f.servers[0].URL, f.access.Options()...)
	if err != nil {
		t.Fatal(err)
	}
	ctx := recordstest.Context(t)
	for subject, try := range map[string]func(string) error{
		"orders.new":  func(s string) error { return conn.Publish(s, nil) },
		"$SYS.REQ.>":  func(s string) error { return conn.Publish("$SYS.REQ.SERVER.PING", nil) },
		">":           func(s string) error { _, err := conn.SubscribeSync(s); return err },
		"$JS.EVENT.>": func(s string) error { _, err := conn.SubscribeSync(s); return err },
	} {
		if err := errors.Join(try(subject), conn.FlushWithContext(ctx)); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-complaints:
			if !errors.Is(err, nats.ErrPermissionViolation) {
				t.Errorf("the function's user on %s: %v", subject, err)
			}
		case <-ctx.Done():
			t.Errorf("the function's user may use %s", subject)
		}
	}
}

// limits fills the function's account.
func (f *natsFleet) limits(t *testing.T) {
	t.Helper()
	conn, _, err := dial(t, f.servers[0].URL, f.access.Options()...)
	if err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	ctx := recordstest.Context(t)
	// Both streams have their 576 MiB of the account's 640.
	more := jetstream.StreamConfig{Name: "MORE", Subjects: []string{"builder.more"}, MaxBytes: 65 << 20}
	if _, err := js.CreateStream(ctx, more); !tooMuch(err) {
		t.Errorf("a third stream above the account's limit: %v", err)
	}
	more.MaxBytes = 32 << 20
	if _, err := js.CreateStream(ctx, more); err != nil {
		t.Errorf("a third stream within the account's limit: %v", err)
	}
}

// tooMuch says whether JetStream has no room for a stream.
func tooMuch(err error) bool {
	api, ok := errors.AsType[*jetstream.APIError](err)
	return ok && strings.Contains(api.Description, "insufficient") || ok && strings.Contains(api.Description, "maximum bytes")
}

// plain is what a server says to a client that speaks no TLS.
func plain(t *testing.T, url string) string {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "tls://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	return afterConnect(conn, bufio.NewReader(conn), `{"user":"builder","pass":""}`)
}

// afterConnect says CONNECT and PING to a server, and returns what it says to that: PONG, an error,
// or why there is no answer.
func afterConnect(conn net.Conn, r *bufio.Reader, options string) string {
	fmt.Fprintf(conn, "CONNECT %s\r\nPING\r\n", options)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return err.Error()
		}
		if line = strings.TrimSpace(line); line == "PONG" || strings.HasPrefix(line, "-ERR") {
			return line
		}
	}
}

// useAll does what replicas of the function do with records: one has builds, the other lists,
// follows, stops and forgets them.
func useAll(t *testing.T, a, b records.Store) {
	t.Helper()
	ctx := recordstest.Context(t)
	ref := records.Ref{Tenant: "acme", ID: "running"}
	stopped := make(chan string, 9) // of each try
	running := a.Begin(records.Record{Tenant: ref.Tenant, ID: ref.ID, Began: time.Now()}, func(by string) { stopped <- by })
	running.Log("one")
	recordstest.Known(t, b, ref, recordstest.Any)
	followed := make(chan error, 1)
	go func() {
		lines, _, err := recordstest.FollowLog(ctx, b, ref, 0, true)
		if err == nil && len(lines) != 2 {
			err = fmt.Errorf("the follower has %v", lines)
		}
		followed <- err
	}()
	stop := records.Cancellation{Ref: ref, By: "an operator", Once: "a signature"}
	if r, err := recordstest.Stop(t, b, &stop); err != nil || !r.Running() {
		t.Errorf("stopping the other's build: %+v, %v", r, err)
	}
	if _, err := b.Cancel(ctx, stop); !errors.Is(err, records.ErrUsed) {
		t.Errorf("stopping it with the same signature: %v", err)
	}
	select {
	case by := <-stopped:
		if by != stop.By {
			t.Errorf("it was stopped by %q", by)
		}
	case <-ctx.Done():
		t.Error("it is not stopped")
	}
	running.Log("two")
	running.End(recordstest.Success())
	if err := <-followed; err != nil {
		t.Error(err)
	}
	recordstest.Known(t, b, ref, recordstest.Ended)
	if all, err := b.Everywhere(ctx, ref.ID); err != nil || len(all) != 1 {
		t.Errorf("everywhere: %+v, %v", all, err)
	}
	if page, err := b.List(ctx, records.Query{Operator: true, Limit: 10}); err != nil || len(page.Builds) != 1 || !page.Complete {
		t.Errorf("the list is %+v, %v", page, err)
	}
	if err := b.Forget(ctx, ref.Tenant); err != nil {
		t.Error(err)
	}
	if r, err := b.Get(ctx, ref); !errors.Is(err, records.ErrNotFound) {
		t.Errorf("after it was forgotten: %+v, %v", r, err)
	}
}

// TestNATSThree runs the servers of buildkit/nats-three. They have everything three times, go on
// without one of them, and let nobody be a fourth.
func TestNATSThree(t *testing.T) {
	t.Parallel()
	f := startNATS(t, "nats-three", nil)
	a, b := f.open(t, "a root secret"), f.open(t, "a root secret")
	before := keep(t, a, b, "before")
	f.servers[1].Kill()
	keep(t, a, b, "after")
	recordstest.Known(t, b, before, recordstest.Ended)
	if err := f.servers[1].Restart(recordstest.Context(t)); err != nil {
		t.Fatal(err)
	}

	for who, want := range map[string]string{"client": "-ERR 'Authorization Violation'", "nats": "PONG"} {
		if got := f.fourth(t, who); got != want {
			t.Errorf("a route with the certificate of %s: %q, want %q", who, got, want)
		}
	}
	if got := f.fourth(t, ""); !strings.Contains(got, "tls:") {
		t.Errorf("a route without a certificate: %q", got)
	}
}

// fourth tries to become a server of the cluster with a certificate, or none. It returns the
// first server's answer.
func (f *natsFleet) fourth(t *testing.T, side string) string {
	t.Helper()
	conn, err := net.Dial("tcp", f.routes[0])
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	cfg := &tls.Config{InsecureSkipVerify: true}
	if side != "" {
		pair, err := tls.LoadX509KeyPair(filepath.Join(f.certs, side, "cert.pem"), filepath.Join(f.certs, side, "key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	secure := tls.Client(conn, cfg)
	return afterConnect(secure, bufio.NewReader(secure), `{"echo":true,"verbose":false,"pedantic":false,"tls_required":true,"name":"NFOURTH","cluster":"builder","lnoc":true}`)
}
