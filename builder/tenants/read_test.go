package tenants

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// full has every key. Each line that TestReadRefuses changes is there once.
const full = `version: 1
defaults: {builds: 3, queue: 60, from: ["*"]}
pools:
  gold: ["tcp://gold-0:1234", "unix:///run/gold.sock"]
tenants:
  globex:
    id: t-2
    keys: [{id: k1, secret: "globex's only key"}]
    images: [ghcr.io/globex]
    queue: 0
  acme:
    id: t-7f3a9c0e2b41d8f6
    keys:
      - {id: k1, secret: "acme's first key, 1"}
      - {id: k2, secret: "acme's second key 2", until: 2027-01-31T00:00:00Z}
    hosts: [Acme.builder.example.com:443]
    images: [registry.example.com/acme, acme]
    from: ["docker.io/library/*", "registry.example.com/base/*"]
    registry: {auths: {registry.example.com: {auth: "YWNtZTpwdw=="}}}
    context_hosts: [github.com, "http://git.example.com"]
    git_credentials: ["https://user:token-of-acme@github.com/acme"]
    memory: 2GiB
    cpus: 1.5
    daemons: gold
    platforms: [linux/amd64, linux/aarch64]
    builds: 2
    weight: 4
    build_timeout: 10m
    max_body_bytes: 64MiB
    suspended: true
operator:
  keys: [{id: ops, secret: "the operator's key"}]
`

var installation = Installation{
	PayloadSecret: []byte("the root of all salts\n"),
	AllowedImages: []string{"ghcr.io", "registry.example.com", "docker.io/acme"},
	Daemons:       []string{"tcp://buildkitd:1234"},
}

// read reads one file, named tenants.
func read(text string) (*Set, error) {
	return Read([]File{{Name: "tenants", Data: []byte(text)}}, installation)
}

func TestRead(t *testing.T) {
	s, err := read(full)
	if err != nil {
		t.Fatal(err)
	}
	acme := &Tenant{
		Name: "acme",
		ID:   "t-7f3a9c0e2b41d8f6",
		Keys: []Key{
			{ID: "k1", Secret: []byte("acme's first key, 1")},
			{ID: "k2", Secret: []byte("acme's second key 2"), Until: time.Date(2027, 1, 31, 0, 0, 0, 0, time.UTC)},
		},
		Hosts:          []string{"acme.builder.example.com"},
		Images:         []string{"registry.example.com/acme", "docker.io/acme"},
		From:           []string{"docker.io/library/*", "registry.example.com/base/*"},
		Registry:       Registry{Config: []byte(`{"auths":{"registry.example.com":{"auth":"YWNtZTpwdw=="}}}`)},
		ContextHosts:   []string{"github.com", "http://git.example.com"},
		GitCredentials: []byte("https://user:token-of-acme@github.com/acme"),
		Platforms:      []string{"linux/amd64", "linux/arm64"},
		Memory:         2 << 30,
		CPUs:           1.5,
		Pool:           "gold",
		Builds:         2,
		Queue:          60,
		Weight:         4,
		BuildTimeout:   10 * time.Minute,
		MaxBodyBytes:   64 << 20,
		Suspended:      true,
	}
	globex := &Tenant{
		Name: "globex", ID: "t-2", Keys: []Key{{ID: "k1", Secret: []byte("globex's only key")}}, Images: []string{"ghcr.io/globex"},
		From: []string{"*"}, Builds: 3, Weight: 1,
	}
	if want := []*Tenant{acme, globex}; !reflect.DeepEqual(s.Tenants, want) {
		t.Errorf("got %+v and %+v, want %+v and %+v", s.Tenants[0], s.Tenants[1], want[0], want[1])
	}
	if !s.File || len(s.Operators) != 1 || s.Operators[0].ID != "ops" || string(s.Operators[0].Secret) != "the operator's key" {
		t.Errorf("a file %v, operators %q", s.File, s.Operators)
	}
	if want := map[string][]string{"gold": {"tcp://gold-0:1234", "unix:///run/gold.sock"}}; !reflect.DeepEqual(s.Pools, want) {
		t.Errorf("pools %q", s.Pools)
	}
	if list, ok := s.AtHost("ACME.builder.example.com"); !ok || owner(list) != "acme" {
		t.Errorf("at acme's host: %v, %v", list, ok)
	}
	if owner(s.Named("globex")) != "globex" || owner(s.Named("t-2")) != "" {
		t.Error("tenants are found by something else than their names")
	}
}

