package client

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// Record is one object of an answer. It has every key of the contract.
type Record struct {
	Log       []string `json:"log"`
	Image     string   `json:"image"`
	ImageName string   `json:"imageName"`
	Status    string   `json:"status"` // in_progress, success or failed
	Error     string   `json:"error"`
	Code      string   `json:"code"`
	Duration  float64  `json:"duration"` // seconds
	Digest    string   `json:"digest"`
	Commit    string   `json:"commit"` // of a git context
	Tags      []string `json:"tags"`
	Platforms []string `json:"platforms"`
	Warnings  []string `json:"warnings"`
	ID        string   `json:"id"`
	Request   string   `json:"request"` // of the last record, hex SHA-256
}

// ended says whether the record is a verdict.
func (r Record) ended() bool { return r.Status == "success" || r.Status == "failed" }

// Answer is a response that has been read to its end.
type Answer struct {
	// Record is the last record, with the log of all. It is zero where the answer is
	// neither JSON nor a stream. Beside an error it is the last record that came.
	Record

	// Build is the same of an answer about a build. Otherwise it is zero.
	Build Build

	StatusCode int // HTTP's
	Header     http.Header
	Body       string // as it came

	Records    []Record      // a stream's, each as it came
	Heartbeats int           // of a stream
	Took       time.Duration // from the request to the answer's end
}

func (a Answer) String() string {
	if a.Status == "" {
		return fmt.Sprintf("HTTP %d of %s after %v: %.1000q", a.StatusCode, a.Header.Get("Content-Type"), a.Took.Round(time.Millisecond), a.Body)
	}
	return fmt.Sprintf("HTTP %d, %s %s after %v: %s\nlog: %q", a.StatusCode, a.Status, a.Code, a.Took.Round(time.Millisecond), a.Error, a.Log)
}

// IsJSON says whether the answer is one JSON object.
func (a Answer) IsJSON() bool { return a.Header.Get("Content-Type") == JSON }

// IsStream says whether the answer is a stream of records.
func (a Answer) IsStream() bool {
	form := a.Header.Get("Content-Type")
	return form == NDJSON || form == SSE
}

// Decode reads one record. It allows no key that the contract does not have, and
// nothing after the record.
func Decode(text string) (Record, error) {
	var r Record
	if err := strictly(text, &r); err != nil {
		return Record{}, err
	}
	switch {
	case r.Status != "in_progress" && !r.ended():
		return Record{}, fmt.Errorf("a record has status %q: %.1000q", r.Status, text)
	case r.Image != r.ImageName:
		return Record{}, fmt.Errorf("image is %q but imageName %q", r.Image, r.ImageName)
	case r.Log == nil:
		return Record{}, fmt.Errorf("log is missing or null: %.1000q", text)
	case (r.Status == "failed") != (r.Code != ""):
		return Record{}, fmt.Errorf("status is %q but code %q", r.Status, r.Code)
	}
	return r, nil
}

// strictly decodes one JSON object that has no other key than v, and nothing after it.
func strictly(text string, v any) error {
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("reading a record: %w: %.1000q", err, text)
	}
	if _, err := d.Token(); err != io.EOF {
		return fmt.Errorf("more than one JSON value: %.1000q", text)
	}
	return nil
}

// Read returns ErrNoVerdict for a well-formed stream that ends without success or failed.
var ErrNoVerdict = errors.New("the stream ended without a verdict")

// maxLine bounds a line of a stream with its newline, in bytes.
const maxLine = 60 << 10

// Read reads an answer to its end and takes it apart: a JSON object as one record, a
// stream line by line. Text is not taken apart. Read calls each, if not nil, for every
// record of a stream as it arrives. Beside an error it returns what had come until then.
func Read(resp *http.Response, each func(Record)) (Answer, error) {
	a := Answer{StatusCode: resp.StatusCode, Header: resp.Header}
	if a.IsStream() {
		err := a.readStream(resp.Body, each)
		return a, err
	}
	text, err := io.ReadAll(resp.Body)
	a.Body = string(text)
	if err != nil {
		return a, fmt.Errorf("reading the answer, after %.1000q: %w", text, err)
	}
	if a.IsJSON() {
		a.Record, err = Decode(a.Body)
	}
	return a, err
}

func (a *Answer) readStream(r io.Reader, each func(Record)) error {
	var body strings.Builder
	var log []string
	defer func() { a.Body, a.Log = body.String(), log }()
	events := a.Header.Get("Content-Type") == SSE
	for lines := bufio.NewReader(r); ; {
		line, err := lines.ReadString('\n')
		body.WriteString(line)
		if err == io.EOF && line == "" {
			break
		}
		if err != nil {
			return fmt.Errorf("the stream broke off at %.100q: %w", line, err)
		}
		if len(line) > maxLine {
			return fmt.Errorf("a line has %d bytes: %.200q", len(line), line)
		}
		text := strings.TrimSuffix(line, "\n")
		if events {
			if text, err = readEvent(lines, &body, text); err != nil {
				return err
			}
			if text == "" {
				a.Heartbeats++
				continue
			}
		}
		if a.ended() {
			return fmt.Errorf("after the last record came %.200q", line)
		}
		record, err := Decode(text)
		if err != nil {
			return err
		}
		if record.Status == "in_progress" && len(record.Log) == 0 {
			a.Heartbeats++
		}
		a.Record = record
		a.Records = append(a.Records, record)
		log = append(log, record.Log...)
		if each != nil {
			each(record)
		}
	}
	if !a.ended() {
		return fmt.Errorf("%w, after %.500q", ErrNoVerdict, log)
	}
	return nil
}

// readEvent returns the data of a server-sent event, which is one line, and reads the
// blank line that ends it. A comment has no data.
func readEvent(lines *bufio.Reader, body *strings.Builder, line string) (data string, err error) {
	blank, err := lines.ReadString('\n')
	body.WriteString(blank)
	if err != nil {
		return "", fmt.Errorf("the stream broke off after %.100q: %w", line, err)
	}
	if blank != "\n" {
		return "", fmt.Errorf("an event has a second line: %.200q", blank)
	}
	if strings.HasPrefix(line, ":") {
		return "", nil
	}
	data, ok := strings.CutPrefix(line, "data: ")
	if !ok || data == "" {
		return "", fmt.Errorf("not an event: %.200q", line)
	}
	return data, nil
}
