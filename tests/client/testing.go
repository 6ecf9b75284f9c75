package client

import (
	"context"
	"net/http"
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

// MustFail builds and expects a failure with a code. The test goes on where the code
// is another.
func (c *Client) MustFail(t testing.TB, ctx context.Context, body []byte, code string) Record {
	t.Helper()
	a := c.MustPost(t, ctx, body, Accept(NDJSON))
	if a.Status != "failed" || a.Code != code {
		t.Errorf("want failed %s, got %v", code, a)
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
