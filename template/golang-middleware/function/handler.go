package function

import (
	"fmt"
	"io"
	"net/http"
)

// maxBody is the longest request body read into memory.
const maxBody = 1 << 20

// Handle answers every request to the function, whatever its method and path.
func Handle(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		http.Error(w, "reading the body: "+err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintf(w, "Body: %s", body)
}
