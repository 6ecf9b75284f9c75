package fair

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// bench has goroutines ask for slots, inside of a synctest bubble.
type bench struct {
	*Slots
	t    *testing.T
	mu   sync.Mutex
	got  []string // "tenant number" in the order in which they got a slot
	errs map[string]error
}

func newBench(t *testing.T, n int) *bench {
	return &bench{Slots: New(n), t: t, errs: make(map[string]error)}
}

// ask asks for a slot, and returns once it has one, is refused, or waits.
func (b *bench) ask(t Tenant, name string, wait time.Duration) (cancel context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(b.t.Context())
	go func() {
		err := b.Acquire(ctx, t, wait)
		b.mu.Lock()
		defer b.mu.Unlock()
		b.errs[name] = err
		if err == nil {
			b.got = append(b.got, name)
		}
	}()
	synctest.Wait()
	return cancel
}

// given returns who got a slot since the last call.
func (b *bench) given() []string {
	synctest.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	got := b.got
	b.got = nil
	return got
}

// err is how the call ended. ok is false while it waits.
func (b *bench) err(name string) (err error, ok bool) {
	synctest.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	err, ok = b.errs[name]
	return err, ok
}

func (b *bench) want(what string, want ...string) {
	b.t.Helper()
	if got := b.given(); !slices.Equal(got, want) {
		b.t.Errorf("%s: %q got a slot, want %q", what, got, want)
	}
}

func TestFirstComeFirstServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, only := newBench(t, 2), Tenant{ID: "only"}
		for i := range 4 {
			b.ask(only, fmt.Sprint(i), time.Hour)
		}
		b.want("the first two", "0", "1")
		b.Release("only")
		b.want("one ended", "2")
		if b.Try(only) {
			t.Error("a slot is taken past somebody who waits")
		}
		b.Release("only")
		b.Release("only")
		b.want("two ended", "3")
		if !b.Try(only) || b.Try(only) {
			t.Error("one slot is free")
		}
	})
}

// TestOneSlotAtMost has a hundred builds of one tenant wait, and then one of another. It gets
// the next slot.
func TestOneSlotAtMost(t *testing.T) {
	for _, slots := range []int{1, 2, 4} {
		synctest.Test(t, func(t *testing.T) {
			b, many, one := newBench(t, slots), Tenant{ID: "many"}, Tenant{ID: "one"}
			for i := range 100 {
				b.ask(many, fmt.Sprint("many ", i), time.Hour)
			}
			for range 30 {
				b.Release("many")
			}
			b.given()
			for i := range 3 {
				b.ask(one, fmt.Sprint("one ", i), time.Hour)
				b.Release("many")
				b.want(fmt.Sprintf("%d slots", slots), fmt.Sprint("one ", i))
				b.Release("one")
				b.given()
			}
			for b.Taken() > 0 {
				b.Release("many")
				synctest.Wait()
			}
			if len(b.tenants) > 0 {
				t.Errorf("%d tenants are known after the end", len(b.tenants))
			}
		})
	}
}

// TestThird has a third tenant come while two have the slots.
func TestThird(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, 2)
		for i := range 20 {
			b.ask(Tenant{ID: "a"}, fmt.Sprint("a", i), time.Hour)
		}
		b.ask(Tenant{ID: "b"}, "b", time.Hour)
		b.ask(Tenant{ID: "c"}, "c", time.Hour)
		b.given()
		b.Release("a")
		b.want("one slot", "b")
		b.Release("a")
		b.want("the next", "c")
	})
}

func TestWeights(t *testing.T) {
	for _, slots := range []int{1, 4, 8} {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t, slots)
			light, heavy := Tenant{ID: "light", Weight: 1}, Tenant{ID: "heavy", Weight: 3}
			for i := range 200 {
				b.ask(light, fmt.Sprint("light ", i), time.Hour)
				b.ask(heavy, fmt.Sprint("heavy ", i), time.Hour)
			}
			held, total := make(map[string]int), make(map[string]int)
			for range 160 {
				for _, name := range b.given() {
					var id string
					fmt.Sscan(name, &id)
					held[id]++
					total[id]++
				}
				// The tenant that is over its share of the slots ends a build.
				id := "light"
				if held["heavy"] > 3*held["light"] || held["light"] == 0 {
					id = "heavy"
				}
				held[id]--
				b.Release(id)
			}
			if slots > 1 {
				if held["heavy"]+held["light"] != slots-1 || held["light"] > slots/4 {
					t.Errorf("%d slots are held as %v", slots, held)
				}
				return
			}
			if total["heavy"] < 3*total["light"]-3 || total["heavy"] > 3*total["light"]+3 {
				t.Errorf("one slot was given to %v", total)
			}
		})
	}
}

func TestMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, few := newBench(t, 3), Tenant{ID: "few", Most: 1}
		b.ask(few, "few 0", time.Hour)
		b.ask(few, "few 1", time.Hour)
		b.ask(few, "at once", 0)
		b.ask(few, "not for long", time.Minute)
		b.ask(Tenant{ID: "other"}, "other", time.Hour)
		b.want("the few do not block the other", "few 0", "other")
		time.Sleep(2 * time.Minute)
		for _, name := range []string{"at once", "not for long"} {
			if err, _ := b.err(name); !errors.Is(err, ErrMost) {
				t.Errorf("%s: %v", name, err)
			}
		}
		b.Release("few")
		b.want("one of the few ended", "few 1")
		b.ask(few, "few 2", time.Hour)
		if few.Most = 2; b.Try(few) {
			t.Error("with a new limit, a slot is taken past somebody who waits")
		}
	})
}

// TestTooLate ends a wait at the moment at which its slot comes.
func TestTooLate(t *testing.T) {
	s, only, gone := New(1), Tenant{ID: "only"}, errors.New("gone")
	of, w, err := s.enter(only, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.leave(of, w, gone); err != gone || s.Taken() != 0 {
		t.Errorf("canceled: %v, with %d slots taken", err, s.Taken())
	}
	if of, w, err = s.enter(only, true); err != nil {
		t.Fatal(err)
	}
	if err := s.leave(of, w, nil); err != nil || s.Taken() != 1 {
		t.Errorf("the time has passed: %v, with %d slots taken", err, s.Taken())
	}
}

func TestQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, short := newBench(t, 1), Tenant{ID: "short", Queue: 1}
		b.ask(short, "runs", time.Hour)
		cancel := b.ask(short, "waits", time.Hour)
		b.ask(short, "one too many", time.Hour)
		b.ask(short, "at once", 0)
		b.ask(Tenant{ID: "other", Queue: 1}, "other", time.Minute)
		if err, _ := b.err("one too many"); !errors.Is(err, ErrQueue) {
			t.Errorf("one too many: %v", err)
		}
		if err, _ := b.err("at once"); !errors.Is(err, ErrFull) {
			t.Errorf("at once: %v", err)
		}
		if _, ended := b.err("other"); ended {
			t.Error("the queue of one tenant is full, and another's has no room")
		}
		gone := errors.New("gone")
		cancel(gone)
		if err, _ := b.err("waits"); err != gone {
			t.Errorf("canceled: %v", err)
		}
		b.ask(short, "waits now", time.Hour)
		time.Sleep(2 * time.Minute)
		if err, _ := b.err("other"); !errors.Is(err, ErrFull) {
			t.Errorf("after a minute: %v", err)
		}
		b.given()
		b.Release("short")
		b.want("one ended", "waits now")
	})
}

