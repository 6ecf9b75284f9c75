package registry

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"handler/function/api"
)

// scope is a right that a challenge asks for, such as "repository:team/app:pull,push".
type scope struct {
	resource string // "repository:team/app"
	kind     string // "repository"
	name     string // "team/app"
	actions  string // "pull,push"
}

func parseScope(text string) (s scope, ok bool) {
	colon := strings.LastIndex(text, ":")
	if colon < 0 {
		return scope{}, false
	}
	s.resource, s.actions = text[:colon], text[colon+1:]
	s.kind, s.name, ok = strings.Cut(s.resource, ":")
	// "repository(plugin)" is a repository as well.
	s.kind, _, _ = strings.Cut(s.kind, "(")
	return s, ok
}

// permit returns the part of scopes that this build may have at host: to pull from any
// repository, and to push to its own. For a build that pushes to team/app
//
//	repository:team/app:pull,push      stays
//	repository:other/base:pull,push    becomes repository:other/base:pull
//	registry:catalog:*                 is left out
//
// It is an error if nothing stays of what was asked for.
func (g *Grant) permit(host string, scopes []string) ([]string, error) {
	var permitted []string
	for _, list := range scopes {
		for _, text := range strings.Fields(list) {
			s, ok := parseScope(text)
			if !ok || s.kind != "repository" {
				continue
			}
			_, ours := g.pushes[serverHost(host)+"/"+s.name]
			var actions []string
			for action := range strings.SplitSeq(s.actions, ",") {
				if action == "pull" || action == "push" && ours {
					actions = append(actions, action)
				} else if action == "push" {
					g.noteOther(serverHost(host), s.name)
				}
			}
			if len(actions) > 0 {
				slices.Sort(actions)
				permitted = append(permitted, s.resource+":"+strings.Join(slices.Compact(actions), ","))
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

// noteOther notes for hint that a challenge of host wants the right to push to name,
// which this build does not push to. Usually name is of an image that the daemon pulls
// from. If it ends as the repository does that this build pushes to, it may be the token
// service's name for that repository: such a name replaces any other.
func (g *Grant) noteOther(host, name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	image := strings.Split(g.first[host], "/")
	alike := func(name string) bool { return sameEnd(image, strings.Split(name, "/")) > 0 }
	if g.other[host] == "" || alike(name) && !alike(g.other[host]) {
		g.other[host] = name
	}
}

// repository returns the repository whose credentials a token for these scopes is
// fetched with: a token is one user's. It is the one that is pushed to, if there is one.
// Else it is the first that no token was for yet: the daemon asks for the scopes that it
// already has together with the new one.
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
	var pushed, fresh, first string
	for _, text := range scopes {
		s, _ := parseScope(text)
		name, ours := s.name, false
		if repository, ok := g.pushes[host+"/"+s.name]; ok {
			name, ours = repository, true
		}
		if ours && strings.Contains(s.actions, "push") && pushed == "" {
			pushed = name
		}
		if !known[name] && fresh == "" {
			fresh = name
		}
		if first == "" {
			first = name
		}
	}
	repository := cmp.Or(pushed, fresh, first)
	g.wanted[set] = repository
	return repository
}

// sharing returns those of scopes whose repositories have the same owner as repository: a token
// is one user's, and nobody's rights are mixed with another's.
func (g *Grant) sharing(host, repository string, scopes []string) []string {
	owner := g.owner(host, repository)
	return slices.DeleteFunc(slices.Clone(scopes), func(text string) bool {
		s, _ := parseScope(text)
		return g.owner(host, s.name) != owner
	})
}

// Hints returns, by host, what the error of a denied push can say about its cause.
func (g *Grant) Hints() map[string]string {
	hints := make(map[string]string)
	for host := range g.first {
		if h := g.hint(host); h != "" {
			hints[host] = h
		}
	}
	return hints
}

// hint says which entry token_paths may lack, if the token service of host named another
// repository than the image does. It is the end of a message.
//
// For the image team/local/app and the token service's name prod/app, both end in app,
// and the entry is "host/team/local=prod".
func (g *Grant) hint(host string) string {
	host = serverHost(host)
	g.mu.Lock()
	defer g.mu.Unlock()
	name, repository := g.other[host], g.first[host]
	if name == "" || repository == "" {
		return ""
	}
	image, service := strings.Split(repository, "/"), strings.Split(name, "/")
	n := sameEnd(image, service)
	entry := strings.Join(append([]string{host}, image[:len(image)-n]...), "/") + "=" + strings.Join(service[:len(service)-n], "/")
	return fmt.Sprintf("; its token service asks for %q where the image is %q: if these are the same, token_paths needs %q", name, repository, entry)
}

// sameEnd returns how many segments a and b have in common at their ends.
func sameEnd(a, b []string) int {
	n := 0
	for n < min(len(a), len(b)) && a[len(a)-1-n] == b[len(b)-1-n] {
		n++
	}
	return n
}
