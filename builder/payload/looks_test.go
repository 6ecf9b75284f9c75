package payload_test

import (
	"archive/zip"
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"encoding/hex"
	"image"
	"image/gif"
	"image/jpeg"
	"image/png"
	"io"
	"mime/multipart"
	"strings"
	"testing"
	"unicode/utf16"

	"handler/function/api"
	"handler/function/payload"
)

// written returns everything that write writes.
func written(t *testing.T, write func(io.Writer) error) string {
	t.Helper()
	var b bytes.Buffer
	if err := write(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func unhex(t *testing.T, s string) string {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func utf16Of(order binary.AppendByteOrder, text string) string {
	var b []byte
	for _, unit := range utf16.Encode([]rune(text)) {
		b = order.AppendUint16(b, unit)
	}
	return string(b)
}

// without is s without the bytes of cut. curl's --data sends a file in this way.
func without(s, cut string) string {
	return strings.Map(func(r rune) rune {
		if strings.ContainsRune(cut, r) {
			return -1
		}
		return r
	}, s)
}

// TestLooksLike sends bodies that are no archives. The error says what the body is, and what is
// wanted.
func TestLooksLike(t *testing.T) {
	const (
		Dockerfile = "a Dockerfile"
		plain      = "plain text that begins with "
		asText     = "gzip that was sent as text"
	)
	picture := image.NewGray(image.Rect(0, 0, 40, 40))
	long := strings.Repeat("# a line of a file that is longer than a block\n", 100)
	whole := archive(file("context/Dockerfile", "FROM scratch\n"))
	gz := gzipped(t, whole)
	var latin1 []rune
	for _, b := range []byte(gz) {
		latin1 = append(latin1, rune(b))
	}
	for name, tt := range map[string]struct{ body, looks string }{
		"Dockerfile":                       {"FROM golang:1.26 AS build\nRUN go build\n", Dockerfile},
		"long Dockerfile":                  {"FROM scratch\n" + long, Dockerfile},
		"Dockerfile in lower case":         {"from alpine\n", Dockerfile},
		"Dockerfile without an end":        {"FROM alpine", Dockerfile},
		"Dockerfile with CRLF":             {"# builds it\r\n\r\nFROM --platform=$BUILDPLATFORM alpine as x\r\n", Dockerfile},
		"Dockerfile with an argument":      {"\n\nARG VERSION=1\nFROM alpine:$VERSION\n", Dockerfile},
		"Dockerfile with a syntax":         {"# syntax=docker/dockerfile:1\n" + long, Dockerfile},
		"Dockerfile with a byte order":     {"\ufeffFROM alpine\n", Dockerfile},
		"zip":                              {written(t, func(w io.Writer) error { z := zip.NewWriter(w); z.Create("Dockerfile"); return z.Close() }), "a zip archive"},
		"empty zip":                        {written(t, func(w io.Writer) error { return zip.NewWriter(w).Close() }), "a zip archive"},
		"HTML":                             {"<!DOCTYPE html>\n<html><body>502 Bad Gateway</body></html>", "HTML"},
		"HTML of a proxy":                  {"\r\n<html>\r\n<head><title>403 Forbidden</title></head>\r\n" + long, "HTML"},
		"XML":                              {`<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>`, "XML"},
		"JSON in white space":              {"\n{\"image\": \"x\"}", "JSON"},
		"JSON after a byte order mark":     {"\ufeff{\"image\": \"x\"}", "JSON"},
		"JSON list":                        {`[{"image":"x"}]`, "JSON"},
		"empty JSON list":                  {"[]", "JSON"},
		"script":                           {"#!/bin/sh\nset -e\n" + long, "a script"},
		"text":                             {"req.tar", plain + `"req.tar"`},
		"long text":                        {"Once upon a time there was a builder\n" + long, plain + `"Once upon a time there was a bui"`},
		"text of a word of Dockerfiles":    {"From what we know, it is none.", plain + `"From what we know, it is none."`},
		"text that begins as an image":     {"BMW and GIF are words", plain + `"BMW and GIF are words"`},
		"INI":                              {"[section]\nkey=value\n", plain + `"[section]\nkey=value\n"`},
		"YAML":                             {"version: 1.0\nprovider:\n  name: openfaas\n", plain + `"version: 1.0\nprovider:\n  name: o"`},
		"comments":                         {long, plain},
		"white space":                      {" \n", "white space"},
		"Latin-1":                          {"caf\xe9", plain + `"caf\xe9"`},
		"UTF-16":                           {utf16Of(binary.LittleEndian, "\ufeffFROM alpine\n"+long), "UTF-16 text"},
		"big-endian UTF-16":                {utf16Of(binary.BigEndian, "\ufeffhello"), "UTF-16 text"},
		"UTF-16 without a byte order mark": {utf16Of(binary.LittleEndian, "hello"), "UTF-16 text"},
		"big-endian UTF-16 without it":     {utf16Of(binary.BigEndian, "{\"image\":\"x\"}"), "UTF-16 text"},
		"PNG":                              {written(t, func(w io.Writer) error { return png.Encode(w, picture) }), "an image (image/png)"},
		"GIF":                              {written(t, func(w io.Writer) error { return gif.Encode(w, picture, nil) }), "an image (image/gif)"},
		"JPEG":                             {written(t, func(w io.Writer) error { return jpeg.Encode(w, picture, nil) }), "an image (image/jpeg)"},
		"PDF":                              {"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF"},
		"PDF with zeros":                   {"%PDF-1.7\n\x00\x00", "a PDF"},
		"bzip2":                            {unhex(t, "425a6839314159265359e5b5f3090000045100001040000244a00021b5180c029069c2a30bb9229c284872daf98480"), "bzip2"},
		"xz":                               {unhex(t, "fd377a585a000004e6d6b4460200210116000000742fe5a3e00011000c5d00341949ee8de94f7e2121b000001f01d9c887c143c800012812c96a628e1fb6f37d010000000004595a"), "xz"},
		"lzma":                             {unhex(t, "5d00008000ffffffffffffffff00341949ee8de94f7e21b620b7ffffba340000"), "lzma"},
		"lz4":                              {unhex(t, "04224d186440a70f0000006368656c6c6f20060050656c6c6f0a00000000c659d85b"), "lz4"},
		"zlib":                             {written(t, func(w io.Writer) error { z := zlib.NewWriter(w); io.WriteString(z, whole); return z.Close() }), "zlib"},
		"7z":                               {"7z\xbc\xaf\x27\x1c\x00\x04" + strings.Repeat("\x00\xff", 1000), "a 7z archive"},
		"rar":                              {"Rar!\x1a\x07\x01\x00" + strings.Repeat("\x00\xff", 1000), "a rar archive"},
		"cpio":                             {"070701" + strings.Repeat("0", 104) + "Dockerfile\x00", "a cpio archive"},
		"WebAssembly":                      {"\x00asm\x01\x00\x00\x00", "a file of type application/wasm"},
		"form": {written(t, func(w io.Writer) error {
			m := multipart.NewWriter(w)
			part, err := m.CreateFormFile("file", "req.tar")
			io.WriteString(part, whole)
			return err
		}), "a multipart form"},
		"tar without NULs and line feeds": {without(whole, "\x00\r\n"), "a tar that lost bytes"},
		"such a tar of other bytes":       {without(archive(file("context/x", "\x01\x02\x03")), "\x00"), "a tar that lost bytes"},
		"gzip as UTF-8":                   {strings.ToValidUTF8(gz, "\ufffd"), asText},
		"gzip as Latin-1":                 {string(latin1), asText},
		"zstd as UTF-8":                   {strings.ToValidUTF8(zstded(t, whole), "\ufffd"), "zstd that was sent as text"},
		"compressed twice":                {gz, "something that was compressed twice"},
		"compressed twice with zstd":      {zstded(t, whole), "something that was compressed twice"},
		"envelope":                        {enveloped(whole), "JSON"},
		"nothing":                         {"", "empty"},
	} {
		t.Run(name, func(t *testing.T) {
			forms := map[string]string{"gzip": gzipped(t, tt.body), "zstd": zstded(t, tt.body), "envelope of gzip": enveloped(gzipped(t, tt.body))}
			switch {
			case strings.Contains(tt.looks, "twice"):
				// It is accepted if it is compressed once.
			case name == "envelope":
				forms["envelope"] = enveloped(tt.body)
			default:
				forms["as it is"], forms["envelope"] = tt.body, enveloped(tt.body)
			}
			for form, body := range forms {
				_, _, err := receive(t, body, testOptions(t))
				e := api.AsError(err)
				if err == nil || e.Code != api.BadTar || !strings.Contains(e.Msg, tt.looks) || !strings.HasSuffix(e.Msg, "a tar is wanted, plain or compressed with gzip or zstd") {
					t.Errorf("%s: got %s, %s, want %s", form, e.Code, e.Msg, tt.looks)
				}
				if len(e.Msg) > 200 {
					t.Errorf("%s: an error of %d bytes: %s", form, len(e.Msg), e.Msg)
				}
			}
		})
	}
}

// TestLooksLikeContext sends a text envelope as a context. Only a build may be in an envelope.
func TestLooksLikeContext(t *testing.T) {
	opts := testOptions(t)
	opts.ContextOnly, opts.Raw = true, true
	for body, looks := range map[string]string{enveloped(archive()): "JSON", gzipped(t, "FROM scratch\n"): "a Dockerfile"} {
		spool, err := payload.Receive(strings.NewReader(body), io.Discard, opts)
		if err != nil {
			t.Fatal(err)
		}
		defer spool.Close()
		_, err = spool.Payload()
		if e := api.AsError(err); err == nil || e.Code != api.BadTar || !strings.Contains(e.Msg, "looks like "+looks) {
			t.Errorf("%.40q: %v, want %s", body, err, looks)
		}
	}
}

// TestLooksLikeTar cuts tars whose names begin like other formats. They must not be taken for
// these formats.
func TestLooksLikeTar(t *testing.T) {
	for _, name := range []string{"BM", "FROM", "#!x", "PK", "BZh", "07070", "<html>", "[]", "RIFF"} {
		first := file(name, "FROM scratch\n")
		spaced := header{name: name, set: map[int]string{100: "0000644 ", 108: "0000000 ", 116: "0000000 "}}.String()
		for _, body := range []string{first[:300], spaced[:500], first[:512] + "x", pax('x', "path="+name)[:1000], pax('x', "path="+name) + strings.Repeat("x", 512)} {
			_, _, err := receive(t, body, testOptions(t))
			if e := api.AsError(err); err == nil || e.Code != api.BadTar || strings.Contains(e.Msg, "looks like") {
				t.Errorf("%s, %d bytes: %v", name, len(body), err)
			}
		}
	}
}