// TestReadForms tries every further form of a value.
func TestReadForms(t *testing.T) {
	for _, tt := range []struct {
		old, new string
		got      func(acme *Tenant) any
		want     any
	}{
		{"registry: {auths: {registry.example.com: {auth: \"YWNtZTpwdw==\"}}}", "registry: builder",
			func(a *Tenant) any { return a.Registry }, Registry{Builder: true}},
		{`{auth: "YWNtZTpwdw=="}`, "{username: acme, password: pw}",
			func(a *Tenant) any { return string(a.Registry.Config) }, `{"auths":{"registry.example.com":{"username":"acme","password":"pw"}}}`},
		{`registry.example.com: {auth: "YWNtZTpwdw=="}`, "\"https://index.docker.io/v1/\": {identitytoken: a}, \"*.example.com/acme\": {registrytoken: b}",
			func(a *Tenant) any { return string(a.Registry.Config) },
			`{"auths":{"*.example.com/acme":{"registrytoken":"b"},"https://index.docker.io/v1/":{"identitytoken":"a"}}}`},
		{"    memory: 2GiB\n", "    memory: 33554432\n", func(a *Tenant) any { return a.Memory }, int64(32 << 20)},
		{"    memory: 2GiB\n", "", func(a *Tenant) any { return a.Memory }, int64(0)},
		{"cpus: 1.5", "cpus: 2", func(a *Tenant) any { return a.CPUs }, 2.0},
		{"daemons: gold", "daemons: shared", func(a *Tenant) any { return a.Pool }, ""},
		{"build_timeout: 10m", "build_timeout: 90", func(a *Tenant) any { return a.BuildTimeout }, 90 * time.Second},
		{"suspended: true", "suspended: false", func(a *Tenant) any { return a.Suspended }, false},
		{`    from: ["docker.io/library/*", "registry.example.com/base/*"]` + "\n", "", func(a *Tenant) any { return a.From }, []string{"*"}},
		{`from: ["docker.io/library/*", "registry.example.com/base/*"]`, "from: []", func(a *Tenant) any { return a.From }, []string{}},
		{`["https://user:token-of-acme@github.com/acme"]`, `["https://a:b@c.example", "http://d:e@f.example:3000/g/"]`,
			func(a *Tenant) any { return string(a.GitCredentials) }, "https://a:b@c.example\nhttp://d:e@f.example:3000/g/"},
		{"2027-01-31T00:00:00Z", `"2027-01-31T01:00:00+01:00"`, func(a *Tenant) any { return a.Keys[1].Until.UTC() }, time.Date(2027, 1, 31, 0, 0, 0, 0, time.UTC)},
		{`"acme's first key, 1"`, `"first line\nand second"`, func(a *Tenant) any { return string(a.Keys[0].Secret) }, "first line\nand second"},
		{"hosts: [Acme.builder.example.com:443]", "hosts: [a.example:80, b.example:8080, c.example.]", func(a *Tenant) any { return a.Hosts },
			[]string{"a.example", "b.example:8080", "c.example"}},
		{"version: 1\n", "\uFEFF---\r\n# a comment\r\nversion: 1\r\n", func(a *Tenant) any { return a.Name }, "acme"},
	} {
		s, err := read(change(t, full, tt.old, tt.new))
		if err != nil {
			t.Errorf("%s: %v", tt.new, err)
			continue
		}
		if got := tt.got(s.Tenants[0]); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.new, got, tt.want)
		}
	}
}

// change replaces what is there once.
func change(t testing.TB, text, old, new string) string {
	t.Helper()
	if strings.Count(text, old) != 1 {
		t.Fatalf("%q is there %d times", old, strings.Count(text, old))
	}
	return strings.Replace(text, old, new, 1)
}

