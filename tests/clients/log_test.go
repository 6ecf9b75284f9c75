package clients_test

import (
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"handler/function/tests/stack"
)

// logOf is the function's log once n builds have ended. Their lines come soon after
// their answers.
func logOf(t *testing.T, f *stack.Function, n int) string {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		text, err := f.Log()
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Count(text, `"build ended"`); got == n {
			return text
		} else if got > n || time.Now().After(end) {
			t.Fatalf("%d builds ended by the log, want %d", got, n)
		}
	}
}

// logged is the log's lines of one call, in order.
func logged(text, call string) (all []map[string]any) {
	for line := range strings.Lines(text) {
		var fields map[string]any
		if json.Unmarshal([]byte(line), &fields) == nil && fields["call_id"] == call {
			all = append(all, fields)
		}
	}
	return all
}

// TestLog reads what an operator is told of builds: a line when one starts and a
// line when it ends, and one for a request that is none.
func TestLog(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{Env: map[string]string{"allowed_images": stack.Shared(t).Registry.Image("log")}})
	image := s.Registry.Image("log/app:1")
	success := tarOf(t, config{"image": image}, map[string]string{"Dockerfile": "FROM busybox\nCOPY hello.txt /\nRUN cat hello.txt\n", "hello.txt": "hello\n"})
	fails := tarOf(t, config{"image": image}, map[string]string{"Dockerfile": "FROM busybox\nRUN echo begun; exit 3\n"})
	forbidden := tarOf(t, config{"image": s.Registry.Image("other:1")}, copyOnly)
	send := func(call string, body []byte, change func(*http.Request)) answer {
		return post(t, ctx, f, body, func(req *http.Request) {
			req.Header.Set("X-Call-Id", call)
			if change != nil {
				change(req)
			}
		})
	}
	digest := record(t, send("first", success, nil).text).Digest
	send("again", success, nil)
	send("fails", fails, nil)
	send("forbidden", forbidden, nil)
	send("unsigned", success, func(req *http.Request) { req.Header.Del("X-Build-Signature") })

	text := logOf(t, f, 4)
	started := func(body []byte) map[string]any {
		return map[string]any{"message": "build started", "level": "info", "sha256": sha256Hex(body), "image": image, "bytes": float64(len(body)), "queued": false}
	}
	ended := func(body []byte, image, digest, outcome, code string) map[string]any {
		return map[string]any{
			"message": "build ended", "level": "info", "sha256": sha256Hex(body), "image": image, "bytes": float64(len(body)),
			"digest": digest, "outcome": outcome, "code": code, "commit": "",
		}
	}
	// The rest of a line that ends a build, by what is true of a success.
	numbers := []string{"duration_ms", "steps", "cached_steps", "attempts", "context_sent_bytes"}
	texts := []string{"daemon", "choice", "cause"}
	for call, want := range map[string][]map[string]any{
		"first":     {started(success), ended(success, image, digest, "success", "")},
		"again":     {started(success), ended(success, image, digest, "success", "")},
		"fails":     {started(fails), ended(fails, image, "", "failed", "build_failed")},
		"forbidden": {ended(forbidden, s.Registry.Image("other:1"), "", "failed", "image_forbidden")},
		"unsigned":  {{"message": "request refused", "level": "warn", "code": "unauthorized"}},
	} {
		// Debug lines are of other matters.
		got := slices.DeleteFunc(logged(text, call), func(line map[string]any) bool { return line["level"] == "debug" })
		if len(got) != len(want) {
			t.Errorf("%s: %d lines, want %d: %v", call, len(got), len(want), got)
			continue
		}
		for i, line := range got {
			rest := maps.Clone(line)
			for key, v := range want[i] {
				if line[key] != v {
					t.Errorf("%s, line %d: %s is %v, want %v", call, i, key, line[key], v)
				}
				delete(rest, key)
			}
			for _, key := range append(numbers, append(texts, "time", "call_id", "started")...) {
				delete(rest, key)
			}
			if len(rest) > 0 {
				t.Errorf("%s, line %d: more than there should be: %v", call, i, rest)
			}
			if text, ok := line["time"].(string); !ok || len(text) != len("2006-01-02T15:04:05.000Z") {
				t.Errorf("%s, line %d: the time is %v", call, i, line["time"])
			}
			// In the form of the time, so that text compares.
			if text, ok := line["started"].(string); ok != (line["message"] == "build started") || ok && text > line["time"].(string) {
				t.Errorf("%s, line %d: it started at %v", call, i, line["started"])
			}
			if _, ok := line["cause"].(string); ok == (line["outcome"] == "success" || line["message"] == "build started") {
				t.Errorf("%s, line %d: the cause is %v", call, i, line["cause"])
			}
			if line["message"] != "build ended" {
				continue
			}
			for _, key := range numbers {
				if v, ok := line[key].(float64); !ok || v < 0 {
					t.Errorf("%s, line %d: %s is %v", call, i, key, line[key])
				}
			}
			steps, cached, attempts := line["steps"].(float64), line["cached_steps"].(float64), line["attempts"].(float64)
			switch call {
			case "first", "fails":
				if steps < 1 || cached >= steps || attempts != 1 || line["daemon"] == "" || line["choice"] != "first" || line["duration_ms"].(float64) < 1 {
					t.Errorf("%s: %v", call, line)
				}
			case "again":
				// FROM is a step too, and may be cached or not.
				if steps < 2 || cached < 2 || cached > steps {
					t.Errorf("%s: %v of %v steps cached", call, cached, steps)
				}
			case "forbidden":
				if steps != 0 || cached != 0 || attempts != 0 || line["daemon"] != "" {
					t.Errorf("%s: %v", call, line)
				}
			}
		}
	}
}

