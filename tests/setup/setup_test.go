// Package setup_test runs setup.sh on machines whose programs are made here and do
// nothing.
package setup_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// machine is a directory of programs, the only one on the PATH.
type machine struct {
	t    *testing.T
	bin  string
	env  []string
	uses string // what apt-get was called with, a line for each call
}

// newMachine has all programs that a target needs, without those that are named.
func newMachine(t *testing.T, without ...string) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{t: t, bin: filepath.Join(dir, "bin"), uses: filepath.Join(dir, "uses")}
	if err := os.Mkdir(m.bin, 0o755); err != nil {
		t.Fatal(err)
	}
	certs := filepath.Join(dir, "certs.pem")
	if err := os.WriteFile(certs, []byte("certificates"), 0o644); err != nil {
		t.Fatal(err)
	}
	m.env = []string{"PATH=" + m.bin, "SSL_CERT_FILE=" + certs}
	for _, name := range strings.Fields(`busybox chromium conntrack curl etcd gcc git go gzip ip iptables jq
		mkfs.ext4 mount newuidmap node openssl pgrep pkg-config python3 setcap shellcheck sleep tar zstd`) {
		m.program(name, "exit 0")
	}
	m.program("id", "echo 0")
	m.program("ldd", "exit 1") // as for a static program
	m.aptGet("")
	for _, name := range without {
		if err := os.Remove(filepath.Join(m.bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

func (m *machine) program(name, script string) {
	m.t.Helper()
	if err := os.WriteFile(filepath.Join(m.bin, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		m.t.Fatal(err)
	}
}

// aptGet makes an apt-get that runs the script. Its packages have one program each, of
// the package's name.
func (m *machine) aptGet(script string) {
	m.t.Helper()
	m.program("apt-get", `echo "$*" >>`+m.uses+`
PATH=/usr/bin:/bin
`+script+`
[ "$4" = install ] || exit 0
shift 7
for package; do cp `+m.bin+`/id `+m.bin+`/$package; done`)
}

// setup runs the script, and returns what it prints and what apt-get was asked for.
func (m *machine) setup(args ...string) (printed string, installs []string, ok bool) {
	m.t.Helper()
	cmd := exec.Command("./setup.sh", args...)
	cmd.Env = m.env
	out, err := cmd.CombinedOutput()
	if _, exited := err.(*exec.ExitError); err != nil && !exited {
		m.t.Fatal(err)
	}
	uses, err2 := os.ReadFile(m.uses)
	if err2 != nil && !os.IsNotExist(err2) {
		m.t.Fatal(err2)
	}
	return string(out), strings.Split(strings.TrimSuffix(string(uses), "\n"), "\n"), err == nil
}

// TestPackages has each target miss a program.
func TestPackages(t *testing.T) {
	for _, tc := range []struct{ targets, without, packages string }{
		{"run", "openssl", "openssl"},
		{"run", "pkg-config", "pkg-config libseccomp-dev"},
		{"up", "busybox", "busybox-static"},
		{"publish", "gcc", "gcc libc6-dev"},
		{"run", "chromium jq node curl shellcheck", ""},
		{"test-unit", "openssl jq", ""},
		{"test-unit", "gcc", "gcc libc6-dev"},
		{"test", "jq mkfs.ext4 node openssl", "openssl e2fsprogs jq nodejs"},
		{"test lint", "jq openssl shellcheck", "openssl jq shellcheck"},
		{"test-e2e", "iptables shellcheck", "iptables"},
		{"lint", "shellcheck openssl", "shellcheck"},
		{"vuln", "curl shellcheck", "curl"},
		{"help", "openssl curl gcc", ""},
	} {
		t.Run(tc.targets+" without "+tc.without, func(t *testing.T) {
			m := newMachine(t, strings.Fields(tc.without)...)
			m.env = append(m.env, "SETUP=no")
			printed, installs, ok := m.setup(strings.Fields(tc.targets)...)
			want := ""
			if tc.packages != "" {
				want = "setup: missing: apt-get install --no-install-recommends " + tc.packages + "\n"
			}
			if printed != want || ok != (want == "") {
				t.Errorf("printed %q, success %t; want %q", printed, ok, want)
			}
			if len(installs) != 1 || installs[0] != "" {
				t.Errorf("apt-get was called: %q", installs)
			}
		})
	}
}

// TestBusyboxIsStatic has a busybox that needs libraries.
func TestBusyboxIsStatic(t *testing.T) {
	m := newMachine(t)
	m.env = append(m.env, "SETUP=no")
	m.program("ldd", "exit 0")
	if printed, _, ok := m.setup("run"); ok || !strings.HasSuffix(printed, " busybox-static\n") {
		t.Errorf("printed %q, success %t", printed, ok)
	}
}

// TestInstalls waits for the lock of apt's lists, which apt-get itself does not.
func TestInstalls(t *testing.T) {
	m := newMachine(t, "jq", "openssl")
	m.aptGet(`if [ ! -e ` + m.bin + `/lock ]; then touch ` + m.bin + `/lock; echo 'E: Could not get lock'; exit 100; fi`)
	printed, uses, ok := m.setup("test")
	if !ok || printed != "setup: installing openssl jq\n" {
		t.Errorf("printed %q, success %t", printed, ok)
	}
	want := []string{
		"-qq -o DPkg::Lock::Timeout=600 update",
		"-qq -o DPkg::Lock::Timeout=600 update",
		"-qq -o DPkg::Lock::Timeout=600 install -y --no-upgrade --no-install-recommends openssl jq",
	}
	if strings.Join(uses, "\n") != strings.Join(want, "\n") {
		t.Errorf("apt-get was called with %q, want %q", uses, want)
	}
}

// TestInstallFails shows what apt-get printed, and believes no success that brings
// nothing.
func TestInstallFails(t *testing.T) {
	for script, want := range map[string]string{
		"echo 'E: no space left'; exit 100": "E: no space left",
		"exit 0":                            "installed, but not found: openssl",
	} {
		m := newMachine(t, "openssl")
		m.aptGet(script)
		if printed, _, ok := m.setup("run"); ok || !strings.Contains(printed, want) {
			t.Errorf("printed %q, success %t; want %q", printed, ok, want)
		}
	}
}

// TestNoInstall is where nothing can be installed: there is no apt-get, or no root.
func TestNoInstall(t *testing.T) {
	elsewhere := newMachine(t, "openssl", "apt-get")
	if printed, _, ok := elsewhere.setup("run"); ok || printed != "setup: missing, by the names of Debian's packages: openssl\n" {
		t.Errorf("without apt-get: printed %q, success %t", printed, ok)
	}

	user := newMachine(t, "openssl", "shellcheck")
	user.program("id", "echo 1000")
	printed, uses, ok := user.setup("run")
	want := "setup: make run needs root, for buildkitd and runc: sudo -E make run\nsetup: missing: apt-get install --no-install-recommends openssl\n"
	if ok || printed != want || uses[0] != "" {
		t.Errorf("run without root: printed %q, success %t, apt-get %q", printed, ok, uses)
	}
	printed, _, ok = user.setup("lint")
	if ok || printed != "setup: missing: apt-get install --no-install-recommends shellcheck\n" {
		t.Errorf("lint without root: printed %q, success %t", printed, ok)
	}
	if printed, _, ok = user.setup("test-unit"); !ok || printed != "" {
		t.Errorf("test-unit without root: printed %q, success %t", printed, ok)
	}
}

// TestTargets asks for each target of the Makefile.
func TestTargets(t *testing.T) {
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	targets := regexp.MustCompile(`(?m)^([a-z0-9-]+):.*## `).FindAllStringSubmatch(string(makefile), -1)
	if len(targets) < 15 {
		t.Fatalf("the Makefile has %d targets", len(targets))
	}
	m := newMachine(t)
	for _, target := range targets {
		if printed, _, _ := m.setup(target[1]); strings.Contains(printed, "no packages are listed") {
			t.Error(printed)
		}
	}
	if printed, _, ok := m.setup("no-such-target"); ok || !strings.Contains(printed, "no-such-target") {
		t.Errorf("printed %q, success %t", printed, ok)
	}
}
