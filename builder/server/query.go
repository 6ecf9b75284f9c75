package server

import (
	"fmt"
	"net/url"
	"slices"
	"strconv"

	"handler/function/api"
	"handler/function/records"
)

// query is the query of a request, each key once.
type query map[string]string

func badQuery(format string, args ...any) error {
	return &api.Error{Code: api.BadQuery, Msg: fmt.Sprintf("the query: "+format, args...)}
}

// parseQuery reads a query that has some of the keys. A query that another reader could read
// differently is an error: a proxy might then see another request than the signed one.
func parseQuery(raw string, keys []string) (query, error) {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return nil, badQuery("%v", err)
	}
	q := make(query)
	for key, list := range values {
		switch {
		case !slices.Contains(keys, key):
			return nil, badQuery("%.40q is no key of this route", key)
		case len(list) > 1:
			return nil, badQuery("%q is there twice", key)
		}
		q[key] = list[0]
	}
	return q, nil
}

func (q query) text(key string) string { return q[key] }

// number reads a whole number from 1 to most. It is 0 if it is not there.
func (q query) number(key string, most int) (int, error) {
	text, ok := q[key]
	if !ok {
		return 0, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > most {
		return 0, badQuery("%s=%.40q is not a whole number from 1 to %d", key, text, most)
	}
	return n, nil
}

// defaultLimit bounds the records of a list if the query has no limit.
const defaultLimit = 50

// list reads the query of a list.
func (q query) list() (l records.Query, err error) {
	l = records.Query{Status: api.Status(q["status"]), Image: q["image"], Before: q["before"], Limit: defaultLimit}
	if !slices.Contains([]api.Status{"", api.InProgress, api.Success, api.Failed}, l.Status) {
		return l, badQuery("status=%.40q is not one of %s, %s and %s", l.Status, api.InProgress, api.Success, api.Failed)
	}
	n, err := q.number("limit", records.MaxPage)
	if n > 0 {
		l.Limit = n
	}
	return l, err
}
