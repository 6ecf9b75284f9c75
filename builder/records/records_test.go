package records_test

import (
	"testing"
	"testing/synctest"
	"time"

	"handler/function/api"
	"handler/function/records"
)

// TestChange changes all that a record has. What the store decides stays.
func TestChange(t *testing.T) {
	r := records.Record{Tenant: "acme", ID: "id", Attempt: 2, Status: api.InProgress, Lines: 3, CanceledBy: "k1"}
	r.Change(func(r *records.Record) {
		*r = records.Record{Tenant: "other", ID: "x", Attempt: 9, Status: api.Success, Lines: 9, CanceledBy: "k2", Image: "app", Daemon: "tcp://one:1234", Building: true}
	})
	if r.Tenant != "acme" || r.ID != "id" || r.Attempt != 2 || r.Status != api.InProgress || r.Lines != 3 || r.CanceledBy != "k1" || r.Image != "app" || r.Daemon != "tcp://one:1234" || !r.Building {
		t.Errorf("it became %+v", r)
	}
}

// TestUsed: a value works once, for as long as a signature with it is valid, and no value works always.
func TestUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		used := make(records.Used)
		for i, want := range []bool{true, false, false} {
			if got := used.Use("x"); got != want || !used.Use("") {
				t.Errorf("use %d: %v", i, got)
			}
			time.Sleep(5 * time.Minute)
		}
		if !used.Use("y") {
			t.Error("another value was used")
		}
		if time.Sleep(10 * time.Minute); !used.Use("z") || len(used) != 2 {
			t.Errorf("%d values are remembered", len(used))
		}
	})
}
