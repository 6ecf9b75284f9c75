package server

import (
	"testing"
	"time"

	"handler/function/api"
	"handler/function/reply"
	"handler/function/tenants"
)

// TestKeptVerdictsExpire: an old verdict is forgotten even if no other build ends.
func TestKeptVerdictsExpire(t *testing.T) {
	for name, kept := range map[string]func(*flights, flightID) bool{
		"asked for": func(fs *flights, id flightID) bool {
			return fs.find(signer{key: tenants.Key{Secret: []byte(id.key)}}, id.call) != nil
		},
		"delivered": func(fs *flights, id flightID) bool {
			_, _, run := fs.begin(&flight{id: id, call: &call{start: time.Now()}, done: make(chan struct{})}, reply.New(nil, reply.JSON, reply.Options{}))
			return !run
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, tt := range []struct {
				age  time.Duration
				want bool
			}{{keepFor - time.Minute, true}, {keepFor + time.Minute, false}} {
				fs := flights{all: make(map[flightID]*flight)}
				f := &flight{id: flightID{tenant: tenants.DefaultID, key: "key", call: "call"}, call: &call{start: time.Now()}, done: make(chan struct{})}
				fs.begin(f, reply.New(nil, reply.JSON, reply.Options{}))
				f.end(api.Record{Status: api.Success})
				fs.end(f)
				f.ended = f.ended.Add(-tt.age)
				if got := kept(&fs, f.id); got != tt.want {
					t.Errorf("after %v: kept is %v", tt.age, got)
				}
			}
		})
	}
}
