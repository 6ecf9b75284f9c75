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

// MinKey is the length of the shortest key, in bytes. What is shorter can be
// guessed.
const MinKey = 16

// Keys are the keys a signature may be made with.
type Keys [][]byte

// ParseKeys reads the payload secret. The whole file is a key, with surrounding white
// space trimmed: clients that share the file sign with all of it. The file is also a
// list of keys, one a line, so that a key can be rotated, if every line is a key that
// somebody could have made for one: 16 bytes or more of 0x21 to 0x7e, not beginning
// with "-----". Empty lines and those that begin with # do not count. So a PEM or JSON
// file, or random bytes, is one key, and none of its lines is.
//
// The first line's key is first. A key of less than MinKey bytes is none, so that Keys
// may be empty.
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

// isKey says whether a line of a list is a key.
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

func onlyKey(file []byte) Keys {
	if len(file) < MinKey {
		return nil
	}
	return Keys{bytes.Clone(file)}
}

func (k Keys) add(key []byte) Keys {
	for _, have := range k {
		if bytes.Equal(have, key) {
			return k
		}
	}
	return append(k, bytes.Clone(key))
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

// Timestamp is the value of X-Build-Timestamp: Unix seconds. A message that has one is
// signed with it and a full stop before it: "1795915276." and then the message. The
// empty Timestamp is of a message that has none.
type Timestamp string

// Window is how far a timestamp may be from the clock.
const Window = 5 * time.Minute

// maxDigits is what an int64 has.
const maxDigits = 19

// Now is the timestamp of what is signed now.
func Now() Timestamp { return Timestamp(strconv.FormatInt(time.Now().Unix(), 10)) }

// ParseTimestamp reads the values of a timestamp header: none, or one within Window of
// now. Its errors are for the client: they tell nothing of any key.
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
	// Compared as numbers: the difference of two times has an end.
	if off := seconds - now.Unix(); off > int64(Window/time.Second) || off < -int64(Window/time.Second) {
		return "", fmt.Errorf("timestamp %s is not within %v of this clock, which is at %d", v, Window, now.Unix())
	}
	return Timestamp(v), nil
}

// before is what comes before a message that is signed with t.
func (t Timestamp) before() []byte {
	if t == "" {
		return nil
	}
	return []byte(t + ".")
}

// CutTimestamp cuts digits and a full stop off the beginning of a message, as a
// Timestamp has them. The rest is the message that it may be a signed form of.
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

// Sign is the header's value for body.
func Sign(key []byte, t Timestamp, body []byte) string {
	h := hmac.New(sha256.New, key)
	h.Write(t.before())
	h.Write(body)
	return prefix + hex.EncodeToString(h.Sum(nil))
}

// Verify compares mac with what every key makes of message.
func (k Keys) Verify(mac MAC, t Timestamp, message []byte) (key []byte, ok bool) {
	v := k.Verifier(t)
	v.Write(message)
	return v.Verify(mac)
}

// headLen is how much of a message a Verifier keeps: enough to see what it is.
const headLen = 1 << 10

// Verifier computes a message's MAC with every key while the message passes.
type Verifier struct {
	keys Keys
	macs []hash.Hash
	head []byte
}

// Verifier is for a message that has the timestamp t.
func (k Keys) Verifier(t Timestamp) *Verifier {
	v := &Verifier{keys: k}
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

// Head is the message's beginning, 1 KiB at most.
func (v *Verifier) Head() []byte { return v.head }

// Verify compares mac with what every key made of the message, all of them in
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
