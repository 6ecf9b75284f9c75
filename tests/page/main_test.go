// Package page_test drives the builder's page, and the OpenFaaS UI, in headless
// Chromium against the real stack.
package page_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"handler/function/tests/stack"
)

func TestMain(m *testing.M) { stack.Main(m) }

// tab is a page in a browser of its own, which ends with the test.
type tab struct {
	t   *testing.T
	ctx context.Context

	mu       sync.Mutex
	problems []string // what the browser complained about
	allowed  []string // parts of complaints that the test causes
}

// open loads an address. At the end of the test the console must be free of
// errors and of violations of the page's policy.
func open(t *testing.T, url string, allowed ...string) *tab {
	t.Helper()
	// What Chromium leaves there is removed once it has ended.
	temp, err := os.MkdirTemp("", "browser-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(temp) })
	opts := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.NoSandbox, // root has none
		chromedp.Flag("no-proxy-server", true),
		// A name that is not localhost, and so no secure context on plain http;
		// and nothing from anywhere else.
		chromedp.Flag("host-resolver-rules", "MAP builder.test 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
		chromedp.WindowSize(1280, 900),
		chromedp.Env("TMPDIR="+temp),
		chromedp.Env("LC_ALL=C.UTF-8"),           // in the locale C it sends no folder with a name that is not ASCII
		chromedp.WSURLReadTimeout(3*time.Minute), // a browser starts slowly on a busy machine
	)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewExecAllocator(ctx, opts...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	p := &tab{t: t, ctx: ctx, allowed: allowed}
	t.Cleanup(func() {
		// t.Context has ended; closing waits for the browser's end.
		cancel()
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, problem := range p.problems {
			t.Errorf("the browser reports: %s", problem)
		}
	})
	if err := chromedp.Listen(ctx, p.listen); err != nil {
		t.Fatal(err)
	}
	if _, err := chromedp.Call(ctx, log.Enable, cdp.Empty{}); err != nil {
		t.Fatal(err)
	}
	p.run(chromedp.Navigate(url))
	return p
}

func (p *tab) listen(event any) {
	var problem string
	switch e := event.(type) {
	case *log.EventEntryAdded:
		if e.Entry.Level == log.EntryLevelError || e.Entry.Level == log.EntryLevelWarning {
			problem = fmt.Sprintf("%s: %s %s", e.Entry.Source, e.Entry.Text, e.Entry.URL)
		}
	case *runtime.EventExceptionThrown:
		problem = e.ExceptionDetails.Text + " " + e.ExceptionDetails.Exception.Description
	case *runtime.EventConsoleAPICalled:
		problem = fmt.Sprintf("console.%s was called", e.Type)
	}
	if problem == "" {
		return
	}
	for _, a := range p.allowed {
		if strings.Contains(problem, a) {
			return
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.problems = append(p.problems, problem)
}

func (p *tab) run(actions ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	if err := chromedp.Do(p.ctx, actions...); err != nil {
		p.t.Fatal(err)
	}
}

// js evaluates an expression into a value.
func js[T any](p *tab, expression string, args ...any) T {
	p.t.Helper()
	for i, a := range args {
		b, err := json.Marshal(a)
		if err != nil {
			p.t.Fatal(err)
		}
		args[i] = string(b)
	}
	if len(args) > 0 {
		expression = fmt.Sprintf(expression, args...)
	}
	v, err := chromedp.Run(p.ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		p.t.Fatal(err)
	}
	return v
}

// text is what an element shows; empty when it is hidden.
func (p *tab) text(selector string) string {
	p.t.Helper()
	return js[string](p, `((e) => e?.checkVisibility() ? e.innerText.trim() : "")(document.querySelector(%s))`, selector)
}

func (p *tab) texts(selector string) []string {
	p.t.Helper()
	return js[[]string](p, `[...document.querySelectorAll(%s)].map((e) => e.innerText)`, selector)
}

// until waits for a condition.
func (p *tab) until(what string, ok func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.shoot("failed-" + p.t.Name())
			p.t.Fatalf("no %s after three minutes; the page shows:\n%.2000s", what, p.text("main"))
		}
	}
}

// line waits for a line that a step prints.
func (p *tab) line(text string) {
	p.t.Helper()
	p.until(fmt.Sprintf("line %q", text), func() bool { return slices.Contains(p.texts("#lines .l"), text) })
}

// fill types into a field of the form, as a person would replace what it holds.
func (p *tab) fill(id, value string) {
	p.t.Helper()
	js[chromedp.Void](p, `document.getElementById(%s).select()`, id)
	if value == "" {
		value = kb.Delete // no keys at all would leave what is selected
	}
	p.run(chromedp.SendKeys(chromedp.ID(id), value))
}

func (p *tab) click(id string) {
	p.t.Helper()
	p.run(chromedp.Click(chromedp.ID(id)))
}

// choose gives a folder or a file to the form.
func (p *tab) choose(id, path string) {
	p.t.Helper()
	p.run(chromedp.SetUploadFiles(chromedp.ID(id), []string{path}))
	p.until("chosen source", func() bool { return p.text("#chosen-name") != "" || p.text("#source-error") != "" })
}

// ended waits for a build's end and returns its title.
func (p *tab) ended() string {
	p.t.Helper()
	p.until("end of the build", func() bool {
		return js[bool](p, `!document.getElementById("run").hidden && document.getElementById("cancel").hidden`)
	})
	return p.text("#build-title")
}

// submit fills in the form, for what has been chosen, and sends it.
func (p *tab) submit(image, secret string) {
	p.t.Helper()
	p.fill("image", image)
	p.fill("secret", secret)
	p.click("submit")
}

// pushed waits for a build's end, which must be a success.
func (p *tab) pushed() {
	p.t.Helper()
	if title := p.ended(); title != "Pushed" {
		p.t.Fatalf("the build ended %q: %s", title, p.text("#build"))
	}
}

// looks checks the page's layout in both colour schemes, wide and narrow, and
// keeps pictures of it in the directory that PAGE_SCREENSHOTS names.
func (p *tab) looks(name string) {
	p.t.Helper()
	for _, width := range []int64{1280, 360} {
		for _, scheme := range []string{"light", "dark"} {
			p.run(chromedp.EmulateViewport(width, 900))
			if _, err := chromedp.Call(p.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
				Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
			}); err != nil {
				p.t.Fatal(err)
			}
			if got := js[int64](p, `document.documentElement.scrollWidth`); got > width {
				p.t.Errorf("%s: the page is %d wide in a window of %d", name, got, width)
			}
			for _, low := range js[[]string](p, contrast) {
				p.t.Errorf("%s, %s: little contrast: %s", name, scheme, low)
			}
			p.shoot(fmt.Sprintf("%s-%d-%s", name, width, scheme))
		}
	}
	if unnamed := js[[]string](p, unnamed); len(unnamed) > 0 {
		p.t.Errorf("%s: a screen reader has no name for %q", name, unnamed)
	}
	p.run(chromedp.EmulateViewport(1280, 900))
}

// unnamed are the visible controls without a label.
const unnamed = `[...document.querySelectorAll("input, textarea, button, progress, [tabindex='0']")]
	.filter((e) => e.checkVisibility())
	.filter((e) => !e.labels?.length && !e.ariaLabel && !e.getAttribute("aria-labelledby") && !(e.tagName === "BUTTON" && e.innerText.trim()))
	.map((e) => e.outerHTML.slice(0, 100))`

// contrast lists the texts whose colour is too near to what is behind them
// (WCAG 2, 1.4.3: a ratio of 4.5).
const contrast = `(() => {
	const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
	const rgba = (color) => {
		canvas.clearRect(0, 0, 1, 1);
		canvas.fillStyle = color;
		canvas.fillRect(0, 0, 1, 1);
		const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
		return [r, g, b, a / 255];
	};
	const behind = (e) => {
		for (; e; e = e.parentElement) {
			const color = rgba(getComputedStyle(e).backgroundColor);
			if (color[3] > 0.99) return color;
		}
		return [255, 255, 255, 1];
	};
	const luminance = ([r, g, b]) => {
		const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
		return 0.2126 * x + 0.7152 * y + 0.0722 * z;
	};
	const low = [];
	for (const e of document.querySelectorAll("body *")) {
		if (!e.checkVisibility() || e.closest(":disabled, noscript")) continue;
		if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
		const [a, b] = [luminance(rgba(getComputedStyle(e).color)), luminance(behind(e))].sort((x, y) => y - x);
		const ratio = (a + 0.05) / (b + 0.05);
		if (ratio < 4.5) low.push(e.tagName + " " + e.innerText.slice(0, 40) + " " + ratio.toFixed(2));
	}
	return low;
})()`

func (p *tab) shoot(name string) {
	dir := os.Getenv("PAGE_SCREENSHOTS")
	if dir == "" {
		return
	}
	png, err := chromedp.Run(p.ctx, chromedp.FullScreenshot(100))
	if err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".png"), png, 0o644); err != nil {
		p.t.Error(err)
	}
}

