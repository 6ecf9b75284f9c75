package buildkit

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"

	"handler/function/api"
	"handler/function/redact"
)

func noDaemon(cause error) error {
	return &api.Error{Code: api.NoDaemon, Msg: "no buildkitd can be reached", Err: cause}
}

func daemonLost(cause error) error {
	return &api.Error{Code: api.DaemonLost, Msg: "buildkitd was lost while building, twice in turn", Err: cause}
}

// errPushLater is beside an *api.Error when the push may be tried again.
var errPushLater = errors.New("the registry wants the push to wait")

// lostWait is how long a transport's end may come after the errors it causes.
const lostWait = time.Second

// connectionLost says whether err is of the connection to the daemon, whose end
// end tells, and not of something that the daemon itself could not reach.
func connectionLost(err error, end <-chan struct{}) bool {
	text := err.Error()
	// The session is a stream of its own, and may end before the rest.
	if strings.Contains(text, "no active session") || strings.Contains(text, "session healthcheck failed") {
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
	wait := time.Duration(0)
	if grpcerrors.Code(err) == codes.Unavailable {
		wait = lostWait
	}
	select {
	case <-end:
		return true
	case <-time.After(wait):
		return false
	}
}

// failure is what a solve came to, and what is known beside it.
type failure struct {
	err     error
	redact  *redact.Redactor
	step    func(digest string) string // name of a vertex
	pushing bool                       // the push had begun
	auths   []*api.Error               // what the daemon was told of registries, the last first
}

// classify makes an *api.Error of it, or one of the errors above.
func (f *failure) classify() error {
	text := f.err.Error()

	if exit, ok := errors.AsType[*gatewayapi.ExitError](f.err); ok {
		return f.buildFailed(f.exitText(exit.ExitCode))
	}
	for _, e := range f.auths {
		if strings.Contains(text, e.Msg) {
			return &api.Error{Code: e.Code, Msg: f.redact.Line(e.Msg), Err: errors.Join(e.Err, f.err)}
		}
	}
	if grpcerrors.Code(f.err) == codes.ResourceExhausted || strings.Contains(text, "no space left on device") {
		return &api.Error{Code: api.DaemonFull, Msg: "buildkitd has no space left on its disk", Err: f.err}
	}
	if e := f.registry(text); e != nil {
		return e
	}
	return f.buildFailed(trimWrapping(text))
}

func (f *failure) exitText(code uint32) string {
	text := fmt.Sprintf("exit code %d", code)
	if code == 137 {
		text += ": killed, probably because memory ran out"
	}
	return text
}

// buildFailed says what failed at which step, with the Dockerfile around it.
func (f *failure) buildFailed(what string) error {
	var b strings.Builder
	if v, ok := errors.AsType[*errdefs.VertexError](f.err); ok {
		if step := f.step(v.Digest); step != "" && !strings.Contains(what, step) {
			b.WriteString(step + ": ")
		}
	}
	b.WriteString(what)
	for _, s := range errdefs.Sources(f.err) {
		b.WriteString("\n")
		s.Print(&b)
	}
	return &api.Error{Code: api.BuildFailed, Msg: strings.TrimRight(f.redact.Text(b.String()), "\n"), Err: f.err}
}

// Forms of containerd's resolver and of BuildKit's push and pull. The daemon's
// errors lose their types on the way here.
var (
	unexpectedStatus = regexp.MustCompile(`unexpected status(?: code)?(?: from \w+ request to)? \S*?: (\d{3})\b`)
	registryContext  = regexp.MustCompile(`failed to push (\S+): |failed to resolve source metadata for (\S+): |failed to (?:copy|do request|authorize|fetch \w+ token|resolve reference)\b|httpReadSeeker`)
	unreachable      = regexp.MustCompile(`connection refused|no such host|i/o timeout|connection reset by peer|network is unreachable|no route to host|TLS handshake timeout|tls: |x509: |\bEOF$|: EOF\b|server misbehaving|context deadline exceeded|broken pipe|use of closed network connection`)
	denied           = regexp.MustCompile(`insufficient_scope|\bdenied\b|authorization failed|no basic auth credentials|401 Unauthorized|403 Forbidden|failed to find supported auth scheme|name unknown|NAME_UNKNOWN|: not found$|not found: not found|pull access denied|push access denied|missing username or secret|invalid authorization|invalid_token`)
)

// registry is the error of a registry, or nil when text is about none.
func (f *failure) registry(text string) error {
	if !registryContext.MatchString(text) && !f.pushing {
		return nil
	}
	doing := "pulling"
	if f.pushing {
		doing = "pushing"
	}
	msg := f.redact.Line(trimWrapping(text))
	e := func(code api.Code) error { return &api.Error{Code: code, Msg: doing + ": " + msg, Err: f.err} }
	if m := unexpectedStatus.FindStringSubmatch(text); m != nil {
		switch status, _ := strconv.Atoi(m[1]); {
		case status == 429 && f.pushing:
			return fmt.Errorf("%w: %w", errPushLater, e(api.RegistryFailed))
		case status == 429, status >= 500:
			return e(api.RegistryFailed)
		case status >= 400:
			return e(api.RegistryDenied)
		}
	}
	switch {
	case denied.MatchString(text):
		return e(api.RegistryDenied)
	case unreachable.MatchString(text):
		return e(api.RegistryFailed)
	case f.pushing:
		return e(api.RegistryFailed)
	}
	return nil
}

// trimWrapping drops what BuildKit's client puts before every error.
func trimWrapping(text string) string {
	for _, prefix := range []string{"failed to solve: ", "rpc error: ", "code = Unknown desc = "} {
		text = strings.TrimPrefix(text, prefix)
	}
	return text
}
