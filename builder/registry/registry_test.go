package registry

import (
	"bytes"
	"context"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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

// helperDir is a PATH with fake credential helpers in it, by their suffix.
func helperDir(t *testing.T, scripts map[string]string) {
	t.Helper()
	dir := t.TempDir()
	for suffix, script := range scripts {
		name := writeFile(t, filepath.Join(dir, "docker-credential-"+suffix), "#!/bin/sh\n"+script)
		if err := os.Chmod(name, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
}

func TestHelpers(t *testing.T) {
	helperDir(t, map[string]string{
		"fake-good":     `read server; echo '{"ServerURL":"'$server'","Username":"from-helper","Secret":"s"}'`,
		"fake-none":     `echo "credentials not found in native keychain"; exit 1`,
		"fake-failing":  `echo topsecret; exit 3`,
		"fake-nonsense": `echo topsecret`,
		"fake-hanging":  `sleep 60`,
		"fake-flooding": `exec yes topsecret`,
	})
	file := configFile(t, `{
		"auths": {"plain": `+basicAuth("from-file", "p")+`, "missing": `+basicAuth("from-file", "p")+`},
		"credHelpers": {
			"good": "fake-good", "none": "fake-none", "missing": "fake-missing", "failing": "fake-failing",
			"nonsense": "fake-nonsense", "hanging": "fake-hanging", "flooding": "fake-flooding", "path": "../evil"
		}
	}`)
	for _, tt := range []struct{ host, user, err string }{
		{"plain", "from-file", ""},
		{"good", "from-helper", ""},
		{"none", "", ""},
		{"unknown", "", ""},
		{"missing", "", "executable file not found"},
		{"failing", "", "exit status 3"},
		{"nonsense", "", "not what a helper says"},
		{"hanging", "", "no answer within"},
		{"flooding", "", "prints too much"},
		{"path", "", "not a name"},
	} {
		t.Run(tt.host, func(t *testing.T) {
			c := New(Config{File: file, AllowBasic: true})
			if tt.host == "hanging" {
				c.helperTimeout = 500 * time.Millisecond
			}
			start := time.Now()
			name, _, err := c.Grant(nil).Basic(t.Context(), tt.host)
			if name != tt.user {
				t.Errorf("user %q, want %q", name, tt.user)
			}
			switch {
			case tt.err == "" && err != nil, tt.err != "" && err == nil:
				t.Errorf("error %v, want %q", err, tt.err)
			case err != nil && !strings.Contains(err.Error(), tt.err):
				t.Errorf("error %v, want %q", err, tt.err)
			case err != nil && strings.Contains(err.Error(), "topsecret"):
				t.Errorf("the helper's output is in the error: %v", err)
			}
			if d := time.Since(start); d > 30*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
}

func TestGlobalHelper(t *testing.T) {
	helperDir(t, map[string]string{
		"fake-one-host": `read server; if [ "$server" = ecr ]; then echo '{"Username":"from-helper","Secret":"s"}'; else echo "cannot parse $server"; exit 1; fi`,
		"fake-none":     `echo "credentials not found in native keychain"; exit 1`,
	})
	for _, tt := range []struct {
		helper, host, user string
		logged             int
	}{
		{"fake-one-host", "ecr", "from-helper", 0},
		{"fake-one-host", "plain", "from-file", 1},
		{"fake-one-host", "other", "", 1},
		{"fake-missing", "plain", "from-file", 1},
		{"fake-missing", "other", "", 1},
		{"fake-none", "plain", "from-file", 0},
	} {
		t.Run(tt.helper+" "+tt.host, func(t *testing.T) {
			var log bytes.Buffer
			c := New(Config{
				File:       configFile(t, `{"credsStore":"`+tt.helper+`","auths":{"plain":`+basicAuth("from-file", "p")+`}}`),
				AllowBasic: true,
				Log:        zerolog.New(&log),
			})
			for range 3 {
				if got := user(t, c, tt.host); got != tt.user {
					t.Errorf("user %q, want %q", got, tt.user)
				}
			}
			if n := strings.Count(log.String(), "\n"); n != tt.logged {
				t.Errorf("logged %d times, want %d:\n%s", n, tt.logged, log.String())
			}
		})
	}
}

func TestHelperOncePerBuild(t *testing.T) {
	count := filepath.Join(t.TempDir(), "count")
	t.Setenv("FAKE_COUNT", count)
	helperDir(t, map[string]string{"fake": `echo . >>"$FAKE_COUNT"; echo '{"Username":"u","Secret":"s"}'`})
	c := New(Config{File: configFile(t, `{"credHelpers":{"h":"fake"}}`), AllowBasic: true})
	g := c.Grant(nil)
	for range 3 {
		g.Basic(t.Context(), "h")
	}
	c.Grant(nil).Basic(t.Context(), "h")
	if data, _ := os.ReadFile(count); strings.Count(string(data), ".") != 2 {
		t.Errorf("the helper ran %d times for two builds", strings.Count(string(data), "."))
	}
}

func TestHelperCanceled(t *testing.T) {
	helperDir(t, map[string]string{"fake": `if [ -e "$FAKE_HANG" ]; then exec sleep 60; fi; echo '{"Username":"u","Secret":"s"}'`})
	hang := filepath.Join(t.TempDir(), "hang")
	t.Setenv("FAKE_HANG", writeFile(t, hang, ""))
	g := New(Config{File: configFile(t, `{"credHelpers":{"h":"fake"}}`), AllowBasic: true}).Grant(nil)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, _, err := g.Basic(ctx, "h"); err == nil {
		t.Error("no error from a helper that was stopped")
	}
	os.Remove(hang)
	if name, _, err := g.Basic(t.Context(), "h"); name != "u" {
		t.Errorf("asked again: %q, %v", name, err)
	}
}

func TestBasic(t *testing.T) {
	file := configFile(t, `{"auths":{"h":`+basicAuth("u", "p")+`,"token":{"auth":"`+
		base64.StdEncoding.EncodeToString([]byte("u:p"))+`","identitytoken":"idtoken"}}}`)
	user, password, err := New(Config{File: file, AllowBasic: true}).Grant(nil).Basic(t.Context(), "h")
	if user != "u" || password != "p" || err != nil {
		t.Errorf("allowed: %q %q %v", user, password, err)
	}
	user, password, err = New(Config{File: file}).Grant(nil).Basic(t.Context(), "h")
	if user != "" || password != "" || err == nil || !strings.Contains(err.Error(), "allow_basic") {
		t.Errorf("not allowed: %q %q %v", user, password, err)
	}
	user, password, err = New(Config{File: file}).Grant(nil).Basic(t.Context(), "nothing")
	if user != "" || password != "" || err != nil {
		t.Errorf("not allowed, and not configured: %q %q %v", user, password, err)
	}
	user, password, err = New(Config{File: file, AllowBasic: true}).Grant(nil).Basic(t.Context(), "token")
	if user != "" || password != "" || err != nil {
		t.Errorf("an identity token was handed out: %q %q %v", user, password, err)
	}
}

func TestAnonymous(t *testing.T) {
	g := New(Config{File: configFile(t, `{"auths":{"h":`+basicAuth("u", "p")+`}}`), AllowBasic: true}).Grant(nil)
	for _, host := range []string{"z", "h", "a"} {
		g.Basic(t.Context(), host)
	}
	if got := strings.Join(g.Anonymous(), " "); got != "a z" {
		t.Errorf("anonymous: %q", got)
	}

	// What is there for one repository is not there for another.
	g = New(Config{File: configFile(t, `{"auths":{"h/team":`+basicAuth("u", "p")+`}}`)}).Grant(nil)
	for _, repository := range []string{"public/base", "team/app"} {
		if _, err := g.auth(t.Context(), "h", repository); err != nil {
			t.Fatal(err)
		}
	}
	if got := g.Anonymous(); len(got) > 0 {
		t.Errorf("anonymous: %q", got)
	}
}
