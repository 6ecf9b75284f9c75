package server

import (
	"context"

	"handler/function/fair"
	"handler/function/tenants"
)

// Uploading returns how many upload slots are taken.
func (s *Server) Uploading() int {
	s.intake.mu.Lock()
	defer s.intake.mu.Unlock()
	return s.intake.limits.uploads - s.intake.free
}

// Shares returns how many tenants have a share of the memory and the disk.
func (s *Server) Shares() int {
	s.shares.mu.Lock()
	defer s.shares.mu.Unlock()
	return len(s.shares.all)
}

// Working is working.
func (s *Server) Working(tenant string, cancel context.CancelCauseFunc) (end func()) {
	return s.working(tenant, cancel)
}

// Owner is whose builds a key of the payload secret has, without a file of tenants.
func Owner(key []byte) string {
	return signer{key: tenants.Key{Secret: key}}.owner()
}

// ContextSlots are the slots for contexts on their way to the registry.
func (s *Server) ContextSlots() *fair.Slots { return s.contextSlots }
