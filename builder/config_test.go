package function

import (
	"bufio"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"handler/function/buildkit"
)

func env(pairs ...string) func(string) string {
	m := make(map[string]string)
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	return func(name string) string { return m[name] }
}

func TestLoadConfig(t *testing.T) {
	c, err := LoadConfig(env(
		"max_builds", "7",
		"build_timeout", "1800",
		"push_timeout", "90s",
		"max_body_bytes", "64MiB",
		"max_unpacked_bytes", "1048576",
		"allowed_images", "ghcr.io/acme, acme,registry.example:5000 ,docker.io/library/app/",
		"registry_ca", "Registry.example:5000=registry-ca",
		"token_hosts", "registry.example=auth.example:5001, own.example:5000",
		"token_paths", "registry.example/docker=,registry.example=prefix",
		"registry_mirrors", "docker.io=http://mirror.example:5000, ghcr.io=mirror.example",
		"from_unasked", "docker.io/library/*, ghcr.io/acme/base",
		"context_hosts", "github.com, http://git.example:3000",
		"context_repository", "http://registry.example:5000/contexts",
		"disable_hmac", "true",
		"buildkit_addr", "tcp://a:1, tcp://b:1",
		"cache_repository", "acme/cache",
		"create_repositories", "true",
		"image_compression", " zstd:3 ",
		"metrics_tenants", "true",
		"nats_url", "tls://a:4222,tls://b:4222",
		"nats_replicas", "3",
		"nats_credential_file", "login",
	))
	if err != nil {
		t.Fatal(err)
	}
	if c.Server.MaxBuilds != 7 || c.Server.BuildTimeout != 30*time.Minute || c.Buildkit.BuildTimeout != 30*time.Minute || c.Buildkit.PushTimeout != 90*time.Second ||
		c.Server.Limits.Body != 64<<20 || c.Server.Limits.Unpacked != 1<<20 || !c.Server.DisableHMAC || !c.Registry.CreateRepositories {
		t.Errorf("got %+v", c)
	}
	if c.NATSURL != "tls://a:4222,tls://b:4222" || c.NATSReplicas != 3 || c.NATSCredential != "login" || c.NATSCA != "nats-ca" {
		t.Errorf("NATS %q, %d, %q, %q", c.NATSURL, c.NATSReplicas, c.NATSCredential, c.NATSCA)
	}
	if !c.Server.MetricsTenants {
		t.Error("metrics have no tenants")
	}
	if want := []string{"ghcr.io/acme", "docker.io/acme", "registry.example:5000", "docker.io/library/app"}; !slices.Equal(c.Server.AllowedImages, want) {
		t.Errorf("allowed images %q, want %q", c.Server.AllowedImages, want)
	}
	if !slices.Equal(c.Buildkit.Addrs, []string{"tcp://a:1", "tcp://b:1"}) || c.Buildkit.CacheRepository.Name() != "docker.io/acme/cache" {
		t.Errorf("daemons %q, cache %v", c.Buildkit.Addrs, c.Buildkit.CacheRepository)
	}
	if len(c.Registry.TokenHosts) != 2 || len(c.Registry.TokenPaths) != 2 || c.Contexts.Repository != "http://registry.example:5000/contexts" || !slices.Equal(c.Server.ContextHosts, []string{"github.com", "http://git.example:3000"}) {
		t.Errorf("token hosts %v, contexts %q from %q", c.Registry.TokenHosts, c.Contexts.Repository, c.Server.ContextHosts)
	}
	if len(c.Registry.Mirrors) != 2 || !slices.Equal(c.Buildkit.Unasked, []string{"docker.io/library/*", "ghcr.io/acme/base"}) {
		t.Errorf("mirrors %v, unasked %q", c.Registry.Mirrors, c.Buildkit.Unasked)
	}
	if c.Buildkit.Compression != (buildkit.Compression{Type: "zstd", Level: 3}) {
		t.Errorf("compression %+v", c.Buildkit.Compression)
	}
	if c.RegistryCA["registry.example:5000"] != "registry-ca" {
		t.Errorf("registry CAs %q", c.RegistryCA)
	}
}

func TestLoadConfigNamesWhatIsWrong(t *testing.T) {
	for _, pair := range [][2]string{
		{"max_builds", "0"}, {"max_uploads", "many"}, {"queue_wait", "-1s"}, {"build_timeout", "soon"},
		{"max_body_bytes", "512 apples"}, {"disable_hmac", "perhaps"}, {"allowed_images", "ghcr.io/acme:tag"},
		{"allowed_images", "ghcr.io/UPPER"}, {"cache_repository", "ghcr.io/acme/cache:tag"}, {"registry_ca", "host"}, {"registry_ca", "host=../ca"}, {"log_level", "loud"},
		{"registry_ca", "a.example=ca,A.example.=other"}, {"token_hosts", "registry=http://auth"}, {"token_hosts", "registry=auth/token"},
		{"token_paths", "registry/a"}, {"token_paths", "registry:05000/a=b"},
		{"registry_mirrors", "ghcr.io"}, {"registry_mirrors", "ghcr.io=ftp://mirror"}, {"from_unasked", "alpine"}, {"from_unasked", "*.example/app"},
		{"context_hosts", "https://github.com/acme"}, {"context_hosts", "[::1]"},
		{"image_compression", "gzip:best"}, {"metrics_tenants", "all"},
		{"tenants_file", "../tenants"}, {"tenants_file", "."}, {"tenants_file", "a,a"},
	} {
		c, err := LoadConfig(env(pair[0], pair[1], "push_timeout", "x"))
		if err == nil || c != nil {
			t.Errorf("%s=%q was taken", pair[0], pair[1])
			continue
		}
		for _, name := range []string{pair[0], "push_timeout"} {
			if !strings.Contains(err.Error(), name) {
				t.Errorf("%s=%q: the error does not name %s: %v", pair[0], pair[1], name, err)
			}
		}
	}
}

