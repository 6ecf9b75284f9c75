// Package isolation makes the values that keep builds apart on a daemon that they share.
// Each is an HMAC under a key that is derived from the payload secret. RUN steps and strangers
// do not have it, so they can neither guess a value nor choose a collision. Everybody who has
// the secret can compute all values.
//
// They are needed because of what BuildKit compares. It takes a context's file for unchanged
// if its path, size, time and mode are. It takes a RUN step for the same if its command is,
// whatever secrets it reads. And it knows a cache mount by its id alone. Each method says
// what its value is for.
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

// Derive makes a Key from the payload secret's first key. Replicas that share the secret
// share the cache. When that key changes, the cache begins empty.
func Derive(payloadSecret []byte) Key {
	return Key(sum(payloadSecret, "function builder isolation v1"))
}

// ContentKey is the key for the hashes of files' contents. It is the same for all tenants:
// contents are hashed while they arrive, before the config says whose they are. No build
// sees these hashes.
func (k Key) ContentKey() [32]byte {
	return [32]byte(sum(k[:], "content"))
}

// TimeKey is the key for the hashes of files' contents that become part of the files' times.
// RUN steps can read these times. Builds that share a SharedKey have the same TimeKey.
func (k Key) TimeKey(tenant, repository string) [32]byte {
	return [32]byte(sum(k[:], "times", tenant, repository))
}

// SharedKey names the directory on the daemon that a context is synced into. There is one
// for each repository, and not for each tag: faas-cli can make a new tag for each build,
// and each build would find an empty directory.
func (k Key) SharedKey(tenant, repository string) string {
	return hex.EncodeToString(sum(k[:], "shared key", tenant, repository)[:20])
}

// Hostname is the host name of a build's RUN steps, and so a part of their cache keys: the
// result of a step never serves a build of another tenant or with other secrets. It has 40
// hex digits; a host name can have 63 characters.
func (k Key) Hostname(tenant string, secrets map[string][]byte) string {
	parts := []string{"hostname", tenant}
	for _, id := range slices.Sorted(maps.Keys(secrets)) {
		parts = append(parts, id, string(secrets[id]))
	}
	return hex.EncodeToString(sum(k[:], parts...)[:20])
}

// CacheMountNS is the namespace of a tenant's cache mounts. It has no slash in it: BuildKit
// puts one between it and the mount's id.
func (k Key) CacheMountNS(tenant string) string {
	return hex.EncodeToString(sum(k[:], "cache mounts", tenant)[:20])
}

// CallName names the builds of one call id that were signed with one key. It has 20 hex
// digits.
func (k Key) CallName(tenant string, signedWith []byte, id string) string {
	return hex.EncodeToString(sum(k[:], "call", tenant, string(signedWith), id)[:10])
}

// BodyName names a request's body. It tells the builds of one call id apart. It has 20 hex
// digits.
func (k Key) BodyName(tenant string, body [sha256.Size]byte) string {
	return hex.EncodeToString(sum(k[:], "body", tenant, string(body[:]))[:10])
}

// sum returns the HMAC of the parts. Each has its length before it, so that two lists of
// parts are never the same bytes.
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
