package tenants_test

import (
	"bufio"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"handler/function/tests/readme"
	"handler/function/tests/stack"
)

// kubectlStandin has the Secret where the function reads it at once. A kubelet takes longer.
const kubectlStandin = `#!/bin/sh
set -eu
case "$*" in
*' create secret generic tenants --from-file=tenants='*' --dry-run=client -o yaml') cat "${7#*=*=}" ;;
*' create secret generic tenants --from-file=tenants='*) cat "${7#*=*=}" >"$SECRETS/../next"; mv "$SECRETS/../next" "$SECRETS/tenants" ;;
'replace -f -') cat >"$SECRETS/../next"; mv "$SECRETS/../next" "$SECRETS/tenants" ;;
*' annotate pod '*) ;;
*) echo "kubectl $*: this test does not know it" >&2; exit 1 ;;
esac
`

// faasCLIStandin sends what faas-cli publish -f FILE --remote-builder URL --payload-secret FILE
// sends, for a function with lang: dockerfile.
const faasCLIStandin = `#!/bin/bash
set -euo pipefail
[ "$1 $2 $4 $6" = 'publish -f --remote-builder --payload-secret' ]
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cp -r "$(sed -n 's/^ *handler: //p' "$3")" "$tmp/context"
printf '{"image":"%s","platforms":["linux/amd64"]}' "$(sed -n 's/^ *image: //p' "$3")" >"$tmp/com.openfaas.docker.config"
tar -C "$tmp" -cf "$tmp.tar" com.openfaas.docker.config context
mac=$(openssl dgst -sha256 -hmac "$(cat "$7")" <"$tmp.tar")
curl -sN "$5/build" --data-binary "@$tmp.tar" -H 'Accept: application/x-ndjson' -H 'User-Agent: openfaas-go-sdk' \
  -H 'Content-Type: application/octet-stream' -H "X-Build-Signature: sha256=${mac##* }" | tee "$tmp/answer"
rm "$tmp.tar"
tail -n 1 "$tmp/answer" | grep -q '"status":"success"'
`

// terminal is a shell that runs one block of commands after another, as somebody does who
// pastes them.
type terminal struct {
	dir string
	in  io.Writer
	out *bufio.Reader
	err *strings.Builder
}

const prompt = "---- the block has ended"

func newTerminal(t *testing.T, dir string, env ...string) *terminal {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	term := &terminal{dir, in, bufio.NewReader(out), new(strings.Builder)}
	cmd.Stderr = term.err
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	return term
}

// run returns what a block prints. The test ends if a command fails.
func (s *terminal) run(t *testing.T, block string) string {
	t.Helper()
	path := filepath.Join(s.dir, "block.sh")
	if err := os.WriteFile(path, []byte(block), 0o600); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(s.in, ". ./block.sh </dev/null\necho '%s'\n", prompt)
	var printed strings.Builder
	for {
		line, err := s.out.ReadString('\n')
		if strings.HasSuffix(line, prompt+"\n") {
			return printed.String() + strings.TrimSuffix(line, prompt+"\n")
		}
		printed.WriteString(line)
		if err != nil {
			t.Fatalf("%s\nended with %v:\n%s%s", block, err, &printed, s.err)
		}
	}
}

