package faults

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// What strangers may cost.
const (
	strangersMemory = 256 << 20 // anonymous memory of the function, in bytes
	strangersSpool  = 256 << 20 // max_spool_bytes, of which they have half
	// Of a signed build, beyond what it takes without them. Had it to wait for a
	// stranger's slot, it would wait for uploadGrace at least.
	strangersWait  = uploadGrace / 2
	strangersLines = 21               // of the log in a second: those of two periods and a count
	restMemory     = 176 << 20        // afterwards: GOMEMLIMIT and what is not Go's
	uploadGrace    = 10 * time.Second // by default
)

// wrongSignature is one that no key makes.
var wrongSignature = "sha256=" + strings.Repeat("0", 64)

// hostile is one kind of request that is not signed, and how many send it at once.
type hostile struct {
	name   string
	conns  int
	target string // method and path
	header string // a line; empty is a wrong signature
	body   []byte // what is sent, and then nothing
	length int    // Content-Length
	rate   int    // bytes per second after the first MiB; 0 is at once
	again  bool   // each answer is followed by the next request

	connected func(net.Conn) // if not nil, called when the body, or its first MiB, is written

	// leaves is how long a connection stays after what it sends; 0 is until the end.
	leaves time.Duration

	// ends is when each connection is over by itself; 0 is not before it is cut off.
	ends time.Duration
}

// whole sends all of a body.
func whole(name string, body []byte) hostile {
	return hostile{name: name, conns: 16, target: "POST /build", body: body, length: len(body)}
}

// kept holds the last 64 bytes back.
func kept(name string, body []byte) hostile {
	h := whole(name+", held back", body)
	h.body = body[:len(body)-64]
	return h
}

// begun sends the beginning of a body of 10 MB.
func begun(name string, body []byte) hostile {
	h := whole(name, body)
	h.length = 10_000_000
	return h
}

// slowly wants each connection to be over by itself: it is slow at once, and what it has
// sent gives it half a second more at most. A busy machine may take longer. Two periods of
// grace are too long.
func (h hostile) slowly() hostile {
	h.ends = 2*uploadGrace - 2*time.Second
	if *timing {
		h.ends = uploadGrace + 3*time.Second
	}
	return h
}

func (h hostile) of(conns int) hostile {
	h.name, h.conns = fmt.Sprintf("%s, %d of them", h.name, conns), conns
	return h
}

// ahead sends the body as a build context.
func (h hostile) ahead() hostile {
	h.name, h.target = h.name+", ahead", "PUT /contexts/sha256:"+strings.Repeat("0", 64)
	return h
}

// enveloped has the body be that of a text envelope, which is signed inside.
func (h hostile) enveloped() hostile {
	h.header = "Content-Type: text/plain"
	return h
}

