package client

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Build is what is known of a build, while it runs and afterwards. Log has lines only in the
// answer of Verdict.
type Build struct {
	Record

	Tenant     string    `json:"tenant"` // for operators
	Attempt    int       `json:"attempt"`
	Began      time.Time `json:"began"`
	Ended      time.Time `json:"ended"`
	Lines      uint64    `json:"lines"`
	Queued     bool      `json:"queued"`
	CanceledBy string    `json:"canceledBy"`
}

// List is a page of builds.
type List struct {
	Builds   []Build `json:"builds"`
	Next     string  `json:"next"`
	Complete bool    `json:"complete"`
	ID       string  `json:"id"` // of the request for it
}

// Line is one line of a log.
type Line struct {
	N    uint64 `json:"n"`
	Lost uint64 `json:"lost"`
	Text string `json:"t"`
}

// Log is the answer of GET /builds/<id>/log that has been read to its end.
type Log struct {
	Answer // of a refusal; otherwise its Build is the record at the end

	Lines []Line
	First time.Duration // from the request to the first line
}

// Texts are the lines without their numbers.
func (l Log) Texts() []string {
	var texts []string
	for _, line := range l.Lines {
		texts = append(texts, line.Text)
	}
	return texts
}

// Ask returns a request about builds, which is signed with a timestamp. path is what the function
// sees, with the query.
func (c *Client) Ask(ctx context.Context, method, path string, changes ...Change) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.URL+path, nil)
	if err != nil {
		return nil, err
	}
	now := strconv.FormatInt(time.Now().Unix(), 10)
	req.Header.Set("X-Build-Timestamp", now)
	req.Header.Set("X-Build-Signature", Sign(c.Secret, []byte(now+"."+method+" "+path)))
	Header("X-Build-Tenant", c.Tenant)(req)
	for _, change := range changes {
		if change != nil {
			change(req)
		}
	}
	return req, nil
}

// Tell sends a request about one build, whose answer is a Build or a refusal.
func (c *Client) Tell(req *http.Request) (Answer, error) {
	start := time.Now()
	a, err := c.Fetch(req)
	a.Took = time.Since(start)
	if err == nil && a.IsJSON() {
		a.Build, err = decodeBuild(a.Body)
		a.Record = a.Build.Record
	}
	return a, err
}

// Stop asks for a build's end.
func (c *Client) Stop(ctx context.Context, id string, changes ...Change) (Answer, error) {
	req, err := c.Ask(ctx, http.MethodDelete, "/builds/"+id, changes...)
	if err != nil {
		return Answer{}, err
	}
	return c.Tell(req)
}

// Builds lists builds. The query is without its question mark.
func (c *Client) Builds(ctx context.Context, query string) (List, error) {
	path := "/builds"
	if query != "" {
		path += "?" + query
	}
	req, err := c.Ask(ctx, http.MethodGet, path)
	if err != nil {
		return List{}, err
	}
	a, err := c.Fetch(req)
	if err != nil {
		return List{}, err
	}
	var l List
	switch err := strictly(a.Body, &l); {
	case a.StatusCode != http.StatusOK:
		return List{}, fmt.Errorf("listing builds: %v", a)
	case err != nil:
		return List{}, err
	case l.Builds == nil:
		return List{}, fmt.Errorf("builds is missing or null: %.1000q", a.Body)
	}
	for _, b := range l.Builds {
		if err := b.check(); err != nil {
			return List{}, err
		}
	}
	return l, nil
}

// ReadLog reads the log of a build. query is without its question mark. each, if not nil, is
// called for every line as it arrives. Lines that are not in order, or that are missing without
// being said to be lost, are an error.
func (c *Client) ReadLog(ctx context.Context, id, query string, each func(Line), changes ...Change) (Log, error) {
	path := "/builds/" + id + "/log"
	if query != "" {
		path += "?" + query
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		return Log{}, err
	}
	req, err := c.Ask(ctx, http.MethodGet, path, changes...)
	if err != nil {
		return Log{}, err
	}
	start := time.Now()
	resp, err := c.Send(req)
	if err != nil {
		return Log{}, err
	}
	defer resp.Body.Close()
	l := Log{Answer: Answer{StatusCode: resp.StatusCode, Header: resp.Header}}
	if !l.IsStream() {
		text, err := io.ReadAll(resp.Body)
		if l.Body = string(text); err == nil && l.IsJSON() {
			l.Record, err = Decode(l.Body)
		}
		return l, err
	}
	last, err := strconv.ParseUint(cmp.Or(req.Header.Get("Last-Event-ID"), values.Get("after"), "0"), 10, 64)
	if err != nil {
		return l, err
	}
	err = l.read(resp.Body, last, func(line Line) {
		if l.First == 0 {
			l.First = time.Since(start)
		}
		if each != nil {
			each(line)
		}
	})
	l.Took = time.Since(start)
	return l, err
}

