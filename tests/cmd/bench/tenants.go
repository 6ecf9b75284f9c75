package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"handler/function/tests/stack"
)

const (
	tenantCount = 1000
	// smallPerLarge is how many small bodies there are to one of 200 MB: their times differ by
	// less than a millisecond.
	smallPerLarge = 30
)

// caller is somebody who sends bodies to a function.
type caller struct {
	name     string
	function *stack.Function // with the caller's key; it names the caller or not
}

// callers are one key without a file of tenants, a tenant among a thousand who names itself,
// and the same tenant as unmodified clients are: its image says whose a request is.
func (b *benchmark) callers(ctx context.Context) (list []caller, kill func(), err error) {
	env := map[string]string{"max_body_bytes": strconv.Itoa(maxBody), "max_unpacked_bytes": strconv.Itoa(maxBody)}
	all := make([]*stack.Tenant, tenantCount)
	for i := range all {
		name := fmt.Sprintf("tenant-%d", i)
		all[i] = stack.NewTenant(name, b.stack.Registry.Image(name))
	}
	one, err := b.stack.Function(ctx, stack.FunctionConfig{Env: env})
	if err != nil {
		return nil, nil, err
	}
	many, err := b.stack.Function(ctx, stack.FunctionConfig{Env: env, Secrets: stack.TenantsOf(all...).Secret()})
	if err != nil {
		one.Kill()
		return nil, nil, err
	}
	tenant := all[tenantCount/2]
	one.Images = tenant.Images[0]
	named, unnamed := *many, *many
	named.Client = *tenant.Of(many.Client)
	unnamed.Client = named.Client
	unnamed.Tenant = ""
	named.Images, unnamed.Images = one.Images, one.Images
	return []caller{{"one key", one}, {"named", &named}, {"by image", &unnamed}}, func() { one.Kill(); many.Kill() }, nil
}

// tenants times what it costs to find out whose a request is, among a thousand tenants.
func (b *benchmark) tenants(ctx context.Context, w workload) error {
	callers, kill, err := b.callers(ctx)
	if err != nil {
		return err
	}
	defer kill()
	if err := b.smallBody(ctx, w, callers); err != nil {
		return fmt.Errorf("tenants, small body: %w", err)
	}
	if err := b.largeBody(ctx, w, callers); err != nil {
		return fmt.Errorf("tenants, large body: %w", err)
	}
	return nil
}

// smallBody sends a body that is refused once its signature has passed and its config has been
// checked: no host may have contexts here.
func (b *benchmark) smallBody(ctx context.Context, w workload, callers []caller) error {
	path := filepath.Join(b.stack.Dir, "bench-small.tar")
	config := fmt.Appendf(nil, `{"image":%q,"context":{"git":"https://git.example.com/app.git"}}`, callers[0].function.Image("small:v1"))
	if err := writeTar(path, entry{configFile, config}); err != nil {
		return err
	}
	body, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	all := make([]series, len(callers))
	const warm = 10 // until there are connections
	for i := range w.tenants*smallPerLarge + warm {
		for j, c := range callers {
			start := time.Now()
			a, err := c.function.Post(ctx, body)
			took := time.Since(start)
			if err != nil || a.Code != "context_forbidden" {
				return fmt.Errorf("%s: %v, %w", c.name, a, err)
			}
			if i >= warm {
				all[j] = append(all[j], took)
			}
		}
	}
	more := max(all[1].median(), all[2].median()) - all[0].median()
	b.result.TenantsSmallMS = round(more.Seconds() * 1000)
	fmt.Printf("a body of %d bytes, with %d tenants\n", len(body), tenantCount)
	printSeries(callers, all)
	return nil
}

func printSeries(callers []caller, all []series) {
	for i, c := range callers {
		fmt.Printf("  %-9s %v\n", c.name, all[i])
	}
}

// largeBody sends 200 MB with the config behind all of it, as go-sdk packs them, and times
// the way to the start of the solve. A plain tar is searched by its headers alone, and a
// compressed one has to be decompressed: the ratio by image is that of whichever costs more.
func (b *benchmark) largeBody(ctx context.Context, w workload, callers []caller) error {
	plain := filepath.Join(b.stack.Dir, "bench-tenants.tar")
	defer os.Remove(plain)
	config := fmt.Appendf(nil, `{"image":%q}`, callers[0].function.Image("large:v1"))
	entries := append(b.largeEntries(), entry{configFile, config})
	if err := writeTar(plain, entries...); err != nil {
		return err
	}
	zipped := plain + ".gz"
	defer os.Remove(zipped)
	if out, err := exec.CommandContext(ctx, "gzip", "-1", "-k", plain).CombinedOutput(); err != nil {
		return fmt.Errorf("gzip: %w: %s", err, out)
	}
	for _, form := range []struct{ name, path string }{{"tar", plain}, {"gzip", zipped}} {
		all, err := b.largeRuns(ctx, w, callers, form.path)
		if err != nil {
			return fmt.Errorf("%s: %w", form.name, err)
		}
		named, image := ratio(all[1], all[0]), ratio(all[2], all[0])
		b.result.TenantsNamedRatio = max(b.result.TenantsNamedRatio, named)
		b.result.TenantsImageRatio = max(b.result.TenantsImageRatio, image)
		fmt.Printf("200 MB as %s, to the start of the solve, with %d tenants: named %v, by image %v\n", form.name, tenantCount, named, image)
		printSeries(callers, all)
	}
	return nil
}

// largeRuns has each caller send a file in turn.
func (b *benchmark) largeRuns(ctx context.Context, w workload, callers []caller, path string) ([]series, error) {
	all := make([]series, len(callers))
	for i := range w.tenants + 1 {
		for j, c := range callers {
			signature, err := signFile(path, c.function.Secret)
			if err != nil {
				return nil, err
			}
			began := time.Now()
			started, err := b.postFile(ctx, c.function, path, signature, func(f *os.File) io.ReadCloser { return f })
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.name, err)
			}
			if i > 0 {
				all[j] = append(all[j], started.Sub(began))
			}
		}
	}
	return all, nil
}

// largeEntries are 200 MB of source, all of which .dockerignore leaves out.
func (b *benchmark) largeEntries() []entry {
	const files, size = 200, 1_000_000
	list := []entry{
		{"context/Dockerfile", []byte("FROM scratch\nCOPY small /\n")},
		{"context/small", []byte("small")},
		{"context/.dockerignore", []byte("large*\n")},
	}
	for i := range files {
		at := i * size % (len(b.source) - size)
		list = append(list, entry{"context/large" + strconv.Itoa(i), b.source[at : at+size]})
	}
	return list
}

// signFile is client.Sign of a file.
func signFile(path, secret string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	mac := hmac.New(sha256.New, []byte(secret))
	if _, err := io.Copy(mac, f); err != nil {
		return "", err
	}
	return "sha256=" + hex.EncodeToString(mac.Sum(nil)), nil
}
