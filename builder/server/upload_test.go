package server

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// deadlines takes read deadlines and keeps to none.
type deadlines struct{ *httptest.ResponseRecorder }

func (deadlines) SetReadDeadline(time.Time) error { return nil }

// TestPaced: what a body's reader takes between two reads is not held against the
// client, what the client takes is.
func TestPaced(t *testing.T) {
	read := func(t *testing.T, slow, between time.Duration) error {
		p := &paced{
			body: reader(func(b []byte) (int, error) {
				time.Sleep(slow)
				return strings.NewReader("x").Read(b)
			}),
			rc:      http.NewResponseController(deadlines{httptest.NewRecorder()}),
			stopped: context.Background(),
			start:   time.Now(), rate: 1, grace: 10 * time.Second,
		}
		for range 20 {
			if _, err := p.Read(make([]byte, 1)); err != nil {
				return err
			}
			time.Sleep(between)
		}
		return nil
	}
	synctest.Test(t, func(t *testing.T) {
		if err := read(t, time.Second, time.Minute); err != nil {
			t.Errorf("at the rate, with a slow reader: %v", err)
		}
		if err := read(t, 3*time.Second, 0); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("below the rate: %v", err)
		}
	})
}

type reader func([]byte) (int, error)

func (f reader) Read(b []byte) (int, error) { return f(b) }
