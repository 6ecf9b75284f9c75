package server

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"net/http"
	"regexp"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
	"handler/function/payload"
	"handler/function/reply"
	"handler/function/signature"
	"handler/function/tenants"
)

// keyring reads the payload secret. Each time the secret changes, a line in the log says
// how many keys it holds.
type keyring struct {
	read func() ([]byte, error)
	log  zerolog.Logger

	mu   sync.Mutex
	sum  *[sha256.Size]byte // of the payload secret; nil before it is first read
	keys signature.Keys
	only *tenants.Set // of the tenant who has these keys where there is no file of tenants
}

// current reads the payload secret. It returns the keys in it, and the Set of the one tenant that
// has them where there is no file of tenants. A secret without a key is no error.
func (k *keyring) current() (signature.Keys, *tenants.Set, error) {
	file, err := k.read()
	if err != nil {
		return nil, nil, &api.Error{Code: api.NotReady, Msg: noSecret, Err: err}
	}
	sum := sha256.Sum256(file)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.sum != nil && *k.sum == sum {
		return k.keys, k.only, nil
	}
	keys, list := signature.ParseKeys(file)
	k.sum, k.keys, k.only = &sum, keys, tenants.Single(keys)
	lines := bytes.Count(bytes.TrimSpace(file), []byte("\n")) + 1
	switch {
	case len(keys) == 0:
		k.log.Error().Msg(noKey)
	case list:
		k.log.Info().Int("keys", len(keys)).Msg("the payload secret is a list: each line is a key, and so is the whole file")
	case lines > 1:
		k.log.Info().Int("lines", lines).Msg("the payload secret is one key, the whole file: at least one of its lines could be no key")
	}
	return keys, k.only, nil
}

// The answer of /ready has these texts, and the log has noKey.
const (
	noKey    = "the payload secret holds no key: one has 16 bytes or more"
	noSecret = "the payload secret cannot be read"
)

// timestamp returns the timestamp of a request, or "". It must be called before the body is
// read: an upload may take longer than a timestamp is valid.
func (s *Server) timestamp(r *http.Request) (signature.Timestamp, error) {
	t, err := signature.ParseTimestamp(r.Header.Values(api.TimestampHeader), time.Now())
	if err == nil && t == "" && s.RequireTimestamp {
		err = errors.New("requests need a timestamp here (require_timestamp)")
	}
	if err != nil {
		// The client is told, because a wrong clock is hard to find, and because this
		// error tells nothing about a key.
		return "", &api.Error{Code: api.Unauthorized, Msg: api.TimestampHeader + ": " + err.Error()}
	}
	return t, nil
}

// signedBy checks the signature of a request without a body, and returns whose key made it. What is
// signed is the method, a space, and the path with the query: "GET /builds/42". Without HMAC nothing
// is checked, and the signer has no key.
func (s *Server) signedBy(r *http.Request) (signer, error) {
	return s.signedWith(r, signedNeeds{})
}

// signedNeeds says what a route wants of a signature beyond its key.
type signedNeeds struct {
	timestamp bool // it has one, whatever RequireTimestamp says
	operators bool // it may be an operator's
}

// signedWith is signedBy for routes that need more.
func (s *Server) signedWith(r *http.Request, needs signedNeeds) (signer, error) {
	who, err := s.roster()
	if err != nil || s.DisableHMAC {
		return signer{roster: who}, err
	}
	t, err := s.timestamp(r)
	if err != nil {
		return signer{}, err
	}
	if t == "" && needs.timestamp {
		return signer{}, &api.Error{Code: api.Unauthorized, Msg: api.TimestampHeader + ": requests need a timestamp for this route"}
	}
	mac, err := signature.Parse(r.Header.Values(api.SignatureHeader))
	if err != nil {
		return signer{}, who.unauthorized(err)
	}
	text := r.Method + " " + r.URL.EscapedPath()
	if r.URL.RawQuery != "" || r.URL.ForceQuery {
		text += "?" + r.URL.RawQuery
	}
	cause := errNoMAC
	list, ok := who.candidates(r)
	if !ok {
		list, cause = who.unnamed(), errUnnamed
	}
	keys := keysOf(list)
	if needs.operators {
		for _, k := range who.set.Operators {
			keys = append(keys, k.Secret)
		}
	}
	place, ok := keys.Verify(mac, t, []byte(text))
	switch {
	case !ok:
		return signer{}, who.unauthorized(cause)
	case place >= len(list):
		return s.acceptOperator(who, who.set.Operators[place-len(list)], t != "")
	}
	return s.accept(who, list[place], t != "")
}

// bodiless is the beginning of a signed text of a request without a body.
var bodiless = regexp.MustCompile(`^[A-Z]+ /`)

// ambiguous says whether a signed body may also be something else that is signed: a request
// without a body, an answer of the builder, or a timestamp and another body. Whoever has seen one of
// these with its signature could send it as a body. message is the first 1 KiB of the body, or all
// of a shorter one. Of a text envelope it is the first 1 KiB of the tar in it. A timestamp in a
// header is not in message.
func ambiguous(message []byte) bool {
	rest, stamped := signature.CutTimestamp(message)
	return bodiless.Match(rest) || reply.IsAnswer(rest) || stamped && payload.IsBody(rest)
}

// headerIgnored is the error of a text envelope that has no signature inside, while a header has
// one. It tells nothing about a key, because the header is compared with none.
func (r roster) headerIgnored() error {
	e := api.AsError(r.unauthorized(errors.New("no signature")))
	e.Msg += `: a body that begins with { is taken for a text envelope, ` +
		`which carries its signature inside, as "signature", and has none; a header ` + api.SignatureHeader + ` beside it is ignored`
	return e
}
