// Command provider is the smallest OpenFaaS provider: it has one function,
// builder, that runs already, and stands in for faas-netes and faasd, which cannot
// be had as modules. Routes, timeouts and the proxy are faas-provider's own, as
// theirs are.
//
// It takes the function's URL, its own port and the timeouts from the
// environment: function_url, port, read_timeout, write_timeout.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"

	bootstrap "github.com/openfaas/faas-provider"
	"github.com/openfaas/faas-provider/proxy"
	"github.com/openfaas/faas-provider/types"
)

const (
	name      = "builder"
	namespace = "openfaas-fn"
)

// one resolves the one function, with and without its namespace.
type one struct{ url url.URL }

func (o one) Resolve(function string) (url.URL, error) {
	if strings.TrimSuffix(function, "."+namespace) != name {
		return url.URL{}, fmt.Errorf("there is no function %q", function)
	}
	return o.url, nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	target, err := url.Parse(os.Getenv("function_url"))
	if err != nil || target.Host == "" {
		log.Fatalf("function_url is %q, not a URL", os.Getenv("function_url"))
	}
	config, err := types.ReadConfig{}.Read(types.OsEnv{})
	if err != nil {
		log.Fatal(err)
	}
	status := types.FunctionStatus{
		Name:              name,
		Namespace:         namespace,
		Image:             name + ":latest",
		Replicas:          1,
		AvailableReplicas: 1,
	}
	// The gateway asks Prometheus how often a function was called, and lists none
	// without an answer.
	bootstrap.Router().HandleFunc("/api/v1/query", answer(map[string]any{
		"status": "success",
		"data":   map[string]any{"resultType": "vector", "result": []any{}},
	}))
	bootstrap.Serve(ctx, &types.FaaSHandlers{
		FunctionProxy:  proxy.NewHandlerFunc(*config, one{*target}, false),
		FunctionLister: answer([]types.FunctionStatus{status}),
		FunctionStatus: answer(status),
		ListNamespaces: answer([]string{namespace}),
		Info:           answer(types.ProviderInfo{Name: "tests", Version: &types.VersionInfo{Release: "none"}, Orchestration: "none"}),
		Health:         func(http.ResponseWriter, *http.Request) {},
		Secrets:        answer([]types.Secret{}),
		DeployFunction: unavailable,
		UpdateFunction: unavailable,
		DeleteFunction: unavailable,
		ScaleFunction:  unavailable,
		Logs:           unavailable,
	}, config)
}

func answer(v any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(v)
	}
}

func unavailable(w http.ResponseWriter, _ *http.Request) {
	http.Error(w, "this provider has one function, which is given", http.StatusNotImplemented)
}
