package manifests

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// makeCerts runs make certs, with more of its variables.
func makeCerts(t *testing.T, dir string, variables ...string) (string, error) {
	t.Helper()
	return runMake(t, append([]string{"certs", "DIR=" + dir}, variables...)...)
}

func runMake(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "make", append([]string{"-s", "-C", repo}, args...)...)
	// Without those that a make above this test has set.
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "MAKE") && !strings.HasPrefix(v, "MFLAGS=") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// contents are the texts of all files below dir, by their names there.
func contents(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	texts := map[string][]byte{}
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		texts[name], err = os.ReadFile(filepath.Join(dir, name))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return texts
}

// TestCertsAreKept: make certs replaces what is there only when it is told to, and
// the CA not even then, so that what it has signed goes on being trusted.
func TestCertsAreKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "certs")
	if out, err := makeCerts(t, dir); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	first := contents(t, dir)
	if len(first) != 8 {
		t.Fatalf("%d files were made, want the CA's two and three for each side", len(first))
	}

	out, err := makeCerts(t, dir)
	if err == nil || !strings.Contains(out, "FORCE=1 replaces it") {
		t.Errorf("a second run: %v: %s", err, out)
	}
	second := contents(t, dir)
	for name, text := range first {
		if !bytes.Equal(second[name], text) {
			t.Errorf("a second run replaced %s", name)
		}
	}
	if len(second) != len(first) {
		t.Errorf("a second run leaves %d files of %d", len(second), len(first))
	}

	if out, err := makeCerts(t, dir, "FORCE=1"); err != nil {
		t.Fatalf("with FORCE=1: %v: %s", err, out)
	}
	third := contents(t, dir)
	for name, text := range first {
		kept := filepath.Base(name) == "ca.pem" || name == "ca-key.pem"
		if bytes.Equal(third[name], text) != kept {
			t.Errorf("FORCE=1 kept %s: %t, want %t", name, !kept, kept)
		}
	}
	if len(third) != len(first) {
		t.Errorf("FORCE=1 leaves %d files of %d", len(third), len(first))
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(first["ca.pem"])
	for _, side := range []string{"daemon", "client"} {
		block, _ := pem.Decode(third[side+"/cert.pem"])
		if block == nil {
			t.Fatalf("%s has no certificate", side)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Errorf("the first CA has not signed %s's second certificate: %v", side, err)
		}
	}
}

// TestCertsNATS: make certs-nats leaves alone what make certs has made, and keeps the credential,
// which the function has too.
func TestCertsNATS(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "certs")
	if out, err := makeCerts(t, dir); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	first := contents(t, dir)
	var made [2]map[string][]byte
	for i, variables := range [][]string{nil, {"FORCE=1"}} {
		if out, err := runMake(t, append([]string{"certs-nats", "DIR=" + dir}, variables...)...); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		made[i] = contents(t, dir)
		for name, text := range first {
			if !bytes.Equal(made[i][name], text) {
				t.Errorf("make certs-nats replaces %s", name)
			}
		}
		if len(made[i]) != len(first)+4 {
			t.Errorf("%d files, and %d before", len(made[i]), len(first))
		}
	}
	for name, kept := range map[string]bool{"nats/credential": true, "nats/ca.pem": true, "nats/cert.pem": false, "nats/key.pem": false} {
		if bytes.Equal(made[0][name], made[1][name]) != kept || len(made[0][name]) == 0 {
			t.Errorf("FORCE=1 kept %s: %t, want %t", name, !kept, kept)
		}
	}
	if out, err := runMake(t, "certs-nats", "DIR="+dir); err == nil || !strings.Contains(out, "FORCE=1 replaces it") {
		t.Errorf("a run without FORCE=1: %v: %s", err, out)
	}
	user, password, _ := strings.Cut(strings.TrimSpace(string(made[0]["nats/credential"])), ":")
	if user != "builder" || len(password) != 65 || password[0] != 'k' {
		t.Errorf("the credential is of %q, with a password of %d characters", user, len(password))
	}
	info, err := os.Stat(filepath.Join(dir, "nats", "credential"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the credential's mode is %v, %v", info, err)
	}
}
