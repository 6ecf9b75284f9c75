package registry

import (
	"bytes"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/distribution/reference"
	"github.com/rs/zerolog"
)

func basicAuth(user, password string) string {
	return `{"auth":"` + base64.StdEncoding.EncodeToString([]byte(user+":"+password)) + `"}`
}

func writeFile(t *testing.T, name, content string) string {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func configFile(t *testing.T, content string) string {
	t.Helper()
	return writeFile(t, filepath.Join(t.TempDir(), "config.json"), content)
}

func refs(t *testing.T, names ...string) []reference.Named {
	t.Helper()
	var list []reference.Named
	for _, n := range names {
		ref, err := reference.ParseNormalizedNamed(n)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, ref)
	}
	return list
}

func user(t *testing.T, c *Credentials, host string) string {
	t.Helper()
	name, _, err := c.Grant(nil).Basic(t.Context(), host)
	if err != nil {
		t.Fatalf("%s: %v", host, err)
	}
	return name
}

func TestConfigKeys(t *testing.T) {
	for _, tt := range []struct {
		key, host string
		want      bool
	}{
		{"https://index.docker.io/v1/", "registry-1.docker.io", true},
		{"docker.io", "registry-1.docker.io", true},
		{"index.docker.io", "registry-1.docker.io", true},
		{"registry.example.com", "registry.example.com", true},
		{"registry.example.com", "Registry.Example.com", true},
		{"registry.example.com", "registry.example.com:443", true},
		{"https://registry.example.com", "registry.example.com", true},
		{"https://registry.example.com/v2/", "registry.example.com", true},
		{"http://registry.example.com:5000", "registry.example.com:5000", true},
		{"registry.example.com:5000", "registry.example.com:5000", true},
		{"registry.example.com:5000", "registry.example.com", false},
		{"registry.example.com", "registry.example.com:5000", false},
		{"registry.example.com", "evil.registry.example.com", false},
		{"docker.io", "docker.io.example.com", false},
	} {
		t.Run(tt.key+" "+tt.host, func(t *testing.T) {
			c := New(Config{File: configFile(t, `{"auths":{"`+tt.key+`":`+basicAuth("u", "p")+`}}`), AllowBasic: true})
			if got := user(t, c, tt.host) == "u"; got != tt.want {
				t.Errorf("found: %v, want %v", got, tt.want)
			}
		})
	}
}

func TestConfigReload(t *testing.T) {
	var log bytes.Buffer
	name := filepath.Join(t.TempDir(), "config.json")
	c := New(Config{File: name, AllowBasic: true, Log: zerolog.New(&log)})
	if got := user(t, c, "h"); got != "" {
		t.Errorf("absent file: user %q", got)
	}
	writeFile(t, name, `{"auths":{"h":`+basicAuth("one", "p")+`}}`)
	if got := user(t, c, "h"); got != "one" {
		t.Errorf("file made: user %q", got)
	}
	writeFile(t, name, `{"auths":{"h":`+basicAuth("two", "p")+`}}`)
	if got := user(t, c, "h"); got != "two" {
		t.Errorf("file changed: user %q", got)
	}
	writeFile(t, name, `{"auths":{"h":{"auth":"c2Vj`)
	for range 3 {
		if got := user(t, c, "h"); got != "two" {
			t.Errorf("file half written: user %q", got)
		}
	}
	if n := strings.Count(log.String(), "keeping"); n != 1 {
		t.Errorf("the half written file was logged %d times:\n%s", n, log.String())
	}
	writeFile(t, name, "")
	for range 3 {
		if got := user(t, c, "h"); got != "two" {
			t.Errorf("file cut to nothing: user %q", got)
		}
	}
	if n := strings.Count(log.String(), "keeping"); n != 2 {
		t.Errorf("the empty file was logged %d times:\n%s", n-1, log.String())
	}
	os.Remove(name)
	if got := user(t, c, "h"); got != "" {
		t.Errorf("file gone: user %q", got)
	}
}

func TestConfigBroken(t *testing.T) {
	c := New(Config{File: configFile(t, `{"auths":{"h":{"auth":"!!!topsecret"}}}`), AllowBasic: true})
	_, _, err := c.Grant(nil).Basic(t.Context(), "h")
	if err == nil {
		t.Fatal("no error")
	}
	if strings.Contains(err.Error(), "topsecret") {
		t.Errorf("the file's text is in the error: %v", err)
	}
}

func TestConfigByteOrderMark(t *testing.T) {
	c := New(Config{File: configFile(t, "\xef\xbb\xbf"+`{"auths":{"h":`+basicAuth("u", "p")+`}}`), AllowBasic: true})
	if got := user(t, c, "h"); got != "u" {
		t.Errorf("user %q", got)
	}
}
