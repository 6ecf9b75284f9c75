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
	"strconv"
	"strings"
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
	InMemory  bool            // have daemons and registries store in memory, if there is enough
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

	log     io.Writer
	race    bool
	lock    *os.File
	storage string // directory of what daemons and registries store

	closing  sync.Mutex // while Close runs
	mu       sync.Mutex // of closers and closed
	closers  []func()
	closed   bool
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
	if err := s.makeDir(c.InMemory); err != nil {
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

// Close ends everything that the stack started and removes its directory. A second call waits for
// the first. What is started while Close runs is ended at once.
func (s *Stack) Close() error {
	s.closing.Lock()
	defer s.closing.Unlock()
	s.mu.Lock()
	closers := s.closers
	s.closers, s.closed = nil, true
	s.mu.Unlock()
	for i := len(closers) - 1; i >= 0; i-- {
		closers[i]()
	}
	err := removeDir(s.Dir)
	s.lock.Close()
	return err
}

// onClose registers what Close calls, last come first.
func (s *Stack) onClose(f func()) {
	s.mu.Lock()
	closed := s.closed
	if !closed {
		s.closers = append(s.closers, f)
	}
	s.mu.Unlock()
	if closed {
		f()
	}
}

const (
	dirPrefix  = "function-builder-"
	storageDir = "storage" // in a stack's directory: what daemons and registries store
)

// makeDir makes the stack's directory, and removes those of stacks that were
// killed before they could: a directory whose lock is free has no owner.
func (s *Stack) makeDir(inMemory bool) error {
	// Not /tmp: that is memory on many systems, and an image that runs may take gigabytes.
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
			if err := removeDir(dir); err != nil {
				fmt.Fprintln(s.log, "removing what a killed stack left:", err)
			}
			lock.Close()
		}
	}
	if s.Dir, err = os.MkdirTemp(parent, dirPrefix); err != nil {
		return err
	}
	if s.lock, err = lockDir(s.Dir); err != nil {
		os.Remove(s.Dir)
		return err
	}
	s.storage = filepath.Join(s.Dir, storageDir)
	if err := os.Mkdir(s.storage, 0o755); err != nil {
		os.Remove(s.Dir)
		s.lock.Close()
		return err
	}
	if inMemory {
		if err := mountMemory(s.storage); err != nil {
			fmt.Fprintln(s.log, "storing on the disk:", err)
		}
	}
	return nil
}

// A stack stores storageSize in memory at most; the largest package of tests stores 1.3 GiB. Where
// enoughMemory is available, four stacks have room: three packages run at a time, and one of
// them starts a second stack.
const (
	storageSize  = 3 << 30
	enoughMemory = 4 * storageSize
)

// mountMemory mounts a tmpfs on dir, if the machine has enough memory. buildkitd waits for the disk
// dozens of times in a build. A tmpfs has nothing to wait for.
func mountMemory(dir string) error {
	if enough, err := EnoughMemory(); err != nil || !enough {
		return err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprint("mode=0755,size=", storageSize)); err != nil {
		return fmt.Errorf("mounting a tmpfs on %s: %w", dir, err)
	}
	return nil
}

// EnoughMemory says whether a stack of Config.InMemory that starts now stores in memory.
func EnoughMemory() (bool, error) {
	available, err := availableMemory()
	return available >= enoughMemory, err
}

// availableMemory is the bytes that this machine can give to programs, or the limit of the
// container that this process is in, if it is lower.
func availableMemory() (available int64, err error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(text), "\nMemAvailable:")
	if _, err := fmt.Sscanf(after, "%d kB", &available); err != nil {
		return 0, fmt.Errorf("reading MemAvailable in /proc/meminfo: %w", err)
	}
	available <<= 10
	for _, file := range []string{filepath.Join(cgroupRoot, "memory.max"), filepath.Join(memoryCgroupRoot, "memory.limit_in_bytes")} {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // another version, or no container
		}
		if limit, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil { // or max
			available = min(available, limit)
		}
	}
	return available, nil
}

// removeDir unmounts and removes a stack's directory. A daemon of another stack that started later
// has the mount in its own namespace too. The kernel unmounts it there when the directory is removed.
func removeDir(dir string) error {
	storage := filepath.Join(dir, storageDir)
	err := unix.Unmount(storage, unix.MNT_DETACH)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // not mounted
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("unmounting %s: %w", storage, err)
	}
	return errors.Join(err, os.RemoveAll(dir))
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
