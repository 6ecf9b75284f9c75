package metrics

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"handler/function/api"
	"handler/function/solve"
)

// TestFaults checks that the counters of what a client may try again begin at zero, so that
// alerting rules see the first one.
func TestFaults(t *testing.T) {
	w := httptest.NewRecorder()
	New(func() solve.Daemons { return solve.Daemons{} }).Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	got := w.Body.String()
	want := []string{`builder_builds_total{code="",status="success"} 0`}
	for _, code := range codes(t) {
		if code.HTTPStatus() < http.StatusTooManyRequests || code == api.ShuttingDown {
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
