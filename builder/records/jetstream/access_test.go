package jetstream

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/nats-io/nats.go"
)

// TestLogin reads the file of the credential at each connection. A file that is neither of the two
// forms makes no connection.
func TestLogin(t *testing.T) {
	file := filepath.Join(t.TempDir(), "credential")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("builder:first")
	var o nats.Options
	for _, opt := range (Access{Credential: file}).Options() {
		if err := opt(&o); err != nil {
			t.Fatal(err)
		}
	}
	creds := "-----BEGIN NATS USER JWT-----\na.b.c\n------END NATS USER JWT------\n"
	for _, tt := range []struct {
		name, text, user, password, jwt string
		fails                           bool
	}{
		{"a user and a password", "builder:second:x\n", "builder", "second:x", "", false},
		{"a .creds file", creds, "", "", "a.b.c", false},
		{"half a .creds file", creds[:10], "", "", "", true},
		{"an empty file", "", "", "", "", true},
	} {
		write(tt.text)
		jwt, err := o.UserJWT()
		if jwt != tt.jwt || err != nil != tt.fails {
			t.Errorf("%s: the JWT is %q, %v", tt.name, jwt, err)
		}
		if user, password := o.UserInfo(); !tt.fails && (user != tt.user || password != tt.password) {
			t.Errorf("%s: the user is %q, and the password %q", tt.name, user, password)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := o.UserJWT(); err == nil {
		t.Error("without the file there is a connection")
	}
}
