package buildconfig

import (
	"errors"
	"strings"
	"testing"

	"handler/function/api"
)

func gitConfig(t *testing.T, source string) (*Config, error) {
	t.Helper()
	return Parse([]byte(`{"skipPush":true,"context":{"git":"` + source + `"}}`))
}

func TestGit(t *testing.T) {
	for source, want := range map[string]Git{
		"https://example.com/a/b.git":              {"https", "example.com", "/a/b.git", "", ""},
		"https://Example.COM:443/a/b.git#main":     {"https", "example.com", "/a/b.git", "main", ""},
		"https://example.com:8443/a.git#v1.2:x/y":  {"https", "example.com:8443", "/a.git", "v1.2", "x/y"},
		"http://127.0.0.1:8080/a.git#:/x/":         {"http", "127.0.0.1:8080", "/a.git", "", "x"},
		"https://example.com/a.git#feature/x:./y/": {"https", "example.com", "/a.git", "feature/x", "y"},
		"https://example.com/a.git#refs/heads/m":   {"https", "example.com", "/a.git", "refs/heads/m", ""},
		"https://example.com/~user/a%20b.git#":     {"https", "example.com", "/~user/a%20b.git", "", ""},
	} {
		c, err := gitConfig(t, source)
		if err != nil {
			t.Errorf("%s: %v", source, err)
		} else if *c.Git != want {
			t.Errorf("%s: %+v, want %+v", source, *c.Git, want)
		}
	}
	for _, source := range []string{
		"", "x", "example.com/a.git", "git@example.com:a/b.git", "ssh://git@example.com/a.git", "git://example.com/a.git", "file:///etc",
		"https://", "https:///a.git", "https://example.com", "https://example.com/", "https:example.com/a.git",
		"https://user@example.com/a.git", "https://user:pw@example.com/a.git", "https://example.com@evil.com/a.git",
		"https://example.com/a.git?x=y", "https://example.com/a.git?", "https://example.com/../a.git", "https://example.com//a.git", "https://example.com/a/",
		"https://example.com./a.git", "https://.example.com/a.git", "https://exa mple.com/a.git", "https://exämple.com/a.git", "https://example.com:x/a.git",
		"https://[::1]/a.git", "https://example.com:/a.git", "https://example.com:0443/a.git", "https://example.com:08443/a.git", "https://example.com:0/a.git", "https://example.com:65536/a.git", "https://127.1/a.git", "https://my_host/a.git", "https://example.com/a.git#-x", "https://example.com/a.git#--upload-pack=x", "https://example.com/a.git#a..b", "https://example.com/a.git#a b",
		"https://example.com/a.git#main:../x", "https://example.com/a.git#main:x/../../y", "https://example.com/a.git#main:x:y", "https://example.com/a.git#main#x",
		`https://example.com/a.git#main:x\\y`, `https://example.com/a\\b.git`, "https://example.com/a%2fb.git", "https://example.com/%2e%2e/a.git", "https://example.com/a%00.git", `https://example.com/a.git#ma\nin`, `https://example.com\n.evil.com/a.git`,
	} {
		c, err := gitConfig(t, source)
		if e, ok := errors.AsType[*api.Error](err); !ok || e.Code != api.BadConfig || !strings.Contains(e.Msg, `"context`) {
			t.Errorf("%q: %v, %v", source, c, err)
		}
	}
}

func TestAllowContext(t *testing.T) {
	hosts := []string{"github.com", "git.example.com:8443", "http://localhost:3000", "Upper.Example", "http://plain.example:80", "tls.example:443"}
	for source, want := range map[string]bool{
		"https://github.com/a.git":            true,
		"https://GitHub.com:443/a.git":        true,
		"https://git.example.com:8443/a.git":  true,
		"http://localhost:3000/a.git":         true,
		"https://upper.example/a.git":         true,
		"http://plain.example/a.git":          true,
		"https://tls.example/a.git":           true,
		"https://plain.example:80/a.git":      false,
		"http://tls.example:443/a.git":        false,
		"http://github.com/a.git":             false,
		"https://github.com:8443/a.git":       false,
		"https://gist.github.com/a.git":       false,
		"https://github.com.evil.com/a.git":   false,
		"https://evilgithub.com/a.git":        false,
		"https://git.example.com/a.git":       false,
		"https://localhost:3000/a.git":        false,
		"http://localhost/a.git":              false,
		"https://evil.com/github.com/a.git":   false,
		"https://evil.com/a.git#github.com:a": false,
	} {
		c, err := gitConfig(t, source)
		if err != nil {
			t.Fatalf("%s: %v", source, err)
		}
		err = c.AllowContext(hosts)
		if e, ok := errors.AsType[*api.Error](err); want != (err == nil) || err != nil && (!ok || e.Code != api.ContextForbidden) {
			t.Errorf("%s: %v", source, err)
		}
		if c.AllowContext(nil) == nil {
			t.Errorf("%s is allowed without hosts", source)
		}
	}
	if c, err := Parse([]byte(`{"skipPush":true}`)); err != nil || c.AllowContext(nil) != nil {
		t.Errorf("a build without git is refused: %v", err)
	}
}

func TestGitCredentials(t *testing.T) {
	file := []byte("\nnot a url\nhttps://a:b@other.com\nhttp://plain:b@github.com\nhttps://org:one%40two@github.com/org\nhttps://all:three@github.com\nhttps://port:x@github.com:8443\n")
	for source, want := range map[string]string{
		"https://github.com/org/a.git":      "org one@two",
		"https://github.com/organ/a.git":    "all three",
		"https://github.com/a.git":          "all three",
		"https://github.com:8443/a.git":     "port x",
		"http://github.com/a.git":           "plain b",
		"https://github.com.evil.com/a.git": "",
	} {
		c, err := gitConfig(t, source)
		if err != nil {
			t.Fatal(err)
		}
		user, password, ok := c.Git.GitCredentials(file)
		if got := strings.TrimSpace(user + " " + password); got != want || ok != (want != "") {
			t.Errorf("%s: %q, want %q", source, got, want)
		}
	}
}
