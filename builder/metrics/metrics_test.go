package metrics

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"

	"handler/function/api"
	"handler/function/records"
	"handler/function/solve"
)

func noRecords() records.Stats { return records.Stats{} }

func noDaemons() solve.Daemons { return solve.Daemons{} }

// scrape returns the builder's own series, without the histograms.
func scrape(m *Metrics) string {
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	var list []string
	for _, line := range strings.SplitAfter(w.Body.String(), "\n") {
		if strings.HasPrefix(line, "builder_") && !strings.Contains(line, "_seconds") {
			list = append(list, line)
		}
	}
	return strings.Join(list, "")
}

// TestTenants holds which series have a tenant, and when.
func TestTenants(t *testing.T) {
	count := func(m *Metrics) {
		m.Built("t-1", api.Success, "", 0, solve.Stats{Steps: 3, Cached: 1, Sent: 10})
		m.Built("t-2", api.Failed, api.TenantBusy, 0, solve.Stats{})
		m.Refused("t-1", api.Suspended)
		m.Refused("", api.Unauthorized)
	}
	off := New(Config{Daemons: noDaemons, Records: noRecords})
	before := scrape(off)
	if strings.Contains(before, "tenant") {
		t.Errorf("without a file: %s", before)
	}
	count(off)
	if got := scrape(off); strings.Contains(got, "tenant=") || !strings.Contains(got, "builder_context_sent_bytes_total 10\n") {
		t.Errorf("off: %s", got)
	}
	off.Tenants(func(string) bool { return false })
	if got := scrape(off); !strings.Contains(got, `builder_builds_total{code="tenant_busy",status="failed"} 1`) || !strings.Contains(got, `builder_requests_refused_total{code="tenant_busy"} 0`) {
		t.Errorf("off, with a file: %s", got)
	}

	stale := false
	on := New(Config{Daemons: noDaemons, Records: noRecords, Tenants: true, Stale: func() (bool, bool) { return stale, true }})
	count(on)
	want := []string{
		`builder_builds_total{code="",status="success",tenant="t-1"} 1`,
		`builder_builds_total{code="tenant_busy",status="failed",tenant="t-2"} 1`,
		`builder_builds_total{code="busy",status="failed",tenant=""} 0`,
		`builder_requests_refused_total{code="suspended",tenant="t-1"} 1`,
		`builder_requests_refused_total{code="unauthorized",tenant=""} 1`,
		`builder_steps_total{cached="true",tenant="t-1"} 1`,
		`builder_steps_total{cached="false",tenant="t-1"} 2`,
		`builder_context_sent_bytes_total{tenant="t-1"} 10`,
		`builder_tenants_stale 0`,
	}
	got := scrape(on)
	for _, line := range want {
		if !strings.Contains(got, line+"\n") {
			t.Errorf("missing %s in %s", line, got)
		}
	}
	stale = true
	on.Tenants(func(id string) bool { return id == "t-2" })
	got = scrape(on)
	if strings.Contains(got, "t-1") || !strings.Contains(got, "t-2") || !strings.Contains(got, `code="unauthorized",tenant=""`) || !strings.Contains(got, "builder_tenants_stale 1\n") {
		t.Errorf("after t-1 has gone: %s", got)
	}
	count(on)
	on.Tenants(func(string) bool { return false })
	if got := scrape(on); strings.Contains(got, "t-1") || strings.Contains(got, "t-2") {
		t.Errorf("after both have gone: %s", got)
	}
	if got := scrape(New(Config{Daemons: noDaemons, Records: noRecords, Stale: func() (bool, bool) { return true, false }})); got != before {
		t.Errorf("without a file, and with one that could come: %s", got)
	}
}

// TestFaults checks that the counters of what a client may try again begin at zero, so that
// alerting rules see the first one.
func TestFaults(t *testing.T) {
	w := httptest.NewRecorder()
	New(Config{Daemons: noDaemons, Records: noRecords}).Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	got := w.Body.String()
	want := []string{`builder_builds_total{code="",status="success"} 0`}
	for _, code := range codes(t) {
		// No build ends here with the last three.
		if code.HTTPStatus() < http.StatusTooManyRequests || slices.Contains([]api.Code{api.ShuttingDown, api.TenantBusy, api.Lost, api.OwnerUnreachable, api.RecordsUnreachable}, code) {
			continue
		}
		want = append(want,
			fmt.Sprintf("builder_builds_total{code=%q,status=%q} 0", code, api.Failed),
			fmt.Sprintf("builder_requests_refused_total{code=%q} 0", code))
	}
	if len(want) < 10 {
		t.Fatalf("only %q", want)
	}
	for _, line := range want {
		if !strings.Contains(got, line+"\n") {
			t.Errorf("missing %s", line)
		}
	}
}

func codes(t *testing.T) (all []api.Code) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../api/error.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || spec.Type == nil || spec.Type.(*ast.Ident).Name != "Code" {
			return true
		}
		value, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, api.Code(value))
		return true
	})
	return all
}
