package tenants_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/openfaas/go-sdk/builder"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// crowd adds tenants of eight keys, the most that one may have, until there are n keys.
func (h *house) crowd(n int) {
	for _, t := range h.file.Tenants {
		n -= len(t.Keys)
	}
	for i := 0; n > 0; i++ {
		name := fmt.Sprintf("crowd-%d-%s", i, h.acme.Name)
		other := stack.NewTenant(name, h.s.Registry.Image(name))
		other.Keys = nil
		for k := range min(n, 8) {
			key := stack.NewTenant("").Keys[0]
			key.ID = fmt.Sprint("k", k)
			other.Keys = append(other.Keys, key)
		}
		n -= len(other.Keys)
		h.file.Tenants[name] = other
	}
}

// crowded is a house with so many keys that a request without a name has to say with its
// image whose it is.
func crowded(t *testing.T) *house {
	t.Helper()
	return newHouse(t, func(h *house, c *stack.FunctionConfig) {
		h.acme.Hosts = []string{h.acme.Name + ".builder.example.com", "acme.example.com:8443"}
		h.globex.Hosts = []string{h.globex.Name + ".builder.example.com"}
		h.crowd(9)
	})
}

// nameless is a client that signs with a tenant's key and does not say whose it is.
func (h *house) nameless(of *stack.Tenant) *client.Client {
	c := h.of(of)
	c.Tenant = ""
	return c
}

// unsaid is a request that does not say whose it is: it has no image.
func unsaid(t *testing.T) []byte {
	return body(t, config{"skipPush": true}, "FROM scratch", "LABEL a=b")
}

func host(name string) client.Change { return func(req *http.Request) { req.Host = name } }

// TestHints has each hint say whose a request is. The key decides.
func TestHints(t *testing.T) {
	t.Parallel()
	h := crowded(t)
	acme, globex := h.nameless(h.acme), h.nameless(h.globex)
	at := h.acme.Hosts[0]
	for _, test := range []struct {
		name    string
		changes []client.Change
		ours    bool // it is acme's hint
	}{
		{"header", []client.Change{client.Header("X-Build-Tenant", h.acme.Name)}, true},
		{"host", []client.Change{host(at)}, true},
		{"host with a port", []client.Change{host(at + ":443")}, true},
		{"host in capitals", []client.Change{host(strings.ToUpper(at))}, true},
		{"host with a dot", []client.Change{host(at + ".")}, true},
		{"a host's own port", []client.Change{host("acme.example.com:8443")}, true},
		{"forwarded host", []client.Change{client.Header("X-Forwarded-Host", at)}, true},
		{"forwarded host before host", []client.Change{client.Header("X-Forwarded-Host", at), host(h.globex.Hosts[0])}, true},
		{"header before host", []client.Change{client.Header("X-Build-Tenant", h.acme.Name), host(h.globex.Hosts[0])}, true},
		{"header, not host", []client.Change{client.Header("X-Build-Tenant", h.globex.Name), host(at)}, false},
		{"an unknown name, not host", []client.Change{client.Header("X-Build-Tenant", "nobody"), host(at)}, false},
		{"two names", []client.Change{func(req *http.Request) { req.Header["X-Build-Tenant"] = []string{h.acme.Name, h.acme.Name} }}, false},
		{"no hint", nil, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			request := unsaid(t)
			if a := acme.MustPost(t, within(t), request, test.changes...); (a.Status == "success") != test.ours || !test.ours && a.Code != "unauthorized" {
				t.Errorf("acme: %v", a)
			}
			// Whose hint it is grants nothing.
			if test.ours {
				globex.MustPost(t, within(t), request, test.changes...).WantFailed(t, "unauthorized", "X-Build-Tenant")
			}
		})
	}

	envelope := func(c *client.Client, request []byte, more string) []byte {
		return fmt.Appendf(nil, `{"signature":%q,"tar":%q%s}`, client.Sign(c.Secret, request), base64.StdEncoding.EncodeToString(request), more)
	}
	named := fmt.Sprintf(`,"tenant":%q`, h.acme.Name)
	request := unsaid(t)
	acme.MustPost(t, within(t), envelope(acme, request, named)).WantSuccess(t)
	acme.MustPost(t, within(t), envelope(acme, request, "")).WantFailed(t, "unauthorized")
	globex.MustPost(t, within(t), envelope(globex, request, named)).WantFailed(t, "unauthorized")
	// As the UI sends it: the image in the tar says it, whatever form the tar has.
	for form, packed := range packed(t, body(t, app(h.acme), "FROM scratch", "LABEL a=b")) {
		if a := acme.MustPost(t, within(t), envelope(acme, packed, "")); a.Status != "success" {
			t.Errorf("the envelope of a tar as %s: %v", form, a)
		}
	}
}

