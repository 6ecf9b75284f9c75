package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	handler "github.com/openfaas/templates-sdk/go-http"

	"handler/function/api"
	"handler/function/reply"
	"handler/function/sealed"
	"handler/function/solve"
)

// plain serves an OpenFaaS FunctionHandler: a small answer that needs no body.
func plain(h handler.FunctionHandler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		req := handler.Request{Header: r.Header, QueryString: r.URL.RawQuery, Method: r.Method, Host: r.Host}
		req.WithContext(r.Context())
		res, err := h.Handle(req)
		if err != nil {
			id, _ := nameCall(w, r)
			refuse(w, r, api.AsError(err), reply.Options{ID: id})
			return
		}
		for key, values := range res.Header {
			w.Header()[key] = values
		}
		w.WriteHeader(res.StatusCode)
		w.Write(res.Body)
	})
}

// health answers while the process serves.
type health struct{}

func (health) Handle(handler.Request) (handler.Response, error) {
	return text(http.StatusOK, "ok"), nil
}

// readiness answers 503 before a request could pass and while shutting down.
// Neither being busy nor a lost daemon counts: callers would hang at the
// gateway instead of being told.
type readiness struct{ s *Server }

func (h readiness) Handle(handler.Request) (handler.Response, error) {
	if h.s.draining.Err() != nil {
		return text(http.StatusServiceUnavailable, "shutting down"), nil
	}
	if h.s.DisableHMAC {
		return text(http.StatusOK, "ready"), nil
	}
	keys, err := h.s.keys.now()
	if err != nil {
		if h.s.refusals.allow(h.s.Log) { // anybody can ask
			h.s.Log.Warn().Err(err).Msg("not ready: reading the payload secret")
		}
		return text(http.StatusServiceUnavailable, "the payload secret cannot be read"), nil
	}
	if len(keys) == 0 {
		return text(http.StatusServiceUnavailable, noKey), nil
	}
	return text(http.StatusOK, "ready"), nil
}

// publicKey is what clients seal build secrets to.
type publicKey struct{ s *Server }

func (h publicKey) Handle(handler.Request) (handler.Response, error) {
	private, err := h.s.BuildSecretsKey()
	if err != nil {
		return handler.Response{}, fmt.Errorf("reading the build-secrets key: %w", err)
	}
	if len(private) == 0 {
		return handler.Response{}, &api.Error{Code: api.NotFound, Msg: "no build-secrets key is configured"}
	}
	public, err := sealed.Public(private)
	if err != nil {
		return handler.Response{}, err
	}
	return asJSON(public)
}

// description says what this is, to whoever asks: no addresses, no secrets.
type description struct{ s *Server }

func (h description) Handle(handler.Request) (handler.Response, error) {
	s := h.s
	daemons := s.daemons.get()
	return asJSON(map[string]any{
		"name":    "builder",
		"version": s.Version,
		"limits": map[string]any{
			"body_bytes":     s.Limits.Body,
			"unpacked_bytes": s.Limits.Unpacked,
			"entries":        s.Limits.Entries,
			"builds":         s.MaxBuilds,
		},
		"builds_in_flight": len(s.builds),
		"daemons":          map[string]int{"reachable": daemons.Reachable, "total": daemons.Total},
	})
}

func text(status int, line string) handler.Response {
	return handler.Response{
		StatusCode: status,
		Header:     http.Header{"Content-Type": {api.TextType + "; charset=utf-8"}},
		Body:       []byte(line + "\n"),
	}
}

func asJSON(v any) (handler.Response, error) {
	body, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return handler.Response{}, err
	}
	return handler.Response{
		StatusCode: http.StatusOK,
		Header:     http.Header{"Content-Type": {api.JSONType}},
		Body:       append(body, '\n'),
	}, nil
}

// isText says that the client reads errors better as text: the OpenFaaS UI shows
// a JSON one as "[object Object]", and faas-cli invoke prints to a terminal.
func isText(r *http.Request) bool {
	t, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	return strings.EqualFold(strings.TrimSpace(t), api.TextType)
}

// daemonCount keeps the last count for a while: GET / and /metrics are open to
// everybody, and must not make a daemon's work.
type daemonCount struct {
	count func(context.Context) solve.Daemons

	mu   sync.Mutex
	at   time.Time
	last solve.Daemons
}

const (
	daemonCountAge  = 5 * time.Second
	daemonCountWait = 2 * time.Second
)

func (d *daemonCount) get() solve.Daemons {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.at.IsZero() || time.Since(d.at) > daemonCountAge {
		ctx, cancel := context.WithTimeout(context.Background(), daemonCountWait)
		defer cancel()
		d.last = d.count(ctx)
		d.at = time.Now()
	}
	return d.last
}
