// Package function is a function for lang golang-middleware that says hello.
package function

import (
	"fmt"
	"net/http"
)

// Handle answers with a greeting for the path's name.
func Handle(w http.ResponseWriter, r *http.Request) {
	name := r.URL.Path[1:]
	if name == "" {
		name = "world"
	}
	fmt.Fprintf(w, "hello, %s\n", name)
}
