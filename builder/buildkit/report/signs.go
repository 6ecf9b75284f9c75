package report

import (
	"errors"
	"regexp"
	"strconv"
	"time"

	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
)

// The daemon's errors have lost their types when they arrive. Their words are left.

// quoted finds the client's own words in BuildKit's errors: stages, paths and commands. They
// must not be taken for BuildKit's.
var quoted = regexp.MustCompile(`"(?:[^"\\]|\\.)*"`)

// Unquoted is an error's text without the client's own words.
func Unquoted(text string) string { return quoted.ReplaceAllLiteralString(text, `""`) }

// lostWait is how long after an error the end of the transport that caused it may come.
const lostWait = time.Second

// sessionLost is about a build's session. It is a stream of its own, which may end before the
// transport does (session/manager.go and session/grpc.go of BuildKit).
var sessionLost = regexp.MustCompile(`no active session for [a-z0-9]{25}: |session healthcheck failed fatally: `)

// ConnectionLost says whether a solve failed with err because its connection to the daemon
// ended. end is closed when a transport of the connection ends. A daemon that cannot reach
// something itself fails with the same codes, but its transport goes on: ConnectionLost may
// wait for a second to tell the two apart.
func ConnectionLost(err error, end <-chan struct{}) bool {
	if _, ok := errors.AsType[*gatewayapi.ExitError](err); ok {
		return false
	}
	if sessionLost.MatchString(Unquoted(err.Error())) {
		return true
	}
	switch grpcerrors.Code(err) {
	case codes.Unavailable, codes.Canceled, codes.Unknown, codes.Internal:
	default:
		return false
	}
	if _, ok := errors.AsType[*errdefs.VertexError](err); ok {
		return false
	}
	select {
	case <-end:
		return true
	default:
	}
	if grpcerrors.Code(err) != codes.Unavailable {
		return false
	}
	select {
	case <-end:
		return true
	case <-time.After(lostWait):
		return false
	}
}

// noSpace is how the C library, Go and runc report a full disk.
var noSpace = regexp.MustCompile(`(?i)no space left on device|disk quota exceeded`)

// SaysFull says whether err may be about the daemon's own disk, to which it writes outside of
// steps too. gRPC has the same code for messages that are too large.
func SaysFull(err error) bool {
	return grpcerrors.Code(err) == codes.ResourceExhausted || noSpace.MatchString(Unquoted(err.Error()))
}

// MayBeFull says whether err, or the output of the step that failed, says that the daemon's
// disk is full. Any step can print such words: the daemon has to be asked.
func (p *Progress) MayBeFull(err error) bool {
	v, ok := errors.AsType[*errdefs.VertexError](err)
	return SaysFull(err) || ok && p.unstarted(v.Digest)
}

var unexpectedStatus = regexp.MustCompile(`unexpected status(?: code)?(?: from \w+ request to)? \S+: (\d{3})\b`)

// statusIn is the HTTP status of the answer that text tells of, or 0.
func statusIn(text string) int {
	m := unexpectedStatus.FindStringSubmatch(text)
	if m == nil {
		return 0
	}
	status, _ := strconv.Atoi(m[1])
	return status
}
