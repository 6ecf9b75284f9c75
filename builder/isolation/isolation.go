// Package isolation makes the values that keep one build apart from another on
// a daemon they share. Each is an HMAC under a key that no client has, so that
// none can be guessed or aimed at. What each is for stands at its method; the
// traps behind them are BuildKit's: it compares a context's files by path, size,
// time and mode, a RUN step's result by its command and not by the secrets it
// read, and a cache mount by its id.
package isolation

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"maps"
	"slices"
)

// Key is the root of every value here.
type Key [32]byte

// Derive makes a Key of the payload secret's first key: replicas that share the
// secret share the cache. Rotating that key begins with a cold one.
func Derive(payloadSecret []byte) Key {
	return Key(sum(payloadSecret, "function builder isolation v1"))
}

// ContentKey keys the hashes of files' contents. It is everybody's: contents are hashed
// while they arrive, before the config says whose they are. No build sees these hashes.
func (k Key) ContentKey() [32]byte {
	return [32]byte(sum(k[:], "content"))
}

// TimeKey is the key that carries files' contents into their times, which RUN steps can
// read. It is that of the builds that share a SharedKey.
func (k Key) TimeKey(tenant, repository string) [32]byte {
	return [32]byte(sum(k[:], "times", tenant, repository))
}

// SharedKey names the directory on the daemon that a context is synced into.
// It is the repository's, without a tag: faas-cli's tags can be of one build
// alone, and the next build would find nothing to compare with.
func (k Key) SharedKey(tenant, repository string) string {
	return hex.EncodeToString(sum(k[:], "shared key", tenant, repository)[:20])
}

// Hostname is a RUN step's host name, and so part of its cache key: no result
// of one tenant's, or of one secret's, serves a build of another. 40 hex
// digits, within the 63 characters that a host name can have.
func (k Key) Hostname(tenant string, secrets map[string][]byte) string {
	parts := []string{"hostname", tenant}
	for _, id := range slices.Sorted(maps.Keys(secrets)) {
		parts = append(parts, id, string(secrets[id]))
	}
	return hex.EncodeToString(sum(k[:], parts...)[:20])
}

// CacheMountNS sets a tenant's cache mounts apart. It holds no slash: BuildKit
// joins it and the mount's id with one.
func (k Key) CacheMountNS(tenant string) string {
	return hex.EncodeToString(sum(k[:], "cache mounts", tenant)[:20])
}

// CallName names the builds of a call id for whoever has the key that signed
// them. 20 hex digits.
func (k Key) CallName(tenant string, signedWith []byte, id string) string {
	return hex.EncodeToString(sum(k[:], "call", tenant, string(signedWith), id)[:10])
}

// BodyName tells builds of one call id apart. 20 hex digits.
func (k Key) BodyName(tenant string, body [sha256.Size]byte) string {
	return hex.EncodeToString(sum(k[:], "body", tenant, string(body[:]))[:10])
}

// sum is the HMAC of the parts, each with its length before it, so that no two
// lists of parts are one string.
func sum(key []byte, parts ...string) []byte {
	h := hmac.New(sha256.New, key)
	for _, p := range parts {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write([]byte(p))
	}
	return h.Sum(nil)
}