// hostiles makes all kinds. What is compressed is made once and little: 2 GiB are
// 64 KB.
func hostiles(t *testing.T) []hostile {
	names := manyNames(t, 199_000)
	var zipped bytes.Buffer
	zw, err := gzip.NewWriterLevel(&zipped, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	zw.Write(names)
	zw.Close()
	runs := zstdRuns(2<<30-1<<20, 128<<10, 0)
	// What is looked at in pieces is more than one of them before the end.
	longer := zstdRuns(2<<30-1<<20, 128<<10, 512<<10)
	windows := zstdRuns(64<<20, 8<<20, 256<<10)
	noise := layered(t, local(), 64<<20)
	many := names[:64<<20]
	envelope := func(b []byte) []byte {
		return fmt.Appendf(nil, `{"signature":%q,"tar":%q}`, wrongSignature, base64.StdEncoding.EncodeToString(b))
	}
	small := request(t, local(), "FROM busybox")
	t.Logf("bodies: %d bytes of gzipped names, %d of zstd runs, %d of zstd windows", zipped.Len(), len(runs), len(windows))

	return []hostile{
		kept("gzip of many names", zipped.Bytes()),
		kept("gzip of many names", zipped.Bytes()).of(100),
		whole("gzip of many names", zipped.Bytes()),
		kept("zstd of one long file", longer),
		whole("zstd of one long file", runs),
		kept("many names", many),
		// All that streams may have of memory, by streams that keep it.
		kept("few names", names[:3_500_000]),
		// All that heads may have, by heads that keep it.
		kept("whole heads", many[:1<<20]).of(100),
		// Heads that come and go, more of them than there is memory for.
		{name: "comers and goers", conns: 100, target: "POST /build", body: many[:600<<10], length: 10_000_000, leaves: 500 * time.Millisecond, again: true},
		whole("many names", many),
		kept("zstd of a large window", windows),
		kept("zstd of a large window", windows).of(100),
		begun("headers only", nil).of(100),
		begun("headers only", nil).of(1000).slowly(),
		begun("one byte", []byte("x")).of(1000),
		begun("32 KiB", many[:32<<10]).of(1000).slowly(),
		{name: "slow", conns: 16, target: "POST /build", body: many, length: len(many), rate: 72 << 10},
		kept("envelope of gzip", envelope(zipped.Bytes())).enveloped(),
		whole("envelope of gzip", envelope(zipped.Bytes())).enveloped(),
		kept("envelope of zstd", envelope(longer)).enveloped(),
		whole("envelope of zstd", envelope(runs)).enveloped(),
		whole("envelope nested deep", []byte(`{"x":`+strings.Repeat("[", 32<<20))).enveloped(),
		whole("noise", noise),
		kept("gzip of many names", zipped.Bytes()).ahead(),
		whole("noise", noise).ahead(),
		{name: "many requests", conns: 16, target: "POST /build", body: small, length: len(small), again: true},
	}
}

// manyNames is a tar of n empty files with names of 140 bytes: as many bytes as
// max_names_bytes lets 200,000 have, or nearly.
func manyNames(t *testing.T, n int) []byte {
	var b bytes.Buffer
	b.Grow((n + 2) * 512)
	w := tar.NewWriter(&b)
	dir := "context/" + strings.Repeat("d", 40)
	for i := range n {
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("%s/%090d", dir, i), Format: tar.FormatUSTAR}); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	return b.Bytes()
}

// zstdRuns is a tar of one file of size zeros, as runs of 128 KiB, four bytes each,
// and then noise as it is. The decoder keeps a window of the given size, a power of
// two.
func zstdRuns(size, window, noise int) []byte {
	var head bytes.Buffer
	tar.NewWriter(&head).WriteHeader(&tar.Header{Name: "context/x", Mode: 0o644, Size: int64(size + noise), Format: tar.FormatGNU})
	var b []byte
	block := func(kind, n int, content []byte) {
		header := binary.LittleEndian.AppendUint32(nil, uint32(n<<3|kind<<1))
		b = append(append(b, header[:3]...), content...)
	}
	const raw, run, longest = 0, 1, 128 << 10
	// RFC 8878: the magic number, a descriptor that leaves the size out, and the
	// window as an exponent over 1 KiB.
	exponent := 0
	for 1<<(10+exponent) < window {
		exponent++
	}
	b = append(b, 0x28, 0xb5, 0x2f, 0xfd, 0, byte(exponent<<3))
	block(raw, head.Len(), head.Bytes())
	for range size / longest {
		block(run, longest, []byte{0})
	}
	content := make([]byte, longest)
	rand.Read(content)
	for range noise / longest {
		block(raw, longest, content)
	}
	return append(b, 1, 0, 0) // the last block, of nothing
}

// send makes requests on connections of their own until ctx ends, which cuts them
// off, and counts how each ended.
func (h hostile) send(ctx context.Context, f *stack.Function, count func(end string)) {
	for {
		end := h.sendOne(ctx, f)
		count(end)
		if !h.again || end == notConnected || ctx.Err() != nil {
			return
		}
	}
}

const notConnected = "not connected"

