package jetstream

import "testing"

// TestClaimAll: after a process was cut off, a lost record of its build does not count, whether it was
// stored before or is stored later.
func TestClaimAll(t *testing.T) {
	b := &build{wake: make(chan struct{}, 1)}
	s := &Store{builds: map[name][]*build{{}: {b}}}
	b.store = s
	run := b.record()
	mark := run // another process found the build lost by this record
	if settle(&mark, &run) != &mark {
		t.Error("a lost record does not count")
	}
	s.claimAll()
	run = b.record()
	if settle(&mark, &run) != &run {
		t.Errorf("a lost record of turn %d counts at turn %d", mark.Turn, run.Turn)
	}
	if !b.dirty || len(b.wake) == 0 {
		t.Error("the running record is not stored again")
	}
}
