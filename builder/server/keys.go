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
	"handler/function/isolation"
	"handler/function/payload"
	"handler/function/reply"
	"handler/function/signature"
)

// keyring is the payload secret as it is now, and says in the log what it is
// whenever that changes.
type keyring struct {
	read func() ([]byte, error)
	log  zerolog.Logger

	mu   sync.Mutex
	of   *[sha256.Size]byte // the file that keys are of; nil before the first
	keys signature.Keys
}

// now reads the file. Of a file without a key there are no keys, and no error.
func (k *keyring) now() (signature.Keys, error) {
	file, err := k.read()
	if err != nil {
		return nil, &api.Error{Code: api.NotReady, Msg: "the payload secret cannot be read", Err: err}
	}
	sum := sha256.Sum256(file)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.of != nil && *k.of == sum {
		return k.keys, nil
	}
	keys, list := signature.ParseKeys(file)
	k.of, k.keys = &sum, keys
	lines := bytes.Count(bytes.TrimSpace(file), []byte("\n")) + 1
	switch {
	case len(keys) == 0:
		k.log.Error().Msg(noKey)
	case list:
		k.log.Info().Int("keys", len(keys)).Msg("the payload secret is a list: each line is a key, and so is the whole file")
	case lines > 1:
		k.log.Info().Int("lines", lines).Msg("the payload secret is one key, the whole file: not each of its lines could be one")
	}
	return keys, nil
}

// noKey is what the log and /ready say of a payload secret that lets nobody in.
const noKey = "the payload secret holds no key: one has 16 bytes or more"

// signer is the key that signed a request, and whether it signed a timestamp: the
// answer is signed in the same way. The zero signer signs nothing.
type signer struct {
	key     []byte
	stamped bool
}

// sign is a reply.Options.Sign.
func (g signer) sign(h http.Header, body []byte) {
	if g.key == nil {
		return
	}
	var t signature.Timestamp
	if g.stamped {
		t = signature.Now()
		h.Set(api.TimestampHeader, string(t))
	}
	h.Set(api.SignatureHeader, signature.Sign(g.key, t, body))
}

// timestamp is the one that a request is signed with. It is judged when the headers
// have come: an upload may take longer than a timestamp is good for.
func (s *Server) timestamp(r *http.Request) (signature.Timestamp, error) {
	t, err := signature.ParseTimestamp(r.Header.Values(api.TimestampHeader), time.Now())
	if err == nil && t == "" && s.RequireTimestamp {
		err = errors.New("requests need a timestamp here (require_timestamp)")
	}
	if err != nil {
		// It says nothing of any key, and a clock that is wrong is hard to find.
		return "", &api.Error{Code: api.Unauthorized, Msg: api.TimestampHeader + ": " + err.Error()}
	}
	return t, nil
}

// signedBy checks the signature of a request that has no body: it signs its
// method, a space and its path, with the query if there is one. Without HMAC
// there is no signer. id is for the log, where it is none that signed.
func (s *Server) signedBy(r *http.Request, id string) (signer, error) {
	if s.DisableHMAC {
		return signer{}, nil
	}
	by, err := s.verify(r)
	if err != nil {
		s.countUnsigned(api.AsError(err), id)
	}
	return by, err
}

func (s *Server) verify(r *http.Request) (signer, error) {
	keys, err := s.keys.now()
	if err != nil {
		return signer{}, err
	}
	t, err := s.timestamp(r)
	if err != nil {
		return signer{}, err
	}
	mac, err := signature.Parse(r.Header.Values(api.SignatureHeader))
	if err != nil {
		return signer{}, unauthorized(err)
	}
	text := r.Method + " " + r.URL.EscapedPath()
	if r.URL.RawQuery != "" || r.URL.ForceQuery {
		text += "?" + r.URL.RawQuery
	}
	key, ok := keys.Verify(mac, t, []byte(text))
	if !ok {
		return signer{}, unauthorized(errors.New("no key made the signature"))
	}
	return signer{key, t != ""}, nil
}

// bodiless is what requests that have no body sign.
var bodiless = regexp.MustCompile(`^[A-Z]+ /`)

// ambiguous says that the bytes that a body's signature is over may have been signed
// as something else: as a request without a body, as an answer of ours, or, with a
// timestamp, as another body. Whoever has seen the other one's signature
// could send the body. message is its beginning, 1 KiB or all.
func ambiguous(message []byte) bool {
	rest, stamped := signature.CutTimestamp(message)
	return bodiless.Match(rest) || reply.IsAnswer(rest) || stamped && payload.IsBody(rest)
}

// unauthorized has one message for every cause: which it was helps only who
// tries keys.
func unauthorized(cause error) error {
	return &api.Error{
		Code: api.Unauthorized,
		Msg:  "the request is not signed with the payload secret",
		Err:  cause,
	}
}

// errHeaderIgnored is of a text envelope without a signature beside a signature header. It
// is the same whatever the header holds, which nobody looks at: it says nothing of a key.
var errHeaderIgnored = &api.Error{
	Code: api.Unauthorized,
	Msg: `the request is not signed with the payload secret: a body that begins with { is taken for a text envelope, ` +
		`which carries its signature inside, as "signature", and has none; a header ` + api.SignatureHeader + ` beside it is ignored`,
	Err: errors.New("no signature"),
}

// isolationKey is derived from the first key, and so outlives the rotation of
// those after it.
func (s *Server) isolationKey(keys signature.Keys) isolation.Key {
	if len(keys) == 0 {
		return isolation.Derive(s.FallbackSecret)
	}
	return isolation.Derive(keys[0])
}
