package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/moby/buildkit/client"
	"github.com/tonistiigi/fsutil"

	"handler/function"
	"handler/function/buildkit/contextfs"
	"handler/function/payload"
	"handler/function/tests/stack"
)

const maxBody = 2 << 30

// settle is before each cached rebuild, so that none has to wait for what the one
// before has left the daemon to tidy up.
const settle = 300 * time.Millisecond

var httpClient = &http.Client{Timeout: 10 * time.Minute}

type benchmark struct {
	stack    *stack.Stack
	function *stack.Function
	client   *client.Client
	source   []byte // what contexts are made of
	result   result
}

func (b *benchmark) start(ctx context.Context) error {
	var err error
	if b.source, err = goSource(ctx); err != nil {
		return err
	}
	if b.function, err = b.newFunction(ctx); err != nil {
		return err
	}
	b.client, err = b.stack.Buildkitd.Client(ctx)
	return err
}

func (b *benchmark) newFunction(ctx context.Context) (*stack.Function, error) {
	return b.stack.Function(ctx, stack.FunctionConfig{Env: map[string]string{
		"max_body_bytes":     strconv.Itoa(maxBody),
		"max_unpacked_bytes": strconv.Itoa(maxBody),
	}})
}

// idle starts further instances: the first one was compiled on the way.
func (b *benchmark) idle(ctx context.Context, _ workload) error {
	var times series
	for range 5 {
		start := time.Now()
		f, err := b.newFunction(ctx)
		if err != nil {
			return err
		}
		times = append(times, time.Since(start))
		if len(times) == 5 {
			time.Sleep(2 * time.Second)
			rss, _, err := f.Memory()
			if err != nil {
				return err
			}
			b.result.IdleRSSMiB = mib(rss)
		}
		f.Kill()
	}
	b.result.ReadyMS = round(times.median().Seconds() * 1000)
	fmt.Printf("start to ready: %v; %.1f MiB resident when idle\n", times, b.result.IdleRSSMiB)
	return nil
}

// buildctl builds dir as a process. output is further attributes of the image.
func (b *benchmark) buildctl(ctx context.Context, dir, ref string, output ...string) (time.Duration, error) {
	// Who builds with another host name shares no cache of a RUN step, nor of what
	// follows it.
	cmd := b.stack.Buildkitd.Buildctl(ctx, "build", "--progress=quiet", "--frontend=dockerfile.v0", "--opt=hostname="+filepath.Base(dir),
		"--local=context="+dir, "--local=dockerfile="+dir,
		"--output="+strings.Join(append([]string{"type=image", "push=true", "name=" + ref}, output...), ","))
	start := time.Now()
	out, err := cmd.CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("buildctl: %w\n%s", err, out)
	}
	return time.Since(start), nil
}

// inProcess builds with BuildKit's client alone, with a record in the daemon's
// history, as is its default, or without one, as the function does.
func (b *benchmark) inProcess(ctx context.Context, fs fsutil.FS, ref string, history bool) (time.Duration, error) {
	start := time.Now()
	_, err := b.client.Solve(ctx, nil, client.SolveOpt{
		Frontend:      "dockerfile.v0",
		FrontendAttrs: map[string]string{},
		LocalMounts:   map[string]fsutil.FS{"context": fs, "dockerfile": fs},
		SharedKey:     ref,
		Internal:      !history,
		Exports:       []client.ExportEntry{{Type: client.ExporterImage, Attrs: map[string]string{"name": ref, "push": "true"}}},
	}, nil)
	return time.Since(start), err
}

// overHTTP is post to the function.
func (b *benchmark) overHTTP(ctx context.Context, body []byte) (time.Duration, error) {
	return post(ctx, b.function, body)
}

// post posts a signed body and waits for the verdict.
func post(ctx context.Context, f *stack.Function, body []byte) (time.Duration, error) {
	req, err := f.Request(ctx, body)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	res, err := httpClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != 200 {
		err = fmt.Errorf("status %d: %s", res.StatusCode, answer)
	}
	return time.Since(start), err
}

