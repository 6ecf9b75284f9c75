// Command bench-pool measures what placement gains: the same images are rebuilt
// on three daemons with the function's placement, and with each build on a daemon
// drawn at random. The last line it prints is one JSON object.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"handler/function/tests/pool"
	"handler/function/tests/stack"
)

// result is the last line: shares of the steps that could come from a cache, and
// the ratio of the medians of the rebuilds' times. Below 1, affinity is faster.
type result struct {
	AffinityCached float64 `json:"affinity_cached"`
	RandomCached   float64 `json:"random_cached"`
	MedianVsRandom float64 `json:"median_vs_random"`

	// The same when the dependencies never change, so that at random too every
	// daemon has them in the end.
	SourceOnlyRandomCached   float64 `json:"source_only_random_cached"`
	SourceOnlyMedianVsRandom float64 `json:"source_only_median_vs_random"`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	w := pool.Workload{Daemons: 3, Replicas: 2, AtOnce: 3, Setup: 300 * time.Millisecond, Install: time.Second}
	flag.IntVar(&w.Images, "images", 30, "`number` of images")
	flag.IntVar(&w.Rebuilds, "rebuilds", 5, "`number` of rebuilds of each")
	flag.Parse()
	if err := bench(ctx, w); err != nil {
		fmt.Fprintln(os.Stderr, "bench-pool:", err)
		stop()
		os.Exit(1)
	}
}

func bench(ctx context.Context, w pool.Workload) (err error) {
	s, err := stack.Start(ctx, stack.Config{Log: os.Stderr})
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := s.Close(); err == nil {
			err = closeErr
		}
	}()
	var r result
	for _, tt := range []struct {
		name             string
		depsEvery        int
		affinity, random *float64
		ratio            *float64
	}{
		{"dependencies change every other time", 2, &r.AffinityCached, &r.RandomCached, &r.MedianVsRandom},
		{"dependencies never change", 0, new(float64), &r.SourceOnlyRandomCached, &r.SourceOnlyMedianVsRandom},
	} {
		w.DepsEvery = tt.depsEvery
		affinity, random, err := pool.Compare(ctx, s, w)
		if err != nil {
			return err
		}
		fmt.Printf("%s: %d images, %d rebuilds of each, %d daemons, %d replicas\n", tt.name, w.Images, w.Rebuilds, w.Daemons, w.Replicas)
		show("affinity", affinity)
		show("random", random)
		*tt.affinity, *tt.random = round(affinity.Share()), round(random.Share())
		*tt.ratio = round(affinity.Median().Seconds() / random.Median().Seconds())
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

func show(name string, r pool.Result) {
	fmt.Printf("  %-8s %d of %d cacheable steps cached, rebuild median %v\n", name, r.Cached, r.Cacheable, r.Median().Round(time.Millisecond))
}

func round(x float64) float64 { return float64(int64(x*1000+0.5)) / 1000 }
