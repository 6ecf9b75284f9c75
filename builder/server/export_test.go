package server

// Uploading returns how many upload slots are taken.
func (s *Server) Uploading() int {
	s.intake.mu.Lock()
	defer s.intake.mu.Unlock()
	return s.intake.limits.uploads - s.intake.free
}
