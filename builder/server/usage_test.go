package server_test

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/server"
	"handler/function/solve"
)

// usages are the lines about usage in the log.
func (f *fixture) usages(t testing.TB) (list []map[string]any) {
	t.Helper()
	for line := range strings.Lines(f.log.String()) {
		var fields map[string]any
		if err := json.Unmarshal([]byte(line), &fields); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		if fields["message"] == "usage" {
			list = append(list, fields)
		}
	}
	return list
}

// TestUsage holds the line about what a build has used.
func TestUsage(t *testing.T) {
	stats := solve.Stats{Steps: 5, Cached: 2, Sent: 1234, Pushed: 5678, Push: 20 * time.Millisecond}
	end := make(chan struct{})
	solver := &scripted{solve: func(_ context.Context, req *solve.Request, _ solve.Log) (solve.Outcome, solve.Stats, error) {
		<-end
		time.Sleep(50 * time.Millisecond)
		if strings.HasSuffix(req.Config.Image, "bad") {
			return solve.Outcome{}, solve.Stats{Steps: 1}, &api.Error{Code: api.BuildFailed, Msg: "exit code: 1"}
		}
		return solve.Outcome{Digest: "sha256:abc", Platforms: []string{"linux/amd64", "linux/arm64"}}, stats, nil
	}}
	f := startFair(t, solver, func(c *server.Config) {
		c.MaxBuilds, c.Log = 1, c.Log.Level(zerolog.ErrorLevel)
	}, "acme", "queue: 1")
	body := pack(t, `{"image":"ghcr.io/acme/app"}`)
	first := f.sendBody(t, "acme", body, api.CallIDHeader, "call")
	second := f.sendBody(t, "acme", body, api.CallIDHeader, "call")
	f.waiting(t, 1)
	close(end) // the other waits for 50 ms more
	for _, a := range []answer{ending(t, first), ending(t, second), ending(t, f.send(t, "acme", "bad")), ending(t, f.sendBody(t, "acme", pack(t, "{")))} {
		t.Log(a.rec.Status, a.rec.Code)
	}
	eventually(t, "each verdict has a line", func() bool { return len(f.usages(t)) == 4 })
	ids := make(map[any]bool)
	waited := 0.0
	for i, u := range f.usages(t) {
		keys := slices.Sorted(maps.Keys(u))
		if want := strings.Fields("built_seconds cached_steps call_id context_sent_bytes digest id image key level message outcome platforms pushed_bytes pushed_seconds received_bytes steps tenant waited_seconds"); !slices.Equal(keys, want) {
			t.Errorf("line %d has the keys %q, want %q", i, keys, want)
		}
		if ids[u["id"]] || u["tenant"] != "t-acme" || u["key"] != "k1" || u["platforms"] == nil {
			t.Errorf("line %d: %v", i, u)
		}
		ids[u["id"]] = true
		waited = max(waited, u["waited_seconds"].(float64))
	}
	if waited < 0.02 {
		t.Errorf("the longest wait is %v s", waited)
	}
	for name, want := range map[string]map[string]any{
		"a success": {
			"call_id": "call", "image": "ghcr.io/acme/app", "digest": "sha256:abc", "outcome": "success", "steps": 5.0, "cached_steps": 2.0,
			"received_bytes": float64(len(body)), "context_sent_bytes": 1234.0, "pushed_bytes": 5678.0, "pushed_seconds": 0.02,
		},
		"a failure":    {"image": "ghcr.io/acme/bad", "digest": "", "outcome": "failed", "steps": 1.0, "pushed_bytes": 0.0, "pushed_seconds": 0.0},
		"a bad config": {"image": "", "outcome": "failed", "steps": 0.0},
	} {
		if !slices.ContainsFunc(f.usages(t), func(u map[string]any) bool {
			for key, value := range want {
				if u[key] != value {
					return false
				}
			}
			// The push is not a part of the build.
			built := u["built_seconds"].(float64)
			return name == "a bad config" || built >= 0.05-u["pushed_seconds"].(float64) && built < limit.Seconds()
		}) {
			t.Errorf("%s: no line has %v in %s", name, want, f.log)
		}
	}
	if other := start(t, solver, nil); other.do(t, other.request(t, pack(t, config))).status != 200 || len(other.usages(t)) > 0 {
		t.Errorf("without a file: %s", other.log)
	}
}
