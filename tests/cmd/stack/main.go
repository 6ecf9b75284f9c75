// Command stack runs the function builder against real daemons on this machine:
// buildkitd, runc and a registry. Nothing of it is left when it ends.
//
//	stack run [-function dir] [-image ref]   build, push, pull back and run one function
//	stack up [-openfaas=false]               leave it running until Ctrl-C, behind OpenFaaS's gateway and queue
//	stack publish -image ref                 build and push the builder's own image
//
// A folder with a Dockerfile is a build context; any other is a function for
// lang golang-middleware, and is put together with the template as faas-cli does.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Args[1:])
	stop()
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "stack:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (err error) {
	flags := flag.NewFlagSet("stack", flag.ContinueOnError)
	function := flags.String("function", "", "run: the function's `folder` (default tests/testdata/hello)")
	image := flags.String("image", "", "the `reference` to push; run: its registry is the stack's if it names none")
	registryConfig := flags.String("registry-config", "", "Docker `config.json` with the credentials for -image (default ~/.docker/config.json)")
	standins := flags.String("standins", "auto", "stand-ins for base images: `auto` uses them where docker.io and ghcr.io cannot be reached; always, never")
	openfaas := flags.Bool("openfaas", true, "up: OpenFaaS Community Edition in front, on port 8080")
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "usage: stack run|up|publish [flags]")
		flags.PrintDefaults()
	}
	if len(args) == 0 {
		flags.Usage()
		return flag.ErrHelp
	}
	command := args[0]
	if err := flags.Parse(args[1:]); err != nil {
		return errors.Join(err, flag.ErrHelp)
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("%q is one argument too many", flags.Arg(0))
	}

	var do func(context.Context, *stack.Stack, *stack.Function) error
	switch command {
	case "run":
		dir, err := functionDir(*function)
		if err != nil {
			return err
		}
		do = func(ctx context.Context, s *stack.Stack, f *stack.Function) error {
			return buildAndRun(ctx, s, f, dir, *image)
		}
	case "up":
		do = func(ctx context.Context, s *stack.Stack, f *stack.Function) error {
			return up(ctx, s, f, *openfaas)
		}
	case "publish":
		if *image == "" {
			return errors.New("publish: which image? make publish IMAGE=registry/owner/builder:tag")
		}
		do = func(ctx context.Context, s *stack.Stack, f *stack.Function) error {
			return publish(ctx, s, f, *image)
		}
	default:
		flags.Usage()
		return fmt.Errorf("%q is not a command", command)
	}
	credentials, err := readRegistryConfig(*registryConfig)
	if err != nil {
		return err
	}

	real := *standins == "never"
	switch *standins {
	case "auto":
		err := reachable(ctx, "https://registry-1.docker.io/v2/", "https://ghcr.io/v2/")
		if real = err == nil; !real && command == "publish" {
			return fmt.Errorf("publish: base images cannot be pulled (%w), and an image made of stand-ins is no use to a cluster; STANDINS=always tries it all the same", err)
		}
		if !real {
			fmt.Println("base images are stand-ins made of this machine's files:", err)
		}
	case "always", "never":
	default:
		return fmt.Errorf("-standins is %q, not auto, always or never", *standins)
	}

	s, err := stack.Start(ctx, stack.Config{Log: os.Stdout, RealBases: real})
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, s.Close())
	}()
	f, err := s.Function(ctx, stack.FunctionConfig{
		Watchdog: true,
		Secrets:  map[string][]byte{"registry-config": credentials},
		// A first build compiles Go's standard library, on whatever this is.
		Env: map[string]string{
			"build_timeout": "1h", "read_timeout": "65m", "write_timeout": "65m", "exec_timeout": "65m",
			"context_repository": s.Registry.Image("builder/contexts"),
		},
	})
	if err != nil {
		return err
	}
	return do(ctx, s, f)
}

