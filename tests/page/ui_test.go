package page_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/chromedp"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// envelope is what make envelope prints for a folder.
func envelope(t *testing.T, s *stack.Stack, f *stack.Function, folder, image string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "make", "-s", "-C", s.Repo, "envelope",
		"FUNCTION="+folder, "IMAGE="+image, "PAYLOAD_SECRET="+filepath.Join(f.SecretsDir, "payload-secret"))
	// Without those that a make above this test has set.
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "MAKE") && !strings.HasPrefix(v, "MFLAGS=") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("make envelope: %v", err)
	}
	return string(out)
}

// noTar is a signed envelope of something else.
func noTar(f *stack.Function) string {
	const text = "no tar"
	return fmt.Sprintf(`{"signature":%q,"tar":%q}`, client.Sign(f.Secret, []byte(text)), base64.StdEncoding.EncodeToString([]byte(text)))
}

// behindGateway returns a function behind OpenFaaS, which ends with the test.
func behindGateway(t *testing.T) (*stack.Stack, *stack.Function, string) {
	t.Helper()
	s, f := stack.Test(t, stack.FunctionConfig{})
	o, err := s.OpenFaaS(t.Context(), f, stack.OpenFaaSConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Kill)
	return s, f, o.URL
}

// ui is the OpenFaaS UI with builder selected.
type ui struct{ *tab }

func openUI(t *testing.T, gateway string, allowed ...string) ui {
	t.Helper()
	u := ui{open(t, gateway+"/ui/", append(allowed, "fonts.googleapis.com")...)}
	const item = `[...document.querySelectorAll("md-list-item")].find((e) => e.innerText.trim() === "builder")`
	u.until("builder in the list", func() bool { return js[bool](u.tab, item+` !== undefined`) })
	js[chromedp.Void](u.tab, `void `+item+`.querySelector("button").click()`)
	u.until("Invoke button", func() bool {
		return js[bool](u.tab, `document.querySelector("[ng-click='fireRequest()']")?.disabled === false`)
	})
	return u
}

// invoke pastes a body, presses Invoke, and returns what the UI then shows.
func (u ui) invoke(radio, body string) (status, response string) {
	u.t.Helper()
	const request, answer = `[ng-model="invocation.request"]`, `[ng-model="invocationStatus"]`
	u.run(chromedp.Click(chromedp.CSS(`md-radio-button[value="` + radio + `"]`)))
	js[chromedp.Void](u.tab, `void document.querySelector(%s).select()`, request)
	if _, err := chromedp.Call(u.ctx, input.InsertText, input.InsertTextParams{Text: body}); err != nil {
		u.t.Fatal(err)
	}
	u.run(chromedp.Click(chromedp.CSS(`[ng-click="fireRequest()"]`)))
	u.until("answer", func() bool {
		status = js[string](u.tab, `document.querySelector(%s).value`, answer)
		return status != ""
	})
	return status, js[string](u.tab, `document.querySelector("[ng-model=invocationResponse]").value`)
}