// TestReadRefuses changes one thing in the full file. It wants one problem, and its place.
func TestReadRefuses(t *testing.T) {
	for _, tt := range []struct{ old, new, want string }{
		// The file.
		{full, "", "line 1: the file: there is nothing in it"},
		{full, "# nothing yet\n", "line 1: the file: there is nothing in it"},
		{full, "version: 1\n", "there is no tenant in it"},
		{full, "- version: 1\n", "line 1: the file: want keys with values"},
		{full, "version: 1\ntenants: {", "line 2: the file: did not find expected node content"},
		{"  gold: [", "\tgold: [", "line 4: the file: found character that cannot start any token"},
		{"version: 1\n", "version: 1\n...\n---\n", "line 3: the file: a second document: a file has one"},
		{"suspended: true", "suspended: true # \xff", "line 30: the file: a byte that is no UTF-8, or a control character"},
		{"suspended: true", "suspended: true # \x00", "line 30: the file: a byte that is no UTF-8, or a control character"},
		{"suspended: true", "suspended: true # " + strings.Repeat("x", maxFile), "line 1: the file: over 8388608 bytes"},
		{"suspended: true", "suspended: true # " + strings.Repeat("-", maxMarks), "line 1: the file: over 300000 values"},
		{"version: 1\n", "", "line 1: version: it is missing"},
		{"version: 1", "version: 2", "line 1: version: want 1, the only version there is"},
		{"version: 1", `version: "1"`, "line 1: version: want 1"},
		{"version: 1\n", "version: 1\nversion: 1\n", "line 2: the file: a key is there twice: it is in line 1 too"},
		{"operator:", "operators:", "line 31: operators: there is no such key: the keys are defaults, operator, pools, tenants, version"},

		// YAML that is not read.
		{"builds: 2", "builds: &b 2", "line 26: tenants.acme.builds: anchors are not read"},
		{"weight: 4", "weight: !!int 4", "line 27: tenants.acme.weight: tags are not read"},
		{"images: [ghcr.io/globex]\n    queue: 0", "images: [&i ghcr.io/globex]\n    queue: 0", "line 9: tenants.globex.images[0]: anchors are not read"},
		{"weight: 4", "<<: {weight: 4}", "line 27: tenants.acme: merge keys are not read: write the values out"},
		{`"acme's first key, 1"`, "*acmes-first-key-1", "line 1: the file: a value that begins with * needs quotes: aliases are not read"},
		{"    weight: 4", "    4: 4", "line 27: tenants.acme: want a key that is text in quotes"},
		{"    weight: 4", "    [weight]: 4", "line 27: tenants.acme: want a key that is text"},

		// Defaults.
		{"{builds: 3,", "{builds: 3, id: t-1,", "line 2: defaults.id: there is no such key"},
		{"{builds: 3,", "{builds: 3, hosts: [a.example],", "line 2: defaults.hosts: there is no such key"},
		{"{builds: 3,", "{builds: -1,", `line 2: defaults.builds: "-1" is not a whole number from 0 to 1000000`},
		{"{builds: 3,", "{builds: 3, daemons: silver,", "line 2: defaults.daemons: there is no such pool under pools"},
		{`{builds: 3, queue: 60, from: ["*"]}`, "", "line 2: defaults: there is no value: want keys with values"},

		// Pools.
		{"  gold: [", "  Silver: [tcp://a:1]\n  gold: [", "line 4: pools: the name of a pool has 1 to 40 lower-case letters"},
		{"  gold: [", "  shared: [tcp://b:1]\n  gold: [", "line 4: pools: the name of a pool has 1 to 40 lower-case letters"},
		{"unix:///run/gold.sock", "unix://gold.sock", `line 4: pools.gold[1]: "unix://gold.sock" is not an address`},
		{"unix:///run/gold.sock", "tcp://gold", `line 4: pools.gold[1]: "tcp://gold" is not an address`},
		{"unix:///run/gold.sock", "http://gold:1", `line 4: pools.gold[1]: "http://gold:1" is not an address`},
		{"unix:///run/gold.sock", "tcp://gold:01234", `line 4: pools.gold[1]: port "01234"`},
		{"unix:///run/gold.sock", "tcp://gold:1234/path", `line 4: pools.gold[1]: "tcp://gold:1234/path" is not an address`},
		{"unix:///run/gold.sock", "tcp://gold-0:1234", "line 4: pools.gold[1]: the same daemon is in tenants: line 4"},
		{"unix:///run/gold.sock", "tcp://buildkitd:1234", "line 4: pools.gold[1]: the same daemon is in buildkit_addr"},
		{"unix:///run/gold.sock", "tcp://Buildkitd.:1234", "line 4: pools.gold[1]: the same daemon is in buildkit_addr"},
		{`["tcp://gold-0:1234", "unix:///run/gold.sock"]`, "[]", "line 4: pools.gold: there are no daemons in it"},
		{`["tcp://gold-0:1234", "unix:///run/gold.sock"]`, "tcp://gold-0:1234", "line 4: pools.gold: want a list"},

		// Tenants.
		{"  acme:\n", "  Acme:\n", "line 11: tenants: a tenant's name has 1 to 63 lower-case letters"},
		{"  acme:\n", "  \"acme inc\":\n", "line 11: tenants: a tenant's name has 1 to 63 lower-case letters"},
		{"  acme:\n", "  globex:\n", "line 11: tenants: a key is there twice: it is in line 6 too"},
		{"operator:\n", "  initech:\noperator:\n", "line 31: tenants.initech: there is no value: want keys with values"},
		{"    id: t-7f3a9c0e2b41d8f6\n", "", "line 12: tenants.acme.id: it is missing"},
		{"id: t-7f3a9c0e2b41d8f6", "id: T-7F3A", "line 12: tenants.acme.id: an id has 1 to 40 lower-case letters"},
		{"id: t-7f3a9c0e2b41d8f6", "id: -t", "line 12: tenants.acme.id: an id has 1 to 40 lower-case letters"},
		{"id: t-7f3a9c0e2b41d8f6", "id: " + strings.Repeat("t", 41), "line 12: tenants.acme.id: an id has 1 to 40 lower-case letters"},
		{"id: t-7f3a9c0e2b41d8f6", "id: 7", "line 12: tenants.acme.id: want text in quotes"},
		{"id: t-7f3a9c0e2b41d8f6", `id: ""`, "line 12: tenants.acme.id: there is no text in it"},
		{"id: t-7f3a9c0e2b41d8f6", "id: default", `line 12: tenants.acme.id: "default" is the id of the only tenant where there is no file`},
		{"id: t-7f3a9c0e2b41d8f6", "id: t-2", "line 12: tenants.acme.id: the same id is in tenants: line 7"},
		{"hosts: [Acme.builder.example.com:443]", "hosts: [a.example, A.example.:80]", "line 16: tenants.acme.hosts[1]: the same host is in tenants: line 16"},
		{"hosts: [Acme.builder.example.com:443]", "hosts: [https://a.example]", "line 16: tenants.acme.hosts[0]: port"},
		{"hosts: [Acme.builder.example.com:443]", "hosts: a.example", "line 16: tenants.acme.hosts: want a list"},

		// Images.
		{"    images: [ghcr.io/globex]\n", "", "line 7: tenants.globex.images: it is missing"},
		{"[ghcr.io/globex]", "[]", "line 9: tenants.globex.images: there are no images in it"},
		{"[ghcr.io/globex]", "[ghcr.io/Globex]", `line 9: tenants.globex.images[0]: "ghcr.io/Globex" is not a repository prefix`},
		{"[ghcr.io/globex]", "[quay.io/globex]", `line 9: tenants.globex.images[0]: "quay.io/globex" is outside allowed_images`},
		{"[ghcr.io/globex]", "[ghcr.io/globex, ghcr.io:80/globex]", `line 9: tenants.globex.images[1]: "ghcr.io:80/globex" is outside allowed_images`},
		{"[ghcr.io/globex]", "[registry.example.com/acme]", `line 17: tenants.acme.images[0]: "registry.example.com/acme" overlaps "registry.example.com/acme" of tenant globex in tenants: line 9`},
		{"[ghcr.io/globex]", "[registry.example.com]", `line 17: tenants.acme.images[0]: "registry.example.com/acme" overlaps "registry.example.com" of tenant globex in tenants: line 9`},
		{"[ghcr.io/globex]", "[registry.example.com/acme/app]", `line 9: tenants.globex.images[0]: "registry.example.com/acme/app" overlaps "registry.example.com/acme" of tenant acme in tenants: line 17`},
		{"[ghcr.io/globex]", "[registry.example.com:443/acme]", `line 17: tenants.acme.images[0]: "registry.example.com/acme" overlaps`},
		{"[ghcr.io/globex]", "[index.docker.io/acme/app]", `line 9: tenants.globex.images[0]: "docker.io/acme/app" overlaps "docker.io/acme" of tenant acme in tenants: line 17`},

		{"[ghcr.io/globex]", "[docker.io/globex]", `line 9: tenants.globex.images[0]: "docker.io/globex" is the image "docker.io/library/globex"; the account is "globex"`},
		{"[ghcr.io/globex]", "[index.docker.io/globex]", `line 9: tenants.globex.images[0]: "index.docker.io/globex" is the image "docker.io/library/globex"; the account is "globex"`},
		{"[ghcr.io/globex]", "[docker.io/globex/app]", `line 9: tenants.globex.images[0]: "docker.io/globex/app" is outside allowed_images`},

		// What may be pulled.
		{`"docker.io/library/*"`, `"*.io/library/*"`, `line 18: tenants.acme.from[0]: "*.io/library/*" has a * in its host: write the host out, or * for all of it`},
		{`"docker.io/library/*"`, `alpine`, `line 18: tenants.acme.from[0]: "alpine" does not begin with a host`},
		{`"docker.io/library/*"`, `"docker.io/library/alpine:3"`, `line 18: tenants.acme.from[0]: "docker.io/library/alpine:3" is not a pattern`},
		{`"docker.io/library/*"`, `"registry.example.com/base/*"`, "line 18: tenants.acme.from[1]: it is in line 18 too"},
		{`    from: ["docker.io/library/*", "registry.example.com/base/*"]`, "    from: docker.io/library/*", "line 18: tenants.acme.from: want a list"},
		{"[github.com, ", "[github.com/acme, ", "line 20: tenants.acme.context_hosts[0]: "},
		{"[github.com, ", "[7, ", "line 20: tenants.acme.context_hosts[0]: want text in quotes"},
		{"[linux/amd64,", "[linux/amd64/x/y,", `line 25: tenants.acme.platforms[0]: "linux/amd64/x/y" is not a platform`},
		{"[linux/amd64,", "[linux/arm64,", "line 25: tenants.acme.platforms[1]: it is in line 25 too"},
		{"[linux/amd64, linux/aarch64]", "[]", "line 25: tenants.acme.platforms: there are no platforms in it"},

		// Sizes, times and numbers.
		{"memory: 2GiB", "memory: 2", `line 22: tenants.acme.memory: "2" is not a size from 6MiB to 1PiB`},
		{"memory: 2GiB", "memory: two", `line 22: tenants.acme.memory: "two" is not a size from 6MiB to 1PiB`},
		{"memory: 2GiB", "memory: 9999999999GiB", "line 22: tenants.acme.memory: \"9999999999GiB\" is not a size"},
		{"memory: 2GiB", "memory: 1.5", "line 22: tenants.acme.memory: want a size such as 64MiB in quotes"},
		{"cpus: 1.5", "cpus: 0", `line 23: tenants.acme.cpus: "0" is not a number of processors from 0.01 to 1024`},
		{"cpus: 1.5", "cpus: .nan", `line 23: tenants.acme.cpus: ".nan" is not a number of processors`},
		{"cpus: 1.5", "cpus: .inf", `line 23: tenants.acme.cpus: ".inf" is not a number of processors`},
		{"cpus: 1.5", "cpus: 500m", "line 23: tenants.acme.cpus: want a number of processors"},
		{"daemons: gold", "daemons: silver", "line 24: tenants.acme.daemons: there is no such pool under pools"},
		{"daemons: gold", "daemons: [gold]", "line 24: tenants.acme.daemons: want text"},
		{"builds: 2", "builds: 2.5", "line 26: tenants.acme.builds: want a whole number"},
		{"builds: 2", "builds: 1_000_001", `line 26: tenants.acme.builds: "1_000_001" is not a whole number from 0 to 1000000`},
		{"    queue: 0", "    queue: -1", `line 10: tenants.globex.queue: "-1" is not a whole number from 0 to 1000000`},
		{"weight: 4", "weight: 0", `line 27: tenants.acme.weight: "0" is not a whole number from 1 to 1000`},
		{"build_timeout: 10m", "build_timeout: soon", `line 28: tenants.acme.build_timeout: "soon" is not a duration such as 10m`},
		{"build_timeout: 10m", "build_timeout: 0", `line 28: tenants.acme.build_timeout: "0" is not a duration such as 10m`},
		{"max_body_bytes: 64MiB", "max_body_bytes: 0", `line 29: tenants.acme.max_body_bytes: "0" is not a size from 1B to 1PiB`},
		{"suspended: true", "suspended: yes", "line 30: tenants.acme.suspended: want true or false"},
		{"suspended: true", "suspended:", "line 30: tenants.acme.suspended: there is no value: want true or false"},

		// Keys.
		{"    keys: [{id: k1, secret: \"globex's only key\"}]\n", "", "line 7: tenants.globex.keys: it is missing"},
		{"[{id: k1, secret: \"globex's only key\"}]", "[]", "line 8: tenants.globex.keys: there are no keys in it"},
		{"id: k2", "id: k1", "line 15: tenants.acme.keys[1].id: the key in line 14 has this id"},
		{"{id: k2, ", "{", "line 15: tenants.acme.keys[1].id: it is missing"},
		{`, secret: "acme's second key 2"`, "", "line 15: tenants.acme.keys[1].secret: it is missing"},
		{`"acme's second key 2"`, `"acme's first key, 1"`, "line 15: tenants.acme.keys[1].secret: the same key is in tenants: line 14"},
		{`"acme's second key 2"`, `"globex's only key"`, "line 15: tenants.acme.keys[1].secret: the same key is in tenants: line 8"},
		{`"the operator's key"`, `"globex's only key"`, "line 32: operator.keys[0].secret: the same key is in tenants: line 8"},
		{`"acme's second key 2"`, `"the root of all salts"`, "line 15: tenants.acme.keys[1].secret: it is the first line of the payload secret"},
		{`"acme's second key 2"`, `"fifteen bytes.."`, "line 15: tenants.acme.keys[1].secret: it has 15 bytes: a key has 16 or more"},
		{`"acme's second key 2"`, `"acme's second key 2\n"`, "line 15: tenants.acme.keys[1].secret: there is white space around it"},
		{`"acme's second key 2"`, "1234567890123456", "line 15: tenants.acme.keys[1].secret: want text in quotes"},
		{`"acme's second key 2"`, `[acmes-second-key-2]`, "line 15: tenants.acme.keys[1].secret: want text"},
		{`{id: k2, secret: "acme's second key 2", until: 2027-01-31T00:00:00Z}`, `"acme's second key 2"`, "line 15: tenants.acme.keys[1]: want keys with values"},
		{`secret: "acme's second key 2"`, `secret: "acme's third key, 3", secre: "acme's second key 2"`, "line 15: tenants.acme.keys[1]: there is no such key: the keys are id, secret, until"},
		{"2027-01-31T00:00:00Z", "2027-01-31", `line 15: tenants.acme.keys[1].until: "2027-01-31" is not a time such as 2027-01-31T00:00:00Z`},
		{"2027-01-31T00:00:00Z", "2027", "line 15: tenants.acme.keys[1].until: want a time such as 2027-01-31T00:00:00Z"},
		{"operator:\n  keys: [{id: ops, secret: \"the operator's key\"}]\n", "operator: {}\n", "line 31: operator.keys: it is missing"},
		{"{id: ops, ", "{id: ops, until: never, ", `line 32: operator.keys[0].until: "never" is not a time`},

		// Credentials.
		{`{auths: {registry.example.com: {auth: "YWNtZTpwdw=="}}}`, "mine", "line 19: tenants.acme.registry: want builder, or an object with auths"},
		{`{auths: {registry.example.com: {auth: "YWNtZTpwdw=="}}}`, "true", "line 19: tenants.acme.registry: want builder, or an object with auths"},
		{`{auths: {registry.example.com: {auth: "YWNtZTpwdw=="}}}`, "{}", "line 19: tenants.acme.registry.auths: it is missing"},
		{`{auths: {registry.example.com: {auth: "YWNtZTpwdw=="}}}`, "{auths: {}}", "line 19: tenants.acme.registry.auths: there are no logins in it"},
		{"registry: {auths:", "registry: {credsStore: ecr-login, auths:", "line 19: tenants.acme.registry: there is no such key: the keys are auths"},
		{"registry: {auths:", "registry: {credHelpers: {a.example: gcloud}, auths:", "line 19: tenants.acme.registry: there is no such key: the keys are auths"},
		{"{registry.example.com: {auth", `{"registry.example.com: acme": {auth`, "line 19: tenants.acme.registry.auths: a key is not a registry"},
		{`{auth: "YWNtZTpwdw=="}`, `{}`, `line 19: tenants.acme.registry.auths["registry.example.com"]: there is no login in it`},
		{`{auth: "YWNtZTpwdw=="}`, `{auth: acme-pw}`, `line 19: tenants.acme.registry.auths["registry.example.com"].auth: it is not the base64 of user:password`},
		{`{auth: "YWNtZTpwdw=="}`, `{auth: YWNtZQ==}`, `line 19: tenants.acme.registry.auths["registry.example.com"].auth: it is not the base64 of user:password`},
		{`{auth: "YWNtZTpwdw=="}`, `{username: acme}`, `line 19: tenants.acme.registry.auths["registry.example.com"].password: it is missing`},
		{`{auth: "YWNtZTpwdw=="}`, `{auth:"YWNtZTpwdw=="}`, `line 19: tenants.acme.registry.auths["registry.example.com"]: there is no such key`},
		{"https://user:token-of-acme@github.com/acme", "https://token-of-acme@github.com/acme", "line 21: tenants.acme.git_credentials[0]: it is not a line such as"},
		{"https://user:token-of-acme@github.com/acme", "user:token-of-acme@github.com", "line 21: tenants.acme.git_credentials[0]: it is not a line such as"},
		{"https://user:token-of-acme@github.com/acme", "https://user:token-of-acme@github.com/acme\\nhttps://u:p@h", "line 21: tenants.acme.git_credentials[0]: it is not a line such as"},
	} {
		s, err := read(change(t, full, tt.old, tt.new))
		if err == nil || s != nil {
			t.Errorf("%.60q was taken", tt.new)
			continue
		}
		if got := strings.Count(err.Error(), "\n") + 1; got != 1 || !strings.HasPrefix(err.Error(), "tenants: "+tt.want) {
			t.Errorf("%.60q: %d problems: %v, want %s", tt.new, got, err, tt.want)
		}
		for _, secret := range secrets {
			if strings.Contains(err.Error(), secret) {
				t.Errorf("%.60q: the error has a secret: %v", tt.new, err)
			}
		}
	}
}

