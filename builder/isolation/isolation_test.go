package isolation_test

import (
	"strings"
	"testing"

	"handler/function/isolation"
)

func TestValuesDiffer(t *testing.T) {
	key, other := isolation.Derive([]byte("secret")), isolation.Derive([]byte("other secret"))
	secrets := func(kv ...string) map[string][]byte {
		m := make(map[string][]byte)
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = []byte(kv[i+1])
		}
		return m
	}
	seen := map[string]string{}
	for name, value := range map[string][32]byte{
		"times of a's app":              key.TimeKey("a", "docker.io/x/app"),
		"times of b's app":              key.TimeKey("b", "docker.io/x/app"),
		"times of a's api":              key.TimeKey("a", "docker.io/x/api"),
		"times with the boundary moved": key.TimeKey("ad", "ocker.io/x/app"),
		"times of a's app, another key": other.TimeKey("a", "docker.io/x/app"),
		"contents":                      key.ContentKey(),
		"contents, another key":         other.ContentKey(),
	} {
		if before, ok := seen[string(value[:])]; ok {
			t.Errorf("%s is %s", name, before)
		}
		seen[string(value[:])] = name
	}
	for name, value := range map[string]string{
		"hostname of a":                      key.Hostname("a", nil),
		"hostname of b":                      key.Hostname("b", nil),
		"hostname of a, another key":         other.Hostname("a", nil),
		"hostname of a, a secret":            key.Hostname("a", secrets("id", "value")),
		"hostname of a, another value":       key.Hostname("a", secrets("id", "valuf")),
		"hostname of a, another id":          key.Hostname("a", secrets("ie", "value")),
		"hostname of a, a boundary moved":    key.Hostname("a", secrets("idv", "alue")),
		"hostname of a, two secrets":         key.Hostname("a", secrets("id", "value", "x", "y")),
		"hostname of b, a's secret":          key.Hostname("b", secrets("id", "value")),
		"cache mounts of a":                  key.CacheMountNS("a"),
		"cache mounts of b":                  key.CacheMountNS("b"),
		"shared key of a's app":              key.SharedKey("a", "docker.io/x/app"),
		"shared key of b's app":              key.SharedKey("b", "docker.io/x/app"),
		"shared key of a's api":              key.SharedKey("a", "docker.io/x/api"),
		"shared key of a's app, another key": other.SharedKey("a", "docker.io/x/app"),
		"shared key with the boundary moved": key.SharedKey("ad", "ocker.io/x/app"),
	} {
		if before, ok := seen[value]; ok {
			t.Errorf("%s is %s", name, before)
		}
		seen[value] = name
		if len(value) > 63 || strings.Contains(value, "/") {
			t.Errorf("%s: %q cannot be a host name", name, value)
		}
	}
}

func TestValuesAreStable(t *testing.T) {
	a, b := isolation.Derive([]byte("secret")), isolation.Derive([]byte("secret"))
	secrets := map[string][]byte{"one": []byte("1"), "two": []byte("2"), "three": []byte("3")}
	for range 20 {
		if a.Hostname("t", secrets) != b.Hostname("t", secrets) {
			t.Fatal("two replicas have two host names")
		}
	}
	if a.TimeKey("t", "r") != b.TimeKey("t", "r") || a.ContentKey() != b.ContentKey() || a.SharedKey("t", "r") != b.SharedKey("t", "r") {
		t.Fatal("two replicas have two keys")
	}
}
