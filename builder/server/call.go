package server

import (
	"crypto/rand"
	"net/http"
	"strings"
	"time"
	"unicode"

	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/reply"
)

// call is one request that sends a body: for a build, or with a context.
type call struct {
	id     string
	start  time.Time
	form   reply.Form
	queued bool // a queue delivered it
	named  bool // its id came with it
	log    zerolog.Logger
}

func (s *Server) newCall(w http.ResponseWriter, r *http.Request) *call {
	c := &call{
		start:  time.Now(),
		form:   reply.Accept(r.Header),
		queued: r.Header.Get(api.CallbackHeader) != "" || strings.Contains(r.UserAgent(), "queue-worker"),
	}
	c.id, c.named = nameCall(w, r)
	c.log = s.Log.With().Str("call_id", c.id).Logger()
	return c
}

// waits says whether the caller waits for a slot, because it would not come back later: the
// CE queue worker takes a 429 for the build's answer, and does not deliver the request again.
// Anybody can claim to be such a caller, so the answer counts only once the signature has
// passed.
func (c *call) waits() bool { return c.form != reply.JSON || c.queued }

// mayJoin says whether the call may be a second delivery of an earlier call.
func (c *call) mayJoin() bool { return c.queued && c.named }

// answer is what every answer to the call has.
func (c *call) answer() reply.Options {
	return reply.Options{ID: c.id, Start: c.start, Waits: c.waits()}
}

// maxCallID is longer than any id that a gateway makes.
const maxCallID = 128

// validCallID says whether an answer can contain id. Text answers have it on a line.
func validCallID(id string) bool {
	return id != "" && len(id) <= maxCallID && !strings.ContainsFunc(id, unicode.IsControl)
}

// nameCall returns the id of a request: the X-Call-Id that came with it, or an id made
// here. It sets the X-Call-Id of the answer. ServeHTTP names each request before its handler
// does; the second call finds a made id in that header, and returns it again.
func nameCall(w http.ResponseWriter, r *http.Request) (id string, came bool) {
	id = r.Header.Get(api.CallIDHeader)
	if came = validCallID(id); !came {
		id = w.Header().Get(api.CallIDHeader)
	}
	if id == "" {
		id = rand.Text()
	}
	w.Header().Set(api.CallIDHeader, id)
	return id, came
}

// isText says whether the client reads errors better as text: the OpenFaaS UI shows a
// JSON error as "[object Object]", and faas-cli invoke prints to a terminal.
func isText(r *http.Request) bool {
	t, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	return strings.EqualFold(strings.TrimSpace(t), api.TextType)
}
