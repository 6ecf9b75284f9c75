package clients_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// logOf is the function's log once n builds have ended. Their lines come soon after
// their answers.
func logOf(t *testing.T, f *stack.Function, n int) string {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
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

// TestLog reads the log as an operator does. Each build has a line for its start and a
// line for its end. A request that is refused before it is a build has one line.
func TestLog(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{Env: map[string]string{"allowed_images": stack.Shared(t).Registry.Image("log")}})
	image := s.Registry.Image("log/app:1")
	success := stack.Body(t, config{"image": image}, map[string]string{"Dockerfile": "FROM busybox\nCOPY hello.txt /\nRUN cat hello.txt\n", "hello.txt": "hello\n"})
	fails := stack.Body(t, config{"image": image}, map[string]string{"Dockerfile": "FROM busybox\nRUN echo begun; exit 3\n"})
	forbidden := stack.Body(t, config{"image": s.Registry.Image("other:1")}, copyOnly)
	send := func(call string, body []byte, changes ...client.Change) client.Answer {
		return f.MustPost(t, ctx, body, append(changes, client.Header("X-Call-Id", call))...)
	}
	digest := send("first", success).Digest
	send("again", success)
	send("fails", fails)
	send("forbidden", forbidden)
	send("unsigned", success, client.Signature(""))

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
	for call, want := range map[string][]map[string]any{
		"first":     {started(success), ended(success, image, digest, "success", "")},
		"again":     {started(success), ended(success, image, digest, "success", "")},
		"fails":     {started(fails), ended(fails, image, "", "failed", "build_failed")},
		"forbidden": {ended(forbidden, s.Registry.Image("other:1"), "", "failed", "image_forbidden")},
		"unsigned":  {{"message": "request refused", "level": "warn", "code": "unauthorized"}},
	} {
		t.Run(call, func(t *testing.T) {
			// Lines of the level debug are not tested here.
			got := slices.DeleteFunc(logged(text, call), func(line map[string]any) bool { return line["level"] == "debug" })
			if len(got) != len(want) {
				t.Fatalf("%d lines, want %d: %v", len(got), len(want), got)
			}
			for i, line := range got {
				checkLine(t, line, want[i])
				if line["message"] == "build ended" {
					checkEnd(t, call, line)
				}
			}
		})
	}
}

// endNumbers are the keys of a line that ends a build whose values are numbers.
var endNumbers = []string{"duration_ms", "steps", "cached_steps", "attempts", "context_sent_bytes"}

// checkLine holds a line of the log to the keys that are wanted, to the form of the
// others, and to no more keys than the log may have.
func checkLine(t *testing.T, line, want map[string]any) {
	t.Helper()
	rest := maps.Clone(line)
	for key, v := range want {
		if line[key] != v {
			t.Errorf("%s is %v, want %v", key, line[key], v)
		}
		delete(rest, key)
	}
	for _, key := range append([]string{"daemon", "choice", "cause", "time", "call_id", "started"}, endNumbers...) {
		delete(rest, key)
	}
	if len(rest) > 0 {
		t.Errorf("more than there should be: %v", rest)
	}
	now, ok := line["time"].(string)
	if !ok || len(now) != len("2006-01-02T15:04:05.000Z") {
		t.Errorf("the time is %v", line["time"])
	}
	// Both times have the same form, so that their texts can be compared.
	if began, ok := line["started"].(string); ok != (line["message"] == "build started") || ok && began > now {
		t.Errorf("it started at %v", line["started"])
	}
	if _, ok := line["cause"].(string); ok == (line["outcome"] == "success" || line["message"] == "build started") {
		t.Errorf("the cause is %v", line["cause"])
	}
}

