package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"github.com/docker/cli/cli/config/types"
	"github.com/docker/docker-credential-helpers/client"
	"github.com/docker/docker-credential-helpers/credentials"
)

const (
	helperTimeout = 10 * time.Second
	maxHelperOut  = 1 << 20 // bytes

	// identityUser stands in a helper's answer for an identity token.
	identityUser = "<token>"
)

// askHelper runs docker-credential-<suffix> for server. That it has nothing is
// no error. What a helper prints stays out of errors: it may be a secret.
func (c *Credentials) askHelper(ctx context.Context, suffix, server string) (types.AuthConfig, error) {
	if suffix != strings.TrimSpace(suffix) || strings.ContainsAny(suffix, `/\`) {
		return types.AuthConfig{}, fmt.Errorf("credential helper %q: not a name", suffix)
	}
	ctx, cancel := context.WithTimeout(ctx, c.helperTimeout)
	defer cancel()
	var h *helper
	creds, err := client.Get(func(args ...string) client.Program {
		h = &helper{cmd: exec.CommandContext(ctx, "docker-credential-"+suffix, args...)}
		return h
	}, server)
	switch {
	case credentials.IsErrCredentialsNotFound(err):
		return types.AuthConfig{}, nil
	case ctx.Err() != nil:
		return types.AuthConfig{}, fmt.Errorf("credential helper %q: no answer within %v", suffix, c.helperTimeout)
	case h.err != nil:
		return types.AuthConfig{}, fmt.Errorf("credential helper %q: %w", suffix, h.err)
	case err != nil:
		return types.AuthConfig{}, fmt.Errorf("credential helper %q: answer is not what a helper says", suffix)
	}
	if creds.Username == identityUser {
		return types.AuthConfig{IdentityToken: creds.Secret, ServerAddress: server}, nil
	}
	return types.AuthConfig{Username: creds.Username, Password: creds.Secret, ServerAddress: server}, nil
}

// helper is a client.Program that ends with its context.
type helper struct {
	cmd *exec.Cmd
	err error
}

func (h *helper) Input(in io.Reader) { h.cmd.Stdin = in }

func (h *helper) Output() ([]byte, error) {
	out := &limitedBuffer{left: maxHelperOut}
	h.cmd.Stdout = out
	// A child of the helper may hold its pipes open for longer.
	h.cmd.WaitDelay = time.Second
	h.err = h.cmd.Run()
	if out.left < 0 {
		h.err = errHelperOut
	}
	return out.buf.Bytes(), h.err
}

var errHelperOut = errors.New("it prints too much")

// limitedBuffer fails, and has left below zero, once more is written than it
// takes.
type limitedBuffer struct {
	buf  bytes.Buffer
	left int
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if b.left -= len(p); b.left < 0 {
		return 0, errHelperOut
	}
	return b.buf.Write(p)
}
