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
// either. In each label of a host, "*" stands for any text, as in Kubernetes.
type configKey struct {
	text string   // as it is written
	host string   // in serverHost's form
	path []string // segments; none for every repository
	rank int      // the lowest counts among keys for one host and path
}

// parseKey takes any text: one that is no host serves none.
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
	// docker login once wrote the API's version after the host.
	if len(k.path) > 0 && (k.path[0] == "v1" || k.path[0] == "v2") && (rest != text || len(k.path) == 1) {
		k.path = k.path[1:]
	}
	// Of Docker Hub's names, the one that docker writes counts first. Of the keys for
	// another host, one without a scheme does.
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
	return len(k.path) <= len(repository) && slices.Equal(k.path, repository[:len(k.path)]) && k.servesPartOf(host)
}

// servesPartOf says whether k is for host, or for some of its repositories.
func (k configKey) servesPartOf(host string) bool {
	if !strings.Contains(k.host, "*") {
		return k.host == host
	}
	want, have := strings.Split(k.host, "."), strings.Split(host, ".")
	return slices.EqualFunc(want, have, func(pattern, label string) bool {
		ok, err := path.Match(pattern, label)
		return ok && err == nil
	})
}

// comparePrecision orders keys that serve one repository: a host comes before a pattern,
// and a longer path before a shorter one.
func (k configKey) comparePrecision(other configKey) int {
	patterns := func(k configKey) int { return strings.Count(k.host, "*") }
	return cmp.Or(cmp.Compare(patterns(k), patterns(other)), cmp.Compare(len(other.path), len(k.path)))
}

// compare is comparePrecision with an order among keys that are equal to it.
func (k configKey) compare(other configKey) int {
	return cmp.Or(k.comparePrecision(other), cmp.Compare(k.rank, other.rank), cmp.Compare(k.text, other.text))
}

// bestKey returns the first key of m in the order of compare, among those that serve and
// have a value that counts. It is nil if there is none.
func bestKey[V any](m map[string]V, counts func(V) bool, serves func(configKey) bool) *configKey {
	var best *configKey
	for text, v := range m {
		k := parseKey(text)
		if counts(v) && serves(k) && (best == nil || k.compare(*best) < 0) {
			best = &k
		}
	}
	return best
}

// source says where the credentials for a repository are. Repositories with the same
// credentials have equal sources.
type source struct {
	host   string
	helper string // asked first; empty for none
	server string // the name that the helper is asked for
	own    bool   // the helper is named for this registry, so that auths does not count
	key    string // of auths; empty for none
}

// sourceOf returns the source for a repository at host. repository may be empty where it
// is not known. Then a source for the whole host counts, or else the first of those for a
// part of it.
func sourceOf(file *configfile.ConfigFile, host, repository string) source {
	host = serverHost(host)
	segments := strings.Split(repository, "/")
	auth, helper := keysOf(file, func(k configKey) bool { return k.serves(host, segments) })
	guessed := auth == nil && helper == nil && repository == ""
	if guessed {
		auth, helper = keysOf(file, func(k configKey) bool { return k.servesPartOf(host) })
	}
	if helper != nil && (auth == nil || helper.comparePrecision(*auth) <= 0) {
		return ownHelper(file, host, *helper)
	}
	s := source{host: host, server: helperServer(host)}
	if auth != nil {
		s.key = auth.text
	}
	// The global helper is asked for a host, not for a path: an entry of auths for this
	// path is more precise.
	if (auth == nil || len(auth.path) == 0 || guessed) && globalServes(file.CredentialsStore, host) {
		s.helper = file.CredentialsStore
	}
	return s
}

// keysOf returns the best key of auths and that of credHelpers, nil where there is none.
func keysOf(file *configfile.ConfigFile, serves func(configKey) bool) (auth, helper *configKey) {
	auth = bestKey(file.AuthConfigs, hasLogin, serves)
	helper = bestKey(file.CredentialHelpers, func(name string) bool { return name != "" }, serves)
	return auth, helper
}

// ownHelper is the source of a repository at host whose helper key names.
func ownHelper(file *configfile.ConfigFile, host string, key configKey) source {
	s := source{host: host, helper: file.CredentialHelpers[key.text], server: helperServer(host), own: true}
	// A cloud's helper is asked for a host, whatever the path.
	if len(key.path) > 0 && !clouds.Has(s.helper) {
		s.server = host + "/" + strings.Join(key.path, "/")
	}
	return s
}

// globalServes says whether the global helper, if there is one, is asked for host. A
// cloud's helper serves its own registries alone.
func globalServes(helper, host string) bool {
	return helper != "" && (!clouds.Has(helper) || clouds.Owns(helper, host))
}

// helperServer returns the name that a helper is asked for where host is meant.
func helperServer(host string) string {
	if host == hubHost {
		return hubKey
	}
	return host
}

// hasLogin says whether there are credentials in auth: where a helper has them, docker leaves
// an empty entry in auths.
func hasLogin(auth types.AuthConfig) bool {
	return auth.Username != "" || auth.IdentityToken != "" || auth.RegistryToken != ""
}
