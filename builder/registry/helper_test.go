package registry

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// helperDir puts fake credential helpers into PATH. scripts are by the suffixes of their
// names.
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
		{"nonsense", "", "not a user name and a secret"},
		{"hanging", "", "no answer within"},
		{"flooding", "", "answer is too long"},
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

func TestHelpersByPath(t *testing.T) {
	helperDir(t, map[string]string{
		"fake-echo": `read server; echo '{"Username":"'$server'","Secret":"s"}'`,
	})
	for _, tt := range []struct{ config, image, want string }{
		{`{"credHelpers":{"r.example":"fake-echo"},"auths":{"r.example":` + basicAuth("file", "p") + `}}`, "r.example/org/app", "r.example"},
		{`{"credHelpers":{"r.example/org":"fake-echo"},"auths":{"r.example":` + basicAuth("file", "p") + `}}`, "r.example/org/app", "r.example/org"},
		{`{"credHelpers":{"r.example/org":"fake-echo"},"auths":{"r.example":` + basicAuth("file", "p") + `}}`, "r.example/other/app", "file"},
		{`{"credHelpers":{"R.Example":"fake-echo"}}`, "r.example/org/app", "r.example"},
		{`{"credHelpers":{"https://r.example":"fake-echo"}}`, "r.example/org/app", "r.example"},
		{`{"credHelpers":{"r.example":"fake-echo"},"auths":{"r.example/org":` + basicAuth("file", "p") + `}}`, "r.example/org/app", "file"},
		{`{"credHelpers":{"r.example":"fake-echo"},"auths":{"r.example/org":{}}}`, "r.example/org/app", "r.example"},
		{`{"credsStore":"fake-echo","auths":{"r.example/org":` + basicAuth("file", "p") + `}}`, "r.example/org/app", "file"},
		{`{"credsStore":"fake-echo","auths":{"r.example/org":` + basicAuth("file", "p") + `}}`, "r.example/other/app", "r.example"},
		{`{"credsStore":"fake-echo","auths":{"r.example":` + basicAuth("file", "p") + `}}`, "r.example/org/app", "r.example"},
		{`{"credHelpers":{"docker.io":"fake-echo"}}`, "acme/app", hubKey},
	} {
		c := New(Config{File: configFile(t, tt.config), AllowBasic: true})
		host, _, _ := strings.Cut(refs(t, tt.image)[0].Name(), "/")
		for range 3 {
			if name, _, err := c.Grant(refs(t, tt.image)).Basic(t.Context(), serverHost(host)); err != nil || name != tt.want {
				t.Errorf("%s for %s: %q, %v", tt.config, tt.image, name, err)
			}
		}
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
