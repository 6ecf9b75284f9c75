package pool

import (
	"strings"
	"testing"
)

// TestTags reads the tags that Ref writes, and none out of a Ref that has none.
func TestTags(t *testing.T) {
	tags := Tags{Tenant: strings.Repeat("3a", TagLen/2), Build: strings.Repeat("4b", TagLen/2)}
	for _, ref := range []string{"", "abc", "1fx2ex0", "xx"} {
		if got, ok := tagsOf(tags.Ref(ref)); !ok || got != tags {
			t.Errorf("%q: %+v, %v", tags.Ref(ref), got, ok)
		}
		if got, ok := tagsOf(new(Tags).Ref(ref)); ok {
			t.Errorf("%q without tags: %+v", ref, got)
		}
	}
	for _, ref := range []string{
		tags.Tenant + "x" + tags.Build,
		"1fx" + tags.Tenant[2:] + "x" + tags.Build,
		"1fx" + tags.Tenant + "x" + tags.Build + "0",
		"1fx" + tags.Tenant + "x" + strings.Repeat("g", TagLen),
	} {
		if got, ok := tagsOf(ref); ok {
			t.Errorf("%q: %+v", ref, got)
		}
	}
}
