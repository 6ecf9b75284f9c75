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
	NDJSON             // one object on each line
	SSE                // the same objects as server-sent events
)

// Accept chooses the form from all Accept headers of a request. A request that names both
// NDJSON and SSE gets NDJSON: the CE gateway passes NDJSON on without a delay only if the
// caller names SSE too.
func Accept(h http.Header) Form {
	form := JSON
	for _, list := range h.Values("Accept") {
		for item := range strings.SplitSeq(list, ",") {
			name, params, _ := strings.Cut(item, ";")
			if unacceptable(params) {
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

// unacceptable says whether the parameters of an Accept item have a weight of zero, which
// means "not acceptable" (RFC 9110, section 12.4.2).
func unacceptable(params string) bool {
	for p := range strings.SplitSeq(params, ";") {
		name, value, _ := strings.Cut(p, "=")
		if strings.EqualFold(strings.TrimSpace(name), "q") {
			q, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			return err == nil && q == 0
		}
	}
	return false
}