// TestUI builds in the gateway's own UI from what make envelope prints.
func TestUI(t *testing.T) {
	s, f, gateway := behindGateway(t)
	u := openUI(t, gateway, "status of 400", "status of 401", "status of 422")

	ref := s.Registry.Image("page/ui:v1")
	good := envelope(t, s, f, stack.Context(t, map[string]string{"Dockerfile": "FROM busybox\nCOPY . /src/\n", "run.sh": "#!/bin/sh\n"}), ref)
	for _, radio := range []string{"text", "json"} {
		status, response := u.invoke(radio, good)
		var got client.Record
		if err := json.Unmarshal([]byte(response), &got); err != nil || status != "200" || got.Status != "success" {
			t.Fatalf("%s: the UI shows %s and %s", radio, status, response)
		}
		img := stack.MustPull(t, t.Context(), ref)
		if digest, err := img.Digest(); err != nil || digest.String() != got.Digest {
			t.Errorf("%s: the UI shows %q, the registry has %v, %v", radio, got.Digest, digest, err)
		}
		if files, err := stack.Files(img); err != nil || files["src/run.sh"] == nil || files["src/run.sh"].Mode&0o111 == 0 {
			t.Errorf("%s: the script is %v, %v", radio, files["src/run.sh"], err)
		}
	}

	bad := envelope(t, s, f, stack.Context(t, map[string]string{"Dockerfile": "FROM busybox\nRUN echo almost; exit 7\n"}), ref)
	for _, tt := range []struct {
		body, status string
		holds        []string
	}{
		{bad, "422", []string{"Unprocessable Entity\n", "l: almost\n", "2 | >>> RUN echo almost; exit 7\n", "failed: build_failed"}},
		{noTar(f), "400", []string{"Bad Request\n", "failed: bad_tar"}},
		{"hello", "401", []string{"not signed with the payload secret", "failed: unauthorized"}},
	} {
		status, response := u.invoke("text", tt.body)
		if status != tt.status {
			t.Errorf("%.60s: the UI shows %s and %s", tt.body, status, response)
		}
		for _, want := range tt.holds {
			if !strings.Contains(response, want) || strings.Contains(response, "[object") {
				t.Errorf("%.60s: %q is not in %q", tt.body, want, response)
			}
		}
	}
	u.shoot("ui")
}

// TestGateway opens the page where the gateway has it, and then on a host of its own
// whose requests go through the gateway, as a FunctionIngress sends them: there it
// sees the lines of a build as they come.
func TestGateway(t *testing.T) {
	s, f, gateway := behindGateway(t)
	shared(open(t, gateway+"/function/builder"))
	url, _ := behind(t, f, gateway+"/function/builder", "/", nil)
	p := open(t, url)
	first, second := stack.Mark(), stack.Mark()
	p.choose("folder", stack.Context(t, stack.Dockerfile("FROM busybox",
		"RUN echo number 1; sleep 600; : "+first,
		"RUN echo number 2; sleep 600; : "+second)))
	p.submit(s.Registry.Image("page/gateway:v1"), f.Secret)
	for i, held := range []string{first, second} {
		line := fmt.Sprint("number ", i+1)
		p.line(line)
		if lines := p.texts("#lines .l"); p.text("#build-title") != "Building" || lines[len(lines)-1] != line {
			t.Errorf("%q came late: %q", line, lines)
		}
		stack.Release(t, held, stack.Patience)
	}
	p.pushed()
}

// TestUIRequests replays what the UI sends for each of its radio buttons.
func TestUIRequests(t *testing.T) {
	s, f := stack.Test(t, stack.FunctionConfig{})
	ref := s.Registry.Image("page/replayed:v1")
	good := envelope(t, s, f, stack.Context(t, map[string]string{"Dockerfile": "FROM busybox\n"}), ref)
	for contentType, errorType := range map[string]string{
		"text/plain":          "text/plain",
		"application/json":    "application/json",
		"binary/octet-stream": "application/json",
	} {
		for body, want := range map[string]int{good: 200, noTar(f): 400, "hello": 401} {
			a := f.MustPost(t, t.Context(), []byte(body), client.Signature(""), client.Header("Content-Type", contentType),
				client.Accept("application/json, text/plain, */*"), func(req *http.Request) { req.URL.Path = "/" })
			if a.StatusCode != want {
				t.Errorf("%s, %.20s: want HTTP %d, got %v", contentType, body, want, a)
			}
			form, wantForm := a.Header.Get("Content-Type"), errorType
			if want == 200 {
				wantForm = client.JSON
			}
			if !strings.HasPrefix(form, wantForm) || json.Valid([]byte(a.Body)) != (wantForm == client.JSON) {
				t.Errorf("%s, %.20s: the answer is %s: %s", contentType, body, form, a.Body)
			}
		}
	}
}
