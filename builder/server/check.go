package server

import (
	"context"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"time"

	"handler/function/api"
	"handler/function/buildconfig"
	"handler/function/payload"
	"handler/function/redact"
	"handler/function/sealed"
	"handler/function/solve"
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
	if err := s.allow(sp.config, j.body.signer); err != nil {
		return sp, err
	}
	if sp.secrets, err = s.unseal(j.ctx, j.body.signer, p.Secrets); err != nil {
		return sp, err
	}
	sp.git, err = s.findGitLogin(j.body.signer, sp.config.Git)
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

// allow compares a spec with what the operator allows: all, and the tenant. It is the only place
// that does. It gives a request without platforms those that its tenant may build.
func (s *Server) allow(cfg *buildconfig.Config, by signer) error {
	if err := cfg.Allow(s.AllowedImages); err != nil {
		return err
	}
	if by.file() {
		if err := cfg.AllowWithin(by.tenant.Images); err != nil {
			return err
		}
		if err := cfg.AllowPlatforms(by.tenant.Platforms, s.DefaultPlatform); err != nil {
			return err
		}
	}
	if err := cfg.Deny(s.OwnRepositories); err != nil {
		return err
	}
	return cfg.AllowContext(s.contextHosts(by))
}

// contextHosts are the hosts of git contexts: the tenant's own list takes the place of the
// installation's.
func (s *Server) contextHosts(by signer) []string {
	if by.file() && by.tenant.ContextHosts != nil {
		return by.tenant.ContextHosts
	}
	return s.ContextHosts
}

// buildTimeout is the lesser of the installation's and the tenant's.
func (s *Server) buildTimeout(by signer) time.Duration {
	if !by.file() || by.tenant.BuildTimeout == 0 {
		return s.BuildTimeout
	}
	return min(s.BuildTimeout, by.tenant.BuildTimeout)
}

// solveTenant is what the Solver needs to know of the signer's tenant: nil without a file.
func (s *Server) solveTenant(by signer) *solve.Tenant {
	if !by.file() {
		return nil
	}
	t := by.tenant
	return &solve.Tenant{
		ID:              t.ID,
		Key:             by.key.ID,
		Pool:            t.Pool,
		Memory:          t.Memory,
		CPUs:            t.CPUs,
		BuildTimeout:    s.buildTimeout(by),
		RegistryConfig:  t.Registry.Config,
		BuilderRegistry: t.Registry.Builder,
		Sources: solve.Sources{
			Images: t.Images,
			Own:    s.OwnRepositories,
			Others: func(name string) bool { return by.set.IsOthers(t, name) },
			From:   t.From,
			Hosts:  s.contextHosts(by),
			Asked:  by.set.LoginKeys(),
		},
	}
}

// unseal opens com.openfaas.secrets with the key of the tenant. There are no secrets in a nil
// envelope.
func (s *Server) unseal(ctx context.Context, by signer, envelope []byte) (map[string][]byte, error) {
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
	if by.file() {
		if private, err = sealed.Derive(private, by.tenant.ID); err != nil {
			return nil, err
		}
	}
	secrets, err := sealed.Open(ctx, private, envelope)
	return secrets, because(ctx, err)
}

// gitLogin is the user and password for a git context. The zero gitLogin is none.
type gitLogin struct {
	basic    string // user and password, as Basic authentication encodes them
	password string
}

// gitCredentials are those that the signer's builds may use. With a file of tenants, they are
// the tenant's own, and the installation's are nobody's.
func (s *Server) gitCredentials(by signer) ([]byte, error) {
	if by.file() {
		return by.tenant.GitCredentials, nil
	}
	file, err := s.GitCredentials()
	if err != nil {
		return nil, fmt.Errorf("reading the git credentials: %w", err)
	}
	return file, nil
}

// findGitLogin looks for the login for a git context. git is nil if the context is not in git.
func (s *Server) findGitLogin(by signer, git *buildconfig.Git) (gitLogin, error) {
	if git == nil {
		return gitLogin{}, nil
	}
	file, err := s.gitCredentials(by)
	if err != nil {
		return gitLogin{}, err
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

// arguments hides the values of build arguments. BuildKit writes them into the names of steps, and
// a failure names its step.
func (sp *spec) arguments() *redact.Redactor {
	hidden := make(map[string][]byte)
	for name, value := range sp.config.BuildArgs {
		hidden[name] = []byte(value)
	}
	return redact.New(hidden)
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
