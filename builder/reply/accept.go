package reply

import (
	"net/http"
	"strconv"
	"strings"

	"handler/function/api"
)

// Form is how an answer is written.
type Form int

const (
	JSON   Form = iota // one indented object when the build has ended
	NDJSON             // one object a line
	SSE                // the same objects as server-sent events
)

// Accept chooses the form from all Accept headers of a request. NDJSON comes
// before SSE, whatever their order: a caller of the CE gateway has to name both
// to get NDJSON passed on as it comes.
func Accept(h http.Header) Form {
	form := JSON
	for _, list := range h.Values("Accept") {
		for item := range strings.SplitSeq(list, ",") {
			name, params, _ := strings.Cut(item, ";")
			if refused(params) {
				continue
			}
			switch strings.ToLower(strings.TrimSpace(name)) {
			case api.NDJSONType:
				return NDJSON
			case api.SSEType:
				form = SSE
			}
		}
	}
	return form
}

// refused reports whether the parameters of an Accept item have a weight of
// zero, which says that it is not acceptable (RFC 9110, section 12.4.2).
func refused(params string) bool {
	for p := range strings.SplitSeq(params, ";") {
		name, value, _ := strings.Cut(p, "=")
		if strings.EqualFold(strings.TrimSpace(name), "q") {
			q, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			return err == nil && q == 0
		}
	}
	return false
}
