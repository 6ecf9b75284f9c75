package stack

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/openfaas/go-sdk/builder"
	"golang.org/x/sys/unix"
)

// Tools are the paths of the real daemons.
type Tools struct {
	Buildkitd, Buildctl, Runc, Registry string
}

// toolModule pins a daemon's version, in a module of its own under tests/tools,
// because their dependencies do not agree.
type toolModule struct {
	module, pkg, name string
	flags             []string
	cgo               string
}

var toolModules = []toolModule{
	{module: "buildkit", pkg: "github.com/moby/buildkit/cmd/buildkitd", name: "buildkitd", cgo: "0"},
	{module: "buildkit", pkg: "github.com/moby/buildkit/cmd/buildctl", name: "buildctl", cgo: "0"},
	// runc refuses a seccomp profile, which buildkitd always gives it, when it
	// was built without libseccomp.
	{module: "runc", pkg: "github.com/opencontainers/runc", name: "runc", flags: []string{"-tags", "seccomp"}, cgo: "1"},
	{module: "registry", pkg: "github.com/distribution/distribution/v3/cmd/registry", name: "registry", cgo: "0"},
}

// openfaasModules are under OpenFaaS's Community Edition licence: commercial use is
// limited, and they may not be passed on. They are built where they are used.
var openfaasModules = []toolModule{
	{module: "gateway", pkg: "github.com/openfaas/faas/gateway", name: "gateway", cgo: "0"},
	{module: "queue-worker", pkg: "github.com/openfaas/nats-queue-worker", name: "queue-worker", cgo: "0"},
	{module: "nats-streaming", pkg: "github.com/nats-io/nats-streaming-server", name: "nats-streaming", cgo: "0"},
}

// natsModules are the newest and the oldest server that keeps build records.
var natsModules = []toolModule{
	{module: "nats-server", pkg: "github.com/nats-io/nats-server/v2", name: "nats-server", cgo: "0"},
	{module: "nats-server-oldest", pkg: "github.com/nats-io/nats-server/v2", name: "nats-server-oldest", cgo: "0"},
}

// rootlessModules are for the rootless image of buildkitd.
var rootlessModules = []toolModule{
	{module: "rootlesskit", pkg: "github.com/rootless-containers/rootlesskit/v3/cmd/rootlesskit", name: "rootlesskit", cgo: "0"},
}

// Rootlesskit returns the path of rootlesskit.
func (s *Stack) Rootlesskit(ctx context.Context) (string, error) {
	paths, err := buildTools(ctx, s.Repo, s.log, rootlessModules)
	return paths["rootlesskit"], err
}

// BuildTools builds what is missing in the cache and says so on log: it takes
// ten minutes on a fresh machine with two cores, and nothing afterwards. The
// environment variable STACK_BIN names a directory of ready-made ones.
func BuildTools(ctx context.Context, repo string, log io.Writer) (Tools, error) {
	paths, err := buildTools(ctx, repo, log, toolModules)
	return Tools{paths["buildkitd"], paths["buildctl"], paths["runc"], paths["registry"]}, err
}

// buildTools returns the tools' paths by name. What STACK_BIN lacks is built.
func buildTools(ctx context.Context, repo string, log io.Writer, modules []toolModule) (map[string]string, error) {
	paths := map[string]string{}
	unlock, err := lockCache(ctx, repo)
	if err != nil {
		return nil, err
	}
	defer unlock()
	for _, t := range modules {
		if dir := os.Getenv("STACK_BIN"); dir != "" {
			paths[t.name] = filepath.Join(dir, t.name)
			if _, err := os.Stat(paths[t.name]); err == nil {
				continue
			}
		}
		src := filepath.Join(repo, "tests", "tools", t.module)
		key := sha256.New()
		fmt.Fprintln(key, runtime.Version(), runtime.GOARCH, t.flags, t.cgo)
		for _, name := range []string{"go.mod", "go.sum"} {
			b, err := os.ReadFile(filepath.Join(src, name))
			if err != nil {
				return nil, err
			}
			key.Write(b)
		}
		bin := filepath.Join(repo, ".cache", "bin", fmt.Sprintf("%s-%.6x", t.name, key.Sum(nil)))
		paths[t.name] = bin
		if _, err := os.Stat(bin); err == nil {
			continue
		}
		began := time.Now()
		fmt.Fprintf(log, "building %s (once; minutes on a fresh machine)\n", t.name)
		args := append([]string{"build", "-trimpath", "-buildvcs=false", "-o", bin + ".tmp"}, t.flags...)
		if err := goCommand(ctx, src, append(args, t.pkg), "CGO_ENABLED="+t.cgo, "GOWORK=off"); err != nil {
			if t.name == "runc" {
				err = fmt.Errorf("%w\nrunc needs gcc, pkg-config and libseccomp-dev: apt-get install gcc libc6-dev pkg-config libseccomp-dev", err)
			}
			return nil, fmt.Errorf("building %s: %w", t.name, err)
		}
		if err := os.Rename(bin+".tmp", bin); err != nil {
			return nil, err
		}
		fmt.Fprintf(log, "built %s in %s\n", t.name, time.Since(began).Round(time.Second))
	}
	return paths, nil
}

