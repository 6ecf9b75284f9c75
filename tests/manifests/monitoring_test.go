package manifests

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/builder"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/prometheus/prometheus/rules"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// exported are series with the values of one scrape, by how the text format writes
// them.
type exported map[string]float64

var promQL = parser.NewParser(parser.Options{})

// instance is what a Prometheus adds to all that it scrapes, whatever its
// configuration, beside job.
const instance = "instance"

// TestMonitoring holds the dashboard and the alerts to what a function and a buildkitd
// export that have built, and lets Prometheus's own engine evaluate them.
func TestMonitoring(t *testing.T) {
	series, faults := scraped(t)
	volumes := claims(t)
	for claim, ours := range volumes {
		// https://kubernetes.io/docs/reference/instrumentation/metrics/ has the kubelet's.
		for name, value := range map[string]float64{"capacity": 50, "available": 30, "used": 20} {
			if ours {
				series[fmt.Sprintf(`kubelet_volume_stats_%s_bytes{namespace="openfaas",persistentvolumeclaim=%q}`, name, claim)] = value
			}
		}
	}
	t.Run("dashboard", func(t *testing.T) { testDashboard(t, series, volumes) })
	t.Run("alerts", func(t *testing.T) { testAlerts(t, series, volumes, faults) })
}

// scraped is what there is after builds that succeed, come from the cache, fail and
// are left by their client, and the codes that a function counts before any.
func scraped(t *testing.T) (series exported, faults []string) {
	t.Helper()
	port, err := stack.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	debug := fmt.Sprintf("127.0.0.1:%d", port)
	b, err := stack.Shared(t).NewBuildkitd(t.Context(), stack.BuildkitdConfig{Args: []string{"--debugaddr=" + debug}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Kill)
	s, f := stack.Test(t, stack.FunctionConfig{Buildkitd: b})
	path := description(t).Annotations["prometheus.io/path"]
	if path == "" {
		t.Fatal("stack.yml does not say where Prometheus finds the metrics")
	}
	metrics := f.URL + path
	for key := range scrape(t, metrics) {
		if code := labelsOf(t, key).Get("code"); code != "" && strings.HasPrefix(key, "builder_builds_total") {
			faults = append(faults, code)
		}
	}

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	body := func(step string) []byte {
		dir := stack.Context(t, map[string]string{"Dockerfile": "FROM busybox\nCOPY . /\nRUN " + step + "\n"})
		body, err := stack.Pack(dir, &builder.BuildConfig{Image: s.Registry.Image("monitoring:latest")})
		if err != nil {
			t.Fatal(err)
		}
		return body
	}
	for i, c := range []struct{ step, code string }{{"true", ""}, {"true", ""}, {"false", "build_failed"}} {
		// As a queue sends it: buildkitd does not count a build that it keeps out of its
		// history.
		if got := f.MustPost(t, ctx, body(c.step), client.Queued(fmt.Sprintf("monitoring-%d", i))); got.Code != c.code || (got.Status == "success") != (c.code == "") {
			t.Fatalf("%s: %v", c.step, got)
		}
	}
	left, leave := context.WithCancel(ctx)
	defer leave()
	if _, err := f.PostEach(left, body("sleep 60"), func(client.Record) { leave() }, client.Accept(client.NDJSON)); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	f.MustPost(t, ctx, []byte("unsigned"), client.Signature(""))

	// Both count a little after they have answered.
	for {
		series = scrape(t, metrics)
		maps.Copy(series, scrape(t, "http://"+debug+"/metrics"))
		var daemon float64
		for key, value := range series {
			if strings.HasPrefix(key, "buildkit_builds_total") {
				daemon += value
			}
		}
		if series[`builder_builds_total{code="canceled",status="failed"}`] == 1 && daemon == 3 {
			return series, faults
		}
		if ctx.Err() != nil {
			t.Fatalf("the builds are not counted: %v", series)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// scrape reads the series of the function's and of BuildKit's own.
func scrape(t *testing.T, url string) exported {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s answers %s, %v", url, resp.Status, err)
	}
	series := exported{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "builder_") && !strings.HasPrefix(line, "buildkit_") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		if series[line[:i]], err = strconv.ParseFloat(line[i+1:], 64); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
	}
	if len(series) == 0 {
		t.Fatalf("%s has nothing of ours", url)
	}
	return series
}

func labelsOf(t *testing.T, key string) labels.Labels {
	t.Helper()
	l, err := promQL.ParseMetric(key)
	if err != nil {
		t.Fatalf("%s: %v", key, err)
	}
	return l
}

// claims are the names of the daemons' volumes, and of others that queries must not
// take for one.
func claims(t *testing.T) map[string]bool {
	t.Helper()
	names := map[string]bool{"state-nats-0": false, "buildkitd-registry": false}
	dir := checkout(t)
	for _, name := range []string{"single", "pool"} {
		v := mustLoad(t, filepath.Join(dir, name))
		for _, claim := range v.claims {
			if v.set == nil {
				names[claim.Name] = true
				continue
			}
			for i := range value(v.set.Spec.Replicas) {
				names[fmt.Sprintf("%s-%s-%d", claim.Name, v.set.Name, i)] = true
			}
		}
	}
	if len(names) != 6 {
		t.Fatalf("the volumes are %v", names)
	}
	return names
}

// checkQuery reads a query and holds what it names to what is exported.
func checkQuery(t *testing.T, query string, series exported, volumes map[string]bool) {
	t.Helper()
	expr, err := promQL.ParseExpr(query)
	if err != nil {
		t.Errorf("%s: %v", query, err)
		return
	}
	known := map[string]bool{instance: true} // labels that a result may have
	var used []string
	parser.Inspect(expr, func(node parser.Node, _ []parser.Node) error {
		switch n := node.(type) {
		case *parser.AggregateExpr:
			used = append(used, n.Grouping...)
		case *parser.BinaryExpr:
			if n.VectorMatching != nil {
				used = append(used, n.VectorMatching.MatchingLabels...)
				used = append(used, n.VectorMatching.Include...)
			}
		case *parser.VectorSelector:
			var all []labels.Labels
			for key := range series {
				if l := labelsOf(t, key); l.Get(model.MetricNameLabel) == n.Name {
					all = append(all, l)
					l.Range(func(l labels.Label) { known[l.Name] = true })
				}
			}
			if len(all) == 0 {
				t.Errorf("%s: nothing exports %s", query, n.Name)
				return nil
			}
			for _, m := range n.LabelMatchers {
				checkMatcher(t, query, m, all, volumes)
			}
		}
		return nil
	})
	for _, label := range used {
		if !known[label] {
			t.Errorf("%s: no series has the label %s", query, label)
		}
	}
}

// checkMatcher wants each value that m names to be one that there is.
func checkMatcher(t *testing.T, query string, m *labels.Matcher, all []labels.Labels, volumes map[string]bool) {
	t.Helper()
	wants := m.SetMatches()
	if m.Type == labels.MatchEqual || m.Type == labels.MatchNotEqual {
		wants = []string{m.Value}
	}
	for _, want := range wants {
		if !slices.ContainsFunc(all, func(l labels.Labels) bool { return l.Has(m.Name) && l.Get(m.Name) == want }) {
			t.Errorf("%s: no series has %s=%q", query, m.Name, want)
		}
	}
	if m.Name == "persistentvolumeclaim" {
		for name, want := range volumes {
			if m.Matches(name) != want {
				t.Errorf("%s: the claim %s is matched: %v", query, name, !want)
			}
		}
	} else if len(wants) == 0 {
		t.Errorf("%s: %s does not name its values", query, m)
	}
}

// minutes is how long the series go on that queries are evaluated on.
const minutes = 120

// evaluate runs queries on the series at a minute. The series have their values
// throughout but for those in sequences, which are in the notation of Prometheus's
// unit tests.
func evaluate(t *testing.T, series exported, sequences map[string]string) func(query string, minute int) (promql.Vector, error) {
	t.Helper()
	var load strings.Builder
	load.WriteString("load 1m\n")
	for key, value := range series {
		sequence := sequences[key]
		if sequence == "" {
			sequence = fmt.Sprintf("%gx%d", value, minutes)
		}
		target, _, _ := strings.Cut(key, "_")
		l := labels.NewBuilder(labelsOf(t, key)).Del(model.MetricNameLabel).Set(instance, target).Labels()
		name, _, _ := strings.Cut(key, "{")
		fmt.Fprintf(&load, "  %s%s %s\n", name, l, sequence)
	}
	for key := range sequences {
		if _, ok := series[key]; !ok {
			t.Errorf("nothing exports %s", key)
		}
	}
	db := promqltest.LoadedStorage(t, load.String())
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 1e6, Timeout: time.Minute, LookbackDelta: 5 * time.Minute, Parser: promQL})
	t.Cleanup(func() { engine.Close() })
	query := rules.EngineQueryFunc(engine, db)
	return func(text string, minute int) (promql.Vector, error) { return query(t.Context(), text, at(minute)) }
}

