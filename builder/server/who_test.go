package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"handler/function/api"
	"handler/function/budget"
	"handler/function/tenants"
)

// TestEqualMACs: however a request names a tenant, and whether there is such a tenant or not,
// as many MACs are computed. Two tenants have one key, and one has eight.
func TestEqualMACs(t *testing.T) {
	text := "version: 1\ntenants:\n  one: {id: t-1, images: [ghcr.io/one], from: [], hosts: [one.example.com], keys: [{id: k1, secret: the-key-of-number-one}]}\n" +
		"  two: {id: t-2, images: [ghcr.io/two], from: [], keys: [{id: k1, secret: the-key-of-number-two}]}\n" +
		"  three: {id: t-3, images: [ghcr.io/three], from: [], keys: ["
	for i := range 8 {
		text += fmt.Sprintf("{id: k%d, secret: the-key-of-number-three-%d},", i, i)
	}
	set, err := tenants.Read([]tenants.File{{Name: "tenants", Data: []byte(text + "]}\n")}}, tenants.Installation{})
	if err != nil {
		t.Fatal(err)
	}
	r := roster{set: set}
	for what, tt := range map[string]struct {
		headers []string
		host    string
		image   string
		owner   string
	}{
		"one's name":      {headers: []string{api.TenantHeader, "one"}, owner: "one"},
		"three's name":    {headers: []string{api.TenantHeader, "three"}, owner: "three"},
		"an unknown name": {headers: []string{api.TenantHeader, "four"}},
		"an empty name":   {headers: []string{api.TenantHeader, ""}, image: "ghcr.io/two/app", owner: "two"},
		"two names":       {headers: []string{api.TenantHeader, "one", api.TenantHeader, "two"}},
		"one's host":      {host: "ONE.example.com:80", owner: "one"},
		"the gateway's":   {host: "gateway", headers: []string{forwardedHost, "one.example.com"}, owner: "one"},
		"two's image":     {image: "ghcr.io/two/app", owner: "two"},
		"nobody's image":  {image: "ghcr.io/four/app"},
		"nothing":         {},
	} {
		req := httptest.NewRequest(http.MethodPost, "/build", nil)
		req.Host = tt.host
		for i := 0; i < len(tt.headers); i += 2 {
			req.Header.Add(tt.headers[i], tt.headers[i+1])
		}
		list, ok := r.candidates(req)
		switch {
		case ok && tt.image != "":
			t.Errorf("%s: the image is not asked", what)
		case !ok && tt.image != "":
			list = set.OfImage(tt.image)
		case !ok:
			list = r.unnamed()
		}
		owner := ""
		for _, c := range list {
			if c.Tenant != nil {
				owner = c.Tenant.Name
			}
		}
		if len(keysOf(list)) != 8 || owner != tt.owner {
			t.Errorf("%s: %d keys of %q", what, len(list), owner)
		}
	}
}

// TestSearchSlots: searches of compressed bodies wait for one another, and never hold up those
// of plain tars. The line has an end, and a wait has a deadline.
func TestSearchSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newIntake(t.Context(), budget.New(1<<30), intakeLimits{uploads: 4, spool: 1 << 30})
		small, large := &arrival{in: in}, &arrival{in: in, slot: true}
		busy := func(err error) bool {
			e, ok := errors.AsType[*api.Error](err)
			return ok && e.Code == api.Busy
		}
		var leaves []func()
		for range packedSearches {
			leave, err := in.search(t.Context(), small, false)
			if err != nil {
				t.Fatal(err)
			}
			leaves = append(leaves, leave)
		}
		results := make(chan error, 2*packedLine)
		for range packedLine + 5 {
			go func() {
				leave, err := in.search(t.Context(), small, false)
				if err == nil {
					leave()
				}
				results <- err
			}()
		}
		synctest.Wait()
		if len(results) != 5 {
			t.Errorf("%d are refused at once", len(results))
		}
		for range 5 {
			if err := <-results; !busy(err) {
				t.Errorf("beyond the line: %v", err)
			}
		}
		for what, tt := range map[string]struct {
			a     *arrival
			plain bool
		}{"a plain head": {small, true}, "a plain upload": {large, true}, "a packed upload": {large, false}} {
			leave, err := in.search(t.Context(), tt.a, tt.plain)
			if err != nil {
				t.Errorf("%s: %v", what, err)
				continue
			}
			leave()
		}
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		leaves[0]()
		leaves[1]()
		synctest.Wait()
		for range packedLine {
			if err := <-results; err != nil {
				t.Errorf("in the line: %v", err)
			}
		}
		for range packedSearches {
			if _, err := in.search(t.Context(), small, false); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := in.search(gone, small, false); err == nil || busy(err) {
			t.Errorf("gone: %v", err)
		}
		start := time.Now()
		if _, err := in.search(t.Context(), small, false); !busy(err) || time.Since(start) != uploadWait {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		if n := in.searches.packed.waiting.Load(); n != 0 {
			t.Errorf("%d are waiting", n)
		}
	})
}