// goSource is Go's own, one file after the other: text that compresses as what
// people build does.
func goSource(ctx context.Context) ([]byte, error) {
	root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("finding Go's source: %w", err)
	}
	const enough = 64 << 20
	var all []byte
	err = filepath.WalkDir(filepath.Join(strings.TrimSpace(string(root)), "src"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || filepath.Ext(path) != ".go" {
			return err
		}
		text, err := os.ReadFile(path)
		all = append(all, text...)
		if err == nil && len(all) >= enough {
			err = fs.SkipAll
		}
		return err
	})
	if err == nil && len(all) < 1<<20 {
		err = fmt.Errorf("finding Go's source: only %d bytes", len(all))
	}
	return all, err
}

// writeContext makes a tree of small files, a Dockerfile, and a base with a RUN step.
func (b *benchmark) writeContext(dir string, files, size int) error {
	content := map[string]string{"Dockerfile": "FROM busybox\nRUN true\nCOPY . /src\nRUN ls /src | wc -l\n"}
	if err := stack.WriteContext(dir, content); err != nil {
		return err
	}
	start := time.Now().Add(-24 * time.Hour)
	for i := range files {
		path := filepath.Join(dir, "d"+strconv.Itoa(i/100), fmt.Sprintf("f%d", i))
		if err := b.writeFile(path, size, i); err != nil {
			return err
		}
		when := start.Add(time.Duration(i) * time.Second)
		if err := os.Chtimes(path, when, when); err != nil {
			return err
		}
	}
	return nil
}

// writeFile writes size bytes of source that depend on seed.
func (b *benchmark) writeFile(path string, size, seed int) error {
	text := fmt.Appendf(nil, "// %d\n", seed)
	at := seed * size % (len(b.source) - size)
	text = append(text, b.source[at:at+size-len(text)]...)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o644)
}

func (b *benchmark) cached(ctx context.Context, w workload) error {
	dir := filepath.Join(b.stack.Dir, "bench-cached")
	if err := b.writeContext(dir, 300, 10<<10); err != nil {
		return err
	}
	body, err := stack.Tar(dir, map[string]string{"image": b.stack.Registry.Image("bench/function:v1")})
	if err != nil {
		return err
	}
	spool, err := payload.Receive(bytes.NewReader(body), io.Discard, payload.Options{
		Limits:   payload.Limits{Body: maxBody, Unpacked: maxBody, Config: 1 << 20, Names: 1 << 25, Entries: 10_000, Path: 4096},
		InMemory: maxBody,
	})
	if err != nil {
		return err
	}
	defer spool.Close()
	p, err := spool.Payload()
	if err != nil {
		return err
	}
	fs := contextfs.New(p.Context)
	var all [4]series
	for i := range w.cached + 1 {
		for j, build := range []func() (time.Duration, error){
			func() (time.Duration, error) { return b.overHTTP(ctx, body) },
			func() (time.Duration, error) {
				return b.buildctl(ctx, dir, b.stack.Registry.Image("bench/buildctl:v1"))
			},
			func() (time.Duration, error) {
				return b.inProcess(ctx, fs, b.stack.Registry.Image("bench/client:v1"), false)
			},
			func() (time.Duration, error) {
				return b.inProcess(ctx, fs, b.stack.Registry.Image("bench/history:v1"), true)
			},
		} {
			time.Sleep(settle)
			took, err := build()
			if err != nil {
				return err
			}
			if i > 0 { // the first run fills the cache
				all[j] = append(all[j], took)
			}
		}
	}
	function, ctl, plain, history := all[0], all[1], all[2], all[3]
	b.result.CachedVsBuildctl, b.result.CachedVsClient, b.result.CachedVsClientHistory = ratio(function, ctl), ratio(function, plain), ratio(function, history)
	fmt.Printf("cached rebuild, 300 files, 3 MB\n  function  %v\n  buildctl  %v\n  client    %v\n  client that leaves a record in the daemon's history\n            %v\n", function, ctl, plain, history)
	return nil
}

