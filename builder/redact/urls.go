package redact

import (
	"regexp"
	"strings"
)

var (
	// inText is the beginning of a URL and what follows without a space, which may
	// be further URLs. Its slashes may be escaped as in JSON, or as in a query.
	inText = regexp.MustCompile(`([A-Za-z][A-Za-z0-9+.-]*)(:\\?/\\?/|(?i:%(?:25)*3a%(?:25)*2f%(?:25)*2f))([^\s"<>]*)`)

	// user is what stands before a URL's host: also where a slash in a password
	// makes it seem a path.
	user = regexp.MustCompile(`^(?:[^/\\?#]*@|[^/\\?#@:\[]*:[0-9]*[^/\\?#@0-9][^?#@]*@)`)

	// extra is a URL's query, or a fragment with a value: that of a git repository
	// is a branch.
	extra = regexp.MustCompile(`\?.*|#[^?]*=.*`)

	// pathQuery is a query after a path whose host is left out, as in a redirect.
	pathQuery = regexp.MustCompile(`(/[^\s"?<>]*)\?([^\s"?&=<>]+=[^\s"<>]*)`)

	// signing are the parameters of AWS, Google, Azure and CloudFront that are as
	// good as a password, where they stand outside of what is taken for a URL.
	signing = regexp.MustCompile(`(?i)\b((?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig)(?:=|%3d))[^\s"&<>]+`)

	// escaped are the bytes that part a URL, in one that is escaped itself.
	escaped = regexp.MustCompile(`(?i)%(?:25)*(2f|3a|3f|40|23)`)
	parting = map[string]string{"2f": "/", "3a": ":", "3f": "?", "40": "@", "23": "#"}
)

// closing is what may follow a URL in a sentence, or in a text that quotes it.
const closing = `\:'),.;]}`

// URLs leaves out of text what may be secret in its URLs: their queries, since a
// registry's storage is asked with signed ones, and their users.
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

// maxNested is how deep URLs are looked for in URLs, as a proxy's has the one that it was
// asked for. What is deeper is left out: each level is another reading of the rest.
const maxNested = 4

func cutURLs(text string, nested int) string {
	if nested == 0 && inText.MatchString(text) {
		return mask
	}
	return inText.ReplaceAllStringFunc(text, func(s string) string {
		m := inText.FindStringSubmatch(s)
		rest := m[3]
		if strings.HasPrefix(m[2], "%") {
			rest = escaped.ReplaceAllStringFunc(rest, func(e string) string { return parting[strings.ToLower(e[len(e)-2:])] })
		}
		rest = user.ReplaceAllLiteralString(rest, "")
		if at := extra.FindStringIndex(rest); at != nil {
			rest = rest[:at[0]] + ending(rest)
		}
		return m[1] + m[2] + cutURLs(rest, nested-1)
	})
}

// ending is the end of s that belongs to the text around a URL.
func ending(s string) string { return s[len(strings.TrimRight(s, closing)):] }
