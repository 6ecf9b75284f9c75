package tenants_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestLog: each line about a request whose signature has passed has the ids of the tenant and
// of the key, and no line about another one has.
func TestLog(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		h.acme.Keys = append(h.acme.Keys, stack.NewTenant("").Keys...)
		h.acme.Keys[1].ID = "second"
		c.Env = map[string]string{"context_repository": h.s.Registry.Image("contexts-" + h.acme.Name)}
	})
	second := h.of(h.acme)
	second.Secret = h.acme.Keys[1].Secret
	type by struct{ tenant, key string }
	want := make(map[string]by)
	post := func(c *client.Client, of *stack.Tenant, key string, request []byte, changes ...client.Change) client.Answer {
		t.Helper()
		id := "log-" + mark()
		want[id] = by{of.ID, key}
		return c.MustPost(t, within(t), request, append([]client.Change{client.Header("X-Call-Id", id)}, changes...)...)
	}
	good := body(t, app(h.acme), "FROM busybox", "RUN : "+mark())
	post(h.of(h.acme), h.acme, "k1", good).WantSuccess(t)
	post(second, h.acme, "second", good, client.Accept(client.NDJSON)).WantSuccess(t)
	post(second, h.acme, "second", body(t, app(h.acme), "FROM busybox", "RUN exit 7")).WantFailed(t, "build_failed")
	post(h.of(h.globex), h.globex, "k1", body(t, app(h.acme), "FROM busybox")).WantFailed(t, "image_forbidden")
	post(h.of(h.globex), h.globex, "k1", []byte("no tar")).WantFailed(t, "bad_tar")
	stranger := *second
	stranger.Secret = stack.NewTenant("").Key()
	a := stranger.MustPost(t, within(t), good, client.Header("X-Call-Id", "stranger"))
	a.WantFailed(t, "unauthorized")
	req := h.of(h.globex).MustRequest(t, within(t), []byte("no context"), client.Header("X-Call-Id", "put"))
	req.Method, req.URL.Path = http.MethodPut, "/contexts/sha256:"+strings.Repeat("0", 64)
	want["put"] = by{h.globex.ID, "k1"}
	h.of(h.globex).MustFetch(t, req)

	for id := range want {
		if strings.HasPrefix(id, "log-") {
			ended(t, h.f, id)
		}
	}
	text, err := h.f.Log()
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]int)
	for line := range strings.Lines(text) {
		var fields struct {
			Call   string `json:"call_id"`
			Tenant string `json:"tenant"`
			Key    string `json:"key"`
		}
		if err := json.Unmarshal([]byte(line), &fields); err != nil || fields.Call == "" {
			continue
		}
		seen[fields.Call]++
		if got := (by{fields.Tenant, fields.Key}); got != want[fields.Call] {
			t.Errorf("want %v: %s", want[fields.Call], line)
		}
	}
	for id := range want {
		if seen[id] == 0 {
			t.Errorf("the log has nothing of %s", id)
		}
	}
	if seen["stranger"] == 0 {
		t.Error("the log has nothing of the stranger")
	}
}

