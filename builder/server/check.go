package server

import (
	"context"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"

	"handler/function/api"
	"handler/function/buildconfig"
	"handler/function/payload"
	"handler/function/redact"
	"handler/function/sealed"
)

// spec is what a client asks for, after every check.
type spec struct {
	config   *buildconfig.Config
	context  *payload.Context // nil if the context was sent ahead or is in git
	warnings []string
	secrets  map[string][]byte // unsealed, by id
	git      gitLogin
}

// check reads the spec of a job. Beside an error it returns the warnings so far.
func (s *Server) check(j *job) (sp spec, err error) {
	p, err := j.body.Payload()
	if err != nil {
		return sp, err
	}
	sp.context, sp.warnings = p.Context, p.Warnings
	if sp.config, err = buildconfig.Parse(p.Config); err != nil {
		return sp, err
	}
	j.setImage(sp.config.Image)
	if err := oneContext(sp.config, p); err != nil {
		return sp, err
	}
	sp.warnings = slices.Concat(p.Warnings, sp.config.Warnings)
	if err := s.allow(sp.config); err != nil {
		return sp, err
	}
	if sp.secrets, err = s.unseal(j.ctx, p.Secrets); err != nil {
		return sp, err
	}
	sp.git, err = s.findGitLogin(sp.config.Git)
	return sp, err
}

// oneContext wants a context in the tar, or named by the config, and not both.
func oneContext(cfg *buildconfig.Config, p *payload.Payload) error {
	switch {
	case cfg.Context == nil && p.Context == nil:
		return payload.ErrNoContext
	case cfg.Context != nil && p.Context != nil:
		return &api.Error{Code: api.BadConfig, Msg: fmt.Sprintf("%s: %q is set, and the tar holds a context of its own", api.ConfigFile, "context")}
	}
	return nil
}

// allow compares a spec with what the operator allows. It is the only place that does.
func (s *Server) allow(cfg *buildconfig.Config) error {
	if err := cfg.Allow(s.AllowedImages); err != nil {
		return err
	}
	if err := cfg.Deny(s.OwnRepositories); err != nil {
		return err
	}
	return cfg.AllowContext(s.ContextHosts)
}

// unseal opens com.openfaas.secrets. There are no secrets in a nil envelope.
func (s *Server) unseal(ctx context.Context, envelope []byte) (map[string][]byte, error) {
	if envelope == nil {
		return nil, nil
	}
	private, err := s.BuildSecretsKey()
	if err != nil {
		return nil, fmt.Errorf("reading the build-secrets key: %w", err)
	}
	if len(private) == 0 {
		return nil, &api.Error{Code: api.BadSecrets, Msg: fmt.Sprintf("the tar holds %s, but no build-secrets key is configured here", api.SecretsFile)}
	}
	secrets, err := sealed.Open(ctx, private, envelope)
	return secrets, because(ctx, err)
}

// gitLogin is the user and password for a git context. The zero gitLogin is none.
type gitLogin struct {
	basic    string // user and password, as Basic authentication encodes them
	password string
}

// findGitLogin looks for the login for a git context. git is nil if the context is not in git.
func (s *Server) findGitLogin(git *buildconfig.Git) (gitLogin, error) {
	if git == nil {
		return gitLogin{}, nil
	}
	file, err := s.GitCredentials()
	if err != nil {
		return gitLogin{}, fmt.Errorf("reading the git credentials: %w", err)
	}
	user, password, ok := git.GitCredentials(file)
	if !ok {
		return gitLogin{}, nil
	}
	return gitLogin{base64.StdEncoding.EncodeToString([]byte(user + ":" + password)), password}, nil
}

// authorization is the value of the Authorization header.
func (l gitLogin) authorization() string {
	if l.basic == "" {
		return ""
	}
	return "Basic " + l.basic
}

// mask hides everything that is secret in the spec.
func (sp *spec) mask() *redact.Redactor {
	hidden := maps.Clone(sp.secrets)
	if sp.git.basic != "" {
		if hidden == nil {
			hidden = make(map[string][]byte)
		}
		// An id of a secret has no line break, so these two are no secret's.
		hidden["git\npassword"], hidden["git\nbasic"] = []byte(sp.git.password), []byte(sp.git.basic)
	}
	return redact.New(hidden)
}