// packed are the forms of a tar.
func packed(t *testing.T, tar []byte) map[string][]byte {
	t.Helper()
	var zipped bytes.Buffer
	zw := gzip.NewWriter(&zipped)
	zw.Write(tar)
	zw.Close()
	e, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{"tar": tar, "gzip": zipped.Bytes(), "zstd": e.EncodeAll(tar, nil)}
}

// TestImageSays: among more than eight keys the config's image says whose a request is.
func TestImageSays(t *testing.T) {
	t.Parallel()
	h := crowded(t)
	acme, globex := h.nameless(h.acme), h.nameless(h.globex)
	dockerfile := []string{"FROM scratch", "LABEL a=b"}
	for form, request := range packed(t, body(t, app(h.acme), dockerfile...)) {
		acme.MustPost(t, within(t), request).WantSuccess(t)
		globex.MustPost(t, within(t), request).WantFailed(t, "unauthorized", "X-Build-Tenant")
		t.Logf("%s: %d bytes", form, len(request))
	}
	// Tags are not asked: the first image says it, and each is compared with what may be.
	c := app(h.acme)
	c["tags"] = []string{h.globex.Images[0] + "/app:v1"}
	acme.MustPost(t, within(t), body(t, c, dockerfile...)).WantFailed(t, "image_forbidden")
	globex.MustPost(t, within(t), body(t, c, dockerfile...)).WantFailed(t, "unauthorized")
	for name, image := range map[string]string{
		"of nobody":     h.s.Registry.Image("nobody/app:v1"),
		"a name longer": h.acme.Images[0] + "2/app:v1",
		"no reference":  "A B",
	} {
		if a := acme.MustPost(t, within(t), body(t, config{"image": image}, dockerfile...)); a.Code != "unauthorized" {
			t.Errorf("an image %s: %v", name, a)
		}
	}
	// Larger than what is kept in memory, with the config behind all of it, as go-sdk
	// packs it.
	large := stack.Context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY large /\n", "large": strings.Repeat(mark(), 300_000)})
	request, err := stack.Pack(large, &builder.BuildConfig{Image: h.acme.Images[0] + "/large:v1"})
	if err != nil {
		t.Fatal(err)
	}
	acme.MustPost(t, within(t), request).WantSuccess(t)
	globex.MustPost(t, within(t), request).WantFailed(t, "unauthorized")

	// What has no image has to name the tenant.
	acme.MustPost(t, within(t), unsaid(t)).WantFailed(t, "unauthorized", "X-Build-Tenant")
	if a := acme.MustVerdict(t, within(t), "some-id"); a.Code != "unauthorized" {
		t.Errorf("GET /builds without a name: %v", a)
	}
	if a := h.of(h.acme).MustVerdict(t, within(t), "some-id"); a.Code != "not_found" {
		t.Errorf("GET /builds with a name: %v", a)
	}
}

