// Command bench measures the function against its peers, on the same daemon and
// contexts and in one run: buildctl as a process, and BuildKit's client in this
// process on a kept connection. Runs alternate, and ratios are of pairs. The last
// line it prints is one JSON object.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"handler/function/tests/stack"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	sizes := workload{}
	flag.IntVar(&sizes.cached, "cached", 30, "`runs` of the cached rebuild, for each contender; 0 leaves it out, as 0 of the others does")
	flag.IntVar(&sizes.oneFile, "one-file", 5, "`runs` of the one-file change in a 200 MB context")
	flag.IntVar(&sizes.ingest, "ingest", 5, "`runs` of the 1 GiB body")
	flag.IntVar(&sizes.tenants, "tenants", 9, "`runs` of the 200 MB body with tenants; of the small body there are thirty times as many")
	flag.IntVar(&sizes.records, "records", 30, "`runs` of the cached rebuild with a server for records and without; half as many builds are followed and stopped")
	flag.BoolVar(&sizes.image, "image", true, "build the builder's own image, for its size")
	flag.Parse()
	if err := bench(ctx, sizes); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

type workload struct {
	cached, oneFile, ingest, tenants, records int
	image                                     bool
}

// result is the last line. The ratios of times are the function's to the
// peer's: below 1 is faster than the peer. ingest_vs_openssl is one of speeds:
// above 1 is faster.
type result struct {
	CachedVsBuildctl           float64 `json:"cached_vs_buildctl"`
	CachedVsClient             float64 `json:"cached_vs_client"`
	CachedVsClientHistory      float64 `json:"cached_vs_client_history"`
	OneFileVsBuildctl          float64 `json:"one_file_vs_buildctl"`
	OneFileVsBuildctlDefault   float64 `json:"one_file_vs_buildctl_default"`
	OneFileCompression         string  `json:"one_file_compression"`
	OneFileCompressionDefault  string  `json:"one_file_compression_default"`
	OneFileBytesPushed         int64   `json:"one_file_bytes_pushed"`
	OneFileBytesPushedBuildctl int64   `json:"one_file_bytes_pushed_buildctl"`
	OneFileBytesPushedDefault  int64   `json:"one_file_bytes_pushed_default"`
	OneFileBytesSent           int64   `json:"one_file_bytes_sent"`
	IngestVsOpenssl            float64 `json:"ingest_vs_openssl"`
	IngestPeakMiB              float64 `json:"ingest_peak_mib"`
	LastByteToSolveMS          float64 `json:"last_byte_to_solve_ms"`
	TenantsSmallMS             float64 `json:"tenants_small_ms"`
	TenantsNamedRatio          float64 `json:"tenants_named_ratio"`
	TenantsImageRatio          float64 `json:"tenants_image_ratio"`
	RecordsMS                  float64 `json:"records_ms"`
	AttachMS                   float64 `json:"attach_ms"`
	CancelMS                   float64 `json:"cancel_ms"`
	CancelStepMS               float64 `json:"cancel_step_ms"`
	ReadyMS                    float64 `json:"ready_ms"`
	IdleRSSMiB                 float64 `json:"idle_rss_mib"`
	ImageMiB                   float64 `json:"image_mib"`
}

func bench(ctx context.Context, sizes workload) (err error) {
	s, err := stack.Start(ctx, stack.Config{Log: os.Stderr})
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := s.Close(); err == nil {
			err = closeErr
		}
	}()
	b := &benchmark{stack: s}
	if err := b.start(ctx); err != nil {
		return err
	}
	steps := []func(context.Context, workload) error{b.idle}
	// Before the others have filled the page cache: where a virtual machine has given
	// memory back to its host, a page takes three times as long as otherwise.
	if sizes.ingest > 0 {
		steps = append(steps, b.ingest)
	}
	if sizes.tenants > 0 {
		steps = append(steps, b.tenants)
	}
	if sizes.cached > 0 {
		steps = append(steps, b.cached)
	}
	if sizes.records > 0 {
		steps = append(steps, b.records)
	}
	if sizes.oneFile > 0 {
		steps = append(steps, b.oneFile)
	}
	if sizes.image {
		steps = append(steps, b.image)
	}
	for _, step := range steps {
		if err := step(ctx, sizes); err != nil {
			return err
		}
	}
	return json.NewEncoder(os.Stdout).Encode(b.result)
}

// series are the times of one contender.
type series []time.Duration

func (s series) median() time.Duration {
	sorted := slices.Sorted(slices.Values(s))
	return sorted[len(sorted)/2]
}

func (s series) String() string {
	return fmt.Sprintf("median %v, min %v, max %v, n=%d",
		s.median().Round(100*time.Microsecond), slices.Min(s).Round(100*time.Microsecond), slices.Max(s).Round(100*time.Microsecond), len(s))
}

// ratio is the median of a's to b's, pair by pair.
func ratio(a, b series) float64 {
	var all []float64
	for i := range a {
		all = append(all, a[i].Seconds()/b[i].Seconds())
	}
	slices.Sort(all)
	return round(all[len(all)/2])
}

func round(x float64) float64 { return float64(int64(x*1000+0.5)) / 1000 }

func mib(bytes int64) float64 { return round(float64(bytes) / (1 << 20)) }
