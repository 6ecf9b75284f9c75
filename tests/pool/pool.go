// Package pool measures what placement does for the caches of several daemons:
// one workload, built once with the function's own placement and once with each
// build on a daemon drawn at random.
package pool

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/openfaas/go-sdk/builder"
	"golang.org/x/sync/errgroup"

	"handler/function/tests/stack"
)

// Workload is how often what is built.
type Workload struct {
	Daemons  int
	Replicas int // of the function, which share nothing
	Images   int
	Rebuilds int // of each image, in random order
	AtOnce   int

	// DepsEvery says that every how many rebuilds an image's dependencies change;
	// zero is never. Its source changes every time.
	DepsEvery int

	// Setup and Install are how long the steps take that depend on nothing and on
	// the dependencies.
	Setup, Install time.Duration
}

// Result is of one way of placing builds.
type Result struct {
	Cacheable int // steps whose inputs had been built before, on any daemon
	Cached    int // of those
	Rebuilds  []time.Duration
	Diverted  int // builds that passed a daemon by that was too slow to count its builds
}

// Share of the cacheable steps that came from the cache.
func (r Result) Share() float64 { return float64(r.Cached) / float64(r.Cacheable) }

// Median of the rebuilds' times.
func (r Result) Median() time.Duration {
	sorted := slices.Sorted(slices.Values(r.Rebuilds))
	return sorted[len(sorted)/2]
}

// Compare runs the workload with affinity and then with random placement, on
// daemons that it starts and stops.
func Compare(ctx context.Context, s *stack.Stack, w Workload) (affinity, random Result, err error) {
	var addrs []string
	var alone, replicas []*stack.Function
	for range w.Daemons {
		b, err := s.NewBuildkitd(ctx, stack.BuildkitdConfig{})
		if err != nil {
			return affinity, random, err
		}
		defer b.Kill()
		f, err := s.Function(ctx, stack.FunctionConfig{Buildkitd: b, Plain: true})
		if err != nil {
			return affinity, random, err
		}
		defer f.Kill()
		addrs, alone = append(addrs, b.Addr), append(alone, f)
	}
	for range w.Replicas {
		// With a low limit, the builds that the other replica has, or had, divert some.
		f, err := s.Function(ctx, stack.FunctionConfig{Plain: true, Env: map[string]string{"buildkit_addr": strings.Join(addrs, ","), "daemon_builds": "100"}})
		if err != nil {
			return affinity, random, err
		}
		defer f.Kill()
		replicas = append(replicas, f)
	}
	if affinity, err = w.run(ctx, s, replicas); err != nil {
		return affinity, random, err
	}
	for _, f := range replicas {
		n, err := f.Metric("builder_placements_total", `choice="full"`)
		if err == nil { // an error before the first
			affinity.Diverted += int(n)
		}
	}
	random, err = w.run(ctx, s, alone)
	return affinity, random, err
}

// run builds everything, each time with a function drawn at random.
func (w Workload) run(ctx context.Context, s *stack.Stack, functions []*stack.Function) (Result, error) {
	var r Result
	var mu sync.Mutex
	images := make([]*image, w.Images)
	var order []*image
	for i := range images {
		mark := strings.ToLower(rand.Text())
		images[i] = &image{w: w, mark: mark, ref: s.Registry.Image(mark + ":v1"), known: make(map[string]bool)}
		for range w.Rebuilds {
			order = append(order, images[i])
		}
	}
	mathrand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(w.AtOnce)
	for _, im := range slices.Concat(images, order) {
		g.Go(func() error {
			im.mu.Lock() // an image's builds follow one another
			defer im.mu.Unlock()
			first := im.builds == 0
			took, cacheable, cached, err := im.build(ctx, functions[mathrand.IntN(len(functions))])
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			r.Cacheable += cacheable
			r.Cached += cached
			if !first {
				r.Rebuilds = append(r.Rebuilds, took)
			}
			return nil
		})
	}
	return r, g.Wait()
}

type image struct {
	w         Workload
	mark, ref string

	mu     sync.Mutex
	builds int
	known  map[string]bool // steps and their inputs that have been built
}

// step matches the end of one: its number and instruction, and how it ended.
var step = regexp.MustCompile(`^v: \S+ \[\d+/\d+\] ((?:COPY|RUN) .*?) (CACHED|\d+\.\d\ds)$`)

func (im *image) build(ctx context.Context, f *stack.Function) (took time.Duration, cacheable, cached int, err error) {
	deps := 0
	if im.w.DepsEvery > 0 {
		deps = im.builds / im.w.DepsEvery
	}
	dir, err := os.MkdirTemp("", "pool-")
	if err != nil {
		return 0, 0, 0, err
	}
	defer os.RemoveAll(dir)
	err = stack.WriteContext(filepath.Join(dir, "context"), map[string]string{
		"Dockerfile": fmt.Sprintf(`FROM busybox
COPY base /
RUN sleep %g
COPY deps /
RUN sleep %g
COPY source /
`, im.w.Setup.Seconds(), im.w.Install.Seconds()),
		"base":   im.mark,
		"deps":   fmt.Sprint(im.mark, deps),
		"source": fmt.Sprint(im.mark, im.builds),
	})
	if err != nil {
		return 0, 0, 0, err
	}
	body, err := stack.Pack(filepath.Join(dir, "context"), &builder.BuildConfig{Image: im.ref})
	if err != nil {
		return 0, 0, 0, err
	}
	start := time.Now()
	rec, err := f.Build(ctx, body)
	took = time.Since(start)
	if err != nil {
		return 0, 0, 0, err
	}
	im.builds++
	ended := 0
	for _, line := range rec.Log {
		m := step.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		input := fmt.Sprint(ended, " ", im.inputs(ended, deps))
		ended++
		if im.known[input] {
			cacheable++
			if m[2] == "CACHED" {
				cached++
			}
		}
		im.known[input] = true
	}
	if ended != 5 {
		return 0, 0, 0, errors.New("not the steps of the Dockerfile:\n" + strings.Join(rec.Log, "\n"))
	}
	return took, cacheable, cached, nil
}

// inputs are what the step with the given index, and those before it, depend on.
func (im *image) inputs(index, deps int) string {
	switch {
	case index < 2:
		return ""
	case index < 4:
		return fmt.Sprint(deps)
	}
	return fmt.Sprint(deps, im.builds)
}
