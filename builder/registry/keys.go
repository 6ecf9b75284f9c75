package registry

import (
	"cmp"
	"path"
	"slices"
	"strings"

	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"

	"handler/function/clouds"
)

// configKey is a key of auths or of credHelpers: "host", "host/org", or a URL of
// either. A host may have "*" for one of its labels, as Kubernetes reads it.
type configKey struct {
	text string
	host string   // as serverHost has it
	path []string // segments; none is for every repository
	rank int      // among keys for the same host and path, the lowest counts
}

func parseKey(text string) configKey {
	k := configKey{text: text}
	rest := text
	if i := strings.Index(text, "://"); i >= 0 {
		rest = text[i+len("://"):]
	}
	host, below, _ := strings.Cut(rest, "/")
	k.host = serverHost(host)
	if below = strings.Trim(below, "/"); below != "" {
		k.path = strings.Split(below, "/")
	}
	// The API's version, in what docker login once wrote.
	if len(k.path) > 0 && (k.path[0] == "v1" || k.path[0] == "v2") && (rest != text || len(k.path) == 1) {
		k.path = k.path[1:]
	}
	// Of Docker Hub's names the one that docker writes counts, of others the
	// plainest.
	if k.host == hubHost {
		k.rank = slices.Index([]string{hubKey, hubDomain, hubIndex, hubHost}, lower(text))
		if k.rank < 0 {
			k.rank = 4
		}
	} else if rest != text {
		k.rank = 1
	}
	return k
}

// serves says whether k is for a repository at host.
func (k configKey) serves(host string, repository []string) bool {
	if len(k.path) > len(repository) || !slices.Equal(k.path, repository[:len(k.path)]) {
		return false
	}
	if !strings.Contains(k.host, "*") {
		return k.host == host
	}
	want, have := strings.Split(k.host, "."), strings.Split(host, ".")
	return slices.EqualFunc(want, have, func(pattern, label string) bool {
		ok, err := path.Match(pattern, label)
		return ok && err == nil
	})
}

// precise orders keys that serve one repository: a host before a pattern, and then
// the longer path before the shorter.
func (k configKey) precise(other configKey) int {
	patterns := func(k configKey) int { return strings.Count(k.host, "*") }
	return cmp.Or(cmp.Compare(patterns(k), patterns(other)), cmp.Compare(len(other.path), len(k.path)))
}

// compare leaves no two keys equal.
func (k configKey) compare(other configKey) int {
	return cmp.Or(k.precise(other), cmp.Compare(k.rank, other.rank), cmp.Compare(k.text, other.text))
}

// best is the key of m that serves a repository at host best, among those whose
// value counts.
func best[V any](m map[string]V, host, repository string, counts func(V) bool) (key configKey, ok bool) {
	segments := strings.Split(repository, "/")
	for text, v := range m {
		k := parseKey(text)
		if counts(v) && k.serves(host, segments) && (!ok || k.compare(key) < 0) {
			key, ok = k, true
		}
	}
	return key, ok
}

// anyOf is the first key of m, in order, that is for some repository at host.
func anyOf[V any](m map[string]V, host string, counts func(V) bool) (key configKey, ok bool) {
	for text, v := range m {
		k := parseKey(text)
		if counts(v) && k.serves(host, k.path) && (!ok || k.compare(key) < 0) {
			key, ok = k, true
		}
	}
	return key, ok
}

// source says where the credentials for a repository are. It is the same for all
// repositories that have the same ones.
type source struct {
	host   string
	helper string // asked first; empty is none
	server string // what the helper is asked for
	own    bool   // the helper is named for this registry, and the file does not count
	key    string // in auths; empty is none
}

// find finds the source for a repository at host. Where that is not known, and
// empty, a source for the whole host counts, or else the first of those for a part.
func find(file *configfile.ConfigFile, host, repository string) source {
	host = serverHost(host)
	s := source{host: host, server: helperServer(host)}
	auth, inFile := best(file.AuthConfigs, host, repository, hasLogin)
	helper, named := best(file.CredentialHelpers, host, repository, func(name string) bool { return name != "" })
	guess := !inFile && !named && repository == ""
	if guess {
		auth, inFile = anyOf(file.AuthConfigs, host, hasLogin)
		helper, named = anyOf(file.CredentialHelpers, host, func(name string) bool { return name != "" })
	}
	switch {
	case named && (!inFile || helper.precise(auth) <= 0):
		s.helper, s.own = file.CredentialHelpers[helper.text], true
		if len(helper.path) > 0 && !clouds.Has(s.helper) {
			s.server = host + "/" + strings.Join(helper.path, "/")
		}
		return s
	case inFile:
		s.key = auth.text
	}
	// A global helper knows hosts alone, and a cloud's its own.
	if global := file.CredentialsStore; global != "" && (!inFile || len(auth.path) == 0 || guess) && (!clouds.Has(global) || clouds.Owns(global, host)) {
		s.helper = global
	}
	return s
}

// helperServer is the name by which a helper is asked for host.
func helperServer(host string) string {
	if host == hubHost {
		return hubKey
	}
	return host
}

func hasLogin(auth types.AuthConfig) bool {
	return auth.Username != "" || auth.IdentityToken != "" || auth.RegistryToken != ""
}