func at(minute int) time.Time { return time.Unix(int64(minute)*60, 0) }

type panel struct {
	ID          int    `json:"id"`
	Type        string `json:"type"`
	Title       string `json:"title"`
	Description string `json:"description"`
	Datasource  struct {
		Type string `json:"type"`
		UID  string `json:"uid"`
	} `json:"datasource"`
	GridPos     struct{ X, Y, W, H int } `json:"gridPos"`
	FieldConfig struct {
		Defaults struct {
			Unit string `json:"unit"`
		} `json:"defaults"`
	} `json:"fieldConfig"`
	Targets []struct {
		RefID        string `json:"refId"`
		Expr         string `json:"expr"`
		LegendFormat string `json:"legendFormat"`
		Datasource   struct {
			UID string `json:"uid"`
		} `json:"datasource"`
	} `json:"targets"`
}

// dashboard is what is looked at of a dashboard of Grafana.
type dashboard struct {
	ID            *int    `json:"id"`
	SchemaVersion int     `json:"schemaVersion"`
	Panels        []panel `json:"panels"`
	Templating    struct {
		List []struct{ Name, Type, Query string } `json:"list"`
	} `json:"templating"`
}

func testDashboard(t *testing.T, series exported, volumes map[string]bool) {
	text, err := os.ReadFile(filepath.Join(repo, "buildkit", "monitoring", "dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	// 42 is the last one of this form of dashboards.
	if d.ID != nil || d.SchemaVersion != 42 || len(d.Panels) < 15 {
		t.Errorf("id %v, schema %d, %d panels", d.ID, d.SchemaVersion, len(d.Panels))
	}
	vars := []string{"$__rate_interval", "5m", "$__range", "1h"}
	datasource := false
	for _, v := range d.Templating.List {
		datasource = datasource || v.Name == "datasource" && v.Type == "datasource" && v.Query == "prometheus"
		vars = append(vars, "$"+v.Name, "30m")
	}
	if !datasource {
		t.Error("the data source cannot be chosen")
	}
	checkLayout(t, d.Panels)

	query := evaluate(t, series, counting(series))
	for _, p := range d.Panels {
		if p.Type == "row" {
			continue
		}
		t.Run(p.Title, func(t *testing.T) {
			checkPanel(t, p)
			for _, target := range p.Targets {
				text := strings.NewReplacer(vars...).Replace(target.Expr)
				checkQuery(t, text, series, volumes)
				result, err := query(text, minutes)
				if err != nil || len(result) == 0 {
					t.Errorf("%s is %v, %v", text, result, err)
				}
				checkResult(t, text, target.LegendFormat, result)
			}
		})
	}
}

// counting has each counter of the series grow by one a minute.
func counting(series exported) map[string]string {
	counter := regexp.MustCompile(`_(total|bucket|count|sum)$`)
	sequences := map[string]string{}
	for key, value := range series {
		if name, _, _ := strings.Cut(key, "{"); counter.MatchString(name) {
			sequences[key] = fmt.Sprintf("%g+1x%d", value, minutes)
		}
	}
	return sequences
}

// checkLayout wants panels with ids of their own, within the grid's 24 columns, and
// none over another.
func checkLayout(t *testing.T, panels []panel) {
	t.Helper()
	ids := map[int]bool{}
	cells := map[[2]int]string{}
	for _, p := range panels {
		if ids[p.ID] {
			t.Errorf("%s has the id of another", p.Title)
		}
		ids[p.ID] = true
		g := p.GridPos
		if g.X < 0 || g.W < 1 || g.H < 1 || g.X+g.W > 24 {
			t.Errorf("%s is at %+v", p.Title, g)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other := cells[[2]int{x, y}]; other != "" {
					t.Fatalf("%s lies over %s", p.Title, other)
				}
				cells[[2]int{x, y}] = p.Title
			}
		}
	}
}

// checkPanel wants a panel to be whole, and to ask the data source that is chosen.
func checkPanel(t *testing.T, p panel) {
	t.Helper()
	if p.Title == "" || p.Description == "" || p.FieldConfig.Defaults.Unit == "" || len(p.Targets) == 0 ||
		p.Datasource.Type != "prometheus" || p.Datasource.UID != "${datasource}" {
		t.Errorf("%q lacks something: %+v", p.Title, p)
	}
	refs := map[string]bool{}
	for _, target := range p.Targets {
		if refs[target.RefID] || target.Datasource.UID != "${datasource}" {
			t.Errorf("target %+v", target)
		}
		refs[target.RefID] = true
	}
}

var legendLabel = regexp.MustCompile(`\{\{(\w+)\}\}`)

// checkResult wants numbers, with the labels that the legend names.
func checkResult(t *testing.T, query, legend string, result promql.Vector) {
	t.Helper()
	for _, sample := range result {
		for _, m := range legendLabel.FindAllStringSubmatch(legend, -1) {
			// An empty value is as good as none: a success has no code.
			if sample.Metric.Get(m[1]) == "" && m[1] != "code" {
				t.Errorf("%s has no %s", sample.Metric, m[1])
			}
		}
		if math.IsNaN(sample.F) {
			t.Errorf("%s is not a number", query)
		}
	}
}

// alertOf is what fires when builds fail with a code, of those that nobody who sends a
// build can mend.
var alertOf = map[string]string{
	"no_daemon": "BuilderDaemonFailures", "daemon_lost": "BuilderDaemonFailures", "daemon_full": "BuilderDaemonFailures",
	"registry_failed": "BuilderRegistryFailures", "registry_timeout": "BuilderRegistryFailures",
	"context_failed": "BuilderContextFailures", "busy": "BuilderBusy", "queue_timeout": "BuilderBusy", "stalled": "BuilderBuildStalled",
	"internal": "BuilderFault", "no_space": "BuilderFault", "not_ready": "BuilderFault",
}

func testAlerts(t *testing.T, series exported, volumes map[string]bool, faults []string) {
	groups, errs := rulefmt.ParseFile(filepath.Join(repo, "buildkit", "monitoring", "alerts.yaml"), false, model.UTF8Validation, promQL, slog.New(slog.DiscardHandler))
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	var alerts []rulefmt.Rule
	for _, g := range groups.Groups {
		alerts = append(alerts, g.Rules...)
	}
	untested := map[string]bool{}
	for _, a := range alerts {
		untested[a.Alert] = true
		checkQuery(t, a.Expr, series, volumes)
		if a.Alert == "" || a.For == 0 || !slices.Contains([]string{"warning", "critical"}, a.Labels["severity"]) {
			t.Errorf("%+v", a)
		}
	}

	failed := func(code string) string { return fmt.Sprintf(`builder_builds_total{code=%q,status="failed"}`, code) }
	success := `builder_builds_total{code="",status="success"}`
	available := `kubelet_volume_stats_available_bytes{namespace="openfaas",persistentvolumeclaim="%s"}`
	label := regexp.MustCompile(`\$labels\.(\w+)`)
	type sequences map[string]string
	type test struct {
		name   string
		series sequences
		alert  string // the only one that fires; empty is none
	}
	tests := []test{
		{"builds succeed, fail and are left", sequences{success: "0+1x120", failed("build_failed"): "0+1x120", failed("canceled"): "0+1x120"}, ""},
		{"nothing happens", nil, ""},
		{"not scraped", sequences{"builder_daemons": "_x120"}, "BuilderUnwatched"},
		{"every daemon is away", sequences{"builder_daemons_reachable": "1x60 0x59"}, "BuilderNoDaemon"},
		{"a daemon restarts", sequences{"builder_daemons_reachable": "1x60 0x1 1x59"}, ""},
		{"one of three daemons", sequences{"builder_daemons": "3x120", "builder_daemons_reachable": "3x60 2x59"}, "BuilderDaemonsLost"},
		{"a pool is updated", sequences{"builder_daemons": "3x120", "builder_daemons_reachable": "3x60 2x20 3x40"}, ""},
		{"a full disk", sequences{"builder_daemons_full": "0x60 1x59"}, "BuilderDaemonFull"},
		{"a full disk is pruned", sequences{"builder_daemons_full": "0x60 1x9 0x50"}, ""},
		{"a pool's volume", sequences{fmt.Sprintf(available, "state-buildkitd-1"): "30x60 4x59"}, "BuildkitdVolumeNearlyFull"},
		{"the single volume", sequences{fmt.Sprintf(available, "buildkitd"): "30x60 4x59"}, "BuildkitdVolumeNearlyFull"},
		{"a volume that is collected", sequences{fmt.Sprintf(available, "buildkitd"): "7x60 4x9 20x50"}, ""},
		{"no build ends", sequences{"builder_builds_in_flight": "0x30 2x89"}, "BuilderStuck"},
		{"builds all the time", sequences{"builder_builds_in_flight": "4x120", success: "0+1x120"}, ""},
		{"a long build", sequences{"builder_builds_in_flight": "0x30 1x55 0x34"}, ""},
		{"no store of records", sequences{"builder_records_reachable": "1x60 0x59"}, "BuilderRecordsUnreachable"},
		{"records wait", sequences{"builder_records_lag_seconds": "0x60 0+60x59"}, "BuilderRecordsUnreachable"},
		{"the store restarts", sequences{"builder_records_reachable": "1x60 0x3 1x56", "builder_records_lag_seconds": "0x60 0+60x3 0x55"}, ""},
		{"a replica dies", sequences{"builder_builds_lost_total": "0x60 2x59"}, "BuilderBuildsLost"},
		{"one failure of hundreds", sequences{success: "0+10x120", failed("registry_failed"): "0x60 1x59", failed("daemon_lost"): "0x60 1x59"}, ""},
	}
	for code, alert := range alertOf {
		tests = append(tests, test{"failed with " + code, sequences{failed(code): "0x60 1x59"}, alert})
		if alert == "BuilderFault" {
			tests = append(tests, test{"refused with " + code, sequences{fmt.Sprintf("builder_requests_refused_total{code=%q}", code): "0x60 1x59"}, alert})
		}
	}
	if codes := slices.Sorted(maps.Keys(alertOf)); !slices.Equal(codes, slices.Sorted(slices.Values(faults))) {
		t.Errorf("the function counts %q from zero, and alerts know %q", faults, codes)
	}
	for _, c := range tests {
		delete(untested, c.alert)
		t.Run(c.name, func(t *testing.T) {
			query := evaluate(t, series, c.series)
			for _, a := range alerts {
				fired := fires(t, a, query)
				if (fired != nil) != (a.Alert == c.alert) {
					t.Errorf("%s: %v, want %q alone", a.Alert, fired, c.alert)
				}
				if fired == nil {
					continue
				}
				// Prometheus writes nothing for a label that there is not.
				for _, m := range label.FindAllStringSubmatch(fmt.Sprint(a.Annotations), -1) {
					if !fired.Labels.Has(m[1]) {
						t.Errorf("%s has no label %s", a.Alert, m[1])
					}
				}
				summary, description := fired.Annotations.Get("summary"), fired.Annotations.Get("description")
				if summary == "" || description == "" || strings.ContainsAny(summary+description, "<>") {
					t.Errorf("%s: %q, %q", a.Alert, summary, description)
				}
			}
		})
	}
	for alert := range untested {
		t.Errorf("nothing shows that %s can fire", alert)
	}
}

// fires evaluates a rule every minute, as Prometheus does, until it fires.
func fires(t *testing.T, a rulefmt.Rule, query func(string, int) (promql.Vector, error)) *rules.Alert {
	t.Helper()
	expr, err := promQL.ParseExpr(a.Expr)
	if err != nil {
		t.Fatal(err)
	}
	rule := rules.NewAlertingRule(a.Alert, expr, time.Duration(a.For), time.Duration(a.KeepFiringFor),
		labels.FromMap(a.Labels), labels.FromMap(a.Annotations), labels.EmptyLabels(), "", true, slog.New(slog.DiscardHandler))
	for minute := range minutes {
		ask := func(_ context.Context, text string, _ time.Time) (promql.Vector, error) { return query(text, minute) }
		if _, err := rule.Eval(t.Context(), 0, at(minute), ask, nil, 0); err != nil {
			t.Fatal(err)
		}
		for _, active := range rule.ActiveAlerts() {
			if active.State == rules.StateFiring {
				return active
			}
		}
	}
	return nil
}
