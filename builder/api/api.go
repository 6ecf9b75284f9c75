// Package api has what a client of the builder sees: the names in the request's tar, the
// headers, the records of an answer, and the codes of failures.
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
	TenantHeader    = "X-Build-Tenant"
)

// Media types of answers.
const (
	JSONType   = "application/json"
	NDJSONType = "application/x-ndjson"
	SSEType    = "text/event-stream"
	TextType   = "text/plain"
)

// Status says whether a build has ended, and how. There are exactly these three: faas-cli
// takes any other word for a success.
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

	// Context says where the build context is, if it is not in the tar.
	Context *ContextSource `json:"context,omitempty"`

	// Frontend is sent by old clients. It is ignored.
	Frontend string `json:"frontend,omitempty"`
}

// ContextSource is where a build context is. Exactly one of its fields is set.
type ContextSource struct {
	Digest string `json:"digest,omitempty"` // sha256:<hex> of what was sent to /contexts
	Git    string `json:"git,omitempty"`    // https://host/org/repo.git#ref:dir
}

// Record is one object of an answer: a line of a stream, or the whole answer if it does not
// stream. Image and ImageName are the same reference: some clients read one, some the other.
//
// ID and Request say what the record answers, so that a signed answer cannot be taken for
// the answer to another request.
type Record struct {
	Log       []string `json:"log"`
	Image     string   `json:"image,omitempty"`
	ImageName string   `json:"imageName,omitempty"`
	Status    Status   `json:"status"`
	Error     string   `json:"error,omitempty"`
	Code      Code     `json:"code,omitempty"`
	Duration  float64  `json:"duration"` // seconds since the request was accepted
	Digest    string   `json:"digest,omitempty"`
	Commit    string   `json:"commit,omitempty"` // that was built, of a git context
	Tags      []string `json:"tags,omitempty"`
	Platforms []string `json:"platforms,omitempty"`
	Warnings  []string `json:"warnings,omitempty"`
	ID        string   `json:"id,omitempty"`      // the build's: the request's X-Call-Id, or one made here
	Request   string   `json:"request,omitempty"` // hex SHA-256 of the request's body as sent, on the last record
}
