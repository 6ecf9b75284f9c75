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
	"fmt"
	"hash"
	"strconv"
	"strings"
	"time"
)

const prefix = "sha256="

// MinKey is the length of the shortest key, in bytes. A shorter one can be guessed.
const MinKey = 16

// Keys are the keys that a signature may be made with.
type Keys [][]byte

// ParseKeys reads the payload secret. The whole file, without the white space around it, is
// a key: clients that share the file sign with all of it.
//
// The file may also be a list of keys, one a line, so that keys can be rotated. It is a list
// if each of its lines looks like a key: 16 bytes or more of 0x21 to 0x7e that do not begin
// with "-----". Empty lines and lines that begin with # do not count. So a file of PEM, of
// JSON or of random bytes is one key, and its lines are none.
//
// The keys of the lines come first, in order, and the whole file last. A file of less than
// MinKey bytes is no key, so that Keys may be empty. list says whether the file is a list.
func ParseKeys(file []byte) (keys Keys, list bool) {
	file = bytes.TrimSpace(file)
	for line := range bytes.Lines(file) {
		line = bytes.TrimSpace(line)
		switch {
		case len(line) == 0 || line[0] == '#':
			continue
		case !isKey(line):
			return onlyKey(file), false
		}
		keys = keys.add(line)
	}
	if len(keys) == 0 || len(keys) == 1 && bytes.Equal(keys[0], file) {
		return onlyKey(file), false
	}
	return keys.add(file), true
}

// isKey says whether a line looks like a key of a list.
func isKey(line []byte) bool {
	if len(line) < MinKey || bytes.HasPrefix(line, []byte("-----")) {
		return false
	}
	for _, c := range line {
		if c < 0x21 || c > 0x7e {
			return false
		}
	}
	return true
}

// onlyKey returns the file as the only key, or none if it is too short.
func onlyKey(file []byte) Keys {
	if len(file) < MinKey {
		return nil
	}
	return Keys{bytes.Clone(file)}
}

// add returns k with key, unless it is there already.
func (k Keys) add(key []byte) Keys {
	for _, have := range k {
		if bytes.Equal(have, key) {
			return k
		}
	}
	return append(k, bytes.Clone(key))
}

// MAC is the value of a signature.
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

// Timestamp is the value of X-Build-Timestamp: Unix seconds, such as "1795915276". What is
// signed then is "1795915276." and the message after it. An empty Timestamp is for a message
// without one.
type Timestamp string

// Window is how far a timestamp may be from the clock, on either side.
const Window = 5 * time.Minute

// maxDigits is how many digits an int64 can have.
const maxDigits = 19

// Now returns the timestamp for a message that is signed now.
func Now() Timestamp { return Timestamp(strconv.FormatInt(time.Now().Unix(), 10)) }

// ParseTimestamp reads the values of a timestamp header: none, or one within Window of
// now. Its errors may be shown to the client, as they depend on no key.
func ParseTimestamp(values []string, now time.Time) (Timestamp, error) {
	switch len(values) {
	case 0:
		return "", nil
	case 1:
	default:
		return "", errors.New("more than one timestamp")
	}
	v := values[0]
	if len(v) == 0 || len(v) > maxDigits || strings.Trim(v, "0123456789") != "" {
		return "", fmt.Errorf("timestamp %.40q is not Unix seconds", v)
	}
	seconds, err := strconv.ParseInt(v, 10, 64)
	if err != nil {
		return "", fmt.Errorf("timestamp %q is not Unix seconds", v)
	}
	// Numbers are compared, since the difference of two times can be too large for a
	// Duration.
	if off := seconds - now.Unix(); off > int64(Window/time.Second) || off < -int64(Window/time.Second) {
		return "", fmt.Errorf("timestamp %s is not within %v of this clock, which is at %d", v, Window, now.Unix())
	}
	return Timestamp(v), nil
}

// before returns what is signed before a message that has the timestamp t.
func (t Timestamp) before() []byte {
	if t == "" {
		return nil
	}
	return []byte(t + ".")
}

// CutTimestamp cuts digits and a full stop off the beginning of a message. If they are there,
// the message could also be read as rest with a timestamp before it.
func CutTimestamp(message []byte) (rest []byte, found bool) {
	n := 0
	for n < len(message) && '0' <= message[n] && message[n] <= '9' {
		n++
	}
	if n == 0 || n == len(message) || message[n] != '.' {
		return message, false
	}
	return message[n+1:], true
}

// Sign returns the value of the signature header for body.
func Sign(key []byte, t Timestamp, body []byte) string {
	h := hmac.New(sha256.New, key)
	h.Write(t.before())
	h.Write(body)
	return prefix + hex.EncodeToString(h.Sum(nil))
}

// Verify says whether one of the keys makes mac of message, and returns the place of that key in
// k.
func (k Keys) Verify(mac MAC, t Timestamp, message []byte) (place int, ok bool) {
	v := k.Verifier(t)
	v.Write(message)
	return v.Verify(mac)
}

// headLen is how many of a message's first bytes a Verifier keeps.
const headLen = 1 << 10

// Verifier computes a message's MAC with every key while the message passes.
type Verifier struct {
	macs []hash.Hash // by the place of the key
	head []byte
}

// Verifier returns a Verifier of a message that has the timestamp t.
func (k Keys) Verifier(t Timestamp) *Verifier {
	v := &Verifier{}
	for _, key := range k {
		h := hmac.New(sha256.New, key)
		h.Write(t.before())
		v.macs = append(v.macs, h)
	}
	return v
}

// Write takes the next bytes of the message. It never fails.
func (v *Verifier) Write(p []byte) (int, error) {
	v.head = append(v.head, p[:min(len(p), headLen-len(v.head))]...)
	for _, h := range v.macs {
		h.Write(p)
	}
	return len(p), nil
}

// Head returns the message's beginning, 1 KiB at most.
func (v *Verifier) Head() []byte { return v.head }

// Verify says whether one of the keys made mac of the message, and returns the place of that key
// among the keys, or -1. It compares the values of all keys, in constant time.
func (v *Verifier) Verify(mac MAC) (place int, ok bool) {
	place = -1
	for i, h := range v.macs {
		place = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(mac[:], h.Sum(nil)), i, place)
	}
	return place, place >= 0
}
