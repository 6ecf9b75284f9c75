package clients_test

import (
	"net/http"
	"strings"
	"testing"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// TestNoArchives sends what people take for a request: the error says what it is, and what
// is wanted.
func TestNoArchives(t *testing.T) {
	ctx, _, f := start(t, stack.FunctionConfig{})
	dir := stack.Context(t, copyOnly)
	python := func(program string) []byte { return output(t, dir, nil, "python3", "-c", "import sys\n"+program) }
	packed := output(t, dir, nil, "tar", "c", ".")
	for name, test := range map[string]struct {
		body  []byte
		looks string
	}{
		"Dockerfile": {[]byte(copyOnly["Dockerfile"]), "looks like a Dockerfile"},
		"zip":        {python("import zipfile\nwith zipfile.ZipFile(sys.stdout.buffer, 'w') as z: z.write('Dockerfile')"), "looks like a zip archive"},
		"bzip2":      {python("import tarfile; tarfile.open(fileobj=sys.stdout.buffer, mode='w|bz2').add('.')"), "looks like bzip2"},
		"xz":         {python("import tarfile; tarfile.open(fileobj=sys.stdout.buffer, mode='w|xz').add('.')"), "looks like xz"},
		"HTML":       {[]byte("<!DOCTYPE html><title>404</title>"), "looks like HTML"},
		"XML":        {[]byte("<?xml version='1.0'?><Error/>"), "looks like XML"},
		"script":     {[]byte("#!/bin/sh\nmake\n"), "looks like a script"},
		"file name":  {[]byte("req.tar"), `looks like plain text that begins with "req.tar"`},
		"UTF-16":     {python("sys.stdout.buffer.write('FROM scratch'.encode('utf-16'))"), "looks like UTF-16 text"},
		"PNG":        {[]byte("\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"), "looks like an image (image/png)"},
		"nothing":    {[]byte{}, "this is empty"},
		"in gzip":    {output(t, dir, nil, "gzip", "-c", "Dockerfile"), "looks like a Dockerfile"},
		"in zstd":    {output(t, dir, nil, "zstd", "-qc", "Dockerfile"), "looks like a Dockerfile"},
		"gzip twice": {output(t, dir, output(t, dir, packed, "gzip"), "gzip"), "compressed twice"},
		"--data":     {[]byte(strings.NewReplacer("\x00", "", "\r", "", "\n", "").Replace(string(packed))), "a tar that lost bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			got := f.MustPost(t, ctx, test.body)
			if got.StatusCode != http.StatusBadRequest || got.Code != "bad_tar" {
				t.Errorf("got %v", got)
			}
			if err := within(got.Error, test.looks, "a tar is wanted, plain or compressed with gzip or zstd"); err != nil {
				t.Error(err)
			}
			// Who has no key is told none of it.
			got = f.MustPost(t, ctx, test.body, client.Signature(flip(client.Sign(f.Secret, test.body))))
			if got.StatusCode != http.StatusUnauthorized || strings.Contains(got.Body, "looks") {
				t.Errorf("unsigned: got %v", got)
			}
		})
	}
}

// TestJSONWithHeader posts a config as it is, signed by a header: it is taken for a text
// envelope. The answer is one and the same whoever made the signature.
func TestJSONWithHeader(t *testing.T) {
	ctx, s, f := start(t, stack.FunctionConfig{})
	body := jsonOf(t, config{"image": s.Registry.Image("json:latest")})
	for name, value := range map[string]string{"right": client.Sign(f.Secret, body), "wrong": flip(client.Sign(f.Secret, body)), "malformed": "x"} {
		got := f.MustPost(t, ctx, body, client.Signature(value))
		if got.StatusCode != http.StatusUnauthorized || got.Code != "unauthorized" || got.Header.Get("X-Build-Signature") != "" {
			t.Errorf("%s: got %v, signed %q", name, got, got.Header.Get("X-Build-Signature"))
		}
		const want = `the request is not signed with the payload secret: a body that begins with { is taken for a text envelope, ` +
			`which carries its signature inside, as "signature", and has none; a header X-Build-Signature beside it is ignored`
		if got.Error != want {
			t.Errorf("%s: got %q", name, got.Error)
		}
	}
	got := f.MustPost(t, ctx, body, client.Signature(""))
	if got.StatusCode != http.StatusUnauthorized || strings.Contains(got.Body, "ignored") {
		t.Errorf("without a header: got %v", got)
	}
}
