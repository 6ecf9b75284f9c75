package page_test

import (
	"crypto/sha256"
	"encoding/base64"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"handler/function/page"
)

func get(t *testing.T, method string, accept ...string) *http.Response {
	t.Helper()
	h := page.Or(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, "{}")
	}))
	r := httptest.NewRequestWithContext(t.Context(), method, "/", nil)
	r.Header["Accept"] = accept
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

func TestAccept(t *testing.T) {
	for _, tt := range []struct {
		accept []string
		html   bool
	}{
		{nil, false},
		{[]string{""}, false},
		{[]string{"*/*"}, false},
		{[]string{"application/json"}, false},
		{[]string{"application/json, text/plain, */*"}, false},
		{[]string{"text/plain"}, false},
		{[]string{"text/htmlx"}, false},
		{[]string{"text/html"}, true},
		{[]string{"TEXT/HTML; charset=utf-8"}, true},
		{[]string{"text/*"}, true},
		{[]string{"text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"}, true},
		{[]string{"text/html, */*"}, true},
		{[]string{"*/*", "text/html"}, true},
		{[]string{"application/json, text/html"}, true},
		{[]string{"application/json, text/html;q=0.9"}, false},
		{[]string{"text/html;q=0.5, */*;q=0.8"}, false},
		{[]string{"text/html;q=0.5, */*;q=0.8, application/json;q=0.1"}, true},
		{[]string{"text/html;q=0"}, false},
		{[]string{"text/html; Q=0.000"}, false},
		{[]string{"text/*, text/html;q=0"}, false},
		{[]string{"text/html;q=0, text/*"}, false},
		{[]string{"text/html;q=high"}, true},
	} {
		res := get(t, http.MethodGet, tt.accept...)
		if got := strings.HasPrefix(res.Header.Get("Content-Type"), "text/html"); got != tt.html {
			t.Errorf("Accept %q: HTML is %t", tt.accept, got)
		}
		if got := res.Header.Get("Vary"); got != "Accept" {
			t.Errorf("Accept %q: Vary is %q", tt.accept, got)
		}
	}
}

var (
	scriptTag = regexp.MustCompile(`(?s)<script type="module">(.*?)</script>`)
	styleTag  = regexp.MustCompile(`(?s)<style>(.*?)</style>`)
)

func source(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// TestPolicy computes the hashes from the document, as a browser does.
func TestPolicy(t *testing.T) {
	res := get(t, http.MethodGet, "text/html")
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	document := string(body)
	if strings.Contains(document, "{{") {
		t.Error("a part of the document is missing")
	}
	policy := make(map[string]string)
	for directive := range strings.SplitSeq(res.Header.Get("Content-Security-Policy"), "; ") {
		name, value, _ := strings.Cut(directive, " ")
		policy[name] = value
	}
	for name, tag := range map[string]*regexp.Regexp{"script-src": scriptTag, "style-src": styleTag} {
		found := tag.FindAllStringSubmatch(document, -1)
		if len(found) != 1 || len(found[0][1]) < 1000 {
			t.Errorf("%s: the document has %d elements, not one", name, len(found))
			continue
		}
		if want := source(found[0][1]); policy[name] != want {
			t.Errorf("%s is %s, but the document's is %s", name, policy[name], want)
		}
	}
	for name, want := range map[string]string{
		"default-src": "'none'", "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'",
		"frame-ancestors": "'none'", "trusted-types": "'none'", "require-trusted-types-for": "'script'",
	} {
		if policy[name] != want {
			t.Errorf("%s is %q, not %q", name, policy[name], want)
		}
	}
	for _, never := range []*regexp.Regexp{
		regexp.MustCompile(`(?i)\bsrc=`),               // a sub-resource
		regexp.MustCompile(`(?i)href="[^#d]`),          // but for data: and the symbols
		regexp.MustCompile(`(?i)\bstyle="`),            // the policy refuses it
		regexp.MustCompile(`(?i)\son[a-z]+="`),         // likewise
		regexp.MustCompile(`innerHTML|insertAdjacent`), // text of a build is text
	} {
		if found := never.FindString(document); found != "" {
			t.Errorf("the document has %q", found)
		}
	}
}

func TestHeaders(t *testing.T) {
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		res := get(t, method, "text/html")
		for name, want := range map[string]string{
			"Content-Type":           "text/html; charset=utf-8",
			"X-Content-Type-Options": "nosniff",
			"X-Frame-Options":        "DENY",
			"Referrer-Policy":        "no-referrer",
			"Cache-Control":          "no-store",
		} {
			if got := res.Header.Get(name); got != want {
				t.Errorf("%s: %s is %q, not %q", method, name, got, want)
			}
		}
	}
}
