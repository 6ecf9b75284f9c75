package clients_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// counter forwards connections to a daemon and counts them.
type counter struct {
	addr        string // tcp://host:port
	connections atomic.Int32
}

func count(t *testing.T, to string) *counter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	c := &counter{addr: "tcp://" + l.Addr().String()}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			c.connections.Add(1)
			out, err := net.Dial("tcp", strings.TrimPrefix(to, "tcp://"))
			if err != nil {
				in.Close()
				continue
			}
			go forward(out, in)
			go forward(in, out)
		}
	}()
	return c
}

func forward(to, from net.Conn) {
	io.Copy(to, from)
	to.Close()
}

// TestSignature sends what nobody has signed, in every form of a body and also
// broken: it is 401, and the daemon and the registry hear nothing of it.
func TestSignature(t *testing.T) {
	s := stack.Shared(t)
	daemon, registry := count(t, s.Buildkitd.Addr), count(t, s.Registry.Addr)
	ctx, _, f := start(t, stack.FunctionConfig{Env: map[string]string{"buildkit_addr": daemon.addr, "max_body_bytes": "1MiB"}})

	ref := strings.TrimPrefix(registry.addr, "tcp://") + "/signature:latest"
	plain := stack.Body(t, config{"image": ref}, copyOnly)
	gzipped := compressed(func(*testing.T, string) []byte { return plain }, "gzip")(t, "")
	zipped := compressed(func(*testing.T, string) []byte { return plain }, "zstd", "-q")(t, "")
	bodies := map[string][]byte{
		"tar":              plain,
		"gzip":             gzipped,
		"zstd":             zipped,
		"empty":            {},
		"not a tar":        []byte("hello"),
		"cut tar":          plain[:len(plain)/2],
		"cut gzip":         gzipped[:len(gzipped)/2],
		"cut zstd":         zipped[:len(zipped)/2],
		"trailing garbage": append(plain[:len(plain):len(plain)], 'x'),
		"bad config":       stack.Body(t, []byte("{"), copyOnly),
		"forbidden path":   output(t, stack.Context(t, map[string]string{"x": ""}), nil, "tar", "c", "--transform=s,x,context/../x,", "x"),
		"secrets":          stack.WithSecrets(t, plain, "not an envelope"),
	}
	good := func(body []byte) string { return client.Sign(f.Secret, body) }
	signatures := map[string]func(body []byte) []string{
		"none":            func([]byte) []string { return nil },
		"empty":           func([]byte) []string { return []string{""} },
		"wrong":           func(b []byte) []string { return []string{flip(good(b))} },
		"of another body": func(b []byte) []string { return []string{good(append(b[:len(b):len(b)], 0))} },
		"truncated":       func(b []byte) []string { return []string{good(b)[:len("sha256=")+63]} },
		"too long":        func(b []byte) []string { return []string{good(b) + "0"} },
		"doubled":         func(b []byte) []string { return []string{good(b), good(b)} },
		"doubled in one":  func(b []byte) []string { return []string{good(b) + ", " + good(b)} },
		"sha1":            func(b []byte) []string { return []string{"sha1=" + good(b)[len("sha256="):][:40]} },
		"no prefix":       func(b []byte) []string { return []string{good(b)[len("sha256="):]} },
		"not hex":         func(b []byte) []string { return []string{good(b)[:len("sha256=")+63] + "g"} },
		"other key":       func(b []byte) []string { return []string{client.Sign("another key", b)} },
		"empty key":       func(b []byte) []string { return []string{client.Sign("", b)} },
	}
	refused := func(t *testing.T, body []byte, signature []string) {
		t.Helper()
		got := f.MustPost(t, ctx, body, func(req *http.Request) { req.Header["X-Build-Signature"] = signature })
		if got.StatusCode != http.StatusUnauthorized || got.Code != "unauthorized" {
			t.Errorf("got %v", got)
		}
		if sig := got.Header.Get("X-Build-Signature"); sig != "" {
			t.Errorf("the refusal is signed: %s", sig)
		}
	}
	t.Run("header", func(t *testing.T) {
		for bodyName, body := range bodies {
			for name, sign := range signatures {
				t.Run(bodyName+" "+name, func(t *testing.T) {
					t.Parallel()
					refused(t, body, sign(body))
				})
			}
		}
	})
	t.Run("envelope", func(t *testing.T) {
		for bodyName, body := range bodies {
			for name, sign := range signatures {
				values := sign(body)
				if len(values) > 1 {
					continue // there is one key in an envelope
				}
				fields := map[string]string{"tar": base64.StdEncoding.EncodeToString(body)}
				if len(values) == 1 {
					fields["signature"] = values[0]
				}
				text := jsonOf(t, fields)
				t.Run(bodyName+" "+name, func(t *testing.T) {
					t.Parallel()
					refused(t, text, nil)
					// One in the header counts for nothing.
					refused(t, text, []string{good(text)})
					refused(t, text, []string{good(body)})
				})
			}
		}
		wrong := flip(good(nil))
		for name, text := range map[string]string{
			"cut":           `{"signature":"` + wrong + `","tar":"`,
			"not base64":    `{"signature":"` + wrong + `","tar":"*"}`,
			"no tar":        `{"signature":"` + wrong + `"}`,
			"signed twice":  `{"signature":"` + wrong + `","signature":"` + good(nil) + `","tar":""}`,
			"more after it": `{"signature":"` + wrong + `","tar":""} x`,
			"nothing in it": `{}`,
		} {
			t.Run(name, func(t *testing.T) { refused(t, []byte(text), nil) })
		}
	})
	t.Run("too large", func(t *testing.T) {
		// The only thing that is said before: whoever reads that much has to know.
		body := make([]byte, 2<<20)
		got := f.MustPost(t, ctx, body, client.Signature(flip(good(body))))
		if got.StatusCode != http.StatusRequestEntityTooLarge || got.Code != "too_large" {
			t.Errorf("got %v", got)
		}
	})

	if n := daemon.connections.Load(); n != 0 {
		t.Errorf("buildkitd was connected to %d times for requests that nobody signed", n)
	}
	if n := registry.connections.Load(); n != 0 {
		t.Errorf("the registry was connected to %d times for requests that nobody signed", n)
	}
	// They would have been seen.
	f.MustBuild(t, ctx, plain)
	if daemon.connections.Load() == 0 || registry.connections.Load() == 0 {
		t.Error("a build was not seen on its way to buildkitd and to the registry")
	}
}

