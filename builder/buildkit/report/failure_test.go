package report

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/moby/buildkit/client"
	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	digest "github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"

	"handler/function/api"
	"handler/function/redact"
)

const dockerfile = "FROM busybox\nRUN echo verysecret\nRUN exit 3\n"

// fromDaemon is err as it arrives: encoded by the daemon, decoded by its
// client.
func fromDaemon(err error) error {
	return fmt.Errorf("failed to solve: %w", grpcerrors.FromGRPC(grpcerrors.ToGRPC(context.Background(), err)))
}

func atLine(err error, line int32) error {
	return errdefs.WithSource(err, &errdefs.Source{
		Info:   &pb.SourceInfo{Filename: "Dockerfile", Data: []byte(dockerfile)},
		Ranges: []*pb.Range{{Start: &pb.Position{Line: line}, End: &pb.Position{Line: line}}},
	})
}

func exit(code uint32) error {
	err := &gatewayapi.ExitError{ExitCode: code, Err: fmt.Errorf("process %q did not complete successfully: exit code: %d", "/bin/sh -c exit", code)}
	return atLine(errdefs.WrapVertex(err, digest.FromString("step")), 3)
}

func TestClassify(t *testing.T) {
	const head = "unexpected status from HEAD request to http://127.0.0.1:5000/v2/x/blobs/sha256:94: "
	const pull = "127.0.0.1:5000/x:1: failed to resolve source metadata for 127.0.0.1:5000/x:1: "
	const push = "failed to push 127.0.0.1:5000/x:1: "
	for _, tt := range []struct {
		name    string
		err     error
		pushing bool
		full    bool
		code    api.Code
		later   bool
		lines   string // of the push
		blind   bool   // nothing is known of its lines
		msg     string // all of it
	}{
		{name: "exit code", err: exit(3), code: api.BuildFailed, msg: `[2/2] RUN exit 3: exit code 3
Dockerfile:3
--------------------
   1 |     FROM busybox
   2 |     RUN echo ***
   3 | >>> RUN exit 3
   4 |     
--------------------`},
		{name: "what the step printed", err: atLine(errdefs.WrapVertex(&gatewayapi.ExitError{ExitCode: 2}, digest.FromString("talker")), 2), code: api.BuildFailed, msg: `exit code 2
cc: one
cc: two
Dockerfile:2
--------------------
   1 |     FROM busybox
   2 | >>> RUN echo ***
   3 |     RUN exit 3
   4 |     
--------------------`},
		{name: "long step", err: errdefs.WrapVertex(&gatewayapi.ExitError{ExitCode: 3}, digest.FromString("long")), code: api.BuildFailed,
			msg: "RUN " + strings.Repeat("é", (maxStep-4)/2) + " …: exit code 3"},
		{name: "memory", err: errdefs.WrapVertex(&gatewayapi.ExitError{ExitCode: 137}, digest.FromString("step")), code: api.BuildFailed,
			msg: "[2/2] RUN exit 3: exit code 137: killed, probably because memory ran out"},
		{name: "disk", err: errdefs.WrapVertex(&gatewayapi.ExitError{ExitCode: 2}, digest.FromString("filler")), code: api.BuildFailed,
			msg: "exit code 2: buildkitd's disk is full, or the step needs more than it has"},
		{name: "disk that is full after it", full: true, code: api.DaemonFull, msg: "buildkitd has no space left on its disk",
			err: errdefs.WrapVertex(&gatewayapi.ExitError{ExitCode: 2}, digest.FromString("filler"))},
		{name: "a step that fills its disk", code: api.BuildFailed, msg: "exit code 1",
			err: &gatewayapi.ExitError{ExitCode: 1, Err: errors.New("dd: no space left on device")}},
		{name: "a step that talks of registries", code: api.BuildFailed, msg: "exit code 1", pushing: true,
			err: &gatewayapi.ExitError{ExitCode: 1, Err: errors.New(push + head + "401 Unauthorized")}},
		{name: "no Dockerfile", err: errors.New("failed to read dockerfile: open Dockerfile: no such file or directory"),
			code: api.BuildFailed, msg: "failed to read dockerfile: open Dockerfile: no such file or directory"},
		{name: "parse error", err: atLine(errors.New("dockerfile parse error on line 2: unknown instruction: RUNN"), 2), code: api.BuildFailed,
			msg: `dockerfile parse error on line 2: unknown instruction: RUNN
Dockerfile:2
--------------------
   1 |     FROM busybox
   2 | >>> RUN echo ***
   3 |     RUN exit 3
   4 |     
--------------------`},
		{name: "nothing to copy", code: api.BuildFailed, msg: `[2/2] RUN exit 3: "/nope": not found`,
			err: errdefs.WrapVertex(errors.New(`failed to compute cache key: failed to calculate checksum of ref sxv0u::mdulo: "/nope": not found`), digest.FromString("step"))},
		{name: "no target", err: errors.New(`target stage "zz" could not be found`), code: api.BuildFailed, msg: `target stage "zz" could not be found`},
		{name: "ADD that is refused", code: api.BuildFailed, msg: `Get "http://127.0.0.1:1/x": dial tcp 127.0.0.1:1: connect: connection refused`,
			err: errors.New(`failed to load cache key: Get "http://127.0.0.1:1/x": dial tcp 127.0.0.1:1: connect: connection refused`)},
		{name: "a secret in the text", err: errors.New("it is verysecret"), code: api.BuildFailed, msg: "it is ***"},

		{name: "pull 401", err: errors.New(pull + head + "401 Unauthorized"), code: api.RegistryDenied,
			msg: "pulling 127.0.0.1:5000/x:1: " + head + "401 Unauthorized (no credentials are configured for 127.0.0.1:5000)"},
		{name: "pull not found", err: errors.New(pull + "127.0.0.1:5000/x:1: not found"), code: api.RegistryDenied,
			msg: "pulling 127.0.0.1:5000/x:1: 127.0.0.1:5000/x:1: not found (no credentials are configured for 127.0.0.1:5000)"},
		{name: "pull of what is private", err: errors.New("acme/x: failed to resolve source metadata for docker.io/acme/x:latest: pull access denied, repository does not exist or may require authorization: server message: insufficient_scope: authorization failed"),
			code: api.RegistryDenied, msg: "pulling acme/x: pull access denied, repository does not exist or may require authorization: server message: insufficient_scope: authorization failed"},
		{name: "pull 429", err: errors.New(pull + head + "429 Too Many Requests"), code: api.RegistryFailed, msg: "pulling 127.0.0.1:5000/x:1: " + head + "429 Too Many Requests"},
		{name: "pull 500", err: errors.New(pull + head + "500 Internal Server Error"), code: api.RegistryFailed, msg: "pulling 127.0.0.1:5000/x:1: " + head + "500 Internal Server Error"},
		{name: "layer 503", err: errors.New("failed to copy: httpReadSeeker: failed open: unexpected status code https://r/v2/x/blobs/sha256:1: 503 Service Unavailable"),
			code: api.RegistryFailed, msg: "pulling failed to copy: httpReadSeeker: failed open: unexpected status code https://r/v2/x/blobs/sha256:1: 503 Service Unavailable"},
		{name: "pull refused", err: errors.New(pull + `failed to do request: Head "http://127.0.0.1:5000/v2/x/manifests/1": dial tcp 127.0.0.1:5000: connect: connection refused`),
			code: api.RegistryFailed, msg: `pulling 127.0.0.1:5000/x:1: failed to do request: Head "http://127.0.0.1:5000/v2/x/manifests/1": dial tcp 127.0.0.1:5000: connect: connection refused`},
		{name: "pull from nowhere", err: errors.New(`r/x:1: failed to resolve source metadata for r/x:1: failed to do request: Head "https://r/v2/x/manifests/1": dial tcp: lookup r on 10.0.0.10:53: no such host`),
			code: api.RegistryFailed, msg: `pulling r/x:1: failed to do request: Head "https://r/v2/x/manifests/1": dial tcp: lookup r: no such host`},

		{name: "push denied", err: errors.New(push + "denied: said the registry"), pushing: true, code: api.RegistryDenied,
			msg: "pushing 127.0.0.1:5000/x:1: denied: said the registry (no credentials are configured for 127.0.0.1:5000)"},
		{name: "push to no repository", err: errors.New(push + "unknown: The repository with name 'x' does not exist in the registry with id '123456789012'"), pushing: true, code: api.RegistryDenied,
			msg: "pushing 127.0.0.1:5000/x:1: unknown: The repository with name 'x' does not exist in the registry with id '123456789012' (no credentials are configured for 127.0.0.1:5000)"},
		{name: "push of a tag that stays", err: errors.New(push + "unknown: tag is immutable"), pushing: true, code: api.RegistryDenied,
			msg: "pushing 127.0.0.1:5000/x:1: unknown: tag is immutable (no credentials are configured for 127.0.0.1:5000)"},
		{name: "push that is not supported", err: errors.New(push + "unsupported: read only"), pushing: true, code: api.RegistryDenied,
			msg: "pushing 127.0.0.1:5000/x:1: unsupported: read only (no credentials are configured for 127.0.0.1:5000)"},
		{name: "push to a registry in trouble", err: errors.New(push + "unknown: unknown error"), pushing: true, code: api.RegistryFailed,
			lines: "error: unexpected status from PUT request to http://127.0.0.1:5000/v2/x/manifests/1: 500 Internal Server Error\nunknown: unknown error\nretrying in 1s\n",
			msg:   "pushing 127.0.0.1:5000/x:1: unknown: unknown error"},
		{name: "push to a registry in several troubles", err: errors.New(push + "errors:\nunknown: one - why\nunknown: two\n"), pushing: true, code: api.RegistryFailed,
			lines: "error: unexpected status from PUT request to http://r/v2/x: 503 Service Unavailable\nerrors:\nunknown: one\nunknown: two\n\nretrying in 1s\n",
			msg:   "pushing 127.0.0.1:5000/x:1: errors: unknown: one - why unknown: two "},
		{name: "push to a registry whose trouble has passed", err: errors.New(push + "unknown: blob unknown to registry"), pushing: true, code: api.RegistryDenied,
			lines: "error: unexpected status from POST request to http://r/v2/x: 500 Internal Server Error\nunknown: unknown error\nretrying in 1s\nerror: EOF\nretrying in 2s\n",
			msg:   "pushing 127.0.0.1:5000/x:1: unknown: blob unknown to registry (no credentials are configured for 127.0.0.1:5000)"},
		{name: "push denied after several troubles", err: errors.New(push + "denied: no"), pushing: true, code: api.RegistryDenied,
			lines: "error: unexpected status from PUT request to http://r/v2/x: 503 Service Unavailable\nerrors:\nunknown: one\nunknown: two\n\nretrying in 1s\n",
			msg:   "pushing 127.0.0.1:5000/x:1: denied: no (no credentials are configured for 127.0.0.1:5000)"},
		{name: "push refused in its own words", err: errors.New(push + "unknown: whatever"), pushing: true, code: api.RegistryDenied,
			msg: "pushing 127.0.0.1:5000/x:1: unknown: whatever (no credentials are configured for 127.0.0.1:5000)"},
		{name: "push refused in several words", err: errors.New(push + "errors:\nunknown: a\nunknown: b\n"), pushing: true, code: api.RegistryDenied,
			msg: "pushing 127.0.0.1:5000/x:1: errors: unknown: a unknown: b  (no credentials are configured for 127.0.0.1:5000)"},
		{name: "push refused in one word", err: errors.New(push + "unavailable"), pushing: true, code: api.RegistryDenied,
			msg: "pushing 127.0.0.1:5000/x:1: unavailable (no credentials are configured for 127.0.0.1:5000)"},
		{name: "push refused, without the push's lines", err: errors.New(push + "unknown: whatever"), pushing: true, blind: true, code: api.RegistryFailed,
			msg: "pushing 127.0.0.1:5000/x:1: unknown: whatever"},
		{name: "push 429 in other words", err: errors.New(push + "unknown: rate limit exceeded"), pushing: true, code: api.RegistryFailed, later: true,
			msg: "pushing 127.0.0.1:5000/x:1: unknown: rate limit exceeded"},
		{name: "push 413 of a proxy", err: errors.New(push + "unexpected status from PUT request to http://127.0.0.1:5000/v2/x: 413 Request Entity Too Large: <html>no</html>"), pushing: true, code: api.RegistryDenied,
			msg: "pushing 127.0.0.1:5000/x:1: unexpected status from PUT request to http://127.0.0.1:5000/v2/x: 413 Request Entity Too Large: <html>no</html> (no credentials are configured for 127.0.0.1:5000)"},
		{name: "push 400", err: errors.New(push + head + "400 Bad Request"), pushing: true, code: api.RegistryDenied,
			msg: "pushing 127.0.0.1:5000/x:1: " + head + "400 Bad Request (no credentials are configured for 127.0.0.1:5000)"},
		{name: "push 429 with a body", err: errors.New(push + "toomanyrequests: too many requests"), pushing: true, code: api.RegistryFailed, later: true,
			msg: "pushing 127.0.0.1:5000/x:1: toomanyrequests: too many requests"},
		{name: "pull 429 with a body", err: errors.New(pull + "toomanyrequests: too many requests"), code: api.RegistryFailed,
			msg: "pulling 127.0.0.1:5000/x:1: toomanyrequests: too many requests"},
		{name: "push 401 with a body", err: errors.New(push + "unauthorized: authentication required"), pushing: true, code: api.RegistryDenied,
			msg: "pushing 127.0.0.1:5000/x:1: unauthorized: authentication required (no credentials are configured for 127.0.0.1:5000)"},
		{name: "URLs with a query", err: errors.New(push + `failed to do request: Put "http://127.0.0.1:5000/v2/x?_state=secret&digest=1": read tcp: EOF, at https://s3/x?sig=a%2Fb: 403 Forbidden`), pushing: true, code: api.RegistryFailed,
			msg: `pushing 127.0.0.1:5000/x:1: failed to do request: Put "http://127.0.0.1:5000/v2/x": read tcp: EOF, at https://s3/x: 403 Forbidden`},
		{name: "push 429", err: errors.New(push + head + "429 Too Many Requests"), pushing: true, code: api.RegistryFailed, later: true,
			msg: "pushing 127.0.0.1:5000/x:1: " + head + "429 Too Many Requests"},
		{name: "push 502", err: errors.New(push + head + "502 Bad Gateway"), pushing: true, code: api.RegistryFailed,
			msg: "pushing 127.0.0.1:5000/x:1: " + head + "502 Bad Gateway"},
		{name: "push cut", err: errors.New(push + `failed to do request: Put "http://127.0.0.1:5000/v2/x": EOF`), pushing: true, code: api.RegistryFailed,
			msg: `pushing 127.0.0.1:5000/x:1: failed to do request: Put "http://127.0.0.1:5000/v2/x": EOF`},
		{name: "a registry's full disk", err: errors.New(push + head + "500 Internal Server Error: no space left on device"), pushing: true, code: api.RegistryFailed,
			msg: "pushing 127.0.0.1:5000/x:1: " + head + "500 Internal Server Error: no space left on device"},

		{name: "token refused", err: errors.New(push + "PermissionDenied: registry r: it says no"), pushing: true, code: api.RegistryDenied, msg: "registry r: it says no"},
		{name: "token service away", err: errors.New(pull + "registry r: it is away"), code: api.RegistryFailed, msg: "registry r: it is away"},

		{name: "disk full", err: errors.New("write /var/lib/buildkit/x: no space left on device"), code: api.DaemonFull, msg: "buildkitd has no space left on its disk"},
		{name: "disk full by code", err: grpcerrors.WrapCode(errors.New("quota"), codes.ResourceExhausted), full: true, code: api.DaemonFull, msg: "buildkitd has no space left on its disk"},
		{name: "too large a message", err: grpcerrors.WrapCode(errors.New("trying to send message larger than max"), codes.ResourceExhausted), code: api.BuildFailed, msg: "ResourceExhausted: trying to send message larger than max"},

		{name: "a client's own words of a disk", err: errors.New(`target stage "a \"no space left on device" could not be found`), code: api.BuildFailed,
			msg: `target stage "a \"no space left on device" could not be found`},
		{name: "a client's own words of a registry", err: errors.New(`target stage "failed to do request: connection refused" could not be found`), code: api.BuildFailed,
			msg: `target stage "failed to do request: connection refused" could not be found`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			mask := redact.New(map[string][]byte{"s": []byte("verysecret")})
			f := &Failure{
				Err:     fromDaemon(tt.err),
				Mask:    mask,
				Pushing: tt.pushing,
				Full:    tt.full,
				Refused: []*api.Error{
					{Code: api.RegistryFailed, Msg: "registry r: it is away"},
					{Code: api.RegistryDenied, Msg: "registry r: it says no"},
				},
				Anonymous: []string{"127.0.0.1:5000"},
			}
			if !tt.blind {
				f.Progress = failedProgress(mask, tt.lines)
			}
			e, later := f.Classify()
			if e.Code != tt.code {
				t.Errorf("error %#v, want code %s", e, tt.code)
			}
			if e.Msg != tt.msg {
				t.Errorf("message\n%s\nwant\n%s", e.Msg, tt.msg)
			}
			if e.Err == nil {
				t.Error("no cause for the log")
			}
			if later != tt.later {
				t.Errorf("to be tried later: %v", later)
			}
		})
	}
}

