package registry

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	challenges "github.com/containerd/containerd/v2/core/remotes/docker/auth"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"handler/function/api"
	"handler/function/hosts"
)

const (
	askTimeout  = 30 * time.Second // of one question with its tokens and retries
	maxManifest = 4 << 20          // bytes; registries take no larger ones
)

// manifestTypes are the media types that buildkitd accepts: a registry may have one tag in
// several forms, and each has a digest of its own.
var manifestTypes = []string{
	"application/vnd.docker.distribution.manifest.v2+json",
	"application/vnd.docker.distribution.manifest.list.v2+json",
	"application/vnd.oci.image.manifest.v1+json",
	"application/vnd.oci.image.index.v1+json",
	"*/*",
}

// question is one image at a registry, and whose credentials ask for it.
type question struct {
	grant  *Grant
	ref    reference.Named // with a tag or a digest
	host   string
	base   *url.URL // where the registry is asked
	client *http.Client
	header string // the value of Authorization; empty until the registry asks for it
}

// Ask asks an image's registry for its manifest, with the grant's credentials, and returns the
// manifest's digest. ref has a tag or a digest. Config.Mirrors says where the registry is. A
// registry that is not there is asked over https, or over http at a loopback address. named
// says that the operator has named the host, and not only a Dockerfile: only then may the
// registry have a private address. platform is what the image is for; nil is every platform.
//
// Every error is an *api.Error: registry_denied if the registry refuses or has no such image,
// else registry_failed.
func (g *Grant) Ask(ctx context.Context, ref reference.Named, named bool, platform *ocispecs.Platform) (digest.Digest, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	q, err := g.question(ref, named)
	if err != nil {
		return "", err
	}
	defer q.client.CloseIdleConnections()
	wait := tokenBackoff
	for attempt := 1; ; attempt++ {
		d, err := q.ask(ctx)
		if err == nil {
			err = q.prove(ctx, d, platform)
		}
		if err == nil {
			return d, nil
		}
		if _, said := errors.AsType[*api.Error](err); said || attempt == tokenAttempts || !transient(err) {
			return "", q.explain(err)
		}
		select {
		case <-ctx.Done():
			return "", q.explain(err)
		case <-time.After(wait):
		}
		wait *= 2
	}
}

// Tagged asks an image's registry once which digest is under the image's tag, with the grant's
// credentials. The registry may have a private address: it is one to which an image was pushed. The
// errors are Ask's.
func (g *Grant) Tagged(ctx context.Context, ref reference.NamedTagged) (digest.Digest, error) {
	q, err := g.question(ref, true)
	if err != nil {
		return "", err
	}
	defer q.client.CloseIdleConnections()
	d, err := q.ask(ctx)
	if err != nil {
		return "", q.explain(err)
	}
	return d, nil
}

// question is one about an image. The caller closes the idle connections of its client.
func (g *Grant) question(ref reference.Named, named bool) (*question, error) {
	q := &question{grant: g, ref: ref, host: reference.Domain(ref)}
	q.base = g.creds.base(q.host)
	var err error
	if q.client, err = g.creds.client(q.host, q.base, named); err != nil {
		return nil, err
	}
	// Only the requests of this question share a connection.
	q.client.Transport.(*http.Transport).DisableKeepAlives = false
	return q, nil
}

// base is where the function asks for the images of a host.
func (c *Credentials) base(named string) *url.URL {
	host := serverHost(named)
	if where := c.mirrors[host]; where != nil {
		return where
	}
	if h, err := hosts.Parse(host); err == nil && h.IsLoopback() {
		return &url.URL{Scheme: "http", Host: named} // with :443, which is not http's port
	}
	return &url.URL{Scheme: "https", Host: host}
}

// ask asks once, and once more with an answer to the registry's challenge. Most registries
// tell the digest in a header. The others are asked for the manifest itself.
func (q *question) ask(ctx context.Context) (digest.Digest, error) {
	var object string
	want, byDigest := q.ref.(reference.Digested)
	if byDigest {
		object = want.Digest().String()
	} else if t, ok := q.ref.(reference.Tagged); ok {
		object = t.Tag()
	}
	resp, err := q.authorized(ctx, http.MethodHead, object)
	if err != nil {
		return "", err
	}
	resp.Body.Close()
	told := digest.Digest(resp.Header.Get("Docker-Content-Digest"))
	if resp.StatusCode == http.StatusMethodNotAllowed || resp.StatusCode == http.StatusOK && told == "" {
		text, err := q.read(ctx, object)
		if err != nil {
			return "", err
		}
		told = digest.FromBytes(text)
	} else if resp.StatusCode != http.StatusOK {
		return "", &statusError{code: resp.StatusCode}
	}
	// BuildKit knows other algorithms. No registry makes them of a tag.
	if told.Validate() != nil {
		return "", fmt.Errorf("%w: no digest", errAnswer)
	}
	if byDigest && want.Digest() != told {
		return "", fmt.Errorf("%w: the digest %s for %s", errAnswer, told, want.Digest())
	}
	return told, nil
}

var errAnswer = errors.New("an answer that fits no question")

