package client

import (
	"context"
	"net/http"
	"strings"
	"testing"
)

// MustRequest is Request.
func (c *Client) MustRequest(t testing.TB, ctx context.Context, body []byte, changes ...Change) *http.Request {
	t.Helper()
	req, err := c.Request(ctx, body, changes...)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

// MustDo is Do.
func (c *Client) MustDo(t testing.TB, req *http.Request) Answer {
	t.Helper()
	a, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// MustFetch is Fetch.
func (c *Client) MustFetch(t testing.TB, req *http.Request) Answer {
	t.Helper()
	a, err := c.Fetch(req)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// MustPost is Post.
func (c *Client) MustPost(t testing.TB, ctx context.Context, body []byte, changes ...Change) Answer {
	t.Helper()
	a, err := c.Post(ctx, body, changes...)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// MustBuild is Build: the build must succeed.
func (c *Client) MustBuild(t testing.TB, ctx context.Context, body []byte) Record {
	t.Helper()
	r, err := c.Build(ctx, body)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// MustFail builds: the build must fail with the code.
func (c *Client) MustFail(t testing.TB, ctx context.Context, body []byte, code string) Record {
	t.Helper()
	a := c.MustPost(t, ctx, body, Accept(NDJSON))
	if a.Status != "failed" || a.Code != code {
		t.Fatalf("want failed %s, got %v", code, a)
	}
	return a.Record
}

// MustVerdict is Verdict.
func (c *Client) MustVerdict(t testing.TB, ctx context.Context, callID string) Answer {
	t.Helper()
	a, err := c.Verdict(ctx, callID)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// HTTPStatus is the contract's status of a failure that is no stream, by its code.
var HTTPStatus = map[string]int{
	"bad_tar": 400, "bad_config": 400, "bad_secrets": 400, "bad_envelope": 400, "bad_context": 400, "bad_body": 400,
	"slow_upload": 400, "bad_query": 400,
	"unauthorized":    401,
	"image_forbidden": 403, "context_forbidden": 403, "platform_forbidden": 403, "from_forbidden": 403, "suspended": 403,
	"not_found":          404,
	"method_not_allowed": 405,
	"canceled":           409,
	"too_large":          413,
	"build_failed":       422, "registry_denied": 422, "deadline": 422,
	"busy": 429, "tenant_busy": 429, // tenant_busy is 503 for a caller that waits for a slot
	"internal": 500,
	"stalled":  503, "queue_timeout": 503, "no_daemon": 503, "daemon_lost": 503, "daemon_full": 503,
	"registry_failed": 503, "registry_timeout": 503, "context_failed": 503,
	"no_space": 503, "not_ready": 503, "shutting_down": 503, "lost": 503,
	"owner_unreachable": 503, "records_unreachable": 503,
}

// WantFailed checks a failure's code, its HTTP status if the answer is no stream, and that
// its error contains all of the texts. It ends the test if the code is another.
func (a Answer) WantFailed(t testing.TB, code string, texts ...string) {
	t.Helper()
	if a.Status != "failed" || a.Code != code {
		t.Fatalf("want failed %s, got %v", code, a)
	}
	for _, text := range texts {
		if !strings.Contains(a.Error, text) {
			t.Errorf("the error lacks %q: %v", text, a)
		}
	}
	if a.IsStream() {
		return
	}
	if want, ok := HTTPStatus[code]; !ok {
		t.Errorf("no status is known for %s", code)
	} else if a.StatusCode != want {
		t.Errorf("%s came with HTTP %d, want %d", code, a.StatusCode, want)
	}
	if retry := a.StatusCode == 429 || a.StatusCode == 503; retry != (a.Header.Get("Retry-After") != "") {
		t.Errorf("HTTP %d came with Retry-After %q", a.StatusCode, a.Header.Get("Retry-After"))
	}
}

// WantSuccess ends the test if the build did not succeed.
func (a Answer) WantSuccess(t testing.TB) {
	t.Helper()
	if a.Status != "success" || a.Code != "" || a.Error != "" {
		t.Fatalf("want success, got %v", a)
	}
}