// TestDisableHMAC builds what nobody has signed, where that is asked for, and says
// so at the start, whatever log_level is.
func TestDisableHMAC(t *testing.T) {
	const warning = "disable_hmac is set"
	for _, off := range []bool{true, false} {
		// Where nothing is signed no key is needed.
		c := stack.FunctionConfig{Env: map[string]string{"disable_hmac": fmt.Sprint(off), "log_level": "error"}}
		if off {
			c.Secrets = map[string][]byte{"payload-secret": nil}
		}
		ctx, s, f := start(t, c)
		log, err := f.Log()
		if err != nil {
			t.Fatal(err)
		}
		warned := slices.ContainsFunc(strings.Split(log, "\n"), func(line string) bool {
			return strings.Contains(line, warning) && strings.Contains(line, `"level":"warn"`)
		})
		if warned != off {
			t.Errorf("disable_hmac=%v: warned is %v", off, warned)
		}
		ref := s.Registry.Image("disable-hmac:latest")
		body := stack.Body(t, config{"image": ref}, copyOnly)
		for name, values := range map[string][]string{"none": nil, "another's": {client.Sign("another", body)}, "malformed": {"x"}} {
			a := f.MustPost(t, ctx, body, func(req *http.Request) { req.Header["X-Build-Signature"] = values })
			want := http.StatusUnauthorized
			if off {
				want = http.StatusOK
			}
			if a.StatusCode != want || a.Header.Get("X-Build-Signature") != "" {
				t.Errorf("disable_hmac=%v, %s: signed %q, got %v", off, name, a.Header.Get("X-Build-Signature"), a)
			} else if off {
				pull(t, ctx, ref, a.Digest)
			}
		}
	}
}

// flip changes the last digit of a signature.
func flip(signature string) string {
	last := "0"
	if strings.HasSuffix(signature, last) {
		last = "1"
	}
	return signature[:len(signature)-1] + last
}