// authorized sends a request for the manifest of a tag or a digest, and repeats it if the registry
// wants credentials and there are some. Another service to which the registry redirects gets none:
// its challenge could name a token service of its own. The caller closes the body.
func (q *question) authorized(ctx context.Context, method, object string) (*http.Response, error) {
	resp, err := q.send(ctx, method, object)
	if err != nil || !q.mayAnswer(resp) {
		return resp, err
	}
	resp.Body.Close()
	if q.header, err = q.answer(ctx, resp.Header); err != nil {
		return nil, err
	}
	if q.header == "" {
		return nil, &statusError{code: http.StatusUnauthorized}
	}
	return q.send(ctx, method, object)
}

// mayAnswer says whether credentials may follow an answer. They are for the registry itself.
func (q *question) mayAnswer(resp *http.Response) bool {
	return resp.StatusCode == http.StatusUnauthorized && q.header == "" && sameService(q.base, resp.Request.URL)
}

// answer is the value of Authorization that answers a registry's challenge. It is empty where
// there are no credentials. allow_basic does not count here: it is about what the daemon may
// have.
func (q *question) answer(ctx context.Context, header http.Header) (string, error) {
	path := reference.Path(q.ref)
	have, err := q.grant.auth(ctx, q.host, path)
	if err != nil {
		return "", unreadable(q.host, err)
	}
	for _, c := range challenges.ParseAuthHeader(header) {
		switch {
		case c.Scheme == challenges.BearerAuth && have.auth.RegistryToken != "":
			return "Bearer " + have.auth.RegistryToken, nil
		case c.Scheme == challenges.BearerAuth:
			scopes := strings.Fields(c.Parameters["scope"])
			if len(scopes) == 0 {
				scopes = []string{"repository:" + path + ":pull"}
			}
			tok, err := q.grant.Token(ctx, TokenRequest{Host: q.host, Realm: c.Parameters["realm"], Service: c.Parameters["service"], Scopes: scopes})
			return "Bearer " + tok.Value, err
		case c.Scheme == challenges.BasicAuth && have.failed != nil:
			return "", unreadable(q.host, have.failed)
		case c.Scheme == challenges.BasicAuth && have.auth.Username != "" && have.auth.IdentityToken == "":
			return "Basic " + base64.StdEncoding.EncodeToString([]byte(have.auth.Username+":"+have.auth.Password)), nil
		}
	}
	return "", nil
}

// send sends one request, and follows its redirects. Credentials stay with the service that
// asked for them. Another host that a registry names must be public, and speak https.
func (q *question) send(ctx context.Context, method, object string) (*http.Response, error) {
	u := q.base.JoinPath("v2", reference.Path(q.ref), "manifests", object)
	client, header := q.client, q.header
	for range maxRedirects {
		req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
		if err != nil {
			return nil, err
		}
		req.Header["Accept"] = manifestTypes
		req.Header.Set("User-Agent", clientID)
		if header != "" {
			req.Header.Set("Authorization", header)
		}
		resp, err := client.Do(req)
		if err != nil {
			return nil, err
		}
		switch resp.StatusCode {
		case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		default:
			return resp, nil
		}
		resp.Body.Close()
		to, err := resp.Location()
		if err != nil {
			return nil, &statusError{code: resp.StatusCode}
		}
		if !sameService(u, to) {
			if to.Scheme != "https" {
				return nil, fmt.Errorf("%w: a redirect to %s", errAnswer, to.Scheme)
			}
			if client, err = q.grant.creds.client(q.host, to, false); err != nil {
				return nil, err
			}
			header = ""
		}
		u = to
	}
	return nil, fmt.Errorf("%w: more than %d redirects", errAnswer, maxRedirects)
}

// explain makes err one for the client.
func (q *question) explain(err error) error {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	e := &api.Error{Code: api.RegistryFailed}
	name := reference.FamiliarString(q.ref)
	why := "cannot be reached"
	var st *statusError
	switch {
	case errors.As(err, &st):
		e.Code, why = q.refusal(st.code, name)
	case errors.Is(err, errAddress):
		e.Code = api.RegistryDenied
		why = "is refused: not a public address, and neither credentials nor registry_mirrors name it"
	case errors.As(err, new(*tls.CertificateVerificationError)):
		why = "has a certificate that cannot be verified (registry_ca)"
	case errors.Is(err, errAnswer):
		why = fmt.Sprintf("answered the question for %q with something that is no answer", name)
	case errors.Is(err, context.DeadlineExceeded):
		why = "did not answer in time"
	}
	e.Msg = fmt.Sprintf("registry %s: it %s", q.host, why)
	// The error of net/http quotes the URL, which a redirect may have put a secret into.
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	e.Err = err
	return e
}

// refusal says what a status other than 200 means. A registry tells only those who may read an
// image whether it is there.
func (q *question) refusal(status int, name string) (api.Code, string) {
	switch {
	case status == http.StatusNotFound:
		return api.RegistryDenied, fmt.Sprintf("has no image %q (404)", name)
	case status == http.StatusUnauthorized && q.header == "":
		return api.RegistryDenied, fmt.Sprintf("wants credentials for %q, and none are configured for it (401)", name)
	case status == http.StatusUnauthorized || status == http.StatusForbidden:
		return api.RegistryDenied, fmt.Sprintf("refused %q (%d)", name, status)
	case status >= 500 || status == http.StatusTooManyRequests:
		return api.RegistryFailed, fmt.Sprintf("answered the question for %q with status %d", name, status)
	}
	return api.RegistryDenied, fmt.Sprintf("answered the question for %q with status %d", name, status)
}
