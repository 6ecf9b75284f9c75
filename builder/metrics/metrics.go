// Package metrics counts and measures what /metrics tells an operator.
package metrics

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"handler/function/api"
	"handler/function/records"
	"handler/function/solve"
)

// Metrics are all metrics of the builder. They are in a registry of their own, so that
// /metrics has no others.
type Metrics struct {
	registry *prometheus.Registry
	tenants  *tenants // whose ids are labels

	builds     *prometheus.CounterVec
	refused    *prometheus.CounterVec
	received   prometheus.Counter
	sent       *prometheus.CounterVec
	steps      *prometheus.CounterVec
	placements *prometheus.CounterVec
	moved      prometheus.Counter
	Joined     prometheus.Counter
	LogGaps    prometheus.Counter
	InFlight   prometheus.Gauge
	Waiting    prometheus.Gauge
	duration   *prometheus.HistogramVec
	receive    prometheus.Histogram
	wait       prometheus.Histogram
	transfer   prometheus.Histogram
	push       prometheus.Histogram
}

// buckets are of all histograms, in seconds. A cached build takes a fraction of a second, a
// long one half an hour.
var buckets = []float64{0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 900, 1200, 1800}

// faults are the codes of failures that the sender of a build cannot mend. Both counters
// begin at zero for them: an alerting rule sees a counter that rises, but not one that
// appears.
var faults = []api.Code{
	api.Busy, api.QueueTimeout, api.NoDaemon, api.DaemonLost, api.Stalled, api.DaemonFull, api.RegistryFailed, api.RegistryTimeout,
	api.ContextFailed, api.NoSpace, api.NotReady, api.Internal,
}

// Config of Metrics. Each scrape calls its functions, which must be quick.
type Config struct {
	Daemons func() solve.Daemons

	// Records says how the store of records does.
	Records func() records.Stats

	// Tenants adds a label with the tenant's id to the counters of builds, refusals, steps and
	// sent bytes. There are as many series for each tenant as there are for all without it.
	Tenants bool

	// Stale says whether something is wrong with the file of tenants, so that an older one is
	// in force. ok is false where there is no file. Nil is for an installation without one.
	Stale func() (stale, ok bool)
}

// New returns the metrics.
func New(cfg Config) *Metrics {
	m := newMetrics(newTenants(cfg.Tenants))
	m.builds.WithLabelValues(m.tenants.label("", string(api.Success), "")...)
	m.sent.WithLabelValues(m.tenants.label("")...)
	m.begin(faults...)
	m.register(cfg)
	return m
}

// begin has both counters of failures begin at zero for some codes.
func (m *Metrics) begin(codes ...api.Code) {
	for _, code := range codes {
		m.builds.WithLabelValues(m.tenants.label("", string(api.Failed), string(code))...)
		m.refused.WithLabelValues(m.tenants.label("", string(code))...)
	}
}

// newMetrics makes the metrics, and does not register them.
func newMetrics(t *tenants) *Metrics {
	vec := t.counter
	return &Metrics{
		registry: prometheus.NewRegistry(),
		tenants:  t,
		builds: vec(prometheus.CounterOpts{
			Name: "builder_builds_total", Help: "Builds that ended, by status and code; a success has no code."},
			[]string{"status", "code"}),
		refused: vec(prometheus.CounterOpts{
			Name: "builder_requests_refused_total", Help: "Requests that never became a build, by code."},
			[]string{"code"}),
		received: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "builder_received_bytes_total", Help: "Bytes of request bodies received."}),
		sent: vec(prometheus.CounterOpts{
			Name: "builder_context_sent_bytes_total", Help: "Bytes of build contexts sent to buildkitd."},
			[]string{}),
		steps: vec(prometheus.CounterOpts{
			Name: "builder_steps_total", Help: "Build steps, by whether they came from the cache."},
			[]string{"cached"}),
		placements: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "builder_placements_total", Help: "Builds that got a buildkitd, by why it was that one: first, where their cache is; full or down, because the first was."},
			[]string{"choice"}),
		moved: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "builder_builds_moved_total", Help: "Builds that went on to another buildkitd because theirs was lost or its disk full."}),
		Joined: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "builder_deliveries_joined_total", Help: "Deliveries by a queue that were told of a build which another had begun."}),
		LogGaps: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "builder_log_gaps_total", Help: "Gaps in logs that were read back: lines that the store never had, or no longer has."}),
		InFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "builder_builds_in_flight", Help: "Builds that hold a slot."}),
		Waiting: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "builder_builds_waiting", Help: "Builds that wait for a slot."}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "builder_build_duration_seconds", Help: "From the request's acceptance to the verdict, by status.", Buckets: buckets},
			[]string{"status"}),
		receive:  histogram("builder_receive_seconds", "Receiving the body."),
		wait:     histogram("builder_wait_seconds", "Waiting for a slot."),
		transfer: histogram("builder_transfer_seconds", "Sending the context to buildkitd."),
		push:     histogram("builder_push_seconds", "Pushing to the registry."),
	}
}

