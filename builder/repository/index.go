package repository

import "strings"

// Index finds prefixes that names lie within, in a time that does not depend on how many there
// are. The zero Index is empty. It is safe for concurrent use once nothing is added any more.
type Index[T any] struct {
	sure, possible map[string]T
}

// Add puts a prefix into the index. It takes the place of an equal one.
func (x *Index[T]) Add(prefix string, value T) {
	if x.sure == nil {
		x.sure, x.possible = make(map[string]T), make(map[string]T)
	}
	x.sure[form(prefix, sure)] = value
	x.possible[form(prefix, possible)] = value
}

// Within returns the value of the longest prefix that name surely lies within.
func (x *Index[T]) Within(name string) (value T, ok bool) { return above(x.sure, form(name, sure)) }

// MayBeWithin returns the value of the longest prefix that name may lie within.
func (x *Index[T]) MayBeWithin(name string) (value T, ok bool) {
	return above(x.possible, form(name, possible))
}

// above looks for name in a map, and for the names above it.
func above[T any](prefixes map[string]T, name string) (value T, ok bool) {
	for {
		if value, ok = prefixes[name]; ok {
			return value, true
		}
		i := strings.LastIndexByte(name, '/')
		if i < 0 {
			return value, false
		}
		name = name[:i]
	}
}
