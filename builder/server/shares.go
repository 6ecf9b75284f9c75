package server

import (
	"sync"

	"handler/function/api"
	"handler/function/budget"
	"handler/function/payload"
)

// shares are what tenants have of the memory and the disk for bodies whose signature has
// passed. With a file of tenants, the bodies of one tenant's waiting and running builds take at
// most half of each. Without a file, the only tenant has all. Before the signature has passed,
// the tenant is not known, and has no share.
type shares struct {
	memory, disk         *budget.Budget
	halfMemory, halfDisk int64

	mu  sync.Mutex
	all map[string]*share // of tenants that have a body here, by the tenant's id
}

// share is what one tenant has, or what all have together.
type share struct {
	memory, disk *budget.Budget
	bodies       int // guarded by shares.mu
}

func newShares(memory, disk int64) *shares {
	return &shares{
		memory: budget.New(memory), disk: budget.New(disk), halfMemory: memory / 2, halfDisk: disk / 2,
		all: make(map[string]*share),
	}
}

// enter returns the share for one body of a signer. The caller must call leave once the body is
// closed.
func (s *shares) enter(by signer) (sh *share, leave func()) {
	if !by.file() {
		return &share{memory: s.memory, disk: s.disk}, func() {}
	}
	id := by.id()
	s.mu.Lock()
	defer s.mu.Unlock()
	sh = s.all[id]
	if sh == nil {
		sh = &share{memory: s.memory.Part(s.halfMemory), disk: s.disk.Part(s.halfDisk)}
		s.all[id] = sh
	}
	sh.bodies++
	return sh, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if sh.bodies--; sh.bodies == 0 {
			delete(s.all, id)
		}
	}
}

var errShareSpent = &api.Error{
	Code: api.TenantBusy,
	Msg:  "no room is left for the body: others of the tenant take all that one tenant may have (half of max_spool_bytes)",
}

// busy returns errShareSpent in place of ErrNoRoom if it is the tenant's share that is spent,
// and not the disk. Any other err stays.
func (s *shares) busy(err error, of *share) error {
	if err != nil && api.AsError(err) == payload.ErrNoRoom && of.disk != s.disk && of.disk.Left() < s.disk.Left() {
		return errShareSpent
	}
	return err
}
