// Command of-watchdog-standin stands in for OpenFaaS's of-watchdog in tests on
// machines that cannot get it. It starts the function and passes requests on,
// and answers its two health paths; of-watchdog's modes, limits, metrics and
// logs it does not have.
package main

import (
	"cmp"
	"context"
	"errors"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	log.SetPrefix("of-watchdog stand-in: ")
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	upstream, err := url.Parse(cmp.Or(os.Getenv("upstream_url"), "http://127.0.0.1:8082"))
	if err != nil {
		return err
	}
	args := strings.Fields(os.Getenv("fprocess"))
	if len(args) == 0 {
		return errors.New("fprocess is not set")
	}
	child := exec.Command(args[0], args[1:]...)
	child.Stdout, child.Stderr = os.Stdout, os.Stderr
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := child.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- child.Wait() }()

	term, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	proxy := httputil.NewSingleHostReverseProxy(upstream)
	proxy.FlushInterval = -1
	mux := http.NewServeMux()
	mux.Handle("/", proxy)
	mux.HandleFunc("GET /_/health", func(w http.ResponseWriter, r *http.Request) {
		if term.Err() != nil {
			http.Error(w, "shutting down", http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("GET /_/ready", func(w http.ResponseWriter, r *http.Request) {
		r.URL.Path = cmp.Or(os.Getenv("ready_path"), "/_/health")
		mux.ServeHTTP(w, r)
	})
	server := &http.Server{Addr: ":" + cmp.Or(os.Getenv("port"), "8080"), Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- server.ListenAndServe() }()
	select {
	case err := <-failed:
		return err
	case err := <-ended:
		return errors.Join(errors.New("the function ended"), err)
	case <-term.Done():
	}
	child.Process.Signal(syscall.SIGTERM)
	err = <-ended
	server.Close()
	return err
}
