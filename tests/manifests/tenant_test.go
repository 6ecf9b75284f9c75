package manifests

import (
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"handler/function/tenants"
)

// TestMakeTenant pastes two entries that make prints below "tenants:", and reads the file.
func TestMakeTenant(t *testing.T) {
	entry := func(name, images string) string {
		t.Helper()
		out, err := exec.Command("make", "-s", "-C", "../..", "tenant", "NAME="+name, "IMAGES="+images).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	file := "version: 1\ntenants:\n" + entry("acme", "registry.example.com/acme,localhost:5000/acme") + entry("globex", "globex")
	set, err := tenants.Read([]tenants.File{{Name: "tenants", Data: []byte(file)}}, tenants.Installation{})
	if err != nil {
		t.Fatalf("%v:\n%s", err, file)
	}
	acme, globex := set.Tenants[0], set.Tenants[1]
	if want := []string{"registry.example.com/acme", "localhost:5000/acme"}; acme.Name != "acme" || !slices.Equal(acme.Images, want) {
		t.Errorf("got %s with %q, want acme with %q", acme.Name, acme.Images, want)
	}
	form := regexp.MustCompile(`^t-[0-9a-f]{16}$`)
	if !form.MatchString(acme.ID) || !form.MatchString(globex.ID) || acme.ID == globex.ID {
		t.Errorf("the ids are %q and %q", acme.ID, globex.ID)
	}
	a, b := string(acme.Keys[0].Secret), string(globex.Keys[0].Secret)
	if len(a) != 64 || strings.Trim(a, "0123456789abcdef") != "" || a == b {
		t.Errorf("keys of %d bytes; the same: %v", len(a), a == b)
	}
	for _, args := range [][]string{{}, {"acme"}, {"acme", ""}, {"", "acme"}, {"Acme", "acme"}, {"acme: {}", "acme"}, {"acme", `acme", "b`}} {
		if out, err := exec.Command("../../buildkit/tenant.sh", args...).CombinedOutput(); err == nil || !strings.HasPrefix(string(out), "usage: ") {
			t.Errorf("%q: %v, %s", args, err, out)
		}
	}
}
