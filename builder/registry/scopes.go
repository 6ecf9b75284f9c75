package registry

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"handler/function/api"
)

// permit leaves of scopes what this build may do at host.
func (g *Grant) permit(host string, scopes []string) ([]string, error) {
	var permitted []string
	for _, list := range scopes {
		for _, scope := range strings.Fields(list) {
			resource, actions, ok := cutLast(scope, ":")
			kind, name, ok2 := strings.Cut(resource, ":")
			// "repository(plugin)" is a repository as well.
			if kind, _, _ = strings.Cut(kind, "("); !ok || !ok2 || kind != "repository" {
				continue
			}
			var may []string
			for action := range strings.SplitSeq(actions, ",") {
				_, mine := g.pushes[serverHost(host)+"/"+name]
				if action == "pull" || action == "push" && mine {
					may = append(may, action)
				} else if action == "push" {
					g.elsewhere(serverHost(host), name)
				}
			}
			if len(may) > 0 {
				slices.Sort(may)
				permitted = append(permitted, resource+":"+strings.Join(slices.Compact(may), ","))
			}
		}
	}
	if len(permitted) == 0 && len(scopes) > 0 {
		return nil, &api.Error{
			Code: api.RegistryDenied,
			Msg:  fmt.Sprintf("registry %s: it asks for more than this build may do there: %q%s", host, strings.Join(scopes, " "), g.hint(host)),
		}
	}
	slices.Sort(permitted)
	return slices.Compact(permitted), nil
}

// elsewhere notes that host wants a right to push to a repository that this build
// does not push to. It may be the one of another image, which the daemon pulls: one
// whose name ends as that of the image does tells more.
func (g *Grant) elsewhere(host, name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	image := strings.Split(g.first[host], "/")
	alike := func(name string) bool { return sameEnd(image, strings.Split(name, "/")) > 0 }
	if g.other[host] == "" || alike(name) && !alike(g.other[host]) {
		g.other[host] = name
	}
}

// repository is the one that a token for these scopes is for, since it can be had
// with one user's credentials only: the one that is pushed to, or the one that is
// new, because the daemon asks for what it has along with it.
func (g *Grant) repository(host string, scopes []string) string {
	host = serverHost(host)
	set := host + " " + strings.Join(scopes, " ")
	g.mu.Lock()
	defer g.mu.Unlock()
	if repository, ok := g.wanted[set]; ok {
		return repository
	}
	known := make(map[string]bool)
	for s, repository := range g.wanted {
		if strings.HasPrefix(s, host+" ") {
			known[repository] = true
		}
	}
	var pushed, fresh, any string
	for _, scope := range scopes {
		resource, actions, _ := cutLast(scope, ":")
		_, name, _ := strings.Cut(resource, ":")
		own, mine := g.pushes[host+"/"+name]
		if mine {
			name = own
		}
		if mine && strings.Contains(actions, "push") && pushed == "" {
			pushed = name
		}
		if !known[name] && fresh == "" {
			fresh = name
		}
		if any == "" {
			any = name
		}
	}
	repository := cmp.Or(pushed, fresh, any)
	g.wanted[set] = repository
	return repository
}

// Hints are what to say of a push that was denied, by the server's host.
func (g *Grant) Hints() map[string]string {
	hints := make(map[string]string)
	for host := range g.first {
		if h := g.hint(host); h != "" {
			hints[host] = h
		}
	}
	return hints
}

// hint says that a token service named another path than the image's, if it did.
func (g *Grant) hint(host string) string {
	host = serverHost(host)
	g.mu.Lock()
	defer g.mu.Unlock()
	name, repository := g.other[host], g.first[host]
	if name == "" || repository == "" {
		return ""
	}
	image, token := strings.Split(repository, "/"), strings.Split(name, "/")
	n := sameEnd(image, token)
	entry := strings.Join(append([]string{host}, image[:len(image)-n]...), "/") + "=" + strings.Join(token[:len(token)-n], "/")
	return fmt.Sprintf("; its token service asks for %q where the image is %q: if these are the same, token_paths needs %q", name, repository, entry)
}

// sameEnd is how many segments a and b have in common at their ends.
func sameEnd(a, b []string) int {
	n := 0
	for n < min(len(a), len(b)) && a[len(a)-1-n] == b[len(b)-1-n] {
		n++
	}
	return n
}

func cutLast(s, sep string) (before, after string, ok bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}
