package payload_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"io"
	"io/fs"
	"path"
	"strings"
	"testing"
	"unicode/utf8"

	"handler/function/payload"
)

func fuzzOptions(t testing.TB) payload.Options {
	opts := testOptions(t)
	opts.Limits = payload.Limits{Body: 1 << 20, Unpacked: 1 << 20, Config: 1 << 10, Secrets: 1 << 10, Names: 1 << 16, Entries: 100, Path: 300}
	opts.InMemory = 1 << 20
	return opts
}

// FuzzReceive checks every body that is accepted for the promises of a Context.
func FuzzReceive(f *testing.F) {
	for _, h := range hostileBodies(f) {
		if len(h.body) < 8<<10 {
			f.Add([]byte(h.body))
		}
	}
	for _, body := range goTestdata(f, "*.tar") {
		if len(body) < 8<<10 {
			f.Add([]byte(config + dir("context") + body))
		}
	}
	body := archive(file("context/a/b", "data"), hardlink("context/0", "context/a/b"), symlink("context/s", "../x"), file("beside", "x"))
	again := archive(file("context/a/b", "data"), hardlink("context/0", "context/a/b"), file("context/a/b", "new"), file("context/a", ""), dir("context/a"),
		header{name: "context/fifo", typ: '6'}.String(), file("context/\xe9", ""), file(`context/\`, ""), hardlink("context/\xe9", "context/fifo"))
	for _, sparse := range []func(string, int64, string, ...int64) string{sparse00, sparse01, sparse10, sparseGNU} {
		f.Add([]byte(archive(sparse("context/s", 3000, "some data", 0, 4, 2000, 5), sparse("context/s", 10, "", 10, 0))))
	}
	for _, body := range []string{body, again, gzipped(f, body), zstded(f, body), enveloped(body), gzipped(f, again) + end, zstded(f, again) + end} {
		f.Add([]byte(body))
	}
	opts := fuzzOptions(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		s, err := payload.Receive(bytes.NewReader(body), io.Discard, opts)
		if err != nil {
			if s != nil || int64(len(body)) <= opts.Limits.Body {
				t.Fatalf("Receive: %v, %v", s, err)
			}
			return
		}
		defer s.Close()
		p, err := s.Payload()
		if err != nil {
			if p != nil {
				t.Fatalf("a payload beside the error %v", err)
			}
			if code(err).HTTPStatus() >= 500 {
				t.Fatalf("not the client's error: %v", err)
			}
			return
		}
		checkContext(t, p, opts.Limits)
	})
}

func checkContext(t *testing.T, p *payload.Payload, limits payload.Limits) {
	if int64(len(p.Config)) > limits.Config || int64(len(p.Secrets)) > limits.Secrets {
		t.Errorf("config of %d bytes, secrets of %d", len(p.Config), len(p.Secrets))
	}
	if p.Context == nil {
		return
	}
	entries := p.Context.Entries()
	if len(entries) > limits.Entries {
		t.Errorf("%d entries", len(entries))
	}
	seen := map[string]payload.Entry{}
	var total, names int64
	for i, e := range entries {
		if i > 0 && payload.ComparePath(entries[i-1].Path, e.Path) >= 0 {
			t.Errorf("%q after %q", e.Path, entries[i-1].Path)
		}
		// fs.ValidPath refuses a path that is not UTF-8. Every other rule must hold.
		if !fs.ValidPath(strings.ToValidUTF8(e.Path, "x")) || e.Path == "." || strings.Contains(e.Path, "\x00") || len(e.Path) > limits.Path {
			t.Errorf("path %q", e.Path)
		}
		if parent := path.Dir(e.Path); parent != "." && !seen[parent].Mode.IsDir() {
			t.Errorf("%q before its parent", e.Path)
		}
		if e.Mode.Type() == fs.ModeSymlink && e.Linkname == "" || e.Mode.IsDir() && e.Linkname != "" {
			t.Errorf("%q of mode %v links to %q", e.Path, e.Mode, e.Linkname)
		}
		odd := e.Mode.Type()&^(fs.ModeDir|fs.ModeSymlink) != 0 || !utf8.ValidString(e.Path) || e.Mode.Type() == fs.ModeSymlink && !utf8.ValidString(e.Linkname)
		if odd != (e.Odd() != "") {
			t.Errorf("%q of mode %v, linked to %q, is odd: %q", e.Path, e.Mode, e.Linkname, e.Odd())
		}
		if e.Mode.IsRegular() && e.Linkname != "" {
			first, ok := seen[e.Linkname]
			if !ok || !first.Mode.IsRegular() || first.Linkname != "" || first.ModTime != e.ModTime || first.Mode != e.Mode || first.Size != e.Size {
				t.Errorf("hard link %+v to %+v", e, first)
			}
		}
		n, err := io.Copy(io.Discard, p.Context.Open(&e))
		if err != nil || e.Mode.IsRegular() && n != e.Size || !e.Mode.IsRegular() && n != 0 {
			t.Errorf("reading %+v: %d bytes, %v", e, n, err)
		}
		if e.Linkname == "" {
			total += n
		}
		names += int64(len(e.Path))
		seen[e.Path] = e
	}
	if total > limits.Unpacked || names > limits.Names {
		t.Errorf("%d bytes of files, %d of names", total, names)
	}
}

// FuzzEnvelope compares with encoding/json. An object that it reads, and in which each key comes
// once, must be read in the same way.
func FuzzEnvelope(f *testing.F) {
	for _, s := range []string{
		`{"signature":"sha256=00","tar":"AAAA"}`, `{"tar":"AA==","a":[1,{"b":null}]}`, `{"tar":"AA\n\u0041A","signature":"\/"}`,
		`{"tar":"A"}`, `{"tar":"AA="}`, `{"tar":"AAA=","x":"\ud800"}`, `{}`, `{"tar":1}`, `{"x":-0.1e-9,"tar":""}`, `{"tar":"AAAA"}x`,
	} {
		f.Add(s)
	}
	opts := fuzzOptions(f)
	f.Fuzz(func(t *testing.T, body string) {
		if !strings.HasPrefix(body, "{") || len(body) > 1<<16 {
			return
		}
		var signed bytes.Buffer
		s, err := payload.Receive(strings.NewReader(body), &signed, opts)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		_, err = s.Payload()
		accepted := code(err) != "bad_envelope"

		keys, ok := objectKeys(body)
		var want struct {
			Signature, Tar *string
		}
		fields := map[string]json.RawMessage{}
		if ok {
			ok = json.Unmarshal([]byte(body), &fields) == nil && string(fields["signature"]) != "null" &&
				unmarshal(fields["signature"], &want.Signature) && unmarshal(fields["tar"], &want.Tar) && want.Tar != nil
		}
		var tar []byte
		if ok {
			var err error
			text := strings.NewReplacer("\r", "", "\n", "").Replace(*want.Tar)
			tar, err = base64.StdEncoding.DecodeString(text)
			if err != nil {
				tar, err = base64.RawStdEncoding.DecodeString(text)
			}
			ok = err == nil
		}
		// The envelope has bounds that JSON has not.
		bounded := keys <= 16 && len(body) < 1000 && strings.Count(body, "[")+strings.Count(body, "{") < 16 && !strings.Contains(body, `\u`)
		if ok && bounded && !accepted {
			t.Errorf("refused: %v", err)
		}
		if ok && accepted && !bytes.Equal(signed.Bytes(), tar) {
			t.Errorf("signed %q, want %q", signed.Bytes(), tar)
		}
		if accepted && !ok && !strings.ContainsAny(body, "\r\n") {
			t.Errorf("accepted")
		}
		if sig, isEnvelope := s.Signature(); !isEnvelope || accepted && ok && want.Signature != nil && !strings.Contains(body, `\u`) && sig != strings.ToValidUTF8(sig, "") {
			// The envelope keeps invalid UTF-8 as it is: no signature has any.
			_ = sig
		} else if accepted && ok && want.Signature != nil && !strings.Contains(body, `\u`) && sig != *want.Signature {
			t.Errorf("signature %q, want %q", sig, *want.Signature)
		}
	})
}

func unmarshal(data json.RawMessage, v **string) bool {
	return data == nil || json.Unmarshal(data, v) == nil
}

// objectKeys counts the keys of an object. ok is false if body is no object, or has a key
// twice.
func objectKeys(body string) (n int, ok bool) {
	if !json.Valid([]byte(body)) {
		return 0, false
	}
	d := json.NewDecoder(strings.NewReader(body))
	if _, err := d.Token(); err != nil {
		return 0, false
	}
	seen := map[string]bool{}
	for d.More() {
		key, err := d.Token()
		if err != nil || seen[key.(string)] {
			return 0, false
		}
		seen[key.(string)] = true
		var v json.RawMessage
		if err := d.Decode(&v); err != nil {
			return 0, false
		}
	}
	return len(seen), true
}
