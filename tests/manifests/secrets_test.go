package manifests

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"handler/function/tests/stack"
)

// description is what stack.yml says of the function.
func description(t *testing.T) *stack.Description {
	t.Helper()
	d, err := stack.Shared(t).Description()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestLabels: the Community Edition refuses other labels of scaling, and the whole
// deployment with them.
func TestLabels(t *testing.T) {
	for key := range description(t).Labels {
		if strings.HasPrefix(key, "com.openfaas.scale.") && !slices.Contains([]string{"com.openfaas.scale.min", "com.openfaas.scale.max"}, key) {
			t.Errorf("CE refuses the label %s", key)
		}
	}
}

func TestSecretNames(t *testing.T) {
	c := mustDefaults(t)
	names := description(t).Secrets
	for _, name := range []string{c.PayloadSecret, c.BuildkitCA, c.BuildkitCert, c.BuildkitKey, c.RegistryConfig} {
		if !slices.Contains(names, name) {
			t.Errorf("stack.yml does not name %s, the function's default", name)
		}
	}
}

// fakeCLI is a stand-in for kubectl or faas-cli that logs its arguments.
func fakeCLI(t *testing.T, name string) (path, log string) {
	t.Helper()
	dir := t.TempDir()
	log = filepath.Join(dir, "log")
	script := "#!/bin/sh\nprintf '%s\\n' \"$*\" >> " + log + "\n[ \"$4\" != secret ] && [ \"$3\" = apply ] && cat >> " + log + "\n[ \"$3\" = create ] && echo \"manifest of $6\"\nexit 0\n"
	if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir, log
}

// TestMakeSecrets: secrets.sh creates every secret of stack.yml from files. If a file is
// missing, secrets.sh names it and creates no secret.
func TestMakeSecrets(t *testing.T) {
	dir := checkout(t)
	config := filepath.Join(t.TempDir(), "config.json")
	payload := filepath.Join(t.TempDir(), "payload")
	run := func(via string, more ...string) (calls, output string, err error) {
		path, log := fakeCLI(t, via)
		cmd := exec.Command(filepath.Join(dir, "secrets.sh"), via)
		cmd.Dir = t.TempDir()
		cmd.Env = []string{"PATH=" + path + ":" + os.Getenv("PATH"), "HOME=/nonexistent", "PAYLOAD_SECRET=" + payload, "REGISTRY_CONFIG=" + config}
		cmd.Env = append(cmd.Env, more...)
		out, err := cmd.CombinedOutput()
		text, readErr := os.ReadFile(log)
		if readErr != nil && !os.IsNotExist(readErr) {
			t.Fatal(readErr)
		}
		return string(text), string(out), err
	}
	for _, via := range []string{"kubectl", "faas-cli"} {
		if calls, out, err := run(via); err == nil || calls != "" || !strings.Contains(out, config+" is missing") || !strings.Contains(out, "openssl rand") {
			t.Errorf("%s: with files missing: %v, %q, %s", via, err, calls, out)
		}
	}
	for _, f := range []string{config, payload} {
		if err := os.WriteFile(f, []byte("{}"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	nats := filepath.Join(dir, "certs", "nats")
	for _, via := range []string{"kubectl", "faas-cli"} {
		calls, out, err := run(via)
		if err != nil || strings.Contains(calls, "nats") {
			t.Errorf("%s: %v: %s\n%s", via, err, out, calls)
		}
		if calls, out, err := run(via, "NATS=/nonexistent"); err == nil || calls != "" || !strings.Contains(out, "nats-ca: /nonexistent/ca.pem is missing") || !strings.Contains(out, "make certs-nats") {
			t.Errorf("%s: without the files of NATS: %v, %q, %s", via, err, calls, out)
		}
		if calls, out, err = run(via, "NATS="+nats); err != nil {
			t.Errorf("%s with NATS: %v: %s", via, err, out)
		}
		c := mustDefaults(t)
		for name, file := range map[string]string{c.NATSCredential: "credential", c.NATSCA: "ca.pem"} {
			if !strings.Contains(calls, "secret") || !strings.Contains(calls, filepath.Join(nats, file)) || !strings.Contains(calls, name) {
				t.Errorf("%s: no %s of %s in\n%s", via, name, file, calls)
			}
		}
		for _, name := range description(t).Secrets {
			want := "secret create " + name + " --from-file "
			if via == "kubectl" {
				want = "-n openfaas-fn create secret generic " + name + " --from-file=" + name + "="
				if !strings.Contains(calls, "manifest of "+name+"\n") {
					t.Errorf("%s: the manifest of %s is not applied:\n%s", via, name, calls)
				}
			}
			if !strings.Contains(calls, want) {
				t.Errorf("%s: no %q in\n%s", via, want, calls)
			}
		}
	}
	if out, err := exec.Command(filepath.Join(dir, "secrets.sh")).CombinedOutput(); err == nil || !bytes.Contains(out, []byte("kubectl|faas-cli")) {
		t.Errorf("without a word: %v, %s", err, out)
	}
}