// TestElsewhere counts what a tenant has in another process.
func TestElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, 10)
		var there, counts atomic.Int32
		b.Elsewhere = func(context.Context) func(string) int {
			counts.Add(1)
			n := int(there.Load())
			time.Sleep(10 * time.Millisecond)
			return func(id string) int {
				if id == "wide" {
					return n
				}
				return 0
			}
		}
		wide := Tenant{ID: "wide", Most: 3, Elsewhere: true}
		there.Store(3)
		b.ask(wide, "at once", 0)
		b.ask(wide, "1", time.Hour)
		b.ask(wide, "2", time.Hour)
		b.ask(Tenant{ID: "other"}, "other", time.Hour)
		b.want("before the count", "other")
		time.Sleep(20 * time.Millisecond)
		if err, _ := b.err("at once"); !errors.Is(err, ErrMost) {
			t.Errorf("at once: %v", err)
		}
		b.want("3 are elsewhere")
		time.Sleep(5 * time.Second)
		if n := counts.Load(); n < 5 || n > 7 {
			t.Errorf("%d counts in 5 s", n)
		}
		there.Store(1)
		time.Sleep(time.Second)
		b.want("one more for each count", "1")
		time.Sleep(time.Second)
		b.want("the next count", "2")
		b.ask(wide, "3", 3*time.Second)
		time.Sleep(4 * time.Second)
		if err, _ := b.err("3"); !errors.Is(err, ErrMost) {
			t.Errorf("with its most: %v", err)
		}
		n := counts.Load()
		time.Sleep(time.Minute)
		if counts.Load() > n {
			t.Error("it is counted while nobody waits")
		}
		// What it gave back needs no new count.
		b.ask(wide, "4", time.Hour)
		b.Release("wide")
		time.Sleep(20 * time.Millisecond)
		b.want("after one ended", "4")
		b.Release("wide")
		if !b.Try(wide) {
			t.Error("a slot that was given back within the second needs a count")
		}
		if b.Try(wide) {
			t.Error("more than its most, without a count")
		}
		b.Release("wide")
		there.Store(3)
		time.Sleep(time.Minute)
		if b.Try(wide) {
			t.Error("a count of a minute ago is believed")
		}
	})
}

// TestAlone: where no other process is, nothing waits for a count after the first.
func TestAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, 10)
		var counts atomic.Int32
		var others atomic.Bool
		b.Elsewhere = func(context.Context) func(string) int {
			counts.Add(1)
			if !others.Load() {
				return nil
			}
			return func(string) int { return 1 }
		}
		wide := Tenant{ID: "wide", Most: 4, Elsewhere: true}
		for i := range 3 {
			b.ask(wide, fmt.Sprint(i), time.Hour)
		}
		b.want("after the first count", "0", "1", "2")
		if !b.Try(wide) || b.Try(wide) || counts.Load() != 1 {
			t.Errorf("it has not its most, after %d counts", counts.Load())
		}
		for range 4 {
			b.Release("wide")
		}
		// Another process comes. It is seen with the next count.
		others.Store(true)
		time.Sleep(2 * countAge)
		for i := range 4 {
			b.ask(wide, fmt.Sprint(i+3), time.Hour)
		}
		b.want("one for the count", "3")
		time.Sleep(5 * countAge)
		b.want("with the other's, its most", "4", "5")
	})
}

// TestTwoProcesses has two processes share what one tenant may have.
func TestTwoProcesses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var all [2]*bench
		wide := Tenant{ID: "wide", Most: 3, Elsewhere: true}
		for i := range all {
			all[i] = newBench(t, 10)
			all[i].Elsewhere = func(context.Context) func(string) int {
				n := all[1-i].Taken()
				time.Sleep(time.Millisecond)
				return func(string) int { return n }
			}
		}
		for n := range 10 {
			for _, b := range all {
				b.ask(wide, fmt.Sprint(n), time.Hour)
			}
		}
		most, ended := 0, 0
		for ended < 20 {
			time.Sleep(300 * time.Millisecond)
			synctest.Wait()
			most = max(most, all[0].Taken()+all[1].Taken())
			for _, b := range all {
				if b.Taken() > 0 {
					b.Release("wide")
					ended++
				}
			}
		}
		if most > wide.Most+1 {
			t.Errorf("%d at once, of %d and one more", most, wide.Most)
		}
	})
}

// model is a plain form of the rules.
type model struct {
	free    int
	given   float64
	tenants []string
	of      map[string]Tenant
	running map[string]int
	share   map[string]float64
	queue   []string // names, in the order in which they came
	whose   map[string]string
}

func (m *model) idle(id string) bool {
	waits := slices.ContainsFunc(m.queue, func(name string) bool { return m.whose[name] == id })
	return m.running[id] == 0 && !waits
}

// forget is called when somebody has given a slot or a wait up.
func (m *model) forget() {
	if !slices.ContainsFunc(m.tenants, func(id string) bool { return !m.idle(id) }) {
		m.given = 0
		clear(m.share)
	}
}