func (l *Log) read(r io.Reader, last uint64, each func(Line)) error {
	lines := bufio.NewReader(r)
	for over := false; ; {
		id, data, err := l.object(lines)
		if err == io.EOF {
			if !over {
				return fmt.Errorf("%w, after line %d", ErrNoVerdict, last)
			}
			return nil
		}
		var kind struct {
			N     *uint64
			Began *time.Time
		}
		switch {
		case err != nil:
			return err
		case over:
			return fmt.Errorf("after the record came %.200q", data)
		case data == "":
			l.Heartbeats++
			continue
		}
		if err := json.Unmarshal([]byte(data), &kind); err != nil {
			return fmt.Errorf("reading a log: %w: %.200q", err, data)
		}
		switch {
		case kind.N != nil:
			var line Line
			if err := strictly(data, &line); err != nil {
				return err
			}
			if line.N != last+max(line.Lost, 1) {
				return fmt.Errorf("after line %d came %.200q", last, data)
			}
			if last = line.N; id != "" && id != fmt.Sprint(last) {
				return fmt.Errorf("the event of line %d has the id %q", last, id)
			}
			l.Lines = append(l.Lines, line)
			each(line)
		case kind.Began == nil && l.Header.Get("Content-Type") == NDJSON && data == `{"status":"in_progress"}`:
			l.Heartbeats++
		default:
			if l.Build, err = decodeBuild(data); err != nil {
				return err
			}
			l.Record, over = l.Build.Record, true
		}
	}
}

// object returns the next object of a log, or "" for a comment. io.EOF is a proper end.
func (l *Log) object(lines *bufio.Reader) (id, data string, err error) {
	next := func() (string, error) {
		line, err := lines.ReadString('\n')
		if err != nil && !(err == io.EOF && line == "") {
			err = fmt.Errorf("the log broke off at %.100q: %w", line, errors.Join(err, io.ErrUnexpectedEOF))
		}
		return strings.TrimSuffix(line, "\n"), err
	}
	line, err := next()
	if err != nil || l.Header.Get("Content-Type") != SSE {
		return "", line, err
	}
	if text, ok := strings.CutPrefix(line, "id: "); ok {
		id = text
		if line, err = next(); err != nil {
			return "", "", errors.Join(err, io.ErrUnexpectedEOF)
		}
	}
	if blank, err := next(); err != nil || blank != "" {
		return "", "", fmt.Errorf("after %.100q came %.100q instead of a blank line: %v", line, blank, err)
	}
	if strings.HasPrefix(line, ":") {
		return "", "", nil
	}
	data, ok := strings.CutPrefix(line, "data: ")
	if !ok || data == "" {
		return "", "", fmt.Errorf("not an event: %.200q", line)
	}
	return id, data, nil
}

// decodeBuild is Decode for a Build. A refusal is one too.
func decodeBuild(text string) (Build, error) {
	var b Build
	if err := strictly(text, &b); err != nil {
		return Build{}, err
	}
	return b, b.check()
}

func (b Build) check() error {
	switch {
	case b.Status != "in_progress" && !b.ended():
		return fmt.Errorf("a build has status %q", b.Status)
	case b.Image != b.ImageName:
		return fmt.Errorf("image is %q but imageName %q", b.Image, b.ImageName)
	case (b.Status == "failed") != (b.Code != ""):
		return fmt.Errorf("status is %q but code %q", b.Status, b.Code)
	case !b.Began.IsZero() && b.ended() != !b.Ended.IsZero():
		return fmt.Errorf("status is %q, and the build ended at %v", b.Status, b.Ended)
	}
	return nil
}

// MustStop is Stop.
func (c *Client) MustStop(t testing.TB, ctx context.Context, id string, changes ...Change) Answer {
	t.Helper()
	a, err := c.Stop(ctx, id, changes...)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// MustList is Builds.
func (c *Client) MustList(t testing.TB, ctx context.Context, query string) List {
	t.Helper()
	l, err := c.Builds(ctx, query)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// MustReadLog is ReadLog, of all that there is.
func (c *Client) MustReadLog(t testing.TB, ctx context.Context, id, query string, changes ...Change) Log {
	t.Helper()
	l, err := c.ReadLog(ctx, id, query, nil, changes...)
	if err != nil {
		t.Fatal(err)
	}
	return l
}
