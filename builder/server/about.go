package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"time"

	handler "github.com/openfaas/templates-sdk/go-http"

	"handler/function/api"
	"handler/function/reply"
	"handler/function/sealed"
	"handler/function/solve"
)

// adapt makes an http.Handler of an OpenFaaS FunctionHandler. All of this file's handlers
// answer small questions about the builder, without a body and a signature.
func (s *Server) adapt(h handler.FunctionHandler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		req := handler.Request{Header: r.Header, QueryString: r.URL.RawQuery, Method: r.Method, Host: r.Host}
		req.WithContext(r.Context())
		res, err := h.Handle(req)
		if err != nil {
			id, _ := nameCall(w, r)
			s.refuseUnverified(w, r, err, reply.Options{ID: id})
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

// readiness answers 503 while there is no key that a request could be signed with, and
// during a shutdown. It answers 200 when the builder is busy or a daemon is lost: at 503
// callers would hang at the gateway, and never see an answer that tells them so.
type readiness struct{ s *Server }

func (h readiness) Handle(handler.Request) (handler.Response, error) {
	if h.s.draining.Err() != nil {
		return text(http.StatusServiceUnavailable, "shutting down"), nil
	}
	if h.s.DisableHMAC {
		return text(http.StatusOK, "ready"), nil
	}
	who, err := h.s.roster()
	if err != nil {
		why, what := api.AsError(err).Msg, "the tenants"
		if why == noSecret {
			what = "the payload secret"
		}
		if h.s.refusals.allow(h.s.Log) { // anybody can ask
			h.s.Log.Warn().Err(err).Msg("not ready: reading " + what)
		}
		return text(http.StatusServiceUnavailable, why), nil
	}
	if keys, all := who.set.All(); all && len(keys) == 0 {
		return text(http.StatusServiceUnavailable, noKey), nil
	}
	return text(http.StatusOK, "ready"), nil
}

// publicKey answers with the key that clients seal build secrets to. Each tenant has one of its
// own. A request names the tenant as it would for a build.
type publicKey struct{ s *Server }

func (h publicKey) Handle(r handler.Request) (handler.Response, error) {
	private, err := h.s.BuildSecretsKey()
	if err != nil {
		return handler.Response{}, fmt.Errorf("reading the build-secrets key: %w", err)
	}
	if len(private) == 0 {
		return handler.Response{}, &api.Error{Code: api.NotFound, Msg: "no build-secrets key is configured"}
	}
	set, err := h.s.fileOfTenants()
	if err != nil {
		return handler.Response{}, err
	}
	if set != nil {
		if private, err = (roster{set: set}).sealingKey(private, r); err != nil {
			return handler.Response{}, err
		}
	}
	public, err := sealed.Public(private)
	if err != nil {
		return handler.Response{}, err
	}
	return asJSON(public)
}

// sealingKey derives the private key of the tenant that a request names. For a name that no
// tenant has, it derives a key that nobody uses, so that the answer does not tell.
func (r roster) sealingKey(private []byte, req handler.Request) ([]byte, error) {
	list, ok := r.named(req.Header, req.Host)
	if !ok {
		if len(r.set.Tenants) != 1 {
			return nil, &api.Error{Code: api.NotFound, Msg: "each tenant has a key of its own here; name yours in the header " + api.TenantHeader}
		}
		return sealed.Derive(private, r.set.Tenants[0].ID)
	}
	if t := list[0].Tenant; t != nil {
		return sealed.Derive(private, t.ID)
	}
	return sealed.Decoy(private, nameIn(req.Header))
}

// description says what the builder is. Anybody can ask, so it has no address and no
// secret.
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
		"builds_in_flight": s.builds.Taken(),
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

// daemonCount keeps a count of the daemons for a while: GET / and /metrics are open to
// everybody, and must not make work for the daemons.
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