// read is a file that the commands have made.
func (s *terminal) read(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(s.dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

// workshop is a folder with the repository's folders in it, for commands that make more files
// there. It has the template dockerfile, which faas-cli would fetch from GitHub.
func workshop(t *testing.T, s *stack.Stack) string {
	t.Helper()
	dir := stack.Context(t, map[string]string{
		"template/dockerfile/template.yml":        "language: dockerfile\n",
		"template/dockerfile/function/Dockerfile": "FROM scratch\n",
	})
	for _, name := range []string{"Makefile", "builder", "buildkit", "tests", ".cache"} {
		if err := os.Symlink(filepath.Join(s.Repo, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// programs is a folder with stand-ins, for PATH. faas-cli is the real one, where FAAS_CLI names
// it or this machine has it: it is no module.
func programs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name, script string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write("kubectl", kubectlStandin)
	found, _ := exec.LookPath("faas-cli")
	if found = cmp.Or(os.Getenv("FAAS_CLI"), found); found != "" {
		if err := os.Symlink(found, filepath.Join(dir, "faas-cli")); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	t.Log("there is no faas-cli on this machine: a stand-in makes its requests")
	write("faas-cli", faasCLIStandin)
	return dir
}

// bashBlocks are the commands of a page, in order.
func bashBlocks(t *testing.T, s *stack.Stack, path string) []string {
	t.Helper()
	pages, err := readme.Pages(s.Repo)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, page := range pages {
		for _, block := range page.Blocks {
			if page.Path == path && block.Language == "bash" {
				list = append(list, block.Text)
			}
		}
	}
	return list
}

// story is TENANTS.md while its commands run.
type story struct {
	*terminal
	s *stack.Stack
	f *stack.Function
}

// code is that of the answer to a key's question for a build that there is not.
func (st *story) code(t testing.TB, tenant, key string) string {
	t.Helper()
	c := st.f.Client
	c.Secret, c.Tenant = key, tenant
	return c.MustVerdict(t, within(t), "none").Code
}

// until waits until a key gets a code.
func (st *story) until(t *testing.T, tenant, key, want string) {
	t.Helper()
	stack.Eventually(t, time.Minute, func() error {
		if got := st.code(t, tenant, key); got != want {
			return fmt.Errorf("a key of %s gets %q, want %q", tenant, got, want)
		}
		return nil
	})
}

const taken, refused = "not_found", "unauthorized" // codes of a key that is valid, and of one that is not

// id is that of a tenant in the file.
func (st *story) id(t testing.TB, tenant string) string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^  ` + tenant + `:\n(?:    .*\n)*?    id: (\S+)$`).FindStringSubmatch(st.read(t, "tenants.yml"))
	if m == nil {
		t.Fatalf("%s has no id in the file", tenant)
	}
	return m[1]
}

// content is the file hello.txt of an image.
func (st *story) content(t testing.TB, image string) string {
	t.Helper()
	files := stack.MustFiles(t, stack.MustPull(t, within(t), st.s.Registry.Image(image)))
	if files["hello.txt"] == nil {
		t.Fatalf("%s has no hello.txt", image)
	}
	return string(files["hello.txt"].Content)
}

// postEnvelope sends an envelope as the OpenFaaS UI does.
func (st *story) postEnvelope(t testing.TB, envelope string) {
	t.Helper()
	if !strings.Contains(envelope, `"tenant":"acme"`) {
		t.Errorf("the envelope names nobody: %.200s", envelope)
	}
	a := st.f.MustPost(t, within(t), []byte(envelope), func(req *http.Request) {
		req.URL.Path = "/"
		req.Header = http.Header{"Content-Type": {"text/plain"}}
	})
	if a.Status != "success" {
		t.Errorf("the envelope: %v", a)
	}
}

// keep has a tenant send a context ahead and build, so that the builder keeps something of it.
func (st *story) keep(t testing.TB, tenant, key string) {
	t.Helper()
	c := st.f.Client
	c.Secret, c.Tenant = key, tenant
	image := config{"image": st.s.Registry.Image(tenant + "/kept:v1")}
	if a := c.MustPost(t, within(t), body(t, image, "FROM busybox", "RUN echo kept > /kept")); a.Status != "success" {
		t.Fatal(a)
	}
	ahead := tarOf(t, stack.Context(t, map[string]string{"context/Dockerfile": "FROM scratch\n"}))
	if a := sendAhead(t, &c, http.MethodPut, fmt.Sprintf("sha256:%x", sha256.Sum256(ahead)), ahead); a.StatusCode != http.StatusCreated {
		t.Fatal(a)
	}
}

// of counts the tags of a tenant.
func of(tags []string, id string) (n int) {
	for _, tag := range tags {
		if strings.HasPrefix(tag, id+"-") {
			n++
		}
	}
	return n
}

// TestStory runs the commands of TENANTS.md in one shell, in the order of the page, and looks
// at what has become of each.
func TestStory(t *testing.T) {
	s := stack.Shared(t)
	contexts, cache := s.Registry.Image("builder/contexts"), s.Registry.Image("builder/cache")
	_, f := stack.Test(t, stack.FunctionConfig{Env: map[string]string{"context_repository": contexts, "cache_repository": cache}})
	secret := filepath.Join(f.SecretsDir, "payload-secret")
	st := &story{s: s, f: f, terminal: newTerminal(t, workshop(t, s), "BUILDER="+f.URL, "REGISTRY="+s.Registry.Addr, "PAYLOAD_SECRET="+secret,
		"SECRETS="+f.SecretsDir, "HOME="+t.TempDir(), "GOPATH="+goEnv(t, "GOPATH"), "GOCACHE="+goEnv(t, "GOCACHE"),
		"PATH="+programs(t)+":"+os.Getenv("PATH"))}

	// README's first build makes hello and req.tar, with the payload secret.
	first := slices.IndexFunc(bashBlocks(t, s, "README.md"), func(b string) bool { return strings.Contains(b, "cat > hello/context/Dockerfile") })
	if out := st.run(t, bashBlocks(t, s, "README.md")[first]); !strings.Contains(out, `"status": "success"`) {
		t.Fatalf("before there are tenants: %s", out)
	}

	var globex string // its id
	steps := []struct {
		of    string // the block that has it
		check func(out string)
	}{
		{"make -s tenant NAME=acme", nil},
		{"create secret generic tenants --from-file=tenants=tenants.yml\n", nil},
		{"key acme k1 > acme.key", func(string) {
			st.until(t, "acme", st.read(t, "acme.key"), taken)
			st.until(t, "", st.read(t, "globex.key"), taken)
			if got := st.code(t, "", f.Secret); got != refused {
				t.Errorf("the payload secret gets %q", got)
			}
		}},
		{"faas-cli publish", func(out string) {
			if got := st.content(t, "acme/hello:v1"); got != "built from a tar\n" {
				t.Errorf("faas-cli has built %q: %s", got, out)
			}
		}},
		{`-H 'X-Build-Tenant: acme' -H "X-Build-Signature`, func(out string) {
			if !strings.Contains(out, `"status": "success"`) {
				t.Errorf("curl: %s", out)
			}
		}},
		{"make -s envelope", func(string) { st.postEnvelope(t, st.read(t, "envelope.json")) }},
		{"/publickey", func(string) {
			var key struct {
				PublicKey string `json:"public_key"`
			}
			if err := json.Unmarshal([]byte(st.read(t, "acme.pub.json")), &key); err != nil || key.PublicKey == "" || key.PublicKey == strings.TrimSpace(string(s.PublicKey)) {
				t.Errorf("%v: the key is %q", err, key.PublicKey)
			}
		}},
		{"X-Build-Tenant: globex", func(out string) {
			if !strings.HasPrefix(out, "image_forbidden\n") || strings.Contains(out, st.id(t, "acme")) {
				t.Errorf("globex builds what is acme's: %s", out)
			}
		}},
		{"apply() {", func(string) { st.until(t, "acme", st.read(t, "acme.key"), taken) }},
		{"annotate pod", nil},
		{"{id: k2, secret", func(string) {
			st.until(t, "acme", st.read(t, "acme-k2.key"), taken)
			st.until(t, "acme", st.read(t, "acme.key"), taken)
		}},
		{"{ /id: k1/d }", func(string) {
			st.until(t, "acme", st.read(t, "acme.key"), refused)
			st.until(t, "acme", st.read(t, "acme-k2.key"), taken)
		}},
		{`\n    suspended: true`, func(string) { st.until(t, "acme", st.read(t, "acme-k2.key"), "suspended") }},
		{"suspended: true$/d", func(string) {
			st.until(t, "acme", st.read(t, "acme-k2.key"), taken)
			// What is to be forgotten of globex, and not of acme.
			st.keep(t, "globex", st.read(t, "globex.key"))
			st.keep(t, "acme", st.read(t, "acme-k2.key"))
			globex = st.id(t, "globex")
		}},
		{"GLOBEX=", func(string) {
			st.until(t, "globex", st.read(t, "globex.key"), refused)
			st.until(t, "acme", st.read(t, "acme-k2.key"), taken)
		}},
		{"make -s tenant-forget", func(out string) {
			acme := st.id(t, "acme")
			for _, repository := range []string{contexts, cache} {
				tags := tagsOf(t, repository)
				if of(tags, globex) != 0 || of(tags, acme) == 0 {
					t.Errorf("%s has %q after globex is forgotten", repository, tags)
				}
				if !regexp.MustCompile("(?m)^" + regexp.QuoteMeta(repository) + ": [1-9][0-9]* removed\n  " + globex + "-").MatchString(out) {
					t.Errorf("tenant-forget does not tell what it removed from %s: %s", repository, out)
				}
			}
		}},
		{"upgrade/tenants.yml", func(string) {
			for _, name := range []string{"payload-secret", "tenants.yml"} {
				content, err := os.ReadFile(filepath.Join(st.dir, "upgrade", name))
				if err := errors.Join(err, os.WriteFile(filepath.Join(f.SecretsDir, strings.TrimSuffix(name, ".yml")), content, 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			st.until(t, "everybody", f.Secret, taken)
			if out := st.run(t, bashBlocks(t, s, "README.md")[first]); strings.Contains(out, `"status": "success"`) {
				t.Error("the whole payload secret of two lines still builds")
			}
			got := f.MustBuild(t, within(t), stack.Body(t, config{"image": s.Registry.Image("hello:v2")}, map[string]string{"Dockerfile": "FROM scratch\nCOPY . /\n"}))
			if got.Status != "success" {
				t.Errorf("the old key builds no more: %v", got)
			}
		}},
	}
	for _, block := range bashBlocks(t, s, "builder/TENANTS.md") {
		if strings.Contains(block, "kubectl apply -k") {
			continue // it needs a cluster: tests/manifests renders it
		}
		if len(steps) == 0 || !strings.Contains(block, steps[0].of) {
			t.Fatalf("the page goes on with\n%swhich is not the test's next step", block)
		}
		out := st.run(t, block)
		if check := steps[0].check; check != nil {
			check(out)
		}
		steps = steps[1:]
	}
	if len(steps) > 0 {
		t.Errorf("the page has no block with %q", steps[0].of)
	}
}

// goEnv is a setting of the go command, which HOME would change.
func goEnv(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.Command("go", "env", name).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}
