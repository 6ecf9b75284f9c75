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

	"handler/function/tests/client"
	"handler/function/tests/readme"
	"handler/function/tests/stack"
)

// commands is the only shell block of all pages that holds a text.
func commands(t *testing.T, s *stack.Stack, text string) string {
	t.Helper()
	pages, err := readme.Pages(s.Repo)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, page := range pages {
		for _, block := range page.Blocks {
			if block.Language == "bash" && strings.Contains(block.Text, text) {
				found = append(found, block.Text)
			}
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d blocks of the pages hold %q", len(found), text)
	}
	return found[0]
}

// TestReadme runs commands of the pages, as they are written there: a first build with
// curl, the same from the queue and the question for its verdict, and API.md's examples.
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
	var built client.Record
	image := s.Registry.Image("hello:v1")
	if err := json.Unmarshal([]byte(answer), &built); err != nil || built.Status != "success" || built.Image != image {
		t.Fatalf("%v: %s", err, answer)
	}
	if got := content(t, image, "hello.txt"); got != "built from a tar\n" {
		t.Errorf("hello.txt is %q", got)
	}
	for _, example := range []struct{ command, answer string }{
		{"curl -s \"$BUILDER/\" --data-binary @req.tar -H \"X-Build-Signature: sha256=$HMAC\"\n", `"status": "success"`},
		{`X-Build-Timestamp: $NOW`, `"status": "success"`},
		{`curl -sN "$BUILDER/build"`, `"status":"success"`},
		{"curl -s \"$BUILDER/\"\n", `"name": "builder"`},
		{`"$BUILDER/ready"`, "ready\n"},
		{`"$BUILDER/metrics"`, `builder_builds_total{code="",status="success"}`},
	} {
		if got := shell(commands(t, s, example.command)); !strings.Contains(got, example.answer) {
			t.Errorf("%q answers %s, want %s in it", example.command, got, example.answer)
		}
	}
	id := regexp.MustCompile(`(?im)^x-call-id: (\S+)\r$`).FindStringSubmatch(queued)
	if !strings.HasPrefix(queued, "HTTP/1.1 202 ") || id == nil {
		t.Fatalf("the gateway answers %s", queued)
	}
	stack.Eventually(t, time.Minute, func() error {
		if got := shell(commands(t, s, ask), "CALL_ID="+id[1]); got != "200\n" {
			return errors.New("it answers " + got)
		}
		return nil
	})
	text, err := os.ReadFile(filepath.Join(dir, "verdict.json"))
	if err != nil {
		t.Fatal(err)
	}
	var verdict client.Record
	if err := json.Unmarshal(text, &verdict); err != nil || verdict.Status != "success" {
		t.Errorf("the verdict is %s, %v", text, err)
	}

	// Each later example uses the func that the first one defines.
	define := commands(t, s, "ask() {")
	for _, example := range []struct{ command, answer string }{
		{"", `"id": "` + id[1] + `"`},
		{`/log?follow=1"`, `{"n":1,"t":"v: `},
		{`/log?follow=1"`, `"status":"success"`},
		{"ask DELETE", `"status": "success"`},
	} {
		script := define
		if example.command != "" {
			script += commands(t, s, example.command)
		}
		if got := shell(script, "CALL_ID="+id[1]); !strings.Contains(got, example.answer) {
			t.Errorf("%q answers %s, want %s in it", example.command, got, example.answer)
		}
	}
}
