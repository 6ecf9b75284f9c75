package tenants

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
)

const (
	// poll is how often a Directory looks at the files. It takes a change when two looks in a
	// row find the same, so that a file that is being written is not taken by half. With the
	// 0.3 s that 1,000 tenants take to read, a change counts after 1.1 s at most.
	poll = 400 * time.Millisecond
	// settled is the age that a file's time must have to tell whether the file has changed.
	// File systems count time in steps of 2 s at most.
	settled = 3 * time.Second
	// maxLogged bounds how many different problems are remembered.
	maxLogged = 1000
)

// Config of a Directory.
type Config struct {
	// Files are the paths of the files. With Needed, a file that is missing is an error.
	// Without it, an installation that starts without any file has one tenant, until a right
	// file appears.
	Files  []string
	Needed bool

	PayloadSecret func() ([]byte, error)
	AllowedImages []string // as in Installation
	Daemons       []string // as in Installation

	Log zerolog.Logger
}

// Directory follows the files. It takes the files whole or not at all. The last Set that was
// read without a problem stays in force, whatever becomes of the files.
type Directory struct {
	cfg   Config
	state atomic.Pointer[state]

	// mu is held while a Set comes into force and the funcs are called with it. So a func that
	// is registered meanwhile is called once with each Set.
	mu            sync.Mutex
	before, after []func(*Set)

	// The rest is for the goroutine that looks.
	needed bool
	last   glance
	judged [sha256.Size]byte // of what state is of
	seen   [sha256.Size]byte // of what the last look found
	logged map[string]bool   // problems since the files were right
}

// state is what is in force. With a nil set and no err, there is one tenant. With an err,
// nobody may build.
type state struct {
	set   *Set
	err   *api.Error // there has been no good file since the start
	wrong bool       // with the files as they are now
}

// glance holds the signs of a change that can be seen without reading the files.
type glance struct {
	infos  []os.FileInfo // nil where there is no file
	secret [sha256.Size]byte
	at     time.Time
}

// Open reads the files. Run follows their changes.
func Open(cfg Config) *Directory {
	d := &Directory{cfg: cfg, needed: cfg.Needed, logged: make(map[string]bool)}
	found := d.read()
	d.judged, d.seen = found.sum, found.sum
	d.state.Store(&state{})
	if d.needed || found.missing < len(found.files) {
		// Nobody is let in before the files are right.
		d.state.Store(&state{err: errUnread, wrong: true})
	}
	d.judge(found)
	return d
}

// Run looks at the files until ctx ends.
func (d *Directory) Run(ctx context.Context) {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			d.look()
		}
	}
}

// Current returns the tenants that are in force. If there is no file, and so one tenant, it
// returns nil and no error. Until the files have been read once without a problem, it returns
// an *api.Error.
func (d *Directory) Current() (*Set, error) {
	s := d.state.Load()
	if s.err != nil {
		return nil, s.err
	}
	return s.set, nil
}

// Stale says whether something is wrong with the files, so that they are not in force.
func (d *Directory) Stale() bool { return d.state.Load().wrong }

// BeforeChange calls f with each Set before Current returns it, and with the Set that is in
// force now, if there is one. f must not call a method of d.
func (d *Directory) BeforeChange(f func(*Set)) { d.register(&d.before, f) }

// OnChange calls f with each Set once Current returns it, and with the Set that is in force
// now, if there is one. f must not call OnChange or BeforeChange.
func (d *Directory) OnChange(f func(*Set)) { d.register(&d.after, f) }

func (d *Directory) register(list *[]func(*Set), f func(*Set)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	*list = append(*list, f)
	if s := d.state.Load(); s.set != nil {
		f(s.set)
	}
}

// look reads the files if they may have changed. It judges what it finds if the look before
// found the same.
func (d *Directory) look() {
	now := d.glance()
	if d.seen == d.judged && d.last.still(now) {
		return
	}
	found := d.read()
	if found.sum != d.judged && found.sum == d.seen {
		d.judged = found.sum
		d.judge(found)
	}
	d.seen = found.sum
}

// glance asks for the files' times. It treats a file that it cannot stat as missing: read says
// what is wrong.
func (d *Directory) glance() glance {
	g := glance{at: time.Now()}
	for _, path := range d.cfg.Files {
		info, err := os.Stat(path)
		if err != nil {
			info = nil
		}
		g.infos = append(g.infos, info)
	}
	secret, err := d.cfg.PayloadSecret()
	g.secret = sha256.Sum256(fmt.Appendf(secret, "%v", err))
	return g
}

// still says whether the files are as they were at g.
func (g glance) still(now glance) bool {
	return g.secret == now.secret && slices.EqualFunc(g.infos, now.infos, func(a, b os.FileInfo) bool {
		if a == nil || b == nil {
			return a == nil && b == nil
		}
		return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime()) && g.at.Sub(a.ModTime()) > settled
	})
}

// found is what the files hold.
type found struct {
	files   []File
	missing int // of them, counted in errs too
	errs    []error
	secret  []byte
	sum     [sha256.Size]byte
}

// read reads the files. It notes their times before, so that a later change is noticed.
func (d *Directory) read() found {
	d.last = d.glance()
	var f found
	sum := sha256.New()
	for _, path := range d.cfg.Files {
		name := filepath.Base(path)
		data, err := readFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			f.missing++
			err = errors.New("there is no such file")
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", name, err)
			f.errs = append(f.errs, err)
		}
		f.files = append(f.files, File{name, data})
		fmt.Fprintf(sum, "%d %v ", len(data), err)
		sum.Write(data)
	}
	secret, err := d.cfg.PayloadSecret()
	if err != nil {
		f.errs = append(f.errs, fmt.Errorf("reading the payload secret: %w", err))
	}
	f.secret = secret
	fmt.Fprintf(sum, "%d %v ", len(secret), err)
	sum.Write(secret)
	sum.Sum(f.sum[:0])
	return f
}

// readFile reads a file of maxFile bytes. Of a larger one it reads a byte more.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxFile+1))
}

// judge takes what was found, or says what is wrong with it.
func (d *Directory) judge(f found) {
	if !d.needed && f.missing == len(f.files) {
		return
	}
	d.needed = true
	err := errors.Join(f.errs...)
	var set *Set
	if err == nil {
		set, err = Read(f.files, Installation{PayloadSecret: f.secret, AllowedImages: d.cfg.AllowedImages, Daemons: d.cfg.Daemons})
	}
	if err != nil {
		d.refuse(err)
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range d.before {
		f(set)
	}
	d.state.Store(&state{set: set})
	clear(d.logged)
	d.cfg.Log.Info().Int("tenants", len(set.Tenants)).Int("keys", set.keys).Msg("the tenants have been read")
	for _, f := range d.after {
		f(set)
	}
}

// refuse changes nothing that is in force. It logs a problem once, and again only if the files
// have been right since.
func (d *Directory) refuse(err error) {
	now := *d.state.Load()
	now.wrong = true
	d.state.Store(&now)
	msg := "the tenants cannot be read: what was in force before stays"
	if now.err != nil {
		msg = "the tenants cannot be read: nobody can build"
	}
	list := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		list = joined.Unwrap()
	}
	for _, problem := range list {
		if text := problem.Error(); !d.logged[text] {
			if len(d.logged) >= maxLogged {
				clear(d.logged)
			}
			d.logged[text] = true
			d.cfg.Log.Error().Err(problem).Msg(msg)
		}
	}
}

// errUnread is what /ready says until the files have been read without a problem.
var errUnread = &api.Error{Code: api.NotReady, Msg: "the tenants cannot be read; the log says why", Err: errors.New("no tenants")}