// secrets are texts in full, and in what replaces its parts, that no problem may tell.
var secrets = []string{"first key", "first-key", "second key", "second-key", "third key", "only key", "operator's key", "YWNtZ", "token-of", "acme-pw", "fifteen", "123456789", "root of"}

// TestProblems wants every problem of the files, up to a number.
func TestProblems(t *testing.T) {
	text := change(t, full, "weight: 4", "weight: 0")
	text = change(t, text, "cpus: 1.5", "cpus: 0")
	text = change(t, text, "id: t-2", "id: T")
	_, err := read(text)
	want := []string{"line 7: tenants.globex.id: ", "line 23: tenants.acme.cpus: ", "line 27: tenants.acme.weight: "}
	if err == nil {
		t.Fatal("three problems were taken")
	}
	lines := strings.Split(err.Error(), "\n")
	if !slices.EqualFunc(lines, want, func(line, want string) bool { return strings.HasPrefix(line, "tenants: "+want) }) {
		t.Errorf("got %q, want %q", lines, want)
	}

	_, err = read(change(t, full, "[github.com, ", "[&a github.com, *a, "))
	if err == nil || err.Error() != "tenants: line 20: tenants.acme.context_hosts[0]: anchors are not read\ntenants: line 20: tenants.acme.context_hosts[1]: aliases are not read: write the value out" {
		t.Errorf("an anchor and an alias: %v", err)
	}
	_, err = read(change(t, full, "ghcr.io/globex", "ghcr.io/globex/"+strings.Repeat("x", 2000)))
	if err == nil || len(err.Error()) > 2*maxProblem || !strings.HasSuffix(err.Error(), " (cut)") {
		t.Errorf("a long name: %.3000v", err)
	}

	var many strings.Builder
	many.WriteString("version: 1\ntenants:\n")
	for i := range 30 {
		fmt.Fprintf(&many, "  t%d: {id: t-%d}\n", i, i)
	}
	_, err = read(many.String())
	if err == nil {
		t.Fatal("sixty problems were taken")
	}
	if lines = strings.Split(err.Error(), "\n"); len(lines) != maxProblems+1 || lines[maxProblems] != "and 40 more" {
		t.Errorf("%d problems, the last is %q", len(lines), lines[len(lines)-1])
	}
}