// checkEnd holds the numbers of a line that ends a build to what its call did.
func checkEnd(t *testing.T, call string, line map[string]any) {
	t.Helper()
	n := map[string]float64{}
	for _, key := range endNumbers {
		v, ok := line[key].(float64)
		if !ok || v < 0 {
			t.Errorf("%s is %v", key, line[key])
		}
		n[key] = v
	}
	switch call {
	case "first", "fails":
		if n["steps"] < 1 || n["cached_steps"] >= n["steps"] || n["attempts"] != 1 || line["daemon"] == "" || line["choice"] != "first" || n["duration_ms"] < 1 {
			t.Errorf("it ended with %v", line)
		}
	case "again":
		// FROM is a step too, and may be cached or not.
		if n["steps"] < 2 || n["cached_steps"] < 2 || n["cached_steps"] > n["steps"] {
			t.Errorf("%v of %v steps cached", n["cached_steps"], n["steps"])
		}
	case "forbidden":
		if n["steps"] != 0 || n["cached_steps"] != 0 || n["attempts"] != 0 || line["daemon"] != "" {
			t.Errorf("it ended with %v", line)
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
		"a call id":     {config{"skipPush": true}, copyOnly, strings.Repeat(`"`, 10<<10), ""}, // as long as a header may be, or nearly
		"what is built": {config{"skipPush": true}, map[string]string{"Dockerfile": "FROM busybox\nRUN : " + strings.Repeat("x", 60<<10) + "; exit 3\n"}, "", "build_failed"},
		"the longest":   {config{"skipPush": true, "image": strings.Repeat("a.", 127) + "a/" + strings.Repeat("b", 255) + ":" + strings.Repeat("c", 128)}, copyOnly, strings.Repeat(`"`, 128), ""},
	} {
		a := f.MustPost(t, ctx, stack.Body(t, test.config, test.files), client.Header("X-Call-Id", test.call))
		if (a.Status == "success") != (test.code == "") || a.Code != test.code {
			t.Errorf("%s: HTTP %d, %s %s %.500s", name, a.StatusCode, a.Status, a.Code, a.Error)
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

// arrival is a line of a stream, and when it came.
type arrival struct {
	line string
	at   time.Time
}

// arrivals builds and notes when each line comes.
func arrivals(t *testing.T, ctx context.Context, f *stack.Function, body []byte) ([]arrival, client.Record) {
	t.Helper()
	var all []arrival
	last, err := f.PostEach(ctx, body, func(r client.Record) {
		for _, l := range r.Log {
			all = append(all, arrival{l, time.Now()})
		}
	}, client.Accept(client.NDJSON))
	if err != nil {
		t.Fatal(err)
	}
	return all, last.Record
}

// statesOf takes what a build's steps printed out of its lines, and the states of each
// bar among it: "fetch 10%" is a state of fetch.
func statesOf(lines []arrival) (printed []arrival, states map[string][]arrival) {
	states = map[string][]arrival{}
	for _, l := range lines {
		text, ok := strings.CutPrefix(l.line, "l: ")
		if !ok {
			continue
		}
		printed = append(printed, arrival{text, l.at})
		if i := strings.LastIndexByte(text, ' '); i >= 0 {
			states[text[:i]] = append(states[text[:i]], arrival{text[i+1:], l.at})
		}
	}
	return printed, states
}

func texts(arrivals []arrival) (all []string) {
	for _, a := range arrivals {
		all = append(all, a.line)
	}
	return all
}

// TestProgressBars has a step draw over a line in the ways that programs have.
func TestProgressBars(t *testing.T) {
	ctx, _, f := start(t, stack.FunctionConfig{})
	script := `
i=0; while [ $i -lt 4 ]; do printf 'fetch %s0%%\r' $i; sleep 1; i=$((i+1)); done; echo; echo over
i=0; while [ $i -lt 3 ]; do printf '\rpull %s0%%' $i; sleep 2; i=$((i+1)); done; printf '\rpull done\n'
b=$(date +%s); i=0; while [ $i -lt 500 ]; do printf 'fast %s\r' $i; sleep 0.01; i=$((i+1)); done; echo after; echo "took fast $(($(date +%s)-b))"
b=$(date +%s); i=0; while [ $i -lt 500 ]; do printf '\rerr %s' $i; sleep 0.01; i=$((i+1)); done >&2; s=$(($(date +%s)-b)); sleep 6; echo awake; echo "took err $s"
i=0; while [ $i -lt 2000 ]; do printf 'at once %s\r' $i; i=$((i+1)); done; echo
printf 'crlf\r'; sleep 1; printf '\nnext\r\n\r\n'
printf 'last %s\r' 1 2 3
`
	lines, last := arrivals(t, ctx, f, stack.Body(t, config{"skipPush": true, "noCache": true}, map[string]string{"Dockerfile": "FROM busybox\nCOPY bars.sh /\nRUN sh /bars.sh\n", "bars.sh": script}))
	if last.Status != "success" {
		t.Fatalf("the build ended %s, %s: %s", last.Status, last.Code, last.Error)
	}
	printed, states := statesOf(lines)
	// A busy machine may bring two states at once that were drawn a second apart. The first of
	// them is passed over, and the last never is.
	for kind, want := range map[string][]string{"fetch": {"00%", "10%", "20%", "30%"}, "pull": {"00%", "10%", "20%", "done"}} {
		got := texts(states[kind])
		left := want
		for _, state := range got {
			i := slices.Index(left, state)
			if i < 0 {
				break
			}
			left = left[i+1:]
		}
		if len(left) > 0 || len(got) > len(want) || len(got) < 2 {
			t.Errorf("%s: %q", kind, got)
		}
	}
	// most is four a second, by the time that the step drew and the time that its states
	// took to come. Either is longer on a busy machine.
	most := func(kind string) int {
		took := states["took "+kind]
		if len(took) != 1 {
			t.Fatalf("the step says %q of %s", texts(took), kind)
		}
		s, err := strconv.Atoi(took[0].line)
		if err != nil {
			t.Fatal(err)
		}
		all := states[kind]
		if len(all) == 0 {
			t.Fatalf("%s has no state", kind)
		}
		came := all[len(all)-1].at.Sub(all[0].at)
		return int(4*max(float64(s+1), came.Seconds())) + 2
	}
	for kind, want := range map[string]struct {
		least, most int
		last        string
	}{
		"fast": {3, most("fast"), "499"}, "err": {3, most("err"), "499"}, "at once": {1, 20, "1999"}, "last": {1, 3, "3"},
	} {
		got := texts(states[kind])
		if len(got) < want.least || len(got) > want.most || got[len(got)-1] != want.last {
			t.Errorf("%s: want %d to %d states and %s at last, got %q", kind, want.least, want.most, want.last, got)
		}
	}
	var rest []string
	for i, p := range printed {
		switch {
		case strings.ContainsAny(p.line, "0123456789") || strings.HasPrefix(p.line, "pull"):
		case p.line == "awake" && p.at.Sub(printed[i-1].at) < time.Second:
			t.Errorf("the last state before a silence came %v before its end", p.at.Sub(printed[i-1].at))
		default:
			rest = append(rest, p.line)
		}
	}
	if !slices.Equal(rest, []string{"over", "after", "awake", "crlf", "next", ""}) {
		t.Errorf("other lines are %q", rest)
	}
}

// TestErrorPrinted reads what a failed step printed out of the error alone.
func TestErrorPrinted(t *testing.T) {
	ctx, _, f := start(t, stack.FunctionConfig{})
	fails := func(step string) []byte {
		return stack.Body(t, config{"skipPush": true, "noCache": true}, map[string]string{"Dockerfile": "FROM busybox AS beside\n" +
			"RUN i=0; while [ $i -lt 100 ]; do echo beside-$i; echo beside-$i >&2; sleep 0.1; i=$((i+1)); done\n" +
			"FROM busybox AS before\nRUN echo of-the-step-before\n" +
			"RUN sleep 1; " + step + "\n" +
			"FROM busybox\nCOPY --from=before /bin/busybox /\nCOPY --from=beside /bin/busybox /\n"})
	}
	// The lines between what failed and the Dockerfile's.
	between := func(text string) []string {
		_, rest, ok := strings.Cut(text, "exit code 3\n")
		output, _, ok2 := strings.Cut(rest, "\nDockerfile:5\n---")
		if !ok || !ok2 {
			t.Errorf("the error is %q", text)
		}
		return strings.Split(output, "\n")
	}
	// buildkitd reads the two outputs on their own. The silences between them keep their order,
	// and the step still ends before the one beside it.
	body := fails(`i=0; while [ $i -lt 30 ]; do echo out-$i; i=$((i+1)); done; sleep 3; printf 'main.c:1: \033[31merror\033[0m\n' >&2; sleep 3; printf 'drawn 1\rdrawn 2\r'; exit 3`)
	var want []string
	for i := range 18 {
		want = append(want, fmt.Sprint("out-", i+12))
	}
	want = append(want, "main.c:1: error", "drawn 2")
	a := f.MustPost(t, ctx, body)
	if a.StatusCode != http.StatusUnprocessableEntity || a.Code != "build_failed" || !slices.Equal(between(a.Error), want) {
		t.Errorf("got %v", a)
	}
	if !strings.HasPrefix(a.Error, "[before 3/3] RUN sleep 1; ") {
		t.Errorf("the error begins otherwise: %s", a.Error)
	}
	_, last := arrivals(t, ctx, f, body)
	if !slices.Equal(between(last.Error), want) {
		t.Errorf("in a stream: %s", last.Error)
	}
	text := f.MustPost(t, ctx, body, client.Header("Content-Type", "text/plain")).Body
	if err := within(text, strings.Join(want, "\n")+"\nDockerfile:5\n"); err != nil {
		t.Errorf("as text: %v", err)
	}

	// By bytes: a line of a page, and then fewer lines.
	a = f.MustPost(t, ctx, fails(`printf '%04000d\n%0500d\n%03000d\n' 1 2 3; exit 3`))
	if lines := between(a.Error); len(lines) != 2 || len(lines[0]) != 500 || len(lines[1]) != 3000 {
		t.Errorf("%d lines, %d bytes: %s", len(lines), len(strings.Join(lines, "\n")), a.Error)
	}
	// A step that says nothing.
	a = f.MustPost(t, ctx, fails(`exit 3`))
	if !strings.Contains(a.Error, "exit code 3\nDockerfile:5\n") {
		t.Errorf("of a silent step: %s", a.Error)
	}
}
