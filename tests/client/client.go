// Package client speaks to a function by the contract: it signs requests, and takes
// answers apart without the function's own types. An answer that breaks the contract
// is an error, so that every test that builds also tests the form of its answer.
//
// Build is for a test that needs the build to succeed. Post is for one that looks at the
// whole answer, of a success or a failure. PostEach also shows each record as it arrives.
// Do, Fetch and Send are for requests that a test makes itself.
//
// Methods that begin with Must end the test where the others return an error. Only the
// test's own goroutine may call them.
package client

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// The forms of an answer, by their media types.
const (
	JSON   = "application/json"
	NDJSON = "application/x-ndjson"
	SSE    = "text/event-stream"
)

// Client sends requests to one function, or to what stands in front of it.
type Client struct {
	URL    string       // without a slash at its end
	Secret string       // signs requests
	Tenant string       // whom requests name in X-Build-Tenant; empty names nobody
	HTTP   *http.Client // sends requests; nil is http.DefaultClient

	// Strict makes an answer to POST an error if it is not a record. Only a text/plain
	// request may be answered with text. A gateway answers with text of its own, so a
	// client of a gateway is not strict.
	Strict bool
}

// Change changes a request before it is sent. A nil Change changes nothing.
type Change func(*http.Request)

// Header sets a header. An empty value removes it.
func Header(name, value string) Change {
	return func(req *http.Request) {
		req.Header.Del(name)
		if value != "" {
			req.Header.Set(name, value)
		}
	}
}

// Accept chooses the form of the answer. An empty form is the function's choice, JSON.
func Accept(form string) Change { return Header("Accept", form) }

// Signature replaces the signature. An empty one removes it.
func Signature(value string) Change { return Header("X-Build-Signature", value) }

// Queued makes a request look like one from OpenFaaS's queue: it has the call's id
// and an address for the verdict, to which the function itself sends nothing.
func Queued(callID string) Change {
	return func(req *http.Request) {
		Header("X-Call-Id", callID)(req)
		Header("X-Callback-Url", "http://127.0.0.1:1/")(req)
	}
}

// Sign returns the value of X-Build-Signature for a body.
func Sign(secret string, body []byte) string {
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write(body)
	return "sha256=" + hex.EncodeToString(mac.Sum(nil))
}

// Request returns a signed POST /build.
func (c *Client) Request(ctx context.Context, body []byte, changes ...Change) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.URL+"/build", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	req.Header.Set("X-Build-Signature", Sign(c.Secret, body))
	Header("X-Build-Tenant", c.Tenant)(req)
	for _, change := range changes {
		if change != nil {
			change(req)
		}
	}
	return req, nil
}

// Send sends a request and returns the answer unread. The caller closes its body.
func (c *Client) Send(req *http.Request) (*http.Response, error) {
	return cmp.Or(c.HTTP, http.DefaultClient).Do(req)
}

// Do sends a request for a build and reads the answer with Read.
func (c *Client) Do(req *http.Request) (Answer, error) { return c.do(req, nil) }

func (c *Client) do(req *http.Request, each func(Record)) (Answer, error) {
	start := time.Now()
	resp, err := c.Send(req)
	if err != nil {
		return Answer{}, err
	}
	defer resp.Body.Close()
	a, err := Read(resp, each)
	a.Took = time.Since(start)
	if err == nil && req.Method == http.MethodPost {
		err = c.check(req, a)
	}
	return a, err
}

// check compares the answer to a POST with its HTTP status and with the request.
func (c *Client) check(req *http.Request, a Answer) error {
	ok := a.StatusCode == http.StatusOK
	if a.IsJSON() && ok != (a.Status == "success") || a.IsStream() && !ok {
		return fmt.Errorf("HTTP %d has status %q", a.StatusCode, a.Status)
	}
	isText := func(h http.Header) bool { return strings.HasPrefix(h.Get("Content-Type"), "text/plain") }
	if c.Strict && a.Status == "" && !(isText(req.Header) && isText(a.Header)) {
		return fmt.Errorf("not a record: %v", a)
	}
	return nil
}

// Fetch sends a request for something that is no build's verdict, and reads the
// answer's body as it is.
func (c *Client) Fetch(req *http.Request) (Answer, error) {
	resp, err := c.Send(req)
	if err != nil {
		return Answer{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return Answer{StatusCode: resp.StatusCode, Header: resp.Header, Body: string(text)}, err
}

// Post sends a signed body and reads the answer with Read.
func (c *Client) Post(ctx context.Context, body []byte, changes ...Change) (Answer, error) {
	return c.PostEach(ctx, body, nil, changes...)
}

// PostEach is Post, and calls each, if not nil, for every record of a stream as it arrives.
// The answer is a stream only if a change asks for one, such as Accept(NDJSON).
func (c *Client) PostEach(ctx context.Context, body []byte, each func(Record), changes ...Change) (Answer, error) {
	req, err := c.Request(ctx, body, changes...)
	if err != nil {
		return Answer{}, err
	}
	return c.do(req, each)
}

// Build builds and returns the last record, with the whole log. A build that does
// not succeed is an error too, and its record is returned beside it.
func (c *Client) Build(ctx context.Context, body []byte) (Record, error) {
	a, err := c.Post(ctx, body, Accept(NDJSON))
	if err == nil && a.Status != "success" {
		err = fmt.Errorf("the build ended %s, %s: %s\n%s", a.Status, a.Code, a.Error, strings.Join(a.Log, "\n"))
	}
	return a.Record, err
}

// Verdict asks what is known of a build.
func (c *Client) Verdict(ctx context.Context, callID string) (Answer, error) {
	path := "/builds/" + callID
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL+path, nil)
	if err != nil {
		return Answer{}, err
	}
	req.Header.Set("X-Build-Signature", Sign(c.Secret, []byte("GET "+path)))
	Header("X-Build-Tenant", c.Tenant)(req)
	return c.Tell(req)
}

// Get returns the body of an answer with status 200, to a request that is not signed.
// Any other status is an error.
func (c *Client) Get(ctx context.Context, path string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL+path, nil)
	if err != nil {
		return "", err
	}
	Header("X-Build-Tenant", c.Tenant)(req)
	a, err := c.Fetch(req)
	if err == nil && a.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s answers %d: %s", path, a.StatusCode, a.Body)
	}
	return a.Body, err
}
