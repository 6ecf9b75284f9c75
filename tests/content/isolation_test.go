package content_test

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"handler/function/tests/stack"
)

// TestEntitlements asks for what nobody is granted.
func TestEntitlements(t *testing.T) {
	ctx, _, f := start(t, stack.FunctionConfig{})
	for _, tt := range []struct{ name, step, says string }{
		{"insecure", "RUN --security=insecure echo it ran", "security.insecure"},
		{"host network", "RUN --network=host echo it ran", "network.host"},
		{"device", "RUN --device=name=vendor.com/device=all,required=true echo it ran", "device"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := f.MustFail(t, ctx, body(t, config{"skipPush": true}, nil, entry{name: "Dockerfile", text: "FROM busybox\n" + tt.step + "\n"}), "build_failed")
			if !strings.Contains(r.Error, tt.says) {
				t.Errorf("the error does not say %s: %s", tt.says, r.Error)
			}
			if lines := printed(r.Log); len(lines) > 0 {
				t.Errorf("the step printed %q", lines)
			}
		})
	}
}

// TestForeignFrontend names a frontend image on a registry that counts who asks
// for it. The line is not followed, and a warning says so.
func TestForeignFrontend(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	var asked atomic.Int64
	canary := httptest.NewUnstartedServer(http.NotFoundHandler())
	canary.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			asked.Add(1)
		}
	}
	canary.Start()
	defer canary.Close()
	image := strings.TrimPrefix(canary.URL, "http://") + "/evil/frontend:1"
	// A stranger's Dockerfile can hide the line behind others, or in JSON.
	for i, dockerfile := range []string{
		"# syntax=" + image + "\nFROM busybox\nRUN echo built %d\n",
		"#syntax = " + image + "\nFROM busybox\nRUN echo built %d\n",
		"# escape=\\\n# SYNTAX=" + image + "\nFROM busybox\nRUN echo built %d\n",
		"#!/usr/bin/env evil\n# syntax=" + image + "\nFROM busybox\nRUN echo built %d\n",
		"# check=skip=all\n# syntax=" + image + "\nFROM busybox\nRUN echo built %d\n",
		"\ufeff# syntax=" + image + "\nFROM busybox\nRUN echo built %d\n",
	} {
		dockerfile = fmt.Sprintf(dockerfile, i)
		for _, c := range []config{{"skipPush": true}, {"image": s.Registry.Image("frontend:latest"), "noCache": true}} {
			built := f.MustBuild(t, ctx, body(t, c, nil, entry{name: "Dockerfile", text: dockerfile}))
			if warnings := strings.Join(built.Warnings, "\n"); !strings.Contains(warnings, "syntax="+image) {
				t.Errorf("%q: no warning says that the line is not followed: %q", dockerfile, warnings)
			}
		}
	}
	if n := asked.Load(); n > 0 {
		t.Errorf("the frontend's registry was asked %d times", n)
	}
	// That the canary sings: a base image from there is asked for.
	if _, err := f.Post(ctx, body(t, config{"skipPush": true}, nil, entry{name: "Dockerfile", text: "FROM " + image + "\n"})); err != nil {
		t.Fatal(err)
	}
	if asked.Load() == 0 {
		t.Error("not even FROM reached the registry")
	}
}
