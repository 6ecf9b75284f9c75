package server

import (
	"context"

	"handler/function/records"
	"handler/function/solve"
)

// Became completes the record of a build whose replica has died: it has a digest if the build has
// pushed one. The credentials are those that the tenant has now. It is a jetstream.Options.Ask.
func (s *Server) Became(ctx context.Context, r records.Record) records.Record {
	if r.Ref == "" || r.Image == "" {
		return r // no daemon had it, or there is no image to push
	}
	t, ok := s.ownerOf(r)
	if !ok {
		return r
	}
	digest, err := s.Solver.Pushed(ctx, t, r.Daemon, r.Ref, r.Image)
	switch {
	case err != nil:
		s.Log.Warn().AnErr("cause", err).Str("call_id", r.ID).Str("image", r.Image).Str("daemon", r.Daemon).Msg("lost build not looked up")
	case digest != "":
		r.Digest = digest
		r.Error += ", after the image had been pushed"
	}
	return r
}

// ownerOf is the tenant of a record, as the Solver needs to know it to ask what became of a build: nil
// without a file of tenants. ok is false if the file does not have the tenant any more.
func (s *Server) ownerOf(r records.Record) (t *solve.Tenant, ok bool) {
	set, err := s.fileOfTenants()
	if err != nil {
		return nil, false
	}
	if set == nil {
		return nil, true
	}
	owner := set.ByID(r.Tenant)
	if owner == nil {
		return nil, false
	}
	return s.solveTenant(signer{roster: roster{set: set}, tenant: owner}), true
}
