package buildconfig

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"

	"handler/function/api"
	"handler/function/hosts"
)

// Git is a build context in a git repository. All its parts are checked.
type Git struct {
	Scheme string // https or http
	Host   string // in lower case, with a port unless it is the scheme's default
	Path   string // of the repository, escaped as in a URL, with its first slash
	Ref    string // branch, tag or commit; empty for the repository's default
	Dir    string // within the repository, cleaned; empty for its root
}

// Remote returns the repository's URL.
func (g *Git) Remote() string { return g.Scheme + "://" + g.Host + g.Path }

var (
	// A host name in another script has to be in its ASCII form, which is looked up.
	hostForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$`)
	pathForm = regexp.MustCompile(`^(/[A-Za-z0-9._~%+-]+)+$`)
	refForm  = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._/+@-]*$`)
	dirForm  = regexp.MustCompile(`^[^\x00-\x1f\x7f\\:#]+$`)
)

// parseGit parses https://host/org/repo.git#ref:dir. Only the parts that are checked here
// are used of the text.
func parseGit(text string) (*Git, error) {
	if len(text) > maxPath {
		return nil, fmt.Errorf("over %d bytes", maxPath)
	}
	remote, fragment, _ := strings.Cut(text, "#")
	g, err := parseRemote(remote)
	if err != nil {
		return nil, err
	}
	ref, dir, _ := strings.Cut(fragment, ":")
	if ref != "" && (!refForm.MatchString(ref) || strings.Contains(ref, "..")) {
		return nil, fmt.Errorf("%q is not a branch, tag or commit", ref)
	}
	g.Ref = ref
	g.Dir, err = parseDir(dir)
	if err != nil {
		return nil, err
	}
	return g, nil
}

// parseRemote parses a repository's URL.
func parseRemote(text string) (*Git, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, errors.New("not a URL")
	}
	switch {
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, errors.New("not an https URL")
	case u.User != nil:
		return nil, errors.New("credentials do not belong in it")
	case u.RawQuery != "" || u.ForceQuery || u.Opaque != "":
		return nil, errors.New("a URL without a query is wanted")
	}
	host, err := gitHost(u.Scheme, u.Host)
	if err != nil {
		return nil, err
	}
	escaped := u.EscapedPath()
	// RawPath is set if the path is escaped in an unusual way.
	if !pathForm.MatchString(escaped) || u.RawPath != "" || !dirForm.MatchString(u.Path) || path.Clean(u.Path) != u.Path {
		return nil, fmt.Errorf("%q is not the path of a repository", u.Path)
	}
	return &Git{Scheme: u.Scheme, Host: host, Path: escaped}, nil
}

// parseDir cleans the path of a directory in a repository. Empty is the root.
func parseDir(dir string) (string, error) {
	dir = strings.Trim(dir, "/")
	if dir == "" {
		return "", nil
	}
	if !dirForm.MatchString(dir) || slices.Contains(strings.Split(dir, "/"), "..") {
		return "", fmt.Errorf("%q is not a directory of the repository", dir)
	}
	if dir = path.Clean(dir); dir == "." {
		return "", nil
	}
	return dir, nil
}

// gitHost returns the one form of a URL's host: equal hosts are equal strings.
func gitHost(scheme, host string) (string, error) {
	h, err := hosts.Parse(host)
	if err != nil {
		return "", err
	}
	// Refused are IPv6 addresses, and whatever hosts.Parse changes beyond the case: git
	// would take "host." for another host than "host".
	if !hostForm.MatchString(h.Name) || h.String() != strings.ToLower(host) {
		return "", fmt.Errorf("%q is not a host", host)
	}
	return h.Without(hosts.DefaultPort(scheme)).String(), nil
}

// ContextHost parses an entry of AllowContext's. host is in the form of Git.Host.
func ContextHost(entry string) (scheme, host string, err error) {
	scheme, host = "https", strings.TrimPrefix(entry, "https://")
	if rest, ok := strings.CutPrefix(entry, "http://"); ok {
		scheme, host = "http", rest
	}
	host, err = gitHost(scheme, host)
	return scheme, host, err
}

// AllowContext returns an error if the context is in git and its host is not among
// entries: "host" or "host:port" for https, "http://host:port" for plain http.
func (c *Config) AllowContext(entries []string) error {
	if c.Git == nil {
		return nil
	}
	for _, entry := range entries {
		if scheme, host, err := ContextHost(entry); err == nil && scheme == c.Git.Scheme && host == c.Git.Host {
			return nil
		}
	}
	return &api.Error{Code: api.ContextForbidden, Msg: fmt.Sprintf("contexts from %s://%s are not allowed here", c.Git.Scheme, c.Git.Host)}
}

// GitCredentials returns the user and password for the repository from a file of git's
// credential store. The file has lines of https://user:password@host, or with a path, and
// then they are only for repositories at or below it. The first line that fits counts.
func (g *Git) GitCredentials(file []byte) (user, password string, ok bool) {
	for line := range strings.Lines(string(file)) {
		u, err := url.Parse(strings.TrimSpace(line))
		if err != nil || u.User == nil || u.Scheme != g.Scheme {
			continue
		}
		host, err := gitHost(u.Scheme, u.Host)
		below := strings.TrimSuffix(u.EscapedPath(), "/")
		if err != nil || host != g.Host || below != "" && g.Path != below && !strings.HasPrefix(g.Path, below+"/") {
			continue
		}
		password, _ = u.User.Password()
		return u.User.Username(), password, true
	}
	return "", "", false
}
