// Package page is the builder's face in a browser: one document that packs a
// build context, signs it, posts it to where it came from itself, and shows the
// build. Its policy lets nothing run that is not in this binary.
//
// It asks for the payload secret at the root of a host alone. Below a path, as at
// the gateway's /function/builder, every function has its origin, and no policy of
// this document keeps theirs from reading what is typed: there it says where to go.
package page

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"net/http"
	"strconv"
	"strings"
)

var (
	//go:embed page.html
	markup string
	//go:embed page.css
	style string
	//go:embed tar.js
	tarScript string
	//go:embed steps.js
	stepsScript string
	//go:embed page.js
	pageScript string
)

// One document has no address to resolve, and so works behind any prefix, with
// and without a slash at its end.
var (
	script   = tarScript + stepsScript + pageScript
	document = strings.NewReplacer("{{style}}", style, "{{script}}", script).Replace(markup)
)

// policy is the Content-Security-Policy. Text from a build cannot become markup
// even by mistake: nothing in the page may turn a string into HTML or a script.
var policy = strings.Join([]string{
	"default-src 'none'",
	"script-src " + hash(script),
	"style-src " + hash(style),
	"connect-src 'self'",
	"img-src data:", // the icon; without one browsers ask the gateway for /favicon.ico
	"base-uri 'none'",
	"form-action 'none'",
	"frame-ancestors 'none'",
	"require-trusted-types-for 'script'",
	"trusted-types 'none'",
}, "; ")

func hash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// Or serves the page to who asks for HTML, and leaves all others to h.
func Or(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Add("Vary", "Accept")
		if Wanted(r.Header) {
			serve(w)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func serve(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Length", strconv.Itoa(len(document)))
	h.Set("Content-Security-Policy", policy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	// Nor does a browser then keep the form, with the secret in it, to go back to.
	h.Set("Cache-Control", "no-store")
	w.Write([]byte(document))
}

// Wanted reports whether a request's Accept headers name HTML and do not want
// JSON more. "*/*" names nothing: curl sends it.
func Wanted(h http.Header) bool {
	// The most specific range that matches decides (RFC 9110, section 12.5.1).
	html := weight{accepts: []string{"text/*", "text/html"}}
	json := weight{accepts: []string{"*/*", "application/*", "application/json"}}
	for _, list := range h.Values("Accept") {
		for item := range strings.SplitSeq(list, ",") {
			html.see(item)
			json.see(item)
		}
	}
	return html.q > 0 && html.q >= json.q
}

// weight is how much one media type is wanted.
type weight struct {
	accepts []string // ranges that match it, the most specific last
	rank    int      // of the range that gave q, from 1
	q       float64
}

func (w *weight) see(item string) {
	name, params, _ := strings.Cut(item, ";")
	name = strings.ToLower(strings.TrimSpace(name))
	for i, accepted := range w.accepts {
		if name == accepted && i+1 >= w.rank {
			w.rank, w.q = i+1, quality(params)
		}
	}
}

// quality is the q of an item's parameters: 1 without one that can be read.
func quality(params string) float64 {
	for p := range strings.SplitSeq(params, ";") {
		name, value, _ := strings.Cut(p, "=")
		if !strings.EqualFold(strings.TrimSpace(name), "q") {
			continue
		}
		if q, err := strconv.ParseFloat(strings.TrimSpace(value), 64); err == nil && q >= 0 && q <= 1 {
			return q
		}
	}
	return 1
}
