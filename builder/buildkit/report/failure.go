package report

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"

	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"

	"handler/function/api"
	"handler/function/redact"
)

// Failure is the error of a solve, and all that is known beside it.
type Failure struct {
	Err      error
	Progress *Progress // of the solve; nil where only its record in the history is known
	Mask     *redact.Redactor
	Full     bool // the daemon's disk is full, and the error or a step that was not started said so
	Pushing  bool // the push had begun

	// Denied is why the build's policy denied a source, if err is about that. DeniedAt is
	// where the Dockerfile names the source, for a daemon that does not say it; nil is
	// unknown.
	Denied   *api.Error
	DeniedAt *errdefs.Source

	// Refused are the errors that the daemon was given when it asked for credentials, the
	// last one first.
	Refused   []*api.Error
	Anonymous []string          // hosts that were asked without credentials
	Hints     map[string]string // by host, advice for a push that was denied
}

// Classify returns the error for the client: registry_denied, registry_failed, daemon_full,
// build_failed, from_forbidden, or the code of the error in Denied, or in Refused, that the
// daemon passes on. later says that the registry wants the push to be repeated after a while.
func (f *Failure) Classify() (e *api.Error, later bool) {
	text := strings.TrimPrefix(f.Err.Error(), "failed to solve: ")
	said := Unquoted(text)
	// Everything after this would blame the registry that the source names.
	if f.Denied != nil {
		return f.denied(f.Denied.Code, f.Denied.Msg), false
	}
	if byPolicy.MatchString(said) {
		return f.denied(api.FromForbidden, "a source may not be read by this build"), false
	}
	if exit, ok := errors.AsType[*gatewayapi.ExitError](f.Err); ok {
		if f.Full {
			return f.daemonFull(), false
		}
		return f.buildFailed(exitText(exit.ExitCode, f.ranOutOfDisk())), false
	}
	for _, e := range f.Refused {
		if strings.Contains(text, e.Msg) {
			return &api.Error{Code: e.Code, Msg: f.Mask.Line(e.Msg), Err: errors.Join(e.Err, f.Err)}, false
		}
	}
	// The status comes before the disk: a registry may say that its own disk is full.
	if e, later := f.registryStatus(said, text); e != nil {
		return e, later
	}
	if f.Full || noSpace.MatchString(said) {
		return f.daemonFull(), false
	}
	if e := f.registryTrouble(said, text); e != nil {
		return e, false
	}
	return f.buildFailed(withoutNoise(text)), false
}

// byPolicy is how BuildKit reports a denial whose message it has lost. A registry can speak of a
// policy too, when it refuses a push.
var byPolicy = regexp.MustCompile(`source "[^"]*" (?:denied|not allowed) by policy`)

// denied is the error of a source that may not be read, with the Dockerfile's lines that name
// it, where these are known.
func (f *Failure) denied(code api.Code, msg string) *api.Error {
	// For the mount of a RUN step the daemon names the Dockerfile, and no line of it.
	where := linesOf(errdefs.Sources(f.Err)...)
	if where == "" && f.DeniedAt != nil {
		where = linesOf(f.DeniedAt)
	}
	e := &api.Error{Code: code, Msg: strings.TrimRight(f.Mask.Text(msg+where), "\n"), Err: f.Err}
	if f.Denied != nil {
		e.Err = errors.Join(f.Denied.Err, f.Err)
	}
	return e
}

// linesOf shows the lines of a Dockerfile that sources name, or nothing if they name none.
func linesOf(list ...*errdefs.Source) string {
	var b strings.Builder
	for _, s := range list {
		var lines strings.Builder
		if s.Print(&lines); lines.Len() > 0 {
			b.WriteString("\n" + lines.String())
		}
	}
	return b.String()
}

func (f *Failure) daemonFull() *api.Error {
	return &api.Error{Code: api.DaemonFull, Msg: "buildkitd has no space left on its disk", Err: f.Err}
}

func exitText(code uint32, diskFull bool) string {
	text := fmt.Sprintf("exit code %d", code)
	switch {
	case code == 137:
		text += ": killed, probably because memory ran out"
	case diskFull:
		text += ": buildkitd's disk is full, or the step needs more than it has"
	}
	return text
}

func (f *Failure) ranOutOfDisk() bool {
	v, ok := errors.AsType[*errdefs.VertexError](f.Err)
	return ok && f.Progress.noSpace(v.Digest)
}

// maxStep is how much of a step's name an error quotes, in bytes. A RUN line can be longer
// than the whole error may be, and the reason comes after it.
const maxStep = 1 << 10

// buildFailed names the step that failed, and says why: what, the last lines that the step
// printed, and the Dockerfile's lines around it.
func (f *Failure) buildFailed(what string) *api.Error {
	var b strings.Builder
	v, ok := errors.AsType[*errdefs.VertexError](f.Err)
	if ok {
		if step := f.Progress.name(v.Digest); step != "" && !strings.Contains(what, step) {
			if len(step) > maxStep {
				step = strings.ToValidUTF8(step[:maxStep], "") + " …"
			}
			b.WriteString(step + ": ")
		}
	}
	b.WriteString(what)
	if ok {
		if text := f.Progress.lastPrinted(v.Digest); text != "" {
			b.WriteString("\n" + text)
		}
	}
	for _, s := range errdefs.Sources(f.Err) {
		b.WriteString("\n")
		s.Print(&b)
	}
	return &api.Error{Code: api.BuildFailed, Msg: strings.TrimRight(f.Mask.Text(b.String()), "\n"), Err: f.Err}
}

