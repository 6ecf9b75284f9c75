package jetstream

import (
	"bytes"
	"os"

	"github.com/nats-io/nats.go"
)

// Access says how to reach NATS: by files that are read again at each connection.
type Access struct {
	// Credential is a file with "user:password", or a .creds file as nsc writes it. Empty is
	// no credential.
	Credential string

	// CA is a file of the CAs that signed the servers' certificates, in PEM. It asks for TLS.
	// Empty leaves TLS to the address and the server, and the CAs to the system.
	CA string
}

// Options are the Options.NATS for it. A file that cannot be read is a connection that fails, and
// is tried again.
func (a Access) Options() []nats.Option {
	var opts []nats.Option
	if a.CA != "" {
		opts = append(opts, nats.RootCAs(a.CA))
	}
	if a.Credential != "" {
		opts = append(opts, a.login)
	}
	return opts
}

// login is a nats.Option. It looks at the file anew for each connection that is made, because its
// form decides which of NATS's logins it is.
func (a Access) login(o *nats.Options) error {
	text, err := os.ReadFile(a.Credential)
	if err != nil {
		return err
	}
	if bytes.Contains(text, []byte("-----BEGIN NATS USER JWT-----")) {
		return nats.UserCredentials(a.Credential)(o)
	}
	return nats.UserInfoHandler(a.userAndPassword)(o)
}

// userAndPassword reads them for each connection that is made again. Of a file that cannot be read
// they are empty, and the server refuses them.
func (a Access) userAndPassword() (user, password string) {
	text, err := os.ReadFile(a.Credential)
	if err != nil {
		return "", ""
	}
	u, p, _ := bytes.Cut(bytes.TrimSpace(text), []byte(":"))
	return string(u), string(p)
}
