package function

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestWrongConfiguration: a process whose environment is wrong is up, and not
// ready. What Handle came to holds for the process, so that no other test may call
// it.
func TestWrongConfiguration(t *testing.T) {
	t.Setenv("max_builds", "none")
	for path, want := range map[string]int{"/healthz": 200, "/ready": 503, "/": 503, "/build": 503} {
		w := httptest.NewRecorder()
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil)
		r.Header.Set("X-Call-Id", "a")
		if path == "/build" {
			r.Header.Set("Content-Type", "text/plain")
		}
		Handle(w, r)
		if w.Code != want {
			t.Errorf("%s: %d %s, want %d", path, w.Code, w.Body, want)
		}
		if want == 503 && (!strings.Contains(w.Body.String(), "configuration is wrong") || !strings.Contains(w.Body.String(), "not_ready")) {
			t.Errorf("%s does not tell the reason: %s", path, w.Body)
		}
		if want == 503 && (w.Header().Get("X-Call-Id") != "a" || strings.HasPrefix(w.Header().Get("Content-Type"), "text/plain") != (path == "/build")) {
			t.Errorf("%s: %v", path, w.Header())
		}
	}
}