// Forms of containerd's resolver and of BuildKit's push and pull.
var (
	failedPush      = regexp.MustCompile(`failed to push (\S+): `)
	answeredInBody  = regexp.MustCompile(`^(?:rpc error: code = Unknown desc = )?failed to push \S+: (?:errors:\s|(?:unknown|unsupported|unauthorized|denied|unavailable)(?:: |$))`) // with a body of the specification's form, in place of its status
	registryContext = regexp.MustCompile(`failed to push \S+: |failed to resolve source metadata for \S+: |failed to (?:do request|authorize|fetch \w+ token|resolve reference)\b|httpReadSeeker`)
	tooManyRequests = regexp.MustCompile(`(?::\s|\n)toomanyrequests\b|(?i:too many requests|rate limit)`) // instead of a status, where the answer has a body
	denied          = regexp.MustCompile(`insufficient_scope|\bunauthorized\b|\bdenied\b|authorization failed|no basic auth credentials|failed to find supported auth scheme|name unknown|: not found$|missing username or secret|invalid authorization`)
	rejected        = regexp.MustCompile(`: unsupported: |: unknown: .*(?:does not exist|not known|not found|immutable|invalid|not allowed)`) // a 4xx of which BuildKit passes on the body alone
	unreachable     = regexp.MustCompile(`connection refused|no such host|server misbehaving|i/o timeout|context deadline exceeded|TLS handshake timeout|connection reset by peer|broken pipe|network is unreachable|no route to host|tls: |x509: |server gave HTTP response|: EOF\b`)
)

// IsPush says whether err is about a push.
func IsPush(err error) bool { return failedPush.MatchString(Unquoted(err.Error())) }

func (f *Failure) aboutRegistry(said string) bool {
	return f.Pushing || registryContext.MatchString(said)
}

// registryStatus is the error of a registry that answered with a status, or nil. said is text
// without its quotes.
func (f *Failure) registryStatus(said, text string) (e *api.Error, later bool) {
	status := statusIn(said)
	if status == 0 && tooManyRequests.MatchString(said) {
		status = http.StatusTooManyRequests
	}
	switch {
	case !f.aboutRegistry(said):
		return nil, false
	case status == http.StatusTooManyRequests:
		return f.registryError(api.RegistryFailed, text), f.Pushing
	case status >= 500:
		return f.registryError(api.RegistryFailed, text), false
	case status >= 400:
		return f.registryError(api.RegistryDenied, text), false
	}
	return nil, false
}

// registryTrouble is the error of a registry that refused in other words, or that could not
// be asked, or nil.
func (f *Failure) registryTrouble(said, text string) *api.Error {
	switch {
	case !f.aboutRegistry(said):
		return nil
	case f.Pushing && f.Progress != nil && answeredInBody.MatchString(said):
		// BuildKit repeats a push after a 5xx, and prints a line about it. Without such
		// a line the answer was a 4xx.
		if f.Progress.answered5xx(text) {
			return f.registryError(api.RegistryFailed, text)
		}
		return f.registryError(api.RegistryDenied, text)
	case denied.MatchString(said), rejected.MatchString(said):
		return f.registryError(api.RegistryDenied, text)
	case f.Pushing, unreachable.MatchString(said):
		return f.registryError(api.RegistryFailed, text)
	}
	return nil
}

func (f *Failure) registryError(code api.Code, text string) *api.Error {
	// The text about a pull begins with the image's name.
	what := "pulling "
	if m := failedPush.FindStringSubmatch(text); m != nil {
		what = "pushing " + m[1] + ": "
	} else if f.Pushing {
		what = "pushing: "
	}
	msg := what + withoutNoise(text)
	if code == api.RegistryDenied {
		msg += f.advice(text)
	}
	return &api.Error{Code: code, Msg: f.Mask.Line(msg), Err: f.Err}
}

// advice is what may help against a registry's refusal, or empty.
func (f *Failure) advice(text string) string {
	var advice string
	for _, host := range f.Anonymous {
		if strings.Contains(text, host) {
			advice = fmt.Sprintf(" (no credentials are configured for %s)", host)
			break
		}
	}
	for _, host := range slices.Sorted(maps.Keys(f.Hints)) {
		if f.Pushing && strings.Contains(strings.ToLower(text), host) {
			advice += f.Hints[host]
		}
	}
	return advice
}

// noise is what BuildKit puts around the words that help. The last is the address of the name
// server, where a name could not be looked up.
var noise = regexp.MustCompile(`^rpc error: code = Unknown desc = |` +
	`failed to compute cache key: |failed to load cache key: |failed to calculate checksum of ref \S+: |` +
	`could not resolve image due to policy: |error evaluating the source policy: |error resolving source metadata from policy request: |` +
	`failed to resolve source metadata for \S+: |^failed to push \S+: | on \S+:53\b`)

func withoutNoise(text string) string { return redact.URLs(noise.ReplaceAllString(text, "")) }
