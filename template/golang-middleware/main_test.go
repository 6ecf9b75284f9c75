package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

// server is serve with the sample function.
type server struct {
	url  string
	term context.CancelFunc
	done chan error
}

func start(t *testing.T, env map[string]string) *server {
	t.Helper()
	r, w := io.Pipe()
	log.SetOutput(w)
	lines := make(chan string, 1)
	go func() {
		var addr string
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			if err != nil {
				return
			}
			if _, after, ok := strings.Cut(string(buf[:n]), "Listening on "); ok && addr == "" {
				addr = strings.TrimSpace(after)
				lines <- addr
			}
		}
	}()
	ctx, cancel := context.WithCancel(t.Context())
	s := &server{term: cancel, done: make(chan error, 1)}
	go func() {
		s.done <- serve(ctx, func(name string) string {
			if name == "upstream_url" {
				return "http://127.0.0.1:0"
			}
			return env[name]
		})
	}()
	t.Cleanup(func() {
		cancel()
		w.Close()
		log.SetOutput(os.Stderr)
	})
	select {
	case addr := <-lines:
		s.url = "http://" + addr
	case err := <-s.done:
		t.Fatalf("serve ended: %v", err)
	case <-time.After(limit):
		t.Fatalf("not listening after %v", limit)
	}
	return s
}

// limit is for what happens at once where nothing is wrong, on a machine as busy as can
// be.
const limit = time.Minute

func (s *server) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-s.done:
		return err
	case <-time.After(limit):
		t.Fatalf("still serving %s after SIGTERM", limit)
		return nil
	}
}

// post sends a body that ends when the returned writer is closed. When it
// returns, the function is reading it: the first part waits for 100 Continue.
func (s *server) post(t *testing.T) (*io.PipeWriter, <-chan string) {
	t.Helper()
	r, w := io.Pipe()
	answer := make(chan string, 1)
	req, err := http.NewRequestWithContext(t.Context(), "POST", s.url+"/any//path", r)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Expect", "100-continue")
	go func() {
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			answer <- err.Error()
			return
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		answer <- fmt.Sprint(res.StatusCode, " ", string(body), err)
	}()
	if _, err := io.WriteString(w, "one "); err != nil {
		t.Fatal(err)
	}
	return w, answer
}

// Some packages register themselves with the default mux, as pprof does.
func init() {
	http.HandleFunc("/debug/", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "the default mux")
	})
}

func TestServe(t *testing.T) {
	s := start(t, map[string]string{"healthcheck_interval": "0"})
	for _, path := range []string{"/", "/debug/pprof", "//twice"} {
		res, err := http.Post(s.url+path, "text/plain", strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || string(body) != "Body: x" {
			t.Errorf("%s answered %q, %v", path, body, err)
		}
	}
}

// TestShutdown: a request that runs when SIGTERM comes is answered, also with
// no healthcheck_interval, and one that comes within the interval too.
func TestShutdown(t *testing.T) {
	t.Run("no interval", func(t *testing.T) {
		s := start(t, map[string]string{"healthcheck_interval": "0"})
		body, answer := s.post(t)
		s.term()
		// By and by: a busy machine takes a while to tell it of the signal.
		for end := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
			res, err := http.Get(s.url)
			if err != nil {
				break
			}
			res.Body.Close()
			if time.Now().After(end) {
				t.Fatal("requests are accepted after healthcheck_interval")
			}
		}
		io.WriteString(body, "two")
		body.Close()
		if got := <-answer; got != "200 Body: one two<nil>" {
			t.Errorf("answered %q", got)
		}
		if err := s.wait(t); err != nil {
			t.Error(err)
		}
	})
	t.Run("within the interval", func(t *testing.T) {
		s := start(t, map[string]string{"healthcheck_interval": "4s"})
		s.term()
		time.Sleep(100 * time.Millisecond)
		body, answer := s.post(t)
		body.Close()
		if got := <-answer; got != "200 Body: one <nil>" {
			t.Errorf("answered %q", got)
		}
		if err := s.wait(t); err != nil {
			t.Error(err)
		}
	})
	t.Run("a request that does not end", func(t *testing.T) {
		s := start(t, map[string]string{"healthcheck_interval": "0", "write_timeout": "200ms"})
		body, _ := s.post(t)
		defer body.Close()
		s.term()
		if err := s.wait(t); err == nil {
			t.Error("no error for a request that was cut off")
		}
	})
}