// sendOne makes one request, and returns its answer, or what else became of it.
func (h hostile) sendOne(ctx context.Context, f *stack.Function) (end string) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", strings.TrimPrefix(f.URL, "http://"))
	if err != nil {
		return notConnected
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	header := h.header
	if header == "" {
		header = "X-Build-Signature: " + wrongSignature
	}
	fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: builder\r\nContent-Length: %d\r\n%s\r\n\r\n", h.target, h.length, header)
	first := h.body
	if h.rate > 0 {
		first = h.body[:1<<20]
	}
	_, err = conn.Write(first)
	if h.connected != nil {
		h.connected(conn)
	}
	if err == nil && h.rate > 0 {
		go h.sendRest(ctx, conn, len(first))
	}
	if h.leaves > 0 {
		select {
		case <-time.After(h.leaves):
		case <-ctx.Done():
		}
		return "left"
	}
	// There may be an answer although not all was taken.
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if ctx.Err() != nil {
		return "held"
	}
	if err != nil {
		return "cut off"
	}
	defer resp.Body.Close()
	a, err := client.Read(resp, nil)
	if err != nil {
		return "cut off"
	}
	return fmt.Sprintf("%d %s", a.StatusCode, a.Code)
}

// sendRest sends the body after the first n bytes at h.rate. What a busy machine delays, it
// makes up for.
func (h hostile) sendRest(ctx context.Context, conn net.Conn, n int) {
	first := n
	for start := time.Now(); ctx.Err() == nil && n < len(h.body); time.Sleep(100 * time.Millisecond) {
		due := min(first+int(float64(h.rate)*time.Since(start).Seconds()), len(h.body))
		if _, err := conn.Write(h.body[n:due]); err != nil {
			return
		}
		n = due
	}
}

// TestStrangers has strangers send requests of every kind, as many at once as
// max_uploads and more, to a function with the memory that stack.yml gives it, while
// three callers build what they may. It is no parallel test: it measures memory.
//
// One function endures all kinds, one after the other, so that what one leaves
// behind is there when the next comes: memory, descriptors and goroutines are back to
// what they were before the first each time. -rounds has each kind come that often.
//
// A signed build may wait for strangersWait, which only a builder that lets strangers
// block it exceeds, also on a busy machine: with -timing for 2 s. Why that is enough
// on two free processors: a cached build takes some 0.1 s of one. What strangers send
// is hashed, at several hundred MB/s, and goes through memory or to the disk up to a
// budget, so that 16 uploads at full speed are done within a few seconds in which a
// build gets its share of the processors every few ms. Strangers who hold what they
// have take none.
func TestStrangers(t *testing.T) {
	d, err := stack.Shared(t).Description()
	if err != nil {
		t.Fatal(err)
	}
	limit, err := resource.ParseQuantity(d.Limits["memory"])
	if err != nil {
		t.Fatal(err)
	}
	env := maps.Clone(d.Environment)
	delete(env, "buildkit_addr")
	env["log_level"] = "info"
	env["max_spool_bytes"] = fmt.Sprint(strangersSpool)
	env["context_repository"] = stack.Shared(t).Registry.Image("builder/contexts")
	start := func() *endurance {
		_, f := stack.Test(t, stack.FunctionConfig{Plain: true, Memory: limit.Value(), Env: env})
		return newEndurance(t, f, layered(t, local(), 100<<10))
	}
	e := start()
	for _, h := range hostiles(t) {
		passed := t.Run(h.name, func(t *testing.T) {
			for round := range *rounds {
				e.endure(t, h, round == *rounds-1)
			}
		})
		if !passed { // the next kind is not to fail for this one
			e.f.Kill()
			e = start()
		}
	}
	wantAccount(t, e.f)
}

// endurance is a function that strangers try, and what it is without them.
type endurance struct {
	f      *stack.Function
	client client.Client // of those who build
	body   []byte        // what they build
	usual  time.Duration // what that takes at most
	before holdings
}

func newEndurance(t *testing.T, f *stack.Function, body []byte) *endurance {
	t.Helper()
	e := &endurance{f: f, body: body, client: f.Client}
	e.client.HTTP = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: len(waysToBuild)}}
	for i := range 3 {
		for way := range waysToBuild {
			a, err := buildAs(t.Context(), &e.client, way, body)
			if err != nil {
				t.Fatal(err)
			}
			a.WantSuccess(t)
			if i > 0 { // the first is not cached
				e.usual = max(e.usual, a.Took)
			}
		}
	}
	e.before = e.idle(t)
	return e
}

