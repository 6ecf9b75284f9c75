package redact

import (
	"fmt"
	"net/url"
	"runtime"
	"strings"
	"testing"
)

func TestURLs(t *testing.T) {
	for text, want := range map[string]string{
		"":                                                            "",
		"no URL, 100% of it?":                                         "no URL, 100% of it?",
		"what? a=b, user@host":                                        "what? a=b, user@host",
		`Get "https://host/v2/?x=secret": EOF`:                        `Get "https://host/v2/": EOF`,
		"https://host/p?x=secret: 403 Forbidden":                      "https://host/p: 403 Forbidden",
		"(see https://host/p?x=secret).":                              "(see https://host/p).",
		"'https://host/p?x=secret'":                                   "'https://host/p'",
		"https://a/p?x=secret https://b/q?y=secret":                   "https://a/p https://b/q",
		"https://a/p,https://u:secret@b/q?y=secret":                   "https://a/p,https://b/q",
		"https://a/p?x=secret,https://b/q?y=secret":                   "https://a/p",
		"https://user:secret@host:5000/p":                             "https://host:5000/p",
		"https://secret@host/p":                                       "https://host/p",
		"https://secret%40x:a@host/p":                                 "https://host/p",
		"https://user:sec/ret@host/p":                                 "https://host/p",
		"https://user:1sec/ret@host/p":                                "https://host/p",
		"http://host:5000/a/b@sha256:0123":                            "http://host:5000/a/b@sha256:0123",
		"docker-image://127.0.0.1:5000/a/b:tag@sha256:0123":           "docker-image://127.0.0.1:5000/a/b:tag@sha256:0123",
		"docker-image://[::1]/a/b@sha256:0123":                        "docker-image://[::1]/a/b@sha256:0123",
		"https://host/@scope/package":                                 "https://host/@scope/package",
		"https://host/repo.git#main:dir":                              "https://host/repo.git#main:dir",
		"https://host/cb#access_token=secret":                         "https://host/cb",
		`{"url":"https:\/\/host\/p?a=1\u0026X-Amz-Signature=secret"}`: `{"url":"https:\/\/host\/p"}`,
		`said \"https://host/p?x=secret\" to us`:                      `said \"https://host/p\" to us`,
		"go to https%3A%2F%2Fhost%2Fp%3Fx%3Dsecret%26y%3Dsecret now":  "go to https%3A%2F%2Fhost/p now",
		"https%3a%2f%2fu%3asecret%40host%2fp":                         "https%3a%2f%2fhost/p",
		"https%253A%252F%252Fhost%252Fp%253Fx%253Dsecret":             "https%253A%252F%252Fhost/p",
		"https://proxy/?to=https%3A%2F%2Fhost%3Fx%3Dsecret":           "https://proxy/",
		"https://proxy/https%3A%2F%2Fhost%2Fp%3Fx%3Dsecret":           "https://proxy/https%3A%2F%2Fhost/p",
		"Location: /v2/a/blobs/uploads/1?_state=secret":               "Location: /v2/a/blobs/uploads/1",
		"sent X-Amz-Signature=secret&a=b":                             "sent X-Amz-Signature=***&a=b",
		`parse "https://host/p?x=a b&sig=secret": bad`:                `parse "https://host/p b&sig=***": bad`,
	} {
		if got := URLs(text); got != want {
			t.Errorf("%q\n got %q\nwant %q", text, got, want)
		}
		if got := URLs(URLs(text)); got != URLs(text) {
			t.Errorf("%q: cut again it is %q", text, got)
		}
	}
}

// TestURLsSigned has the signed URLs of all storage services, as errors quote them.
func TestURLsSigned(t *testing.T) {
	for _, signed := range []string{
		"https://bucket.s3.eu-west-1.amazonaws.com/docker/registry/v2/blobs/data?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDsecret%2F20260102%2Feu-west-1%2Fs3%2Faws4_request&X-Amz-Date=20260102T030405Z&X-Amz-Expires=1200&X-Amz-Security-Token=secret//+/secret&X-Amz-SignedHeaders=host&X-Amz-Signature=secret",
		"https://bucket.s3.amazonaws.com/blob?AWSAccessKeyId=AKIDsecret&Signature=secret%2Bsecret%3D&Expires=1",
		"https://storage.googleapis.com/artifacts/blob?X-Goog-Algorithm=GOOG4-RSA-SHA256&X-Goog-Credential=secret&X-Goog-Signature=secret",
		"https://storage.googleapis.com/blob?GoogleAccessId=a%40b.iam&Signature=secret/secret==&Expires=1",
		"https://account.blob.core.windows.net/c/blob?se=2026-01-02T03%3A04%3A05Z&sig=secret%2F%2Bsecret%3D&sp=r&spr=https&sr=b&sv=2018-03-28",
		"https://d111.cloudfront.net/blob?Policy=secret__&Signature=secret~secret-&Key-Pair-Id=APKAsecret",
		"https://registry/v2/a/blobs/uploads/1?_state=secret&digest=sha256%3Asecret",
		"https://user:secret@registry/v2/?secret",
		"https://x'secret@registry/v2/?a;secret'secret)secret",
	} {
		for form, text := range map[string]string{
			"plain":   "failed to copy: " + signed + ": 403 Forbidden",
			"quoted":  fmt.Sprintf("Get %q: EOF", signed),
			"twice":   fmt.Sprintf("error: %q", fmt.Sprintf("Get %q: EOF", signed)),
			"url":     (&url.Error{Op: "Put", URL: signed, Err: fmt.Errorf("EOF")}).Error(),
			"JSON":    `{"u":"` + strings.ReplaceAll(strings.ReplaceAll(signed, "/", `\/`), "&", `\u0026`) + `"}`,
			"HTML":    `<a href="` + strings.ReplaceAll(signed, "&", "&amp;") + `">`,
			"escaped": "https://proxy/" + url.QueryEscape(signed) + " failed",
			"again":   "to=" + url.QueryEscape(url.QueryEscape(signed)) + " failed",
			"two":     signed + " and " + signed,
			"listed":  "[" + signed + "," + signed + "]",
		} {
			got := URLs(text)
			if strings.Contains(got, "secret") {
				t.Errorf("%s: %s", form, got)
			}
			if host, _, _ := strings.Cut(strings.TrimPrefix(signed[strings.LastIndex(signed, "@")+1:], "https://"), "/"); !strings.Contains(got, host) {
				t.Errorf("%s: the host %s is lost: %s", form, host, got)
			}
		}
	}
}

// TestURLsNested checks that the work for URLs within one another grows only as their text
// does. Each level that is read allocates a copy of the rest: if all 2,500 were read, these
// 10 kB would allocate more than 60 MB.
func TestURLsNested(t *testing.T) {
	text := strings.Repeat("a://", 2500) + "user:password@host?token=secret"
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	got := URLs(text)
	runtime.ReadMemStats(&after)
	if strings.Contains(got, "secret") || strings.Contains(got, "password") {
		t.Errorf("it ends %q", got[max(0, len(got)-100):])
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
		t.Errorf("%d KiB allocated for %d bytes", n>>10, len(text))
	}
	if got := URLs("https://a?x=1 https://a/https://b/https://c?x=1"); got != "https://a https://a/https://b/https://c" {
		t.Errorf("got %q", got)
	}
}
