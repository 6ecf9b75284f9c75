package tenants

import (
	"fmt"
	"maps"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"

	"handler/function/buildconfig"
	"handler/function/hosts"
	"handler/function/repository"
)

const (
	// minMemory is what runc needs to start a process in a container.
	minMemory = 6 << 20
	// minCPUs is a quota of 1 ms in 100 ms, the least that Linux takes.
	minCPUs = 0.01
	// The largest values are far beyond any use. They keep sums and products small.
	maxCPUs   = 1024
	maxBytes  = 1 << 50
	maxBuilds = 1_000_000
	maxWeight = 1000
)

var (
	// nameForm is the form of a tenant's name: it is in a header and in the log.
	nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$`)
	// idForm is the form of every id, and of the name of a pool. An id is a part of tags.
	idForm = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,39}$`)
)

// id is the id of a tenant or of a key, or the name of a pool.
func (v value) id() string {
	s, ok := v.text()
	if ok && !idForm.MatchString(s) {
		// The value is not told: it may be a secret in a wrong place.
		v.wrong("an id has 1 to 40 lower-case letters, digits and -, and does not begin with -")
		return ""
	}
	return s
}

// limits are the keys that an entry of tenants and defaults both have.
func (r *reader) limits(t *Tenant) map[string]func(value) {
	return map[string]func(value){
		"from":           func(v value) { t.From = v.texts(repository.ParsePattern) },
		"context_hosts":  func(v value) { t.ContextHosts = v.texts(contextHost) },
		"platforms":      func(v value) { t.Platforms = some(v, "platforms", v.texts(platform)) },
		"memory":         func(v value) { t.Memory = v.size(minMemory) },
		"cpus":           func(v value) { t.CPUs = v.cpus() },
		"daemons":        func(v value) { t.Pool = r.pool(v) },
		"builds":         func(v value) { t.Builds = v.number(0, maxBuilds) },
		"queue":          func(v value) { t.Queue = v.number(0, maxBuilds) },
		"weight":         func(v value) { t.Weight = v.number(1, maxWeight) },
		"build_timeout":  func(v value) { t.BuildTimeout = v.duration() },
		"max_body_bytes": func(v value) { t.MaxBodyBytes = v.size(1) },
	}
}

// tenant reads an entry of tenants. t has the defaults.
func (r *reader) tenant(v value, t *Tenant) {
	fields := map[string]func(value){
		"id":              func(v value) { t.ID = r.tenantID(v) },
		"keys":            func(v value) { t.Keys = r.keys(v) },
		"hosts":           func(v value) { t.Hosts = r.hosts(v) },
		"images":          func(v value) { t.Images = r.readImages(v, t) },
		"registry":        func(v value) { t.Registry = v.registry() },
		"git_credentials": func(v value) { t.GitCredentials = v.gitCredentials() },
		"suspended":       func(v value) { t.Suspended = v.boolean() },
	}
	maps.Copy(fields, r.limits(t))
	v.need(v.object(fields), "id", "keys", "images")
}

func contextHost(text string) (string, error) {
	_, _, err := buildconfig.ContextHost(text)
	return text, err
}

func platform(text string) (string, error) {
	name, err := buildconfig.NormalPlatform(text)
	if err != nil {
		return "", fmt.Errorf(`%q is not a platform such as "linux/amd64"`, text)
	}
	return name, nil
}

// host returns a host in the form that is compared: hosts of tenants, and the Host of a request.
func host(text string) (string, error) {
	h, err := hosts.Parse(text)
	if err != nil {
		return "", err
	}
	return h.Without(hosts.DefaultPort("https"), hosts.DefaultPort("http")).String(), nil
}

func (v value) number(least, most int64) int {
	s, ok := v.scalar("a whole number", "!!int")
	if !ok {
		return 0
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < least || n > most {
		v.wrong("%.40q is not a whole number from %d to %d", s, least, most)
		return 0
	}
	return int(n)
}

func (v value) cpus() float64 {
	s, ok := v.scalar("a number of processors", "!!int", "!!float")
	if !ok {
		return 0
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsNaN(n) || n < minCPUs || n > maxCPUs {
		v.wrong("%.40q is not a number of processors from %v to %d", s, minCPUs, maxCPUs)
		return 0
	}
	return n
}

// size is in bytes, or has a unit.
func (v value) size(least int64) int64 {
	s, ok := v.scalar("a size such as 64MiB", "!!str", "!!int")
	if !ok {
		return 0
	}
	n, err := units.RAMInBytes(s)
	if err != nil || n < least || n > maxBytes {
		v.wrong("%.40q is not a size from %s to %s, such as 64MiB", s, units.BytesSize(float64(least)), units.BytesSize(maxBytes))
		return 0
	}
	return n
}

// ParseDuration reads a duration in Go's form, or a whole number of seconds, as of-watchdog does.
func ParseDuration(text string) (time.Duration, error) {
	if n, err := strconv.ParseInt(text, 10, 32); err == nil {
		return time.Duration(n) * time.Second, nil
	}
	return time.ParseDuration(text)
}

func (v value) duration() time.Duration {
	s, ok := v.scalar("a duration such as 10m", "!!str", "!!int")
	if !ok {
		return 0
	}
	d, err := ParseDuration(s)
	if err != nil || d <= 0 {
		v.wrong("%.40q is not a duration such as 10m", s)
		return 0
	}
	return d
}

func (v value) boolean() bool {
	s, ok := v.scalar("true or false", "!!bool")
	return ok && strings.EqualFold(s, "true")
}

func (v value) time() time.Time {
	s, ok := v.scalar("a time such as 2027-01-31T00:00:00Z", "!!timestamp", "!!str")
	if !ok {
		return time.Time{}
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		v.wrong("%.40q is not a time such as 2027-01-31T00:00:00Z", s)
	}
	return t
}