// idle is what the function has when nobody is connected.
func (e *endurance) idle(t *testing.T) holdings {
	t.Helper()
	e.client.HTTP.CloseIdleConnections()
	http.DefaultClient.CloseIdleConnections()
	return held(t, e.f)
}

// endure has a round of h come while others build.
func (e *endurance) endure(t *testing.T, h hostile, last bool) {
	f := e.f
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var beside sync.WaitGroup
	built := builds{enough: make(chan struct{})}
	var peak peaks
	for way := range waysToBuild {
		beside.Go(func() { built.every(ctx, 500*time.Millisecond, &e.client, way, e.body) })
	}
	beside.Go(func() { peak.watch(ctx, f) })

	began := time.Now()
	ends := h.round(ctx, t, f, last, built.enough)
	stop()
	beside.Wait()
	took := time.Since(began)
	t.Logf("%v; %d signed builds in %v, usually in %v at most: %d failed, the longest took %v; %.1f MiB of memory, %.1f MiB of disk",
		ends, built.sent, took.Round(time.Millisecond), e.usual.Round(time.Millisecond), built.failed, built.longest.Round(time.Millisecond), mib(peak.memory), mib(peak.disk))

	if built.failed > 0 {
		t.Errorf("%d of %d signed builds failed, the first: %s", built.failed, built.sent, built.failure)
	}
	most := strangersWait
	if *timing {
		most = 2 * time.Second
	}
	if wait := built.longest - e.usual; wait > most {
		t.Errorf("a signed build waited %v, %v at most", wait, most)
	}
	if peak.memory > strangersMemory {
		t.Errorf("%.1f MiB of memory, %.1f at most", mib(peak.memory), mib(strangersMemory))
	}
	if peak.disk > strangersSpool/2 {
		t.Errorf("%.1f MiB of temporary files, %.1f at most", mib(peak.disk), mib(strangersSpool/2))
	}
	if err := alive(f); err != nil {
		t.Fatal(err)
	}
	// One whose stranger left while it waited for a slot learns of it when its 30 s
	// are over.
	rested := stack.Eventually(t, time.Minute, func() error {
		after := e.idle(t)
		anonymous, err := f.Anonymous()
		if err != nil {
			return err
		}
		names, unlinked, err := f.TempFiles()
		switch {
		case err != nil:
			return err
		case len(names) > 0 || unlinked > 0:
			return fmt.Errorf("the temporary directory holds %q and %d unlinked bytes", names, unlinked)
		case after.goroutines > e.before.goroutines+5, after.fds > e.before.fds+4:
			return fmt.Errorf("there was %v, and is %v", e.before, after)
		case anonymous > restMemory:
			return fmt.Errorf("%.1f MiB of memory, %.1f at most", mib(anonymous), mib(restMemory))
		}
		return nil
	})
	t.Logf("at rest after %v", rested.Round(time.Millisecond))
}

// round has all of them send at once. What holds its connection is cut off after some
// seconds, in the last round when it should be over by itself. Nothing is cut off, and
// no round is over, before enough is closed.
func (h hostile) round(ctx context.Context, t *testing.T, f *stack.Function, last bool, enough <-chan struct{}) (ends map[string]int) {
	t.Helper()
	limit := 8 * time.Second
	switch {
	case last && h.ends > 0:
		limit = h.ends
	case h.again, h.rate > 0, h.length > len(h.body), h.leaves > 0:
		limit = 2 * time.Second
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cut := time.AfterFunc(limit, func() {
		<-enough
		cancel()
	})
	defer cut.Stop()
	ends = make(map[string]int)
	var mu sync.Mutex
	var all sync.WaitGroup
	for range h.conns {
		all.Go(func() {
			h.send(ctx, f, func(end string) {
				mu.Lock()
				defer mu.Unlock()
				ends[end]++
			})
		})
	}
	all.Wait()
	<-enough
	if n := ends["held"]; last && h.ends > 0 && n > 0 {
		t.Errorf("%d of %d connections were still held after %v", n, h.conns, h.ends)
	}
	return ends
}

// alive is why f lives no more, nil if it does.
func alive(f *stack.Function) error {
	now, cancel := context.WithCancel(context.Background())
	cancel()
	if state, err := f.Wait(now); err == nil {
		return fmt.Errorf("the function has ended: %v", state)
	}
	return nil
}

// waysToBuild are the callers by their headers, beside the signature.
var waysToBuild = []http.Header{
	{},
	{"Accept": {client.NDJSON}},
	{"X-Callback-Url": {"http://127.0.0.1:1/"}, "User-Agent": {"nats-queue-worker"}},
}

// buildAs sends a signed body the given way. A queue gives each call an id.
func buildAs(ctx context.Context, c *client.Client, way int, body []byte) (client.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, testTimeout)
	defer cancel()
	return c.Post(ctx, body, func(req *http.Request) {
		maps.Copy(req.Header, waysToBuild[way])
		if req.Header.Get("X-Callback-Url") != "" {
			req.Header.Set("X-Call-Id", mark())
		}
	})
}