// failedProgress has the vertices that TestClassify names. pushed is what the push printed.
func failedProgress(mask *redact.Redactor, pushed string) *Progress {
	p := NewProgress(func(...string) {}, mask, &watch{})
	export, talker, filler := digest.FromString("export"), digest.FromString("talker"), digest.FromString("filler")
	step, long, other := digest.FromString("step"), digest.FromString("long"), digest.FromString("other step")
	p.handle(&client.SolveStatus{Vertexes: []*client.Vertex{
		{Digest: export, Name: "exporting to image"},
		{Digest: other, Name: "[1/1] RUN x"},
		{Digest: step, Name: "[2/2] RUN exit 3"},
		{Digest: long, Name: "RUN " + strings.Repeat("é", maxStep)},
	}})
	p.handle(&client.SolveStatus{Logs: []*client.VertexLog{
		{Vertex: export, Data: []byte(pushed)},
		{Vertex: talker, Data: []byte("cc: one\ncc: two\n")},
		// A step can print whatever it likes.
		{Vertex: other, Data: []byte("error: unexpected status from PUT request to http://r: 500 Internal Server Error\nunknown: whatever\nunavailable\n")},
	}})
	p.vertices[filler] = &vertex{noSpace: true}
	return p
}

func TestConnectionLost(t *testing.T) {
	ended, open := make(chan struct{}), make(chan struct{})
	close(ended)
	unavailable := grpcerrors.WrapCode(errors.New("error reading from server: EOF"), codes.Unavailable)
	for _, tt := range []struct {
		name string
		err  error
		end  <-chan struct{}
		want bool
	}{
		{"transport ended", unavailable, ended, true},
		{"what the daemon cannot reach", unavailable, open, false},
		{"a build that failed", fromDaemon(exit(1)), open, false},
		{"a build that failed as another's connection went", fromDaemon(exit(1)), ended, false},
		{"canceled with the transport", context.Canceled, ended, true},
		{"session", errors.New("failed to solve: no active session for dnsxcb05q18jlgbbt3wo3nxeb: context deadline exceeded"), open, true},
		{"session that does not answer", errors.New("failed to solve: session healthcheck failed fatally: rpc error"), open, true},
		{"a stage of that name", errors.New(`failed to solve: target stage "no active session for dnsxcb05q18jlgbbt3wo3nxeb: x" could not be found`), open, false},
		{"a step that says so", fromDaemon(&gatewayapi.ExitError{ExitCode: 1, Err: errors.New("session healthcheck failed fatally: x")}), ended, false},
		{"resource exhausted", grpcerrors.WrapCode(errors.New("disk"), codes.ResourceExhausted), ended, false},
	} {
		if got := ConnectionLost(tt.err, tt.end); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

// TestDenied wants the policy's words, the Dockerfile's line where there is one, and no blame on
// the registry that the source names.
func TestDenied(t *testing.T) {
	const text = `127.0.0.1:5000/x:1: failed to resolve source metadata for 127.0.0.1:5000/x:1: could not resolve image due to policy: source "docker-image://127.0.0.1:5000/x:1" not allowed by policy: action DENY`
	const line = "\nDockerfile:1\n--------------------\n   1 | >>> FROM busybox\n   2 |     RUN echo ***\n   3 |     RUN exit 3\n--------------------"
	at := func(n int32) *errdefs.Source {
		return &errdefs.Source{
			Info:   &pb.SourceInfo{Filename: "Dockerfile", Data: []byte(dockerfile)},
			Ranges: []*pb.Range{{Start: &pb.Position{Line: n}, End: &pb.Position{Line: n}}},
		}
	}
	forbidden := &api.Error{Code: api.FromForbidden, Msg: `image "x" may not be pulled`}
	down := &api.Error{Code: api.RegistryFailed, Msg: "registry x: it cannot be reached", Err: errors.New("the cause")}
	for _, tt := range []struct {
		name string
		f    Failure
		code api.Code
		msg  string
	}{
		{"the daemon knows the line", Failure{Err: fromDaemon(atLine(errors.New(text), 1)), Denied: forbidden, DeniedAt: at(3)}, api.FromForbidden, forbidden.Msg + line},
		{"the function has found it", Failure{Err: fromDaemon(errors.New(text)), Denied: forbidden, DeniedAt: at(1)}, api.FromForbidden, forbidden.Msg + line},
		{"the daemon names no line", Failure{Err: fromDaemon(errdefs.WithSource(errors.New(text), &errdefs.Source{Info: at(1).Info})), Denied: forbidden, DeniedAt: at(1)}, api.FromForbidden, forbidden.Msg + line},
		{"nobody knows it", Failure{Err: fromDaemon(errors.New(text)), Denied: forbidden}, api.FromForbidden, forbidden.Msg},
		{"the registry is down", Failure{Err: fromDaemon(errors.New(text)), Denied: down}, api.RegistryFailed, down.Msg},
		{"the message is lost", Failure{Err: fromDaemon(errors.New(text))}, api.FromForbidden, "a source may not be read by this build"},
		{"by a static policy", Failure{Err: fromDaemon(errors.New(`source "docker-image://x" denied by policy: source denied by policy`))}, api.FromForbidden, "a source may not be read by this build"},
		{"a push that the registry denies", Failure{Err: fromDaemon(errors.New("failed to push r.example/x:1: denied: push of unsigned artifact not allowed by policy")), Pushing: true}, api.RegistryDenied, "pushing r.example/x:1: denied: push of unsigned artifact not allowed by policy"},
		{"a step that says so", Failure{Err: fromDaemon(errors.New(`process "echo not allowed by policy" failed`))}, api.BuildFailed, `process "echo not allowed by policy" failed`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.f.Mask = redact.New(map[string][]byte{"s": []byte("verysecret")})
			e, later := tt.f.Classify()
			if e.Code != tt.code || e.Msg != tt.msg || later {
				t.Errorf("%s: %s\nwant %s: %s", e.Code, e.Msg, tt.code, tt.msg)
			}
			if !errors.Is(e, tt.f.Err) || tt.f.Denied == down && !strings.Contains(e.Error(), "the cause") {
				t.Errorf("the log gets %v", e)
			}
		})
	}
}

// TestPolicyNoise wants an error of a source that was resolved for a policy without the policy's
// words.
func TestPolicyNoise(t *testing.T) {
	f := Failure{Mask: redact.New(nil), Err: fromDaemon(errors.New("failed to load LLB: error evaluating the source policy: error resolving source metadata from policy request: invalid response status 401"))}
	if e, _ := f.Classify(); e.Code != api.BuildFailed || e.Msg != "failed to load LLB: invalid response status 401" {
		t.Errorf("%s: %s", e.Code, e.Msg)
	}
}