func (m *Metrics) register(cfg Config) {
	daemons := cfg.Daemons
	gauge := func(name, help string, value func() int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return float64(value()) })
	}
	m.registry.MustRegister(
		m.builds, m.refused, m.received, m.sent, m.steps, m.placements, m.moved, m.Joined, m.LogGaps, m.InFlight, m.Waiting,
		m.duration, m.receive, m.wait, m.transfer, m.push,
		gauge("builder_daemons", "buildkitds known.", func() int { return daemons().Total }),
		gauge("builder_daemons_reachable", "buildkitds that answer.", func() int { return daemons().Reachable }),
		gauge("builder_daemons_full", "buildkitds whose disk was full and has not been pruned since.", func() int { return daemons().Full }),
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	m.registerRecords(cfg.Records)
	if cfg.Stale != nil {
		m.registry.MustRegister(stale(cfg.Stale))
	}
}

// registerRecords registers what the store of records counts.
func (m *Metrics) registerRecords(stats func() records.Stats) {
	gauge := func(name, help string, value func(records.Stats) float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return value(stats()) }))
	}
	counter := func(name, help string, value func(records.Stats) uint64) {
		m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 { return float64(value(stats())) }))
	}
	gauge("builder_records_reachable", "Whether the store of records takes what it is given.", func(s records.Stats) float64 {
		if s.Reachable {
			return 1
		}
		return 0
	})
	gauge("builder_records_lag_seconds", "Age of the oldest line or record that is not in the store yet.", func(s records.Stats) float64 { return s.Lag.Seconds() })
	gauge("builder_records_pending_bytes", "Lines and records that are not in the store yet.", func(s records.Stats) float64 { return float64(s.Pending) })
	counter("builder_records_dropped_lines_total", "Lines that never came into the store.", func(s records.Stats) uint64 { return s.Dropped })
	counter("builder_records_forgotten_total", "Records of ended builds that never came into the store.", func(s records.Stats) uint64 { return s.Forgotten })
	counter("builder_records_errors_total", "Requests to the store that had no answer, or a wrong one.", func(s records.Stats) uint64 { return s.Errors })
	counter("builder_builds_lost_total", "Builds of other replicas that this one has found lost.", func(s records.Stats) uint64 { return s.Lost })
	gauge("builder_log_followers", "Logs that are being read.", func(s records.Stats) float64 { return float64(s.Followers) })
}

func histogram(name, help string) prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets})
}

// Handler serves the Prometheus text format.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second})
}

// Received counts a body of n bytes that took d to arrive.
func (m *Metrics) Received(n int64, d time.Duration) {
	m.received.Add(float64(n))
	m.receive.Observe(d.Seconds())
}

// Refused counts a request that never became a build. tenant is the id of whose it was, or empty
// if that is not known.
func (m *Metrics) Refused(tenant string, code api.Code) {
	m.refused.WithLabelValues(m.tenants.label(tenant, string(code))...).Inc()
}

// Waited counts a build that waited d for its slot.
func (m *Metrics) Waited(d time.Duration) { m.wait.Observe(d.Seconds()) }

// Built counts a build of a tenant that ended d after its request was accepted. code is empty
// for a success.
func (m *Metrics) Built(tenant string, status api.Status, code api.Code, d time.Duration, stats solve.Stats) {
	label := m.tenants.label
	m.builds.WithLabelValues(label(tenant, string(status), string(code))...).Inc()
	m.duration.WithLabelValues(string(status)).Observe(d.Seconds())
	m.sent.WithLabelValues(label(tenant)...).Add(float64(stats.Sent))
	m.steps.WithLabelValues(label(tenant, "true")...).Add(float64(stats.Cached))
	m.steps.WithLabelValues(label(tenant, "false")...).Add(float64(stats.Steps - stats.Cached))
	if stats.Choice != "" {
		m.placements.WithLabelValues(string(stats.Choice)).Inc()
	}
	if stats.Moved {
		m.moved.Inc()
	}
	if stats.Transfer > 0 {
		m.transfer.Observe(stats.Transfer.Seconds())
	}
	if stats.Push > 0 {
		m.push.Observe(stats.Push.Seconds())
	}
}
