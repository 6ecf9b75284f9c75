package openfaas

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"handler/function/tests/stack"
)

var shellBlock = regexp.MustCompile("(?s)```bash\n(.*?)```")

// commands is the only shell block of the README that holds a text.
func commands(t *testing.T, s *stack.Stack, text string) string {
	t.Helper()
	readme, err := os.ReadFile(filepath.Join(s.Repo, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, block := range shellBlock.FindAllStringSubmatch(string(readme), -1) {
		if strings.Contains(block[1], text) {
			found = append(found, block[1])
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d blocks of the README hold %q", len(found), text)
	}
	return found[0]
}

// TestReadme runs what the README says as it stands there: a first build with curl,
// the same from the queue, and the question what came of it.
func TestReadme(t *testing.T) {
	s, f, o := around(t, stack.OpenFaaSConfig{}, stack.FunctionConfig{Watchdog: true})
	dir := t.TempDir()
	shell := func(script string, env ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", script)
		cmd.Dir = dir
		cmd.Env = append(append(os.Environ(), "BUILDER="+f.URL, "GATEWAY="+o.URL, "REGISTRY="+s.Registry.Addr,
			"PAYLOAD_SECRET="+filepath.Join(f.SecretsDir, "payload-secret")), env...)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s\nended with %v: %s", script, err, out)
		}
		return string(out)
	}
	const first, queue, ask = "cat > hello/context/Dockerfile", `/async-function/builder" --data-binary @req.tar`, "CALL=/builds/$CALL_ID"
	answer, queued, _ := strings.Cut(shell(commands(t, s, first)+"echo ----\n"+commands(t, s, queue)), "----\n")
	var built stack.Record
	image := s.Registry.Image("hello:v1")
	if err := json.Unmarshal([]byte(answer), &built); err != nil || built.Status != "success" || built.Image != image {
		t.Fatalf("%v: %s", err, answer)
	}
	if got := content(t, image, "hello.txt"); got != "built from a tar\n" {
		t.Errorf("hello.txt is %q", got)
	}
	id := regexp.MustCompile(`(?im)^x-call-id: (\S+)\r$`).FindStringSubmatch(queued)
	if !strings.HasPrefix(queued, "HTTP/1.1 202 ") || id == nil {
		t.Fatalf("the gateway answers %s", queued)
	}
	eventually(t, time.Minute, func() error {
		if got := shell(commands(t, s, ask), "CALL_ID="+id[1]); got != "200\n" {
			return errors.New("it answers " + got)
		}
		return nil
	})
	text, err := os.ReadFile(filepath.Join(dir, "verdict.json"))
	if err != nil {
		t.Fatal(err)
	}
	var verdict stack.Record
	if err := json.Unmarshal(text, &verdict); err != nil || verdict.Status != "success" {
		t.Errorf("the verdict is %s, %v", text, err)
	}
}
