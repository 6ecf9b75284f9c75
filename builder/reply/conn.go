package reply

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"
)

// conn is the connection to a client. The response writer of a test may not know deadlines
// and flushes; then they do nothing.
type conn struct {
	http.ResponseWriter
	rc *http.ResponseController
}

func newConn(w http.ResponseWriter) *conn {
	return &conn{w, http.NewResponseController(w)}
}

func (c *conn) send(p []byte) error {
	if _, err := c.Write(p); err != nil {
		return writeError(err)
	}
	return c.flush()
}

// setDeadline bounds the writes from now on. The last deadline stays in place for what
// net/http writes after the answer. net/http clears it before the next request.
func (c *conn) setDeadline(t time.Time) error {
	return supported(c.rc.SetWriteDeadline(t))
}

func (c *conn) flush() error {
	return supported(c.rc.Flush())
}

func supported(err error) error {
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return writeError(err)
}

func writeError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ErrSlow
	}
	return fmt.Errorf("writing answer: %w", err)
}
