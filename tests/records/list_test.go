package records

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"handler/function/api"
	"handler/function/records"
	"handler/function/records/jetstream"
	"handler/function/records/recordstest"
	"handler/function/tests/stack"
)

// TestLargeRecords lists records that together are far larger than what a list may ask the server
// for at once, and one that is larger alone.
func TestLargeRecords(t *testing.T) {
	t.Parallel()
	const most, count = 4 << 20, 28
	servers := start(t, stack.NATSConfig{More: "max_payload: 8MB"})
	s := opened(t, servers, nil)
	want := make(map[string]int)
	for i := range count {
		size := 300 << 10
		if i == count/2 {
			size = most + 1<<20
		}
		id := fmt.Sprintf("b%d", i)
		want[id] = size
		b := s.Begin(records.Record{Tenant: "acme", ID: id, Began: time.Now(), Tags: []string{strings.Repeat("t", size)}}, func(string) {})
		verdict := recordstest.Success()
		verdict.Tags = []string{strings.Repeat("t", size)}
		b.End(verdict)
	}
	stored(t, s)
	// Another process: it has no builds of its own to list.
	other := opened(t, servers, nil)
	x := newStranger(t, servers)
	var page records.Page
	recordstest.Eventually(t, func() (err error) { // a list has three seconds, which a busy machine may need
		page, err = other.List(recordstest.Context(t), records.Query{Tenant: "acme", Limit: 200})
		if err == nil && (!page.Complete || len(page.Builds) != len(want)) {
			err = fmt.Errorf("%d builds of %d, complete %v", len(page.Builds), len(want), page.Complete)
		}
		return err
	})
	for _, r := range page.Builds {
		if r.Running() || len(r.Tags) != 1 || len(r.Tags[0]) != want[r.ID] {
			t.Errorf("%s: %s, with %d tags", r.ID, r.Status, len(r.Tags))
		}
	}
	asked := x.heard("$JS.API.CONSUMER.MSG.NEXT.", "")
	if len(asked) < count*300<<10/most {
		t.Errorf("the server was asked %d times", len(asked))
	}
	for _, m := range asked {
		var q struct {
			Batch int `json:"batch"`
			Bytes int `json:"max_bytes"`
		}
		if err := json.Unmarshal(m.Data, &q); err != nil || q.Batch != 1 && (q.Bytes == 0 || q.Bytes > most) {
			t.Errorf("a list asks for %s, %v: no more than %d bytes, or one message", m.Data, err, most)
		}
	}
}

// TestNextAfterEnd lists running builds, of which the newest has ended in its process and not yet in
// the store. The page leaves it out, and has a next one.
func TestNextAfterEnd(t *testing.T) {
	t.Parallel()
	servers := start(t, stack.NATSConfig{})
	s := opened(t, servers, nil)
	var newest records.Build
	for i := range 5 {
		id := fmt.Sprint(i)
		newest = recordstest.Begin(s, "acme", id)
		recordstest.Known(t, s, records.Ref{Tenant: "acme", ID: id}, func(r records.Record) error {
			if r.Attempt == 0 {
				return errors.New("it is not stored")
			}
			return nil
		})
	}
	refuse(t, servers, jetstream.RecordStream)
	newest.End(recordstest.Success())
	var got []string
	q := records.Query{Tenant: "acme", Status: api.InProgress, Limit: 1}
	for {
		page, err := s.List(recordstest.Context(t), q)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range page.Builds {
			got = append(got, r.ID)
		}
		if q.Before = page.Next; q.Before == "" {
			break
		}
	}
	if want := []string{"3", "2", "1", "0"}; !slices.Equal(got, want) {
		t.Errorf("by pages: %q, want %q", got, want)
	}
}