// TestUsage: each verdict has one line for the accounts, with whose it is. A second delivery
// has none.
func TestUsage(t *testing.T) {
	t.Parallel()
	h := newHouse(t, nil)
	request := body(t, app(h.acme), "FROM busybox", "RUN echo hello > /hello; : "+mark())
	id := "call-" + mark()
	var answers []client.Answer
	for _, changes := range [][]client.Change{{client.Queued(id)}, {client.Queued(id)}, nil} {
		answers = append(answers, h.of(h.acme).MustPost(t, within(t), request, changes...))
	}
	answers = append(answers[:1], answers[2:]...)
	answers = append(answers, h.of(h.acme).MustPost(t, within(t), body(t, app(h.acme), "FROM busybox", "RUN sleep 1; exit 7")))
	answers = append(answers, h.of(h.globex).MustPost(t, within(t), body(t, app(h.acme), "FROM busybox")))
	ended(t, h.f, answers[3].ID)
	var usage []map[string]any
	stack.Eventually(t, patience, func() error {
		if usage = lines(t, h.f, "usage"); len(usage) < len(answers) {
			return fmt.Errorf("%d lines of usage, want %d", len(usage), len(answers))
		}
		return nil
	})
	if len(usage) != len(answers) {
		t.Fatalf("%d lines of usage of %d verdicts", len(usage), len(answers))
	}
	// An answer is given before its line is written: the lines may be in another order.
	byCall := make(map[any]map[string]any)
	for _, u := range usage {
		byCall[u["call_id"]] = u
	}
	for i, a := range answers {
		usage[i] = byCall[a.ID]
	}
	ids := make(map[any]bool)
	for i, a := range answers {
		u := usage[i]
		if id, _ := u["id"].(string); id == "" || ids[id] {
			t.Errorf("the id %q is no id, or not unique", id)
		} else {
			ids[id] = true
		}
		of := h.acme
		if i == 3 {
			of = h.globex
		}
		if u["tenant"] != of.ID || u["key"] != "k1" || u["call_id"] != a.ID || u["image"] != a.Image || u["digest"] != a.Digest || u["outcome"] != a.Status {
			t.Errorf("of %v: %v", a, u)
		}
	}
	first, again, failed, refused := usage[0], usage[1], usage[2], usage[3]
	number := func(u map[string]any, name string) float64 {
		t.Helper()
		v, ok := u[name].(float64)
		if !ok {
			t.Errorf("no %s in %v", name, u)
		}
		return v
	}
	if fmt.Sprint(first["platforms"]) != "[linux/amd64]" || number(first, "steps") < 2 || number(again, "cached_steps") < 1 {
		t.Errorf("at first %v, then %v", first, again)
	}
	if number(first, "received_bytes") != float64(len(request)) || number(first, "context_sent_bytes") == 0 || number(first, "pushed_bytes") == 0 || number(first, "pushed_seconds") == 0 {
		t.Errorf("of a push: %v", first)
	}
	if built := number(failed, "built_seconds"); built < 1 || built > 60 || number(failed, "pushed_bytes") != 0 {
		t.Errorf("of a step of 1 s that failed: %v", failed)
	}
	if number(refused, "steps") != 0 || number(refused, "context_sent_bytes") != 0 || number(refused, "waited_seconds") > 60 {
		t.Errorf("of what was never built: %v", refused)
	}
}

// TestMetrics: the series have tenants with metrics_tenants alone.
func TestMetrics(t *testing.T) {
	t.Parallel()
	for _, on := range []bool{false, true} {
		h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
			if on {
				c.Env = map[string]string{"metrics_tenants": "true"}
			}
		})
		built := h.of(h.acme).MustBuild(t, within(t), body(t, app(h.acme), "FROM scratch", "LABEL a=b"))
		h.of(h.globex).MustPost(t, within(t), body(t, app(h.acme), "FROM scratch"))
		// A stranger makes no series, whatever names it takes.
		for i := range 20 {
			stranger := stack.NewTenant(fmt.Sprint("stranger-", i)).Of(h.f.Client)
			stranger.MustPost(t, within(t), body(t, app(h.acme), "FROM scratch")).WantFailed(t, "unauthorized")
		}
		ended(t, h.f, built.ID)
		text, err := h.f.Get(within(t), "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		for _, of := range []*stack.Tenant{h.acme, h.globex} {
			if got := strings.Contains(text, `tenant="`+of.ID+`"`); got != on {
				t.Errorf("metrics_tenants is %v, and that a series has %s is %v", on, of.Name, got)
			}
			if strings.Contains(text, of.Name) || strings.Contains(text, of.Key()) {
				t.Errorf("a series has the name or the key of %s", of.Name)
			}
		}
		if strings.Contains(text, "stranger") {
			t.Error("a stranger has made a series")
		}
		if n, err := h.f.Metric("builder_builds_total", `status="success"`); err != nil || n != 1 {
			t.Errorf("%v builds succeeded: %v", n, err)
		}
		if !on {
			continue
		}
		if n, err := h.f.Metric("builder_builds_total", `tenant="`+h.acme.ID+`"`, `status="success"`); err != nil || n != 1 {
			t.Errorf("%v of acme's builds succeeded: %v", n, err)
		}
	}
}
