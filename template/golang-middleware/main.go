// Command handler is what of-watchdog runs: an HTTP server for one function.
//
// Its environment, where a duration is a Go duration or a number of seconds:
//
//	upstream_url          where to listen, as of-watchdog knows it (http://127.0.0.1:8082)
//	read_timeout          for a whole request with its body (30s); 0 is none
//	write_timeout         for a whole answer, from the end of the request's header (30s)
//	healthcheck_interval  how long to go on accepting after SIGTERM (write_timeout); 0 is not at all
//	max_header_bytes      of a request's header, beside which net/http allows 4096 (1048576)
//
// The defaults of durations are of-watchdog's own, so that neither gives up before
// the other. A header of many short lines takes up to 25 times its bytes.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"handler/function"
)

const (
	defaultUpstream = "http://127.0.0.1:8082"
	defaultTimeout  = 30 * time.Second

	// headerTimeout is for a header alone, which of-watchdog sends in one piece.
	headerTimeout = 10 * time.Second

	// idleTimeout is longer than of-watchdog keeps an idle connection, 90s at
	// most: were it shorter, a request could be sent into a closing one.
	idleTimeout = 2 * time.Minute
)

func main() {
	term, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := serve(term, os.Getenv); err != nil {
		log.Fatal(err)
	}
}

// serve answers requests until term is done, then for healthcheck_interval
// more, and then waits up to write_timeout for those that still run.
func serve(term context.Context, getenv func(string) string) error {
	readTimeout := duration(getenv, "read_timeout", defaultTimeout)
	writeTimeout := duration(getenv, "write_timeout", defaultTimeout)
	if writeTimeout == 0 {
		// of-watchdog refuses to start with none.
		writeTimeout = defaultTimeout
	}
	interval := duration(getenv, "healthcheck_interval", writeTimeout)

	addr, err := listenAddr(getenv)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	log.Printf("Listening on %s", l.Addr())

	s := &http.Server{
		// Not the default mux: what a package registers there is not for the
		// function's callers.
		Handler:           http.HandlerFunc(function.Handle),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    size(getenv, "max_header_bytes", http.DefaultMaxHeaderBytes),
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()

	select {
	case err := <-served:
		return fmt.Errorf("serving: %w", err)
	case <-term.Done():
	}
	log.Printf("SIGTERM: accepting requests for another %s", interval)
	select {
	case err := <-served:
		return fmt.Errorf("serving: %w", err)
	case <-time.After(interval):
	}

	ctx, cancel := context.WithTimeout(context.Background(), writeTimeout)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		return errors.Join(fmt.Errorf("waiting for requests to end: %w", err), s.Close())
	}
	return nil
}

// listenAddr is the host and port of upstream_url: one setting for both sides,
// and by default on loopback, so that nothing gets past of-watchdog.
func listenAddr(getenv func(string) string) (string, error) {
	upstream := getenv("http_upstream_url")
	if upstream == "" {
		upstream = getenv("upstream_url")
	}
	if upstream == "" {
		upstream = defaultUpstream
	}
	u, err := url.Parse(upstream)
	if err != nil {
		return "", fmt.Errorf("reading upstream_url: %w", err)
	}
	if u.Scheme != "http" || u.Hostname() == "" {
		return "", fmt.Errorf("upstream_url is %q, not http://host:port", upstream)
	}
	port := u.Port()
	if port == "" {
		port = "80"
	}
	return net.JoinHostPort(u.Hostname(), port), nil
}

// duration reads one variable, a Go duration or a number of seconds. Like
// of-watchdog it takes the fallback for one it cannot read, but says so.
func duration(getenv func(string) string, name string, fallback time.Duration) time.Duration {
	text := getenv(name)
	if text == "" {
		return fallback
	}
	d, err := time.ParseDuration(text)
	if seconds, convErr := strconv.Atoi(text); convErr == nil {
		d, err = time.Duration(seconds)*time.Second, nil
	}
	if err != nil || d < 0 {
		log.Printf("%s is %q, not a duration: using %s", name, text, fallback)
		return fallback
	}
	return d
}

// size reads one variable, a number of bytes above 0. It takes the fallback for one
// it cannot read, and says so.
func size(getenv func(string) string, name string, fallback int) int {
	text := getenv(name)
	if text == "" {
		return fallback
	}
	n, err := strconv.Atoi(text)
	if err != nil || n <= 0 {
		log.Printf("%s is %q, not a number of bytes: using %d", name, text, fallback)
		return fallback
	}
	return n
}
