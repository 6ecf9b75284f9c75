package tenants

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"go.yaml.in/yaml/v3"

	"handler/function/buildconfig"
	"handler/function/hosts"
	"handler/function/signature"
)

// keys reads the keys of a tenant or of the operator.
func (r *reader) keys(v value) []Key {
	var list []Key
	lines := make(map[string]int)
	v.list(func(one value) {
		k := r.key(one)
		if line := lines[k.ID]; line > 0 && k.ID != "" {
			one.at("id").wrong("the key in line %d has this id", line)
		}
		lines[k.ID] = one.node.Line
		list = append(list, k)
	})
	if len(list) > maxKeys {
		v.wrong("over %d keys: each body is hashed with as many keys as the tenant with the most has", maxKeys)
	}
	return some(v, "keys", list)
}

// maxKeys of one tenant. Two are enough to rotate.
const maxKeys = 8

func (r *reader) key(v value) Key {
	var k Key
	v.secret = true
	has := v.object(map[string]func(value){
		"id":     func(v value) { k.ID = v.id() },
		"secret": func(v value) { k.Secret = r.secret(v) },
		"until":  func(v value) { k.Until = v.time() },
	})
	v.need(has, "id", "secret")
	return k
}

// secret is a key as clients read it from a file: without the white space around it.
func (r *reader) secret(v value) []byte {
	s, ok := v.text()
	if !ok {
		return nil
	}
	secret := []byte(s)
	switch {
	case len(bytes.TrimSpace(secret)) < len(secret):
		v.wrong("there is white space around it, which clients cut off")
	case len(secret) < signature.MinKey:
		v.wrong("it has %d bytes: a key has %d or more", len(secret), signature.MinKey)
	case bytes.Equal(secret, r.root):
		v.wrong("it is the first line of the payload secret: what keeps tenants apart is derived from that line")
	case r.once(v, "key", s):
		return secret
	}
	return nil
}

// registry is "builder", or an object with nothing but auths. Credential helpers are refused:
// they would log in as the builder.
func (v value) registry() Registry {
	const want = "builder, or an object with auths"
	if v.node.Kind == yaml.ScalarNode {
		s, ok := v.scalar(want, "!!str")
		if ok && s != "builder" {
			v.wrong("want %s", want)
		}
		return Registry{Builder: ok && s == "builder"}
	}
	v.secret = true
	auths := make(map[string]login)
	has := v.object(map[string]func(value){"auths": func(v value) {
		v.entries(func(key, one value) {
			name := key.node.Value
			if err := registryKey(name); err != nil {
				key.wrong("a key is not a registry such as registry.example.com, or a part of one")
				return
			}
			one.path += fmt.Sprintf("[%q]", name)
			auths[name] = one.login()
		})
		if v.node.Kind == yaml.MappingNode && len(v.node.Content) == 0 {
			v.wrong("there are no logins in it")
		}
	}})
	v.need(has, "auths")
	config, err := json.Marshal(map[string]any{"auths": auths})
	if err != nil {
		v.wrong("writing it as JSON: %v", err)
	}
	return Registry{Config: config}
}

// registryKey wants a key of auths: a host or a part of a registry, in which * stands for a
// label of the host, or a URL of either.
func registryKey(name string) error {
	rest := strings.TrimPrefix(strings.TrimPrefix(name, "http://"), "https://")
	host, path, _ := strings.Cut(rest, "/")
	if strings.ContainsAny(path, " \t\r\n\"'{}:") {
		return errors.New("not a path")
	}
	_, err := hosts.Parse(strings.ReplaceAll(host, "*", "x"))
	return err
}

// login is an entry of auths, with the keys that docker reads.
type login struct {
	Username      string `json:"username,omitempty"`
	Password      string `json:"password,omitempty"`
	Auth          string `json:"auth,omitempty"`
	IdentityToken string `json:"identitytoken,omitempty"`
	RegistryToken string `json:"registrytoken,omitempty"`
}

func (v value) login() login {
	var l login
	text := func(into *string) func(value) {
		return func(v value) { *into, _ = v.text() }
	}
	has := v.object(map[string]func(value){
		"username":      text(&l.Username),
		"password":      text(&l.Password),
		"auth":          func(v value) { l.Auth = v.auth() },
		"identitytoken": text(&l.IdentityToken),
		"registrytoken": text(&l.RegistryToken),
	})
	switch {
	case has["username"] || has["password"]:
		v.need(has, "username", "password")
	case v.node.Kind == yaml.MappingNode && len(v.node.Content) == 0:
		v.wrong("there is no login in it")
	}
	return l
}

// auth is a user name and a password, as docker writes them.
func (v value) auth() string {
	s, ok := v.text()
	if !ok {
		return ""
	}
	plain, err := base64.StdEncoding.DecodeString(s)
	if user, _, found := bytes.Cut(plain, []byte(":")); err != nil || !found || len(user) == 0 {
		v.wrong("it is not the base64 of user:password")
	}
	return s
}

// gitCredentials are lines of git's credential store.
func (v value) gitCredentials() []byte {
	lines := []string{}
	v.each(func(one value, line string) {
		if !isGitCredential(line) {
			one.wrong("it is not a line such as https://user:token@github.com, or with a path below the host")
			return
		}
		lines = append(lines, line)
	})
	return []byte(strings.Join(lines, "\n"))
}

func isGitCredential(line string) bool {
	if strings.ContainsAny(line, " \t\r\n") {
		return false
	}
	u, err := url.Parse(line)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.User == nil || u.RawQuery != "" || u.Fragment != "" {
		return false
	}
	password, _ := u.User.Password()
	_, _, err = buildconfig.ContextHost(u.Scheme + "://" + u.Host)
	return err == nil && u.User.Username() != "" && password != ""
}

// need wants keys in an object.
func (v value) need(has map[string]bool, keys ...string) {
	for _, key := range keys {
		if !has[key] && v.node.Kind == yaml.MappingNode {
			v.at(key).wrong("it is missing")
		}
	}
}

// some wants a list that is not empty: an empty one could be taken for everything and for
// nothing.
func some[T any](v value, what string, list []T) []T {
	if v.node.Kind == yaml.SequenceNode && len(v.node.Content) == 0 {
		v.wrong("there are no %s in it", what)
	}
	return list
}
