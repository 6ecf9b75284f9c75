package api

import (
	"errors"
	"net/http"
)

// Code is a stable word for why a build failed, for programs to branch on.
type Code string

const (
	BadTar             Code = "bad_tar"
	BadConfig          Code = "bad_config"
	BadSecrets         Code = "bad_secrets"
	BadEnvelope        Code = "bad_envelope"
	BadContext         Code = "bad_context"
	BadBody            Code = "bad_body"
	BadQuery           Code = "bad_query"
	SlowUpload         Code = "slow_upload"
	Unauthorized       Code = "unauthorized"
	ImageForbidden     Code = "image_forbidden"
	ContextForbidden   Code = "context_forbidden"
	FromForbidden      Code = "from_forbidden"
	PlatformForbidden  Code = "platform_forbidden"
	Suspended          Code = "suspended"
	NotFound           Code = "not_found"
	MethodNotAllowed   Code = "method_not_allowed"
	TooLarge           Code = "too_large"
	BuildFailed        Code = "build_failed"
	RegistryDenied     Code = "registry_denied"
	Deadline           Code = "deadline"
	Busy               Code = "busy"
	TenantBusy         Code = "tenant_busy"
	QueueTimeout       Code = "queue_timeout"
	NoDaemon           Code = "no_daemon"
	DaemonLost         Code = "daemon_lost"
	Stalled            Code = "stalled"
	DaemonFull         Code = "daemon_full"
	RegistryFailed     Code = "registry_failed"
	RegistryTimeout    Code = "registry_timeout"
	ContextFailed      Code = "context_failed"
	NoSpace            Code = "no_space"
	NotReady           Code = "not_ready"
	ShuttingDown       Code = "shutting_down"
	Canceled           Code = "canceled"
	OwnerUnreachable   Code = "owner_unreachable"
	RecordsUnreachable Code = "records_unreachable"
	Lost               Code = "lost"
	Internal           Code = "internal"
)

// statuses has the HTTP status of each code. Queue workers retry some statuses, and that
// decides: a failure that would happen again never has 429 or 5xx, and a failure that may
// pass always has. No code has 408, 502 or 504, which are retried up to a hundred times.
var statuses = map[Code]int{
	BadTar:            http.StatusBadRequest,
	BadConfig:         http.StatusBadRequest,
	BadSecrets:        http.StatusBadRequest,
	BadEnvelope:       http.StatusBadRequest,
	BadContext:        http.StatusBadRequest,
	BadBody:           http.StatusBadRequest,
	BadQuery:          http.StatusBadRequest,
	SlowUpload:        http.StatusBadRequest,
	Unauthorized:      http.StatusUnauthorized,
	ImageForbidden:    http.StatusForbidden,
	ContextForbidden:  http.StatusForbidden,
	FromForbidden:     http.StatusForbidden,
	PlatformForbidden: http.StatusForbidden,
	Suspended:         http.StatusForbidden,
	NotFound:          http.StatusNotFound,
	MethodNotAllowed:  http.StatusMethodNotAllowed,
	TooLarge:          http.StatusRequestEntityTooLarge,
	BuildFailed:       http.StatusUnprocessableEntity,
	RegistryDenied:    http.StatusUnprocessableEntity,
	Deadline:          http.StatusUnprocessableEntity,
	// Somebody has stopped the build, and a queue must not begin it again. Or its client has gone
	// away, and nobody reads the status.
	Canceled:           http.StatusConflict,
	Busy:               http.StatusTooManyRequests,
	TenantBusy:         http.StatusTooManyRequests,
	QueueTimeout:       http.StatusServiceUnavailable,
	NoDaemon:           http.StatusServiceUnavailable,
	DaemonLost:         http.StatusServiceUnavailable,
	Stalled:            http.StatusServiceUnavailable,
	DaemonFull:         http.StatusServiceUnavailable,
	RegistryFailed:     http.StatusServiceUnavailable,
	RegistryTimeout:    http.StatusServiceUnavailable,
	ContextFailed:      http.StatusServiceUnavailable,
	NoSpace:            http.StatusServiceUnavailable,
	NotReady:           http.StatusServiceUnavailable,
	ShuttingDown:       http.StatusServiceUnavailable,
	Lost:               http.StatusServiceUnavailable,
	OwnerUnreachable:   http.StatusServiceUnavailable,
	RecordsUnreachable: http.StatusServiceUnavailable,
	Internal:           http.StatusInternalServerError,
}

// waiting has the statuses that differ for a caller that waits for a slot, such as a queue: the
// worker of the CE queue takes a 429 for the build's answer, and does not deliver it again.
var waiting = map[Code]int{
	TenantBusy: http.StatusServiceUnavailable,
}

// HTTPStatusFor returns the status of an answer that fails with c and is no stream. waits says
// that its caller waits for a slot.
func (c Code) HTTPStatusFor(waits bool) int {
	if s, ok := waiting[c]; ok && waits {
		return s
	}
	return c.HTTPStatus()
}

// HTTPStatus returns the status for a caller that does not wait. A code that is not in the
// table is a defect and gets 500.
func (c Code) HTTPStatus() int {
	if s, ok := statuses[c]; ok {
		return s
	}
	return http.StatusInternalServerError
}

// Error is a failure that a client may be told of. Msg is for the client. Err is the cause,
// for the operator's log alone; it may be nil.
type Error struct {
	Code Code
	Msg  string
	Err  error
}

func (e *Error) Error() string {
	if e.Err != nil {
		return e.Msg + ": " + e.Err.Error()
	}
	return e.Msg
}

func (e *Error) Unwrap() error { return e.Err }

// AsError returns the Error in err's chain. An err without one is a defect of the builder.
// Its text may have in it what no client should see, so that it becomes the cause of an
// Error of code internal.
func AsError(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return &Error{Code: Internal, Msg: "internal error; the builder's log has the cause", Err: err}
}
