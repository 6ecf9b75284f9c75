package registry

import (
	"context"
	"net/http"
	"sync"
	"time"

	challenges "github.com/containerd/containerd/v2/core/remotes/docker/auth"
)

const (
	schemeLife   = 5 * time.Minute  // of a registry's answer
	schemeUnsure = 15 * time.Second // of the lack of one
)

// Scheme remembers whether one registry asks for Basic authentication.
type Scheme struct {
	creds *Credentials
	host  string

	mu    sync.Mutex // held while the registry is asked
	basic bool
	until time.Time
}

// Scheme makes the memory for a host. The operator has named the host, so that it may have a
// private address.
func (c *Credentials) Scheme(host string) *Scheme { return &Scheme{creds: c, host: host} }

// MayBeBasic says whether the registry asks for Basic authentication. It says yes for a
// registry that does not answer: builds then only go without the registry cache. An answer is
// kept for five minutes, and a missing one for fifteen seconds. Callers wait for each other, at
// most for the time that the registry has to answer.
func (s *Scheme) MayBeBasic(ctx context.Context) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Now().Before(s.until) {
		return s.basic
	}
	ctx, cancel := context.WithTimeout(ctx, tokenTimeout)
	defer cancel()
	basic, err := s.ask(ctx)
	if err == nil {
		s.basic, s.until = basic, time.Now().Add(schemeLife)
		return basic
	}
	if ctx.Err() == nil || ctx.Err() == context.DeadlineExceeded {
		s.creds.cfg.Log.Warn().Err(err).Str("registry", s.host).Msg("asking for its authentication; builds of tenants go on without the registry cache")
		s.basic, s.until = true, time.Now().Add(schemeUnsure)
	}
	return true
}

func (s *Scheme) ask(ctx context.Context) (bool, error) {
	base := s.creds.base(s.host)
	client, err := s.creds.client(s.host, base, true)
	if err != nil {
		return false, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base.JoinPath("v2").String()+"/", nil)
	if err != nil {
		return false, err
	}
	req.Header.Set("User-Agent", clientID)
	resp, err := client.Do(req)
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	if resp.StatusCode >= 500 {
		return false, &statusError{code: resp.StatusCode}
	}
	// buildkitd, too, takes Bearer before Basic.
	list := challenges.ParseAuthHeader(resp.Header)
	return len(list) > 0 && list[0].Scheme == challenges.BasicAuth, nil
}
