package payload

import (
	"errors"
	"fmt"

	"handler/function/api"
)

// ErrNoContext is for a tar without a context, if the config names no context either.
var ErrNoContext = &api.Error{Code: api.BadTar, Msg: fmt.Sprintf("reading tar: it holds no directory %q", api.ContextDir)}

// ErrNoRoom is for a body that finds its budget of the disk spent.
var ErrNoRoom = &api.Error{Code: api.NoSpace, Msg: "no room is left for the body: other requests take all of it (max_spool_bytes)"}

// These two say that there is no index now. No client sees them: the index can be made
// later.
var (
	errMemory = errors.New("indexing payload: no memory is left for it")
	// errLater is for an index that costs more than the body that was sent. Only a
	// client whose signature has passed may have one.
	errLater = errors.New("indexing payload: a sparse file or a long extended header is for later")
)

// badTar is an error of the client's tar.
func badTar(cause error, format string, args ...any) error {
	return &api.Error{Code: api.BadTar, Msg: fmt.Sprintf(format, args...), Err: cause}
}

// tooLarge is the error of a body over one of the Limits.
func tooLarge(format string, args ...any) error {
	return &api.Error{Code: api.TooLarge, Msg: fmt.Sprintf(format, args...)}
}