// oneFile compares with buildctl asked for the function's own compression, and as
// it comes, which is gzip at level 6. Each contender has a context of its own: the
// daemon remembers what it was sent of one.
func (b *benchmark) oneFile(ctx context.Context, w workload) error {
	const files, size = 2000, 100 << 10
	defaults, err := function.LoadConfig(func(string) string { return "" })
	if err != nil {
		return err
	}
	own := defaults.Buildkit.Compression
	attrs := []string{"compression=" + own.Type}
	b.result.OneFileCompression, b.result.OneFileCompressionDefault = own.Type, "gzip:6"
	if own.Level > 0 {
		attrs = append(attrs, fmt.Sprint("compression-level=", own.Level))
		b.result.OneFileCompression += fmt.Sprint(":", own.Level)
	}
	var body []byte
	contenders := []struct {
		name   string
		build  func(dir, ref string) (time.Duration, error)
		times  series
		pushed int64 // bytes, by the last build
	}{
		{name: "function", build: func(string, string) (time.Duration, error) { return b.overHTTP(ctx, body) }},
		{name: "buildctl", build: func(dir, ref string) (time.Duration, error) {
			return b.buildctl(ctx, dir, ref, attrs...)
		}},
		{name: "buildctl-default", build: func(dir, ref string) (time.Duration, error) { return b.buildctl(ctx, dir, ref) }},
	}
	dir := func(name string) string { return filepath.Join(b.stack.Dir, "bench-one-file-"+name) }
	for _, c := range contenders {
		defer os.RemoveAll(dir(c.name))
		if err := b.writeContext(dir(c.name), files, size); err != nil {
			return err
		}
	}
	for i := range w.oneFile + 1 {
		for j := range contenders {
			c := &contenders[j]
			ref := b.stack.Registry.Image("bench/one-file-" + c.name + ":v1")
			if err := b.writeFile(filepath.Join(dir(c.name), "d0", "f0"), size, files+i); err != nil {
				return err
			}
			if c.name == "function" {
				if body, err = stack.Tar(dir(c.name), map[string]string{"image": ref}); err != nil {
					return err
				}
			}
			took, err := c.build(dir(c.name), ref)
			if err != nil {
				return err
			}
			if i > 0 {
				c.times = append(c.times, took)
			}
			if c.pushed, err = changed(ctx, ref); err != nil {
				return err
			}
		}
	}
	ours, same, plain := contenders[0], contenders[1], contenders[2]
	sent, err := b.lastSent()
	if err != nil {
		return err
	}
	b.result.OneFileVsBuildctl, b.result.OneFileVsBuildctlDefault = ratio(ours.times, same.times), ratio(ours.times, plain.times)
	b.result.OneFileBytesPushed, b.result.OneFileBytesPushedBuildctl, b.result.OneFileBytesPushedDefault = ours.pushed, same.pushed, plain.pushed
	b.result.OneFileBytesSent = sent
	fmt.Printf("one file of %d bytes changed in 200 MB\n", size)
	fmt.Printf("  function          %s  %v, %.1f MB pushed\n", b.result.OneFileCompression, ours.times, float64(ours.pushed)/1e6)
	fmt.Printf("  buildctl          %s  %v, %.1f MB pushed\n", b.result.OneFileCompression, same.times, float64(same.pushed)/1e6)
	fmt.Printf("  buildctl, as is   %s  %v, %.1f MB pushed\n", b.result.OneFileCompressionDefault, plain.times, float64(plain.pushed)/1e6)
	fmt.Printf("  bytes of content sent to the daemon: %d\n", sent)
	return nil
}

// changed is the size of the layers that copy the context and of what follows
// them: each build of oneFile pushes these anew.
func changed(ctx context.Context, ref string) (int64, error) {
	manifest, err := pushedManifest(ctx, ref)
	if err != nil {
		return 0, err
	}
	size := manifest.Config.Size
	for i, l := range manifest.Layers {
		if i >= len(manifest.Layers)-2 {
			size += l.Size
		}
	}
	return size, nil
}

