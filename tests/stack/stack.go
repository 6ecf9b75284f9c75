package stack

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"github.com/openfaas/go-sdk/seal"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Config says how a stack differs from the usual one, which is its zero value.
type Config struct {
	Log       io.Writer       // what the stack is doing, a line a step; nil discards it
	RealBases bool            // no stand-ins for base images: pull the real ones
	Race      bool            // build the function with the race detector
	Buildkitd BuildkitdConfig // for the stack's first daemon
}

// Stack is a running registry and buildkitd. Its functions are started with
// Function.
type Stack struct {
	Repo  string // the repository's root
	Dir   string // everything that the stack writes; removed by Close
	Certs string // what buildkit/certs.sh made: CA, daemon's and client's
	Tools Tools

	Registry  *Registry
	Buildkitd *Buildkitd
	// Standins are the references of the base images that the registry serves
	// in place of the real ones; nil with Config.RealBases.
	Standins []string

	PayloadSecret string // the key that signs requests
	PublicKey     []byte // seals build secrets, base64
	privateKey    []byte

	log  io.Writer
	race bool
	lock *os.File

	mu       sync.Mutex // of closers
	closers  []func()
	building sync.Mutex // while the function is compiled
}

// Start brings a stack up, ready to build. ctx bounds the start; the stack
// runs until Close, or until this process ends.
func Start(ctx context.Context, c Config) (_ *Stack, err error) {
	if c.Log == nil {
		c.Log = io.Discard
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("starting the stack: buildkitd and runc need root: run this with sudo -E")
	}
	repo, err := findRepo()
	if err != nil {
		return nil, err
	}
	s := &Stack{Repo: repo, log: c.Log, race: c.Race || builtWithRace(), PayloadSecret: rand32()}
	if s.PublicKey, s.privateKey, err = seal.GenerateKeyPair(); err != nil {
		return nil, err
	}
	if s.Tools, err = BuildTools(ctx, repo, c.Log); err != nil {
		return nil, err
	}
	if err := s.makeDir(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	s.Certs = filepath.Join(s.Dir, "certs")
	fmt.Fprintln(s.log, "making certificates")
	certs := exec.CommandContext(ctx, filepath.Join(repo, "buildkit", "certs.sh"), s.Certs)
	certs.Dir = s.Dir
	if out, err := certs.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("making certificates: %w\n%s", err, out)
	}

	fmt.Fprintln(s.log, "starting the registry and buildkitd")
	if s.Registry, err = s.NewRegistry(ctx, nil); err != nil {
		return nil, err
	}
	if !c.RealBases {
		if s.Standins, err = standinRefs(repo); err != nil {
			return nil, err
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		s.Buildkitd, err = s.NewBuildkitd(gctx, c.Buildkitd)
		return err
	})
	g.Go(func() error { return s.seed(gctx) })
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return s, nil
}

// Close ends everything that the stack started and removes its directory.
func (s *Stack) Close() error {
	s.mu.Lock()
	closers := s.closers
	s.closers = nil
	s.mu.Unlock()
	for i := len(closers) - 1; i >= 0; i-- {
		closers[i]()
	}
	err := os.RemoveAll(s.Dir)
	s.lock.Close()
	return err
}

// onClose registers what Close calls, last come first.
func (s *Stack) onClose(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closers = append(s.closers, f)
}

const dirPrefix = "function-builder-"

// makeDir makes the stack's directory, and removes those of stacks that were
// killed before they could: a directory whose lock is free has no owner.
func (s *Stack) makeDir() error {
	// Not /tmp: that is memory on many systems, and a build takes gigabytes.
	parent := os.Getenv("TMPDIR")
	if parent == "" {
		parent = "/var/tmp"
	}
	old, err := filepath.Glob(filepath.Join(parent, dirPrefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range old {
		if lock, err := lockDir(dir); err == nil {
			removeCgroups(filepath.Base(dir) + "-*")
			os.RemoveAll(dir)
			lock.Close()
		}
	}
	if s.Dir, err = os.MkdirTemp(parent, dirPrefix); err != nil {
		return err
	}
	s.lock, err = lockDir(s.Dir)
	return err
}

// lockDir takes the lock of a stack's directory, without waiting.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// rand32 returns 32 random bytes in base64, the form of faas-cli secret generate.
func rand32() string {
	b := make([]byte, 32)
	rand.Read(b)
	return base64.StdEncoding.EncodeToString(b)
}
