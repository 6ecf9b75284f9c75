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

// Git is a build context in a git repository, its parts checked.
type Git struct {
	Scheme string // https or http
	Host   string // lower-case, with a port unless that is the scheme's own
	Path   string // of the repository, as a URL has it, with its first slash
	Ref    string // branch, tag or commit; empty is the repository's default
	Dir    string // within the repository, clean; empty is its root
}

// Remote is the repository's URL.
func (g *Git) Remote() string { return g.Scheme + "://" + g.Host + g.Path }

var (
	// Names in other scripts have an ASCII form, which is what is looked up.
	hostForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$`)
	pathForm = regexp.MustCompile(`^(/[A-Za-z0-9._~%+-]+)+$`)
	refForm  = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._/+@-]*$`)
	dirForm  = regexp.MustCompile(`^[^\x00-\x1f\x7f\\:#]+$`)
)

// parseGit takes https://host/org/repo.git#ref:dir apart. Nothing of the text is
// used but the parts that are checked here.
func parseGit(text string) (*Git, error) {
	if len(text) > maxPath {
		return nil, fmt.Errorf("over %d bytes", maxPath)
	}
	remote, fragment, _ := strings.Cut(text, "#")
	u, err := url.Parse(remote)
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
	g := &Git{Scheme: u.Scheme, Path: u.EscapedPath()}
	if g.Host, err = gitHost(u.Scheme, u.Host); err != nil {
		return nil, err
	}
	// A RawPath is there where the path was escaped in an unusual way.
	if !pathForm.MatchString(g.Path) || u.RawPath != "" || !dirForm.MatchString(u.Path) || path.Clean(u.Path) != u.Path {
		return nil, fmt.Errorf("%q is not the path of a repository", u.Path)
	}
	var dir string
	g.Ref, dir, _ = strings.Cut(fragment, ":")
	if g.Ref != "" && (!refForm.MatchString(g.Ref) || strings.Contains(g.Ref, "..")) {
		return nil, fmt.Errorf("%q is not a branch, tag or commit", g.Ref)
	}
	if dir = strings.Trim(dir, "/"); dir != "" {
		if !dirForm.MatchString(dir) || slices.Contains(strings.Split(dir, "/"), "..") {
			return nil, fmt.Errorf("%q is not a directory of the repository", dir)
		}
		if g.Dir = path.Clean(dir); g.Dir == "." {
			g.Dir = ""
		}
	}
	return g, nil
}

// gitHost normalises a URL's host, so that equal hosts are equal strings.
func gitHost(scheme, host string) (string, error) {
	h, err := hosts.Parse(host)
	if err != nil {
		return "", err
	}
	// An IPv6 address, or a last dot, which git would take for another host.
	if !hostForm.MatchString(h.Name) || h.String() != strings.ToLower(host) {
		return "", fmt.Errorf("%q is not a host", host)
	}
	return h.Without(hosts.DefaultPort(scheme)).String(), nil
}

// ContextHost normalises an entry of what AllowContext takes.
func ContextHost(entry string) (scheme, host string, err error) {
	scheme, host = "https", strings.TrimPrefix(entry, "https://")
	if rest, ok := strings.CutPrefix(entry, "http://"); ok {
		scheme, host = "http", rest
	}
	host, err = gitHost(scheme, host)
	return scheme, host, err
}

// AllowContext refuses a git context whose host is not among entries: "host" or
// "host:port" for https, and "http://host:port" where plain http is meant.
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

// GitCredentials finds the user and password for a repository in a file as git's
// credential store writes it: lines of https://user:password@host, with a path
// where they are for what is below it alone.
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