// reachable asks every URL for any answer at all.
func reachable(ctx context.Context, urls ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for _, u := range urls {
		req, err := http.NewRequestWithContext(ctx, http.MethodHead, u, nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		resp.Body.Close()
	}
	return nil
}

// readRegistryConfig returns Docker's credentials file, or nil where there is
// none and none was asked for.
func readRegistryConfig(path string) ([]byte, error) {
	asked := path != ""
	if !asked {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, err
		}
		path = filepath.Join(home, ".docker", "config.json")
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !asked {
		return nil, nil
	}
	return b, err
}

// build packs dir, sends it and shows the build's lines as they come.
func build(ctx context.Context, f *stack.Function, dir, image string, args map[string]string) (client.Record, error) {
	body, err := stack.Pack(dir, &builder.BuildConfig{Image: image, BuildArgs: args})
	if err != nil {
		return client.Record{}, err
	}
	fmt.Printf("building %s from %s, %d bytes packed\n", image, dir, len(body))
	got, err := f.PostEach(ctx, body, func(r client.Record) {
		for _, line := range r.Log {
			fmt.Println(" ", line)
		}
	}, client.Accept(client.NDJSON))
	if err != nil {
		return client.Record{}, err
	}
	for _, w := range got.Warnings {
		fmt.Println("  warning:", w)
	}
	if got.Status != "success" {
		return client.Record{}, fmt.Errorf("the build ended %s, %s: %s", got.Status, got.Code, got.Error)
	}
	fmt.Printf("pushed %s@%s in %.1fs\n", got.Image, got.Digest, got.Duration)
	return got.Record, nil
}

// functionDir returns the folder to build, which must be one that can be.
func functionDir(dir string) (string, error) {
	if dir == "" {
		// The sample is beside this command, and the working directory in tests/
		// or above it.
		dir = filepath.Join("testdata", "hello")
		if _, err := os.Stat(dir); err != nil {
			dir = filepath.Join("tests", dir)
		}
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	for _, name := range []string{"Dockerfile", "handler.go"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("%s has neither a Dockerfile nor the handler.go of a golang-middleware function", dir)
}

func buildAndRun(ctx context.Context, s *stack.Stack, f *stack.Function, dir, image string) error {
	name := strings.ToLower(filepath.Base(dir))
	if image == "" {
		image = name + ":latest"
	}
	if host, _, ok := strings.Cut(image, "/"); !ok || !strings.ContainsAny(host, ".:") && host != "localhost" {
		image = s.Registry.Image(image)
	}
	if _, err := os.Stat(filepath.Join(dir, "Dockerfile")); err != nil {
		if dir, err = s.Assemble(name, dir); err != nil {
			return err
		}
	}
	got, err := build(ctx, f, dir, image, stack.GoSettings(ctx))
	if err != nil {
		return err
	}

	fmt.Println("pulling it back and running it")
	img, err := stack.Pull(ctx, got.Image+"@"+got.Digest)
	if err != nil {
		return err
	}
	c, err := s.Run(ctx, img, stack.RunConfig{})
	if err != nil {
		return err
	}
	// A server on the port of all functions, or something that prints and ends.
	status, answer, err := c.Get(ctx, 8080, "/")
	if err == nil {
		fmt.Printf("GET / on port 8080 answers %d:\n%s\n", status, strings.TrimSpace(answer))
		c.Kill()
		return nil
	}
	if !c.Ended() {
		return fmt.Errorf("asking the image on port 8080: %w", err)
	}
	out, err := c.Output(ctx)
	if err == nil {
		fmt.Printf("it prints:\n%s\n", strings.TrimSpace(out))
	}
	return err
}

func publish(ctx context.Context, s *stack.Stack, f *stack.Function, image string) error {
	dir, args, err := s.Own(ctx)
	if err != nil {
		return err
	}
	got, err := build(ctx, f, dir, image, args)
	if err != nil {
		return err
	}
	fmt.Printf("\nBUILDER_IMAGE=%s faas-cli deploy\n", got.Image)
	return nil
}

func up(ctx context.Context, s *stack.Stack, f *stack.Function, openfaas bool) error {
	gateway := "  the gateway     not started; faas-cli invoke, the queue and the UI need it\n"
	if openfaas {
		fmt.Println("starting OpenFaaS Community Edition: gateway, NATS Streaming and queue worker")
		fmt.Println("they are built here and under its own licence: commercial use is limited, and they may not be passed on")
		o, err := s.OpenFaaS(ctx, f, stack.OpenFaaSConfig{})
		if err != nil {
			return fmt.Errorf("%w\nmake up OPENFAAS=false leaves OpenFaaS out", err)
		}
		gateway = fmt.Sprintf("  the gateway     %[1]s, on every interface\n  OpenFaaS's UI   %[1]s/ui/\n", o.URL)
	}
	fmt.Printf(`
  the builder     %[1]s
  its page        %[1]s/ in a browser
%[8]s  the registry    %[2]s
  buildkitd       %[3]s
  payload secret  %[4]s
  logs            %[5]s
                  %[6]s

For the commands of the pages:

  export BUILDER=%[1]s GATEWAY=http://127.0.0.1:8080 REGISTRY=%[2]s PAYLOAD_SECRET=%[4]s

A build with curl:

  mkdir -p /tmp/req/context && cd /tmp/req
  printf 'FROM busybox\nRUN echo hello > /greeting\nCMD ["cat", "/greeting"]\n' > context/Dockerfile
  printf '{"image":"%[7]s"}' > com.openfaas.docker.config
  tar cf /tmp/req.tar .
  curl -N %[1]s/build -H 'Accept: application/x-ndjson' --data-binary @/tmp/req.tar \
    -H "X-Build-Signature: sha256=$(openssl dgst -sha256 -hmac "$(cat %[4]s)" /tmp/req.tar | sed 's/.*= //')"

A function with faas-cli, from the folder of its stack.yml, whose image begins with %[2]s/:

  faas-cli publish --remote-builder %[1]s --payload-secret %[4]s

Ctrl-C ends all of it and leaves nothing behind.
`, f.URL, s.Registry.Addr, s.Buildkitd.Addr, filepath.Join(f.SecretsDir, "payload-secret"), f.LogFile(), s.Buildkitd.LogFile(),
		s.Registry.Image("hello:latest"), gateway)
	<-ctx.Done()
	fmt.Println("\nstopping")
	return nil
}
