package stack

import (
	"io"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// GitServer is git's own http-backend on loopback.
type GitServer struct {
	*httptest.Server
	Dir string // of the repositories

	mu       sync.Mutex
	requests []string
}

// NewGitServer serves repositories. If login is not empty, a client needs it.
func NewGitServer(t testing.TB, login string) *GitServer {
	t.Helper()
	path, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		t.Fatal(err)
	}
	g := &GitServer{Dir: t.TempDir()}
	backend := &cgi.Handler{
		Path:   filepath.Join(strings.TrimSpace(string(path)), "git-http-backend"),
		Stderr: io.Discard,
		Env:    []string{"GIT_PROJECT_ROOT=" + g.Dir, "GIT_HTTP_EXPORT_ALL=1"},
	}
	g.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.mu.Lock()
		g.requests = append(g.requests, r.Method+" "+r.URL.String())
		g.mu.Unlock()
		if user, password, _ := r.BasicAuth(); login != "" && user+":"+password != login {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		backend.ServeHTTP(w, r)
	}))
	t.Cleanup(g.Close)
	return g
}

// Seen are the requests that came, each its method and URL.
func (g *GitServer) Seen() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.requests)
}

// Git runs git in dir and returns what it prints.
func Git(t testing.TB, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", append([]string{"-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always"}, args...)...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %q: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// Repository makes a repository with one commit of files. It returns a work tree, from
// which git push publishes.
func (g *GitServer) Repository(t testing.TB, name string, files map[string]string) (work string) {
	t.Helper()
	Git(t, g.Dir, "init", "-q", "--bare", name)
	work = t.TempDir()
	Git(t, work, "init", "-q")
	Git(t, work, "remote", "add", "origin", filepath.Join(g.Dir, name))
	Commit(t, work, files)
	return work
}

// Commit commits files, pushes, and returns the commit.
func Commit(t testing.TB, work string, files map[string]string) string {
	t.Helper()
	if err := WriteContext(work, files); err != nil {
		t.Fatal(err)
	}
	Git(t, work, "add", "-A")
	Git(t, work, "commit", "-qm", "x")
	Git(t, work, "push", "-q", "origin", "HEAD")
	return Git(t, work, "rev-parse", "HEAD")
}
