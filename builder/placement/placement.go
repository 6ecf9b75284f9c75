// Package placement orders a pool's daemons for a build by rendezvous hashing. Every replica
// of the function comes to the same order without asking another one. If one of n daemons
// comes or goes, the first daemon changes for about one key in n, and stays for the others.
package placement

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"slices"
)

// Order returns the nodes in the order in which builds with this key should try them. The
// first has the key's cache, as long as builds go to the first. Order costs a SHA-256 of some
// tens of bytes for each node, and keeps no state.
//
// Thaler and Ravishankar, "Using name-based mappings to increase hit rates",
// IEEE/ACM Transactions on Networking 6(1), 1998.
func Order(key string, nodes []string) []string {
	scores := make(map[string]uint64, len(nodes))
	for _, node := range nodes {
		scores[node] = score(key, node)
	}
	return slices.SortedFunc(slices.Values(nodes), func(a, b string) int {
		// The names decide between equal scores, so that all replicas agree.
		return cmp.Or(cmp.Compare(scores[b], scores[a]), cmp.Compare(a, b))
	})
}

// score is a hash of key and node. The key's length keeps two pairs from being the same
// bytes.
func score(key, node string) uint64 {
	data := binary.BigEndian.AppendUint64(nil, uint64(len(key)))
	sum := sha256.Sum256(append(append(data, key...), node...))
	return binary.BigEndian.Uint64(sum[:8])
}