// TestFewKeys: up to eight keys are all tried.
func TestFewKeys(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) { h.crowd(8) })
	for _, of := range []*stack.Tenant{h.acme, h.globex} {
		h.nameless(of).MustPost(t, within(t), unsaid(t)).WantSuccess(t)
		h.nameless(of).MustPost(t, within(t), body(t, app(of), "FROM scratch", "LABEL a=b")).WantSuccess(t)
		if a := h.nameless(of).MustVerdict(t, within(t), "some-id"); a.Code != "not_found" {
			t.Errorf("GET /builds: %v", a)
		}
	}
	// The image is another's, and the key says who asks: no 401.
	h.nameless(h.acme).MustPost(t, within(t), body(t, app(h.globex), "FROM scratch")).WantFailed(t, "image_forbidden")
	h.write(t) // with one key more
	h.nameless(h.acme).MustPost(t, within(t), unsaid(t)).WantFailed(t, "unauthorized")
}

// duration is what is different in each answer.
var duration = regexp.MustCompile(`"duration":\s*[0-9.e-]+`)

// refusal is what a client sees of an answer, without what is different in each.
func refusal(a client.Answer) string {
	header := a.Header.Clone()
	header.Del("Date")
	header.Del("X-Call-Id")
	header.Del("Content-Length") // the duration's digits
	return fmt.Sprintf("HTTP %d %v %s", a.StatusCode, header, duration.ReplaceAllString(a.Body, "duration"))
}

// TestOneRefusal: whatever is wrong with who asks, the answer has the same bytes.
func TestOneRefusal(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		h.acme.Keys = append(h.acme.Keys, stack.TenantKey{ID: "old", Secret: stack.NewTenant("").Key(), Until: "2020-01-31T00:00:00Z"})
		h.acme.Keys = append(h.acme.Keys, stack.TenantKey{ID: "new", Secret: stack.NewTenant("").Key(), Until: "2099-01-31T00:00:00Z"})
		gone := stack.NewTenant("gone-"+h.acme.Name, h.s.Registry.Image("gone-"+h.acme.Name))
		gone.Suspended = true
		h.file.Tenants[gone.Name] = gone
		h.crowd(9)
	})
	acme, nobody := h.of(h.acme), stack.NewTenant("nobody").Key()
	if a := h.ask(t, h.acme, h.acme.Keys[2].Secret); a.Code != "not_found" {
		t.Errorf("a key that has not expired: %v", a)
	}
	named := func(name, key string) *client.Client {
		c := *acme
		c.Tenant, c.Secret = name, key
		return &c
	}
	cases := map[string]*client.Client{
		"a wrong key":                     named(h.acme.Name, nobody),
		"an expired key":                  named(h.acme.Name, h.acme.Keys[1].Secret),
		"another's key":                   named(h.acme.Name, h.globex.Key()),
		"the payload secret":              named(h.acme.Name, h.s.PayloadSecret),
		"an unknown tenant":               named("nobody", h.acme.Key()),
		"no tenant, the payload secret":   named("", h.s.PayloadSecret),
		"no tenant, a wrong key":          named("", nobody),
		"the id in place of the name":     named(h.acme.ID, h.acme.Key()),
		"a suspended tenant, a wrong key": named("gone-"+h.acme.Name, nobody),
		"no name at all":                  named("../../etc", h.acme.Key()),
	}
	for kind, ask := range map[string]func(c *client.Client) client.Answer{
		"build": func(c *client.Client) client.Answer {
			return c.MustPost(t, within(t), body(t, app(h.acme), "FROM scratch"), client.Header("X-Call-Id", "one"))
		},
		"stream": func(c *client.Client) client.Answer {
			return c.MustPost(t, within(t), body(t, app(h.acme), "FROM scratch"), client.Header("X-Call-Id", "one"), client.Accept(client.NDJSON))
		},
		"verdict": func(c *client.Client) client.Answer { return c.MustVerdict(t, within(t), "one") },
		"context": func(c *client.Client) client.Answer {
			req := c.MustRequest(t, within(t), []byte("x"), client.Header("X-Call-Id", "one"))
			req.Method, req.URL.Path = http.MethodPut, "/contexts/sha256:"+strings.Repeat("0", 64)
			return c.MustFetch(t, req)
		},
	} {
		want := ""
		for name, c := range cases {
			got := refusal(ask(c))
			if want == "" {
				want = got
				t.Logf("%s: %s", kind, got)
			}
			if got != want || !strings.Contains(got, "HTTP 401") || !strings.Contains(got, "X-Build-Tenant") {
				t.Errorf("%s, %s:\n%s\nand not\n%s", kind, name, got, want)
			}
		}
	}
}