// handler returns the path of the compiled function, which it makes the first
// time that it is asked for.
func (s *Stack) handler(ctx context.Context, race bool) (string, error) {
	s.building.Lock()
	defer s.building.Unlock()
	out := filepath.Join(s.Dir, "handler")
	if race {
		out += "-race"
	}
	if _, err := os.Stat(out); err == nil {
		return out, nil
	}
	fmt.Fprintln(s.log, "building the function with the template")
	return out, s.buildHandler(ctx, out, race)
}

// buildHandler puts the builder together with the template as faas-cli does and
// compiles it to out as the template's Dockerfile does.
func (s *Stack) buildHandler(ctx context.Context, out string, race bool) error {
	unlock, err := lockCache(ctx, s.Repo)
	if err != nil {
		return err
	}
	defer unlock()
	// One directory for all runs, so that the compiler's cache is hit.
	dir, err := assemble(s.Repo, filepath.Join(s.Repo, ".cache", "build"), "builder", filepath.Join(s.Repo, "builder"))
	if err != nil {
		return err
	}
	// main.go becomes a package of the function's module, in a workspace.
	main, err := os.ReadFile(filepath.Join(dir, "main.go"))
	if err != nil {
		return err
	}
	function := filepath.Join(dir, "function")
	if err := os.Mkdir(filepath.Join(function, "_main"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(function, "_main", "main.go"), main, 0o644); err != nil {
		return err
	}
	// The template's own workspace does not come into the image.
	if err := os.Remove(filepath.Join(dir, "go.work")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := goCommand(ctx, function, []string{"work", "init", "."}); err != nil {
		return fmt.Errorf("building the function: %w", err)
	}
	args, cgo := []string{"build", "-buildvcs=false", "-ldflags", "-s -w", "-o", out}, "CGO_ENABLED=0"
	if race {
		args, cgo = append(args, "-race"), "CGO_ENABLED=1"
	}
	if err := goCommand(ctx, function, append(args, "./_main"), cgo); err != nil {
		return fmt.Errorf("building the function: %w", err)
	}
	return nil
}

// Assemble writes the build context that faas-cli makes of a function folder
// for lang golang-middleware, and returns its directory.
func (s *Stack) Assemble(name, handler string) (string, error) {
	dir, err := os.MkdirTemp(s.Dir, "assembled-")
	if err != nil {
		return "", err
	}
	return assemble(s.Repo, dir, name, handler)
}

func assemble(repo, buildDir, name, handler string) (string, error) {
	dir, err := builder.CreateBuildContext(name, handler, "golang-middleware", nil,
		builder.WithBuildDir(buildDir), builder.WithTemplateDir(filepath.Join(repo, "template")))
	if err != nil {
		return "", fmt.Errorf("assembling %s from %s: %w", name, handler, err)
	}
	return dir, nil
}

// goCommand runs the go command in dir. Its error holds what go printed.
func goCommand(ctx context.Context, dir string, args []string, env ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), cmp.Or(ctx.Err(), err), out)
	}
	return nil
}

// GoSettings are build arguments that pass on where this machine's Go gets its
// modules from, where that was set.
func GoSettings(ctx context.Context) map[string]string {
	args := map[string]string{}
	for _, name := range []string{"GOPROXY", "GONOSUMDB", "GOPRIVATE", "GONOPROXY", "GOSUMDB"} {
		out, err := exec.CommandContext(ctx, "go", "env", name).Output()
		if v := strings.TrimSpace(string(out)); err == nil && v != "" {
			args[name] = v
		}
	}
	return args
}

// lockCache keeps processes that run at once from building the same thing.
func lockCache(ctx context.Context, repo string) (unlock func(), err error) {
	dir := filepath.Join(repo, ".cache")
	if err := os.MkdirAll(filepath.Join(dir, "bin"), 0o755); err != nil {
		return nil, err
	}
	return waitLock(ctx, filepath.Join(dir, "lock"))
}

// waitLock takes the lock of a file, which it makes, once no other process has it.
func waitLock(ctx context.Context, file string) (unlock func(), err error) {
	f, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", file, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for the process that has locked %s: %w", file, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// findRepo walks up from the working directory to the one that holds stack.yml
// or, in a tree without it, builder/go.mod.
func findRepo() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "builder", "go.mod")); err == nil {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("finding the repository: no builder/go.mod above %s", dir)
		}
	}
}

// builtWithRace reports whether this program has the race detector in it.
func builtWithRace() bool {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return false
	}
	for _, s := range info.Settings {
		if s.Key == "-race" {
			return s.Value == "true"
		}
	}
	return false
}
