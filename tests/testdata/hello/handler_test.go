package function

import (
	"net/http/httptest"
	"testing"
)

func TestHandle(t *testing.T) {
	for path, want := range map[string]string{"/": "hello, world\n", "/you": "hello, you\n"} {
		w := httptest.NewRecorder()
		Handle(w, httptest.NewRequest("GET", path, nil))
		if got := w.Body.String(); got != want {
			t.Errorf("%s answers %q, want %q", path, got, want)
		}
	}
}
