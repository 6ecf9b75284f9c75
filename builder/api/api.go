// Package api holds what a client of the builder sees: the names in the
// request's tar, the headers, the records of an answer, and the codes a failure
// can carry. It has no behaviour beyond looking a code up.
package api

// Names in the request's tar.
const (
	ConfigFile  = "com.openfaas.docker.config"
	SecretsFile = "com.openfaas.secrets"
	ContextDir  = "context"
)

// Headers of a request or an answer.
const (
	SignatureHeader = "X-Build-Signature"
	TimestampHeader = "X-Build-Timestamp"
	CallIDHeader    = "X-Call-Id"
	CallbackHeader  = "X-Callback-Url"
)

// Media types an answer can have.
const (
	JSONType   = "application/json"
	NDJSONType = "application/x-ndjson"
	SSEType    = "text/event-stream"
	TextType   = "text/plain"
)

// Status is where a build stands. faas-cli takes every word but "failed" for a
// success, so there are exactly these three.
type Status string

const (
	InProgress Status = "in_progress"
	Success    Status = "success"
	Failed     Status = "failed"
)

// BuildConfig is com.openfaas.docker.config as clients write it. Package
// buildconfig reads and checks it.
type BuildConfig struct {
	Image       string            `json:"image,omitempty"`
	BuildArgs   map[string]string `json:"buildArgs,omitempty"`
	Platforms   []string          `json:"platforms,omitempty"`
	SkipPush    bool              `json:"skipPush,omitempty"`
	Tags        []string          `json:"tags,omitempty"`
	Target      string            `json:"target,omitempty"`
	Dockerfile  string            `json:"dockerfile,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	NoCache     bool              `json:"noCache,omitempty"`
	Pull        bool              `json:"pull,omitempty"`

	// Context is where the build context lies that the tar does not hold.
	Context *ContextSource `json:"context,omitempty"`

	// Frontend is sent by old clients and ignored.
	Frontend string `json:"frontend,omitempty"`
}

// ContextSource is one of its fields.
type ContextSource struct {
	Digest string `json:"digest,omitempty"` // sha256:<hex> of what was sent to /contexts
	Git    string `json:"git,omitempty"`    // https://host/org/repo.git#ref:dir
}

// Record is one object of an answer: a line of a stream, or the whole of an
// answer that does not stream. Image and ImageName are the same reference:
// clients of both spellings exist.
//
// ID and Request say what is answered, so that a signed answer cannot be taken for
// another's.
type Record struct {
	Log       []string `json:"log"`
	Image     string   `json:"image,omitempty"`
	ImageName string   `json:"imageName,omitempty"`
	Status    Status   `json:"status"`
	Error     string   `json:"error,omitempty"`
	Code      Code     `json:"code,omitempty"`
	Duration  float64  `json:"duration"` // seconds since the request was accepted
	Digest    string   `json:"digest,omitempty"`
	Commit    string   `json:"commit,omitempty"` // of a git context: what was built
	Tags      []string `json:"tags,omitempty"`
	Platforms []string `json:"platforms,omitempty"`
	Warnings  []string `json:"warnings,omitempty"`
	ID        string   `json:"id,omitempty"`      // of the build: the X-Call-Id
	Request   string   `json:"request,omitempty"` // hex SHA-256 of the request's body as sent, on the last record
}