// TestTimeoutsTooShort: the function says which timeouts before it would cut a build
// off.
func TestTimeoutsTooShort(t *testing.T) {
	_, _, f := start(t, stack.FunctionConfig{Env: map[string]string{"exec_timeout": "1m"}})
	text, err := f.Log()
	if err != nil {
		t.Fatal(err)
	}
	var named []string
	for line := range strings.Lines(text) {
		var warning struct{ Level, Variable string }
		if json.Unmarshal([]byte(line), &warning) == nil && warning.Variable != "" {
			named = append(named, warning.Level+" "+warning.Variable)
		}
	}
	if !slices.Equal(named, []string{"warn exec_timeout"}) {
		t.Errorf("warned of %q", named)
	}
}

// TestLogLines: of-watchdog stops reading a function's output at a line of 64 KiB.
func TestLogLines(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	long := strings.Repeat("a.", 40<<10) + "b"
	odd := strings.Repeat("\x01\"", 100<<10) // grows in JSON
	for name, test := range map[string]struct {
		config any
		files  map[string]string
		call   string
		code   string
	}{
		"a host":        {config{"image": long + "/app"}, copyOnly, "", "bad_config"},
		"a tag's host":  {config{"image": s.Registry.Image("app"), "tags": []string{long + "/app"}}, copyOnly, "", "bad_config"},
		"no reference":  {config{"image": odd}, copyOnly, "", "bad_config"},
		"a platform":    {config{"skipPush": true, "platforms": []string{odd}}, copyOnly, "", "bad_config"},
		"a key":         {config{"skipPush": true, long: 1}, copyOnly, "", ""},
		"a call id":     {config{"skipPush": true}, copyOnly, strings.Repeat(`"`, 100<<10), ""},
		"what is built": {config{"skipPush": true}, map[string]string{"Dockerfile": "FROM busybox\nRUN : " + strings.Repeat("x", 60<<10) + "; exit 3\n"}, "", "build_failed"},
		"the longest":   {config{"skipPush": true, "image": strings.Repeat("a.", 127) + "a/" + strings.Repeat("b", 255) + ":" + strings.Repeat("c", 128)}, copyOnly, strings.Repeat(`"`, 128), ""},
	} {
		a := post(t, ctx, f, tarOf(t, test.config, test.files), func(req *http.Request) {
			if test.call != "" {
				req.Header.Set("X-Call-Id", test.call)
			}
		})
		if r := record(t, a.text); r.Code != test.code {
			t.Errorf("%s: %s %.500s", name, r.Code, r.Error)
		}
	}
	longest := 0
	for line := range strings.Lines(logOf(t, f, 8)) {
		if longest = max(longest, len(line)); len(line) > 60<<10 {
			t.Errorf("a line of %d bytes: %.300s", len(line), line)
		}
	}
	t.Logf("the longest line has %d bytes", longest)
}