// start returns a function and the address of its page on a host of its own, as
// behind a port-forward or an Ingress.
func start(t *testing.T, c stack.FunctionConfig) (*stack.Stack, *stack.Function, string) {
	t.Helper()
	s, f := stack.Test(t, c)
	url, _ := behind(t, f, f.URL, "/", nil)
	return s, f, url
}

// behind serves the URL upstream, where f is, below a prefix, with and without a
// slash at its end, and returns its address there and what it is sent. answer, if
// not nil, may change what f answers. At the end of the test nothing that was sent
// may hold the payload secret.
func behind(t *testing.T, f *stack.Function, upstream, prefix string, answer func(*http.Response) error) (string, *wire) {
	t.Helper()
	to, err := url.Parse(upstream)
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{
		FlushInterval:  -1,
		ModifyResponse: answer,
		Rewrite: func(r *httputil.ProxyRequest) {
			path, _ := strings.CutPrefix(r.In.URL.Path, strings.TrimSuffix(prefix, "/"))
			r.Out.URL.Path = "/" + strings.TrimPrefix(path, "/")
			r.Out.URL.RawPath = ""
			r.SetURL(to)
		},
	}
	sent := new(wire)
	mux := http.NewServeMux()
	recorded := sent.record(proxy)
	mux.Handle(prefix, recorded)
	if !strings.HasSuffix(prefix, "/") {
		mux.Handle(prefix+"/", recorded)
	}
	srv := httptest.NewServer(mux)
	t.Cleanup(func() {
		srv.Close()
		sent.check(t, f.Secret)
	})
	return srv.URL + prefix, sent
}

