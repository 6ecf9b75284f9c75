package content_test

import (
	"cmp"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// noise prints what a log must survive, and a secret in the forms that scripts
// print one in. Its pieces are flushed on their own.
const noise = `#!/bin/sh
token=$(cat /run/secrets/token)
key=/run/secrets/key
printf 'plain text and a \ttab\n'
printf '\033[31mred\033[0m \033]0;title\007 \033]8;;http://x/\033\\link\033]8;;\033\\ \033[2J\033[1;1H\n'
printf '10%%\r20%%\r100%%\n'
printf 'bad \377\376\300\200\355\240\200 bytes, cut \342\202'; sleep 0.3; printf '\254 rune\n'
printf 'nul \000 bell \007 backspace \010\010 delete \177 c1 \302\233 31m nel \302\205 bidi \342\200\256 txet\n'
printf '{"status":"success"}\n\n\r\n{"log":[],"status":"failed"}\n'
printf 'raw: %s\n' "$token"
printf 'raw on stderr: %s\n' "$token" >&2
printf 'base64: '; printf %s "$token" | base64 -w 0; echo
printf 'base64 of it with a newline: '; echo "$token" | base64 -w 0; echo
printf 'base64 as a password: '; printf 'user:%s' "$token" | base64 -w 0; echo
printf 'base64 inside more: '; printf 'ab%scd' "$token" | base64 -w 0; echo
printf 'hex: '; printf %s "$token" | od -An -v -tx1 | tr -d ' \n'; echo
printf 'HEX: '; printf %s "$token" | od -An -v -tx1 | tr -d ' \n' | tr a-f A-F; echo
printf 'key as it is:\n'; cat $key
printf 'key in base64:\n'; base64 -w 0 $key; echo
printf 'key in wrapped base64:\n'; base64 $key
printf 'key, wrapped at 64:\n'; base64 -w 64 $key
printf 'with colours: '; printf %s "$token" | sed 's/./&\x1b[0m/g'; echo
printf 'with NULs: '; printf %s "$token" | sed 's/./&\x00/g'; echo
first=$(printf %s "$token" | cut -c 1-11); rest=$(printf %s "$token" | cut -c 12-)
printf 'in pieces: %s' "$first"; sleep 0.4; printf '%s, done\n' "$rest"
printf %s "$token" | fold -w 3 | while read -r p; do printf %s "$p"; sleep 0.05; done; echo
printf '%s' "$first" >&2; sleep 0.3; printf '%s\n' "$rest" >&2
b=$(printf %s "$token" | base64 -w 0)
printf 'base64 in pieces: %s' "$(printf %s "$b" | cut -c 1-9)"; sleep 0.3; printf '%s\n' "$(printf %s "$b" | cut -c 10-)"
# One line of 300 KiB and more.
i=0; while [ $i -lt 300 ]; do printf '%01000d%s' 0 "$token"; i=$((i+1)); done; echo
`

// keyText is a secret of several lines.
func keyText() string {
	var b strings.Builder
	b.WriteString("-----BEGIN TEST KEY-----\n")
	for range 6 {
		raw := make([]byte, 48)
		rand.Read(raw)
		b.WriteString(base64.StdEncoding.EncodeToString(raw) + "\n")
	}
	b.WriteString("-----END TEST KEY-----\n")
	return b.String()
}

// traces are texts of 12 bytes and more that only a secret, or a line of one,
// leaves in what shows it in one of the forms: as it is, base64 wherever it
// stands in a longer text, hex, in a URL.
func traces(secrets ...string) map[string]string {
	list := map[string]string{}
	for _, s := range secrets {
		for line := range strings.Lines(s) {
			line = strings.TrimSpace(line)
			if strings.HasPrefix(line, "-----") || len(line) < 12 {
				continue
			}
			list[line] = "as it is"
			list[hex.EncodeToString([]byte(line))] = "hex"
			list[strings.ToUpper(hex.EncodeToString([]byte(line)))] = "HEX"
			list[url.QueryEscape(line)] = "URL"
		}
		for before := range 3 {
			// All but the first and the last group of four, which what stands
			// beside it has a part in. Wrapped, a line of it is 64 characters.
			b := base64.StdEncoding.EncodeToString([]byte("abc"[:before] + s))
			b = b[4 : len(b)-4]
			list[b[:min(len(b), 40)]] = "base64"
			list[b[max(0, len(b)-40):]] = "base64's end"
		}
	}
	return list
}

// TestNoise builds with a step that prints all of it and looks at the answer in
// each form, the function's log, and the image.
func TestNoise(t *testing.T) {
	// A daemon that clips leaves output out when a step has been held up and prints all of it
	// at once.
	daemon, err := stack.Shared(t).NewBuildkitd(t.Context(), stack.BuildkitdConfig{Env: stack.WholeLogs})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(daemon.Kill)
	ctx, s, f := start(t, stack.FunctionConfig{Buildkitd: daemon})
	token, key := "tok+/ü="+rand.Text(), keyText()
	sealed := sealFor(t, s, map[string]string{"token": token, "key": key})
	image := s.Registry.Image("noise:latest")
	request := body(t, config{"image": image, "noCache": true}, sealed,
		entry{name: "Dockerfile", text: "FROM busybox\nCOPY noise.sh /\nRUN --mount=type=secret,id=token --mount=type=secret,id=key sh /noise.sh\n"},
		entry{name: "noise.sh", text: noise})

	t.Run("forms", func(t *testing.T) {
		for _, accept := range []string{client.NDJSON, client.SSE, ""} {
			t.Run(accept, func(t *testing.T) {
				t.Parallel()
				a := f.MustPost(t, ctx, request, client.Accept(accept))
				checkAnswer(t, a, accept)
				if a.Status != "success" {
					t.Fatalf("got %v", a)
				}
				log := a.Log
				checkTraces(t, "the answer", a.Body, token, key)
				checkTraces(t, "the log's lines, joined", strings.Join(printed(log), ""), token, key)
				for _, want := range []string{
					"plain text and a \ttab", "red  link", "bad ", " bytes, cut € rune", `{"status":"success"}`, "raw: ***", "in pieces: ***, done",
				} {
					if !strings.Contains(strings.Join(printed(log), "\n"), want) {
						t.Errorf("%q is not in the log", want)
					}
				}
				if accept == "" {
					return // holds 1 MiB at most
				}
				if n := strings.Count(strings.Join(printed(log), ""), "0"); n < 300_000 {
					t.Errorf("%d of the long line's 300,000 zeros are in the log", n)
				}
			})
		}
	})
	log, err := f.Log()
	if err != nil {
		t.Fatal(err)
	}
	checkTraces(t, "the function's log", log, token, key)
	img := stack.MustPull(t, ctx, image)
	checkTraces(t, "the image", string(everything(t, img)), token, key)
	if t.Failed() {
		for l := range strings.Lines(noise) {
			t.Log(l)
		}
	}
}

// TestSecretInError has a step fail whose command, as it stands in the
// Dockerfile and as it is expanded, holds the secret.
func TestSecretInError(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	token := "tok+/=" + rand.Text()
	encoded := base64.StdEncoding.EncodeToString([]byte(token))
	sealed := sealFor(t, s, map[string]string{"token": token})
	for _, tt := range []struct{ name, dockerfile, code string }{
		{"a step that prints it", "FROM busybox\nRUN --mount=type=secret,id=token cat /run/secrets/token; base64 /run/secrets/token >&2; exit 7\n", "build_failed"},
		{"a step that prints it in pieces", "FROM busybox\nRUN --mount=type=secret,id=token t=$(cat /run/secrets/token); printf '1%%\\r2%%\\rit is %.9s' $t; sleep 2; printf '%s\\r' ${t#?????????}; sleep 1; printf '3%%\\r'; printf '\\n'; exit 7\n", "build_failed"},
		{"a step that spells it out", "FROM busybox\n# " + token + "\nRUN echo " + token + " " + encoded + " && exit 7\n", "build_failed"},
		{"a build argument", "FROM busybox\nARG TOKEN\nENV X=$TOKEN\nRUN echo $TOKEN && exit 7\n", "build_failed"},
		{"a file that is not there", "FROM busybox\nCOPY " + token + " /\n", "build_failed"},
		{"a stage that is not there", "FROM busybox\nCOPY --from=x" + token + " / /\n", "build_failed"},
		{"an instruction that is none", "FROM busybox\nRUM " + token + "\n", "build_failed"},
		{"a base image that is not there", "FROM 127.0.0.1:1/" + strings.ToLower(hex.EncodeToString([]byte(token))) + "\n", "registry_failed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, accept := range []string{client.NDJSON, ""} {
				request := body(t, config{"image": s.Registry.Image("noise:failed"), "buildArgs": map[string]string{"TOKEN": token}}, sealed, entry{name: "Dockerfile", text: tt.dockerfile})
				a := f.MustPost(t, ctx, request, client.Accept(accept))
				checkAnswer(t, a, accept)
				if a.Status != "failed" || a.Code != tt.code || a.Error == "" {
					t.Errorf("got %v", a)
				}
				checkTraces(t, "the answer", a.Body, token)
				checkTraces(t, "the error", a.Error, token)
				checkTraces(t, "the log's lines, joined", strings.Join(printed(a.Log), ""), token)
				if !strings.Contains(a.Body, "***") {
					t.Errorf("nothing is masked in %s", a.Body)
				}
			}
		})
	}
	log, err := f.Log()
	if err != nil {
		t.Fatal(err)
	}
	checkTraces(t, "the function's log", log, token)
}