func TestTenantsFiles(t *testing.T) {
	if c, err := LoadConfig(env("tenants_file", "tenants-a, tenants-b")); err != nil || !slices.Equal(c.TenantsFiles, []string{"tenants-a", "tenants-b"}) {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := LoadConfig(env("tenants_file", "tenants", "disable_hmac", "true")); err == nil || !strings.Contains(err.Error(), "tenants_file: ") {
		t.Errorf("a file of tenants beside disable_hmac: %v", err)
	}
}

// TestLoadConfigPorts gives a bad port to each variable that has a host. A number may be
// written in one way only, so that no two texts are the same host.
func TestLoadConfigPorts(t *testing.T) {
	for name, form := range map[string]string{
		"allowed_images": "registry:%/acme", "allowed_images ": "registry:%", "cache_repository": "registry:%/cache",
		"context_repository": "registry:%/contexts", "context_repository ": "http://registry:%/contexts",
		"context_hosts": "git:%", "context_hosts ": "http://git:%", "registry_ca": "registry:%=ca",
		"token_hosts": "registry:%", "token_hosts ": "registry:%=auth", "token_hosts  ": "registry=auth:%",
	} {
		name = strings.TrimSpace(name)
		for port, ok := range map[string]bool{"5000": true, "05000": false, "0": false, "65536": false, "": false, "x": false, "+1": false} {
			value := strings.Replace(form, "%", port, 1)
			_, err := LoadConfig(env(name, value))
			if (err == nil) != ok || err != nil && !strings.Contains(err.Error(), name+": ") {
				t.Errorf("%s=%q: %v", name, value, err)
			}
		}
	}
}

func TestNumbersHaveTwoBounds(t *testing.T) {
	for value, ok := range map[string]bool{"1": true, "2147483647": true, "2147483648": false, "3000000000": false, "0": false, "-1": false, "x": false} {
		c, err := LoadConfig(env("max_entries", value))
		if ok && (err != nil || strconv.Itoa(c.Server.Limits.Entries) != value) {
			t.Errorf("%s: %+v %v", value, c, err)
		}
		if !ok && (err == nil || !strings.Contains(err.Error(), "max_entries") || !strings.Contains(err.Error(), "from 1 to 2147483647")) {
			t.Errorf("%s: %v", value, err)
		}
	}
}

func TestOwnRepositories(t *testing.T) {
	for _, tt := range []struct {
		cache, contexts string
		want            []string
	}{
		{"", "", nil},
		{"acme/cache", "", []string{"docker.io/acme/cache"}},
		{"", "registry.example.com/builder/contexts", []string{"registry.example.com/builder/contexts"}},
		{"ghcr.io/acme/cache", "http://registry.openfaas:5000/contexts", []string{"ghcr.io/acme/cache", "registry.openfaas:5000/contexts"}},
	} {
		c, err := LoadConfig(env("cache_repository", tt.cache, "context_repository", tt.contexts))
		if err != nil {
			t.Fatal(err)
		}
		if got := c.ownRepositories(); !slices.Equal(got, tt.want) {
			t.Errorf("%q and %q: got %q, want %q", tt.cache, tt.contexts, got, tt.want)
		}
	}
}

func TestReadSecret(t *testing.T) {
	c := &Config{SecretsDir: t.TempDir()}
	if _, err := c.ReadSecret("missing", false); err == nil {
		t.Error("a missing secret was read")
	}
	if data, err := c.ReadSecret("missing", true); err != nil || data != nil {
		t.Errorf("a missing optional secret: %q, %v", data, err)
	}
	if err := os.WriteFile(filepath.Join(c.SecretsDir, "large"), make([]byte, maxSecret+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ReadSecret("large", true); err == nil {
		t.Error("a secret without bound was read")
	}
}

func TestShorterTimeouts(t *testing.T) {
	for _, tt := range []struct {
		write, exec string
		want        []string
	}{
		{"", "", []string{"write_timeout", "exec_timeout"}},
		{"20m", "20m", nil},
		{"20m", "0", nil},
		{"1200", "60", []string{"exec_timeout"}},
		{"15m", "16m", []string{"write_timeout"}},
	} {
		if got := shorterTimeouts(15*time.Minute, env("write_timeout", tt.write, "exec_timeout", tt.exec)); !slices.Equal(got, tt.want) {
			t.Errorf("write %q, exec %q: got %q, want %q", tt.write, tt.exec, got, tt.want)
		}
	}
}

// TestConfigFieldsNameTheirVariables compares Config's comments with LoadConfig: a field names
// every variable that LoadConfig reads, and no other.
func TestConfigFieldsNameTheirVariables(t *testing.T) {
	var asked []string
	if _, err := LoadConfig(func(name string) string { asked = append(asked, name); return "" }); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open("config.go")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var fields strings.Builder
	within := false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		within = within || strings.HasPrefix(lines.Text(), "type Config struct")
		if within && lines.Text() == "}" {
			break
		}
		if within {
			fields.WriteString(lines.Text() + "\n")
		}
	}
	for _, name := range asked {
		if !regexp.MustCompile(`\b` + name + `\b`).MatchString(fields.String()) {
			t.Errorf("%s is not named at a field of Config", name)
		}
	}
	if len(asked) < 45 {
		t.Errorf("LoadConfig reads only %d variables", len(asked))
	}
	for _, name := range regexp.MustCompile(`\b[a-z]+(_[a-z]+)+\b`).FindAllString(fields.String(), -1) {
		if !slices.Contains(asked, name) {
			t.Errorf("a field of Config names %s, which LoadConfig does not read", name)
		}
	}
}
