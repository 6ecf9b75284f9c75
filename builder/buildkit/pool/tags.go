package pool

import (
	"context"
	"encoding/hex"
	"maps"
	"strings"
	"sync"
)

// TagLen is the length of each tag, in hex digits.
const TagLen = 20

// Tags say whose a build is, in the Ref of each of its attempts and parts, so that every
// process can count what a tenant has on the daemons. Each is TagLen hex digits. The zero Tags
// are of a build without a tenant.
type Tags struct {
	Tenant string
	Build  string // the same for all attempts and parts of one build
}

// Ref is ref with the tags at its end. For example the Ref 1fx2ex0 of the tenant 3a and the build
// 4b becomes 1fx2ex0x3ax4b.
func (t Tags) Ref(ref string) string {
	if t == (Tags{}) {
		return ref
	}
	return ref + "x" + t.Tenant + "x" + t.Build
}

// tagsOf are the tags at the end of a Ref. ok is false if it ends otherwise. No tag has an x in it.
func tagsOf(ref string) (t Tags, ok bool) {
	parts := strings.Split(ref, "x")
	if len(parts) < 3 {
		return Tags{}, false
	}
	last := parts[len(parts)-2:]
	return Tags{Tenant: last[0], Build: last[1]}, isTag(last[0]) && isTag(last[1])
}

func isTag(s string) bool {
	_, err := hex.DecodeString(s)
	return len(s) == TagLen && err == nil
}

// Running asks all daemons for the builds that they have, and returns the tags of these, each
// once. It leaves out daemons that do not answer.
func (p *Pool) Running(ctx context.Context) map[Tags]bool {
	all := make(map[Tags]bool)
	var mu sync.Mutex
	p.each(ctx, p.list(ctx), func(d *Daemon, c *conn) {
		// A daemon that is gone fails its next build too, and says why. The builds of one that is
		// slow are counted the next time.
		tags, _ := d.count(ctx, c)
		mu.Lock()
		defer mu.Unlock()
		maps.Copy(all, tags)
	})
	return all
}