// TestReadFiles reads several files as one Set.
func TestReadFiles(t *testing.T) {
	entry := func(name, id, key, images, more string) string {
		return fmt.Sprintf("  %s: {id: %s, keys: [{id: k, secret: %q}], images: [%s]%s}\n", name, id, key, images, more)
	}
	first := "version: 1\ndefaults: {builds: 3}\ntenants:\n" + entry("acme", "t-1", "acme's only key..", "ghcr.io/acme", ", daemons: gold")
	second := "version: 1\ntenants:\n" + entry("globex", "t-2", "globex's only key", "ghcr.io/globex", "") + "pools: {gold: [tcp://gold:1]}\n"
	files := func(texts ...string) []File {
		var list []File
		for i, text := range texts {
			list = append(list, File{fmt.Sprintf("tenants-%d", i+1), []byte(text)})
		}
		return list
	}
	s, err := Read(files(first, second, "version: 1\noperator: {keys: [{id: k, secret: the-operator's-key}]}\n"), installation)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Tenants) != 2 || s.Tenants[0].Builds != 3 || s.Tenants[1].Builds != 0 || s.Tenants[0].Pool != "gold" || len(s.Operators) != 1 {
		t.Errorf("got %+v", s)
	}
	for _, tt := range []struct{ second, want string }{
		{"version: 1\ntenants:\n" + entry("acme", "t-2", "globex's only key", "ghcr.io/globex", ""), "tenants-2: line 3: tenants.acme: the same name is in tenants-1: line 4"},
		{"version: 1\ntenants:\n" + entry("globex", "t-1", "globex's only key", "ghcr.io/globex", ""), "tenants-2: line 3: tenants.globex.id: the same id is in tenants-1: line 4"},
		{"version: 1\ntenants:\n" + entry("globex", "t-2", "acme's only key..", "ghcr.io/globex", ""), "tenants-2: line 3: tenants.globex.keys[0].secret: the same key is in tenants-1: line 4"},
		{"version: 1\ntenants:\n" + entry("globex", "t-2", "globex's only key", "ghcr.io/acme/app", ""), `tenants-2: line 3: tenants.globex.images[0]: "ghcr.io/acme/app" overlaps "ghcr.io/acme" of tenant acme in tenants-1: line 4`},
		{"version: 1\ntenants:\n" + entry("globex", "t-2", "globex's only key", "ghcr.io/globex", ", hosts: [a.example]") +
			entry("initech", "t-3", "initech's only key", "ghcr.io/initech", ", hosts: [a.example]"), "tenants-2: line 4: tenants.initech.hosts[0]: the same host is in tenants-2: line 3"},
		{"version: 1\npools: {silver: [tcp://gold:1]}\n", "tenants-3: line 1: pools.gold[0]: the same daemon is in tenants-2: line 2"},
		{"version: 1\npools: {gold: [tcp://gold:2]}\n", "tenants-3: line 1: pools.gold: the same pool is in tenants-2: line 2"},
		{"tenants: {}", "tenants-2: line 1: version: it is missing"},
	} {
		_, err := Read(files(first, tt.second, "{version: 1, pools: {gold: [tcp://gold:1]}}"), installation)
		if err == nil || err.Error() != tt.want {
			t.Errorf("%s: %v, want %s", tt.second, err, tt.want)
		}
	}
}

