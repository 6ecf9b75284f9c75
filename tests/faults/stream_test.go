package faults

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestEndings ends builds in every way there is. Each answer must end with one
// verdict, in every form.
func TestEndings(t *testing.T) {
	t.Parallel()
	s := stack.Shared(t)
	closed, err := s.NewRegistry(testContext(t), htpasswd(t, "user", "password"))
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		env        map[string]string
		own        bool     // a daemon of its own
		linked     bool     // the function reaches it by way
		image      string   // a repository to push to; MARK is the tag
		dockerfile []string // MARK is the build's own
		meanwhile  func(t *testing.T, f *stack.Function, b *stack.Buildkitd, way *stack.Link, mark string)
		code       string
		texts      []string
		within     time.Duration
	}{
		"success": {
			image:      s.Registry.Image("endings"),
			dockerfile: []string{"FROM busybox", "RUN echo MARK"},
		},
		"RUN fails": {
			dockerfile: []string{"FROM busybox", "RUN echo MARK && exit 7"},
			code:       "build_failed",
			texts:      []string{"exit code 7", "RUN echo mark-", "Dockerfile:2", ">>>"},
		},
		"no Dockerfile": {
			code:  "build_failed",
			texts: []string{"Dockerfile", "no such file"},
		},
		"bad Dockerfile": {
			dockerfile: []string{"FROM busybox", "RUNN MARK"},
			code:       "build_failed",
			texts:      []string{"unknown instruction: RUNN"},
		},
		"push denied": {
			image:      closed.Image("endings"),
			dockerfile: []string{"FROM busybox", "RUN echo MARK"},
			code:       "registry_denied",
			texts:      []string{closed.Addr, "no credentials are configured"},
		},
		"deadline": {
			env:        map[string]string{"build_timeout": "20s"},
			dockerfile: []string{"FROM busybox", "RUN sleep 300; : MARK"},
			meanwhile: func(t *testing.T, f *stack.Function, b *stack.Buildkitd, _ *stack.Link, mark string) {
				b.WaitStep(t, mark)
			},
			code:   "deadline",
			texts:  []string{"20s", "RUN sleep 300"},
			within: 25 * time.Second,
		},
		"buildkitd killed for good": {
			own:        true,
			dockerfile: []string{"FROM busybox", "RUN sleep 300; : MARK"},
			meanwhile: func(t *testing.T, f *stack.Function, b *stack.Buildkitd, _ *stack.Link, mark string) {
				b.WaitStep(t, mark)
				b.Kill()
			},
			code:   "no_daemon",
			within: 20 * time.Second,
		},
		"buildkitd killed twice": {
			own:        true,
			linked:     true,
			dockerfile: []string{"FROM busybox", "RUN sleep 300; : MARK"},
			meanwhile: func(t *testing.T, f *stack.Function, b *stack.Buildkitd, way *stack.Link, mark string) {
				// The second runs before the first is killed: a daemon that starts may take
				// longer than the function waits for one.
				next := newBuildkitd(t, stack.BuildkitdConfig{})
				b.WaitStep(t, mark)
				way.Lead(host(next))
				b.Kill()
				next.WaitStep(t, mark)
				next.Kill()
			},
			code:   "daemon_lost",
			within: 30 * time.Second,
		},
		"SIGTERM": {
			env:        map[string]string{"shutdown_timeout": "2s"},
			dockerfile: []string{"FROM busybox", "RUN sleep 300; : MARK"},
			meanwhile: func(t *testing.T, f *stack.Function, b *stack.Buildkitd, _ *stack.Link, mark string) {
				b.WaitStep(t, mark)
				if err := f.Signal(syscall.SIGTERM); err != nil {
					t.Error(err)
				}
			},
			code:   "shutting_down",
			within: 10 * time.Second,
		},
		// No line of a stream may be longer than maxLine, whatever is in it: one
		// line of 300 KB, characters that take more in JSON, an error that quotes
		// a Dockerfile of long lines.
		"long lines": {
			dockerfile: []string{"FROM busybox",
				`RUN : MARK; head -c 300000 /dev/zero | tr '\0' '"'; echo; head -c 100000 /dev/zero | tr '\0' '\001'; echo; head -c 100000 /dev/zero | tr '\0' '\377'; echo`,
				"RUN : " + strings.Repeat(strings.Repeat(`\"`, 10<<10)+"\\\n", 5) + "; exit 1"},
			code:  "build_failed",
			texts: []string{"exit code 1", "bytes cut"},
		},
	} {
		for _, form := range []string{client.NDJSON, client.SSE, jsonForm} {
			t.Run(name+"/"+forms[form], func(t *testing.T) {
				t.Parallel()
				var own *stack.Buildkitd
				if test.own {
					own = newBuildkitd(t, stack.BuildkitdConfig{})
				}
				env := test.env
				var way *stack.Link
				if test.linked {
					var addr string
					way, addr = link(t, own)
					env = map[string]string{"buildkit_addr": addr}
				}
				_, b, f := start(t, stack.FunctionConfig{Env: env, Buildkitd: own})
				m := mark()
				config := local()
				if test.image != "" {
					config = &builder.BuildConfig{Image: test.image + ":" + m}
				}
				files := map[string]string{"other": "file"}
				if test.dockerfile != nil {
					files["Dockerfile"] = strings.ReplaceAll(strings.Join(test.dockerfile, "\n")+"\n", "MARK", m)
				}
				body := stack.Body(t, config, files)
				wait := background(t, f, body, form)
				began := time.Now()
				if test.meanwhile != nil {
					test.meanwhile(t, f, b, way, m)
				}
				a := wait()
				if took := time.Since(began); test.within > 0 && took > patience(test.within) {
					t.Errorf("took %v, want %v at most", took, patience(test.within))
				}
				if test.code == "" {
					a.WantSuccess(t)
					if a.Digest == "" || a.Digest != digest(t, config.Image) {
						t.Errorf("the digest is %q, the registry's %q", a.Digest, digest(t, config.Image))
					}
				} else {
					a.WantFailed(t, test.code, test.texts...)
				}
				if a.Image != config.Image || a.ImageName != config.Image {
					t.Errorf("the answer names %q and %q, want %q", a.Image, a.ImageName, config.Image)
				}
				waitGone(t, b, m, 2*time.Second)
			})
		}
	}
}