// checkAnswer wants the form that was asked for, and texts that are safe to print on a
// terminal.
func checkAnswer(t *testing.T, a client.Answer, accept string) {
	t.Helper()
	if form := a.Header.Get("Content-Type"); form != cmp.Or(accept, client.JSON) {
		t.Errorf("the answer is %s, want %s", form, cmp.Or(accept, client.JSON))
	}
	if !utf8.ValidString(a.Body) {
		t.Errorf("the answer is not UTF-8: %.200q", a.Body)
	}
	for _, r := range append(a.Records, a.Record) {
		for _, l := range r.Log {
			if err := safe(l, "\t"); err != nil {
				t.Errorf("a log line holds %v: %.200q", err, l)
			}
		}
		if err := safe(r.Error, "\t\n"); err != nil {
			t.Errorf("the error holds %v: %.200q", err, r.Error)
		}
	}
}

// safe allows no control characters but some, and none that change the
// direction of writing.
func safe(text, allowed string) error {
	for _, r := range text {
		if unicode.Is(unicode.C, r) && !strings.ContainsRune(allowed, r) {
			return fmt.Errorf("%U", r)
		}
	}
	return nil
}

func checkTraces(t *testing.T, where, text string, secrets ...string) {
	t.Helper()
	for trace, form := range traces(secrets...) {
		if i := strings.Index(text, trace); i >= 0 {
			t.Errorf("%s holds a secret %s: …%q…", where, form, text[max(0, i-80):min(len(text), i+len(trace)+20)])
		}
	}
}