// TestReadTimeout: read_timeout bounds a body that stops arriving.
func TestReadTimeout(t *testing.T) {
	s := start(t, map[string]string{"read_timeout": "2s", "healthcheck_interval": "0"})
	body, answer := s.post(t)
	defer body.Close()
	select {
	case got := <-answer:
		if strings.HasPrefix(got, "200") {
			t.Errorf("answered %q", got)
		}
	case <-time.After(limit):
		t.Errorf("no answer %v after read_timeout", limit)
	}
}

// TestMaxHeaderBytes: a larger header gets 431, of one line and of many; by default
// it may have what net/http allows.
func TestMaxHeaderBytes(t *testing.T) {
	for _, tt := range []struct {
		limit       string
		lines, size int
		status      int
	}{
		{"16384", 1, 16000, 200},
		{"16384", 100, 160, 200},
		{"16384", 1, 24000, 431},
		{"16384", 1000, 25, 431},
		{"", 1, 900_000, 200},
		{"", 1, 1_100_000, 431},
	} {
		s := start(t, map[string]string{"max_header_bytes": tt.limit, "healthcheck_interval": "0"})
		req, err := http.NewRequestWithContext(t.Context(), "GET", s.url, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := range tt.lines {
			req.Header.Set(fmt.Sprint("X-", i), strings.Repeat("x", tt.size-len("X-000: \r\n")))
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != tt.status {
			t.Errorf("limit %q, %d lines of %d bytes: %s", tt.limit, tt.lines, tt.size, res.Status)
		}
	}
}

func TestListenFails(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, upstream := range []string{"http://" + l.Addr().String(), "https://127.0.0.1:0", "127.0.0.1:8082", "http://%"} {
		err := serve(t.Context(), func(name string) string {
			if name == "upstream_url" {
				return upstream
			}
			return ""
		})
		if err == nil {
			t.Errorf("upstream_url %q: no error", upstream)
		}
	}
}

func TestListenAddr(t *testing.T) {
	for _, tt := range []struct{ upstream, httpUpstream, want string }{
		{"", "", "127.0.0.1:8082"},
		{"http://127.0.0.1:9000", "", "127.0.0.1:9000"},
		{"http://127.0.0.1:9000", "http://localhost:9001/", "localhost:9001"},
		{"http://[::1]", "", "[::1]:80"},
	} {
		got, err := listenAddr(func(name string) string {
			return map[string]string{"upstream_url": tt.upstream, "http_upstream_url": tt.httpUpstream}[name]
		})
		if err != nil || got != tt.want {
			t.Errorf("%q, %q: %q, %v; want %q", tt.upstream, tt.httpUpstream, got, err, tt.want)
		}
	}
}

func TestDuration(t *testing.T) {
	const fallback = 7 * time.Second
	for _, tt := range []struct {
		text string
		want time.Duration
	}{
		{"", fallback},
		{"0", 0},
		{"15", 15 * time.Second},
		{"1m30s", 90 * time.Second},
		{"250ms", 250 * time.Millisecond},
		{"-1", fallback},
		{"-1s", fallback},
		{"soon", fallback},
	} {
		if got := duration(func(string) string { return tt.text }, "read_timeout", fallback); got != tt.want {
			t.Errorf("%q: %s, want %s", tt.text, got, tt.want)
		}
	}
}

func TestSize(t *testing.T) {
	const fallback = 7
	for text, want := range map[string]int{"": fallback, "16384": 16384, "0": fallback, "-1": fallback, "16KiB": fallback, "1e3": fallback} {
		if got := size(func(string) string { return text }, "max_header_bytes", fallback); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}
