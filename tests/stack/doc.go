// Package stack runs the function builder against real daemons: buildkitd with
// runc behind mTLS and a distribution registry, built from the modules under
// tests/tools, and the function as the template compiles it.
//
// Nothing of a stack outlives it. All that it writes is in one directory,
// buildkitd and its steps share a process and a mount namespace that end
// together, and both end with the process that started them. If that process is
// killed, the next stack removes the directory and what is mounted there. What is
// costly to make, daemons and base images, is kept in the repository's .cache.
//
// Base images cannot be had everywhere. The registry therefore serves stand-ins
// made of the machine's own busybox, Go tree and CA certificates, and buildkitd
// has it as a mirror for docker.io and ghcr.io; whatever has no stand-in is
// pulled from the real registry.
//
// A package of end-to-end tests shares one stack, and each test has a function
// of its own on it:
//
//	func TestMain(m *testing.M) { stack.Main(m) }
//
//	func TestBuild(t *testing.T) {
//		s, f := stack.Test(t, stack.FunctionConfig{Env: map[string]string{"max_builds": "1"}})
//		ref := s.Registry.Image("hello:latest")
//		body := stack.Body(t, map[string]string{"image": ref}, map[string]string{
//			"Dockerfile": "FROM busybox\nCOPY greeting /\nCMD [\"cat\", \"/greeting\"]\n",
//			"greeting":   "hello\n",
//		})
//		f.MustBuild(t, t.Context(), body)
//		c, err := s.Run(t.Context(), stack.MustPull(t, t.Context(), ref), stack.RunConfig{})
//		if err != nil {
//			t.Fatal(err)
//		}
//		if out, err := c.Output(t.Context()); err != nil || out != "hello\n" {
//			t.Errorf("the image printed %q, %v", out, err)
//		}
//	}
//
// A test that stops or freezes a daemon starts one for itself with NewBuildkitd
// or NewRegistry, and leaves the shared ones alone.
package stack
