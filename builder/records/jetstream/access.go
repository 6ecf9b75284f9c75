package jetstream

import (
	"bytes"
	"errors"
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
		opts = append(opts, nats.UserInfoHandler(a.userAndPassword), nats.UserJWT(a.jwt, a.sign))
	}
	return opts
}

// nats.go asks for the user and the JWT each time it connects, also again. The form of the file at that
// time decides which of the two is empty. If the address has a user, nats.go does not ask for one.

// userAndPassword are empty for a .creds file, and for one that cannot be read.
func (a Access) userAndPassword() (user, password string) {
	text, err := os.ReadFile(a.Credential)
	if err != nil || isCreds(text) {
		return "", ""
	}
	u, p, _ := bytes.Cut(bytes.TrimSpace(text), []byte(":"))
	return string(u), string(p)
}

// jwt is empty for a file with a user and a password. It fails for a file that is neither, such as one
// that is being written: a connection without a login could reach another account.
func (a Access) jwt() (string, error) {
	text, err := os.ReadFile(a.Credential)
	switch {
	case err != nil:
		return "", err
	case !isCreds(text) && !bytes.Contains(text, []byte(":")):
		return "", errors.New("reading the credential for NATS: it is neither user:password nor a .creds file")
	case !isCreds(text):
		return "", nil
	}
	var o nats.Options
	if err := nats.UserCredentialBytes(text)(&o); err != nil {
		return "", err
	}
	return o.UserJWT()
}

// sign signs the server's nonce with the key of a .creds file.
func (a Access) sign(nonce []byte) ([]byte, error) {
	text, err := os.ReadFile(a.Credential)
	if err != nil {
		return nil, err
	}
	var o nats.Options
	if err := nats.UserCredentialBytes(text)(&o); err != nil {
		return nil, err
	}
	return o.SignatureCB(nonce)
}

func isCreds(text []byte) bool { return bytes.Contains(text, []byte("-----BEGIN NATS USER JWT-----")) }
