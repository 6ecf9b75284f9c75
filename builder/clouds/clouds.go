// Package clouds gets credentials for the registries of Amazon, Google and
// Azure from the clouds themselves, as their Docker credential helpers do. It
// knows what their SDKs find in the environment, not Docker's config.json.
package clouds

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// timeout is of one fetch, of all its requests and their retries.
const timeout = 10 * time.Second

// repositoryKnown is how long a repository that was there is not looked for.
const repositoryKnown = 10 * time.Minute

// maxText bounds what a cloud's error adds to ours, in bytes.
const maxText = 500

// ErrRefused is in errors where a cloud took the request and said no: the same
// one would fail again.
var ErrRefused = errors.New("refused")

// Config says what the package needs of others.
type Config struct {
	// Client reaches a registry itself, which Azure's exchange is part of.
	Client func(host string) (*http.Client, error)

	Log zerolog.Logger
}

// Clouds are the helpers by their names. Nothing is asked, no metadata address
// either, before credentials are wanted of a cloud.
type Clouds struct {
	cfg     Config
	timeout time.Duration
	now     func() time.Time

	// transport reaches Azure's authority; nil is the SDK's own.
	transport *http.Client

	mu    sync.Mutex
	kept  map[string]kept      // by helper, and host or region
	known map[string]time.Time // repositories, and when they were last seen
}

// New asks nothing yet.
func New(cfg Config) *Clouds {
	return &Clouds{
		cfg:     cfg,
		timeout: timeout,
		now:     time.Now,
		kept:    make(map[string]kept),
		known:   make(map[string]time.Time),
	}
}

// Credentials are for one registry. A refresh token stands alone.
type Credentials struct {
	Username, Password string
	RefreshToken       string

	// Renew is when to ask for others; zero is not before the next build.
	Renew time.Time

	expires time.Time // zero where the cloud does not say
}

// helper is one cloud.
type helper struct {
	get func(*Clouds, context.Context, string) (Credentials, error)
	// owns says whether host is one of the cloud's registries.
	owns func(host string) bool
	// key is the same for hosts that share their credentials.
	key func(host string) string
}

var helpers = map[string]helper{
	"ecr-login": {(*Clouds).amazon, isAmazon, amazonKey},
	"gcr":       {(*Clouds).google, isGoogle, googleKey},
	"gcloud":    {(*Clouds).google, isGoogle, googleKey},
	"acr-env":   {(*Clouds).azure, isAzure, azureKey},
}

// Has says whether the Docker credential helper of this name is one of ours.
func Has(name string) bool {
	_, ok := helpers[name]
	return ok
}

// Owns says whether host is a registry of the cloud that helper name is for.
func Owns(name, host string) bool {
	h, ok := helpers[name]
	return ok && h.owns(hostname(host))
}

// hostname is host without a port, in lower case.
func hostname(host string) string {
	u := url.URL{Host: strings.ToLower(host)}
	return u.Hostname()
}

// under says whether host is a name below one of the domains.
func under(host string, domains ...string) bool {
	for _, d := range domains {
		if sub, ok := strings.CutSuffix(host, "."+d); ok && sub != "" {
			return true
		}
	}
	return false
}

// kept are credentials that serve further builds. They are renewed in the
// second half of their life, and go on serving there while the cloud fails.
type kept struct {
	creds Credentials
	renew time.Time
}

// staleRenew is how soon a renewal that failed is tried again.
const staleRenew = time.Minute

// minLife is what credentials must have left to be handed out again.
const minLife = time.Minute

// Get asks helper name, one that Has knows, for the credentials of host.
func (c *Clouds) Get(ctx context.Context, name, host string) (Credentials, error) {
	h, ok := helpers[name]
	if !ok {
		return Credentials{}, fmt.Errorf("credential helper %q: unknown", name)
	}
	key := h.key(host)
	c.mu.Lock()
	k, ok := c.kept[key]
	c.mu.Unlock()
	if ok && c.now().Before(k.renew) {
		return k.creds, nil
	}
	creds, err := c.fetch(ctx, h, host)
	now := c.now()
	if err != nil {
		err = fmt.Errorf("credential helper %q for %s: %w", name, host, err)
		if ok && ctx.Err() == nil && !errors.Is(err, ErrRefused) && now.Add(minLife).Before(k.creds.expires) {
			c.cfg.Log.Warn().Err(err).Time("expires", k.creds.expires).Msg("using credentials from before")
			k.renew = now.Add(staleRenew)
			k.creds.Renew = k.renew
			c.keep(key, k)
			return k.creds, nil
		}
		return Credentials{}, err
	}
	if creds.expires.IsZero() {
		return creds, nil
	}
	life := creds.expires.Sub(now)
	creds.Renew = now.Add(life / 2)
	if life > minLife {
		c.keep(key, kept{creds, creds.Renew})
	}
	return creds, nil
}

func (c *Clouds) keep(key string, k kept) {
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.kept, func(_ string, k kept) bool { return k.creds.expires.Before(now) })
	c.kept[key] = k
}

func (c *Clouds) fetch(ctx context.Context, h helper, host string) (Credentials, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	creds, err := h.get(c, ctx, host)
	return creds, c.late(ctx, err)
}

// late says that the time was up, where it was: an SDK's own words for it
// differ, and some hold a URL.
func (c *Clouds) late(ctx context.Context, err error) error {
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %v: %w", c.timeout, context.DeadlineExceeded)
	}
	return err
}

// text is what err says, on one line and without the query of a URL.
func text(err error) string {
	var ue *url.Error
	if errors.As(err, &ue) {
		if u, perr := url.Parse(ue.URL); perr == nil {
			return clean(fmt.Sprintf("%s: %v", u.Host, ue.Err))
		}
		return clean(ue.Err.Error())
	}
	return clean(err.Error())
}

func clean(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	return strings.ToValidUTF8(s[:min(len(s), maxText)], "")
}

// answered is the error of an answer with this status.
func answered(status int, what string) error {
	err := fmt.Errorf("status %d", status)
	if status >= 400 && status < 500 && status != http.StatusTooManyRequests && status != http.StatusRequestTimeout {
		err = fmt.Errorf("%w with status %d", ErrRefused, status)
	}
	if what = clean(what); what != "" {
		err = fmt.Errorf("%w: %s", err, what)
	}
	return err
}