func jsonOf(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// pemKey is a file of several lines, each of which could be guessed or is one of every
// such key.
const pemKey = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIIrYSSNQFaA2Hwf1duRSxKtLYX5CB04fSeQ6tF1aY/PuoAoGCCqGSM49\nAwEHoUQDQgAEPR3tU2Fta9ktY+6P9G0cWO+0kETA6SFs38GecTyudlHz6xvCdz8q\n-----END EC PRIVATE KEY-----\n"

// TestKeys changes the secret's file while the function runs. Every answer in
// one piece is signed with the key that its request was.
func TestKeys(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	body := stack.Body(t, config{"image": s.Registry.Image("keys:latest")}, copyOnly)
	failing := stack.Body(t, config{"image": "UPPER"}, copyOnly)
	for _, test := range []struct {
		name, file string
		good, bad  []string
	}{
		{"one", "the-first-key--1", []string{"the-first-key--1"}, []string{"the-second-key-2", "", "the-first-key--"}},
		{"white space around it", " \tthe-first-key--1\r\n\n", []string{"the-first-key--1"}, []string{" \tthe-first-key--1\r\n\n", "the-first-key--1\n"}},
		{"two", "the-first-key--1\nthe-second-key-2\n", []string{"the-first-key--1", "the-second-key-2", "the-first-key--1\nthe-second-key-2"}, []string{"the-third-key--3", "", "the-first-key--1\nthe-second-key-2\n"}},
		{"rotated", "# on Monday\nthe-third-key--3\r\nthe-first-key--1\r\n", []string{"the-third-key--3", "the-first-key--1", "# on Monday\nthe-third-key--3\r\nthe-first-key--1"}, []string{"# on Monday", "the-second-key-2", "the-third-key--3\nthe-first-key--1"}},
		{"PEM", pemKey, []string{strings.TrimSpace(pemKey)}, strings.Split(strings.TrimSpace(pemKey), "\n")},
		{"JSON", "{\n\"key\":\"the-first-key--1\"\n}\n", []string{"{\n\"key\":\"the-first-key--1\"\n}"}, []string{"{", "}", "\"key\":\"the-first-key--1\"", "the-first-key--1"}},
		{"binary", "\x00\xff\n7\n0123456789abcdef\n\x80", []string{"\x00\xff\n7\n0123456789abcdef\n\x80"}, []string{"7", "0123456789abcdef"}},
		{"none", "", nil, []string{"", "the-first-key--1", "\n"}},
		{"only white space", " \n\t\n", nil, []string{"", " ", " \n\t\n", "\n"}},
		{"short", "fifteen bytes..\n", nil, []string{"fifteen bytes..", "fifteen bytes..\n", ""}},
		{"one again", "the-first-key--1", []string{"the-first-key--1"}, []string{"the-third-key--3"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := os.WriteFile(filepath.Join(f.SecretsDir, "payload-secret"), []byte(test.file), 0o600); err != nil {
				t.Fatal(err)
			}
			signed := func(body []byte, key string) client.Answer {
				return f.MustPost(t, ctx, body, client.Signature(client.Sign(key, body)))
			}
			for _, key := range test.good {
				for status, body := range map[int][]byte{http.StatusOK: body, http.StatusBadRequest: failing} {
					got := signed(body, key)
					if got.StatusCode != status {
						t.Errorf("with %q: got %v", key, got)
					}
					if sig, want := got.Header.Get("X-Build-Signature"), client.Sign(key, []byte(got.Body)); sig != want {
						t.Errorf("the answer to %q with HTTP %d is signed %q, want %q", key, got.StatusCode, sig, want)
					}
				}
			}
			for _, key := range test.bad {
				if got := signed(body, key); got.StatusCode != http.StatusUnauthorized || got.Header.Get("X-Build-Signature") != "" {
					t.Errorf("with %q: got %v", key, got)
				}
			}
		})
	}
	// The text envelope's key signs as well.
	got := f.MustPost(t, ctx, jsonOf(t, map[string]string{"signature": client.Sign("the-first-key--1", body), "tar": base64.StdEncoding.EncodeToString(body)}), client.Signature(""), client.Header("Content-Type", "text/plain"))
	if got.Status != "success" || got.Header.Get("X-Build-Signature") != client.Sign("the-first-key--1", []byte(got.Body)) {
		t.Errorf("an envelope was answered with %v, signed %q", got, got.Header.Get("X-Build-Signature"))
	}
}
