package registry

// Serves says whether there may be credentials for a repository at host. named says that an
// entry is for exactly this host: a pattern and a helper for all hosts name none.
func (c *Credentials) Serves(host string) (serves, named bool, err error) {
	file, err := c.load()
	if err != nil {
		return false, false, unreadable(host, err)
	}
	var keys []string
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
	serves, named = Covers(keys, host)
	return serves || globalServes(file.CredentialsStore, serverHost(host)), named, nil
}

// Covers says whether one of keys is for a repository at host. The keys are those of "auths"
// in a Docker config.json, or hosts. named says that one is for exactly this host, and is no
// pattern.
func Covers(keys []string, host string) (covers, named bool) {
	host = serverHost(host)
	for _, text := range keys {
		k := parseKey(text)
		covers = covers || k.servesPartOf(host)
		named = named || k.host == host
	}
	return covers, named
}
