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

	"handler/function/api"
	"handler/function/clouds"
)

const (
	helperTimeout = 10 * time.Second
	maxHelperOut  = 1 << 20 // bytes

	// identityUser is the user name in a helper's answer whose secret is an identity
	// token.
	identityUser = "<token>"
)

// askHelper asks the helper named suffix for the credentials of server. It is no error if
// there are none. The helpers of the clouds are part of this program, even if PATH has
// programs of their names.
func (c *Credentials) askHelper(ctx context.Context, suffix, server string) (found, error) {
	if clouds.Has(suffix) {
		return c.askCloud(ctx, suffix, server)
	}
	auth, err := c.runHelper(ctx, suffix, server)
	return found{auth: auth}, err
}

// askCloud asks a cloud's helper. Its errors name the helper and the host.
func (c *Credentials) askCloud(ctx context.Context, name, host string) (found, error) {
	creds, err := c.clouds.Get(ctx, name, host)
	if err != nil {
		return found{}, cloudError(ctx, err, host, fmt.Sprintf("credential helper %q", name))
	}
	return found{
		auth: types.AuthConfig{
			Username: creds.Username, Password: creds.Password, IdentityToken: creds.RefreshToken, ServerAddress: host,
		},
		renew: creds.Renew,
	}, nil
}

// cloudError makes a cloud's error one for the client, who may know what failed but not
// why.
func cloudError(ctx context.Context, err error, host, what string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	e := &api.Error{Code: api.RegistryFailed, Err: err}
	why := "failed"
	switch {
	case errors.Is(err, clouds.ErrRefused):
		e.Code = api.RegistryDenied
		why = "was refused by the cloud"
	case errors.Is(err, context.DeadlineExceeded):
		why = "had no answer in time"
	}
	e.Msg = fmt.Sprintf("registry %s: %s %s; the builder's log has the cause", host, what, why)
	return e
}

// runHelper runs docker-credential-<suffix>. Its errors quote nothing of the program's
// output, which may be a secret.
func (c *Credentials) runHelper(ctx context.Context, suffix, server string) (types.AuthConfig, error) {
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
		return types.AuthConfig{}, fmt.Errorf("credential helper %q: its answer is not a user name and a secret", suffix)
	}
	if creds.Username == identityUser {
		return types.AuthConfig{IdentityToken: creds.Secret, ServerAddress: server}, nil
	}
	return types.AuthConfig{Username: creds.Username, Password: creds.Secret, ServerAddress: server}, nil
}

// helper is a client.Program that ends with its context.
type helper struct {
	cmd *exec.Cmd
	err error // of running it; the client's own error would quote the output
}

func (h *helper) Input(in io.Reader) { h.cmd.Stdin = in }

func (h *helper) Output() ([]byte, error) {
	out := &limitedBuffer{left: maxHelperOut}
	h.cmd.Stdout = out
	// A child of the helper may keep its pipes open for longer.
	h.cmd.WaitDelay = time.Second
	h.err = h.cmd.Run()
	if out.left < 0 {
		h.err = errHelperOut
	}
	return out.buf.Bytes(), h.err
}

var errHelperOut = errors.New("its answer is too long")

// limitedBuffer takes left bytes. A Write beyond them fails and makes left negative.
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