func pushedManifest(ctx context.Context, ref string) (*v1.Manifest, error) {
	parsed, err := name.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	img, err := remote.Image(parsed, remote.WithContext(ctx))
	if err != nil {
		return nil, err
	}
	return img.Manifest()
}

// lastSent is what the function says of its last build.
func (b *benchmark) lastSent() (int64, error) {
	log, err := b.function.Log()
	if err != nil {
		return 0, err
	}
	all := regexp.MustCompile(`"context_sent_bytes":(\d+)`).FindAllStringSubmatch(log, -1)
	if len(all) == 0 {
		return 0, fmt.Errorf("the function's log has no context_sent_bytes")
	}
	return strconv.ParseInt(all[len(all)-1][1], 10, 64)
}

// configFile is the config's name in a request.
const configFile = "com.openfaas.docker.config"

// entry is one file of a request.
type entry struct {
	name    string
	content []byte
}

// writeTar writes a request into a file.
func writeTar(path string, entries ...entry) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for _, e := range entries {
		if err := w.WriteHeader(&tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.content)), ModTime: time.Unix(1e9, 0)}); err != nil {
			return err
		}
		if _, err := w.Write(e.content); err != nil {
			return err
		}
	}
	return w.Close()
}

// gigabyte writes a request of 1 GiB into a file.
func (b *benchmark) gigabyte(path, config string) error {
	entries := []entry{
		{configFile, []byte(config)},
		{"context/Dockerfile", []byte("FROM scratch\nCOPY small /\n")},
		{"context/small", []byte("small")},
		{"context/.dockerignore", []byte("large*\n")},
	}
	block := make([]byte, 16<<20)
	for j := range block {
		block[j] = byte(j >> 6)
	}
	for i := range 64 {
		entries = append(entries, entry{"context/large" + strconv.Itoa(i), block})
	}
	return writeTar(path, entries...)
}

// ingest builds from 1 GiB of which .dockerignore leaves a few bytes, and times the
// way to the start of the solve: the body has been received, stored, hashed and indexed
// by then, and its signature found good.
func (b *benchmark) ingest(ctx context.Context, w workload) error {
	path := filepath.Join(b.stack.Dir, "bench-ingest.tar")
	if err := b.gigabyte(path, `{"image":"`+b.stack.Registry.Image("bench/ingest:v1")+`"}`); err != nil {
		return err
	}
	defer os.Remove(path)
	signature, _, err := b.openssl(ctx, path)
	if err != nil {
		return err
	}
	// What the builds before have written is not to be waited for here.
	syscall.Sync()
	// Memory that a process once had, it keeps for a while.
	b.function.Kill()
	if b.function, err = b.newFunction(ctx); err != nil {
		return err
	}
	time.Sleep(2 * time.Second)
	idle, _, err := b.function.Memory()
	if err != nil {
		return err
	}
	var function, openssl series
	for i := range w.ingest + 1 {
		began := time.Now()
		// The client runs on the same processors. It costs least where the kernel
		// sends the file.
		started, err := b.postFile(ctx, b.function, path, signature, func(f *os.File) io.ReadCloser { return f })
		if err != nil {
			return fmt.Errorf("ingest: %w", err)
		}
		_, t, err := b.openssl(ctx, path)
		if err != nil {
			return err
		}
		if i > 0 {
			function, openssl = append(function, started.Sub(began)), append(openssl, t)
		}
	}
	_, peak, err := b.function.Memory()
	if err != nil {
		return err
	}
	b.result.IngestVsOpenssl, b.result.IngestPeakMiB = ratio(openssl, function), mib(peak-idle)
	fmt.Printf("1 GiB body, to the start of the solve\n  function  %v\n  openssl   %v\n  peak of the function's memory over idle: %.1f MiB\n", function, openssl, b.result.IngestPeakMiB)
	return b.lastByte(ctx, w, path, signature)
}

