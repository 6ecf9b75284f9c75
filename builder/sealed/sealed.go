// Package sealed opens com.openfaas.secrets: build secrets sealed to this
// builder's public key in the envelope of go-sdk's package seal.
package sealed

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"regexp"

	"github.com/openfaas/go-sdk/seal"
	"golang.org/x/crypto/curve25519"

	"handler/function/api"
)

// Limits of one envelope. MaxValue, in bytes, is BuildKit's (session/secrets,
// MaxSecretSize): BuildKit would refuse a larger value later and with a poorer message.
const (
	MaxSecrets = 64
	MaxValue   = 500 * 1024
)

// validID matches the ids of secrets: an id becomes the name of a file in /run/secrets.
var validID = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)

// turn is full while an envelope is opened. The largest take 20 MiB, and any number of them
// may have arrived.
var turn = make(chan struct{}, 1)

// Open unseals an envelope with a private key made by faas-cli secret keygen, and
// returns the secrets by id. It opens one envelope at a time. If ctx ends before an
// envelope's turn has come, the error is ctx's cause. All other errors are *api.Error of
// code bad_secrets and quote no secret's value.
func Open(ctx context.Context, privateKey, envelope []byte) (map[string][]byte, error) {
	if err := checkForm(envelope); err != nil {
		return nil, err
	}
	select {
	case turn <- struct{}{}:
		defer func() { <-turn }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	values, err := seal.Unseal(privateKey, envelope)
	if err != nil {
		return nil, bad(err, "unsealing %s: it was not sealed to this builder's public key, or is damaged", api.SecretsFile)
	}
	if len(values) > MaxSecrets {
		return nil, bad(nil, "unsealing %s: %d secrets, over the limit of %d", api.SecretsFile, len(values), MaxSecrets)
	}
	for id, value := range values {
		if !validID.MatchString(id) {
			return nil, bad(nil, "unsealing %s: %.140q is not an id of letters, digits, '_', '.' and '-'", api.SecretsFile, id)
		}
		if len(value) > MaxValue {
			return nil, bad(nil, "unsealing %s: %q has %d bytes, over the limit of %d", api.SecretsFile, id, len(value), MaxValue)
		}
	}
	return values, nil
}

func bad(cause error, format string, args ...any) error {
	return &api.Error{Code: api.BadSecrets, Msg: fmt.Sprintf(format, args...), Err: cause}
}

// PublicKey is the answer of /publickey in the form that faas-cli reads.
type PublicKey struct {
	KeyID     string `json:"key_id"`
	Algorithm string `json:"algorithm"`
	PublicKey string `json:"public_key"`
}

// decode reads a private key.
func decode(privateKey []byte) ([]byte, error) {
	raw, err := base64.StdEncoding.DecodeString(string(bytes.TrimSpace(privateKey)))
	if err != nil || len(raw) != curve25519.ScalarSize {
		return nil, errors.New("the build-secrets key is not base64 of 32 bytes")
	}
	return raw, nil
}

// Derive makes the private key of a tenant out of the installation's, with HKDF-SHA256. It has
// the same form. Each tenant has a key of its own, so that an envelope that was sealed for one
// tenant is of no use in another's tar.
func Derive(privateKey []byte, tenantID string) ([]byte, error) {
	return derive(privateKey, "tenant "+tenantID)
}

// Decoy makes a private key for a name that no tenant has. Its public half looks like a
// tenant's, and is the same each time, so that it does not tell that there is no such tenant.
func Decoy(privateKey []byte, name string) ([]byte, error) {
	return derive(privateKey, "nobody "+name)
}

func derive(privateKey []byte, whose string) ([]byte, error) {
	raw, err := decode(privateKey)
	if err != nil {
		return nil, err
	}
	key, err := hkdf.Key(sha256.New, raw, nil, "function builder sealing v1 "+whose, curve25519.ScalarSize)
	if err != nil {
		return nil, fmt.Errorf("deriving a private key: %w", err)
	}
	return []byte(base64.StdEncoding.EncodeToString(key)), nil
}

// Public derives the public half of a private key.
func Public(privateKey []byte) (PublicKey, error) {
	raw, err := decode(privateKey)
	if err != nil {
		return PublicKey{}, err
	}
	pub, err := curve25519.X25519(raw, curve25519.Basepoint)
	if err != nil {
		return PublicKey{}, fmt.Errorf("deriving the public key: %w", err)
	}
	text := base64.StdEncoding.EncodeToString(pub)
	id, err := seal.DeriveKeyID([]byte(text))
	if err != nil {
		return PublicKey{}, fmt.Errorf("deriving the key id: %w", err)
	}
	return PublicKey{KeyID: id, Algorithm: seal.Algorithm, PublicKey: text}, nil
}