// TestReadJSON reads a file of JSON, which YAML holds.
func TestReadJSON(t *testing.T) {
	text, err := json.Marshal(map[string]any{
		"version": 1,
		"tenants": map[string]any{"acme": map[string]any{
			"id": "t-1", "keys": []any{map[string]string{"id": "k", "secret": "acme's only key.."}}, "images": []string{"ghcr.io/acme"},
			"registry": map[string]any{"auths": map[string]any{"ghcr.io": map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte("u:p"))}}},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	s, err := read(string(text))
	if err != nil || len(s.Tenants) != 1 || s.Tenants[0].Registry.Config == nil {
		t.Errorf("%v, %v", s, err)
	}
}

// many is a file of n tenants with every key, of 886 bytes each.
func many(n int) []byte {
	var b strings.Builder
	b.WriteString("version: 1\ndefaults: {builds: 2, queue: 50}\npools:\n  gold: [tcp://buildkitd-gold.openfaas:1234]\ntenants:\n")
	for i := range n {
		fmt.Fprintf(&b, `  tenant-%04d:
    id: t-7f3a9c0e2b41%04x
    keys:
      - {id: k1, secret: "7d9e2f0a5c3b8e1d4f6a9b0c2e5d8f1a3b6c%04d"}
      - {id: k2, secret: "1d4f6a9b0c2e5d8f1a3b6c7d9e2f0a5c3b8e%04d", until: 2027-01-31T00:00:00Z}
    hosts: [tenant-%04d.builder.example.com]
    images: [registry.example.com/tenant-%04d]
    from: ["docker.io/library/*", "registry.example.com/base/*"]
    registry: {auths: {registry.example.com: {auth: "dGVuYW50OjdkOWUyZjBhNWMzYjhlMWQ0ZjZhOWIwYzJlNWQ4ZjFh"}}}
    context_hosts: [github.com]
    git_credentials: ["https://user:ghp_7d9e2f0a5c3b8e1d4f6a9b0c2e5d8f1a@github.com/tenant-%04d"]
    memory: 2GiB
    cpus: 2
    daemons: gold
    platforms: [linux/amd64]
    builds: 2
    queue: 50
    weight: 1
    build_timeout: 10m
    max_body_bytes: 64MiB
    suspended: false
`, i, i, i, i, i, i, i)
	}
	return []byte(b.String())
}

func TestReadMany(t *testing.T) {
	s, err := Read([]File{{"tenants", many(1000)}}, installation)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := s.All(); ok || len(s.Tenants) != 1000 {
		t.Errorf("%d tenants; all keys are tried: %v", len(s.Tenants), ok)
	}
	if got := owner(s.OfImage("registry.example.com/tenant-0777/app")); got != "tenant-0777" {
		t.Errorf("the image is of %q", got)
	}
}

// BenchmarkRead reads 1,000 tenants.
func BenchmarkRead(b *testing.B) {
	data := many(1000)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Read([]File{{"tenants", data}}, installation); err != nil {
			b.Fatal(err)
		}
	}
}

// FuzzRead holds for any file: a Set or an error, and no secret in the error.
func FuzzRead(f *testing.F) {
	f.Add([]byte(full))
	f.Add(many(1))
	f.Add([]byte("version: 1\ntenants: {a: &a {keys: *a}}"))
	f.Add([]byte("{version: 1, tenants: {a: {<<: {}}}}"))
	f.Add([]byte("? [a]\n: - - |\n  b\n"))
	line := regexp.MustCompile(`^(tenants: (line [0-9]+: |there is no tenant)|and [0-9]+ more$)`)
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := Read([]File{{"tenants", data}}, installation)
		if (s == nil) == (err == nil) {
			t.Fatalf("%v beside %v", s, err)
		}
		if err != nil {
			for text := range strings.SplitSeq(err.Error(), "\n") {
				if !line.MatchString(text) {
					t.Errorf("a problem without a place: %q", text)
				}
			}
			return
		}
		for _, one := range s.Tenants {
			if one.ID == "" || one.ID == DefaultID || len(one.Keys) == 0 || len(one.Images) == 0 || one.Weight < 1 || one.Builds < 0 || one.Queue < 0 {
				t.Errorf("got %+v", one)
			}
			for _, k := range one.Keys {
				if len(k.Secret) < 16 {
					t.Errorf("a key of %d bytes", len(k.Secret))
				}
			}
			if owner(s.OfImage(one.Images[0]+"/x")) != one.Name || s.IsOthers(one, one.Images[0]) {
				t.Errorf("%s is another's", one.Images[0])
			}
		}
	})
}

// TestMaxKeys: a tenant with many keys would make every body of everybody slower to hash.
func TestMaxKeys(t *testing.T) {
	for n, want := range map[int]string{maxKeys: "", maxKeys + 1: "tenants: line 4: tenants.acme.keys: over 8 keys"} {
		text := "version: 1\ntenants:\n  acme: {id: t-1, images: [ghcr.io/acme], keys:\n    ["
		for i := range n {
			text += fmt.Sprintf("{id: k%d, secret: %q},", i, fmt.Sprint("the key of acme, no ", i))
		}
		_, err := Read([]File{{"tenants", []byte(text + "]}\n")}}, Installation{PayloadSecret: []byte("the first line of the payload secret")})
		if got := fmt.Sprint(err); (err != nil) != (want != "") || !strings.HasPrefix(got, want) && err != nil {
			t.Errorf("%d keys: %v, want %q", n, err, want)
		}
	}
}
