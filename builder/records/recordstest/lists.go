package recordstest

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"handler/function/api"
	"handler/function/records"
)

// ids are of a page.
func ids(p records.Page) (list []string) {
	for _, r := range p.Builds {
		list = append(list, r.ID)
	}
	return list
}

// list returns a page that is complete. A store of several servers may give one that is not, while
// they choose who leads.
func list(t *testing.T, s records.Store, q records.Query) (page records.Page) {
	t.Helper()
	Eventually(t, func() (err error) {
		if page, err = s.List(Context(t), q); err == nil && !page.Complete {
			err = fmt.Errorf("%q is not the whole list", ids(page))
		}
		return err
	})
	return page
}

func testList(t *testing.T, open Open) {
	a, b := open(t), open(t)
	builds := make(map[string]records.Build)
	for i, id := range []string{"one", "two", "three", "four"} {
		s := []records.Store{a, b}[i%2]
		builds[id] = s.Begin(records.Record{Tenant: "acme", ID: id, Began: time.Now().Add(-time.Duration(i) * time.Hour), Image: []string{"reg.example.com/fn:1", "reg.example.com/fn2"}[i/2]}, func(string) {})
		Known(t, a, records.Ref{Tenant: "acme", ID: id}, Any)
		Known(t, b, records.Ref{Tenant: "acme", ID: id}, Any)
	}
	Begin(a, "other", "foreign")
	Known(t, b, records.Ref{Tenant: "other", ID: "foreign"}, Any)
	builds["one"].End(api.Record{Status: api.Success, Image: "reg.example.com/fn:1"})
	Known(t, b, records.Ref{Tenant: "acme", ID: "one"}, Ended)
	builds["three"].End(api.Record{Status: api.Failed, Image: "reg.example.com/fn2", Code: api.Deadline})
	Known(t, b, records.Ref{Tenant: "acme", ID: "three"}, Ended)

	for _, tt := range []struct {
		name string
		q    records.Query
		want []string
	}{
		{"all, in the order of their beginnings, whatever clocks and ends say", records.Query{Tenant: "acme", Limit: 50}, []string{"four", "three", "two", "one"}},
		{"an operator", records.Query{Operator: true, Limit: 50}, []string{"foreign", "four", "three", "two", "one"}},
		{"the other tenant", records.Query{Tenant: "other", Limit: 50}, []string{"foreign"}},
		{"nobody", records.Query{Limit: 50}, nil},
		{"running", records.Query{Tenant: "acme", Limit: 50, Status: api.InProgress}, []string{"four", "two"}},
		{"failed", records.Query{Tenant: "acme", Limit: 50, Status: api.Failed}, []string{"three"}},
		{"an image", records.Query{Tenant: "acme", Limit: 50, Image: "reg.example.com/fn:1"}, []string{"two", "one"}},
		{"a repository", records.Query{Tenant: "acme", Limit: 50, Image: "reg.example.com/fn"}, []string{"two", "one"}},
		{"an image that ended well", records.Query{Tenant: "acme", Limit: 50, Image: "reg.example.com/fn", Status: api.Success}, []string{"one"}},
		{"no limit is one", records.Query{Tenant: "acme"}, []string{"four"}},
	} {
		for i, s := range []records.Store{a, b} {
			if page := list(t, s, tt.q); !slices.Equal(ids(page), tt.want) {
				t.Errorf("%s: process %d lists %q, want %q", tt.name, i, ids(page), tt.want)
			}
		}
	}
	if _, err := a.List(Context(t), records.Query{Tenant: "acme", Before: "x"}); err == nil {
		t.Error("a Before that is none gives no error")
	}
}

