// Package clouds gets credentials for the registries of Amazon, Google and
// Azure from the clouds themselves, as the clouds' Docker credential helpers do. It
// knows what the clouds' SDKs find in the environment, not Docker's config.json.
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

// timeout bounds one fetch with all its requests and their retries.
const timeout = 10 * time.Second

// repositoryKnown is how long a repository counts as there without a new look.
const repositoryKnown = 10 * time.Minute

// maxText is how many bytes of a cloud's error ours quotes at most.
const maxText = 500

// ErrRefused is wrapped by the error of a request that a cloud understood and refused. The
// same request would be refused again.
var ErrRefused = errors.New("refused")

// Config is what the package needs from outside.
type Config struct {
	// Client returns a client for requests to the registry itself: Azure exchanges
	// tokens there.
	Client func(host string) (*http.Client, error)

	Log zerolog.Logger
}

// Clouds are the clouds' helpers. They ask nothing of a cloud, nor of a metadata address,
// before its credentials are wanted.
type Clouds struct {
	cfg     Config
	timeout time.Duration
	now     func() time.Time

	// transport reaches Azure's authority. Nil stands for the SDK's own.
	transport *http.Client

	mu    sync.Mutex
	kept  map[string]kept      // by helper.key
	known map[string]time.Time // by "host/repository": when it was last seen
}

// New sends no request.
func New(cfg Config) *Clouds {
	return &Clouds{
		cfg:     cfg,
		timeout: timeout,
		now:     time.Now,
		kept:    make(map[string]kept),
		known:   make(map[string]time.Time),
	}
}

// Credentials are for one registry: a user name and password, or a refresh token.
type Credentials struct {
	Username, Password string
	RefreshToken       string

	// Renew is when to ask for new ones. Zero is at the next build.
	Renew time.Time

	expires time.Time // zero if the cloud does not say
}

// helper is one cloud.
type helper struct {
	get func(*Clouds, context.Context, string) (Credentials, error)
	// owns says whether host is one of the cloud's registries.
	owns func(host string) bool
	// key returns the same text for hosts that share credentials.
	key func(host string) string
}

var helpers = map[string]helper{
	"ecr-login": {(*Clouds).amazon, isAmazon, amazonKey},
	"gcr":       {(*Clouds).google, isGoogle, googleKey},
	"gcloud":    {(*Clouds).google, isGoogle, googleKey},
	"acr-env":   {(*Clouds).azure, isAzure, azureKey},
}

// Has says whether this package has the Docker credential helper of this name.
func Has(name string) bool {
	_, ok := helpers[name]
	return ok
}

// Owns says whether host is a registry of the cloud whose helper has this name.
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

// kept are credentials that are kept for further builds. They are renewed once half of
// their life is over. If the cloud fails then, they go on serving.
type kept struct {
	creds Credentials
	renew time.Time
}

// staleRenew is the time until a renewal that failed is tried again.
const staleRenew = time.Minute

// minLife is how long credentials must have to live if they are to serve again.
const minLife = time.Minute

// Get returns the credentials for host from the helper of this name. Has must know it.
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

// keep keeps k for key, and forgets what has expired.
func (c *Clouds) keep(key string, k kept) {
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.kept, func(_ string, k kept) bool { return k.creds.expires.Before(now) })
	c.kept[key] = k
}

// fetch asks the cloud, within the timeout.
func (c *Clouds) fetch(ctx context.Context, h helper, host string) (Credentials, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	creds, err := h.get(c, ctx, host)
	return creds, c.late(ctx, err)
}

// late replaces err if ctx's time was up: the SDKs have different words for it, and some
// quote a URL.
func (c *Clouds) late(ctx context.Context, err error) error {
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %v: %w", c.timeout, context.DeadlineExceeded)
	}
	return err
}

// text returns err on one line. Of the URL in an error of net/http, only the host stays.
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

// clean returns s on one line, cut to maxText bytes.
func clean(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	return strings.ToValidUTF8(s[:min(len(s), maxText)], "")
}

// answered returns the error for an answer with this status. what is the cloud's own text.
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
