package metrics

import (
	"maps"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"handler/function/api"
)

// tenantLabel is the label with a tenant's id. Nobody's requests have it empty.
const tenantLabel = "tenant"

// tenants adds the tenant's id to counters, or not.
type tenants struct {
	on   bool
	vecs []*prometheus.CounterVec // with the label

	mu   sync.Mutex
	seen map[string]bool // ids in labels
}

func newTenants(on bool) *tenants { return &tenants{on: on, seen: make(map[string]bool)} }

// counter returns a counter with the given labels, and the tenant's.
func (t *tenants) counter(opts prometheus.CounterOpts, labels []string) *prometheus.CounterVec {
	if !t.on {
		return prometheus.NewCounterVec(opts, labels)
	}
	vec := prometheus.NewCounterVec(opts, append(labels, tenantLabel))
	t.vecs = append(t.vecs, vec)
	return vec
}

// label adds the tenant's id to the values of a counter's labels.
func (t *tenants) label(id string, values ...string) []string {
	if !t.on {
		return values
	}
	if id != "" {
		t.mu.Lock()
		t.seen[id] = true
		t.mu.Unlock()
	}
	return append(values, id)
}

// Tenants has the counters begin at zero for what only tenants are told. It forgets the series of
// those whose id is not known any more: otherwise there would be more with every tenant that goes.
func (m *Metrics) Tenants(known func(id string) bool) {
	m.begin(api.TenantBusy)
	m.tenants.mu.Lock()
	defer m.tenants.mu.Unlock()
	maps.DeleteFunc(m.tenants.seen, func(id string, _ bool) bool {
		if known(id) {
			return false
		}
		for _, vec := range m.tenants.vecs {
			vec.DeletePartialMatch(prometheus.Labels{tenantLabel: id})
		}
		return true
	})
}

// stale is a gauge that is there only if the function's ok is true.
type stale func() (stale, ok bool)

var staleDesc = prometheus.NewDesc("builder_tenants_stale",
	"Whether something is wrong with the file of tenants, so that an older one is in force, or none.", nil, nil)

func (stale) Describe(ch chan<- *prometheus.Desc) { ch <- staleDesc }

func (f stale) Collect(ch chan<- prometheus.Metric) {
	isStale, ok := f()
	if !ok {
		return
	}
	value := 0.0
	if isStale {
		value = 1
	}
	ch <- prometheus.MustNewConstMetric(staleDesc, prometheus.GaugeValue, value)
}