// testPages pages through a list while builds begin and end: none is left out, none comes twice.
func testPages(t *testing.T, open Open) {
	a, b := open(t), open(t)
	const n = 25
	var builds []records.Build
	var want []string
	for i := range n {
		id := fmt.Sprintf("build-%d", i)
		builds = append(builds, Begin(a, "acme", id))
		Known(t, b, records.Ref{Tenant: "acme", ID: id}, Any)
		want = append(want, id)
	}
	slices.Reverse(want)
	var got []string
	q := records.Query{Tenant: "acme", Limit: 4}
	for i := 0; ; i++ {
		page := list(t, b, q)
		got = append(got, ids(page)...)
		if page.Next == "" {
			break
		}
		if len(page.Builds) != 4 {
			t.Fatalf("page %d has %d builds and a next one", i, len(page.Builds))
		}
		q.Before = page.Next
		Begin(a, "acme", fmt.Sprintf("later-%d", i))
		builds[n-1-len(got)].End(Success()) // the next page's first
		Known(t, b, records.Ref{Tenant: "acme", ID: want[len(got)]}, Ended)
	}
	if !slices.Equal(got, want) {
		t.Errorf("the pages have %q, want %q", got, want)
	}
}

// testRare has a tenant with few builds, before and after many of another tenant.
func testRare(t *testing.T, open Open) {
	a, b := open(t), open(t)
	begin := func(tenant, what string, n int) (began []string) {
		for i := range n {
			id := fmt.Sprint(what, i)
			Begin(a, tenant, id)
			began = append(began, id)
		}
		for _, id := range began {
			Known(t, b, records.Ref{Tenant: tenant, ID: id}, Any)
		}
		return began
	}
	early := begin("rare", "early-", 3)
	many := begin("acme", "many-", 600)
	late := begin("rare", "late-", 2)
	for _, tt := range []struct {
		tenant string
		limit  int
		want   []string
	}{
		{"rare", 1, slices.Concat(late, early)},
		{"rare", 50, slices.Concat(late, early)},
		{"acme", 199, many},
	} {
		for i, s := range []records.Store{a, b} {
			var got []string
			q := records.Query{Tenant: tt.tenant, Limit: tt.limit}
			for {
				page := list(t, s, q)
				got = append(got, ids(page)...)
				if q.Before = page.Next; q.Before == "" {
					break
				}
				if len(page.Builds) != tt.limit {
					t.Errorf("process %d lists %d builds of %s in a page of %d, and has a next one", i, len(page.Builds), tt.tenant, tt.limit)
				}
			}
			// Builds that begin at once have no order that a test could know.
			slices.Sort(got)
			slices.Sort(tt.want)
			if !slices.Equal(got, tt.want) {
				t.Errorf("process %d lists %d builds of %s in pages of %d, want each of the %d once", i, len(got), tt.tenant, tt.limit, len(tt.want))
			}
		}
	}
}

// testLateEnds has many builds that end after many others have begun: they are not newer for it.
func testLateEnds(t *testing.T, open Open) {
	a, b := open(t), open(t)
	const half = 400
	begin := func(what string) (builds []records.Build) {
		for i := range half {
			builds = append(builds, Begin(a, "acme", fmt.Sprint(what, i)))
		}
		for i := range half {
			Known(t, b, records.Ref{Tenant: "acme", ID: fmt.Sprint(what, i)}, Any)
		}
		return builds
	}
	early := begin("early-")
	begin("late-")
	for _, build := range early {
		build.End(Success())
	}
	for i := range half {
		Known(t, b, records.Ref{Tenant: "acme", ID: fmt.Sprint("early-", i)}, Ended)
	}
	for _, s := range []records.Store{a, b} {
		page := list(t, s, records.Query{Tenant: "acme", Limit: 10})
		if len(page.Builds) != 10 || slices.ContainsFunc(page.Builds, func(r records.Record) bool { return !r.Running() }) {
			t.Errorf("the latest builds are %q", ids(page))
		}
		page = list(t, s, records.Query{Tenant: "acme", Limit: 10, Status: api.Success})
		if len(page.Builds) != 10 || slices.ContainsFunc(page.Builds, func(r records.Record) bool { return r.Status != api.Success }) {
			t.Errorf("the latest successes are %q", ids(page))
		}
	}
}
