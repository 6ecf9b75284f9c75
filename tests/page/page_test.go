package page_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/browser"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"

	"handler/function/tests/stack"
)

// long is a path that ustar has no room for.
var long = strings.Repeat("a-directory-with-a-long-name/", 5) + strings.Repeat("f", 120)

// TestBuild builds a folder, sees it live, and builds it again from the cache.
func TestBuild(t *testing.T) {
	s, f, url := start(t, stack.FunctionConfig{})
	m := stack.Mark()
	files := map[string]string{
		"Dockerfile": "FROM busybox\nARG GREETING\nCOPY . /src/\nRUN echo begins; sleep 600; echo $GREETING > /greeting; : " + m + "\nRUN /src/run.sh\n",
		"run.sh":     "#!/bin/sh\necho it runs\n",
		"data.txt":   "data\n",
		"empty":      "",
		"grüße/名前":   "names\n",
		long:         "deep\n",
	}
	dir := stack.Context(t, files)
	p := open(t, url)
	p.until("description", func() bool { return strings.Contains(p.text("#about"), "0 of 4 builds running") })
	p.looks("start")

	p.choose("folder", dir)
	if got := p.text("#chosen"); !strings.Contains(got, "6 files") || !strings.Contains(got, "Executable bits and links") {
		t.Errorf("a chosen folder is shown as %q", got)
	}
	ref := s.Registry.Image("page/hello:v1")
	p.fill("image", ref)
	p.fill("secret", "  "+f.Secret+" ")
	p.fill("args", "GREETING=hello=you")
	p.fill("platforms", "linux/amd64")
	p.looks("filled")
	p.click("submit")
	p.line("begins")
	if title, running := p.text("#build-title"), p.texts("#steps .running .name"); title != "Building" || len(running) != 1 || !strings.Contains(running[0], "sleep 600") {
		t.Errorf("while a step runs the title is %q and running are %q", title, running)
	}
	p.until("description with the build in it", func() bool { return strings.Contains(p.text("#about"), "1 of 4 builds running") })
	if got := js[float64](p, `document.getElementById("progress").value`); got <= 0 || got >= 1 {
		t.Errorf("while a step runs the progress bar is at %v", got)
	}
	p.looks("building")
	stack.Release(t, m, stack.Patience)
	p.pushed()

	img := stack.MustPull(t, t.Context(), ref)
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]string{
		"out-image":  ref,
		"out-digest": digest.String(),
		"out-deploy": "faas-cli deploy --image " + ref + " --name hello",
	} {
		if got := p.text("#" + id); got != want {
			t.Errorf("%s is %q, not %q", id, got, want)
		}
		if got := p.copied(id); got != want {
			t.Errorf("the button of %s copies %q, not %q", id, got, want)
		}
	}
	checkFolder(t, stack.MustFiles(t, img), files)
	p.looks("pushed")

	p.click("submit")
	p.ended()
	if cached := p.texts("#steps .cached .name"); len(cached) < 3 {
		t.Errorf("built again, %q are marked as cached", cached)
	}
	if got := js[float64](p, `document.getElementById("progress").value`); got != 1 {
		t.Errorf("the progress bar ends at %v", got)
	}
	if got := js[string](p, `document.getElementById("secret").value + JSON.stringify(localStorage) + JSON.stringify(sessionStorage) + document.cookie`); got != "  "+f.Secret+" {}{}" {
		t.Errorf("the page stores something: %q", got)
	}
	p.looks("cached")
}

