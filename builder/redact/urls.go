package redact

import (
	"regexp"
	"strings"
)

var (
	// inText matches a URL and what follows it without a space, which may have other
	// URLs in it. The "://" may be escaped as in JSON or as in a query.
	inText = regexp.MustCompile(`([A-Za-z][A-Za-z0-9+.-]*)(:\\?/\\?/|(?i:%(?:25)*3a%(?:25)*2f%(?:25)*2f))([^\s"<>]*)`)

	// user matches the user name and password before a URL's host. A password may have a
	// slash in it, so that the host seems to be before the slash.
	user = regexp.MustCompile(`^(?:[^/\\?#]*@|[^/\\?#@:\[]*:[0-9]*[^/\\?#@0-9][^?#@]*@)`)

	// extra matches a URL's query, or a fragment with a value. Other fragments stay: that
	// of a git repository is a branch.
	extra = regexp.MustCompile(`\?.*|#[^?]*=.*`)

	// pathQuery matches a path and a query without a host before them, as in a redirect.
	pathQuery = regexp.MustCompile(`(/[^\s"?<>]*)\?([^\s"?&=<>]+=[^\s"<>]*)`)

	// signing matches those parameters of AWS, Google, Azure and CloudFront that are as
	// good as a password. They may be outside of what the other patterns match.
	signing = regexp.MustCompile(`(?i)\b((?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig)(?:=|%3d))[^\s"&<>]+`)

	// escaped matches the delimiters of a URL that is itself escaped in a query, once
	// or more often; delimiters has them by their hex digits.
	escaped    = regexp.MustCompile(`(?i)%(?:25)*(2f|3a|3f|40|23)`)
	delimiters = map[string]string{"2f": "/", "3a": ":", "3f": "?", "40": "@", "23": "#"}
)

// closing are the characters that may follow a URL in a sentence, or in a text that quotes
// it.
const closing = `\:'),.;]}`

// URLs returns text without what may be secret in its URLs: user names, passwords, and
// queries, since a signed query gives access to a registry's storage.
func URLs(text string) string {
	if !strings.ContainsAny(text, "?#@=%") {
		return text
	}
	text = pathQuery.ReplaceAllStringFunc(cutURLs(text, maxNested), func(s string) string {
		path, _, _ := strings.Cut(s, "?")
		return path + ending(s)
	})
	return signing.ReplaceAllString(text, "${1}"+mask)
}

// maxNested is how deep URLs are looked for in URLs: a proxy's may have the URL that it was
// asked for. Deeper ones are masked. Each level reads the rest of the text once more.
const maxNested = 4

// cutURLs cuts users and queries out of the URLs in text, and of those in these, nested
// levels deep.
func cutURLs(text string, nested int) string {
	if nested == 0 && inText.MatchString(text) {
		return mask
	}
	return inText.ReplaceAllStringFunc(text, func(s string) string {
		m := inText.FindStringSubmatch(s)
		rest := m[3]
		if strings.HasPrefix(m[2], "%") {
			rest = escaped.ReplaceAllStringFunc(rest, func(e string) string { return delimiters[strings.ToLower(e[len(e)-2:])] })
		}
		rest = user.ReplaceAllLiteralString(rest, "")
		if at := extra.FindStringIndex(rest); at != nil {
			rest = rest[:at[0]] + ending(rest)
		}
		return m[1] + m[2] + cutURLs(rest, nested-1)
	})
}

// ending returns the end of s that belongs to the text around a URL.
func ending(s string) string { return s[len(strings.TrimRight(s, closing)):] }
