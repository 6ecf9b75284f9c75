// Package signature makes and checks X-Build-Signature: HMAC-SHA256 of a body,
// as "sha256=" and 64 hex digits.
package signature

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"hash"
	"strings"
)

const prefix = "sha256="

// Keys are the keys a signature may be made with.
type Keys [][]byte

// ParseKeys reads the payload secret. Each of its lines is a key, trimmed, and
// so is the whole file, trimmed: with a file of several lines a key can be
// rotated, and clients that share the file sign with all of it. An empty key
// is none. The first line's key is first.
func ParseKeys(file []byte) Keys {
	var keys Keys
	add := func(key []byte) {
		key = bytes.TrimSpace(key)
		if len(key) == 0 {
			return
		}
		for _, k := range keys {
			if bytes.Equal(k, key) {
				return
			}
		}
		keys = append(keys, bytes.Clone(key))
	}
	for line := range bytes.Lines(file) {
		add(line)
	}
	add(file)
	return keys
}

// MAC is what a signature carries.
type MAC [sha256.Size]byte

// Parse reads the values of a signature header: exactly one, "sha256=" and 64
// hex digits.
func Parse(values []string) (MAC, error) {
	switch len(values) {
	case 0:
		return MAC{}, errors.New("no signature")
	case 1:
	default:
		return MAC{}, errors.New("more than one signature")
	}
	digits, ok := strings.CutPrefix(values[0], prefix)
	if !ok {
		return MAC{}, errors.New(`signature does not begin with "sha256="`)
	}
	if len(digits) != 2*sha256.Size {
		return MAC{}, errors.New("signature is not 64 hex digits")
	}
	var mac MAC
	if _, err := hex.Decode(mac[:], []byte(digits)); err != nil {
		return MAC{}, errors.New("signature is not 64 hex digits")
	}
	return mac, nil
}

// Sign is the header's value for body.
func Sign(key, body []byte) string {
	h := hmac.New(sha256.New, key)
	h.Write(body)
	return prefix + hex.EncodeToString(h.Sum(nil))
}

// Verify compares mac with what every key makes of message.
func (k Keys) Verify(mac MAC, message []byte) (key []byte, ok bool) {
	v := k.Verifier()
	v.Write(message)
	return v.Verify(mac)
}

// Verifier computes a body's MAC with every key while the body passes.
type Verifier struct {
	keys Keys
	macs []hash.Hash
}

func (k Keys) Verifier() *Verifier {
	v := &Verifier{keys: k}
	for _, key := range k {
		v.macs = append(v.macs, hmac.New(sha256.New, key))
	}
	return v
}

// Write takes the next bytes of the body. It never fails.
func (v *Verifier) Write(p []byte) (int, error) {
	for _, h := range v.macs {
		h.Write(p)
	}
	return len(p), nil
}

// Verify compares mac with what every key made of the body, all of them in
// constant time, and returns the key that made it.
func (v *Verifier) Verify(mac MAC) (key []byte, ok bool) {
	found := -1
	for i, h := range v.macs {
		found = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(mac[:], h.Sum(nil)), i, found)
	}
	if found < 0 {
		return nil, false
	}
	return v.keys[found], true
}