// wire is what a browser has sent.
type wire struct {
	mu       sync.Mutex
	requests [][]byte // heads and bodies, those in gzip as they are and unpacked
}

func (w *wire) record(h http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(io.LimitReader(r.Body, 64<<20))
		if err != nil {
			return // canceled
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		text, err := httputil.DumpRequest(r, true)
		if err != nil {
			panic(err)
		}
		if zr, err := gzip.NewReader(bytes.NewReader(body)); err == nil {
			// What is no gzip to its end was sent as it is.
			unpacked, _ := io.ReadAll(io.LimitReader(zr, 256<<20))
			text = append(text, unpacked...)
		}
		w.mu.Lock()
		w.requests = append(w.requests, text)
		w.mu.Unlock()
		h.ServeHTTP(rw, r)
	})
}

// since are the requests after the first n.
func (w *wire) since(n int) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var list []string
	for _, request := range w.requests[n:] {
		list = append(list, string(request))
	}
	return list
}

// count is the number of requests so far.
func (w *wire) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.requests)
}

// check looks for a secret in all that was sent, in the forms that it could have.
func (w *wire) check(t *testing.T, secret string) {
	t.Helper()
	forms := map[string]string{
		"as it is": secret, "in hex": hex.EncodeToString([]byte(secret)), "escaped": url.QueryEscape(secret),
		// Without the end, which depends on what follows.
		"in base64":           strings.TrimRight(base64.StdEncoding.EncodeToString([]byte(secret)), "=")[:len(secret)],
		"in base64, of a URL": strings.TrimRight(base64.URLEncoding.EncodeToString([]byte(secret)), "=")[:len(secret)],
	}
	if key, err := base64.StdEncoding.DecodeString(secret); err == nil {
		forms["decoded"], forms["decoded, in hex"] = string(key), hex.EncodeToString(key)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.requests) == 0 {
		t.Error("no request was recorded")
	}
	for _, request := range w.requests {
		for form, text := range forms {
			if bytes.Contains(request, []byte(text)) {
				t.Errorf("the payload secret, %s, was sent: %.1000q", form, request)
			}
		}
	}
}