// TestTenant: the page names the tenant in a header, sends none without a name, and keeps the
// name nowhere.
func TestTenant(t *testing.T) {
	s, f := stack.Test(t, stack.FunctionConfig{})
	url, sent := behind(t, f, f.URL, "/", nil)
	p := open(t, url)
	p.choose("folder", stack.Context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY Dockerfile /\n"}))
	for _, name := range []string{"", " acme ", ""} {
		p.fill("tenant", name)
		before := sent.count()
		p.submit(s.Registry.Image("page/tenant:v1"), f.Secret)
		p.pushed()
		posts := 0
		for _, request := range sent.since(before) {
			head, _, _ := strings.Cut(request, "\r\n\r\n")
			if !strings.HasPrefix(head, "POST") {
				continue
			}
			posts++
			_, got, _ := strings.Cut(head+"\r\n", "\r\nX-Build-Tenant: ")
			got, _, _ = strings.Cut(got, "\r\n")
			if got != strings.TrimSpace(name) {
				t.Errorf("with the name %q: %s", name, head)
			}
		}
		if posts == 0 {
			t.Errorf("with the name %q nothing was sent", name)
		}
	}
	if got := js[string](p, `JSON.stringify(localStorage) + JSON.stringify(sessionStorage) + document.cookie`); got != "{}{}" {
		t.Errorf("the page stores something: %q", got)
	}
	before := sent.count()
	p.fill("tenant", "acmé")
	p.click("submit")
	p.until("an error", func() bool { return strings.Contains(p.text("#tenant-error"), "lower-case letters") })
	for _, request := range sent.since(before) {
		if strings.HasPrefix(request, "POST") {
			t.Error("a name that no header can have was sent")
		}
	}
}

// checkFolder holds an image to what TestBuild has chosen and filled in.
func checkFolder(t *testing.T, got map[string]*stack.File, chosen map[string]string) {
	t.Helper()
	for name, content := range chosen {
		if file := got["src/"+name]; file == nil || string(file.Content) != content {
			t.Errorf("%s is not in the image as it was: %v", name, file)
		}
	}
	for name, mode := range map[string]int64{"src/run.sh": 0o755, "src/data.txt": 0o644} {
		if file := got[name]; file != nil && file.Mode&0o777 != mode {
			t.Errorf("%s has mode %o, not %o", name, file.Mode, mode)
		}
	}
	if file := got["greeting"]; file == nil || string(file.Content) != "hello=you\n" {
		t.Errorf("the build argument did not arrive: %v", file)
	}
}

// copied presses an element's copy button and returns what the clipboard then has.
func (p *tab) copied(id string) string {
	p.t.Helper()
	b := chromedp.FromContext(p.ctx).Browser
	for _, name := range []string{"clipboard-read", "clipboard-write"} {
		if _, err := cdp.Call(p.ctx, b, browser.SetPermission, browser.SetPermissionParams{
			Permission: &browser.PermissionDescriptor{Name: name}, Setting: browser.PermissionSettingGranted,
		}); err != nil {
			p.t.Fatal(err)
		}
	}
	button := fmt.Sprintf("[data-copy=%q]", id)
	// The button says so for 1.5 s, which a look now and then can miss.
	js[chromedp.Void](p, `void (() => {
		const button = document.querySelector(%s), words = globalThis.words = [];
		const note = () => button.checkVisibility() && words.push(button.innerText.trim());
		new MutationObserver(note).observe(button, { childList: true, characterData: true, subtree: true });
		document.getElementById("status").textContent = "";
	})()`, button)
	p.run(chromedp.Click(chromedp.CSS(button)))
	p.until("word that it is copied", func() bool { return js[bool](p, `words.includes("Copied")`) && p.text("#status") != "" })
	text, err := chromedp.Run(p.ctx, chromedp.Evaluate[string](`navigator.clipboard.readText()`, chromedp.EvalAwaitPromise))
	if err != nil {
		p.t.Fatal(err)
	}
	return text
}

// TestShared opens the page below a path, where functions share its origin: it asks
// for no secret, sends nothing, and says how to get to the builder's own host.
func TestShared(t *testing.T) {
	_, f := stack.Test(t, stack.FunctionConfig{})
	for _, path := range []string{"/function/builder", "/function/builder/", "/a/b"} {
		url, sent := behind(t, f, f.URL, path, nil)
		p := open(t, url)
		shared(p)
		p.looks("shared")
		p.run(chromedp.KeyEvent("\t"))
		if got := js[string](p, `document.activeElement.dataset.copy ?? document.activeElement.tagName`); got != "forward" {
			t.Errorf("%s: Tab leads to %q", path, got)
		}
		for id, want := range map[string]string{
			"forward":   "kubectl port-forward -n openfaas-fn svc/builder 8081:8080",
			"forwarded": "http://127.0.0.1:8081/",
		} {
			if got := p.copied(id); got != want {
				t.Errorf("%s: the button of %s copies %q, not %q", path, id, got, want)
			}
		}
		if n := sent.count(); n != 1 {
			t.Errorf("%s: %d requests, not that of the document alone", path, n)
		}
	}
}

// shared wants the page to have nothing to build with, and to say why.
func shared(p *tab) {
	p.t.Helper()
	for _, want := range []string{"every function answers below it", "Do not enter the payload secret", "an Ingress with a host of its own"} {
		if got := p.text("#shared"); !strings.Contains(got, want) {
			p.t.Errorf("%q is not in %q", want, got)
		}
	}
	if got := js[[]string](p, `[...document.querySelectorAll("input, textarea, form")].map((e) => e.outerHTML.slice(0, 100))`); len(got) > 0 {
		p.t.Errorf("the page has %q", got)
	}
}

// TestKeyboard goes through the form with Tab alone: every control is reached, in the
// order in which it is read, and shows that it is; a key opens the file choosers.
func TestKeyboard(t *testing.T) {
	_, _, url := start(t, stack.FunctionConfig{})
	p := open(t, url)
	if _, err := chromedp.Call(p.ctx, page.SetInterceptFileChooserDialog, page.SetInterceptFileChooserDialogParams{Enabled: true}); err != nil {
		t.Fatal(err)
	}
	choosers := make(chan struct{}, 2)
	if err := chromedp.Listen(p.ctx, func(event any) {
		if _, ok := event.(*page.EventFileChooserOpened); ok {
			choosers <- struct{}{}
		}
	}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"folder", "archive", "image", "secret", "tenant", "args", "platforms", "SUMMARY", "submit"} {
		p.run(chromedp.KeyEvent("\t"))
		if got := js[string](p, `document.activeElement.id || document.activeElement.tagName`); got != want {
			t.Fatalf("Tab leads to %q, not %q", got, want)
		}
		// A file input is not seen, its label is.
		if !js[bool](p, `(() => {
			const e = document.activeElement;
			const { outlineStyle, outlineWidth } = getComputedStyle(e.type === "file" ? e.labels[0] : e);
			return outlineStyle !== "none" && parseFloat(outlineWidth) >= 2;
		})()`) {
			t.Errorf("%s does not show that it has the focus", want)
		}
		p.shoot("focus-" + want)
		if want != "folder" && want != "archive" {
			continue
		}
		p.run(chromedp.KeyEvent(" "))
		select {
		case <-choosers:
		case <-time.After(time.Minute):
			t.Errorf("%s: a space opens no file chooser", want)
		}
	}
}

// TestFailure shows the error with the Dockerfile's lines, and what a build
// prints as text, whatever it is.
func TestFailure(t *testing.T) {
	s, f, url := start(t, stack.FunctionConfig{})
	p := open(t, url)
	p.choose("folder", stack.Context(t, map[string]string{
		"Dockerfile": "FROM busybox\nRUN echo '<b id=bold>bold</b><img src=x onerror=alert(1)>'\nRUN echo almost; exit 7\n",
	}))
	p.submit(s.Registry.Image("page/fails:v1"), f.Secret)
	if title := p.ended(); title != "Failed" {
		t.Fatalf("the build ended %q", title)
	}
	if got := p.text("#failure-text"); !strings.Contains(got, "exit code 7") || !strings.Contains(got, "RUN echo almost") {
		t.Errorf("the error is %q", got)
	}
	if got := p.texts("#failure-source .blamed"); len(got) != 1 || !strings.Contains(got[0], "3 | >>> RUN echo almost; exit 7") {
		t.Errorf("the Dockerfile's lines are %q", p.text("#failure-source"))
	}
	if got := p.texts("#steps .failed .name"); len(got) != 1 || !strings.Contains(got[0], "exit 7") {
		t.Errorf("failed steps are %q", got)
	}
	if !slices.Contains(p.texts("#lines .l"), "<b id=bold>bold</b><img src=x onerror=alert(1)>") || js[bool](p, `document.getElementById("bold") !== null`) {
		t.Errorf("the log is %q", p.text("#lines"))
	}
	p.looks("failed")
}

func TestWrongSecret(t *testing.T) {
	s, _, url := start(t, stack.FunctionConfig{})
	p := open(t, url, "status of 401")
	p.choose("folder", stack.Context(t, map[string]string{"Dockerfile": "FROM scratch\n"}))
	p.fill("image", s.Registry.Image("page/unsigned:v1"))

	p.click("submit")
	if got := p.text("#secret-error"); !strings.Contains(got, "signed requests only") {
		t.Errorf("without a secret: %q", got)
	}
	p.fill("secret", "another")
	p.click("submit")
	if title := p.ended(); title != "Refused" {
		t.Errorf("the build ended %q", title)
	}
	if got := p.text("#failure"); !strings.Contains(got, "not signed with the payload secret") {
		t.Errorf("the error is %q", got)
	}
	if js[string](p, `document.getElementById("secret").ariaInvalid`) != "true" {
		t.Error("the secret's field is not marked")
	}
	p.looks("refused")
}

func TestCancel(t *testing.T) {
	s, f, url := start(t, stack.FunctionConfig{})
	p := open(t, url)
	p.choose("folder", stack.Context(t, map[string]string{"Dockerfile": "FROM busybox\nRUN echo waits; sleep 1000\n"}))
	p.fill("image", s.Registry.Image("page/canceled:v1"))
	p.fill("secret", f.Secret)
	p.run(chromedp.SendKeys(chromedp.ID("secret"), "\r"))
	p.line("waits")
	if steps, err := s.Buildkitd.Steps(); err != nil || len(steps) == 0 {
		t.Fatalf("the daemon runs %q, %v", steps, err)
	}
	if got := js[string](p, `document.activeElement.id`); got != "cancel" {
		t.Errorf("the focus is on %q while a build runs", got)
	}
	p.run(chromedp.KeyEvent("\r"))
	if title := p.ended(); title != "Canceled" {
		t.Errorf("the build ended %q", title)
	}
	p.until("end of the step", func() bool {
		steps, err := s.Buildkitd.Steps()
		return err == nil && len(steps) == 0
	})
	if got := js[string](p, `document.activeElement.id`); got != "build-title" {
		t.Errorf("the focus is on %q when it has ended", got)
	}
	p.looks("canceled")
}

// TestLost cuts a stream off as a proxy's timeout does: cleanly.
func TestLost(t *testing.T) {
	s, f := stack.Test(t, stack.FunctionConfig{})
	url, _ := behind(t, f, f.URL, "/", func(res *http.Response) error {
		if strings.HasPrefix(res.Header.Get("Content-Type"), "application/x-ndjson") {
			res.Body = struct {
				io.Reader
				io.Closer
			}{&untilLog{r: res.Body}, res.Body}
		}
		return nil
	})
	p := open(t, url)
	p.choose("folder", stack.Context(t, map[string]string{"Dockerfile": "FROM busybox\nRUN sleep 600\n"}))
	p.submit(s.Registry.Image("page/lost:v1"), f.Secret)
	if title := p.ended(); title != "Connection lost" {
		t.Errorf("the build ended %q", title)
	}
	if p.text("#success") != "" || !strings.Contains(p.text("#failure"), "before the builder said") {
		t.Errorf("the page shows %q", p.text("#build"))
	}
	p.looks("lost")
}

// untilLog ends after the first read that brought something.
type untilLog struct {
	r    io.Reader
	done bool
}

func (u *untilLog) Read(b []byte) (int, error) {
	if u.done {
		return 0, io.EOF
	}
	n, err := u.r.Read(b)
	u.done = n > 0
	return n, err
}

// TestInsecure opens the page over plain http on a name that is not localhost.
func TestInsecure(t *testing.T) {
	_, _, url := start(t, stack.FunctionConfig{})
	p := open(t, strings.Replace(url, "127.0.0.1", "builder.test", 1),
		"Cross-Origin-Opener-Policy") // which needs https
	if got := p.text("#insecure"); !strings.Contains(got, "port-forward") || !strings.Contains(got, "https") {
		t.Errorf("the page says %q", got)
	}
	if !js[bool](p, `document.getElementById("submit").disabled`) || !js[bool](p, `document.getElementById("secret").matches(":disabled")`) {
		t.Error("a build can be started")
	}
	p.looks("insecure")
}

// TestArchives chooses tars: a context in one folder, with all that folders
// lose; and a complete request.
func TestArchives(t *testing.T) {
	s, f, url := start(t, stack.FunctionConfig{})
	p := open(t, url)

	dir := stack.Context(t, map[string]string{
		"app/Dockerfile": "FROM busybox\nCOPY . /src/\n",
		"app/tool":       "no script, but executable\n",
		"app/" + long:    "deep\n",
		"app/名前":         "names\n",
	})
	app := filepath.Join(dir, "app")
	for _, err := range []error{
		os.Chmod(filepath.Join(app, "tool"), 0o750),
		os.Symlink("tool", filepath.Join(app, "soft")),
		os.Link(filepath.Join(app, "tool"), filepath.Join(app, "hard")),
		os.Mkdir(filepath.Join(app, "hollow"), 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, format := range []string{"pax", "gnu"} {
		archive := filepath.Join(t.TempDir(), "app.tar.gz")
		command(t, "tar", "--format="+format, "-C", dir, "-czf", archive, "app")
		p.choose("archive", archive)
		if got := p.text("#chosen-notes"); !strings.Contains(got, "lies in app/") {
			t.Errorf("%s: the page says %q", format, got)
		}
		ref := s.Registry.Image("page/archive:" + format)
		p.submit(ref, f.Secret)
		p.pushed()
		checkArchive(t, format, stack.MustFiles(t, stack.MustPull(t, t.Context(), ref)))
		p.click("clear")
	}

	ref := s.Registry.Image("page/whole:v1")
	body := stack.MustTar(t, app, map[string]any{"image": ref, "labels": map[string]string{"from": "a complete request"}})
	var compressed bytes.Buffer
	w := gzip.NewWriter(&compressed)
	w.Write(body)
	w.Close()
	whole := filepath.Join(t.TempDir(), "whole.tgz")
	if err := os.WriteFile(whole, compressed.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	p.choose("archive", whole)
	if got := p.text("#chosen-notes"); !strings.Contains(got, "complete request") || !strings.Contains(got, ref) || p.text("label[for=image]") != "" {
		t.Errorf("the page says %q, and asks for %q", got, p.text("label[for=image]"))
	}
	p.looks("whole")
	p.click("submit")
	if title := p.ended(); title != "Pushed" || p.text("#out-image") != ref {
		t.Fatalf("the build ended %q: %s", title, p.text("#build"))
	}

	for name, content := range map[string]string{"text.tar": "no archive at all", "cut.tar": string(body[:len(body)-4096]), "zip.gz": "\x1f\x8bno"} {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if p.text("#clear") != "" {
			p.click("clear")
		}
		p.run(chromedp.SetUploadFiles(chromedp.ID("archive"), []string{path}))
		p.until("error of "+name, func() bool { return strings.Contains(p.text("#source-error"), "cannot be read") })
		p.run(chromedp.SetUploadFiles(chromedp.ID("archive"), []string{whole}))
		p.until("another choice", func() bool { return p.text("#chosen-name") == "whole.tgz" })
	}
}

// checkArchive holds an image's files to the archive that TestArchives packs.
func checkArchive(t *testing.T, format string, files map[string]*stack.File) {
	t.Helper()
	tool, soft, hard := files["src/tool"], files["src/soft"], files["src/hard"]
	if tool == nil || soft == nil || hard == nil {
		t.Fatalf("%s: the executable is %v, the symbolic link %v, the hard link %v", format, tool, soft, hard)
	}
	if tool.Mode&0o777 != 0o750 {
		t.Errorf("%s: the executable is %v", format, tool)
	}
	if soft.Typeflag != tar.TypeSymlink || soft.Linkname != "tool" {
		t.Errorf("%s: the symbolic link is %v", format, soft)
	}
	if hard.Typeflag != tar.TypeLink && tool.Typeflag != tar.TypeLink {
		t.Errorf("%s: the hard link is %v", format, hard)
	}
	if files["src/hollow"] == nil && files["src/hollow/"] == nil {
		t.Errorf("%s: the empty directory is missing", format)
	}
	for name, want := range map[string]string{"src/" + long: "deep\n", "src/名前": "names\n"} {
		if file := files[name]; file == nil || string(file.Content) != want {
			t.Errorf("%s: %s is %v", format, name, file)
		}
	}
}

// TestSparse: what a sparse archive would come to is not what was packed.
func TestSparse(t *testing.T) {
	_, _, url := start(t, stack.FunctionConfig{})
	p := open(t, url)
	dir := stack.Context(t, map[string]string{"app/Dockerfile": "FROM scratch\nCOPY . /\n", "app/holes": ""})
	if err := os.Truncate(filepath.Join(dir, "app", "holes"), 1<<20); err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "app.tar")
	command(t, "tar", "--sparse", "--format=posix", "-C", dir, "-cf", archive, "app")
	p.run(chromedp.SetUploadFiles(chromedp.ID("archive"), []string{archive}))
	p.until("refusal", func() bool { return strings.Contains(p.text("#source-error"), "sparse files") })
}

// TestChosenLast has an archive that is still being read when a folder is chosen.
func TestChosenLast(t *testing.T) {
	s, f, url := start(t, stack.FunctionConfig{})
	p := open(t, url)
	js[chromedp.Void](p, `void (() => {
		const real = DecompressionStream;
		globalThis.DecompressionStream = class {
			constructor(format) {
				const stream = new real(format);
				this.writable = stream.writable;
				this.readable = stream.readable.pipeThrough(new TransformStream({ flush: () => new Promise((go) => (globalThis.letGo = go)) }));
			}
		};
	})()`)
	archive := filepath.Join(t.TempDir(), "slow.tar.gz")
	command(t, "tar", "-C", stack.Context(t, map[string]string{"Dockerfile": "FROM scratch\n"}), "-czf", archive, ".")
	p.run(chromedp.SetUploadFiles(chromedp.ID("archive"), []string{archive}))
	p.until("end of what is read", func() bool { return js[bool](p, `"letGo" in globalThis`) })
	// Under the name that BuildKit takes as well.
	dir := stack.Context(t, map[string]string{"dockerfile": "FROM scratch\nCOPY dockerfile /the-folder\n"})
	p.choose("folder", dir)
	js[chromedp.Void](p, `void letGo()`)
	time.Sleep(500 * time.Millisecond)
	if name, problem := p.text("#chosen-name"), p.text("#source-error"); !strings.Contains(name, filepath.Base(dir)) || problem != "" {
		t.Errorf("chosen is %q, %q", name, problem)
	}
	ref := s.Registry.Image("page/last:v1")
	p.submit(ref, f.Secret)
	p.pushed()
	img := stack.MustPull(t, t.Context(), ref)
	if files, err := stack.Files(img); err != nil || files["the-folder"] == nil {
		t.Errorf("built from something else: %v, %v", files, err)
	}
}

// TestDrop drops a folder, which is read again for the second build.
func TestDrop(t *testing.T) {
	s, f, url := start(t, stack.FunctionConfig{})
	p := open(t, url)
	dir := stack.Context(t, map[string]string{"handler.go": "package function\n"})
	if err := os.Mkdir(filepath.Join(dir, "hollow"), 0o755); err != nil {
		t.Fatal(err)
	}
	p.drop(dir)
	p.until("error", func() bool { return strings.Contains(p.text("#source-error"), "no Dockerfile") })
	if err := stack.WriteContext(dir, map[string]string{"Dockerfile": "FROM busybox\nCOPY . /src/\n"}); err != nil {
		t.Fatal(err)
	}
	ref := s.Registry.Image("page/dropped:v1")
	p.submit(ref, f.Secret)
	p.pushed()
	img := stack.MustPull(t, t.Context(), ref)
	files := stack.MustFiles(t, img)
	if files["src/handler.go"] == nil || files["src/hollow"] == nil && files["src/hollow/"] == nil {
		t.Errorf("the image lacks the file or the empty directory")
	}
}

func (p *tab) drop(path string) {
	p.t.Helper()
	data := &input.DragData{Items: []*input.DragDataItem{}, Files: []string{path}, DragOperationsMask: 1}
	for _, event := range []input.DispatchDragEventType{
		input.DispatchDragEventTypeDragEnter, input.DispatchDragEventTypeDragOver, input.DispatchDragEventTypeDrop,
	} {
		if _, err := chromedp.Call(p.ctx, input.DispatchDragEvent, input.DispatchDragEventParams{Type: event, X: 200, Y: 300, Data: data}); err != nil {
			p.t.Fatal(err)
		}
	}
}

// TestLongLog shows the end of a log that is too long to be shown, and stays
// where the reader is.
func TestLongLog(t *testing.T) {
	s, f, url := start(t, stack.FunctionConfig{})
	p := open(t, url)
	// In lumps below the rate at which buildkitd clips a step's output.
	lumps := func(n int) string {
		return fmt.Sprintf("RUN i=0; while [ $i -lt %d ]; do i=$((i+1)); for j in $(seq 100); do echo line $i.$j; done; sleep 0.2; done; ", n)
	}
	// While a step is held nothing moves but what the test moves.
	first, second := stack.Mark(), stack.Mark()
	p.choose("folder", stack.Context(t, stack.Dockerfile("FROM busybox",
		lumps(6)+"echo the first; sleep 600; : "+first,
		lumps(10)+"echo the second; sleep 600; : "+second,
		lumps(44)+"echo the last")))
	p.submit(s.Registry.Image("page/long:v1"), f.Secret)
	p.line("the first")
	atEnd := `(() => { const e = document.getElementById("log"); return e.scrollHeight - e.scrollTop - e.clientHeight < 2 })()`
	p.until("end of the log", func() bool { return js[bool](p, atEnd) })
	js[chromedp.Void](p, `void (document.getElementById("log").scrollTop = 100)`)
	p.until("button to follow", func() bool { return p.text("#follow") != "" })
	stack.Release(t, first, stack.Patience)
	p.line("the second")
	if js[bool](p, atEnd) {
		t.Error("the log follows though the reader scrolled up")
	}
	p.click("follow")
	stack.Release(t, second, stack.Patience)
	p.pushed()
	if !js[bool](p, atEnd) || !slices.Contains(p.texts("#lines .l"), "the last") {
		t.Error("the log does not follow again")
	}
	p.run(chromedp.EmulateViewport(390, 900))
	p.until("end of the log in a narrow window", func() bool { return js[bool](p, atEnd) })
	if n := js[int](p, `document.getElementById("lines").childElementCount`); n > 4000 || !strings.Contains(p.text("#dropped"), "not shown") {
		t.Errorf("%d lines are shown, %q", n, p.text("#dropped"))
	}
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}