func (m *model) arrive(id, name string) {
	if m.idle(id) {
		m.share[id] = max(m.share[id], m.given)
	}
	m.queue = append(m.queue, name)
	m.whose[name] = id
}

// deal returns who gets a slot.
func (m *model) deal() (got []string) {
	for m.free > 0 {
		can := slices.DeleteFunc(slices.Clone(m.queue), func(name string) bool {
			t := m.of[m.whose[name]]
			return t.Most > 0 && m.running[t.ID] >= t.Most
		})
		if len(can) == 0 {
			return got
		}
		next := slices.MinFunc(can, func(a, b string) int { // the first of several
			s, t := m.of[m.whose[a]], m.of[m.whose[b]]
			return cmp.Or(cmp.Compare(m.running[s.ID]*t.Weight, m.running[t.ID]*s.Weight), cmp.Compare(m.share[s.ID], m.share[t.ID]))
		})
		t := m.of[m.whose[next]]
		m.queue = slices.DeleteFunc(m.queue, func(name string) bool { return name == next })
		m.free--
		m.running[t.ID]++
		m.given = max(m.given, m.share[t.ID])
		m.share[t.ID] = m.given + 1/float64(t.Weight)
		got = append(got, next)
	}
	return got
}

// TestModel does what comes to mind, in any order, and compares with the model.
func TestModel(t *testing.T) {
	for seed := range uint64(30) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			slots := 1 + r.IntN(5)
			b := newBench(t, slots)
			m := &model{free: slots, of: make(map[string]Tenant), running: make(map[string]int), share: make(map[string]float64), whose: make(map[string]string)}
			for i := range 1 + r.IntN(4) {
				id := fmt.Sprint("t", i)
				m.of[id] = Tenant{ID: id, Weight: 1 + r.IntN(3), Most: r.IntN(4)}
				m.tenants = append(m.tenants, id)
			}
			cancels := make(map[string]context.CancelCauseFunc)
			for step := range 300 {
				id := m.tenants[r.IntN(len(m.tenants))]
				what := "nothing"
				switch r.IntN(5) {
				case 0, 1:
					name := fmt.Sprint(id, " ", step)
					what = "ask " + name
					m.arrive(id, name)
					cancels[name] = b.ask(m.of[id], name, time.Hour)
				case 2, 3:
					if m.running[id] > 0 {
						what = "release " + id
						m.free++
						m.running[id]--
						b.Release(id)
					}
				case 4:
					if len(m.queue) > 0 {
						name := m.queue[r.IntN(len(m.queue))]
						what = "cancel " + name
						m.queue = slices.DeleteFunc(m.queue, func(other string) bool { return other == name })
						cancels[name](errors.New("gone"))
					}
				}
				want, got := m.deal(), b.given()
				m.forget()
				// Who gets a slot in one deal gets it at one time.
				slices.Sort(want)
				slices.Sort(got)
				if !slices.Equal(got, want) {
					t.Fatalf("seed %d, step %d, %s: %q got a slot, want %q", seed, step, what, got, want)
				}
			}
			for _, name := range slices.Collect(maps.Keys(cancels)) {
				cancels[name](nil)
			}
		})
	}
}

// TestConcurrently is for the race detector.
func TestConcurrently(t *testing.T) {
	s := New(3)
	s.Elsewhere = func(context.Context) func(string) int { return func(string) int { return 0 } }
	var held, most atomic.Int32
	var all sync.WaitGroup
	for i := range 60 {
		all.Go(func() {
			tenant := Tenant{ID: fmt.Sprint(i % 4), Weight: i%4 + 1, Most: 2, Elsewhere: i%4 == 0}
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*time.Millisecond)
			defer cancel()
			if err := s.Acquire(ctx, tenant, time.Duration(i%7)*time.Millisecond); err != nil {
				return
			}
			n := held.Add(1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			time.Sleep(time.Millisecond)
			held.Add(-1)
			s.Release(tenant.ID)
		})
	}
	all.Wait()
	if n := most.Load(); n < 1 || n > 3 || s.Taken() != 0 {
		t.Errorf("%d slots were held at once, and %d are taken after the end", n, s.Taken())
	}
}