// TestExpires: a key ends by itself, at its time.
func TestExpires(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) {
		h.acme.Keys = append(h.acme.Keys, stack.TenantKey{ID: "k2", Secret: stack.NewTenant("").Key()})
	})
	until := time.Now().Add(5 * time.Second).Truncate(time.Second)
	h.acme.Keys[1].Until = until.UTC().Format(time.RFC3339)
	h.write(t)
	if a := h.ask(t, h.acme, h.acme.Keys[1].Secret); a.StatusCode == http.StatusUnauthorized && time.Now().Before(until) {
		t.Errorf("before its end: %v", a)
	}
	time.Sleep(time.Until(until) + 100*time.Millisecond)
	if a := h.ask(t, h.acme, h.acme.Keys[1].Secret); a.StatusCode != http.StatusUnauthorized {
		t.Errorf("after its end: %v", a)
	}
	if a := h.ask(t, h.acme, h.acme.Key()); a.StatusCode != http.StatusNotFound {
		t.Errorf("the other key: %v", a)
	}
}

// TestAnswersAreSigned: an answer is signed with the key that signed the request.
func TestAnswersAreSigned(t *testing.T) {
	t.Parallel()
	h := crowded(t)
	for _, of := range []*stack.Tenant{h.acme, h.globex} {
		a := h.nameless(of).MustPost(t, within(t), body(t, app(of), "FROM scratch", "LABEL a=b"))
		if got, want := a.Header.Get("X-Build-Signature"), client.Sign(of.Key(), []byte(a.Body)); got != want {
			t.Errorf("%s: signed %s, want %s", of.Name, got, want)
		}
		var record client.Record
		if err := json.Unmarshal([]byte(a.Body), &record); err != nil || record.ID == "" || record.Request == "" {
			t.Errorf("%s: %v, %s", of.Name, err, a.Body)
		}
	}
}

// TestSearchBomb: a search ends early in an archive that has its config behind hundreds of
// megabytes of nothing, so that nobody is found who could have signed it.
func TestSearchBomb(t *testing.T) {
	t.Parallel()
	h := newHouse(t, func(h *house, c *stack.FunctionConfig) { h.crowd(9) })
	bomb := bombOf(t, app(h.acme), 256<<20)
	acme := h.nameless(h.acme)
	began := time.Now()
	for _, accept := range []string{"", client.NDJSON} {
		acme.MustPost(t, within(t), bomb, client.Accept(accept)).WantFailed(t, "unauthorized", "X-Build-Tenant")
	}
	t.Logf("%d bytes, refused in %v", len(bomb), time.Since(began)/2)
	if names, unlinked, err := h.f.TempFiles(); err != nil || len(names) > 0 || unlinked > 0 {
		t.Errorf("left behind: %v, %d bytes, %v", names, unlinked, err)
	}
	// The tenant names itself, and the same archive is read.
	a := h.of(h.acme).MustPost(t, within(t), bomb)
	if a.Code == "unauthorized" {
		t.Errorf("named: %v", a)
	}
}

// bombOf is a small archive of zeros, with the config behind them.
func bombOf(t *testing.T, c config, zeros int64) []byte {
	t.Helper()
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	e, err := zstd.NewWriter(&b, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(e)
	write := func(name string, size int64, content io.Reader) {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(w, content, size); err != nil {
			t.Fatal(err)
		}
	}
	write("context/zeros", zeros, zeroes{})
	write("com.openfaas.docker.config", int64(len(text)), bytes.NewReader(text))
	if err := errors.Join(w.Close(), e.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// zeroes reads as zeros without end.
type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
