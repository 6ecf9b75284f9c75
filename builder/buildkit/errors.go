package buildkit

import (
	"errors"
	"fmt"
	"net/http"
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
	return &api.Error{Code: api.DaemonLost, Msg: "buildkitd was lost while building, and the build had been moved once already", Err: cause}
}

// errPushLater is beside an *api.Error when the push may be tried again.
var errPushLater = errors.New("the registry wants the push to wait")

// lostWait is how long a transport's end may come after the errors it causes.
const lostWait = time.Second

// sessionLost is of a session, which is a stream of its own and may end before
// the rest (session/manager.go and grpc.go of BuildKit).
var sessionLost = regexp.MustCompile(`no active session for [a-z0-9]{25}: |session healthcheck failed fatally: `)

// connectionLost says whether err is of the connection to the daemon, whose end
// end tells, and not of something that the daemon itself could not reach.
func connectionLost(err error, end <-chan struct{}) bool {
	if _, ok := errors.AsType[*gatewayapi.ExitError](err); ok {
		return false
	}
	if sessionLost.MatchString(unquoted(err.Error())) {
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

// failure is what a solve came to, and what is known beside it.
type failure struct {
	err     error
	redact  *redact.Redactor
	step    func(digest string) string // name of a vertex
	printed func(digest string) string // the last that it printed, masked; may be nil
	noSpace func(digest string) bool   // whether it ran out of disk; may be nil
	full    bool                       // the daemon's disk is, and the error or a step that was not started said so
	pushing bool                       // the push had begun
	auths   []*api.Error               // what the daemon was told of registries, the last first

	anonymous []string          // hosts that were asked without credentials
	hints     map[string]string // what else to say of a push that was denied, by host

	// troubled says whether the push's own lines tell of a 5xx with the words of a
	// text. It is nil where there are no lines.
	troubled func(text string) bool
}

// quoted is what BuildKit's errors have of the client's own words: stages, paths
// and commands. They must not be taken for BuildKit's.
var quoted = regexp.MustCompile(`"(?:[^"\\]|\\.)*"`)

func unquoted(text string) string { return quoted.ReplaceAllLiteralString(text, `""`) }

// classify makes an *api.Error of it, with errPushLater beside it where that
// applies.
func (f *failure) classify() error {
	text := strings.TrimPrefix(f.err.Error(), "failed to solve: ")
	said := unquoted(text)
	if exit, ok := errors.AsType[*gatewayapi.ExitError](f.err); ok {
		if f.full {
			return f.daemonFull()
		}
		return f.buildFailed(exitText(exit.ExitCode, f.ranOutOfDisk()))
	}
	for _, e := range f.auths {
		if strings.Contains(text, e.Msg) {
			return &api.Error{Code: e.Code, Msg: f.redact.Line(e.Msg), Err: errors.Join(e.Err, f.err)}
		}
	}
	// A registry may say that its own disk is full.
	if e := f.registryStatus(said, text); e != nil {
		return e
	}
	if f.full || noSpace.MatchString(said) {
		return f.daemonFull()
	}
	if e := f.registryTrouble(said, text); e != nil {
		return e
	}
	return f.buildFailed(plain(text))
}

// noSpace is what the C library, Go and runc say of a full disk.
var noSpace = regexp.MustCompile(`(?i)no space left on device|disk quota exceeded`)

// saysFull says whether err may be of the daemon's own disk, as it is written to
// outside of steps. The code is that of large messages too.
func saysFull(err error) bool {
	return grpcerrors.Code(err) == codes.ResourceExhausted || noSpace.MatchString(unquoted(err.Error()))
}

func (f *failure) daemonFull() error {
	return &api.Error{Code: api.DaemonFull, Msg: "buildkitd has no space left on its disk", Err: f.err}
}

func exitText(code uint32, noSpace bool) string {
	text := fmt.Sprintf("exit code %d", code)
	switch {
	case code == 137:
		text += ": killed, probably because memory ran out"
	case noSpace:
		text += ": buildkitd's disk is full, or the step needs more than it has"
	}
	return text
}

func (f *failure) ranOutOfDisk() bool {
	v, ok := errors.AsType[*errdefs.VertexError](f.err)
	return ok && f.noSpace != nil && f.noSpace(v.Digest)
}

// maxStep is how much of a step's name an error has, in bytes: a RUN line can be
// longer than the whole error may, and why it failed comes after it.
const maxStep = 1 << 10

// buildFailed says what failed at which step, with the last that the step printed
// and the Dockerfile around it.
func (f *failure) buildFailed(what string) error {
	var b strings.Builder
	v, ok := errors.AsType[*errdefs.VertexError](f.err)
	if ok {
		if step := f.step(v.Digest); step != "" && !strings.Contains(what, step) {
			if len(step) > maxStep {
				step = strings.ToValidUTF8(step[:maxStep], "") + " …"
			}
			b.WriteString(step + ": ")
		}
	}
	b.WriteString(what)
	if ok && f.printed != nil {
		if text := f.printed(v.Digest); text != "" {
			b.WriteString("\n" + text)
		}
	}
	for _, s := range errdefs.Sources(f.err) {
		b.WriteString("\n")
		s.Print(&b)
	}
	return &api.Error{Code: api.BuildFailed, Msg: strings.TrimRight(f.redact.Text(b.String()), "\n"), Err: f.err}
}

// Forms of containerd's resolver and of BuildKit's push and pull. The daemon's
// errors have lost their types when they come here.
var (
	pushed           = regexp.MustCompile(`failed to push (\S+): `)
	answered         = regexp.MustCompile(`^(?:rpc error: code = Unknown desc = )?failed to push \S+: (?:errors:\s|(?:unknown|unsupported|unauthorized|denied|unavailable)(?:: |$))`) // with a body of the specification's form, in place of its status
	unexpectedStatus = regexp.MustCompile(`unexpected status(?: code)?(?: from \w+ request to)? \S+: (\d{3})\b`)
	registryContext  = regexp.MustCompile(`failed to push \S+: |failed to resolve source metadata for \S+: |failed to (?:do request|authorize|fetch \w+ token|resolve reference)\b|httpReadSeeker`)
	tooManyRequests  = regexp.MustCompile(`(?::\s|\n)toomanyrequests\b|(?i:too many requests|rate limit)`) // instead of a status, where the answer has a body
	denied           = regexp.MustCompile(`insufficient_scope|\bunauthorized\b|\bdenied\b|authorization failed|no basic auth credentials|failed to find supported auth scheme|name unknown|: not found$|missing username or secret|invalid authorization`)
	rejected         = regexp.MustCompile(`: unsupported: |: unknown: .*(?:does not exist|not known|not found|immutable|invalid|not allowed)`) // a 4xx whose body is all that BuildKit passes on
	unreachable      = regexp.MustCompile(`connection refused|no such host|server misbehaving|i/o timeout|context deadline exceeded|TLS handshake timeout|connection reset by peer|broken pipe|network is unreachable|no route to host|tls: |x509: |server gave HTTP response|: EOF\b`)
)

func (f *failure) aboutRegistry(said string) bool {
	return f.pushing || registryContext.MatchString(said)
}

// severalErrors begins what is made of a body with more than one error.
const severalErrors = "errors:"

// statusIn is the status of an answer that text tells of, or 0.
func statusIn(text string) int {
	m := unexpectedStatus.FindStringSubmatch(text)
	if m == nil {
		return 0
	}
	status, _ := strconv.Atoi(m[1])
	return status
}

// registryStatus is the error of a registry that answered with a status, or
// nil. said is text without what is quoted in it.
func (f *failure) registryStatus(said, text string) error {
	status := statusIn(said)
	if status == 0 && tooManyRequests.MatchString(said) {
		status = http.StatusTooManyRequests
	}
	switch {
	case !f.aboutRegistry(said):
		return nil
	case status == http.StatusTooManyRequests && f.pushing:
		return fmt.Errorf("%w: %w", errPushLater, f.registryError(api.RegistryFailed, text))
	case status == http.StatusTooManyRequests, status >= 500:
		return f.registryError(api.RegistryFailed, text)
	case status >= 400:
		return f.registryError(api.RegistryDenied, text)
	}
	return nil
}

// registryTrouble is the error of a registry that said no in other words, or
// that could not be asked, or nil.
func (f *failure) registryTrouble(said, text string) error {
	switch {
	case !f.aboutRegistry(said):
		return nil
	case f.pushing && f.troubled != nil && answered.MatchString(said):
		// BuildKit tries a 5xx again, and says so. No such line is a 4xx.
		if f.troubled(text) {
			return f.registryError(api.RegistryFailed, text)
		}
		return f.registryError(api.RegistryDenied, text)
	case denied.MatchString(said), rejected.MatchString(said):
		return f.registryError(api.RegistryDenied, text)
	case f.pushing, unreachable.MatchString(said):
		return f.registryError(api.RegistryFailed, text)
	}
	return nil
}

func (f *failure) registryError(code api.Code, text string) *api.Error {
	// A pull's text begins with the image's name.
	what := "pulling "
	if m := pushed.FindStringSubmatch(text); m != nil {
		what = "pushing " + m[1] + ": "
	} else if f.pushing {
		what = "pushing: "
	}
	msg := what + plain(text)
	if code == api.RegistryDenied {
		for _, host := range f.anonymous {
			if strings.Contains(text, host) {
				msg += fmt.Sprintf(" (no credentials are configured for %s)", host)
				break
			}
		}
		for host, hint := range f.hints {
			if f.pushing && strings.Contains(strings.ToLower(text), host) {
				msg += hint
			}
		}
	}
	return &api.Error{Code: code, Msg: f.redact.Line(msg), Err: f.err}
}

// noise is what BuildKit puts around the words that help.
var noise = regexp.MustCompile(`^rpc error: code = Unknown desc = |` +
	`failed to compute cache key: |failed to load cache key: |failed to calculate checksum of ref \S+: |` +
	`failed to resolve source metadata for \S+: |^failed to push \S+: | on \S+:53\b`)

func plain(text string) string { return redact.URLs(noise.ReplaceAllString(text, "")) }
