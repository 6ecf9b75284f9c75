package content

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"handler/function/tests/stack"
)

// fromGit is a request for a build of a git context.
func fromGit(t *testing.T, image, source string, more map[string]any) []byte {
	t.Helper()
	config := map[string]any{"image": image, "context": map[string]string{"git": source}}
	for k, v := range more {
		config[k] = v
	}
	b, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "com.openfaas.docker.config"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	body, err := exec.CommandContext(t.Context(), "tar", "-C", dir, "-cf", "-", "com.openfaas.docker.config").Output()
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// fileOf is the content of /file in an image.
func fileOf(t *testing.T, ref string) string {
	t.Helper()
	files := stack.MustFiles(t, stack.MustPull(t, t.Context(), ref))
	if files["file"] == nil {
		t.Fatalf("%s has no /file", ref)
	}
	return string(files["file"].Content)
}

const copyFile = "FROM scratch\nCOPY file /file\n"

func TestGit(t *testing.T) {
	g := stack.NewGitServer(t, "")
	s, f := stack.Test(t, stack.FunctionConfig{Env: map[string]string{"context_hosts": g.URL}})
	work := g.Repository(t, "app.git", map[string]string{
		"Dockerfile": copyFile, "file": "first", "sub/Dockerfile": copyFile, "sub/file": "in sub", "sub/Other": "FROM scratch\nCOPY Other /file\n",
	})
	first := stack.Git(t, work, "rev-parse", "HEAD")
	stack.Git(t, work, "tag", "-a", "-m", "x", "v1")
	stack.Git(t, work, "push", "-q", "origin", "v1")
	stack.Git(t, work, "checkout", "-q", "-b", "feature/x")
	feature := stack.Commit(t, work, map[string]string{"file": "feature"})
	url := g.URL + "/app.git"
	image := s.Registry.Image("git")
	check := func(name, source, wantCommit, wantFile string, more map[string]any) {
		t.Helper()
		a := f.MustPost(t, t.Context(), fromGit(t, image, source, more))
		if a.Status != "success" || a.Commit != wantCommit {
			t.Errorf("%s: HTTP %d, commit %s, want %s: %s\n%s", name, a.StatusCode, a.Commit, wantCommit, a.Error, strings.Join(a.Log, "\n"))
			return
		}
		if got := fileOf(t, image+"@"+a.Digest); got != wantFile {
			t.Errorf("%s: built %q, want %q", name, got, wantFile)
		}
	}
	check("default branch", url, first, "first", nil)
	check("branch", url+"#main", first, "first", nil)
	check("branch with a slash", url+"#feature/x", feature, "feature", nil)
	check("annotated tag", url+"#v1", first, "first", nil)
	check("commit", url+"#"+first, first, "first", nil)
	check("directory", url+"#main:sub", first, "in sub", nil)
	check("directory of the default branch", url+"#:sub/", first, "in sub", nil)
	check("dockerfile", url+"#main:sub", first, "FROM scratch\nCOPY Other /file\n", map[string]any{"dockerfile": "Other"})

	// A build sees a push that was made before it.
	stack.Git(t, work, "checkout", "-q", "main")
	second := stack.Commit(t, work, map[string]string{"file": "second"})
	check("after a push", url+"#main", second, "second", nil)
	check("the commit before", url+"#"+first, first, "first", nil)

	for name, tt := range map[string]struct {
		source string
		status int
		code   string
		text   string
	}{
		"no such branch":                 {url + "#nothing", 400, "bad_context", "nothing"},
		"no such repository":             {g.URL + "/none.git", 400, "bad_context", "none.git"},
		"no such commit":                 {url + "#" + strings.Repeat("1", 40), 400, "bad_context", strings.Repeat("1", 40)},
		"a commit of no such repository": {g.URL + "/none.git#" + first, 400, "bad_context", "none.git"},
		"no Dockerfile":                  {url + "#main:nothing", 422, "build_failed", ""},
		"host that is down":              {"http://127.0.0.1:1/app.git", 403, "context_forbidden", "127.0.0.1:1"},
	} {
		a := f.MustPost(t, t.Context(), fromGit(t, image, tt.source, nil))
		if a.StatusCode != tt.status || a.Code != tt.code || !strings.Contains(a.Error, tt.text) {
			t.Errorf("%s: HTTP %d %s: %s, want %d %s", name, a.StatusCode, a.Code, a.Error, tt.status, tt.code)
		}
	}
}

// TestGitHosts: the builder asks no host that is not in context_hosts, and a listed host
// cannot lead it to another one.
func TestGitHosts(t *testing.T) {
	listed, other := stack.NewGitServer(t, ""), stack.NewGitServer(t, "")
	s, f := stack.Test(t, stack.FunctionConfig{Env: map[string]string{"context_hosts": listed.URL + ",http://127.0.0.1:1"}})
	image := s.Registry.Image("hosts:v1")
	other.Repository(t, "evil.git", map[string]string{"Dockerfile": copyFile, "file": "evil"})
	for _, source := range []string{
		other.URL + "/evil.git",
		strings.Replace(other.URL, "http://", "https://", 1) + "/evil.git",
		strings.Replace(listed.URL, "http://", "https://", 1) + "/evil.git",
		strings.Replace(listed.URL, "127.0.0.1", "localhost", 1) + "/evil.git",
	} {
		if a := f.MustPost(t, t.Context(), fromGit(t, image, source, nil)); a.StatusCode != 403 || a.Code != "context_forbidden" {
			t.Errorf("%s: HTTP %d %s: %s", source, a.StatusCode, a.Code, a.Error)
		}
	}
	work := listed.Repository(t, "with-submodule.git", map[string]string{"Dockerfile": copyFile, "file": "with a submodule"})
	if err := os.WriteFile(filepath.Join(work, ".gitmodules"), fmt.Appendf(nil, "[submodule \"evil\"]\n\tpath = evil\n\turl = %s/evil.git\n", other.URL), 0o644); err != nil {
		t.Fatal(err)
	}
	stack.Git(t, work, "update-index", "--add", "--cacheinfo", "160000,"+stack.Git(t, filepath.Join(other.Dir, "evil.git"), "rev-parse", "HEAD")+",evil")
	stack.Git(t, work, "add", ".gitmodules")
	stack.Git(t, work, "commit", "-qm", "submodule")
	stack.Git(t, work, "push", "-q", "origin", "HEAD")
	a := f.MustPost(t, t.Context(), fromGit(t, image, listed.URL+"/with-submodule.git", nil))
	if a.Status != "success" || fileOf(t, image) != "with a submodule" {
		t.Errorf("HTTP %d %s", a.StatusCode, a.Error)
	}
	if seen := other.Seen(); len(seen) != 0 {
		t.Errorf("the unlisted server got %q", seen)
	}
	for _, ref := range []string{"", "#main", "#" + strings.Repeat("1", 40)} {
		if a := f.MustPost(t, t.Context(), fromGit(t, image, "http://127.0.0.1:1/app.git"+ref, nil)); a.StatusCode != 503 || a.Code != "context_failed" {
			t.Errorf("%q of a host that is down: HTTP %d %s: %s", ref, a.StatusCode, a.Code, a.Error)
		}
	}
	none := stack.FunctionConfig{}
	_, f = stack.Test(t, none)
	if a := f.MustPost(t, t.Context(), fromGit(t, image, listed.URL+"/with-submodule.git", nil)); a.StatusCode != 403 {
		t.Errorf("without context_hosts: HTTP %d %s", a.StatusCode, a.Error)
	}
}

// TestGitCredentials fetches with a password that no step of the build can read.
func TestGitCredentials(t *testing.T) {
	const password = "a-password-of-git"
	g := stack.NewGitServer(t, "user:"+password)
	host := strings.TrimPrefix(g.URL, "http://")
	with := stack.FunctionConfig{
		Env:     map[string]string{"context_hosts": g.URL},
		Secrets: map[string][]byte{"git-credentials": fmt.Appendf(nil, "https://x:y@example.com\nhttp://user:%s@%s\n", url.QueryEscape(password), host)},
	}
	var steps strings.Builder
	for i, id := range []string{"GIT_AUTH_TOKEN", "GIT_AUTH_HEADER", "GIT_AUTH_TOKEN." + host, "GIT_AUTH_HEADER." + host} {
		fmt.Fprintf(&steps, "RUN --mount=type=secret,id=%s,target=/s%d [ -s /s%d ] && echo found-%s || echo none\n", id, i, i, id)
	}
	work := g.Repository(t, "private.git", map[string]string{"Dockerfile": "FROM busybox\n" + steps.String() + "RUN ls -R /run/secrets 2>&1 || true\nCOPY file /file\n", "file": "private"})
	s, f := stack.Test(t, with)
	image := s.Registry.Image("private:v1")
	a := f.MustPost(t, t.Context(), fromGit(t, image, g.URL+"/private.git", nil))
	if a.Status != "success" || a.Commit != stack.Git(t, work, "rev-parse", "HEAD") {
		t.Fatalf("HTTP %d %s\n%s", a.StatusCode, a.Error, strings.Join(a.Log, "\n"))
	}
	log, err := f.Log()
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(a.Log, "\n") + log
	for _, leak := range []string{password, base64.StdEncoding.EncodeToString([]byte("user:" + password)), "l: found-"} {
		if strings.Contains(text, leak) {
			t.Errorf("the log has %q:\n%s", leak, text)
		}
	}
	with.Secrets = nil
	_, f = stack.Test(t, with)
	// A build without credentials does not get what another build has fetched.
	for _, ref := range []string{"", "#" + stack.Git(t, work, "rev-parse", "HEAD"), "#" + strings.Repeat("1", 40)} {
		if a := f.MustPost(t, t.Context(), fromGit(t, image, g.URL+"/private.git"+ref, nil)); a.StatusCode != 400 || a.Code != "bad_context" || !strings.Contains(a.Error, "credentials") {
			t.Errorf("%q without credentials: HTTP %d %s: %s", ref, a.StatusCode, a.Code, a.Error)
		}
	}
}
