package jetstream

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"slices"
	"strconv"
	"strings"
)

// Subjects. Every token that says something is a keyed hash: call ids can have dots and
// wildcards in them, and nobody without the key learns whose builds there are.
//
//	builder.rec.<key>.<tenant>.<call>.<attempt>.<kind>  records
//	builder.rec.<key>.once.<once>                       cancellations that were used
//	builder.log.<key>.<tenant>.<call>.<attempt>         batches of lines
//	builder.beat.<key>.<process>                        heartbeats, in no stream
//	builder.cancel.<key>.<process>                      requests, in no stream
const (
	recordSubjects = "builder.rec.>"
	logSubjects    = "builder.log.>"
	beatSubjects   = "builder.beat.*.*"
)

// Kinds of a build's record. Each has the whole record. A later kind in this list wins, in whatever
// order they were stored, so a payload that somebody sends again changes nothing. But a running
// record of a later turn wins over a lost one.
const (
	running = "b" // by the owner, while it runs
	lost    = "l" // by one of the others, when the owner's heartbeat has ended
	ended   = "e" // by the owner; written once
)

// key is what is derived from one line of the root secret.
type key struct {
	id      string // in the subjects
	names   []byte // for the hashes in the subjects
	logs    []byte // for the key of each build's log
	records cipher.AEAD
	control cipher.AEAD // heartbeats and cancellations
}

// ring is the keys of all lines. New payloads are sealed with the first. The others open what
// was sealed before the line was replaced.
type ring struct {
	keys []*key
	byID map[string]*key
}

// newRing makes a ring. Keys that an older one has stay the same, because a place is compared by
// its key. old may be nil.
func newRing(roots [][]byte, old *ring) (*ring, error) {
	r := &ring{byID: make(map[string]*key)}
	for _, root := range roots {
		k, err := newKey(root)
		if err != nil {
			return nil, err
		}
		if old != nil && old.byID[k.id] != nil {
			k = old.byID[k.id]
		}
		if r.byID[k.id] == nil {
			r.keys, r.byID[k.id] = append(r.keys, k), k
		}
	}
	if len(r.keys) == 0 {
		return nil, errors.New("deriving the keys of records: there is no root secret")
	}
	return r, nil
}

func newKey(root []byte) (*key, error) {
	prk, err := hkdf.Extract(sha256.New, root, []byte("function builder records v1"))
	if err != nil {
		return nil, err
	}
	k := &key{id: hex.EncodeToString(expand(prk, 8, "id")), names: expand(prk, 32, "names"), logs: expand(prk, 32, "logs")}
	k.records, k.control = newAEAD(expand(prk, 32, "records")), newAEAD(expand(prk, 32, "control"))
	return k, nil
}

// expand derives n bytes. The parts have their lengths before them, so that two lists of parts
// are never the same bytes.
func expand(prk []byte, n int, parts ...string) []byte {
	var info []byte
	for _, p := range parts {
		info = binary.AppendUvarint(info, uint64(len(p)))
		info = append(info, p...)
	}
	out, err := hkdf.Expand(sha256.New, prk, string(info), n)
	if err != nil {
		panic(err) // n is far below HKDF's limit
	}
	return out
}

func newAEAD(secret []byte) cipher.AEAD {
	block, err := aes.NewCipher(secret)
	if err != nil {
		panic(err) // secret has 32 bytes
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	return aead
}

// logAEAD is for one build's log. A key of its own keeps the number of random nonces of one key
// far below 2^32, where AES-GCM stops being safe.
func (k *key) logAEAD(subject string) cipher.AEAD { return newAEAD(expand(k.logs, 32, subject)) }

// seal encrypts a payload for one subject.
func seal(aead cipher.AEAD, subject string, plain []byte) []byte {
	return aead.Seal(make([]byte, 0, len(plain)+aead.Overhead()), nil, plain, []byte(subject))
}

// open is the reverse of seal. It fails for what was sealed for another subject.
func open(aead cipher.AEAD, subject string, sealed []byte) ([]byte, error) {
	return aead.Open(nil, nil, sealed, []byte(subject))
}

func (k *key) tenant(id string) string { return hex.EncodeToString(expand(k.names, 10, "tenant", id)) }
func (k *key) call(id string) string   { return hex.EncodeToString(expand(k.names, 10, "call", id)) }
func (k *key) once(text string) string {
	return "builder.rec." + k.id + ".once." + hex.EncodeToString(expand(k.names, 16, "once", text))
}
func (k *key) beat(process string) string   { return "builder.beat." + k.id + "." + process }
func (k *key) cancel(process string) string { return "builder.cancel." + k.id + "." + process }

// place is where a build is kept.
type place struct {
	key          *key
	tenant, call string // hashes
	attempt      int
}

func (p place) base() string {
	return "builder.rec." + p.key.id + "." + p.tenant + "." + p.call + "." + strconv.Itoa(p.attempt)
}

func (p place) record(kind string) string { return p.base() + "." + kind }

func (p place) log() string {
	return "builder.log." + p.key.id + "." + p.tenant + "." + p.call + "." + strconv.Itoa(p.attempt)
}

// parse reads the subject of a record. It fails for subjects of keys that the ring lacks.
func (r *ring) parse(subject string) (p place, kind string, ok bool) {
	var f [7]string
	parts := 0
	for part := range strings.SplitSeq(subject, ".") {
		if parts == len(f) {
			return place{}, "", false
		}
		f[parts] = part
		parts++
	}
	if parts != len(f) || r.byID[f[2]] == nil || !slices.Contains([]string{running, lost, ended}, f[6]) {
		return place{}, "", false
	}
	n, err := strconv.Atoi(f[5])
	if err != nil || n < 1 {
		return place{}, "", false
	}
	return place{r.byID[f[2]], f[3], f[4], n}, f[6], true
}
