package server

// Receiving is how many bodies are being received.
func (s *Server) Receiving() int { return len(s.uploads) }