// enoughBuilds are so many that a round says something of those who build.
const enoughBuilds = 12

// builds are those that were sent beside strangers' requests.
type builds struct {
	enough chan struct{} // closed after enoughBuilds

	sync.Mutex
	sent, failed int
	failure      string // the first
	longest      time.Duration
}

func (b *builds) every(ctx context.Context, pause time.Duration, c *client.Client, way int, body []byte) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	time.Sleep(pause / time.Duration(len(waysToBuild)) * time.Duration(way))
	for ctx.Err() == nil {
		// Each is seen to its end.
		start := time.Now()
		a, err := buildAs(context.WithoutCancel(ctx), c, way, body)
		took := time.Since(start)
		if err == nil && a.Status != "success" {
			err = errors.New(a.String())
		}
		b.Lock()
		if b.sent++; b.sent == enoughBuilds {
			close(b.enough)
		}
		b.longest = max(b.longest, took)
		if err != nil {
			b.failed++
			if b.failure == "" {
				b.failure = fmt.Sprintf("%v, after %v: %v", waysToBuild[way], took.Round(time.Millisecond), err)
			}
		}
		b.Unlock()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// peaks are the most that f had, in bytes.
type peaks struct{ memory, disk int64 }

func (p *peaks) watch(ctx context.Context, f *stack.Function) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for i := 0; ctx.Err() == nil; i++ {
		if n, err := f.Anonymous(); err == nil {
			p.memory = max(p.memory, n)
		}
		// Looked at less often: it takes a system call for each descriptor.
		if i%5 == 0 {
			if _, n, err := f.TempFiles(); err == nil {
				p.disk = max(p.disk, n)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// wantAccount checks that the log has few lines on refusals in any second, and yet,
// with what they say was left out, speaks of all that were counted.
func wantAccount(t *testing.T, f *stack.Function) {
	t.Helper()
	lines, most := 0, 0
	stack.Eventually(t, 15*time.Second, func() error {
		counted, err := f.Metric("builder_requests_refused_total")
		if err != nil {
			return err
		}
		log, err := f.Log()
		if err != nil {
			return err
		}
		lines, most = 0, 0
		told := 0
		seconds := make(map[string]int)
		for text := range strings.Lines(log) {
			var line struct {
				Message string
				Time    string
				LeftOut int `json:"left_out"`
			}
			if json.Unmarshal([]byte(text), &line) != nil {
				continue
			}
			switch line.Message {
			case "request refused":
				told++
			case "requests refused and not logged":
				told += line.LeftOut
			default:
				continue
			}
			lines++
			second := line.Time[:min(len(line.Time), len("2006-01-02T15:04:05"))]
			seconds[second]++
			most = max(most, seconds[second])
		}
		if told != int(counted) {
			time.Sleep(500 * time.Millisecond)
			return fmt.Errorf("%v requests were refused, and %d lines of the log tell of %d", counted, lines, told)
		}
		return nil
	})
	t.Logf("%d lines on refusals, %d in a second at most", lines, most)
	if most > strangersLines {
		t.Errorf("%d lines on refusals in one second, %d at most", most, strangersLines)
	}
}