// lastByte times the way from the last byte of the file to the start of the solve.
func (b *benchmark) lastByte(ctx context.Context, w workload, path, signature string) error {
	var all series
	for range w.ingest {
		var body *lastRead
		started, err := b.postFile(ctx, b.function, path, signature, func(f *os.File) io.ReadCloser {
			body = &lastRead{ReadCloser: f}
			return body
		})
		if err != nil {
			return fmt.Errorf("last byte: %w", err)
		}
		all = append(all, started.Sub(body.at))
	}
	b.result.LastByteToSolveMS = round(all.median().Seconds() * 1000)
	fmt.Printf("from the last byte of 1 GiB to the start of the solve\n  function  %v\n", all)
	return nil
}

// postFile has a function build from a file, and returns when the solve started. body reads
// the file.
func (b *benchmark) postFile(ctx context.Context, function *stack.Function, path, signature string, body func(*os.File) io.ReadCloser) (_ time.Time, err error) {
	f, err := os.Open(path)
	if err != nil {
		return time.Time{}, err
	}
	defer f.Close()
	req, err := function.Request(ctx, nil)
	if err != nil {
		return time.Time{}, err
	}
	info, err := f.Stat()
	if err != nil {
		return time.Time{}, err
	}
	req.Body, req.ContentLength, req.GetBody = body(f), info.Size(), nil
	req.Header.Set("X-Build-Signature", signature)
	res, err := httpClient.Do(req)
	if err != nil {
		return time.Time{}, err
	}
	defer res.Body.Close()
	var answer struct{ ID, Status, Error string }
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil {
		return time.Time{}, err
	}
	if answer.Status != "success" {
		return time.Time{}, fmt.Errorf("%s: %s", answer.Status, answer.Error)
	}
	return started(ctx, function, answer.ID)
}

// started is when the function says a call's build started. It says so once it has
// the body's sum, which may be after the verdict.
func started(ctx context.Context, function *stack.Function, id string) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		log, err := function.Log()
		if err != nil {
			return time.Time{}, err
		}
		for line := range strings.Lines(log) {
			var entry struct {
				ID      string `json:"call_id"`
				Started time.Time
			}
			if json.Unmarshal([]byte(line), &entry) == nil && entry.ID == id && !entry.Started.IsZero() {
				return entry.Started, nil
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Time{}, fmt.Errorf("the function's log does not say when build %s started", id)
}

// lastRead keeps when the last bytes were read, which is just before they are
// written to the connection.
type lastRead struct {
	io.ReadCloser
	at time.Time
}

func (r *lastRead) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if n > 0 {
		r.at = time.Now()
	}
	return n, err
}

// openssl signs a file as the original's page does.
func (b *benchmark) openssl(ctx context.Context, path string) (signature string, d time.Duration, err error) {
	start := time.Now()
	out, err := exec.CommandContext(ctx, "openssl", "dgst", "-sha256", "-hmac", b.stack.PayloadSecret, path).Output()
	if err != nil {
		return "", 0, fmt.Errorf("openssl: %w", err)
	}
	_, digits, ok := strings.Cut(strings.TrimSpace(string(out)), "= ")
	if !ok {
		return "", 0, fmt.Errorf("openssl: %q", out)
	}
	return "sha256=" + digits, time.Since(start), nil
}

// image has the builder build itself and adds up what a registry keeps of it.
func (b *benchmark) image(ctx context.Context, _ workload) error {
	dir, args, err := b.stack.Own(ctx)
	if err != nil {
		return err
	}
	ref := b.stack.Registry.Image("bench/builder:v1")
	body, err := stack.Tar(dir, map[string]any{"image": ref, "buildArgs": args})
	if err != nil {
		return err
	}
	d, err := b.overHTTP(ctx, body)
	if err != nil {
		return err
	}
	manifest, err := pushedManifest(ctx, ref)
	if err != nil {
		return err
	}
	size := manifest.Config.Size
	for _, l := range manifest.Layers {
		size += l.Size
	}
	b.result.ImageMiB = mib(size)
	fmt.Printf("the builder's own image: %.1f MiB compressed, built by itself in %v\n", b.result.ImageMiB, d.Round(time.Second))
	return nil
}
