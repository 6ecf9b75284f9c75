// Package page serves the builder's page for browsers. It is one document that packs a build
// context, signs it, posts it to the address that the document came from, and shows the
// build. Its policy lets nothing run that is not in this binary.
//
// The document asks for the payload secret only at the root of a host. Below a path, as at
// the gateway's /function/builder, all functions share its origin. A page of another
// function could read what is typed there, and no policy of this document prevents it. So
// the document says there where else to go.
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

// The document refers to no other file. So it works below any path, with and without a slash
// at its end.
var (
	script   = tarScript + stepsScript + pageScript
	document = strings.NewReplacer("{{style}}", style, "{{script}}", script).Replace(markup)
)

// policy is the Content-Security-Policy. Nothing in the page may turn a string into HTML or
// a script, so that text from a build cannot become markup even by mistake.
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

// Or serves the page to requests that want HTML, and leaves all others to h.
func Or(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Add("Vary", "Accept")
		if wanted(r.Header) {
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
	// This also keeps browsers from keeping the form, with the secret in it, for their
	// Back button.
	h.Set("Cache-Control", "no-store")
	w.Write([]byte(document))
}

// wanted reports whether a request's Accept headers name HTML and do not prefer JSON. "*/*",
// which curl sends, does not name HTML.
func wanted(h http.Header) bool {
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
	accepts []string // the ranges that match it, the most specific last
	rank    int      // the place in accepts, from 1, of the range that gave q
	q       float64
}

// see reads one item of an Accept header.
func (w *weight) see(item string) {
	name, params, _ := strings.Cut(item, ";")
	name = strings.ToLower(strings.TrimSpace(name))
	for i, accepted := range w.accepts {
		if name == accepted && i+1 >= w.rank {
			w.rank, w.q = i+1, quality(params)
		}
	}
}

// quality returns the q among an item's parameters, or 1 if there is none that can be read.
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
