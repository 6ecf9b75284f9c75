package registry

import "slices"

// Serves says whether there may be credentials for a repository at host.
func (c *Credentials) Serves(host string) (bool, error) {
	keys, store, err := c.keys(host)
	if err != nil {
		return false, err
	}
	return globalServes(store, serverHost(host)) || MayServe(keys, host), nil
}

// Names says whether the operator has named host: with an entry of the config for exactly this
// host, and no pattern, or in Config.Mirrors.
func (c *Credentials) Names(host string) (bool, error) {
	keys, _, err := c.keys(host)
	if err != nil {
		return false, err
	}
	return c.mirrors[serverHost(host)] != nil || Covers(keys, host), nil
}

// keys are those of the config that have a value, and its global helper.
func (c *Credentials) keys(host string) (keys []string, store string, err error) {
	file, err := c.load()
	if err != nil {
		return nil, "", unreadable(host, err)
	}
	for key, auth := range file.AuthConfigs {
		if hasLogin(auth) {
			keys = append(keys, key)
		}
	}
	for key, helper := range file.CredentialHelpers {
		if helper != "" {
			keys = append(keys, key)
		}
	}
	return keys, file.CredentialsStore, nil
}

// Covers says whether one of keys, as "auths" in a Docker config.json has them, is for exactly
// this host or for a path there. A pattern is not.
func Covers(keys []string, host string) bool {
	host = serverHost(host)
	return slices.ContainsFunc(keys, func(key string) bool { return parseKey(key).host == host })
}

// MayServe says whether one of keys, as "auths" in a Docker config.json has them, is for a
// repository at host. A pattern counts.
func MayServe(keys []string, host string) bool {
	host = serverHost(host)
	return slices.ContainsFunc(keys, func(key string) bool { return parseKey(key).servesPartOf(host) })
}
