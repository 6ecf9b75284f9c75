package builds

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// followers waits until so many logs are being read at a replica.
func followers(t *testing.T, f *stack.Function, want int) {
	t.Helper()
	stack.Eventually(t, patience, func() error {
		if n, err := f.Metric("builder_log_followers"); err != nil || int(n) != want {
			return fmt.Errorf("%v logs are read, want %d: %v", n, want, err)
		}
		return nil
	})
}

// TestSlowFollower has a follower at each replica that does not read on. It is cut off, and the
// build does not wait for it.
func TestSlowFollower(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	m := mark()
	// 7 MB of log: more than the buffers on the way to a follower.
	built := background(t, &h.a.Client, body(t, h.a, m, "FROM busybox", held(m), "RUN x=$(seq 1 2000 | tr -d '\\n'); for i in $(seq 1 1000); do echo $x; done; : "+m), named(m))
	waitStep(t, m)
	waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Status == "in_progress" })
	var answers []*http.Response
	for _, f := range []*stack.Function{h.a, h.b} {
		c := f.Client
		c.HTTP = &http.Client{Transport: &http.Transport{DialContext: (&net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
			var err error
			if err := raw.Control(func(fd uintptr) {
				err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4<<10)
			}); err != nil {
				return err
			}
			return err
		}}).DialContext}}
		req, err := c.Ask(within(t), http.MethodGet, "/builds/"+m+"/log?follow=1")
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Send(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Fatalf("following: %s", resp.Status)
		}
		answers = append(answers, resp)
		followers(t, f, 1)
	}
	_, quick := follow(t, &h.b.Client, m, "follow=1")
	release(t, m)
	a := built() // nobody has read on
	a.WantSuccess(t)
	wantSame(t, "a follower that reads", quick().Texts(), a.Log)
	for i, f := range []*stack.Function{h.a, h.b} {
		followers(t, f, 0)
		stack.Eventually(t, patience, func() error {
			if log, err := f.Log(); err != nil || !strings.Contains(log, `"message":"log cut off"`) {
				return fmt.Errorf("replica %d does not say that it has cut a log off: %v", i, err)
			}
			return nil
		})
		text, err := io.ReadAll(answers[i].Body)
		if err == nil || strings.Contains(string(text), `"began"`) {
			t.Errorf("replica %d: the follower has got %d bytes, and no error", i, len(text))
		}
		t.Logf("replica %d: %d bytes, %v", i, len(text), err)
	}
}

// crowd follows a build n times, until leave. It returns once all of them are in.
func crowd(t *testing.T, f *stack.Function, c *client.Client, id string, n, in int) (leave func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(within(t))
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			if l, err := c.ReadLog(ctx, id, "follow=1", nil); err == nil {
				t.Errorf("a follower has an end: %v", l.Answer)
			}
		})
	}
	leave = sync.OnceFunc(func() {
		cancel()
		all.Wait()
	})
	t.Cleanup(leave)
	followers(t, f, in)
	return leave
}

// TestManyFollowers has as many followers as a replica lets in, at one that does not run the build.
func TestManyFollowers(t *testing.T) {
	t.Parallel()
	h := newHouse(t, stack.FunctionConfig{})
	connected(t, &h.a.Client)
	connected(t, &h.b.Client)
	m := mark()
	built := background(t, &h.a.Client, body(t, h.a, m, "FROM busybox", held(m)), named(m))
	waitStep(t, m)
	waitRecord(t, &h.b.Client, m, func(a client.Answer) bool { return a.Status == "in_progress" })
	leave := crowd(t, h.b, &h.b.Client, m, 32, 32)
	for _, query := range []string{"", "follow=1"} {
		h.b.MustReadLog(t, within(t), m, query).WantFailed(t, "busy", "32")
	}
	// Whatever else is asked about the build is answered, and another replica has room.
	if b := record(t, &h.b.Client, m); b.Status != "in_progress" {
		t.Errorf("its record is %+v", b)
	}
	if l := h.a.MustReadLog(t, within(t), m, ""); l.Status != "in_progress" {
		t.Errorf("at the other replica: %v", l.Answer)
	}
	leave()
	followers(t, h.b, 0)
	_, followed := follow(t, &h.b.Client, m, "follow=1")
	release(t, m)
	a := built()
	a.WantSuccess(t)
	wantSame(t, "a follower afterwards", followed().Texts(), a.Log)
}

// TestManyFollowersOfTenants: one tenant has half of a replica's followers, and all tenants
// together have all of them.
func TestManyFollowersOfTenants(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	var tenants []*stack.Tenant
	for _, name := range []string{"acme", "globex", "initech"} {
		tenants = append(tenants, stack.NewTenant(name, s.Registry.Image(name+"-"+strings.ToLower(mark()))))
	}
	h := newHouse(t, stack.FunctionConfig{Secrets: stack.TenantsOf(tenants...).Secret()})
	m := mark()
	var built []func() client.Answer
	for _, tenant := range tenants {
		connected(t, tenant.Of(h.a.Client))
		connected(t, tenant.Of(h.b.Client))
		request := stack.Body(t, map[string]any{"image": tenant.Images[0] + "/app:v1"}, stack.Dockerfile("FROM busybox", held(m+tenant.Name)))
		built = append(built, background(t, tenant.Of(h.a.Client), request, named(m)))
		waitStep(t, m+tenant.Name)
		waitRecord(t, tenant.Of(h.b.Client), m, func(a client.Answer) bool { return a.Status == "in_progress" })
	}
	read := func(tenant *stack.Tenant) client.Log { return tenant.Of(h.b.Client).MustReadLog(t, within(t), m, "") }
	acme, globex, initech := tenants[0], tenants[1], tenants[2]
	leave := crowd(t, h.b, acme.Of(h.b.Client), m, 16, 16)
	read(acme).WantFailed(t, "busy")
	if l := read(globex); l.Status != "in_progress" {
		t.Errorf("another tenant: %v", l.Answer)
	}
	followers(t, h.b, 16)
	leaveToo := crowd(t, h.b, globex.Of(h.b.Client), m, 16, 32)
	for _, tenant := range tenants {
		read(tenant).WantFailed(t, "busy")
	}
	leave()
	followers(t, h.b, 16)
	for _, tenant := range []*stack.Tenant{acme, initech} {
		if l := read(tenant); l.Status != "in_progress" {
			t.Errorf("%s afterwards: %v", tenant.Name, l.Answer)
		}
	}
	read(globex).WantFailed(t, "busy")
	leaveToo()
	for _, tenant := range tenants {
		release(t, m+tenant.Name)
	}
	for _, wait := range built {
		wait().WantSuccess(t)
	}
}
