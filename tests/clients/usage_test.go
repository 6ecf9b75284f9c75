package clients_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"handler/function/tests/stack"
)

// usages are the lines about usage that a function has logged.
func usages(t *testing.T, f *stack.Function) (list []map[string]any) {
	t.Helper()
	log, err := f.Log()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(log) {
		var fields map[string]any
		// of-watchdog puts the time before a line.
		if i := strings.IndexByte(line, '{'); i < 0 || json.Unmarshal([]byte(line[i:]), &fields) != nil {
			continue
		}
		if fields["message"] == "usage" {
			list = append(list, fields)
		}
	}
	return list
}

// TestUsage builds as a tenant, pushed and not, and compares what is logged of it with what was
// sent and pushed.
func TestUsage(t *testing.T) {
	const key = "the-only-key-of-the-only-tenant"
	repository := stack.Shared(t).Registry.Image("usage")
	file := fmt.Sprintf("version: 1\ntenants:\n  acme: {id: t-acme, keys: [{id: k1, secret: %s}], images: [%q], registry: builder}\n", key, repository)
	ctx, s, f := start(t, stack.FunctionConfig{Secrets: map[string][]byte{"tenants": []byte(file)}})
	acme := f.Client
	acme.Secret = key
	const size = 3 << 20
	content := make([]byte, size)
	rand.NewChaCha8([32]byte{2}).Read(content)
	files := map[string]string{"Dockerfile": "FROM scratch\nCOPY content /\n", "content": string(content)}
	image := s.Registry.Image("usage/app:latest")
	pushed := stack.Body(t, config{"image": image}, files)
	record := acme.MustBuild(t, ctx, pushed)
	acme.MustBuild(t, ctx, stack.Body(t, config{"image": image, "skipPush": true}, files))
	acme.MustPost(t, ctx, stack.Body(t, config{"image": image}, map[string]string{"Dockerfile": "FROM scratch\nCOPY none /\n"})).WantFailed(t, "build_failed")
	f.MustPost(t, ctx, pushed).WantFailed(t, "unauthorized")

	stack.Eventually(t, time.Minute, func() error {
		if n := len(usages(t, f)); n != 3 {
			return fmt.Errorf("%d lines", n)
		}
		return nil
	})
	for i, want := range []map[string][2]float64{
		{"pushed_bytes": {size, size + 1<<16}, "received_bytes": {float64(len(pushed)), float64(len(pushed))}, "context_sent_bytes": {size, size + 1<<16}, "steps": {1, 1}, "cached_steps": {0, 0}},
		{"pushed_bytes": {0, 0}, "pushed_seconds": {0, 0}, "steps": {1, 1}, "cached_steps": {1, 1}},
		{"pushed_bytes": {0, 0}, "pushed_seconds": {0, 0}},
	} {
		u := usages(t, f)[i]
		if u["tenant"] != "t-acme" || u["key"] != "k1" || u["id"] == "" || u["built_seconds"].(float64) <= 0 {
			t.Errorf("line %d: %v", i, u)
		}
		for name, bounds := range want {
			if v := u[name].(float64); v < bounds[0] || v > bounds[1] {
				t.Errorf("line %d: %s is %v, want %v", i, name, v, bounds)
			}
		}
	}
	first := usages(t, f)[0]
	if first["digest"] != record.Digest || first["image"] != image || first["call_id"] != record.ID || !slices.Equal(strings.Fields(fmt.Sprint(first["platforms"])), []string{"[linux/amd64]"}) {
		t.Errorf("%v, and the answer was %+v", first, record)
	}
	if samples := scrape(t, ctx, f); samples["builder_tenants_stale"] != 0 || samples[`builder_builds_total{code="",status="success"}`] != 2 {
		t.Errorf("%v", samples)
	}
}
